"""The numbers of reports. Expected ones are worked out by hand, or by NumPy and SciPy beside the code."""

import itertools
import math

import fake_trials
import numpy as np
import pytest
import scipy.stats

from delora.report import statistics, tables, trials
from delora.report.statistics import Curve, Panel


def panels(root, **options) -> list[Panel]:
    return statistics.panels(trials.read([root]).trials, **options)


def curve(score_FS, factors, validation_FS=None, select="pooled") -> Curve:
    """A curve of given scores; without trials, whose folders the numbers do not need."""
    score_FS = np.array(score_FS, float)
    validation_FS = score_FS if validation_FS is None else np.array(validation_FS, float)
    seeds = list(range(score_FS.shape[1]))
    return Curve("a", np.array(factors, float), np.array(factors) * 1e-3, seeds, score_FS, validation_FS,
                 np.zeros(score_FS.shape, bool), {}, select)  # fmt: skip


# --- The best rate and what is read off a curve


def test_best_rate_is_chosen_on_validation():
    made = curve([[0.9], [0.7], [0.8]], [1, 2, 4], validation_FS=[[0.5], [0.6], [0.55]])
    assert made.best == 1
    assert statistics.robustness(made, None, 0.5).best.value == pytest.approx(0.7)


def test_best_rate_needs_all_seeds():
    made = curve([[0.9, math.nan], [0.8, 0.8], [0.7, 0.7]], [1, 2, 4])
    assert made.best == 1
    assert not made.best_is_on_edge
    assert curve([[0.8], [0.7]], [1, 2]).best_is_on_edge and curve([[0.7], [0.8]], [1, 2]).best_is_on_edge
    assert not curve([[0.8]], [1]).best_is_on_edge  # there is no grid


def test_the_papers_rule_chooses_with_the_lowest_seed_alone(tmp_path):
    validation_FS = [[0.70, 0.90, 0.90], [0.80, 0.60, 0.60], [0.75, 0.85, 0.85]]
    score_FS = [[0.1, 0.2, 0.3], [0.4, 0.5, 0.6], [0.7, 0.8, 0.9]]
    pooled = curve(score_FS, [1, 2, 4], validation_FS)
    first = curve(score_FS, [1, 2, 4], validation_FS, "first-seed")
    assert (pooled.best, first.best) == (0, 1)
    best = statistics.robustness(first, None, 0.0).best
    assert (best.value, best.low, best.high) == pytest.approx((0.5, 0.4, 0.6))  # 0.4 and 0.6 in 1 of 27 draws each
    for seed, factor, validation in itertools.product((43, 42), (1, 2), (0.6,)):
        lucky = 0.1 if (seed, factor) == (42, 2) else 0.0
        fake_trials.write(tmp_path / f"{seed}-{factor}", 0.5, validation + lucky - 0.2 * (seed > 42) * factor,
                          seed=seed, factor=factor)  # fmt: skip
    said = {}
    for select in statistics.SELECTS:
        (panel,) = panels(tmp_path, select=select)
        said[select] = panel.curves[0].best, tables.all_tables([panel])[0].notes
    assert (said["pooled"][0], said["first-seed"][0]) == (0, 1)
    assert "the highest mean validation score" in said["pooled"][1]
    assert "the highest validation score of the lowest seed alone, as in the paper" in said["first-seed"][1]


def test_the_lowest_seed_chooses_among_rates_that_all_seeds_have():
    nan = math.nan
    assert curve([[0.9, nan], [0.7, 0.1], [0.8, 0.1]], [1, 2, 4], select="first-seed").best == 2
    assert curve([[0.7, nan], [nan, 0.9], [0.9, nan]], [1, 2, 4], select="first-seed").best == 2
    assert curve([[0.7, nan], [nan, 0.9], [nan, 0.8]], [1, 2, 4], select="first-seed").best == 0  # it has no other
    assert curve([[nan, 0.9, 0.9], [0.7, nan, nan]], [1, 2], select="first-seed").best == 1


