"""Sweeps: trials that may share a fleet are trained together, whatever is finished is kept, nothing runs twice.

Imports torch only where this process trains, so that a command whose trials are all done answers at once, and one that
hands them out needs none.

    <sweep>/<trial>/    a trial's folder, see delora/storage/
    <sweep>/.fleets/    which trials train together, how far they are and who trains them, see delora/fleets.py

A fleet that was interrupted goes on with the same trials, so that its numbers are those of an undisturbed run. With
halving, delora/halving.py says from what is on disk which trials train next, to which epoch, and which end.
"""

import json
import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

from delora import engines, halving, storage
from delora.config import NOT_THE_TRIAL, Trial
from delora.console import Console
from delora.driver import Driver
from delora.engines import Engine
from delora.errors import UserError
from delora.fleets import (
    FLEETS,
    NAME,
    STATE,
    SUMMARY,
    TRIALS,
    Claim,
    fleet_name,
    forget,
    forget_gone,
    forget_logs,
    kept,
    tidy,
)
from delora.halving import Round
from delora.plan import get_ready, most_of, plan
from delora.plan import print_plan as print_fleets
from delora.recording import stand_for
from delora.storage import ConfigChanged, InUse, Result, ResultsError
from delora.terminal import counted
from delora.tracking import Tracking
from delora.worker import SECONDS_BETWEEN_LOOKS, Trainer, finished, forget_commands, open_folder

AXES = ("seed", "lr", "lr_factor", "lr_factor_on")  # along which a sweep may grow

logger = logging.getLogger(__name__)


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
    """What `run` would do: trials, fleets, workers, memory and time, on standard output. Trains and writes nothing."""
    sweep = Sweep(trials)
    missing = sweep.missing()
    if missing:
        get_ready(missing)
    print_fleets(list(sweep.trials.values()), sweep.found, sweep.to_train(missing), len(missing))


