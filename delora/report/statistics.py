"""The numbers under the curves. Scores are fractions; a point is 0.01.

Shapes: F learning rates, S seeds, B draws of seeds or shuffles of rates, P points of a grid.

Intervals resample the seeds: all rates of a seed share its split, data order and initial values, so whole seeds are
drawn with replacement, the same draws for every method, and each number is computed anew from every draw. Up to seven
seeds all draws there are (126 for five) are taken, each with its probability, else `DRAWS` at random. They are 95 %
percentile intervals; with five seeds they are on the narrow side, and with fewer than `FEWEST` there are none. The
worst drop is a maximum, so that its interval excludes zero for a flat curve too: whether there is one is told by
`chance`.
"""

import functools
import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import yaml  # type: ignore[import-untyped]

from delora.report.trials import Trial, label_order
from delora.tasks import Task

DRAWS = 2000
SHUFFLES = 4999  # beside what was seen: the lowest p-value is 1 in 5,000
LEVEL = 0.95
FEWEST = 3  # seeds of an interval: resampling two only tells their distance
TOLERANCE = 0.01  # a rate is tolerated if it scores within one point of the best
ALL_PAIRS = 16  # methods of a panel up to which each is compared with each
Span = tuple[float, float]  # the lowest and the highest factor of a range
Select = Literal["pooled", "first-seed"]  # how the best rate is chosen: see `best_rates`
SELECTS: tuple[Select, ...] = get_args(Select)


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
        select: how the best rate is chosen.
    """

    label: str
    factors_F: np.ndarray
    rates_F: np.ndarray
    seeds: list[int]
    score_FS: np.ndarray
    validation_FS: np.ndarray
    scoreless_FS: np.ndarray
    trials: dict[tuple[int, int], Trial]
    select: Select = "pooled"

    @functools.cached_property
    def best(self) -> int:
        """The index of the best rate: see `best_rates`."""
        return int(best_rates(self, np.ones((1, len(self.seeds))))[0])

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
        select: how each curve's best rate is chosen.
        stopped: how many trials a halving has stopped. What depends on trials that lose, as the robustness to the rate
            and what a budget buys, is then not known, and left out: the others are the best.
    """

    task: str
    model: str
    protocol: str
    data: str
    floor: float
    curves: list[Curve]
    heads: list[Curve]
    span: Span | None
    select: Select
    stopped: int = 0

    @property
    def facts(self) -> Task:
        return self.trials[0].facts

    @property
    def split(self) -> str:
        return "validation" if self.protocol == "standard" else "test"

    @property
    def synthetic(self) -> bool:
        """Whether its data were generated."""
        return self.trials[0].synthetic

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


def guessing(trials: Sequence[Trial]) -> float:
    """What always guessing the same scores on the trials' validation rows, a fraction: the floor of every curve.

    It stands for the untrained model, whose accuracy is that of whatever class its head happens to prefer; guessing the
    most frequent class is the best that no training can do. Correlations and Matthews have 0. Results hold it; of old
    ones that do not, GLUE's is known, and other data's classes are taken as equally frequent.
    """
    stored = [trial.result["made_by"]["data"].get("guessing") for trial in trials]
    if known := [score for score in stored if score is not None]:
        return known[0]
    facts = trials[0].facts
    if facts.headline != "accuracy":
        return 0.0
    if trials[0].synthetic or facts.name not in published()["most_frequent_class"]:
        return 1 / facts.num_labels
    rows, all_rows = published()["most_frequent_class"][facts.name]
    return rows / all_rows


def task_order(task: str) -> int:
    """Sorts tasks as the columns of the paper's table."""
    order = list(published()["rows"][0]["scores"])
    return order.index(task) if task in order else len(order)


