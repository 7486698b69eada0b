"""What a tuning budget buys: the expected best score of a search, against how many configs it tries.

A trial of tuning is a config: its score on validation is the mean over its seeds, by which the best of those tried is
chosen, and with it comes its score on the panel's split. A method's configs are all its rates and whatever else its
trials differ in. Configs with fewer seeds than its fullest are left out; a trial without a score counts as guessing.

Dodge et al. 2019 (arXiv 1909.03004) draw m configs of the n with replacement, which is biased downwards, as Tang et al.
2020 (arXiv 2004.13705) show. Drawn without, the mean over all subsets is unbiased; both it and the standard errors are
computed in closed form.

Shapes: N configs, S seeds, M numbers of configs tried, 1 to N.
"""

import functools
import itertools
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from delora.report import statistics
from delora.report.statistics import Panel
from delora.report.trials import Trial, label_order

AXES = ("trials", "hours", "epochs")  # what a budget is counted in


@dataclass(frozen=True)
class Budget:
    """One method in one panel.

    Attributes:
        label: the method's, whatever else its trials differ in.
        trials: those of the configs that count.
        seeds: of each config.
        left_out: configs with fewer seeds.
        validation_3M, score_3M: the expected best on validation, and what the same config has on the panel's split,
            fractions, each with its interval's ends: see `expected_best` and `interval`.
        hours: a config takes on the mean, of one device, all its seeds.
        epochs: a config takes on the mean, all its seeds together.
    """

    label: str
    trials: tuple[Trial, ...]
    seeds: int
    left_out: int
    validation_3M: np.ndarray
    score_3M: np.ndarray
    hours: float
    epochs: float

    @property
    def configs(self) -> int:
        return self.validation_3M.shape[1]

    def x_M(self, axis: str) -> np.ndarray:
        """What trying 1 to N configs takes: that many, or what so many take on the mean."""
        return np.arange(1, self.configs + 1) * {"trials": 1.0, "hours": self.hours, "epochs": self.epochs}[axis]

    def drawn_by(self, axis: str) -> bool:
        """Whether its budget can be drawn on a logarithmic axis: its trials took some time, as far as that is known."""
        return 0 < self.x_M(axis)[0] < math.inf


def budgets(panel: Panel) -> list[Budget]:
    """Of each method that has tried several configs, in the order of methods; none where a halving has stopped some."""
    if panel.stopped:
        return []
    configs: dict[str, list[list[Trial]]] = defaultdict(list)
    for curve in panel.curves:
        for factor in range(len(curve.factors_F)):
            trials = curve.trials_at(factor)
            configs[trials[0].method].append(trials)
    made = [_budget(label, configs[label], panel.floor) for label in sorted(configs, key=label_order)]
    return [budget for budget in made if budget.configs > 1]


def _budget(label: str, configs: Sequence[Sequence[Trial]], floor: float) -> Budget:
    most = max(map(len, configs))
    full = [trials for trials in configs if len(trials) == most]
    seeds = sorted({trial.seed for trials in full for trial in trials})
    of_NS = np.full((2, len(full), len(seeds)), np.nan)
    for i, trials in enumerate(full):
        for trial in trials:
            scores = trial.validation, trial.score
            of_NS[:, i, seeds.index(trial.seed)] = [floor if math.isnan(score) else score for score in scores]
    validation_M, score_M = expected_best(*np.nanmean(of_NS, 2))
    half_2M = interval(*of_NS)
    counted = tuple(trial for trials in full for trial in trials)
    return Budget(
        label,
        counted,
        most,
        len(configs) - len(full),
        np.array([validation_M, validation_M - half_2M[0], validation_M + half_2M[0]]),
        np.array([score_M, score_M - half_2M[1], score_M + half_2M[1]]),
        sum(trial.seconds for trial in counted) / len(full) / 3600,
        sum(trial.epochs for trial in counted) / len(full),
    )


