"""Successive halving (Jamieson & Talwalkar 2016, arXiv 1502.07943): after some epochs only the best configs train on.

All trials train to a rung, an epoch of `halving.rungs`; then each group of configs keeps its best share, and the others
end with the status "stopped", as trials that were to end there but for their schedules, which are those of the full
length. Who is kept follows from what is on disk alone: the trials' logs and the fleets' states; so a command that was
killed decides again what it had decided. Imports torch only where rows of states are moved.

    <sweep>/.fleets/regroup.json    which fleets are just being made of the rows of which others
"""

import functools
import hashlib
import json
import logging
import statistics
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from delora import fleets, storage
from delora.config import NOT_THE_TRIAL, HalvingConfig, Trial
from delora.fleets import FLEETS, NAME, STATE, Group

if TYPE_CHECKING:
    from torch import Tensor

REGROUP = "regroup.json"

logger = logging.getLogger(__name__)


# --- Who trains on


@dataclass(frozen=True)
class Round:
    """What is to be trained next.

    Attributes:
        until: the epoch that `train` train to; None: their end.
        train: the trials that train on, and are not there yet.
        ending: the rung at which a trial that lost ends, by its folder's name; of those that have not ended yet.
    """

    until: int | None
    train: list[Trial]
    ending: dict[str, int] = field(default_factory=dict)


def next_round(
    trials: Iterable[Trial], over: Collection[Path], failed: Collection[Path], reached: Mapping[str, int]
) -> Round:
    """What follows from how far the trials are.

    Args:
        trials: all that are compared, one of each training.
        over: folders of those that have ended; at a rung they count with what they had there.
        failed: folders of those that failed; they lose.
        reached: of `how_far`.

    Raises:
        ResultsError: a trial's log is damaged.
    """
    alive, ending = list(trials), dict[str, int]()
    settings = alive[0].halving
    assert settings is not None and settings.rungs is not None
    for rung in settings.rungs:
        left = [trial for trial in alive if trial.folder not in over and trial.folder not in failed]
        if waiting := [trial for trial in left if reached.get(trial.folder.name, 0) < rung]:
            return Round(rung, waiting, ending)
        best = set(survivors(alive, {t.folder: score_at(t, rung) for t in alive if t.folder not in failed}, settings))
        ending |= {trial.folder.name: rung for trial in left if trial.folder not in best}
        alive = [trial for trial in alive if trial.folder in best]
    return Round(None, [trial for trial in alive if trial.folder not in over and trial.folder not in failed], ending)


def survivors(trials: Iterable[Trial], scores: Mapping[Path, float | None], settings: HalvingConfig) -> list[Path]:
    """The folders of the trials that train on: those with a score of the best configs of each group.

    Of n configs round(keep * n) are kept, but at least one, by the mean over their seeds; one of which a seed has no
    score, as it diverged, comes after all others. The first of equals is kept.
    """
    groups: dict[tuple[str, ...], dict[str, list[Path]]] = defaultdict(lambda: defaultdict(list))
    for trial in trials:
        groups[group_of(trial, settings)][trial.setting].append(trial.folder)
    kept = []
    for configs in groups.values():
        ranked = sorted(configs.values(), key=lambda folders: _rank([scores.get(folder) for folder in folders]))
        best = ranked[: kept_of(len(ranked), settings)]
        kept += [folder for folders in best for folder in folders if scores.get(folder) is not None]
    return kept


def group_of(trial: Trial, settings: HalvingConfig) -> tuple[str, ...]:
    """What the configs have in common that are compared with one another."""
    return (trial.task.name,) if settings.by == "none" else (trial.task.name, trial.method.name, trial.model.name)


def kept_of(configs: int, settings: HalvingConfig) -> int:
    return max(1, round(settings.keep * configs))


def _rank(scores: Sequence[float | None]) -> tuple[int, float]:
    known = [score for score in scores if score is not None]
    return len(scores) - len(known), -statistics.fmean(known) if known else 0.0


