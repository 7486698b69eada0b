"""The command's side of workers: hands trials out, has an engine start workers, and watches the sweep's folder."""

import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from delora import fleets, storage
from delora.config import Trial
from delora.console import Console
from delora.engines.base import ENDED, RUNNING, Engine, WorkerState
from delora.errors import UserError
from delora.fleets import FLEETS, NAME, Holder
from delora.halving import Round
from delora.interrupts import Stop
from delora.storage import Result
from delora.terminal import counted
from delora.worker import SECONDS_BETWEEN_LOOKS, Command, TrialFailed, finished

STARTS_IN_VAIN = 3  # of each worker, without a fleet's end in between
SECONDS_TO_END = 60.0  # of a worker that finds nothing more to do
REFUSED = 2  # exit status of a worker whose machine is not as the command's


@dataclass
class Look:
    """What lies in the folder of fleets: those that are trained, with who does, and those that wait."""

    held: dict[str, Holder] = field(default_factory=dict)
    free: list[str] = field(default_factory=list)

    @classmethod
    def at(cls, folder: Path) -> "Look":
        """Looks at the fleets of a sweep, by its folder."""
        look = cls()
        for fleet in sorted((folder / FLEETS).glob(NAME)):
            holder = fleets.holder(fleet)
            if holder:
                look.held[fleet.name] = holder
            elif not fleets.is_over(fleet):
                look.free.append(fleet.name)
        return look


