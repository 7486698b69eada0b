"""Sweeps: trials that may share a fleet are trained together, whatever is finished is kept, nothing runs twice.

Imports torch only where there is something to train, so that a command whose trials are all done answers at once.

    <sweep>/<trial>/            a trial's folder, see delora/storage/
    <sweep>/.fleets/<fleet>/    trials.json: which trials train together; state.safetensors: how far they are
    <sweep>/.fleets/summary     wandb has not got the sweep's summary yet

A fleet that was interrupted goes on with the same trials, so that its numbers are those of an undisturbed run.
"""

import functools
import gc
import hashlib
import json
import logging
import shutil
import time
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.console import Console as Rich
from rich.table import Table

from delora import storage
from delora.config import NOT_THE_TRIAL, Trial
from delora.console import Console, duration
from delora.errors import UserError
from delora.storage import ConfigChanged, InUse, Result, ResultsError, TrialFolder
from delora.terminal import counted
from delora.tracking import Tracking

FLEETS, TRIALS, STATE, SUMMARY = ".fleets", "trials.json", "state.safetensors", "summary"
AXES = ("seed", "lr", "lr_factor", "lr_factor_on")  # along which a sweep may grow
SECONDS_BETWEEN_LOOKS = 2.0  # at the fleets of another process

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Group:
    """Trials that train together."""

    trials: tuple[Trial, ...]

    @property
    def folder(self) -> Path:
        return self.trials[0].folder.parent / FLEETS / _fleet_name([trial.folder.name for trial in self.trials])

    @property
    def state(self) -> Path:
        return self.folder / STATE

    def keep(self) -> None:
        """Writes down which trials train together."""
        names = [trial.folder.name for trial in self.trials]
        for attempt in range(5):
            try:
                storage.replace(self.folder / TRIALS, json.dumps(names).encode(), self.trials[0].root)
                return
            except ResultsError:  # another process may remove the folder just then, as its last fleet ended
                if attempt == 4:
                    raise

    def forget(self) -> None:
        _forget(self.folder)

    def drop(self) -> None:
        """Forgets the group unless it has begun to train."""
        if not self.state.exists():
            self.forget()

    def halves(self) -> "tuple[Group, Group]":
        """The group in two, each with its part of the state."""
        from delora.run import read_state, write_state

        middle = (len(self.trials) + 1) // 2
        first, second = Group(self.trials[:middle]), Group(self.trials[middle:])
        stored = read_state(self.state)
        for half, rows in ((first, slice(None, middle)), (second, slice(middle, None))):
            half.keep()
            if stored:
                tensors, plain = stored
                lists = {key: value[rows] for key, value in plain.items() if isinstance(value, list)}
                part = {name: tensor[rows] for name, tensor in tensors.items()}
                write_state(half.state, self.trials[0].root, part, {**plain, **lists})
        self.forget()
        return first, second


def _fleet_name(names: Sequence[str]) -> str:
    """The name of the fleet of trials in these folders: it tells whether a fleet's trials are damaged."""
    return hashlib.sha256("\n".join(names).encode()).hexdigest()[:16]


def _kept(fleet: Path) -> list[str]:
    """The folders of a fleet's trials, as `Group.keep` wrote them down.

    Raises:
        FileNotFoundError: another process has just forgotten them.
        ValueError: they are damaged.
    """
    try:
        names = json.loads(storage.content(fleet / TRIALS))
        if isinstance(names, list) and "/" not in "".join(names) and _fleet_name(names) == fleet.name:
            return names
    except FileNotFoundError:
        raise
    except (OSError, ValueError, TypeError, RecursionError):
        pass
    raise ValueError("damaged, not the trials of this fleet")


def _forget(fleet: Path) -> None:
    with suppress(OSError):  # first: a state without its trials would stay for good
        (fleet / STATE).unlink()
    shutil.rmtree(fleet, ignore_errors=True)
    with suppress(OSError):  # others are in it
        fleet.parent.rmdir()


