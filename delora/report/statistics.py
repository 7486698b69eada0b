"""The numbers under the curves. Scores are fractions; a point is 0.01.

Intervals resample the seeds: all rates of a seed share its split, data order and initial values, so whole seeds are
drawn with replacement, the same draws for every method, and each number is computed anew from every draw. They are
95 % percentile intervals, and with five seeds they are on the narrow side.
"""

import functools
import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from delora.report.trials import Trial
from delora.tasks import TASKS

DRAWS = 2000
LEVEL = 0.95
TOLERANCE = 0.01  # a rate is tolerated if it scores within one point of the best
HEAD_ONLY = ("none", "head")  # names of methods that train the head alone


@dataclass(frozen=True)
class Estimate:
    """A number with its interval; `at_least` where the grid ends before the number's end is seen. NaN: none."""

    value: float
    low: float = math.nan
    high: float = math.nan
    at_least: bool = False


@dataclass
class Curve:
    """One method in one panel: F rates by S seeds, NaN where a trial is missing.

    Attributes:
        factors_F, rates_F: ascending.
        score_FS, validation_FS: fractions; a trial without a score (see `Trial.score`) counts as the floor.
        scoreless_FS: which trials those are.
        trials: the trials, by (factor index, seed index).
    """

    label: str
    factors_F: np.ndarray
    rates_F: np.ndarray
    seeds: list[int]
    score_FS: np.ndarray
    validation_FS: np.ndarray
    scoreless_FS: np.ndarray
    trials: dict[tuple[int, int], Trial]

    @property
    def n_F(self) -> np.ndarray:
        """The number of trials at each rate."""
        return (~np.isnan(self.score_FS)).sum(1)

    @functools.cached_property
    def draws_BS(self) -> np.ndarray:
        return draws(len(self.seeds))

    @functools.cached_property
    def best(self) -> int:
        """The index of the best rate: see `best_rates`."""
        return int(best_rates(self, means(self.validation_FS, np.ones((1, len(self.seeds)))))[0])

    @property
    def best_scores_S(self) -> np.ndarray:
        return self.score_FS[self.best]

    @property
    def best_is_on_edge(self) -> bool:
        return len(self.factors_F) > 1 and self.best in (0, len(self.factors_F) - 1)

    def trials_at(self, factor: int) -> list[Trial]:
        return [trial for (f, _), trial in sorted(self.trials.items()) if f == factor]


@dataclass
class Panel:
    """The methods of one task that can be compared: the same encoder, protocol and kind of data.

    Attributes:
        floor: the score of guessing; it stands in for a trial without a score.
        head_only: the best mean score of training the head alone on the frozen encoder, if such trials are there.
        common: the range of factors that every curve covers, None if there is none.
    """

    task: str
    model: str
    protocol: str
    data: str
    floor: float
    curves: list[Curve]
    head_only: float | None
    common: tuple[float, float] | None

    @property
    def split(self) -> str:
        return "test" if self.protocol == "paper" else "validation"

    @property
    def trials(self) -> list[Trial]:
        return [trial for curve in self.curves for _, trial in sorted(curve.trials.items())]


@functools.cache
def published() -> dict[str, Any]:
    """The published numbers of published.yaml."""
    return yaml.safe_load(Path(__file__).with_name("published.yaml").read_text(encoding="utf-8"))


def guessing(task: str, data: str) -> float:
    """What always guessing the same scores: the floor of every curve.

    It stands for the untrained model. An untrained head's accuracy is that of whatever class it happens to prefer, so
    it differs from seed to seed; guessing the most frequent class is the best that no training can do. Correlations
    and Matthews have 0. The classes of synthetic data are taken as equally frequent.
    """
    facts = TASKS[task]
    if facts.headline != "accuracy":
        return 0.0
    if data == "synthetic":
        return 1 / facts.num_labels
    rows, all_rows = published()["most_frequent_class"][task]
    return rows / all_rows