class Driver:
    """Has workers train a sweep's trials.

    Args:
        trials: all of the command, by folder.
        trained: those to train.
        found, failures: of the sweep; what becomes of the trials is added.
        workers: how many.
        round: of a halving: what is to be trained now; fleets that pause at its rung are over for this driver.
    """

    def __init__(
        self,
        engine: Engine,
        trials: Mapping[Path, Trial],
        trained: Sequence[Trial],
        found: dict[Path, Result],
        failures: dict[Path, Exception],
        console: Console,
        workers: int,
        round: Round | None = None,
    ):
        self.engine, self.trials, self.trained, self.workers = engine, trials, trained, workers
        self.found, self.failures, self.console, self.round = found, failures, console, round
        [self.root] = {trial.folder.parent for trial in trained}  # one command, one sweep
        self.origins: dict[str, str | None] = {}
        self.names: dict[str, list[str]] = {}  # the trials of fleets that were seen
        self.pending: dict[str, list[str]] = {}  # planned fleets that are not over, with their trials
        self.in_vain, self.looks_lacking = 0, 0

    def hand_out(self, detached: bool) -> None:
        """Writes down what is to be trained, and starts workers.

        Raises:
            UserError: they cannot be started; nothing is left behind.
        """
        fleets.forget_failures(self.root / FLEETS)
        fleets.tidy(self.root / FLEETS)
        wanted = {trial.folder: trial for trial in self.trained}
        for fleet in (self.root / FLEETS).glob(NAME):
            fleets.tidy(fleet)
            with suppress(FileNotFoundError, ValueError):
                folders = [self.root / name for name in fleets.kept(fleet)]
                if any(folder in wanted for folder in folders):
                    wanted |= {folder: self.trials[folder] for folder in folders if folder in self.trials}
        measured = {folder.name: storage.share_of_seconds(result) for folder, result in self._one_of_each_company()}
        some = [
            *wanted.values(),
            *(self.trials[self.root / name] for name in measured if self.root / name not in wanted),
        ]
        self.command = Command.post(self.root, some, self.trained, measured, self.workers, detached, self.round)
        try:
            self.engine.start(self.root, self.workers, detached)
        except UserError:
            self._clean()
            raise
        if (asked := self.engine.options.workers) and asked > self.workers:
            left = counted(len(self.trained), "trial")
            self.console.say(f"engine.workers={asked}: {self.workers} are started, for {left}")

    def _one_of_each_company(self) -> list[tuple[Path, Result]]:
        """A finished trial of each company that is to train, where there is one."""
        wanted = {trial.company for trial in self.trained} if self.found else set()
        found = []
        for folder, result in self.found.items():
            trial = self.trials.get(folder)
            if trial and folder.parent == self.root and trial.company in wanted:
                wanted.discard(trial.company)
                found.append((folder, result))
        return found

    def watch(self) -> None:
        """Waits until all fleets are over; starts workers anew for those that are lost.

        Raises:
            UserError: workers cannot be had, or a trial failed and `on_error=stop`.
            Interrupted: a signal came; the workers have been asked to save and end.
        """
        try:
            with Stop() as stop:
                while not self._look():
                    for _ in range(int(SECONDS_BETWEEN_LOOKS / 0.1)):
                        time.sleep(0.1)
                        if stop.number is not None:
                            self.console.doing("workers save and end")
                            return
                self._let_end()
        finally:
            self.engine.stop()
            self._clean()

    def _let_end(self) -> None:
        """Waits for workers to end by themselves: wandb may not have all of what they sent it."""
        self.console.doing("workers end")
        end = time.monotonic() + SECONDS_TO_END
        while any(state.state == RUNNING for state in self.engine.look()) and time.monotonic() < end:
            time.sleep(0.2)

    def _look(self) -> bool:
        """Sees what has become of the fleets; whether all are over."""
        states = self.engine.look()
        look = Look.at(self.root)
        cut = self.command.is_cut()
        if cut and not self.pending and not self.names:
            self.pending = {name: fleet["trials"] for name, fleet in self.command.planned.items()}
        there = {self._origin(name) for name in (*look.held, *look.free)}
        for name in [name for name in self.pending if name not in there]:
            self._over(self.pending.pop(name))
        self._show(look, states)
        if cut and not self.pending:
            return True
        self._replace(look, states)
        return False

    def _origin(self, fleet: str) -> str | None:
        if fleet in self.command.planned:
            return fleet
        if self.origins.get(fleet) is None:
            self.origins[fleet] = fleets.origin(self.root / FLEETS / fleet)
        return self.origins[fleet]

    def _over(self, names: Sequence[str]) -> None:
        """Takes what became of the trials of a fleet that is over."""
        self.in_vain = 0
        for name in names:
            folder = self.root / name
            trial = self.trials[folder]
            if folder in self.found or folder in self.failures:
                continue
            if result := finished(trial):
                self.found[folder] = result
                self.console.finished(trial, result)
            elif told := fleets.failure(self.root / FLEETS, name):
                error = TrialFailed(told)
                self.failures[folder] = error
                self.console.failed(trial, told)
                if trial.on_error == "stop":
                    raise error

    def _show(self, look: Look, states: Sequence[WorkerState]) -> None:
        running = []
        for name, holder in look.held.items():
            if name not in self.names:
                try:
                    self.names[name] = fleets.kept(self.root / FLEETS / name)
                except (FileNotFoundError, ValueError):
                    continue
            trials = [self.trials[self.root / n] for n in self.names[name] if self.root / n in self.trials]
            if trials:
                running.append((holder.about, trials))
        alive = [state.state for state in states if state.state != ENDED]
        self.console.workers(running, alive)

    def _replace(self, look: Look, states: Sequence[WorkerState]) -> None:
        """Starts workers where fleets wait and those that there were have ended."""
        alive = [state for state in states if state.state != ENDED]
        ended = [state for state in states if state.state == ENDED]
        waiting = [name for name in look.free if self._origin(name) in self.pending] if self.pending else ["a plan"]
        lacking = min(len(waiting), self.workers - len(alive))
        self.looks_lacking = self.looks_lacking + 1 if lacking > 0 else 0
        if self.looks_lacking < 2:  # those that are alive may be about to take them
            return
        if not alive and not look.held:
            told = next((state for state in reversed(ended) if state.told), ended[-1])
            if self.in_vain > STARTS_IN_VAIN * self.workers or all(s.status == REFUSED for s in ended[-self.workers :]):
                raise UserError(f"{told.told or 'workers end before they have begun'} (log in {told.log})")
        elif self.in_vain > STARTS_IN_VAIN * self.workers:
            return
        self.in_vain, self.looks_lacking = self.in_vain + lacking, 0
        self.console.say(f"{counted(lacking, 'worker')} ended before all was done: as many are started")
        self.engine.start(self.root, lacking)

    def _clean(self) -> None:
        """Removes what the command handed out, and what workers said unless a trial failed or fleets are left."""
        folder = self.root / FLEETS
        self.command.forget()
        fleets.tidy(folder)
        if not self.failures and not any(folder.glob(NAME)):
            fleets.forget_logs(folder)