@pytest.mark.parametrize(
    ("scores", "factors", "width", "at_least"),
    [
        # 0.90 → 0.80 crosses 0.89 after 0.1 of a decade; 0.895 is tolerated; 0.895 → 0.70 crosses after 0.005 / 0.195
        ([0.80, 0.90, 0.895, 0.70], [1, 10, 100, 1000], 0.1 + 1 + 0.005 / 0.195, False),
        ([0.90, 0.88, 0.80], [1, 10, 100], 0.5, True),
        ([0.80, 0.895, 0.90], [1, 10, 100], 1 + 0.005 / 0.095, True),
        ([0.90, 0.90], [1, 4], math.log10(4), True),
        ([0.80, 0.90, 0.895], [1, 10, 100], 0.1 + 1, True),
        # what lies behind a drop is not reached
        ([0.70, 0.90, 0.80, 0.90, 0.70], [1, 10, 100, 1000, 10000], 0.01 / 0.2 + 0.01 / 0.1, False),
        ([0.90], [1], math.nan, False),
    ],
)
def test_tolerated_range(scores, factors, width, at_least):
    estimate = statistics.robustness(curve([[s] for s in scores], factors), None, 0.5).tolerated
    assert estimate.value == pytest.approx(width, nan_ok=True)
    assert estimate.at_least is at_least


@pytest.mark.parametrize(
    ("span", "sensitivity", "drop"),
    [
        # shortfalls at 1, 4, 16: 0, 0.1, 0.4 (floored at 0.5): (0 + 0.1) / 4 + (0.1 + 0.4) / 4
        ((1, 16), 0.15, 0.6),
        # at 2, 4, 16: 0.05, 0.1, 0.4, over one and two octaves
        ((2, 16), (0.05 + 0.1) / 2 / 3 + (0.1 + 0.4) / 2 * 2 / 3, 0.6),
        ((1, 4), 0.05, 0.1),
        ((0.5, 16), math.nan, math.nan),  # not covered
        (None, math.nan, math.nan),
    ],
)
def test_sensitivity_and_worst_drop(span, sensitivity, drop):
    numbers = statistics.robustness(curve([[0.9], [0.8], [0.3]], [1, 4, 16]), span, floor=0.5)
    assert numbers.sensitivity.value == pytest.approx(sensitivity, nan_ok=True)
    assert numbers.drop.value == pytest.approx(drop, nan_ok=True)


def test_sensitivity_is_the_integral_over_log_rate():
    generator = np.random.default_rng(1)
    factors = np.sort(np.exp(generator.uniform(-2, 3, 7)))
    score_FS = generator.uniform(0.3, 0.9, (7, 4))
    floored_F = np.maximum(score_FS, 0.5).mean(1)
    shortfall_F = floored_F[score_FS.mean(1).argmax()] - floored_F
    expected = np.trapezoid(shortfall_F, np.log(factors)) / np.log(factors[-1] / factors[0])
    found = statistics.robustness(curve(score_FS, factors), (factors[0], factors[-1]), 0.5).sensitivity
    assert found.value == pytest.approx(expected)
    assert found.low < found.value < found.high


@pytest.mark.parametrize(
    ("grids", "span"),
    [
        ([[1, 2, 4], [2, 4, 8]], (2, 4)),
        ([[1, 2, 4], [4]], (1, 4)),  # a single rate asks for nothing
        ([[1, 2], [2, 4]], None),  # one point is no range
        ([[1, 2], [4, 8]], None),
        ([[1], [2]], None),
    ],
)
def test_the_range_is_what_all_curves_cover(grids, span):
    curves = [curve([[0.5]] * len(factors), factors) for factors in grids]
    assert statistics.common_span(curves) == span


def test_guessing(tmp_path):
    """As the results hold it; else GLUE's, and of other data a class of several."""
    synthetic = {"name": "synthetic", "seed": 0}
    own = {"name": "reviews", "labels": ["bad", "fair", "good"], "metric": ["accuracy", "f1"]}
    for i, (written, settings, stored, expected) in enumerate(
        [
            ("stsb", {}, None, 0),
            ("cola", {}, None, 0),
            ("stsb", {"data": synthetic}, None, 0),
            ("mrpc", {"data": synthetic, "task": {"name": "mnli"}}, None, 1 / 3),
            ("mrpc", {"task": {"name": "wnli"}}, None, 40 / 71),
            ("mrpc", {"data": synthetic}, 0.55, 0.55),
            ("mrpc", {"task": own}, None, 1 / 3),
            ("mrpc", {"task": own}, 0.5, 0.5),
        ]
    ):
        folder = fake_trials.write(tmp_path / str(i) / "a", 0.6, task=written)
        changes = {f"config__{key}": value for key, value in settings.items()}
        fake_trials.change(folder, **changes, **({"made_by__data__guessing": stored} if stored else {}))
        fake_trials.write(tmp_path / str(i) / "b", None, status="failed")
        assert statistics.guessing(trials.read([folder.parent]).trials) == expected