def panels(trials: Iterable[Trial], span: tuple[float, float] | None = None) -> list[Panel]:
    """Groups trials into panels, in GLUE's order of the paper's table, then by encoder.

    Args:
        span: the range of factors for worst drop and sensitivity, instead of the one that all curves cover.
    """
    by_place: dict[tuple, dict[str, list[Trial]]] = defaultdict(lambda: defaultdict(list))
    for trial in trials:
        by_place[trial.place][trial.label].append(trial)
    made = []
    for place in sorted(by_place, key=lambda p: (task_order(p[0]), *p)):
        floor = guessing(place[0], place[3])
        by_label = by_place[place]
        curves = {label: curve(label, by_label[label], floor) for label in sorted(by_label, key=label_order)}
        heads = [c for c in curves.values() if c.trials_at(c.best)[0].config["method"]["name"] in HEAD_ONLY]
        others = [c for c in curves.values() if c not in heads]
        made.append(
            Panel(
                *place,
                floor=floor,
                curves=others or heads,
                head_only=float(np.nanmean(heads[0].best_scores_S)) if heads and others else None,
                common=span or common_range(others),
            )
        )
    return made


def task_order(task: str) -> int:
    order = list(published()["rows"][0]["scores"])
    return order.index(task) if task in order else len(order)


def label_order(label: str) -> tuple[int, str]:
    """LoRA, DoRA, DeLoRA, ETHER, ETHER+, each followed by its variants, then the rest by name."""
    from delora.report.trials import NAMES

    names = list(NAMES.values())
    base = label.split(" (")[0]
    return (names.index(base) if base in names else len(names), label)


def curve(label: str, trials: Sequence[Trial], floor: float) -> Curve:
    """The scores of one method's trials as arrays."""
    factors = sorted({t.factor for t in trials})
    seeds = sorted({t.seed for t in trials})
    rates = {t.factor: t.rate for t in trials}
    places = {(factors.index(t.factor), seeds.index(t.seed)): t for t in trials}
    shape = (len(factors), len(seeds))
    score, validation = np.full(shape, np.nan), np.full(shape, np.nan)
    scoreless = np.zeros(shape, bool)
    for place, trial in places.items():
        scoreless[place] = math.isnan(trial.score)
        score[place] = floor if scoreless[place] else trial.score
        validation[place] = floor if math.isnan(trial.validation) else trial.validation
    rates_F = np.array([rates[f] for f in factors])
    return Curve(label, np.array(factors), rates_F, seeds, score, validation, scoreless, places)


def common_range(curves: Sequence[Curve]) -> tuple[float, float] | None:
    """The widest range of factors that every curve with several rates covers."""
    several = [c for c in curves if len(c.factors_F) > 1]
    if not several:
        return None
    low, high = max(c.factors_F[0] for c in several), min(c.factors_F[-1] for c in several)
    return (float(low), float(high)) if low < high else None


# --- Resampling


@functools.cache
def draws(seeds: int) -> np.ndarray:
    """How often each seed is drawn, (B, S). The same for every method with that many seeds."""
    generator = np.random.default_rng(0)
    return generator.multinomial(seeds, [1 / seeds] * seeds, size=DRAWS).astype(float)


def means(values_FS: np.ndarray, draws_BS: np.ndarray) -> np.ndarray:
    """The mean over the drawn seeds at each rate, (B, F); NaN where no drawn seed has a trial."""
    there = ~np.isnan(values_FS)
    with np.errstate(invalid="ignore"):
        return (draws_BS @ np.where(there, values_FS, 0).T) / (draws_BS @ there.T.astype(float))


