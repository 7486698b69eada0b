"""Whoever trains fleets: takes one after the other, in the command's own process or as a worker of an engine.

delora-run --worker SWEEP       takes fleets of that sweep until none is free; anybody may start one anywhere
                                where the sweep's folder is seen

<sweep>/.fleets/command-<id>/command.json   what a command wants trained: configs, versions, the current folder
                             plan.json      which fleets these became, longest first, and the hashes of their inputs
"""

import argparse
import gc
import json
import logging
import os
import shutil
import signal
import threading
import time
import traceback
import uuid
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from delora import fleets, storage
from delora.config import NOT_THE_TRIAL, Trial
from delora.console import Console
from delora.errors import UserError
from delora.fleets import FLEETS, Claim, Group, Lost
from delora.halving import Round, recover, regroup
from delora.interrupts import Stop
from delora.plan import get_ready, largest_here, most_of, plan, seconds_of, share_out
from delora.storage import ConfigChanged, InUse, Result, ResultsError, TrialFolder
from delora.tracking import Tracking

COMMANDS, COMMAND, PLAN = "command-", "command.json", "plan.json"
SECONDS_BETWEEN_LOOKS = 2.0  # at what other processes do

logger = logging.getLogger(__name__)


class TrialFailed(UserError):
    """A trial broke off; its log has the traceback."""

    status = 1


@dataclass(frozen=True)
class Inputs:
    """What a plan was made from: hashes of data and weights, and the host that had them."""

    host: str
    sha256: Mapping[str, str | None]

    def refuse_others(self, here: Mapping[str, Any]) -> None:
        """Raises UserError, with both sides, where this machine has others."""
        mine = {key: here.get(key) for key in self.sha256}
        if lines := storage.differences(dict(self.sha256), mine):
            host = fleets.process()["host"]
            raise UserError("\n".join([f"inputs on {self.host}, of the plan → on {host}, here (sha256):", *lines]))


class Trainer:
    """Trains groups, one that does not fit into memory, or fails, in halves.

    Attributes:
        found, failures: what became of the trials, by folder.
        inputs: the hashes that a fleet's data and weights have to have, and the host that says so.
    """

    inputs: "Inputs | None" = None

    def __init__(
        self, console: Console, tracking: Tracking, found: dict[Path, Result], failures: dict[Path, Exception]
    ):
        self.console, self.tracking, self.found, self.failures = console, tracking, found, failures
        self.retried: set[Path] = set()

    def train(self, group: Group) -> None:
        """Trains a group in this process, unless another one trains it.

        Raises:
            InUse: another process trains the only trial.
            UserError: a trial failed, and `on_error=stop`.
            Interrupted: a signal came; the state is saved.
        """
        with ExitStack() as held:
            try:
                claim = Claim.take(group.folder, group.trials[0].root, self.console.tell)
            except UserError as error:
                group.drop()
                for trial in group.trials:
                    self.fail(trial, error)
                return
            if claim is None:
                if holder := fleets.holder(group.folder):
                    self.in_use(InUse(group.trials[0].folder, holder))
                return
            held.enter_context(claim)
            halves = self.train_held(group, claim)
        for half in halves:
            self.train(half)

    def train_held(self, group: Group, claim: Claim) -> Sequence[Group]:
        """Trains a group that this process holds; the halves that are left to train where it was too much at once."""
        import torch

        from delora.run import run_fleet

        too_large = False
        with ExitStack() as opened:
            folders: list[TrialFolder | None] = []
            for trial in group.trials:
                try:
                    folder = None if finished(trial) else opened.enter_context(open_folder(trial))
                    folders.append(folder)
                except InUse as error:
                    self.in_use(error)
                    return ()
                except UserError as error:
                    self.fail(trial, error)
                    folders.append(None)
            if not any(folders):
                group.forget()
                return ()
            over: tuple[dict[int, Result], dict[int, ResultsError]] | None = None
            try:
                over = run_fleet(
                    *(group.trials, folders, group.state, self.console, self.tracking, claim.check, self.inputs),
                    *(group.until, group.stop),
                )
            except (ResultsError, Lost):
                raise
            except UserError as error:
                for folder in folders:
                    if folder:
                        folder.withdraw()
                self.give_up(group, error)
                return ()
            except Exception as error:
                too_large, told = is_out_of_memory(error), f"{type(error).__name__}: {error}"
                if len(group.trials) == 1:
                    folders[0].log(traceback.format_exc())  # type: ignore[union-attr]
                    told = "it does not fit into memory" if too_large else told
                    self.give_up(group, TrialFailed(f"{told} (log in {group.trials[0].folder})"))
                    return ()
        if over is None:
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            why = "do not fit into memory" if too_large else f"failed ({told.splitlines()[0]})"
            self.console.say(f"{len(group.trials)} trials together {why}: going on with half as many")
            return group.halves()
        group.pause() if group.state.exists() else group.forget()
        for k, result in over[0].items():
            self.found[group.trials[k].folder] = result
            self.console.finished(group.trials[k], result)
        for k, failure in over[1].items():
            self.failures[group.trials[k].folder] = failure
        return ()

    def give_up(self, group: Group, error: UserError) -> None:
        """The trials of a group have failed here."""
        group.drop()
        for trial in group.trials:
            self.fail(trial, error)

    def in_use(self, error: InUse) -> None:
        """Another process trains a trial of a group. Raises InUse where it is the only one."""
        if self.console.total == 1:
            raise error
        self.console.say(str(error).replace("Wait for it,", "Waiting for it;"), once=True)

    def fail(self, trial: Trial, error: Exception) -> None:
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