def expected_best(validation_N: np.ndarray, score_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The mean over all subsets of m configs of the highest validation score, and of that config's score, (M,) each.

    With the configs ascending by validation, the i-th is the best of C(i − 1, m − 1) of the C(n, m) subsets: the
    unbiased estimator of Tang et al. 2020, Eq. 4. Of configs that are equal on validation each is as likely taken.
    """
    order_N = np.argsort(validation_N, kind="stable")
    _, group_N = np.unique(validation_N[order_N], return_inverse=True)
    score_G = np.bincount(group_N, score_N[order_N]) / np.bincount(group_N)
    weight_MN = weights(len(order_N))
    return weight_MN @ validation_N[order_N], weight_MN @ score_G[group_N]


@functools.cache
def weights(n: int) -> np.ndarray:
    """C(i − 1, m − 1) / C(n, m) for m and i of 1 to n, (M, N)."""
    m_M1, i_N = np.arange(1, n + 1)[:, None], np.arange(n, 1, -1)
    steps_MN = np.maximum(i_N - m_M1, 0) / (i_N - 1)  # from each config to the one below it
    return np.hstack([m_M1 / n, m_M1 / n * np.cumprod(steps_MN, 1)])[:, ::-1]


def interval(validation_NS: np.ndarray, score_NS: np.ndarray) -> np.ndarray:
    """Half the widths (2, M) of the 95 % intervals of `expected_best` of the means over the seeds.

    Student's, with the jackknife's variances: of leaving out each config in turn, and where all configs share
    `statistics.FEWEST` seeds or more, of leaving out each seed, added, with Satterthwaite's degrees of freedom. Up to
    half of the configs: beyond, nearly every subset holds the best one, and its chance is not seen. In simulations of
    8 to 32 normal, skewed and two-peaked scores such intervals hold the truth in 84 to 96 % of cases up to there, in 73
    % at n − 1; the percentile bootstrap, which Tang et al. find wanting, in 66 to 96 % and 46 to 65 %. NaN is no
    interval: too few configs, or no spread.
    """
    from scipy import special

    n, seeds = validation_NS.shape
    half_2M = np.full((2, n), np.nan)
    if n < statistics.FEWEST:
        return half_2M
    few = n // 2
    means_2N = np.nanmean([validation_NS, score_NS], 2)
    parts = [(n - 1, [np.delete(means_2N, i, 1) for i in range(n)])]
    if seeds >= statistics.FEWEST and not np.isnan(validation_NS).any():
        both_2NS = np.array([validation_NS, score_NS])
        parts.append((seeds - 1, [np.delete(both_2NS, s, 2).mean(2) for s in range(seeds)]))
    variances, freedoms = [], []
    for freedom, left in parts:
        values_J2M = np.array([[part[:few] for part in expected_best(*means)] for means in left])
        variances.append(freedom * values_J2M.var(0))
        freedoms.append(freedom)
    total_2M = sum(variances)
    with np.errstate(invalid="ignore", divide="ignore"):
        of_2M = total_2M**2 / sum(v**2 / freedom for v, freedom in zip(variances, freedoms, strict=True))
        wide = special.stdtrit(of_2M, (1 + statistics.LEVEL) / 2) * np.sqrt(total_2M)
    half_2M[:, :few] = np.where(total_2M > 1e-18, wide, np.nan)
    return half_2M


def shown(configs: int) -> list[int]:
    """The numbers of configs tried that a table has room for: the powers of two, and all."""
    return [*(2**power for power in range((configs - 1).bit_length())), configs]


def pairs(of_panel: Sequence[Budget]) -> list[tuple[Budget, Budget]]:
    """Those that are compared: each with each, of many each with the one that is best on validation."""
    if len(of_panel) <= statistics.ALL_PAIRS:
        return [*itertools.combinations(of_panel, 2)]
    best = max(of_panel, key=lambda one: one.validation_3M[0, -1])
    return [(best, other) for other in of_panel if other is not best]


def leaders(first: Budget, second: Budget, axis: str, split: str) -> list[tuple[str, float]]:
    """Which of two methods has the higher curve, and from where on: one entry where the curves do not cross.

    Args:
        split: "validation" or "score".

    Returns:
        Labels, each with the x from which on it is higher: the lowest that both curves have, and each crossing after
        it, between the points as the lines that join them cross; counted in trials, the first number at which the
        other one is higher. Empty where the curves have no x in common or are the same.
    """
    x = [b.x_M(axis) for b in (first, second)]
    y = [getattr(b, f"{split}_3M")[0] for b in (first, second)]
    low, high = max(x[0][0], x[1][0]), min(x[0][-1], x[1][-1])
    at = np.unique(np.concatenate([of[(low <= of) & (of <= high)] for of in x]))
    if not len(at):
        return []
    gap = np.interp(at, x[0], y[0]) - np.interp(at, x[1], y[1])
    made: list[tuple[str, float]] = []
    for i, value in enumerate(gap):
        if abs(value) < 1e-9:
            continue
        label = (first if value > 0 else second).label
        if not made:
            made.append((label, float(at[i])))
        elif made[-1][0] != label:
            equal = at[i - 1] + (at[i] - at[i - 1]) * gap[i - 1] / (gap[i - 1] - value)
            made.append((label, float(at[i] if axis == "trials" else equal)))
    return made