def run(trials: Sequence[Trial]) -> list[Result | None]:
    """Trains the trials that are not finished yet, as many together as fit, and returns all results.

    Args:
        trials: any configs; equal ones run once.

    Returns:
        The results in the order of `trials`, None for a trial that failed.

    Raises:
        UserError: something is missing, the sweep holds results of another config, or the only trial cannot run.
        Interrupted: a signal came; the same command goes on from there.
    """
    return Sweep(trials).run()


def print_plan(trials: Sequence[Trial]) -> None:
    """What `run` would do: trials, fleets, memory and time, on standard output. Trains nothing and writes nothing."""
    sweep = Sweep(trials)
    missing = sweep.missing()
    if missing:
        _get_ready(missing)
    trained = sweep.to_train(missing)
    groups = plan(trained, sweep.trials)
    measured: dict[str, float] = {}  # seconds of a trial of a company that has finished ones
    for folder, result in sweep.found.items():
        measured.setdefault(sweep.trials[folder].company, storage.share_of_seconds(result))
    total, known = 0.0, True
    table = Table("fleet", "trials", "", "memory", "time", box=None, pad_edge=False)
    for number, group in enumerate(groups, start=1):
        from delora import cost
        from delora.run import choose_device, prepare

        trial, tokens = group.trials[0], prepare(group.trials[0])[1]
        each = measured.get(trial.company)
        device = choose_device(trial.device)
        seconds = cost.seconds(group.trials, tokens, device) if each is None else each * len(group.trials)
        total, known = total + (seconds or 0), known and seconds is not None
        memory = "unknown"
        if trial.model.known_shape:
            encoder, more = cost.needed_bytes(trial, len(group.trials), trial.model.known_shape, tokens, device)
            memory = f"up to {(encoder + more * len(group.trials)) / 1e9:.1f} GB"
        about = f"{trial.task.name} {trial.method.name} {trial.model.name}" + (
            ", begun" if group.state.exists() else ""
        )
        table.add_row(str(number), str(len(group.trials)), about, memory, duration(seconds) if seconds else "unknown")
    Rich(width=200).print(table)
    others = len(missing) - len(trained)
    print(
        f"{counted(len(sweep.trials), 'trial')}: {len(sweep.found)} done, {len(trained)} to run in "
        f"{counted(len(groups), 'fleet')}, "
        f"{f'{others} the same training under another name, ' if others else ''}"
        f"roughly {duration(total)}{'' if known else ' and what is unknown'}. Nothing was trained."
    )


def _get_ready(trials: Iterable[Trial]) -> None:
    """Imports what trains, and finds out whether the methods' classes are what the configs say."""
    _import_torch()
    from delora.methods.base import check

    check(trial.method for trial in trials)


@functools.cache
def _import_torch() -> None:
    """Imports what trains: a million objects that stay, and that the garbage collector need not look through."""
    gc.disable()
    try:
        import delora.cost
        import delora.run  # noqa: F401
    finally:
        gc.freeze()
        gc.enable()