def score_at(trial: Trial, rung: int) -> float | None:
    """The headline score on validation of its best epoch up to a rung; None where it was not scored there, or has none.

    Raises:
        ResultsError: its log is damaged.
    """
    lines = [line for line in storage.evaluations(trial.folder) if 0 < line["epoch"] <= rung]
    if not lines or lines[-1]["epoch"] < rung:
        return None
    known = [score for line in lines if (score := line["metrics"].get(trial.task.facts.headline)) is not None]
    return max(known, default=None)


def epochs_share(trials: Sequence[Trial]) -> dict[Path, float]:
    """The share of its epochs that a trial trains on average, by folder, if no config ends otherwise."""
    settings = trials[0].halving
    if settings is None or settings.rungs is None:
        return dict.fromkeys((trial.folder for trial in trials), 1.0)
    groups: dict[tuple[str, ...], list[Trial]] = defaultdict(list)
    for trial in trials:
        groups[group_of(trial, settings)].append(trial)
    shares: dict[Path, float] = {}
    for group in groups.values():
        left = configs = len({trial.setting for trial in group})
        trained = 0.0  # epochs of configs
        for before, rung in pairwise([0, *settings.rungs, group[0].epochs]):
            trained += left * (rung - before)
            left = kept_of(left, settings)
        shares |= {trial.folder: trained / configs / trial.epochs for trial in group}
    return shares


# --- How far they are


def how_far(root: Path, known: Mapping[Path, Trial]) -> dict[str, int]:
    """The last epoch that the states of a sweep's fleets have scored, by the name of a trial's folder.

    Args:
        known: the command's trials by folder; it goes on with fleets of these alone.
    """
    found: dict[str, int] = {}
    for _, about in _states(root, known):
        recorded = [name for name, log in zip(about["folders"], about["logs"], strict=True) if log]
        found |= {name: max(about["scored"], found.get(name, 0)) for name in recorded}
    return found


def _states(root: Path, known: Mapping[Path, Trial]) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The fleets of these trials that have a state, with what it says beside its tensors.

    A trial whose log is not as the state says it was has none there, as it begins anew.
    """
    from safetensors import SafetensorError, safe_open

    for fleet in sorted((root / FLEETS).glob(NAME)):
        # A state that is damaged, or was just removed, is none.
        with suppress(OSError, SafetensorError, ValueError, KeyError, TypeError):
            names = fleets.kept(fleet)
            with safe_open(fleet / STATE, "numpy") as file:
                about = json.loads(file.metadata()["state"])
            if about["folders"] == names and all(root / name in known for name in names):
                logs = zip(names, about["logs"], strict=True)
                yield fleet, {**about, "logs": [log if _holds(root / name, log) else None for name, log in logs]}


def _holds(folder: Path, log: storage.Extent | None) -> bool:
    if log is None:
        return False
    with suppress(OSError):
        data = storage.content(folder / storage.METRICS, storage.LOG_LIMIT)[: log["size"]]
        return len(data) == log["size"] and hashlib.sha256(data).hexdigest() == log["sha256"]
    return False


# --- Fleets of those that train on


def regroup(root: Path, known: Mapping[Path, Trial], round: Round, most: Callable[[Trial], int]) -> None:
    """Makes full fleets of the rows of those fleets in which some trials train on and others end.

    The caller holds the claim on the folder of fleets.

    Args:
        known: the command's trials by folder.
        most: how many trials like this one train together.

    Raises:
        ResultsError: a state cannot be written.
    """
    recover(root)
    anew = {trial.folder.name for trial in round.train}
    pools: dict[str, list[tuple[Path, dict[str, Any]]]] = defaultdict(list)
    for fleet, about in _states(root, known):
        if fleets.holder(fleet) is None:
            for name, log in zip(about["folders"], about["logs"], strict=True):
                if name in anew and not log:
                    told = "is not as the last checkpoint left it; the trial begins anew"
                    logger.warning("%s %s", root / name / storage.METRICS, told)
            place = [about["scored"], about["totals"]["steps"], about["origin"]]
            pools[json.dumps([known[root / about["folders"][0]].company, *place])].append((fleet, about))
    for pool in pools.values():
        over = {name for _, about in pool for name in about["folders"] if _has_ended(known[root / name], round)}
        if any(_is_mixed(about, round.ending, anew, over) for _, about in pool):
            _regroup(root, known, pool, round.ending, over, most)


def _is_mixed(about: Mapping[str, Any], ending: Collection[str], anew: Collection[str], over: Collection[str]) -> bool:
    """Whether of a fleet's trials that have not ended, `over`, some end and others do not, or one begins anew."""
    logs = dict(zip(about["folders"], about["logs"], strict=True))
    ends = [name in ending for name, log in logs.items() if log and name not in over]
    return (any(ends) and not all(ends)) or any(name in anew and not log for name, log in logs.items())