def test_a_range_ends_where_the_mean_of_all_seeds_does():
    """The first seed alone would be tolerated to the end of the grid."""
    made = curve([[0.5, 0.5], [0.9, 0.9], [0.9, 0.4]], [1, 10, 100])
    alone = curve([[0.5], [0.9], [0.9]], [1, 10, 100])
    assert not statistics.robustness(made, None, 0.5).tolerated.at_least
    assert statistics.robustness(alone, None, 0.5).tolerated.at_least


def test_panels_come_in_the_order_of_the_papers_table(tmp_path):
    for task in ("rte", "mrpc"):
        fake_trials.write(tmp_path / task, 0.5, task=task)
    assert [panel.task for panel in panels(tmp_path)] == ["mrpc", "rte"]
    assert [statistics.task_order(task) for task in ("mnli", "stsb", "wnli")] == [0, 7, 8]


def test_scores_are_of_the_split_that_the_protocol_reports(tmp_path):
    for protocol, split in (("paper", "test"), ("standard", "validation")):
        fake_trials.write(tmp_path / protocol, 0.5, protocol=protocol)
        (panel,) = panels(tmp_path / protocol)
        assert panel.split == split


# --- Intervals


def test_two_seeds_have_a_mean_and_no_interval():
    mean, low, high = statistics.band(np.array([[0.2, 0.6, 0.7], [0.5, math.nan, 0.1]]))
    assert (mean[0], low[0], high[0]) == pytest.approx((0.5, 0.2, 0.7))
    assert mean[1] == pytest.approx(0.3) and math.isnan(low[1]) and math.isnan(high[1])


@pytest.mark.parametrize("n", [2, 3, 5])
@pytest.mark.parametrize("missing", [False, True])
def test_intervals_are_of_all_draws(n, missing):
    """Of n seeds there are n to the n equally likely draws in a row; here every one is taken."""
    values = np.random.default_rng(n).normal(size=n)
    if missing:
        values[0] = math.nan
    drawn = values[np.array([*itertools.product(range(n), repeat=n)])]
    means = np.nanmean(drawn[~np.isnan(drawn).all(1)], 1)
    expected = np.quantile(means, [0.025, 0.975], method="inverted_cdf")
    mean, low, high = statistics.band(values[None])[:, 0]
    assert mean == pytest.approx(np.nanmean(values))
    if (~np.isnan(values)).sum() > 2:
        assert (low, high) == pytest.approx(tuple(expected), abs=1e-12)
    else:
        assert math.isnan(low)


@pytest.mark.parametrize(("n", "count"), [(1, 1), (2, 3), (5, 126), (7, 1716), (8, 2000)])
def test_draws_and_their_probabilities(n, count):
    index_BN, weight_B = statistics.resamples(n)
    counts_BN = statistics.draws(n)[1:]
    assert index_BN.shape == counts_BN.shape == (count, n) and weight_B.sum() == pytest.approx(1)
    assert (counts_BN.sum(1) == n).all() and statistics.draws(n)[0].tolist() == [1] * n
    if n < 8:
        assert weight_B == pytest.approx(scipy.stats.multinomial.pmf(counts_BN, n, [1 / n] * n))
        assert len({*map(tuple, counts_BN.tolist())}) == count
    else:
        assert len({*map(tuple, counts_BN.tolist())}) > 1000 and {*index_BN.flat} == {*range(n)}


