"""Which trials train together, and what that takes."""

import functools
import gc
import heapq
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console as Rich
from rich.table import Table

from delora import halving, storage
from delora.config import Trial
from delora.console import duration
from delora.fleets import FLEETS, NAME, STATE, Group, kept
from delora.storage import Result
from delora.terminal import counted

if TYPE_CHECKING:
    import torch

# Of a fleet's time, beside its trials': what its start takes, and of its steps what does not grow with the trials, as
# scripts/benchmark measures them on a GPU. They decide alone how small the fleets of several workers become.
SECONDS_TO_START, TRIALS_OF_A_STEP = 10.0, 1.5
IDLE = 0.03  # of the workers' time, below which no fleet is split for it
SPLITS = 16  # that are tried for each worker


@dataclass
class Work:
    """A group with the time that it takes."""

    group: Group
    each: float  # seconds of a trial
    may_be_split: bool = True

    @property
    def seconds(self) -> float:
        return SECONDS_TO_START + self.each * (len(self.group.trials) + TRIALS_OF_A_STEP)


def get_ready(trials: Iterable[Trial]) -> None:
    """Imports what trains, and finds out whether the methods' classes are what the configs say."""
    import_torch()
    from delora.methods.base import check

    check(trial.method for trial in trials)


@functools.cache
def import_torch() -> None:
    """Imports what trains: a million objects that stay, and that the garbage collector need not look through."""
    gc.disable()
    try:
        import delora.cost
        import delora.run  # noqa: F401
    finally:
        gc.freeze()
        gc.enable()