def finished(trial: Trial) -> Result | None:
    """The stored result of a trial that has ended."""
    return storage.finished(trial.folder, trial.resolved(), NOT_THE_TRIAL)


def open_folder(trial: Trial) -> TrialFolder:
    """The opened folder of a trial. Raises as `storage.open_trial`."""
    try:
        return storage.open_trial(trial.folder, trial.resolved(), NOT_THE_TRIAL, trial.root)
    except ConfigChanged:
        if trial.resume != "force":
            raise
        storage.set_aside(trial.folder)
        return storage.open_trial(trial.folder, trial.resolved(), NOT_THE_TRIAL, trial.root)


def device_name(device: str) -> str:
    """What a device calls itself."""
    import torch

    from delora.run import choose_device

    chosen = choose_device(device)
    return torch.cuda.get_device_name(chosen) if chosen.type == "cuda" else chosen.type


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory is used up, on any device."""
    import torch

    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


# --- What commands want trained


class Command:
    """What a command hands out to workers, as it lies in the sweep's folder."""

    def __init__(self, folder: Path):
        self.folder, self.root = folder, folder.parent.parent
        self.about: dict[str, Any] = json.loads(storage.content(folder / COMMAND, storage.LOG_LIMIT))
        self.host = ""
        self.order: dict[str, int] = {}
        self.planned: dict[str, dict[str, Any]] = {}

    @classmethod
    def post(
        cls,
        root: Path,
        trials: Sequence[Trial],
        missing: Sequence[Trial],
        measured: Mapping[str, float],
        workers: int,
        detached: bool,
        round: Round | None = None,
    ) -> Self:
        """Writes down what is to be trained.

        Args:
            root: the sweep's folder.
            trials: those to train, and those of their interrupted fleets that have ended.
            missing: those to train.
            measured: seconds of a trial, by the folder's name of one of its company.
            workers: among which to share it out.
            detached: the command does not wait for them.
            round: of a halving: what is to be trained now.
        """
        folder = root / FLEETS / f"{COMMANDS}{uuid.uuid4().hex[:8]}"
        names = {trial.folder.name for trial in missing}
        about = {
            **fleets.process(),
            "folder": os.getcwd(),
            "versions": storage.versions(),
            "workers": workers,
            "detached": detached,
            "measured": measured,
            "round": {"until": round.until, "ending": round.ending} if round else None,
            "missing": [place for place, trial in enumerate(trials) if trial.folder.name in names],
            "trials": fleets.packed(trials),
        }
        storage.replace(folder / COMMAND, json.dumps(about).encode(), root.parent)
        return cls(folder)

    def is_cut(self) -> bool:
        """Whether its trials are fleets by now; reads the plan."""
        if not self.host:
            with suppress(OSError, ValueError):
                found = json.loads(storage.content(self.folder / PLAN, storage.LOG_LIMIT))
                self.planned, self.host = found["fleets"], found["host"]
                self.order = {name: place for place, name in enumerate(self.planned)}
        return bool(self.host)

    def cut(self, share: float, memory: float | None) -> None:
        """Makes fleets of its trials, as many trials in one as fit into this process's device."""
        from delora.run import prepare

        trials = fleets.unpacked(self.about["trials"], self.root)
        missing = [trials[place] for place in self.about["missing"]]
        get_ready(missing)
        most: dict[str, int] = {}
        inputs: dict[str, dict[str, str | None]] = {}
        firsts = {trial.company: trial for trial in reversed(missing)}
        # Those that share rows and encoder follow each other: the last ones that were read are kept.
        for company, trial in sorted(firsts.items(), key=lambda one: repr((one[1].task, one[1].data, one[1].model))):
            most[company] = largest_here(trial, share, memory)
            dataset, _, encoder = prepare(trial)
            inputs[company] = {"data": dataset.sha256, "weights": encoder.sha256}
        known = {trial.folder: trial for trial in trials}
        recover(self.root)
        until, ending = None, dict[str, int]()
        if self.about["round"]:
            until, ending = self.about["round"]["until"], self.about["round"]["ending"]
            round = Round(until, [trial for trial in missing if trial.folder.name not in ending], ending)
            regroup(trials[0].folder.parent, known, round, lambda trial: most_of(trial, lambda one: most[one.company]))
        groups = plan(missing, known, lambda trial: most[trial.company], until, ending)
        companies = {trial.folder.name: trial.company for trial in trials}
        measured = {companies[name]: seconds for name, seconds in self.about["measured"].items() if name in companies}
        planned = {}
        for work in share_out(groups, seconds_of(groups, measured), self.about["workers"]):
            work.group.keep(configs=True)
            names = [trial.folder.name for trial in work.group.trials]
            company = companies[names[0]]
            planned[work.group.folder.name] = {"seconds": work.seconds, "trials": names, **inputs[company]}
        about = {"host": fleets.process()["host"], "fleets": planned}
        storage.replace(self.folder / PLAN, json.dumps(about).encode(), self.root)

    def refuse_others(self) -> None:
        """Refuses to work where the versions here are not those of the command. Raises UserError with both sides."""
        lines = storage.differences(self.about["versions"], storage.versions())
        if lines:
            mine = fleets.process()["host"]
            raise UserError("\n".join([f"versions on {self.about['host']}, of the command → on {mine}, here:", *lines]))

    def forget(self) -> None:
        """Takes it back."""
        shutil.rmtree(self.folder, ignore_errors=True)
        with suppress(OSError):
            self.folder.parent.rmdir()

    def forget_if_over(self) -> None:
        """Forgets a command of whose fleets none is left."""
        names = os.listdir(self.folder.parent) if self.folder.parent.exists() else []
        left = {fleets.origin(self.folder.parent / name) for name in names if len(name) == 16}
        if self.is_cut() and not left & self.planned.keys():
            self.forget()