def panels(
    trials: Iterable[Trial], span: Span | None = None, select: Select = "pooled", stopped: Iterable[Trial] = ()
) -> list[Panel]:
    """Groups trials into panels, in the order of the paper's table, then by encoder.

    Args:
        span: the range of factors for worst drop and sensitivity, instead of the widest that all curves cover.
        select: how each curve's best rate is chosen.
        stopped: the trials that a halving has stopped.
    """
    lost = Counter(trial.place for trial in stopped)
    by_place: dict[tuple[str, str, str, str], dict[str, list[Trial]]] = defaultdict(lambda: defaultdict(list))
    for trial in trials:
        by_place[trial.place][trial.label].append(trial)
    made = []
    for place, by_label in sorted(by_place.items(), key=lambda item: (task_order(item[0][0]), *item[0])):
        floor = guessing([trial for some in by_label.values() for trial in some])
        curves = [curve(label, by_label[label], floor, select) for label in sorted(by_label, key=label_order)]
        heads = [c for c in curves if c.trials_at(0)[0].result["parameters"]["adapter"] == 0]
        adapted = [c for c in curves if c not in heads]
        shown, heads = (adapted, heads) if adapted else (heads, [])
        whole = None if lost[place] else span or common_span(shown)
        made.append(Panel(*place, floor, shown, heads, whole, select, lost[place]))
    return made


def curve(label: str, trials: Sequence[Trial], floor: float, select: Select = "pooled") -> Curve:
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
    return Curve(label, np.array(factors), rates_F, seeds, score_FS, validation_FS, scoreless_FS, places, select)


def common_span(curves: Sequence[Curve]) -> Span | None:
    """The widest range of factors that every curve with several rates covers."""
    several = [c for c in curves if len(c.factors_F) > 1]
    low = max((float(c.factors_F[0]) for c in several), default=0.0)
    high = min((float(c.factors_F[-1]) for c in several), default=0.0)
    return (low, high) if low < high else None


# --- Resampling


@functools.cache
def resamples(n: int) -> tuple[np.ndarray, np.ndarray]:
    """Draws of n values with replacement: their indices (B, n), and the probability (B,) of each.

    All there are, up to order, where these are no more than DRAWS; else DRAWS at random, the same each time.
    """
    if math.comb(2 * n - 1, n) > DRAWS:
        return np.random.default_rng(0).integers(0, n, (DRAWS, n)), np.full(DRAWS, 1 / DRAWS)
    index_BN = np.array(list(itertools.combinations_with_replacement(range(n), n)))
    factorials_N = np.array([math.factorial(i) for i in range(n + 1)])
    return index_BN, factorials_N[n] / factorials_N[_counts(index_BN)].prod(1) / n**n


def _counts(index_BN: np.ndarray) -> np.ndarray:
    return (index_BN[:, :, None] == np.arange(index_BN.shape[1])).sum(1)


@functools.cache
def draws(seeds: int) -> np.ndarray:
    """How often each seed is drawn, (1 + B, S): once each in the first row. The same for every method."""
    return np.vstack([np.ones(seeds), _counts(resamples(seeds)[0])])


def means(values_FS: np.ndarray, draws_BS: np.ndarray) -> np.ndarray:
    """The mean over the drawn seeds at each rate, (B, F); NaN where no drawn seed has a trial."""
    there = ~np.isnan(values_FS)
    with np.errstate(invalid="ignore"):
        return (draws_BS @ np.where(there, values_FS, 0).T) / (draws_BS @ there.T.astype(float))


def estimate(values_B: np.ndarray, seeds: int, at_least: bool = False, rests_on: int | None = None) -> Estimate:
    """The first of the values with the interval of the others, one for each of the `draws` of so many seeds.

    Args:
        rests_on: how many trials the first value rests on, where not on all seeds.
    """
    value, resampled_B = float(values_B[0]), values_B[1:]
    if (rests_on or seeds) < FEWEST or math.isnan(value) or np.isnan(resampled_B).all():
        return Estimate(value, at_least=at_least)
    return Estimate(value, *percentiles(resampled_B, resamples(seeds)[1]), at_least)


