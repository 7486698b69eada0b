"""The numbers under the curves. Scores are fractions; a point is 0.01.

Shapes: F learning rates, S seeds, B draws of seeds, P points of a grid.

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
import yaml  # type: ignore[import-untyped]

from delora.report.trials import Trial, label_order
from delora.tasks import TASKS

DRAWS = 2000
LEVEL = 0.95
TOLERANCE = 0.01  # a rate is tolerated if it scores within one point of the best
Span = tuple[float, float]  # the lowest and the highest factor of a range


@dataclass(frozen=True)
class Estimate:
    """A number with its interval; `at_least` where the grid ends before the number's end is seen. NaN: none."""

    value: float
    low: float = math.nan
    high: float = math.nan
    at_least: bool = False


# --- Trials as curves


@dataclass
class Curve:
    """One method in one panel. NaN is a missing trial; a trial without a score (see `Trial.score`) counts as the floor.

    Attributes:
        factors_F, rates_F: ascending.
        seeds: ascending.
        scoreless_FS: which trials have no score.
        trials: by (index of the factor, index of the seed).
    """

    label: str
    factors_F: np.ndarray
    rates_F: np.ndarray
    seeds: list[int]
    score_FS: np.ndarray
    validation_FS: np.ndarray
    scoreless_FS: np.ndarray
    trials: dict[tuple[int, int], Trial]

    @functools.cached_property
    def best(self) -> int:
        """The index of the best rate: see `best_rates`."""
        return int(best_rates(self, draws(len(self.seeds))[:1])[0])

    @property
    def best_scores_S(self) -> np.ndarray:
        return self.score_FS[self.best]

    @property
    def best_is_on_edge(self) -> bool:
        return len(self.factors_F) > 1 and self.best in (0, len(self.factors_F) - 1)

    @property
    def diverged_FS(self) -> np.ndarray:
        made_FS = np.zeros_like(self.scoreless_FS)
        for place, trial in self.trials.items():
            made_FS[place] = trial.diverged
        return made_FS

    @property
    def fullest_F(self) -> np.ndarray:
        """Which rates have as many trials as any."""
        n_F = (~np.isnan(self.score_FS)).sum(1)
        return n_F == n_F.max()

    def trials_at(self, factor: int) -> list[Trial]:
        """The trials at the rate of this index, by seed."""
        return [trial for (f, _), trial in sorted(self.trials.items()) if f == factor]


@dataclass
class Panel:
    """The methods of one task that can be compared: the same encoder, protocol and kind of data.

    Attributes:
        floor: the score of guessing; it stands in for a trial without a score.
        heads: training the head alone on the frozen encoder, if such trials are there.
        span: the range of factors for worst drop and sensitivity; None if no range is covered by every curve.
    """

    task: str
    model: str
    protocol: str
    data: str
    floor: float
    curves: list[Curve]
    heads: list[Curve]
    span: Span | None

    @property
    def split(self) -> str:
        return "test" if self.protocol == "paper" else "validation"

    @property
    def trials(self) -> list[Trial]:
        return [trial for curve in (*self.curves, *self.heads) for _, trial in sorted(curve.trials.items())]

    @property
    def factors(self) -> list[float]:
        """Of all curves, ascending."""
        return sorted({float(factor) for curve in self.curves for factor in curve.factors_F})

    def references(self, split: str | None = None) -> dict[str, float]:
        """Scores to compare with, on the panel's split or on validation: guessing, and the head at its best rate."""
        of_heads = {c.label: (c.validation_FS if split == "validation" else c.score_FS)[c.best] for c in self.heads}
        return {"guessing": self.floor, **{label: float(np.nanmean(score_S)) for label, score_S in of_heads.items()}}


@functools.cache
def published() -> dict[str, Any]:
    """The published numbers of published.yaml."""
    return yaml.safe_load(Path(__file__).with_name("published.yaml").read_text(encoding="utf-8"))


def guessing(task: str, data: str) -> float:
    """What always guessing the same scores: the floor of every curve.

    It stands for the untrained model, whose accuracy is that of whatever class its head happens to prefer; guessing the
    most frequent class is the best that no training can do. Correlations and Matthews have 0. The classes of synthetic
    data are taken as equally frequent.
    """
    facts = TASKS[task]
    if facts.headline != "accuracy":
        return 0.0
    if data == "synthetic":
        return 1 / facts.num_labels
    rows, all_rows = published()["most_frequent_class"][task]
    return rows / all_rows


def task_order(task: str) -> int:
    """Sorts tasks as the columns of the paper's table."""
    order = list(published()["rows"][0]["scores"])
    return order.index(task) if task in order else len(order)