def test_intervals_are_scipys():
    values = np.array([0.81, 0.86, 0.79, 0.9, 0.84])
    expected = scipy.stats.bootstrap((values,), np.mean, n_resamples=20000, method="percentile").confidence_interval
    _, low, high = statistics.band(values[None])[:, 0]
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=0.003)


def test_median_and_interquartile_mean():
    values = np.array([1.0, 2.0, 3.0, 4.0, 100.0])
    assert statistics.median(values) == 3
    assert statistics.iqm(values) == 3  # of 2, 3, 4
    assert statistics.iqm(np.arange(8.0) ** 2) == (4 + 9 + 16 + 25) / 4
    # the median of three draws is the lowest value in 7 of 27 cases, the highest in 7: both ends are in the interval
    estimate = statistics.pooled([np.array([0.0, 1.0, 5.0])], statistics.median)
    assert (estimate.value, estimate.low, estimate.high) == (1, 0, 5)


@pytest.mark.parametrize("n", range(1, 14))
def test_interquartile_means_are_scipys(n):
    values = np.random.default_rng(n).normal(size=(3, n))
    assert statistics.iqm(values) == pytest.approx(scipy.stats.trim_mean(values, 0.25, axis=-1))


def test_tasks_are_resampled_apart():
    """Without spread within a task there is none over the tasks."""
    estimate = statistics.pooled([np.full(5, 0.2), np.full(5, 0.8)], statistics.iqm)
    assert (estimate.value, estimate.low, estimate.high) == pytest.approx((0.5, 0.5, 0.5))


def test_intervals_over_tasks_are_scipys():
    samples = [np.array([0.81, 0.86, 0.79, 0.9, 0.84]), np.array([0.1, 0.4, 0.2, 0.2])]
    expected = scipy.stats.bootstrap(
        samples,
        lambda a, b, axis: np.median(np.concatenate([a, b], axis), axis),
        n_resamples=20000,
        method="percentile",
        rng=np.random.default_rng(1),
    ).confidence_interval
    estimate = statistics.pooled(samples, statistics.median)
    assert estimate.value == pytest.approx(np.median(np.concatenate(samples)))
    assert (estimate.low, estimate.high) == pytest.approx((expected.low, expected.high), abs=0.011)


def test_no_interval_without_spread():
    assert statistics.pooled([np.array([0.1, 0.2, 0.3])] * 2, statistics.median).low < 0.2
    assert math.isnan(statistics.pooled([np.array([0.5, 0.6]), np.array([0.1, 0.2, 0.3])], statistics.median).low)
    assert math.isnan(statistics.std(np.array([0.5])))
    assert math.isnan(statistics.estimate(np.array([math.nan, 0.1, 0.2, 0.3]), 2).low)
    assert math.isnan(statistics.estimate(np.array([0.5, math.nan, math.nan, math.nan]), 2).low)


# --- What chance does


NOISE = {
    "the same at all rates": lambda random, F: random.standard_normal((2, F, 5)),
    "heavy tails": lambda random, F: random.standard_t(3, (2, F, 5)),
    "one trial in twenty fails": lambda random, F: (
        random.standard_normal((2, F, 5)) - 8 * (random.random((1, F, 5)) < 0.05)
    ),
}


@pytest.fixture
def fewer_shuffles(monkeypatch):
    monkeypatch.setattr(statistics, "SHUFFLES", 199)
    statistics._shuffles.cache_clear()
    yield
    statistics._shuffles.cache_clear()


def p_values(noise, factors: int, curves: int, effect_F=0.0, select="pooled", agreement: float = 0.5) -> np.ndarray:
    """p of the worst drop of curves with an effect of the rate; scores on validation and test agree in part."""
    random, found = np.random.default_rng(0), []
    grid = 2.0 ** np.arange(factors)
    for _ in range(curves):
        validation_FS, score_FS = noise(random, factors) + random.normal(size=(2, 1, 5))
        score_FS = agreement * validation_FS + (1 - agreement) * score_FS
        effect_FS = np.broadcast_to(effect_F, factors)[:, None]
        made = curve(score_FS + effect_FS, grid, validation_FS + effect_FS, select)
        found.append(statistics.chance(made, (grid[0], grid[-1]))[1])
    return np.array(found)