def interval(values_B: np.ndarray) -> tuple[float, float]:
    """The percentile interval of resampled values; NaN where nothing varies because there is one seed."""
    values_B = values_B[~np.isnan(values_B)]
    if not len(values_B):
        return math.nan, math.nan
    low, high = np.quantile(values_B, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def band(values_FS: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean over the seeds at each rate, and the interval's ends, (F,) each; the ends are NaN with one seed."""
    mean_F = means(values_FS, np.ones((1, values_FS.shape[1])))[0]
    resampled_BF = means(values_FS, draws(values_FS.shape[1]))
    ends = np.array([interval(column) for column in resampled_BF.T])
    ends[(~np.isnan(values_FS)).sum(1) < 2] = np.nan
    return mean_F, ends[:, 0], ends[:, 1]


def _estimate(curve: Curve, number: Callable[[np.ndarray], np.ndarray]) -> Estimate:
    """A number of the curve and its interval. `number` maps draws (B, S) to its values (B,)."""
    value = float(number(np.ones((1, len(curve.seeds))))[0])
    if len(curve.seeds) < 2 or math.isnan(value):
        return Estimate(value)
    return Estimate(value, *interval(number(curve.draws_BS)))


# --- Numbers of one curve


def best_rates(curve: Curve, validation_BF: np.ndarray) -> np.ndarray:
    """The index (B,) of the rate with the highest mean validation score; of equals the lowest rate.

    Test scores are never looked at. Rates with fewer trials than the fullest one cannot win: an unfinished sweep does
    not crown a rate for one lucky seed.
    """
    full_F = curve.n_F == curve.n_F.max()
    return np.where(full_F & ~np.isnan(validation_BF), validation_BF, -np.inf).argmax(1)


def best_score(curve: Curve) -> Estimate:
    """The mean score at the best rate; each draw of seeds chooses its rate anew."""

    def number(draws_BS: np.ndarray) -> np.ndarray:
        best_B = best_rates(curve, means(curve.validation_FS, draws_BS))
        return _take(means(curve.score_FS, draws_BS), best_B)

    return _estimate(curve, number)


def tolerated_range(curve: Curve) -> Estimate:
    """Decades of learning rate around the best rate in which the mean score stays within 1 point of that rate's.

    Between neighbouring rates the score is taken as linear in log rate. `at_least` where it still holds at an end of
    the grid.
    """
    if len(curve.factors_F) < 2:
        return Estimate(math.nan)

    def ends(draws_BS: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        best_B = best_rates(curve, means(curve.validation_FS, draws_BS))
        score_BF, x_F = means(curve.score_FS, draws_BS), np.log10(curve.rates_F)
        least_B = _take(score_BF, best_B) - TOLERANCE
        right_B = _reach(score_BF, x_F, best_B, least_B)
        left_B = -_reach(score_BF[:, ::-1], -x_F[::-1], len(x_F) - 1 - best_B, least_B)
        return left_B, right_B

    left, right = ends(np.ones((1, len(curve.seeds))))
    x_F = np.log10(curve.rates_F)
    on_edge = bool(left[0] <= x_F[0] or right[0] >= x_F[-1])

    def width(draws_BS: np.ndarray) -> np.ndarray:
        left_B, right_B = ends(draws_BS)
        return right_B - left_B

    estimate = _estimate(curve, width)
    return Estimate(estimate.value, estimate.low, estimate.high, at_least=on_edge)


def _reach(score_BF: np.ndarray, x_F: np.ndarray, start_B: np.ndarray, least_B: np.ndarray) -> np.ndarray:
    """How far right of `start_B` the score stays at least `least_B`, as x (B,)."""
    reach_B = x_F[start_B].astype(float)
    going_B = np.ones(len(start_B), bool)
    for _ in range(len(x_F) - 1):
        here_B = start_B
        start_B = np.minimum(start_B + 1, len(x_F) - 1)
        going_B = going_B & (start_B > here_B)
        before_B, after_B = _take(score_BF, here_B), _take(score_BF, start_B)
        holds_B = going_B & (after_B >= least_B)
        with np.errstate(invalid="ignore", divide="ignore"):
            part_B = np.clip((before_B - least_B) / (before_B - after_B), 0, 1)
        crossing_B = x_F[here_B] + np.nan_to_num(part_B) * (x_F[start_B] - x_F[here_B])
        reach_B = np.where(holds_B, x_F[start_B], np.where(going_B, crossing_B, reach_B))
        going_B = holds_B
    return reach_B


def worst_drop(curve: Curve, span: tuple[float, float] | None) -> Estimate:
    """The best rate's mean score minus the lowest mean score within a range of factors."""
    if (matrix_PF := _resampling(curve, span)) is None:
        return Estimate(math.nan)
    used_F = matrix_PF.any(0)

    def number(draws_BS: np.ndarray) -> np.ndarray:
        best_B = best_rates(curve, means(curve.validation_FS, draws_BS))
        score_BF = means(curve.score_FS, draws_BS)
        return _take(score_BF, best_B) - (score_BF[:, used_F] @ matrix_PF[:, used_F].T).min(1)

    return _estimate(curve, number)


def sensitivity(curve: Curve, span: tuple[float, float] | None, floor: float) -> Estimate:
    """Learning-rate sensitivity within a range of factors [a, b], after Wortsman et al. 2023 (arXiv 2309.14322, 2.2).

    They define E_{η∈[a,b]}[min(ℓ(η), ℓ₀) − ℓ*] with ℓ the final validation loss, ℓ₀ the loss at initialisation and ℓ*
    that of the best rate, as the plain mean over a grid of rates. Here, with scores s, higher is better:

        E_{log η ~ U(log a, log b)}[s* − max(s(η), s₀)]

    the expected shortfall from the best over log-uniform rates. s is a trial's score and the expectation also runs over
    the seeds; s₀, the floor, is what guessing scores (see `guessing`); s* is the mean of max(s, s₀) at the rate chosen
    on validation, also where it lies outside [a, b]. Between neighbouring rates the score is taken as linear in log
    rate. 0 is a flat curve.
    """
    if (weight_F := _weights(curve, span)) is None:
        return Estimate(math.nan)
    floored_FS, used_F = np.maximum(curve.score_FS, floor), weight_F != 0

    def number(draws_BS: np.ndarray) -> np.ndarray:
        best_B = best_rates(curve, means(curve.validation_FS, draws_BS))
        score_BF = means(floored_FS, draws_BS)
        return _take(score_BF, best_B) - score_BF[:, used_F] @ weight_F[used_F]

    return _estimate(curve, number)


def sensitivity_by_seed(curve: Curve, span: tuple[float, float] | None, floor: float) -> np.ndarray:
    """Each seed's own share of `sensitivity`, (S,): their mean is the method's, where no trial is missing."""
    if (weight_F := _weights(curve, span)) is None:
        return np.full(len(curve.seeds), np.nan)
    floored_FS, used_F = np.maximum(curve.score_FS, floor), weight_F != 0
    return floored_FS[curve.best] - weight_F[used_F] @ floored_FS[used_F]


def _grid(curve: Curve, span: tuple[float, float]) -> np.ndarray:
    """The log of the range's ends and of the rates between them, (P,)."""
    inside_F = (curve.factors_F > span[0]) & (curve.factors_F < span[1])
    return np.log([span[0], *curve.factors_F[inside_F], span[1]])


def _resampling(curve: Curve, span: tuple[float, float] | None) -> np.ndarray | None:
    """The matrix (P, F) from the curve's rates to the range's: its ends and the rates between; None if not covered."""
    if span is None or len(curve.factors_F) < 2 or curve.factors_F[0] > span[0] or curve.factors_F[-1] < span[1]:
        return None
    x_F, x_P = np.log(curve.factors_F), _grid(curve, span)
    return np.array([np.interp(x_P, x_F, unit_F) for unit_F in np.eye(len(x_F))]).T


def _weights(curve: Curve, span: tuple[float, float] | None) -> np.ndarray | None:
    """The weight (F,) of each rate in the mean over the range, by the trapezoidal rule over log rate; they sum to 1."""
    if span is None or (matrix_PF := _resampling(curve, span)) is None:
        return None
    x_P = _grid(curve, span)
    half = np.diff(x_P) / 2 / (x_P[-1] - x_P[0])
    return (np.append(half, 0) + np.insert(half, 0, 0)) @ matrix_PF


def _take(values_BF: np.ndarray, index_B: np.ndarray) -> np.ndarray:
    return np.take_along_axis(values_BF, index_B[:, None], 1)[:, 0]


# --- Numbers of one cell of a table


def known(values: np.ndarray) -> np.ndarray:
    return values[~np.isnan(values)]


def std(values: np.ndarray) -> float:
    """The sample standard deviation (n − 1); NaN for fewer than two."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else math.nan


def iqm(values_BN: np.ndarray) -> np.ndarray:
    """The interquartile mean over the last axis: a quarter of the values, rounded down, is cut from each end."""
    cut = values_BN.shape[-1] // 4
    ordered = np.sort(values_BN, -1)
    return ordered[..., cut : ordered.shape[-1] - cut].mean(-1)


def resampled(values: Sequence[np.ndarray], number: Callable[[np.ndarray], np.ndarray]) -> Estimate:
    """`number` of the values of several tasks together, each task's (n,) resampled within itself."""
    if not sum(map(len, values)):
        return Estimate(math.nan)
    together = np.concatenate(values)
    if min(len(v) for v in values) < 2:
        return Estimate(float(number(together[None])[0]))
    generator = np.random.default_rng(0)
    drawn = [v[generator.integers(len(v), size=(DRAWS, len(v)))] for v in values]
    return Estimate(float(number(together[None])[0]), *interval(number(np.concatenate(drawn, 1))))


@dataclass(frozen=True)
class Comparison:
    """A paired comparison by seed: the mean of first − second over the n seeds that both have."""

    what: str
    first: str
    second: str
    difference: Estimate
    p: float
    n: int

    @property
    def higher(self) -> str | None:
        """The label of the method that is shown to be higher: None unless the interval excludes zero."""
        if self.difference.low > 0:
            return self.first
        return self.second if self.difference.high < 0 else None


def compare(panel: Panel) -> list[Comparison]:
    """Every pair of methods, in the score at each one's best rate and in sensitivity; Student's paired t interval."""
    made = []
    for first, second in itertools.combinations(panel.curves, 2):
        pairs = {"score at the best rate": (first.best_scores_S, second.best_scores_S)}
        if panel.common is not None:
            spread = [sensitivity_by_seed(c, panel.common, panel.floor) for c in (first, second)]
            pairs["sensitivity"] = (spread[0], spread[1])
        for what, (a_S, b_S) in pairs.items():
            a = dict(zip(first.seeds, a_S, strict=True))
            b = dict(zip(second.seeds, b_S, strict=True))
            seeds = [s for s in first.seeds if s in b and not math.isnan(a[s]) and not math.isnan(b[s])]
            difference, p = paired(np.array([a[s] for s in seeds]), np.array([b[s] for s in seeds]))
            made.append(Comparison(what, first.label, second.label, difference, p, len(seeds)))
    return made


def paired(a: np.ndarray, b: np.ndarray) -> tuple[Estimate, float]:
    """The mean of a − b with Student's interval, and the p-value of the paired t-test.

    Interval and p are NaN with fewer than two pairs, or where all differences are equal: no spread was seen, which
    with a handful of seeds and coarse scores does not show that there is none.
    """
    import scipy.stats

    difference = a - b
    if len(difference) < 2 or np.ptp(difference) == 0:
        return Estimate(float(difference.mean()) if len(difference) else math.nan), math.nan
    test = scipy.stats.ttest_rel(a, b)
    low, high = test.confidence_interval(LEVEL)
    return Estimate(float(difference.mean()), float(low), float(high)), float(test.pvalue)


def unpaired(ours: np.ndarray, mean: float, spread: float | None, n: int) -> Estimate:
    """Our mean minus a published one, with Welch's interval where the published one has a std."""
    import scipy.stats

    difference = float(ours.mean()) - mean
    if spread is None or len(ours) < 2:
        return Estimate(difference)
    a, b = std(ours) ** 2 / len(ours), spread**2 / n
    freedom = (a + b) ** 2 / (a**2 / (len(ours) - 1) + b**2 / (n - 1))
    half = float(scipy.stats.t.ppf((1 + LEVEL) / 2, freedom)) * math.sqrt(a + b)
    return Estimate(difference, difference - half, difference + half)
