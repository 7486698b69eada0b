"""What a tuning budget buys, against the enumeration of every draw; and which method and rate a report says to take."""

import csv
import itertools
import json
import math
from fractions import Fraction
from pathlib import Path
from statistics import fmean, variance

import fake_trials
import numpy as np
import pytest
from scipy import stats

from delora.report import budget, statistics, summary, tables, trials
from delora.report.budget import Budget
from delora.report.cli import main


def best_of(drawn: tuple[tuple[float, float], ...]) -> tuple[float, float]:
    """The highest validation score, and the mean score of those that have it."""
    top = max(validation for validation, _ in drawn)
    return top, fmean(score for validation, score in drawn if validation == top)


def enumerated(configs: list[tuple[float, float]], m: int) -> np.ndarray:
    """The mean over all orders in which m of the configs are drawn, the first of equals taken, as (2,)."""
    draws = list(itertools.permutations(configs, m))
    return np.mean([max(drawn, key=lambda config: config[0]) for drawn in draws], 0)


CONFIGS = [(0.7, 0.2), (0.9, 0.6), (0.8, 0.5), (0.9, 0.4), (0.3, 0.9), (0.7, 0.1)]  # two pairs are equal on validation


def test_the_expected_best_is_the_mean_over_all_subsets():
    found = np.array(budget.expected_best(*np.array(CONFIGS).T))
    expected = np.array([enumerated(CONFIGS, m) for m in range(1, 7)]).T
    np.testing.assert_allclose(found, expected, rtol=1e-13)
    for n in (1, 2, 7, 60):
        exact = [[Fraction(math.comb(i - 1, m - 1), math.comb(n, m)) for i in range(1, n + 1)] for m in range(1, n + 1)]
        np.testing.assert_allclose(budget.weights(n), np.array(exact, float), rtol=1e-12)


def test_it_is_unbiased_where_drawing_with_replacement_is_not():
    """Over all 256 samples of four draws from a population, whose expected best of m is known."""
    population, n = [0.5, 0.6, 0.6, 0.9], 4
    samples = list(itertools.product(population, repeat=n))
    for m in range(1, n + 1):
        truth = fmean(max(drawn) for drawn in itertools.product(population, repeat=m))
        ours = fmean(float(budget.expected_best(np.array(s), np.array(s))[0][m - 1]) for s in samples)
        assert ours == pytest.approx(truth, abs=1e-12)
        theirs = fmean(fmean(max(drawn) for drawn in itertools.product(s, repeat=m)) for s in samples)
        assert theirs < truth - 0.01 if m > 1 else theirs == pytest.approx(truth)


def test_the_interval_is_the_jackknife_s_over_configs_and_seeds():
    random = np.random.default_rng(3)
    scores_2NS = random.normal(0.8, 0.05, (2, 6, 4)) + random.normal(0, 0.02, (2, 1, 4))

    def by_hand(means_2N: np.ndarray, m: int) -> np.ndarray:
        return np.mean([best_of(drawn) for drawn in itertools.combinations(zip(*means_2N, strict=True), m)], 0)

    half_2M = budget.interval(*scores_2NS)
    assert np.isnan(half_2M[:, 3:]).all() and not np.isnan(half_2M[:, :3]).any()
    for m in (1, 2, 3):
        without_config = [by_hand(np.delete(scores_2NS, i, 1).mean(2), m) for i in range(6)]
        without_seed = [by_hand(np.delete(scores_2NS, s, 2).mean(2), m) for s in range(4)]
        for of in (0, 1):
            a, b = ((len(v) - 1) ** 2 / len(v) * variance([x[of] for x in v]) for v in (without_config, without_seed))
            freedom = (a + b) ** 2 / (a**2 / 5 + b**2 / 3)
            assert half_2M[of, m - 1] == pytest.approx(stats.t.ppf(0.975, freedom) * math.sqrt(a + b), rel=1e-9)
    one_seed = budget.interval(*scores_2NS[:, :, :1])
    of_means = stats.t.ppf(0.975, 5) * scores_2NS[:, :, 0].std(1, ddof=1) / math.sqrt(6)
    np.testing.assert_allclose(one_seed[:, 0], of_means, rtol=1e-9)  # of one config it is that of the mean
    assert np.isnan(budget.interval(*scores_2NS[:, :2])).all()
    assert np.isnan(budget.interval(*np.full((2, 5, 3), 0.7))).all()


def of(label: str, means: list[float], hours: float) -> Budget:
    curve_3M = np.array([means, *[[math.nan] * len(means)] * 2])
    return Budget(label, (), 1, 0, curve_3M, curve_3M, hours, 10.0)