class Sweep:
    """The trials of one command, those that are finished and those that failed, by folder."""

    def __init__(self, trials: Sequence[Trial]):
        self.order = [trial.folder for trial in trials]
        self.trials = dict(zip(self.order, trials, strict=True))
        self.found: dict[Path, Result] = {}
        self.failures: dict[Path, Exception] = {}
        self.retried: set[Path] = set()
        self.twins: dict[str, list[Trial]] = {}  # trials that are one training
        for trial in self.trials.values():
            self.twins.setdefault(trial.training, []).append(trial)
        _refuse_changes(self.trials.values())

    def missing(self) -> list[Trial]:
        """The trials that still have to run, as the disk tells."""
        for folder, trial in self.trials.items():
            if folder not in self.found and (result := _finished(trial)):
                self.found[folder] = result
        return [t for folder, t in self.trials.items() if folder not in self.found and folder not in self.failures]

    def to_train(self, missing: Iterable[Trial]) -> list[Trial]:
        """Of the missing trials those that train; the others end as one of them does, or as one that has ended."""
        return [trial for trial in missing if self._trained_as(trial) is trial]

    def _trained_as(self, trial: Trial) -> Trial:
        """The first trial with the same training that has ended with all its files; else the first that is to train."""
        twins = self.twins[trial.training]
        for twin in twins:
            result = self.found.get(twin.folder)
            if result and result["schema"] == storage.SCHEMA and "trained_as" not in result:
                return twin
        return next(twin for twin in twins if twin.folder not in self.found and twin.folder not in self.failures)

    def run(self) -> list[Result | None]:
        new = list(self._new_folders())
        try:
            return self._run()
        finally:
            for folder in new:
                with suppress(OSError):  # something is in it, or it was not made
                    folder.rmdir()

    def _run(self) -> list[Result | None]:
        missing = self.missing()
        config = next(iter(self.trials.values()))
        owed = [mark for mark in self._summary_marks() if missing or mark.exists()]
        tracking = Tracking(config.logger.mode if missing or owed else "disabled", config.logger.project)
        with (
            TemporaryDirectory() as pictures,  # wandb has read them once `tracking` is closed
            tracking,
            Console(list(self.trials.values()), self.found) as self.console,
        ):
            self.tracking = tracking
            if missing:
                self.console.doing("loading PyTorch")
                _get_ready(missing)
            self._tidy()
            if tracking.enabled:
                for mark in owed:
                    storage.replace(mark, b"", config.root)
            while missing:
                self.console.doing("reading data")
                groups = plan(self.to_train(missing), self.trials)
                try:
                    for group in groups:
                        group.keep()
                    for group in groups:
                        self._train(group)
                except UserError:
                    for group in groups:
                        group.drop()
                    raise
                before, known = len(missing), set(self.found)
                missing = self.missing()
                for folder in self.found.keys() - known:  # another process has finished them
                    self.console.finished(self.trials[folder], self.found[folder])
                for trial in missing:
                    self._stand_for(self._trained_as(trial), trial)
                missing = self.missing()
                if len(missing) == before:
                    time.sleep(SECONDS_BETWEEN_LOOKS)  # another process has them
            if owed:
                self._summarise(Path(pictures))
        for mark in owed:  # wandb has them
            mark.unlink(missing_ok=True)
            with suppress(OSError):  # fleets are in it
                mark.parent.rmdir()
        if len(self.trials) == 1 and self.failures:
            raise next(iter(self.failures.values()))
        return [self.found.get(folder) for folder in self.order]

    def _new_folders(self) -> Iterator[Path]:
        """The folders above those of the trials that are not there yet, inner ones first."""
        for root in {folder.parent: None for folder in self.trials}:
            yield from (folder for folder in (root / FLEETS, root, *root.parents) if not folder.exists())

    def _summary_marks(self) -> Iterable[Path]:
        """A file for each sweep that wandb shows as a whole."""
        if len(self.trials) == 1:
            return ()
        return {folder.parent / FLEETS / SUMMARY: None for folder, trial in self.trials.items() if trial.sweep}

    def _tidy(self) -> None:
        """Forgets fleets whose trials have all ended, as a kill may leave them, and sets damaged ones aside."""
        for root in {folder.parent: None for folder in self.trials}:
            if (root / FLEETS).is_symlink():
                continue  # nothing is kept there: it is refused
            for fleet in sorted((root / FLEETS).glob("[0-9a-f]" * 16)):
                try:
                    names = _kept(fleet)
                except (FileNotFoundError, ValueError) as error:
                    names = self._mend(fleet, error)
                if names and all(self._has_ended(root / name) for name in names):
                    _forget(fleet)
            with suppress(OSError):  # others are in it, or it was not made
                (root / FLEETS).rmdir()

    def _mend(self, fleet: Path, error: Exception) -> list[str]:
        """Takes a fleet's trials from its state, and sets aside what is damaged; none where the state is no help."""
        from delora.run import read_state

        if all(path.name.startswith(".") for path in fleet.glob("*")):  # begun or ended when a kill came, or just now
            _forget(fleet)
            return []
        stored = read_state(fleet / STATE)
        names = stored[1]["folders"] if stored else []
        if _fleet_name(names) == fleet.name:
            if isinstance(error, ValueError):
                aside = storage.set_aside(fleet / TRIALS)
                logger.warning("%s: %s; set aside as %s, those of its state taken", fleet / TRIALS, error, aside)
            storage.replace(fleet / TRIALS, json.dumps(names).encode())
            return names
        aside = storage.set_aside(fleet)
        logger.warning("%s: %s; set aside as %s, its trials begin anew", fleet / TRIALS, error, aside)
        return []

    def _has_ended(self, folder: Path) -> bool:
        if folder in self.trials:
            return folder in self.found
        try:
            return storage.read(folder).result["status"] != "failed"
        except ResultsError:
            return False

    def _summarise(self, pictures: Path) -> None:
        """Shows each sweep as a whole, as the disk has it, in a wandb run of its own; trouble there ends nothing."""
        for root, name in {folder.parent: trial.sweep for folder, trial in self.trials.items()}.items():
            if name is None or not self.tracking.enabled:
                continue
            try:
                from delora.report import summary  # with Matplotlib, which nothing else here needs

                content = summary.make(root, pictures)
            except Exception as error:
                logger.warning("no summary of %s in wandb: %s (results are not affected)", root, error)
                continue
            tracker = self.tracking.start(f"{name}-summary", {}, root, group=name, job_type="report")
            tracker.show(content)
            tracker.finish("done", {})

    def _train(self, group: Group) -> None:
        """Trains a group; one that does not fit into memory, or fails, is tried in halves."""
        import torch

        from delora.run import run_fleet

        too_large = False
        with ExitStack() as opened:
            folders = []
            for trial in group.trials:
                try:
                    folder = None if _finished(trial) else opened.enter_context(_open(trial))
                    folders.append(folder)
                except InUse as error:
                    if len(self.trials) == 1:
                        raise
                    self.console.say(str(error).replace("Wait for it,", "Waiting for it;"), once=True)
                    return
                except UserError as error:
                    self._fail(trial, error)
                    folders.append(None)
            if not any(folders):
                group.forget()
                return
            over: tuple[dict[int, Result], dict[int, ResultsError]] | None = None
            try:
                over = run_fleet(group.trials, folders, group.state, self.console, self.tracking)
            except ResultsError:
                raise
            except UserError as error:
                for folder in folders:
                    if folder:
                        folder.withdraw()
                group.drop()
                for trial in group.trials:
                    self._fail(trial, error)
                return
            except Exception as error:
                too_large, told = is_out_of_memory(error), f"{type(error).__name__}: {error}"
                if len(group.trials) == 1:
                    folders[0].log(traceback.format_exc())  # type: ignore[union-attr]
                    told = "it does not fit into memory" if too_large else told
                    group.drop()
                    self._fail(group.trials[0], TrialFailed(f"{told} (log in {group.trials[0].folder})"))
                    return
        if over is None:
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            why = "do not fit into memory" if too_large else f"failed ({told.splitlines()[0]})"
            self.console.say(f"{len(group.trials)} trials together {why}: going on with half as many")
            for half in group.halves():
                self._train(half)
            return
        group.forget()
        for k, result in over[0].items():
            self.found[group.trials[k].folder] = result
            self.console.finished(group.trials[k], result)
        self.failures |= {group.trials[k].folder: error for k, error in over[1].items()}

    def _stand_for(self, trained: Trial, trial: Trial) -> None:
        """Ends a trial as one with the same training has ended, if it has."""
        from delora.run import stand_for

        if trained.folder not in self.found:
            return
        try:
            with _open(trial) as folder:
                if not folder.finished:
                    result = stand_for(storage.read(trained.folder), trial, folder, self.tracking)
                    self.found[trial.folder] = result
                    self.console.finished(trial, result)
        except InUse:
            pass  # another process ends it just now
        except UserError as error:
            self._fail(trial, error)

    def _fail(self, trial: Trial, error: Exception) -> None:
        if trial.folder in self.found:
            return
        if trial.on_error == "retry" and trial.folder not in self.retried and isinstance(error, TrialFailed):
            self.retried.add(trial.folder)
            self.console.say(f"{trial.id}: {error}; once more")
            return
        self.failures[trial.folder] = error
        self.console.failed(trial, str(error))
        if trial.on_error == "stop":
            raise error