@pytest.mark.parametrize("select", statistics.SELECTS)
@pytest.mark.parametrize("noise", NOISE.values(), ids=NOISE)
def test_flat_curves_show_a_drop_in_five_percent(fewer_shuffles, noise, select):
    """By simulation: of 400 flat curves 20 with a standard deviation of 4.4; and 40 with 6 below p = 0.1."""
    p = p_values(noise, factors=8, curves=400, select=select)
    assert (p <= 0.05).sum() <= 31
    assert 22 <= (p <= 0.1).sum() <= 58  # nor is the test idle


@pytest.mark.parametrize("factors", [2, 3, 12])
def test_flat_curves_of_other_grids_show_no_more(fewer_shuffles, factors):
    assert (p_values(NOISE["heavy tails"], factors, curves=300) <= 0.05).sum() <= 26


@pytest.mark.parametrize(
    "effect_F",
    [[0, 0, 0, 0, 0, 0, 0, -4], [0, 0, 0, 0, -4, -4, -4, -4], -4 * np.arange(8) / 7, [0, 0, 0, 0, -9, -50, -60, -60]],
)
@pytest.mark.parametrize("select", statistics.SELECTS)
def test_real_drops_are_shown(fewer_shuffles, effect_F, select):
    """Of four standard deviations of a trial and more, at one rate, at half of them, or gradually."""
    p = p_values(NOISE["the same at all rates"], 8, curves=100, effect_F=np.array(effect_F), select=select)
    assert (p <= 0.05).sum() >= 97


def test_an_interval_of_a_drop_proves_nothing(fewer_shuffles):
    """Why p is needed: of 100 flat curves far more than five have an interval that excludes zero."""
    random, grid, excluded = np.random.default_rng(0), 2.0 ** np.arange(8), 0
    for _ in range(100):
        validation_FS, score_FS = 0.01 * random.standard_normal((2, 8, 5))
        excluded += statistics.robustness(curve(score_FS, grid, validation_FS), (1, 128), -1.0).drop.low > 0
    assert excluded > 15


@pytest.mark.parametrize("select", statistics.SELECTS)
def test_chance_is_what_its_words_say(fewer_shuffles, select):
    """The same shuffles, with the drop and its noise worked out one by one."""
    random, factors = np.random.default_rng(7), 6
    validation_FS, score_FS = random.normal(size=(2, factors, 4)) - 1.5 * (np.arange(factors) == 5)[:, None]
    ratios, noises = [], []
    for order_FS in statistics._shuffles(factors, 4):
        validation, score = (np.take_along_axis(values, order_FS, 0) for values in (validation_FS, score_FS))
        best = (validation[:, 0] if select == "first-seed" else validation.mean(1)).argmax()
        apart_S = score[best] - score[score[1:5].mean(1).argmin() + 1]  # within the factors 2 to 16
        effects = score.mean(1)[:, None] + score.mean(0) - score.mean()
        spread = math.sqrt(((score - effects) ** 2).sum() / (factors - 1) / (4 - 1))
        noises.append(max(spread, apart_S.std(ddof=1) / math.sqrt(2)))
        ratios.append(apart_S.mean() / noises[-1])
    flat, p = statistics.chance(curve(score_FS, 2.0 ** np.arange(factors), validation_FS, select), (2, 16))
    assert p == pytest.approx(np.mean([ratio >= ratios[0] for ratio in ratios])) and 0 < p < 1
    assert flat == pytest.approx(np.quantile(ratios, 0.95, method="higher") * noises[0])


def test_what_chance_makes_of_a_small_curve(fewer_shuffles):
    """Two rates and two seeds, each 0.2 lower at the second: 4 equally likely shuffles.

    As they are the best rate wins by 0.2 with no noise about it, and so it does with both seeds turned over. With one
    turned over, the means are equal and the drop is 0. Without any noise a flat curve does not drop.
    """
    flat, p = statistics.chance(curve([[0.9, 0.8], [0.7, 0.6]], [1, 2]), (1, 2))
    assert p == pytest.approx(0.5, abs=0.08) and flat == pytest.approx(0, abs=1e-6)


