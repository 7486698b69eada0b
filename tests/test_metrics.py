import math
import os
import subprocess
import sys
import warnings

import evaluate
import numpy as np
import pytest
import scipy.stats
import sklearn.metrics

from delora.metrics import metric, score
from delora.tasks import TASKS


def reference(name: str, predictions: np.ndarray, labels: np.ndarray) -> float:
    """The metric by the libraries that define it here."""
    if name == "pearson_spearman":
        return (reference("pearson", predictions, labels) + reference("spearman", predictions, labels)) / 2
    return {
        "accuracy": sklearn.metrics.accuracy_score,
        "f1": sklearn.metrics.f1_score,
        "matthews": sklearn.metrics.matthews_corrcoef,
        "pearson": lambda a, b: scipy.stats.pearsonr(a, b).statistic,
        "spearman": lambda a, b: scipy.stats.spearmanr(a, b).statistic,
    }[name](labels, predictions)


def draw(task, kind: str, rows: int, random: np.random.RandomState) -> np.ndarray:
    if kind == "constant low":
        return np.zeros(rows, np.int64) if task.labels else np.zeros(rows)
    if kind == "constant high":
        return np.ones(rows, np.int64) if task.labels else np.full(rows, 4.2)
    return random.randint(0, task.num_labels, rows) if task.labels else random.randint(0, 26, rows) / 5


@pytest.mark.filterwarnings("ignore")  # those of the libraries' own calls
@pytest.mark.parametrize("kind", ["random", "constant low", "constant high"])
@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_equals_scikit_learn_and_scipy(task, kind):
    random = np.random.RandomState(0)
    for rows in (2, 3, 40, 1000):
        labels = draw(task, "random", rows, random)
        predictions = draw(task, kind, rows, random)
        found = score(task, predictions, labels)
        assert list(found) == list(task.metrics)
        for name, value in found.items():
            assert value == pytest.approx(reference(name, predictions, labels), abs=1e-14, nan_ok=True)


@pytest.mark.parametrize(
    ("task", "predictions", "labels", "expected"),
    [
        ("cola", [1, 1, 1, 0], [1, 1, 0, 0], {"matthews": 1 / math.sqrt(3)}),
        ("mrpc", [1, 1, 1, 0], [1, 1, 0, 0], {"accuracy": 0.75, "f1": 0.8}),
        ("mnli", [2, 1, 0], [2, 1, 1], {"accuracy": 2 / 3}),
        ("stsb", [1.0, 2.0, 9.0], [1.0, 2.0, 3.0], {"pearson": 8 / math.sqrt(76), "spearman": 1.0}),
    ],
)
def test_values_computed_by_hand(task, predictions, labels, expected):
    found = score(TASKS[task], np.array(predictions), np.array(labels))
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize("name", ["cola", "mrpc", "stsb"])
def test_evaluates_own_way_of_computing_gives_the_same(name):
    task, random = TASKS[name], np.random.RandomState(1)
    predictions, labels = draw(task, "random", 50, random), draw(task, "random", 50, random)
    assert isinstance(metric(task), evaluate.Metric)
    assert metric(task).compute(predictions=predictions, references=labels) == score(task, predictions, labels)


def test_undefined_correlations_are_nan_without_a_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for predictions in ([2.0, 2.0, 2.0], [1.0, math.nan, 2.0], [1.0, math.inf, 2.0]):
            found = score(TASKS["stsb"], np.array(predictions), np.array([0.0, 1.0, 5.0]))
            assert all(map(math.isnan, found.values()))
        assert math.isnan(score(TASKS["stsb"], np.ones(1), np.ones(1))["pearson"])
        for name in ("cola", "mrpc"):
            score(TASKS[name], np.zeros(3, np.int64), np.zeros(3, np.int64))


def test_float32_scores_are_correlated_in_float64():
    random = np.random.RandomState(2)
    predictions, labels = (1e4 + random.rand(300)).astype(np.float32), random.rand(300) * 5
    expected = scipy.stats.pearsonr(labels, predictions.astype(np.float64)).statistic
    assert score(TASKS["stsb"], predictions, labels)["pearson"] == pytest.approx(expected, abs=1e-14)


def test_unequal_or_empty_input_is_refused():
    for predictions, labels in (
        (np.zeros(3), np.zeros(4)),
        (np.zeros(0), np.zeros(0)),
        (np.zeros((3, 1)), np.zeros(3)),
    ):
        with pytest.raises(ValueError, match="predictions of shape"):
            score(TASKS["rte"], predictions, labels)


def test_needs_no_network_and_writes_nothing(tmp_path):
    program = """
import socket
def refuse(*_): raise AssertionError("a socket was opened")
socket.socket.connect = socket.getaddrinfo = refuse
import numpy as np
from delora.metrics import metric, score
from delora.tasks import TASKS
print(score(TASKS["mrpc"], np.array([0, 1]), np.array([0, 1])))
print(metric(TASKS["stsb"]).compute(predictions=np.arange(3.0), references=np.arange(3.0)))
"""
    home = tmp_path / "home"
    environment = {**os.environ, "HF_HOME": str(home), "HOME": str(home), "XDG_CACHE_HOME": str(home)}
    subprocess.run([sys.executable, "-c", program], env=environment, check=True)
    assert not list(home.glob("**/metrics*")) and not list(home.glob("**/*.arrow*"))
