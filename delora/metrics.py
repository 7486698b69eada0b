"""The GLUE metrics, also as one `evaluate` Metric a task, computed on this machine: no script fetched, no file written.

All values are fractions, not percents, and equal scikit-learn's and SciPy's. Constant predictions give what those give:
Matthews and F1 are 0, the correlations are NaN, being undefined. So are correlations of predictions that are not
finite and of fewer than two rows. A NaN ranks below every number where checkpoints are compared.
"""

import functools
import math
import warnings
from typing import TYPE_CHECKING

import numpy as np

from delora.tasks import TASKS, Task

if TYPE_CHECKING:
    import evaluate


def score(task: Task, predictions: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """The task's metrics by name.

    Args:
        predictions: (rows,) class ids, or scores where the task's labels are scores.
        labels: (rows,) of the same kind.

    Raises:
        ValueError: no rows, or predictions and labels differ in shape.
    """
    if predictions.shape != labels.shape or len(labels) == 0:
        raise ValueError(f"predictions of shape {predictions.shape} for labels of shape {labels.shape}")
    return _values(task, predictions, labels)


@functools.cache
def metric(task_name: str) -> "evaluate.Metric":
    """What `score` computes, as a Metric of `evaluate`. Imports `evaluate`, which takes seconds, at the first call."""
    import datasets
    import evaluate

    task = TASKS[task_name]
    value = datasets.Value("int64" if task.labels else "float64")

    class Glue(evaluate.Metric):
        def _info(self) -> evaluate.MetricInfo:
            return evaluate.MetricInfo(
                description=f"{', '.join(task.metrics)} of GLUE's {task.name}",
                citation="",
                features=datasets.Features({"predictions": value, "references": value}),
            )

        def _build_data_dir(self) -> str:
            return ""  # rows are kept in memory, so the folder that processes would share is not made

        def _compute(self, predictions: np.ndarray, references: np.ndarray) -> dict[str, float]:
            return _values(task, np.asarray(predictions), np.asarray(references))

    return Glue(config_name=task.name, keep_in_memory=True, seed=0)


def _values(task: Task, predictions: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    values = (_of_classes if task.labels else _of_scores)(predictions, labels)
    return {name: values[name] for name in task.metrics}


def _of_classes(predictions: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Accuracy of any number of classes; F1 and Matthews take class 1 against the rest."""
    positive, true = predictions == 1, labels == 1
    tp, fp = int((positive & true).sum()), int((positive & ~true).sum())
    fn, tn = int((~positive & true).sum()), int((~positive & ~true).sum())
    spread = (tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)
    return {
        "accuracy": float((predictions == labels).mean()),
        "f1": 2 * tp / (2 * tp + fp + fn) if tp else 0.0,
        "matthews": (tp * tn - fp * fn) / math.sqrt(spread) if spread else 0.0,
    }


def _of_scores(predictions: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    import scipy.stats

    predictions, labels = predictions.astype(np.float64), labels.astype(np.float64)
    if len(labels) < 2 or not np.isfinite(predictions).all():
        return dict.fromkeys(("pearson", "spearman", "pearson_spearman"), math.nan)
    with warnings.catch_warnings():
        # SciPy warns of constant predictions; the NaN says it already, for every trial and epoch.
        warnings.simplefilter("ignore", scipy.stats.ConstantInputWarning)
        warnings.simplefilter("ignore", scipy.stats.NearConstantInputWarning)
        pearson = float(scipy.stats.pearsonr(labels, predictions).statistic)
        spearman = float(scipy.stats.spearmanr(labels, predictions).statistic)
    return {"pearson": pearson, "spearman": spearman, "pearson_spearman": (pearson + spearman) / 2}