def test_flat_is_in_points_of_the_curve(fewer_shuffles):
    """The drop that 5 % of flat curves exceed grows with the noise, and p is that of the drop against it."""
    random, grid = np.random.default_rng(3), [1, 2, 4, 8]
    score_FS = random.normal(size=(4, 5))
    of_one, of_ten = (statistics.chance(curve(k * score_FS, grid), (1, 8)) for k in (1, 10))
    assert of_ten == pytest.approx((10 * of_one[0], of_one[1]))
    drop = statistics.robustness(curve(score_FS, grid), (1, 8), -9.0).drop.value
    assert (drop > of_one[0]) == (of_one[1] <= 0.05)
    wide = score_FS - np.array([0, 0, 0, 9])[:, None]
    flat, p = statistics.chance(curve(wide, grid), (1, 8))
    assert p == 1 / 200 and flat < 4.5


def test_chance_needs_two_seeds_with_all_rates(fewer_shuffles):
    score_FS = np.random.default_rng(3).normal(size=(4, 5))
    holed = score_FS.copy()
    holed[1, 3:] = math.nan
    assert statistics.chance(curve(holed, [1, 2, 4, 8]), (1, 8)) == statistics.chance(
        curve(score_FS[:, :3], [1, 2, 4, 8]), (1, 8)
    )
    holed[1, 1:] = math.nan
    assert all(map(math.isnan, statistics.chance(curve(holed, [1, 2, 4, 8]), (1, 8))))
    assert all(map(math.isnan, statistics.chance(curve(score_FS, [1, 2, 4, 8]), None)))
    assert all(map(math.isnan, statistics.chance(curve(score_FS, [1, 2, 4, 8]), (1, 16))))
    holed = score_FS.copy()
    holed[1, 0] = math.nan  # of the seed that chooses
    assert all(map(math.isnan, statistics.chance(curve(holed, [1, 2, 4, 8], select="first-seed"), (1, 8))))
    assert not math.isnan(statistics.chance(curve(holed, [1, 2, 4, 8]), (1, 8))[1])


# --- Comparisons


def test_paired_comparison():
    a = np.array([0.81, 0.82, 0.83, 0.84, 0.85])
    estimate, p = statistics.paired(a, np.full(5, 0.8))
    half = 2.7764451 * np.std([1, 2, 3, 4, 5], ddof=1) / 100 / math.sqrt(5)  # Student's t with 4 degrees of freedom
    assert (estimate.value, estimate.low, estimate.high) == pytest.approx((0.03, 0.03 - half, 0.03 + half))
    assert p == pytest.approx(0.0132356, rel=1e-4)
    equal, p = statistics.paired(a, a - 0.1)
    assert equal.value == pytest.approx(0.1) and math.isnan(equal.low) and math.isnan(p)


@pytest.mark.parametrize("n", [2, 3, 5, 40])
def test_paired_comparisons_are_scipys(n):
    a, b = np.random.default_rng(n).normal(size=(2, n))
    a += 0.8
    test = scipy.stats.ttest_rel(a, b)
    interval = test.confidence_interval(0.95)
    estimate, p = statistics.paired(a, b)
    assert (estimate.low, estimate.high, p) == pytest.approx((interval.low, interval.high, test.pvalue), rel=1e-9)
    assert statistics.paired(b, a)[1] == pytest.approx(p)
    assert math.isnan(statistics.paired(a[:1], b[:1])[1])


def test_p_values_are_corrected_for_their_number():
    """As R's p.adjust(c(0.01, 0.04, 0.03, 0.005), "holm") has it."""
    assert statistics.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    corrected = statistics.holm([0.4, math.nan, 0.6, 0.01])
    assert corrected == pytest.approx([0.8, math.nan, 0.8, 0.03], nan_ok=True)
    assert statistics.holm([0.9, 0.8]) == [1, 1] and statistics.holm([]) == []


def test_difference_from_published_is_welchs():
    ours, shape = np.array([0.88, 0.9, 0.91, 0.87]), np.array([-1.0, -1.0, 0.0, 1.0, 1.0])
    theirs = 0.87 + 0.012 * shape / shape.std(ddof=1)
    expected = scipy.stats.ttest_ind(ours, theirs, equal_var=False).confidence_interval(0.95)
    estimate = statistics.unpaired(ours, 0.87, 0.012, 5)
    assert (estimate.low, estimate.high) == pytest.approx((expected.low, expected.high))
    assert math.isnan(statistics.unpaired(ours, 0.87, None, 5).low)