def _regroup(
    root: Path,
    known: Mapping[Path, Trial],
    pool: Sequence[tuple[Path, Mapping[str, Any]]],
    ending: Collection[str],
    over: Collection[str],
    most: Callable[[Trial], int],
) -> None:
    from delora.run import read_state, write_state

    read = functools.lru_cache(maxsize=4)(read_state)
    rows = {  # where the state of a trial is, of those that have neither ended nor begin anew
        name: (fleet, row)
        for fleet, about in pool
        if read(fleet / STATE)  # else it is damaged, which was told: its trials begin anew
        for row, (name, log) in enumerate(zip(about["folders"], about["logs"], strict=True))
        if log and name not in over
    }
    new: list[Group] = []
    for ends in (False, True):
        trials = [t for f, t in known.items() if f.parent == root and f.name in rows and (f.name in ending) == ends]
        if trials:
            count = -(-len(trials) // most(trials[0]))
            borders = [len(trials) * i // count for i in range(count + 1)]
            new += [Group(tuple(trials[i:j])) for i, j in pairwise(borders)]
    staying = {group.folder for group in new} & {fleet for fleet, _ in pool}
    new = [group for group in new if group.folder not in staying]
    old = [fleet for fleet, _ in pool if fleet not in staying]
    about = {"old": [fleet.name for fleet in old], "new": [group.folder.name for group in new]}
    storage.replace(root / FLEETS / REGROUP, json.dumps(about).encode(), root)
    for group in new:
        sources = []
        for fleet, row in (rows[trial.folder.name] for trial in group.trials):
            if (state := read(fleet / STATE)) is not None:
                sources.append((*state, row))
        write_state(group.state, group.trials[0].root, *stacked(sources))
        group.keep()
    recover(root)


def _has_ended(trial: Trial, round: Round) -> bool:
    return (
        trial.folder.name not in round.ending
        and storage.finished(trial.folder, trial.resolved(), NOT_THE_TRIAL) is not None
    )


def stacked(
    rows: Sequence[tuple[Mapping[str, "Tensor"], Mapping[str, Any], int]],
) -> tuple[dict[str, "Tensor"], dict[str, Any]]:
    """One fleet's state, as `delora.run.read_state` gives it, of rows of others' that are equally far.

    What those fleets took is shared out among their rows.

    Args:
        rows: each with the tensors and the plain data of the state that it is of.
    """
    import torch

    first = rows[0][1]
    tensors = {name: torch.stack([of[name][row] for of, _, row in rows]) for name in rows[0][0]}
    lists = {key: [of[key][row] for _, of, row in rows] for key, value in first.items() if isinstance(value, list)}
    totals = {
        key: value if key == "steps" else type(value)(sum(of["totals"][key] / len(of["trials"]) for _, of, _ in rows))
        for key, value in first["totals"].items()
    }
    return tensors, {**first, **lists, "totals": totals}


def recover(root: Path) -> None:
    """Ends a regrouping: forgets the old fleets; or the new ones, where a kill came before all of them were written.

    The caller holds the claim on the folder of fleets.
    """
    path = root / FLEETS / REGROUP
    try:
        about = json.loads(storage.content(path))
    except FileNotFoundError:
        return
    whole = all((root / FLEETS / name / fleets.TRIALS).exists() for name in about["new"])
    for name in about["old" if whole else "new"]:
        fleets.forget(root / FLEETS / name)
    path.unlink()