def test_where_two_curves_cross():
    a, b = of("a", [0.5, 0.7, 0.8, 0.82], 1.0), of("b", [0.6, 0.7, 0.75], 2.0)
    assert budget.leaders(a, b, "trials", "validation") == [("b", 1.0), ("a", 3.0)]
    assert budget.leaders(b, a, "epochs", "score") == [("b", 10.0), ("a", 20.0)]  # where both have 0.7
    c = of("c", [0.75, 0.81], 2.0)  # at 2 and 4 hours, where a has 0.7 and 0.82
    ((first, start), (second, at)) = budget.leaders(a, c, "hours", "validation")
    assert (first, start, second) == ("c", 2.0, "a")  # at 3 hours a has 0.8, c 0.78: it crosses 5/7 of the way there
    assert at == pytest.approx(2 + 0.05 / 0.07)
    assert budget.leaders(a, a, "trials", "score") == [] == budget.leaders(a, of("d", [1, 2], 9.0), "hours", "score")


@pytest.fixture(scope="module")
def tuned(tmp_path_factory) -> Path:
    """LoRA's four configs of two ranks, DoRA's four of which one has a seed less, DeLoRA's one; three seeds each."""
    root = tmp_path_factory.mktemp("tuned")
    lora = fake_trials.METHODS["lora"]
    for seed, (rank, factor, score) in itertools.product(
        (1, 2, 3), ((8, 1, 0.80), (8, 4, 0.84), (16, 1, 0.82), (16, 4, 0.70))
    ):
        folder = root / f"lora-{rank}-{factor}-{seed}"
        fake_trials.write(folder, score + seed / 100, score + seed / 50, method="lora", factor=factor, seed=seed)
        fake_trials.change(folder, config__method={**fake_trials.config()["method"], "rank": rank, "base_lr": lora[0]})
    for seed, (factor, score) in itertools.product((1, 2, 3), ((0.5, 0.86), (1, 0.855), (2, 0.60), (4, 0.99))):
        if (factor, seed) != (4, 3):
            lost = (factor, seed) == (2, 2)
            status = "diverged" if lost else "done"
            where = root / f"dora {factor} {seed}"
            fake_trials.write(where, score, method="dora", factor=factor, seed=seed, status=status)
    for seed in (1, 2, 3):
        fake_trials.write(root / f"delora-{seed}", 0.5, method="delora", seed=seed)
    fake_trials.change(root / "delora-3", trained_as="another")
    return root


def rows(path: Path) -> list[dict[str, str]]:
    return [*csv.DictReader(path.read_text(encoding="utf-8").splitlines()[1:])]


def test_configs_of_a_method_are_all_that_it_tried(tuned):
    (panel,) = statistics.panels(trials.read([tuned]).trials)
    lora, dora = budget.budgets(panel)  # DeLoRA tried one config
    assert (lora.label, lora.configs, lora.seeds, lora.left_out) == ("LoRA", 4, 3, 0)
    assert (dora.label, dora.configs, dora.seeds, dora.left_out) == ("DoRA", 3, 3, 1)
    configs = [(score + 0.04, score + 0.02) for score in (0.80, 0.84, 0.82, 0.70)]
    for m in (1, 2, 3, 4):
        np.testing.assert_allclose([lora.validation_3M[0, m - 1], lora.score_3M[0, m - 1]], enumerated(configs, m))
    floor = (0.6 + 279 / 408 + 0.6) / 3  # a diverged trial counts as guessing, the share of MRPC's larger class
    assert dora.validation_3M[0, 0] == pytest.approx((0.86 + 0.855 + floor) / 3)
    assert lora.x_M("hours")[-1] == pytest.approx(12 * 61 / 8 / 3600) and lora.x_M("epochs")[1] == 2 * 3 * 10
    assert dora.x_M("epochs")[2] == pytest.approx(8 * 10 + 10 * 230 / 1150)  # one diverged in step 230 of 1150