def panels(trials: Iterable[Trial], span: Span | None = None) -> list[Panel]:
    """Groups trials into panels, in the order of the paper's table, then by encoder.

    Args:
        span: the range of factors for worst drop and sensitivity, instead of the widest that all curves cover.
    """
    by_place: dict[tuple[str, str, str, str], dict[str, list[Trial]]] = defaultdict(lambda: defaultdict(list))
    for trial in trials:
        by_place[trial.place][trial.label].append(trial)
    made = []
    for place, by_label in sorted(by_place.items(), key=lambda item: (task_order(item[0][0]), *item[0])):
        floor = guessing(place[0], place[3])
        curves = [curve(label, by_label[label], floor) for label in sorted(by_label, key=label_order)]
        heads = [c for c in curves if c.trials_at(0)[0].result["parameters"]["adapter"] == 0]
        adapted = [c for c in curves if c not in heads]
        shown, heads = (adapted, heads) if adapted else (heads, [])
        made.append(Panel(*place, floor, shown, heads, span or common_span(shown)))
    return made


def curve(label: str, trials: Sequence[Trial], floor: float) -> Curve:
    """The scores of one method's trials as arrays."""
    rates = dict(sorted({t.factor: t.rate for t in trials}.items()))
    factors, seeds = list(rates), sorted({t.seed for t in trials})
    score_FS = np.full((len(factors), len(seeds)), np.nan)
    validation_FS, scoreless_FS = score_FS.copy(), np.zeros(score_FS.shape, bool)
    places = {(factors.index(t.factor), seeds.index(t.seed)): t for t in trials}
    for place, trial in places.items():
        scoreless_FS[place] = math.isnan(trial.score)
        score_FS[place] = floor if math.isnan(trial.score) else trial.score
        validation_FS[place] = floor if math.isnan(trial.validation) else trial.validation
    rates_F = np.array(list(rates.values()))
    return Curve(label, np.array(factors), rates_F, seeds, score_FS, validation_FS, scoreless_FS, places)


def common_span(curves: Sequence[Curve]) -> Span | None:
    """The widest range of factors that every curve with several rates covers."""
    several = [c for c in curves if len(c.factors_F) > 1]
    low = max((float(c.factors_F[0]) for c in several), default=0.0)
    high = min((float(c.factors_F[-1]) for c in several), default=0.0)
    return (low, high) if low < high else None


# --- Resampling


@functools.cache
def draws(seeds: int) -> np.ndarray:
    """How often each seed is drawn, (1 + DRAWS, S): once each in the first row. The same for every method."""
    drawn = np.random.default_rng(0).multinomial(seeds, [1 / seeds] * seeds, size=DRAWS)
    return np.vstack([np.ones(seeds), drawn])


def means(values_FS: np.ndarray, draws_BS: np.ndarray) -> np.ndarray:
    """The mean over the drawn seeds at each rate, (B, F); NaN where no drawn seed has a trial."""
    there = ~np.isnan(values_FS)
    with np.errstate(invalid="ignore"):
        return (draws_BS @ np.where(there, values_FS, 0).T) / (draws_BS @ there.T.astype(float))