def forget_commands(root: Path) -> None:
    """Forgets what commands handed out that have ended without doing so, as a kill makes them."""
    for folder in (root / FLEETS).glob(f"{COMMANDS}*"):
        try:
            command = Command(folder)
        except (OSError, ValueError):
            continue
        if command.is_cut():
            command.forget_if_over()
        elif not command.about["detached"] and fleets.has_ended(command.about):
            command.forget()


# --- A worker


class Worker(Trainer):
    """Takes fleets of a sweep until none is free.

    Args:
        root: the sweep's folder.
        stop: hears signals while nothing is trained; an import may swallow what it raises.
        share: of the device's memory, where several workers share it.
        memory: bytes of the device's memory, where it is not to be measured.
    """

    def __init__(self, root: Path, stop: Stop, share: float = 1.0, memory: float | None = None):
        self.root, self.stop, self.share, self.memory = root, stop, share, memory
        self.console = Console((), {})  # of the fleet that is trained
        self.commands: dict[str, Command | None] = {}
        self.origins: dict[str, str | None] = {}
        self.me = tuple(fleets.process()[key] for key in ("machine", "pid", "start"))
        self.claim: Claim | None = None
        self.busy: set[Path] = set()  # fleets of which another process holds a trial
        self.refused: UserError | None = None
        self.device = ""

    def run(self) -> None:
        """Works until there is nothing left to take.

        Raises:
            UserError: nothing waits for workers there, or this machine is not as the command's.
            Interrupted: a signal came; the state is saved.
        """
        self._look()
        commands = [command for command in self.commands.values() if command]
        if not commands:
            told = "nothing waits for workers there; is that folder shared with this machine?"
            raise self.refused or UserError(f"{self.root}: {told}")
        with suppress(OSError):  # paths of the config are relative to it
            os.chdir(commands[0].about["folder"])
        config = Trial.from_config(commands[0].about["trials"][0]["first"])
        with Tracking(config.logger.mode, config.logger.project) as self.tracking:
            while self._take_one():
                pass
        for command in commands:
            if command.about["detached"]:
                command.forget_if_over()

    def _look(self) -> list[str]:
        """What lies in the sweep's folder of fleets; reads new commands."""
        try:
            names = os.listdir(self.root / FLEETS)
        except OSError:
            names = []
        for name in names:
            if name.startswith(COMMANDS) and self.commands.get(name) is None:
                self.commands[name] = self._read(self.root / FLEETS / name)
        for name in self.commands.keys() - set(names):
            del self.commands[name]
        return names

    def _read(self, folder: Path) -> Command | None:
        """A command, unless its versions are not those of this process."""
        try:
            command = Command(folder)
            command.refuse_others()
            return command
        except UserError as error:
            logger.warning("%s", error)
            self.refused = error
        except (OSError, ValueError):  # it is just being written or removed
            pass
        return None

    def _take_one(self) -> bool:
        """Cuts a command's trials into fleets, or trains a fleet; whether there may be more to do."""
        self.stop.check()
        names, waiting = self._look(), False
        for command in self.commands.values():
            if command and not command.is_cut():
                # One plans at a time: two commands may want the same trials.
                if claim := Claim.take(self.root / FLEETS, self.root, lambda: {"doing": "planning"}):
                    with claim:
                        if not command.is_cut():
                            command.cut(self.share, self.memory)
                    return True
                waiting = True
        for name in self._in_order(names):
            if self._train_if_free(self.root / FLEETS / name):
                return True
        if waiting or self.busy:
            self.busy.clear()
            time.sleep(SECONDS_BETWEEN_LOOKS)
            return True
        return False

    def _in_order(self, names: Sequence[str]) -> list[str]:
        """The fleets that a command wants, longest first."""
        places: dict[str, int] = {}
        for command in self.commands.values():
            places |= command.order if command else {}
        wanted = {}
        for name in names:
            if len(name) == 16 and name not in places and name not in self.origins:
                self.origins[name] = fleets.origin(self.root / FLEETS / name)
            place = places.get(name, places.get(self.origins.get(name) or ""))
            if place is not None:
                wanted[name] = place
        return sorted(wanted, key=lambda name: (wanted[name], name))

    def _train_if_free(self, folder: Path) -> bool:
        claims = fleets.holders(folder)
        if folder in self.busy or fleets.is_over(folder) or (claims and claims[-1].holds()):
            return False
        failed = fleets.failures(folder)
        if len(failed) > 1:
            fleets.give_up(folder, failed, self.root)
            return False
        if any(one.worker == self.me for one in failed):
            return False
        claim = Claim.take(folder, self.root, self._tell)
        if claim is None:
            return False
        with claim:
            group = fleets.of_workers(folder)
            if group is not None:
                self._train_one(group, claim)
        return group is not None

    def _train_one(self, group: Group, claim: Claim) -> None:
        get_ready(group.trials[:1])
        self.stop.check()
        self.device = device_name(group.trials[0].device)
        self.found, self.failures = {}, {}
        self.claim = claim
        with Console(group.trials, {}) as self.console:
            first = group.trials[0]
            try:
                alone = len(group.trials) == 1
                if not (alone or first.fleet.size) and len(group.trials) > largest_here(first, self.share, self.memory):
                    self.console.say(
                        f"{len(group.trials)} trials are too many for this device: half as many in a fleet"
                    )
                    group.halves()
                    return
                self.inputs = self._inputs(group.known_as)
                self.train_held(group, claim)
                for path, failure in self.failures.items():
                    fleets.write_failure(self.root / FLEETS, path.name, str(failure), self.root)
            except InUse as error:
                self.console.say(str(error))
                self.busy.add(group.folder)
            except Lost as error:
                self.console.say(str(error))
        _require_device()

    def give_up(self, group: Group, error: UserError) -> None:
        assert self.claim is not None
        self.console.failed(group.trials[0], str(error))
        self.claim.release(failed=str(error))

    def in_use(self, error: InUse) -> None:
        raise error

    def fail(self, trial: Trial, error: Exception) -> None:
        self.console.failed(trial, str(error))
        self.failures[trial.folder] = error

    def _inputs(self, fleet: str | None) -> "Inputs | None":
        for command in self.commands.values():
            if command and fleet in command.planned:
                planned = command.planned[fleet]
                return Inputs(command.host, {"data": planned["data"], "weights": planned["weights"]})
        return None

    def _tell(self) -> dict[str, Any]:
        return {"device": self.device, **self.console.tell()}


