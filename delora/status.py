"""The command `delora-status`: how far a sweep is, whoever trains it, by what lies in its folder. Imports no torch."""

import argparse
import statistics
import sys
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console as Rich

from delora import fleets, storage, terminal
from delora.config import ConfigError, Trial
from delora.console import Rows, duration, workers_table
from delora.driver import Look
from delora.errors import UserError
from delora.fleets import FLEETS, NAME
from delora.terminal import counted, printable
from delora.worker import COMMANDS, Command

DESCRIPTION = """Tells how far sweeps are: the fleets that are trained and by whom, the trials that are done, their best
scores and the time left. It reads the sweep's folder alone, whatever engine trains it and from wherever."""
EXAMPLES = """examples:
  delora-status outputs/robust
  watch -n 10 delora-status outputs/robust

exit status:
  0 all that is known of is done   1 trials failed   2 no such folder   3 it is not done yet
"""
FAILED, REFUSED, GOES_ON = 1, 2, 3


@dataclass
class Status:
    """What a sweep's folder says.

    Attributes:
        trials: all that are known of, by folder's name.
        results: of those that have ended.
        look: the fleets.
        running: the trials of fleets that are trained, by fleet.
        failed: why trials failed, by folder's name.
    """

    folder: Path
    trials: dict[str, Trial] = field(default_factory=dict)
    results: dict[str, storage.Result] = field(default_factory=dict)
    look: Look = field(default_factory=Look)
    running: dict[str, list[Trial]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, folder: Path) -> "Status":
        """Reads a sweep's folder. Raises UserError where there is none."""
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder")
        status = cls(folder, look=Look.at(folder))
        for one in storage.find(folder).trials:
            if one.folder.parent == folder:
                status.results[one.folder.name] = one.result
                with suppress(ConfigError):
                    status.trials[one.folder.name] = Trial.from_config(one.result["config"])
        for fleet in sorted((folder / FLEETS).glob(NAME)):
            trials = status._of_fleet(fleet)
            if fleet.name in status.look.held:
                status.running[fleet.name] = trials
        for path in sorted((folder / FLEETS).glob(f"{COMMANDS}*")):
            with suppress(OSError, ValueError):
                command = Command(path)
                for trial in fleets.unpacked(command.about["trials"], folder):
                    status.trials.setdefault(trial.folder.name, trial)
        for name in status.trials:
            if told := fleets.failure(folder / FLEETS, name):
                status.failed[name] = told
        return status

    def _of_fleet(self, fleet: Path) -> list[Trial]:
        trials: list[Trial] = []
        with suppress(UserError):
            if group := fleets.of_workers(fleet):
                trials = list(group.trials)
        if not trials:  # a command's own process trains it: the trials that have begun have their configs
            with suppress(FileNotFoundError, ValueError):
                for name in fleets.kept(fleet):
                    with suppress(ConfigError):
                        if config := storage.stored_config(fleet.parent.parent / name):
                            trials.append(Trial.from_config(config))
        self.trials |= {trial.folder.name: trial for trial in trials if trial.folder.name not in self.trials}
        return [self.trials[trial.folder.name] for trial in trials]

    @property
    def left(self) -> float | None:
        """Roughly the seconds until all is done, if the trials that are left take as long as those that have ended."""
        known = [storage.share_of_seconds(result) for result in self.results.values()]
        if not known or not self.running:
            return None
        waiting = len(self.trials.keys() - self.results.keys() - self.failed.keys())
        for name, trials in self.running.items():
            told = self.look.held[name].about
            waiting -= len(trials) * told.get("step", 0) / max(1, told.get("steps", 1))
        return statistics.fmean(known) * waiting / len(self.running)

    def show(self, rich: Rich) -> int:
        """Prints it; the exit status of the command."""
        running = [(self.look.held[name].about, trials) for name, trials in self.running.items()]
        at_work = {trial.folder.name for _, trials in running for trial in trials}
        counts = Counter(result["status"] for result in self.results.values())
        waiting = len(self.trials.keys() - self.results.keys() - self.failed.keys() - at_work)
        parts = [f"{counts['done']} of {len(self.trials)} done"]
        parts += [f"{counts[name]} {name}" for name in sorted(counts.keys() - {"done"})]
        others = {"running": len(at_work - self.results.keys()), "waiting": waiting, "failed": len(self.failed)}
        parts += [f"{number} {what}" for what, number in others.items() if number]
        left = f", roughly {duration(self.left)} left" if self.left else ""
        rich.print(printable(f"{self.folder}: {', '.join(parts)}{left}"), soft_wrap=True)
        if running:
            rich.print(workers_table(running, counted(len(running), "worker"), room=40))
        known = list(self.trials.values())
        scores: dict[Path, float] = {}
        for name, result in self.results.items():
            if name in self.trials and result["best"] and result["status"] == "done":
                score = result["best"]["validation"][result["headline"]]
                scores |= {} if score is None else {self.trials[name].folder: score}
        for told, trials in running:
            names = {trial.folder.name: trial.folder for trial in trials}
            scores |= {names[name]: score for name, score in told.get("best", {}).items() if name in names}
        if known:
            headlines = " or ".join(dict.fromkeys(trial.task.facts.headline for trial in known))
            rich.print(f"best {headlines} on validation so far, by factor on the base rate")
            rich.print(Rows(known).table(scores))
        for name, why in self.failed.items():
            rich.print(printable(f"failed: {self.folder / name}: {why}"), soft_wrap=True)
        if self.failed:
            return FAILED
        return GOES_ON if waiting or at_work - self.results.keys() else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    terminal.prepare()
    parser = argparse.ArgumentParser(
        "delora-status",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="sweeps: of output_dir, by their names")
    options = parser.parse_args(arguments)
    rich = Rich(width=None if sys.stdout.isatty() else 200, markup=False, emoji=False, highlight=False)
    try:
        return max(Status.of(folder).show(rich) for folder in options.folders)
    except UserError as error:
        print(f"delora-status: error: {terminal.printable(str(error))}", file=sys.stderr)
        return REFUSED
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