def test_a_difference_from_published_without_any_spread_has_no_interval():
    assert math.isnan(statistics.unpaired(np.array([0.9, 0.9]), 0.87, 0.0, 5).low)
    single = statistics.unpaired(np.array([0.9]), 0.87, 0.01, 5)
    assert single.value == pytest.approx(0.03) and math.isnan(single.low)
    assert statistics.unpaired(np.array([0.9, 0.9]), 0.87, 0.0, 5).value == pytest.approx(0.03)
    assert statistics.unpaired(np.array([0.9, 0.9]), 0.87, 0.01, 5).low < 0.03


def test_nothing_is_called_higher_but_by_the_corrected_p(tmp_path):
    """LoRA − DeLoRA: −0.04, −0.03, −0.05, p = 0.020; not among three comparisons, but alone."""
    for seed, (lora, delora) in enumerate([(0.80, 0.84), (0.82, 0.85), (0.81, 0.86)]):
        fake_trials.write(tmp_path / "both" / f"lora-{seed}", lora, method="lora", seed=seed)
        fake_trials.write(tmp_path / "both" / f"delora-{seed}", delora, method="delora", seed=seed)
        fake_trials.write(tmp_path / f"dora-{seed}", [0.86, 0.8, 0.85][seed], method="dora", seed=seed)
    for root, corrected, higher in ((tmp_path / "both", 0.0202, "DeLoRA"), (tmp_path, 0.0606, None)):
        compared = {(c.what, c.first, c.second): c for c in statistics.compare(panels(root))}
        found = compared["score at the best rate", "LoRA", "DeLoRA"]
        assert (found.difference.value, found.n, found.p) == pytest.approx((-0.04, 3, 0.0202), abs=1e-4)
        assert found.corrected == pytest.approx(corrected, abs=1e-4) and found.higher == higher
    assert compared["score at the best rate", "DoRA", "DeLoRA"].higher is None
    turned = statistics.Comparison("mrpc", "", "a", "b", statistics.Estimate(0.1), 0.01, 3, corrected=0.02)
    assert turned.higher == "a"


def test_a_family_is_one_number_over_all_tasks(tmp_path):
    scores = {"mrpc": [(0.8, 0.9), (0.8, 0.91), (0.82, 0.91)], "rte": [(0.5, 0.6), (0.53, 0.61), (0.5, 0.6)]}
    for task, of_task in scores.items():
        for seed, pair in enumerate(of_task):
            for method, score in zip(("lora", "delora"), pair, strict=True):
                for factor, less in ((1, 0), (2, 0.1 + 0.01 * seed * (method == "lora"))):
                    name = f"{task}-{method}-{seed}-{factor}"
                    fake_trials.write(tmp_path / name, score - less, task=task, method=method, seed=seed, factor=factor)
    compared = statistics.compare(panels(tmp_path))
    for what in ("score at the best rate", "sensitivity"):
        family = [c for c in compared if c.what == what]
        assert [c.task for c in family] == ["mrpc", "rte"]
        assert [c.corrected for c in family] == statistics.holm([c.p for c in family])


def test_many_methods_are_compared_with_the_best_on_validation(tmp_path):
    for rank, seed in itertools.product(range(1, statistics.ALL_PAIRS + 2), (1, 2)):
        fake_trials.write(tmp_path / f"{rank}-{seed}", 0.5 - rank / 100, 0.5 + (rank == 7) / 10, seed=seed, epochs=rank)
    (panel,) = panels(tmp_path)
    compared = statistics.compare([panel])
    assert {c.first for c in compared} == {"LoRA (epochs 7)"} and len(compared) == statistics.ALL_PAIRS
    assert "with the one that is best on validation" in tables.all_tables([panel])[-1].notes
    panel.curves.pop()
    assert len(statistics.compare([panel])) == math.comb(statistics.ALL_PAIRS, 2)
    assert "with the one that is best on validation" not in tables.all_tables([panel])[-1].notes