def work(words: Sequence[str]) -> int:
    """What `delora-run --worker` does; returns its exit status.

    Args:
        words: the sweep's folder, and what engines say: --parent PID, with which the worker ends, --share of the
            device's memory, --memory in GB.

    Raises:
        UserError: as `Worker.run`.
        Interrupted: a signal came; the state is saved.
    """
    parser = argparse.ArgumentParser("delora-run --worker", exit_on_error=False)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--parent", type=int)
    parser.add_argument("--share", type=float, default=1.0)
    parser.add_argument("--memory", type=float)
    options = parser.parse_args(words)
    if options.parent is not None:
        threading.Thread(target=_end_with, args=(options.parent,), daemon=True).start()
    for number in (signal.SIGUSR1, signal.SIGUSR2):  # SLURM's warnings are for the process that started this one
        signal.signal(number, signal.SIG_IGN)
    with Stop(at_once=True) as stop:
        Worker(options.folder.absolute(), stop, options.share, options.memory and options.memory * 1e9).run()
    return 0


def _end_with(parent: int) -> None:
    """Saves and ends the process once its parent has ended."""
    while os.getppid() == parent:
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGTERM)


def _require_device() -> None:
    """Raises UserError where the GPU answers no more, as after an illegal access: whatever is tried then fails."""
    import torch

    if torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            raise UserError(f"the GPU answers no more, this worker ends: {str(error).splitlines()[0]}") from None
