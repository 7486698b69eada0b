"""What a person sees while a fleet trains: a progress bar in a terminal, plain lines elsewhere; then a table."""

import math
import sys
import time
from collections.abc import Sequence
from typing import Any, Self

from rich.console import Console as Rich
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from delora.config import Trial
from delora.results import Result
from delora.train import Score

SECONDS_BETWEEN_LINES = 10.0


class Console:
    """Shows step, loss, best score and the time that remains, on standard error."""

    def __init__(self, trials: Sequence[Trial], headline: str, total_steps: int):
        self.trials, self.headline, self.total_steps = trials, headline, total_steps
        self.rich = Rich(stderr=True)
        self.best: list[float] = [-math.inf] * len(trials)
        self.loss = math.nan
        self.start = self.last_line = time.monotonic()
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[state]}"),
            TimeRemainingColumn(),
            console=self.rich,
            disable=not self.rich.is_terminal,
        )
        self.task = self.bar.add_task(self._title(), total=total_steps, state="")

    def __enter__(self) -> Self:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def step(self, step: int, epoch: float, loss_K: Sequence[float | None]) -> None:
        """A training step was logged."""
        losses = [loss for loss in loss_K if loss is not None]
        self.loss = sum(losses) / len(losses) if losses else math.nan
        self.bar.update(self.task, completed=step, state=self._state())
        if not self.rich.is_terminal and time.monotonic() - self.last_line >= SECONDS_BETWEEN_LINES:
            self._line(step, epoch)

    def evaluation(self, trial: int, evaluation: dict[str, Any], best: Score | None) -> None:
        """A trial was scored."""
        if best is not None:
            self.best[trial] = best.validation[self.headline]
        self.bar.update(self.task, completed=evaluation["step"], state=self._state())
        if not self.rich.is_terminal and trial == len(self.trials) - 1:
            self._line(evaluation["step"], evaluation["epoch"])

    def diverged(self, trial: int, step: int) -> None:
        """A trial's loss stopped being finite."""
        self.rich.print(f"{self.trials[trial].id} diverged in step {step}: the loss is not finite", highlight=False)

    def _title(self) -> str:
        if len(self.trials) > 1:
            return f"{len(self.trials)} trials"
        return f"{self.trials[0].task.name} {self.trials[0].method.name}"

    def _state(self) -> str:
        scores = [score for score in self.best if score > -math.inf]
        best = f"best {self.headline} {max(scores):.4f}" if scores else ""
        return f"loss {self.loss:.4f} {best}".rstrip()

    def _line(self, step: int, epoch: float) -> None:
        self.last_line = time.monotonic()
        left = (self.last_line - self.start) / max(step, 1) * (self.total_steps - step)
        remaining = f", {left:.0f} s left" if 0 < step < self.total_steps else ""
        line = f"{self._title()}  step {step}/{self.total_steps}  epoch {epoch:.2f}  {self._state()}{remaining}"
        print(line, file=sys.stderr, flush=True)


def print_results(trials: Sequence[Trial], results: Sequence[Result]) -> None:
    """A short table of the results and the folder of each, on standard output."""
    table = Table(box=None, pad_edge=False)
    for column in (
        "task",
        "method",
        "model",
        "data",
        "lr",
        "seed",
        "status",
        "best epoch",
        "validation",
        "test",
    ):
        table.add_column(column)
    for trial, result in zip(trials, results, strict=True):
        best = result["best"]
        table.add_row(
            trial.task.name,
            trial.method.name,
            trial.model.name,
            result["made_by"]["data"]["source"],
            f"{trial.lr:g}",
            str(trial.seed),
            result["status"],
            str(best["epoch"]) if best else "-",
            _scores(best["validation"]) if best else "-",
            _scores(best["test"]) if best and best["test"] else "-",
        )
    Rich(width=None if sys.stdout.isatty() else 200).print(table)
    for trial in trials:
        print(f"results in {trial.folder}")


def _scores(scores: dict[str, float | None]) -> str:
    shown = {name: value for name, value in scores.items() if name != "loss"}
    return ", ".join(f"{name} {'nan' if value is None else f'{value:.4f}'}" for name, value in shown.items())