def percentiles(values_B: np.ndarray, weight_B: np.ndarray) -> tuple[float, float]:
    """The ends between which LEVEL of a distribution lies: the lowest values that its shares reach. NaN is left out."""
    there = ~np.isnan(values_B)
    order = np.argsort(values_B[there], kind="stable")
    value_B, share_B = values_B[there][order], np.cumsum(weight_B[there][order])
    ends = np.searchsorted(share_B / share_B[-1], [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    low, high = value_B[ends]
    return float(low), float(high)


def band(values_FS: np.ndarray) -> np.ndarray:
    """Mean over the seeds at each rate and its interval's ends, (3, F)."""
    seeds = values_FS.shape[1]
    means_BF, n_F = means(values_FS, draws(seeds)), (~np.isnan(values_FS)).sum(1)
    estimates = [estimate(column, seeds, rests_on=n) for column, n in zip(means_BF.T, n_F, strict=True)]
    return np.array([[e.value, e.low, e.high] for e in estimates]).T


# --- Numbers of one curve


@dataclass(frozen=True)
class Robustness:
    """See `best_rates` for the best score, and the functions named like the others.

    Attributes:
        flat, p: what `chance` says of the drop.
    """

    best: Estimate
    tolerated: Estimate
    drop: Estimate
    flat: float
    p: float
    sensitivity: Estimate


def robustness(curve: Curve, span: Span | None, floor: float) -> Robustness:
    """The numbers of a curve; each draw of seeds chooses its best rate anew."""
    seeds, x_F = len(curve.seeds), np.log10(curve.factors_F)
    draws_BS = draws(seeds)
    best_B = best_rates(curve, draws_BS)
    score_BF, floored_BF = means(curve.score_FS, draws_BS), means(np.maximum(curve.score_FS, floor), draws_BS)
    width_B, on_edge_B = tolerated_range(score_BF, x_F, best_B)
    flat, p = chance(curve, span)
    return Robustness(
        best=estimate(_take(score_BF, best_B), seeds),
        tolerated=estimate(width_B, seeds, at_least=bool(on_edge_B[0])),
        drop=estimate(worst_drop(score_BF, x_F, best_B, span), seeds),
        flat=flat,
        p=p,
        sensitivity=estimate(sensitivity(floored_BF, x_F, best_B, span), seeds),
    )


def best_rates(curve: Curve, draws_BS: np.ndarray) -> np.ndarray:
    """The index (B,) of the rate with the highest validation score; of equals the lowest rate.

    Pooled, that is the mean over the drawn seeds; with first-seed, as the paper has it, the score of the lowest seed,
    whatever is drawn. Test scores are never looked at. Rates with fewer trials than the fullest one cannot win: an
    unfinished sweep does not crown a rate for one lucky seed. With first-seed they can where the seed has no other.
    """
    if curve.select == "first-seed":
        validation_BF = np.broadcast_to(curve.validation_FS[:, 0], (len(draws_BS), len(curve.factors_F)))
        able_F = curve.fullest_F & ~np.isnan(validation_BF[0])
        able_F = able_F if able_F.any() else ~np.isnan(validation_BF[0])
    else:
        validation_BF, able_F = means(curve.validation_FS, draws_BS), curve.fullest_F
    return np.where(able_F & ~np.isnan(validation_BF), validation_BF, -np.inf).argmax(1)


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


def tolerated_rates(curve: Curve, at: int) -> tuple[Estimate, Estimate]:
    """The lowest and the highest rate around the one of an index that `tolerated_range` reaches; `at_least` where the
    grid ends there, so that the rate may be lower or higher yet."""
    x_F, score_BF, at_B = np.log10(curve.factors_F), np.nanmean(curve.score_FS, 1)[None], np.array([at])
    right = float(_reach(score_BF, x_F, at_B)[0])
    left = float(_reach(score_BF[:, ::-1], -x_F[::-1], len(x_F) - 1 - at_B)[0])
    rate, ends = float(curve.rates_F[at]), (x_F[at] - left, x_F[at] + right)
    on_edge = np.isclose(ends, (x_F[0], x_F[-1]))
    low, high = rate / 10**left, rate * 10**right
    return Estimate(low, at_least=bool(on_edge[0])), Estimate(high, at_least=bool(on_edge[1]))


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


def chance(curve: Curve, span: Span | None) -> tuple[float, float]:
    """What worst drop the seeds' noise alone makes, and how likely it makes one like the curve's.

    The worst drop is a maximum, and so above zero for a flat curve too. Its distribution where the rate has no effect
    is had by shuffling each seed's trials, validation and test together, among the rates, and choosing the best rate
    and the lowest score anew: a permutation test within blocks, exact where the noise is the same at all rates, for any
    number of seeds. What is compared is the drop over the noise, which is the larger of the two-way residuals' standard
    deviation (seed and rate taken out) and that between the two rates of the drop: so a curve that breaks is not held
    against itself, nor a rate for its own noise.

    Returns:
        The drop that a flat curve with this curve's noise exceeds in 5 % of all cases, a fraction; and the one-sided p.
        Both NaN where the range is not covered or fewer than two seeds have all rates; others are left out.
    """
    whole_S = ~np.isnan(curve.score_FS).any(0)
    grid = _grid(np.log10(curve.factors_F), span)
    if grid is None or whole_S.sum() < 2 or (curve.select == "first-seed" and not whole_S[0]):
        return math.nan, math.nan
    order_BFS = _shuffles(len(curve.factors_F), int(whole_S.sum()))
    validation_BFS = np.take_along_axis(curve.validation_FS[None, :, whole_S], order_BFS, 1)
    score_BFS = np.take_along_axis(curve.score_FS[None, :, whole_S], order_BFS, 1)
    chosen_BF = validation_BFS[:, :, 0] if curve.select == "first-seed" else validation_BFS.mean(2)
    score_BPS = grid[1] @ score_BFS
    drop_BS = _take(score_BFS, chosen_BF.argmax(1)) - _take(score_BPS, score_BPS.mean(2).argmin(1))
    residual_BFS = score_BFS - score_BFS.mean(2, keepdims=True) - score_BFS.mean(1, keepdims=True) + score_BFS.mean()
    freedom = (residual_BFS.shape[1] - 1) * (residual_BFS.shape[2] - 1)
    noise_B = np.sqrt(np.maximum((residual_BFS**2).sum((1, 2)) / freedom, drop_BS.var(1, ddof=1) / 2))
    ratio_B = drop_BS.mean(1) / np.maximum(noise_B, 1e-9)  # of scores without any noise
    p = float((ratio_B >= ratio_B[0] - 1e-9 * abs(ratio_B[0])).mean())
    return float(np.quantile(ratio_B, LEVEL, method="higher") * noise_B[0]), p


@functools.cache
def _shuffles(factors: int, seeds: int) -> np.ndarray:
    """Orders of the rates for each seed, (1 + SHUFFLES, F, S): as they are, then at random; the same for all curves."""
    random_BFS = np.random.default_rng(0).random((1 + SHUFFLES, factors, seeds))
    random_BFS[0] = np.arange(factors)[:, None]
    return random_BFS.argsort(1)


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
    """Of each draw the value, or the row of values, at its index."""
    return values_BF[np.arange(len(values_BF)), index_B]


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
    cut = values.shape[-1] // 4
    return np.sort(values, -1)[..., cut : values.shape[-1] - cut].mean(-1)


def pooled(samples: Sequence[np.ndarray], statistic: Callable[[np.ndarray], np.ndarray]) -> Estimate:
    """A statistic of the values of several tasks together, each task's (n,) resampled within itself."""
    value = float(statistic(np.concatenate(samples)))
    if min(map(len, samples)) < FEWEST:
        return Estimate(value)
    if len(samples) == 1:
        index_BN, weight_B = resamples(len(samples[0]))
        return Estimate(value, *percentiles(statistic(samples[0][index_BN]), weight_B))
    random = np.random.default_rng(0)
    drawn = [sample[random.integers(0, len(sample), (DRAWS, len(sample)))] for sample in samples]
    return Estimate(value, *percentiles(statistic(np.concatenate(drawn, 1)), np.full(DRAWS, 1 / DRAWS)))


@dataclass
class Comparison:
    """A paired comparison by seed: the mean of first − second over the n seeds that both have.

    Attributes:
        what: the number that is compared.
        p, corrected: of this comparison alone, and among its family: see `compare`. NaN without an interval.
    """

    task: str
    what: str
    first: str
    second: str
    difference: Estimate
    p: float
    n: int
    corrected: float = math.nan

    @property
    def higher(self) -> str | None:
        """The label of the method that is shown to be higher: None unless the corrected p says so."""
        if not self.corrected < 1 - LEVEL:
            return None
        return self.first if self.difference.value > 0 else self.second


def compare(panels: Iterable[Panel]) -> list[Comparison]:
    """Methods in the score at each one's best rate and in sensitivity, seed by seed.

    In a panel of up to ALL_PAIRS methods each is compared with each, in a larger one each with the one that is best on
    validation. All comparisons of one number are a family, within which p is corrected after Holm.
    """
    made = []
    for panel in panels:
        numbers = {
            "score at the best rate": [dict(zip(c.seeds, c.best_scores_S, strict=True)) for c in panel.curves],
            "sensitivity": [_sensitivity_by_seed(c, panel) for c in panel.curves],
        }
        for first, second in _pairs(panel.curves):
            for what, by_seed in numbers.items():
                shared = sorted(by_seed[first].keys() & by_seed[second].keys())
                pairs = np.array([(by_seed[first][seed], by_seed[second][seed]) for seed in shared]).reshape(-1, 2)
                pairs = pairs[~np.isnan(pairs).any(1)]
                if len(pairs):
                    labels = panel.curves[first].label, panel.curves[second].label
                    made.append(Comparison(panel.task, what, *labels, *paired(*pairs.T), len(pairs)))
    for what in {c.what for c in made}:
        family = [c for c in made if c.what == what]
        for c, corrected in zip(family, holm([c.p for c in family]), strict=True):
            c.corrected = corrected
    return made


def _pairs(curves: Sequence[Curve]) -> list[tuple[int, int]]:
    if len(curves) <= ALL_PAIRS:
        return [*itertools.combinations(range(len(curves)), 2)]
    best = int(np.argmax([np.nanmean(curve.validation_FS[curve.best]) for curve in curves]))
    return [(best, other) for other in range(len(curves)) if other != best]


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
    from scipy import special  # scipy.stats takes a second to import, and its tests half a millisecond each

    difference = a - b
    mean, freedom = float(difference.mean()), len(difference) - 1
    if not freedom or np.ptp(difference) < 1e-9:
        return Estimate(mean), math.nan
    error = std(difference) / math.sqrt(len(difference))
    half = float(special.stdtrit(freedom, (1 + LEVEL) / 2)) * error
    return Estimate(mean, mean - half, mean + half), 2 * float(special.stdtr(freedom, -abs(mean) / error))


def holm(p: Sequence[float]) -> list[float]:
    """The p-values of a family corrected for their number after Holm 1979: the lowest times n, the next times n − 1,
    and so on, none below one before it. NaN, of what was not tested, stays and does not count.
    """
    given = np.array(p, float)
    order = np.argsort(given)[: (~np.isnan(given)).sum()]  # NaN is sorted last
    corrected = np.full(len(given), np.nan)
    corrected[order] = np.minimum(np.maximum.accumulate(given[order] * np.arange(len(order), 0, -1)), 1)
    return corrected.tolist()


def unpaired(ours: np.ndarray, mean: float, spread: float | None, n: int) -> Estimate:
    """Our mean minus a published one, with Welch's interval where the published one has a std over n seeds."""
    from scipy import special

    difference = float(ours.mean()) - mean
    if spread is None or len(ours) < 2:
        return Estimate(difference)
    a, b = std(ours) ** 2 / len(ours), spread**2 / n
    if not a + b:
        return Estimate(difference)
    freedom = (a + b) ** 2 / (a**2 / (len(ours) - 1) + b**2 / (n - 1))
    half = float(special.stdtrit(freedom, (1 + LEVEL) / 2)) * math.sqrt(a + b)
    return Estimate(difference, difference - half, difference + half)