def estimate(values_B: np.ndarray, seeds: int, at_least: bool = False) -> Estimate:
    """The first of the values with the interval of the others; without one where a single seed leaves no spread."""
    resampled = values_B[1:][~np.isnan(values_B[1:])]
    if seeds < 2 or math.isnan(values_B[0]) or not len(resampled):
        return Estimate(float(values_B[0]), at_least=at_least)
    low, high = np.quantile(resampled, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(float(values_B[0]), float(low), float(high), at_least)


def band(values_FS: np.ndarray) -> np.ndarray:
    """Mean over the seeds at each rate and its interval's ends, (3, F)."""
    means_BF = means(values_FS, draws(values_FS.shape[1]))
    n_F = (~np.isnan(values_FS)).sum(1)
    estimates = [estimate(column, n) for column, n in zip(means_BF.T, n_F, strict=True)]
    return np.array([[e.value, e.low, e.high] for e in estimates]).T


# --- Numbers of one curve


@dataclass(frozen=True)
class Robustness:
    """See `best_rates` for the best score, and the functions named like the others."""

    best: Estimate
    tolerated: Estimate
    drop: Estimate
    sensitivity: Estimate


def robustness(curve: Curve, span: Span | None, floor: float) -> Robustness:
    """The numbers of a curve; each draw of seeds chooses its best rate anew."""
    seeds, x_F = len(curve.seeds), np.log10(curve.factors_F)
    draws_BS = draws(seeds)
    best_B = best_rates(curve, draws_BS)
    score_BF, floored_BF = means(curve.score_FS, draws_BS), means(np.maximum(curve.score_FS, floor), draws_BS)
    width_B, on_edge_B = tolerated_range(score_BF, x_F, best_B)
    return Robustness(
        best=estimate(_take(score_BF, best_B), seeds),
        tolerated=estimate(width_B, seeds, at_least=bool(on_edge_B[0])),
        drop=estimate(worst_drop(score_BF, x_F, best_B, span), seeds),
        sensitivity=estimate(sensitivity(floored_BF, x_F, best_B, span), seeds),
    )


def best_rates(curve: Curve, draws_BS: np.ndarray) -> np.ndarray:
    """The index (B,) of the rate with the highest mean validation score; of equals the lowest rate.

    Test scores are never looked at. Rates with fewer trials than the fullest one cannot win: an unfinished sweep does
    not crown a rate for one lucky seed.
    """
    validation_BF = means(curve.validation_FS, draws_BS)
    return np.where(curve.fullest_F & ~np.isnan(validation_BF), validation_BF, -np.inf).argmax(1)


def tolerated_range(score_BF: np.ndarray, x_F: np.ndarray, best_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Decades of learning rate around the best rate in which the score stays within 1 point of that rate's.

    Between neighbouring rates the score is taken as linear in log rate.

    Args:
        x_F: log10 of the rates, or of their factors.

    Returns:
        Widths (B,), NaN for a single rate; and where the score still holds at an end of the grid, so that the range is
        at least that wide.
    """
    if len(x_F) < 2:
        return np.full(len(best_B), np.nan), np.zeros(len(best_B), bool)
    right_B = _reach(score_BF, x_F, best_B)
    left_B = _reach(score_BF[:, ::-1], -x_F[::-1], len(x_F) - 1 - best_B)
    at_end_B = np.isclose(x_F[best_B] + right_B, x_F[-1]) | np.isclose(x_F[best_B] - left_B, x_F[0])
    return left_B + right_B, at_end_B


def _reach(score_BF: np.ndarray, x_F: np.ndarray, best_B: np.ndarray) -> np.ndarray:
    """How far to the right of the best rate the score is tolerated, (B,)."""
    above_BF = score_BF - (_take(score_BF, best_B) - TOLERANCE)[:, None]
    here, there = above_BF[:, :-1], above_BF[:, 1:]  # the ends of each segment between neighbouring rates
    with np.errstate(invalid="ignore", divide="ignore"):
        share = np.where(there >= 0, 1, np.nan_to_num(here / (here - there)))  # of the segment that is tolerated
    right = np.arange(len(x_F) - 1) >= best_B[:, None]
    unbroken = np.cumprod(~right | (there >= 0), 1)
    reached = right & np.insert(unbroken[:, :-1], 0, 1, 1).astype(bool)
    return (np.where(reached, share, 0) * np.diff(x_F)).sum(1)


def worst_drop(score_BF: np.ndarray, x_F: np.ndarray, best_B: np.ndarray, span: Span | None) -> np.ndarray:
    """The best rate's score minus the lowest within a range of factors, (B,); NaN where the range is not covered."""
    grid = _grid(x_F, span)
    if grid is None:
        return np.full(len(best_B), np.nan)
    used_F = grid[1].any(0)
    return _take(score_BF, best_B) - (score_BF[:, used_F] @ grid[1][:, used_F].T).min(1)


def sensitivity(floored_BF: np.ndarray, x_F: np.ndarray, best_B: np.ndarray, span: Span | None) -> np.ndarray:
    """Learning-rate sensitivity within a range of factors [a, b], after Wortsman et al. 2023 (arXiv 2309.14322).

    They define E_{η∈[a,b]}[min(ℓ(η), ℓ₀) − ℓ*] with ℓ the final validation loss, ℓ₀ the loss at initialisation and ℓ*
    that of the best rate. Here, with scores s, higher is better:

        E_{log η ~ U(log a, log b)}[s* − max(s(η), s₀)]

    the expected shortfall from the best over log-uniform rates. s is a trial's score and the expectation also runs over
    the seeds; s₀, the floor, is what guessing scores (see `guessing`); s* is the mean of max(s, s₀) at the rate chosen
    on validation, also where it lies outside [a, b]. Between neighbouring rates the score is taken as linear in log
    rate. 0 is a flat curve.

    Args:
        floored_BF: means of max(s, s₀).
        x_F: log10 of the factors.

    Returns:
        Values (B,), NaN where the range is not covered.
    """
    grid = _grid(x_F, span)
    if grid is None:
        return np.full(len(best_B), np.nan)
    x_P, matrix_PF = grid
    half = np.diff(x_P) / 2 / (x_P[-1] - x_P[0])
    weight_F = (np.append(half, 0) + np.insert(half, 0, 0)) @ matrix_PF  # the trapezoidal rule
    used_F = weight_F != 0
    return _take(floored_BF, best_B) - floored_BF[:, used_F] @ weight_F[used_F]


def _grid(x_F: np.ndarray, span: Span | None) -> tuple[np.ndarray, np.ndarray] | None:
    """The range's ends and the rates between, (P,), and the matrix (P, F) that interpolates to them from x_F."""
    if span is None or len(x_F) < 2:
        return None
    low, high = np.log10(span)
    if x_F[0] > low + 1e-9 or x_F[-1] < high - 1e-9:
        return None
    x_P = np.array([low, *x_F[(x_F > low + 1e-9) & (x_F < high - 1e-9)], high])
    return x_P, np.array([np.interp(x_P, x_F, unit_F) for unit_F in np.eye(len(x_F))]).T


def _take(values_BF: np.ndarray, index_B: np.ndarray) -> np.ndarray:
    return np.take_along_axis(values_BF, index_B[:, None], 1)[:, 0]


# --- Numbers of one cell of a table


def known(values: np.ndarray) -> np.ndarray:
    return values[~np.isnan(values)]


def std(values: np.ndarray) -> float:
    """The sample standard deviation (n − 1); NaN for fewer than two."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else math.nan


def median(values: np.ndarray) -> np.ndarray:
    """Over the last axis."""
    return np.median(values, -1)


def iqm(values: np.ndarray) -> np.ndarray:
    """The interquartile mean over the last axis: a quarter of the values, rounded down, is cut from each end."""
    import scipy.stats

    return scipy.stats.trim_mean(values, 0.25, axis=-1)


def pooled(samples: Sequence[np.ndarray], statistic: Callable[[np.ndarray], np.ndarray]) -> Estimate:
    """A statistic of the values of several tasks together, each task's (n,) resampled within itself."""
    import scipy.stats

    value = float(statistic(np.concatenate(samples)))
    if min(map(len, samples)) < 2:
        return Estimate(value)
    interval = scipy.stats.bootstrap(
        samples,
        lambda *drawn, axis: statistic(np.concatenate(drawn, axis)),
        n_resamples=DRAWS,
        confidence_level=LEVEL,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return Estimate(value, float(interval.low), float(interval.high))


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
    """Every pair of methods, in the score at each one's best rate and in sensitivity, seed by seed."""
    made = []
    for first, second in itertools.combinations(panel.curves, 2):
        seeds = sorted({*first.seeds} & {*second.seeds})
        for what, numbers in (("score at the best rate", _best_by_seed), ("sensitivity", _sensitivity_by_seed)):
            of_first, of_second = numbers(first, panel), numbers(second, panel)
            pairs = np.array([(of_first[seed], of_second[seed]) for seed in seeds]).reshape(-1, 2)
            pairs = pairs[~np.isnan(pairs).any(1)]
            if len(pairs):
                made.append(Comparison(what, first.label, second.label, *paired(*pairs.T), len(pairs)))
    return made


def _best_by_seed(curve: Curve, panel: Panel) -> dict[int, float]:
    return dict(zip(curve.seeds, curve.best_scores_S, strict=True))


def _sensitivity_by_seed(curve: Curve, panel: Panel) -> dict[int, float]:
    """Where no trial is missing, their mean is the method's."""
    floored_SF = np.maximum(curve.score_FS, panel.floor).T
    x_F, best_S = np.log10(curve.factors_F), np.full(len(floored_SF), curve.best)
    return dict(zip(curve.seeds, sensitivity(floored_SF, x_F, best_S, panel.span), strict=True))


def paired(a: np.ndarray, b: np.ndarray) -> tuple[Estimate, float]:
    """The mean of a − b with Student's interval, and the p-value of the paired t-test.

    Interval and p are NaN with fewer than two pairs, or where all differences are equal: no spread was seen, which
    with a handful of seeds and coarse scores does not show that there is none.
    """
    import scipy.stats

    difference = a - b
    if len(difference) < 2 or np.ptp(difference) < 1e-9:
        return Estimate(float(difference.mean())), math.nan
    test = scipy.stats.ttest_rel(a, b)
    interval = test.confidence_interval(LEVEL)
    return Estimate(float(difference.mean()), float(interval.low), float(interval.high)), float(test.pvalue)


def unpaired(ours: np.ndarray, mean: float, spread: float | None, n: int) -> Estimate:
    """Our mean minus a published one, with Welch's interval where the published one has a std over n seeds."""
    import scipy.stats

    difference = float(ours.mean()) - mean
    if spread is None or len(ours) < 2:
        return Estimate(difference)
    a, b = std(ours) ** 2 / len(ours), spread**2 / n
    if not a + b:
        return Estimate(difference)
    freedom = (a + b) ** 2 / (a**2 / (len(ours) - 1) + b**2 / (n - 1))
    half = float(scipy.stats.t.ppf((1 + LEVEL) / 2, freedom)) * math.sqrt(a + b)
    return Estimate(difference, difference - half, difference + half)