class TrialFailed(UserError):
    """A trial broke off; its log has the traceback."""

    status = 1


def _finished(trial: Trial) -> Result | None:
    return storage.finished(trial.folder, trial.resolved(), NOT_THE_TRIAL)


def plan(missing: Sequence[Trial], known: Mapping[Path, Trial]) -> list[Group]:
    """Which trials train together: those of an interrupted fleet again, the others by what they have in common.

    Args:
        missing: the trials that have to run.
        known: all trials of the command by folder; the finished ones of an interrupted fleet train again with it,
            unrecorded, so that the others' numbers stay those of an undisturbed run.
    """
    left = {trial.folder: trial for trial in missing}
    groups = []
    for root in {folder.parent: None for folder in left}:
        for fleet in sorted((root / FLEETS).glob("[0-9a-f]" * 16)):
            try:
                folders = [root / name for name in _kept(fleet)]
            except (FileNotFoundError, ValueError):  # another process has just ended it, or it is damaged
                continue
            begun = (fleet / STATE).exists()
            whole = all(folder in (known if begun else left) for folder in folders)
            if whole and any(folder in left for folder in folders):
                groups.append(Group(tuple(known[folder] for folder in folders)))
                for folder in folders:
                    left.pop(folder, None)
    from delora.methods.base import find

    companies: dict[str, list[Trial]] = {}
    for trial in left.values():
        companies.setdefault(trial.company, []).append(trial)
    for company in companies.values():
        alone = find(company[0].method.target).alone
        largest = 1 if alone else company[0].fleet.size or _largest(company[0])
        count = -(-len(company) // largest)
        borders = [len(company) * i // count for i in range(count + 1)]
        groups += [Group(tuple(company[i:j])) for i, j in pairwise(borders)]
    return groups


def _largest(trial: Trial) -> int:
    from delora import cost
    from delora.run import choose_device, prepare

    return cost.largest_fleet(trial, prepare(trial)[1], choose_device(trial.device))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory is used up, on any device."""
    import torch

    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def _open(trial: Trial) -> TrialFolder:
    try:
        return storage.open_trial(trial.folder, trial.resolved(), NOT_THE_TRIAL, trial.root)
    except ConfigChanged:
        if trial.resume != "force":
            raise
        storage.set_aside(trial.folder)
        return storage.open_trial(trial.folder, trial.resolved(), NOT_THE_TRIAL, trial.root)


def _refuse_changes(trials: Iterable[Trial]) -> None:
    """Refuses to add to a sweep what has the same name but another config.

    A sweep may grow by other tasks, methods, seeds and rates, and by more values of any key. What may not be is that
    a key has, for the same task and method, only values that it did not have before.
    """
    by_sweep: dict[Path, list[Trial]] = {}
    for trial in trials:
        if trial.sweep and trial.resume != "force":
            by_sweep.setdefault(trial.folder.parent, []).append(trial)
    for root, mine in by_sweep.items():
        known = [config for path in sorted(root.glob("*/")) if (config := storage.stored_config(path))]
        if not known:
            continue
        searched = mine[0].search.over if mine[0].search else ()
        old, new = _values(known), _values([trial.resolved() for trial in mine])
        changes = {
            f"  {key}: {_listed(old[cell][key])} → {_listed(values)}": None
            for cell, keys in new.items()
            for key, values in keys.items()
            if old.get(cell, {}).get(key, values).isdisjoint(values) and not storage.is_of(key, searched)
        }
        if changes:
            told = "\n".join([f"{root} holds trials with another config:", *changes])
            raise ConfigChanged(f"{told}\n{storage.WAYS_ON}")


def _values(configs: Sequence[dict]) -> dict[tuple, dict[str, set[str]]]:
    """The values of each key that is no axis, by task and method."""
    cells: dict[tuple, dict[str, set[str]]] = {}
    for config in configs:
        flat = {key: value for key, value in storage.flatten(config).items() if not _is_axis(key)}
        values = cells.setdefault((flat.get("task.name"), flat.get("method.name")), {})
        for key, value in flat.items():
            values.setdefault(key, set()).add(json.dumps(value))
    return cells


def _is_axis(key: str) -> bool:
    return storage.is_of(key, (*AXES, *NOT_THE_TRIAL))


def _listed(values: set[str]) -> str:
    return ", ".join(sorted(values))