class Sweep:
    """The trials of one command, those that are finished and those that failed, by folder."""

    def __init__(self, trials: Sequence[Trial]):
        self.order = [trial.folder for trial in trials]
        self.trials = dict(zip(self.order, trials, strict=True))
        self.found: dict[Path, Result] = {}
        self.failures: dict[Path, Exception] = {}
        self.twins: dict[str, list[Trial]] = {}  # trials that are one training
        for trial in self.trials.values():
            self.twins.setdefault(trial.training, []).append(trial)
        _refuse_changes(self.trials.values())

    def missing(self) -> list[Trial]:
        """The trials that still have to run, as the disk tells."""
        for folder, trial in self.trials.items():
            if folder not in self.found and (result := finished(trial)):
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

    def next_round(self, missing: Iterable[Trial]) -> Round:
        """What is to be trained now: all that is missing to its end, or what the halving says."""
        trained = self.to_train(missing)
        if not trained or not self.halves:
            return Round(None, trained)
        compared = [t for twins in self.twins.values() if (t := self._compared(twins))]
        reached: dict[str, int] = {}
        for root in {trial.folder.parent: None for trial in trained}:
            reached |= halving.how_far(root, self.trials)
        return halving.next_round(compared, self.found, self.failures, reached)

    def _compared(self, twins: Sequence[Trial]) -> Trial | None:
        """Which of the trials with one training a halving counts."""
        ended = (twin for twin in twins if twin.folder in self.found)
        return next(ended, None) or next((twin for twin in twins if twin.folder not in self.failures), None)

    @property
    def halves(self) -> bool:
        settings = next(iter(self.trials.values())).halving
        return settings is not None and settings.rungs is not None

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
            self.trainer = Trainer(self.console, tracking, self.found, self.failures)
            engine = engines.of(config.engine)
            workers = engine.workers(self.to_train(missing)) if missing else 0
            if missing and not workers:
                if config.detach:
                    raise UserError("detach=true: engine=here trains in this process; engine=local, slurm start others")
                self.console.doing("loading PyTorch")
                get_ready(missing)
            self._tidy()
            if stopped := sum(map(_was_stopped, missing)):
                begin = counted(stopped, "trial")
                self.console.say(f"{begin} that another halving had stopped: trained anew, as no state is left of them")
            if tracking.enabled:
                for mark in owed:
                    storage.replace(mark, b"", config.root)
            while missing:
                round = self.next_round(missing)
                self._tell(round)
                trained = [*round.train, *(t for t in missing if t.folder.name in round.ending)]
                if workers:
                    driver = self._driver(engine, trained, min(workers, len(trained)), round)
                    driver.hand_out(config.detach)
                    if config.detach:
                        return [self.found.get(folder) for folder in self.order]
                    driver.watch()
                else:
                    self._train(trained, round)
                before, known = len(missing), set(self.found)
                missing = self.missing()
                for folder in self.found.keys() - known:  # another process has finished them
                    self.console.finished(self.trials[folder], self.found[folder])
                for trial in missing:
                    self._stand_for(self._trained_as(trial), trial)
                missing = self.missing()
                if len(missing) == before and (not self.halves or self.next_round(missing) == round):
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

    def _driver(self, engine: Engine, trained: Sequence[Trial], workers: int, round: Round) -> Driver:
        halves = round if self.halves else None
        return Driver(engine, self.trials, trained, self.found, self.failures, self.console, workers, halves)

    def _tell(self, round: Round) -> None:
        """Says what the halving has decided."""
        if self.halves:
            goal = f"to epoch {round.until}" if round.until else "to their end"
            ends = f", {counted(len(round.ending), 'trial')} end" if round.ending else ""
            self.console.say(f"halving: {counted(len(round.train), 'trial')} train {goal}{ends}", once=True)

    def _train(self, trials: Sequence[Trial], round: Round) -> None:
        """Trains them in this process."""
        self.console.doing("reading data")
        for root in {trial.folder.parent: None for trial in trials if self.halves}:
            if (root / FLEETS).is_dir():
                claim = Claim.take(root / FLEETS, root, lambda: {"doing": "planning"})
                if claim is None:
                    return  # another process does so
                with claim:
                    halving.regroup(root, self.trials, round, most_of)
        groups = plan(trials, self.trials, until=round.until, ending=round.ending)
        try:
            for group in groups:
                group.keep()
            for group in groups:
                self.trainer.train(group)
        except UserError:
            for group in groups:
                group.drop()
            raise

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
            if (root / FLEETS / halving.REGROUP).exists() and (claim := Claim.take(root / FLEETS, root)):
                with claim:
                    halving.recover(root)
            for fleet in sorted((root / FLEETS).glob(NAME)):
                try:
                    names = kept(fleet)
                except (FileNotFoundError, ValueError) as error:
                    names = self._mend(fleet, error)
                if names and all(self._has_ended(root / name) for name in names):
                    forget(fleet)
            forget_commands(root)
            forget_gone(root / FLEETS)
            tidy(root / FLEETS)
            if all(folder in self.found for folder in self.trials) and not list((root / FLEETS).glob(NAME)):
                forget_logs(root / FLEETS)
            with suppress(OSError):  # others are in it, or it was not made
                (root / FLEETS).rmdir()

    def _mend(self, fleet: Path, error: Exception) -> list[str]:
        """Takes a fleet's trials from its state, and sets aside what is damaged; none where the state is no help."""
        from delora.run import read_state

        if all(path.name.startswith(".") for path in fleet.glob("*")):  # begun or ended when a kill came, or just now
            forget(fleet)
            return []
        stored = read_state(fleet / STATE)
        names = stored[1]["folders"] if stored else []
        if fleet_name(names) == fleet.name:
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

    def _stand_for(self, trained: Trial, trial: Trial) -> None:
        """Ends a trial as one with the same training has ended, if it has."""
        if trained.folder not in self.found:
            return
        try:
            with open_folder(trial) as folder:
                if not folder.finished:
                    result = stand_for(storage.read(trained.folder), trial, folder, self.tracking)
                    self.found[trial.folder] = result
                    self.console.finished(trial, result)
        except InUse:
            pass  # another process ends it just now
        except UserError as error:
            self.trainer.fail(trial, error)


def _was_stopped(trial: Trial) -> bool:
    if not (trial.folder / storage.RESULT).exists():
        return False
    try:
        return storage.read(trial.folder).result["status"] == "stopped"
    except ResultsError:
        return False


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