def test_a_report_says_which_method_and_rate_to_take(tuned, capsys):
    assert main([str(tuned)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("best mrpc: lora, accuracy 0.9000 on validation, 0.8800 in the mean of 3 seeds")
    assert said[4].startswith("### Which method and which rate: minilm") and "| MRPC | LoRA (rank 8) |" in said[8]
    found = rows(tuned / "report" / "answer-minilm-paper-glue.csv")
    assert [row["method"] for row in found] == ["LoRA (rank 8)", "DoRA", "DeLoRA"]
    lora, dora, delora = found
    assert (lora["lr"], lora["lr factor"], lora["n"], lora["validation"], lora["test"]) == (
        "0.0024",
        "4",
        "3",
        "88",
        "86",
    )
    assert (float(lora["test low"]), float(lora["test high"])) == (85.0, 87.0)
    assert lora["command"] == f"delora-run --again {tuned}/lora-8-4-3"
    assert dora["command"] == f"delora-run --again '{tuned}/dora 0.5 1'"
    assert (dora["configs"], dora["trials"], delora["trials"]) == ("4", "11", "3")
    assert float(dora["hours"]) == pytest.approx(11 * 61 / 8 / 3600, rel=1e-6)
    assert float(delora["trial-epochs"]) == 20  # one trial stands for the same training
    # it is 0.855 at 6e-4 and that of the floor below at 1.2e-3: between them it falls by a point from 0.86
    floor = (0.6 + 279 / 408 + 0.6) / 3
    assert float(dora["rate may be low"]) == pytest.approx(3e-4)
    assert float(dora["rate may be high"]) == pytest.approx(6e-4 * 2 ** (0.005 / (0.855 - floor)), rel=1e-6)
    assert "≤ 3e-4 to 6.09e-4 |" in (tuned / "report" / "tables.md").read_text(encoding="utf-8")
    page = (tuned / "report" / "index.html").read_text(encoding="utf-8")
    assert page.index("Which method and which rate") < page.index("<h2>Curves")
    assert "delora-run" not in (tuned / "report" / "tables.tex").read_text(encoding="utf-8")


def test_budgets_and_crossings_are_in_every_form(tuned, tmp_path):
    assert main([str(tuned), "--output", str(tmp_path)]) == 0
    found = rows(tmp_path / "budget-minilm-paper-glue.csv")
    assert [(row["method"], row["tried"]) for row in found] == [
        *(("LoRA", n) for n in "124"),
        *(("DoRA", n) for n in "123"),
    ]
    (panel,) = statistics.panels(trials.read([tuned]).trials)
    lora, dora = budget.budgets(panel)
    for row, (one, m) in zip(found, [*((lora, m) for m in (1, 2, 4)), *((dora, m) for m in (1, 2, 3))], strict=True):
        assert float(row["validation"]) == pytest.approx(100 * one.validation_3M[0, m - 1])
        assert float(row["test"]) == pytest.approx(100 * one.score_3M[0, m - 1])
        assert float(row["trial-epochs"]) == pytest.approx(m * one.epochs)
    (pair,) = rows(tmp_path / "crossings-minilm-paper-glue.csv")
    # of one to three configs: 0.83, 0.859, 0.87 of LoRA, 0.78, 0.858, 0.86 of DoRA; 0.81, 0.839, 0.85 on test
    assert pair["validation by configs"] == "LoRA" and pair["test by configs"] == "LoRA, DoRA from 2"
    text = (tmp_path / "tables.md").read_text(encoding="utf-8")
    assert "Left out, with fewer seeds than others: 1 of DoRA on MRPC." in text
    for axis in budget.AXES:
        assert (tmp_path / f"budget_by_{axis}.png").stat().st_size > 10_000
    data = json.loads(
        (tmp_path / "index.html").read_text(encoding="utf-8").split('id="data">')[1].split("</script>")[0]
    )
    views = {view["name"]: view for view in data["views"] if view["name"].startswith("budget")}
    assert list(views) == [f"budget: {split} by {axis}" for split in ("validation", "test") for axis in budget.AXES]
    (chart,) = views["budget: test by trials"]["charts"]
    assert [(series["label"], len(series["line"])) for series in chart["series"]] == [("LoRA", 4), ("DoRA", 3)]
    assert {series["label"] for series in chart["series"]} <= data["styles"].keys()
    shown = summary.make(tuned, tmp_path)
    lines = {chart["name"]: chart["lines"] for chart in shown["charts"]}["budget by epochs, test, MRPC, minilm"]
    assert lines["LoRA"][0] == [30.0, 60.0, 90.0, 120.0] and lines["LoRA"][1][3] == pytest.approx(86)
    assert "Which method and which rate: minilm, paper protocol" in shown["tables"]


def test_where_nothing_was_tuned_no_budget_is_drawn(tmp_path):
    for method in ("lora", "dora"):
        fake_trials.write(tmp_path / method, 0.8, method=method, protocol="standard")
    panels = statistics.panels(trials.read([tmp_path]).trials)
    assert not [table for table in tables.all_tables(panels) if table.name.startswith(("budget", "crossings"))]
    (answer,) = tables.answers(panels)
    assert "test" not in answer.columns and [row[6].text for row in answer.rows] == ["1", "1"]
    assert main([str(tmp_path)]) == 0 and not list((tmp_path / "report").glob("budget*"))
