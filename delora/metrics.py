"""The metrics of tasks, each task's also as one `evaluate` Metric.

GLUE's are computed here: no script is fetched, no file written, nothing imported that takes seconds. A task of one's
own takes those of scikit-learn and SciPy in `OF_CLASSES` and `OF_SCORES`, or any of `evaluate` by its name: of the hub,
its cache, or a folder with a script.

All values are fractions, not percents, and equal scikit-learn's and SciPy's. Constant predictions give what those give:
Matthews and F1 are 0, the correlations are NaN, being undefined. So are correlations of predictions that are not
finite and of fewer than two rows. A NaN ranks below every number where checkpoints are compared.
"""

import functools
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from delora.config import did_you_mean
from delora.errors import UserError
from delora.tasks import TASKS, Task

if TYPE_CHECKING:
    import evaluate

GLUES = {name for task in TASKS.values() for name in task.metrics}  # computed here
LOWER = ("mse", "mae", "rmse")  # are better: no headline, by which the highest is chosen
OF_SCORES = ("pearson", "spearman", "pearson_spearman", "r2", *LOWER)
OF_TWO = ("f1", "precision", "recall")  # take the second label against the first
OF_CLASSES = (
    *("accuracy", "balanced_accuracy", *OF_TWO, "macro_f1", "micro_f1", "weighted_f1"),
    *("macro_precision", "macro_recall", "matthews", "kappa", "roc_auc"),
)


def score(
    task: Task, predictions: np.ndarray, labels: np.ndarray, logits: np.ndarray | None = None
) -> dict[str, float]:
    """The task's metrics by name.

    Args:
        predictions: (rows,) class ids, or scores where the task's labels are scores.
        labels: (rows,) of the same kind.
        logits: (rows, classes), for metrics of probabilities.

    Raises:
        ValueError: no rows, or predictions and labels differ in shape.
    """
    if predictions.shape != labels.shape or len(labels) == 0:
        raise ValueError(f"predictions of shape {predictions.shape} for labels of shape {labels.shape}")
    if task.name in TASKS:
        return _values(task, predictions, labels, logits)
    found: dict[str, float] = metric(task).compute(predictions=predictions, references=labels, logits=logits)
    return found


def guessing(task: Task, labels: np.ndarray) -> float:
    """The headline score of always guessing the same, a fraction: the best that needs no training.

    Correlations, which are undefined there, count as 0.

    Args:
        labels: (rows,) class ids, or scores.
    """
    values, counts = np.unique(labels, return_counts=True) if task.labels else (np.array([labels.mean()]), np.ones(1))
    found = []
    for value in values[np.argsort(-counts, kind="stable")[:10]]:
        logits = np.eye(task.num_labels)[np.full(len(labels), value)] if task.labels else None
        found.append(score(task, np.full_like(labels, value), labels, logits)[task.headline])
    return max([value for value in found if math.isfinite(value)], default=0.0)


def require(task: Task) -> None:
    """Finds out whether the metrics of a task can be computed.

    Raises:
        UserError: one does not fit the labels, is no headline, or neither ours nor of `evaluate`.
    """
    fits, others = (OF_CLASSES, OF_SCORES) if task.labels else (OF_SCORES, OF_CLASSES)
    faults = []
    for name in task.metrics:
        if name in others:
            faults.append(
                f"task.metric={name}: not of {'classes' if task.labels else 'a regression'}: {', '.join(fits)}"
            )
        elif name in OF_TWO and task.num_labels > 2:
            faults.append(f"task.metric={name}: of two labels, here are {task.num_labels}: macro_{name}")
        elif name not in fits:
            try:
                _of_evaluate(name)
            except UserError as error:
                faults.append(f"{error}; known without it: {', '.join(fits)}{did_you_mean(name, fits)}")
    if task.headline in LOWER:
        higher = "r2" if task.labels is None else "accuracy"
        faults.append(
            f"task.metric: {task.headline} is best when low; name one first that is best when high, as {higher}"
        )
    if faults:
        raise UserError("\n".join(faults))