def plan(
    missing: Sequence[Trial],
    known: Mapping[Path, Trial],
    largest: Callable[[Trial], int] | None = None,
    until: int | None = None,
    ending: Mapping[str, int] | None = None,
) -> list[Group]:
    """Which trials train together: those of an interrupted fleet again, the others by what they have in common.

    Args:
        missing: the trials that have to run.
        known: all trials of the command by folder; the finished ones of an interrupted fleet train again with it,
            unrecorded, so that the others' numbers stay those of an undisturbed run.
        largest: how many trials like this one train together at most; by default as many as fit into the memory here.
        until, ending: of `halving.Round`.
    """
    left = {trial.folder: trial for trial in missing}
    ending = ending or {}
    groups = []
    for root in {folder.parent: None for folder in left}:
        for fleet in sorted((root / FLEETS).glob(NAME)):
            try:
                folders = [root / name for name in kept(fleet)]
            except (FileNotFoundError, ValueError):  # another process has just ended it, or it is damaged
                continue
            begun = (fleet / STATE).exists()
            whole = all(folder in (known if begun else left) for folder in folders)
            if whole and any(folder in left for folder in folders):
                ends = {folder.name in ending for folder in folders if folder in left}
                if len(ends) > 1:  # another process has it, which is about to make others of it
                    left = {folder: trial for folder, trial in left.items() if folder not in folders}
                    continue
                groups.append(Group(tuple(known[folder] for folder in folders)))
                for folder in folders:
                    left.pop(folder, None)
    companies: dict[tuple[str, int | None], list[Trial]] = {}
    for folder, trial in left.items():
        companies.setdefault((trial.company, ending.get(folder.name)), []).append(trial)
    for company in companies.values():
        most = most_of(company[0], largest)
        count = -(-len(company) // most)
        borders = [len(company) * i // count for i in range(count + 1)]
        groups += [Group(tuple(company[i:j])) for i, j in pairwise(borders)]
    rungs = [max((ending.get(trial.folder.name, 0) for trial in group.trials), default=0) for group in groups]
    return [replace(g, until=rung or until, stop=rung > 0) for g, rung in zip(groups, rungs, strict=True)]


def most_of(trial: Trial, largest: Callable[[Trial], int] | None = None) -> int:
    """How many trials like this one train together at most; `largest` as of `plan`."""
    from delora.methods.base import find

    return 1 if find(trial.method.target).alone else trial.fleet.size or (largest or largest_here)(trial)


def largest_here(trial: Trial, share: float = 1.0, memory: float | None = None) -> int:
    """The most trials like this one that train together on this machine's device.

    Args:
        share: of the memory that is free, which the process may take.
        memory: bytes to take for free instead.
    """
    from delora import cost
    from delora.run import prepare

    return cost.largest_fleet(trial, prepare(trial)[1], _device(trial, memory), share, memory)


def _device(trial: Trial, memory: float | None) -> "torch.device":
    """The device here, or where its memory is given a GPU elsewhere."""
    from torch import device

    from delora.run import choose_device

    return choose_device(trial.device) if memory is None else device("cuda")


def seconds_of(groups: Sequence[Group], measured: Mapping[str, float | None]) -> list[float | None]:
    """Roughly the seconds of a trial of each group: measured ones by company, else as `cost.seconds` estimates them."""
    from delora import cost
    from delora.run import choose_device, prepare

    found: dict[str, float | None] = dict(measured)
    for group in groups:
        trial = group.trials[0]
        if trial.company not in found:
            found[trial.company] = cost.seconds([trial], prepare(trial)[1], choose_device(trial.device))
    return [found[group.trials[0].company] for group in groups]


def share_out(groups: Sequence[Group], each: Sequence[float | None], workers: int) -> list[Work]:
    """The fleets for so many workers, longest first: each worker takes the next when it has ended one.

    The fleet that would end last is split while that has all end earlier; one that is written down already, for others
    to take, or whose size the config says, stays whole.

    Args:
        each: seconds of a trial of each group.
    """
    known = [seconds for seconds in each if seconds is not None]
    usual = sum(known) / len(known) if known else 1.0
    works = [
        Work(group, usual if seconds is None else seconds, not (group.trials[0].fleet.size or group.folder.exists()))
        for group, seconds in zip(groups, each, strict=True)
    ]
    best, longest = works, max(_ends(works, workers))
    for _ in range(SPLITS * workers):
        ends = _ends(works, workers)
        if max(ends) <= (1 + IDLE) * sum(ends) / workers:
            break
        last = ends.index(max(ends))
        whole = [w for w, worker in _assigned(works, workers) if worker == last and w.may_be_split]
        largest = max(whole, key=lambda work: len(work.group.trials), default=None)
        if largest is None or len(largest.group.trials) == 1:
            break
        trials = largest.group.trials
        moved = round((max(ends) - min(ends)) / 2 / largest.each) if largest.each else 1  # to who would end first
        border = len(trials) - max(1, min(len(trials) // 2, moved))
        parts = [Work(replace(largest.group, trials=p), largest.each) for p in (trials[:border], trials[border:])]
        works = [*(work for work in works if work is not largest), *parts]
        if max(_ends(works, workers)) < longest:
            best, longest = works, max(_ends(works, workers))
    return sorted(best, key=lambda work: -work.seconds)


def _assigned(works: Sequence[Work], workers: int) -> list[tuple[Work, int]]:
    """Which worker takes which fleet, where each takes the longest that is left when it is free."""
    free, found = [(0.0, worker) for worker in range(workers)], []
    for work in sorted(works, key=lambda work: -work.seconds):
        end, worker = heapq.heappop(free)
        heapq.heappush(free, (end + work.seconds, worker))
        found.append((work, worker))
    return found


def _ends(works: Sequence[Work], workers: int) -> list[float]:
    ends = [0.0] * workers
    for work, worker in _assigned(works, workers):
        ends[worker] += work.seconds
    return ends


def print_plan(trials: Sequence[Trial], found: Mapping[Path, Result], to_train: Sequence[Trial], missing: int) -> None:
    """What a command would do: trials, fleets, memory and time, on standard output. Trains nothing, writes nothing.

    Args:
        found: the results there are already, by folder.
        to_train: the trials that would be trained, `missing` those that have no result.
    """
    from delora import engines

    engine = engines.of(trials[0].engine)
    workers = engine.workers(to_train)
    by_folder = {trial.folder: trial for trial in trials}
    measured: dict[str, float] = {}  # seconds of a trial of a company that has finished ones
    for folder, result in found.items():
        measured.setdefault(by_folder[folder].company, storage.share_of_seconds(result))
    table = Table("fleet", "trials", "", "memory", "time", box=None, pad_edge=False)
    groups: list[Group] = []
    times: list[float | None] = []
    if to_train:
        from delora import cost
        from delora.run import choose_device, prepare

        memory = engine.memory
        groups = plan(to_train, by_folder, lambda trial: largest_here(trial, engine.share, memory))
        here = engine.measures_here or not workers or choose_device("auto").type != "cpu"
        elsewhere = {group.trials[0].company: measured.get(group.trials[0].company) for group in groups}
        known = seconds_of(groups, measured if here else elsewhere)
        if workers:
            works = share_out(groups, known, workers)
            by_company = dict(zip((group.trials[0].company for group in groups), known, strict=True))
            groups = [work.group for work in works]
            known = [by_company[group.trials[0].company] for group in groups]
        times = [None if s is None else s * len(g.trials) for g, s in zip(groups, known, strict=True)]
        for number, (group, seconds) in enumerate(zip(groups, times, strict=True), start=1):
            trial, tokens = group.trials[0], prepare(group.trials[0])[1]
            takes = "unknown"
            if trial.model.known_shape:
                device, shape = _device(trial, memory), trial.model.known_shape
                encoder, more = cost.needed_bytes(trial, len(group.trials), shape, tokens, device)
                takes = f"up to {(encoder + more * len(group.trials)) / 1e9:.1f} GB"
            about = f"{trial.task.name} {trial.method.name} {trial.model.name}" + (
                ", begun" if group.state.exists() else ""
            )
            table.add_row(
                str(number), str(len(group.trials)), about, takes, duration(seconds) if seconds else "unknown"
            )
    Rich(width=200).print(table)
    others, total = missing - len(to_train), sum(filter(None, times))
    unknown = "" if None not in times else " and what is unknown"
    print(
        f"{counted(len(trials), 'trial')}: {len(found)} done, {len(to_train)} to run in "
        f"{counted(len(groups), 'fleet')}, "
        f"{f'{others} the same training under another name, ' if others else ''}"
        f"roughly {duration(total)}{unknown}. Nothing was trained."
    )
    shares = halving.epochs_share(trials)
    if groups and min(shares.values()) < 1:
        each = [(time or 0) / len(group.trials) for group, time in zip(groups, times, strict=True)]
        halved = sum(one * sum(shares[t.folder] for t in g.trials) for one, g in zip(each, groups, strict=True))
        several = f", {halved / 3600:.2g} instead of {total / 3600:.2g} GPU-hours" if workers else ""
        print(f"With halving, as rungs and keep say, roughly {duration(halved)}{unknown}{several}.")
    if workers and groups:
        free = [0.0] * workers
        for seconds in times:  # longest first
            free[free.index(min(free))] += seconds or 0
        print(f"{engine.describe(workers)}: roughly {duration(max(free))}{unknown}, {total / 3600:.2g} GPU-hours")