@functools.cache
def metric(task: Task) -> "evaluate.Metric":
    """What `score` computes, as a Metric of `evaluate`. Imports `evaluate`, which takes seconds, at the first call."""
    import datasets
    import evaluate

    value = datasets.Value("int64" if task.labels else "float64")

    class OfTask(evaluate.Metric):
        def _info(self) -> evaluate.MetricInfo:
            return evaluate.MetricInfo(
                description=f"{', '.join(task.metrics)} of {task.name}",
                citation="",
                features=datasets.Features({"predictions": value, "references": value}),
            )

        def _build_data_dir(self) -> str:
            return ""  # rows are kept in memory, so the folder that processes would share is not made

        def _compute(
            self, predictions: np.ndarray, references: np.ndarray, logits: np.ndarray | None = None
        ) -> dict[str, float]:
            return _values(task, np.asarray(predictions), np.asarray(references), logits)

    return OfTask(config_name=task.name, keep_in_memory=True, seed=0)


@functools.cache
def _of_evaluate(name: str) -> "evaluate.EvaluationModule":
    """Raises UserError where `evaluate` finds no metric of that name."""
    import evaluate

    from delora.data.hub import from_cache_where_offline, why_unreachable

    try:
        with from_cache_where_offline():
            return evaluate.load(name)
    except Exception as error:  # network, hub, disk, and whatever a script raises while it is imported
        why = str(error).splitlines()[0]
        if (offline := why_unreachable()) and not Path(name).exists():
            why = f"not in its cache, and the hub cannot be reached ({offline})"
        raise UserError(f"task.metric={name}: evaluate has no such metric here: {why}") from error


def _values(
    task: Task, predictions: np.ndarray, labels: np.ndarray, logits: np.ndarray | None = None
) -> dict[str, float]:
    if GLUES.issuperset(task.metrics) and (task.labels is None or task.num_labels == 2 or task.name in TASKS):
        values = (_of_classes if task.labels else _of_scores)(predictions, labels)
        return {name: values[name] for name in task.metrics}
    return {name: _value(name, task, predictions, labels, logits) for name in task.metrics}


def _value(name: str, task: Task, predictions: np.ndarray, labels: np.ndarray, logits: np.ndarray | None) -> float:
    """One metric, by the library that defines it."""
    if name not in (OF_CLASSES if task.labels else OF_SCORES):
        found = _of_evaluate(name).compute(predictions=predictions, references=labels)
        values = [value for value in (found or {}).values() if isinstance(value, float | int | np.number)]
        return float(found[name]) if found and name in found else float(values[0]) if values else math.nan
    if name in ("pearson", "spearman", "pearson_spearman"):
        return _of_scores(predictions, labels)[name]
    if not np.isfinite(predictions).all():
        return math.nan
    from sklearn import metrics as sk

    average, _, kind = name.rpartition("_")
    if kind in OF_TWO:
        function: Callable[..., Any] = getattr(sk, f"{kind}_score")
        return float(function(labels, predictions, average=average or "binary", zero_division=0.0))
    if name == "roc_auc":
        return _roc_auc(labels, logits)
    if name == "rmse":
        return math.sqrt(sk.mean_squared_error(labels, predictions))
    return float(
        {
            "accuracy": sk.accuracy_score,
            "balanced_accuracy": sk.balanced_accuracy_score,
            "matthews": sk.matthews_corrcoef,
            "kappa": sk.cohen_kappa_score,
            "r2": sk.r2_score,
            "mse": sk.mean_squared_error,
            "mae": sk.mean_absolute_error,
        }[name](labels, predictions)
    )


def _roc_auc(labels: np.ndarray, logits: np.ndarray | None) -> float:
    """Of two classes the second's; of more the mean of each against the rest. NaN where a class is not there."""
    from sklearn.metrics import roc_auc_score

    from delora.predict import softmax

    if logits is None or not np.isfinite(logits).all() or len(np.unique(labels)) < logits.shape[1]:
        return math.nan
    chances = softmax(logits)
    return float(roc_auc_score(labels, chances[:, 1] if chances.shape[1] == 2 else chances, multi_class="ovr"))


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
