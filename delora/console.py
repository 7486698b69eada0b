"""What a person sees: a live view of the trials in a terminal, plain lines elsewhere; then a table."""

import math
import shlex
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from rich.console import Console as Rich
from rich.console import Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from delora.config import Trial
from delora.storage import Result, Scores, StoredTrial, flatten
from delora.terminal import counted, printable
from delora.winner import choose

if TYPE_CHECKING:
    from delora.train import Score

SECONDS_BETWEEN_LINES = 10.0
WITHOUT_SCORE = ("diverged", "stopped", "failed")  # what becomes of trials of which no score is shown


class Console:
    """Shows which trials are done, running and diverged, their best scores and the time left, on standard error.

    Args:
        trials: all trials of the command.
        found: the results there are already.
    """

    def __init__(self, trials: Sequence[Trial], found: Mapping[Path, Result]):
        self.rich = Rich(stderr=True, markup=False, emoji=False)
        self.rows = Rows(trials)
        self.headlines = " or ".join(dict.fromkeys(trial.task.facts.headline for trial in trials))
        self.total, self.already = len(trials), len(found)
        self.status: dict[Path, str] = {}  # done, running, diverged, stopped or failed
        self.best: dict[Path, float] = {}
        for folder, result in found.items():
            self._ended(folder, result)
        self.fleet: Sequence[Trial] = ()
        self.folders: list[Path] = []  # of the fleet; that of a trial is hashed from its config
        self.headline = ""
        self.steps, self.done = 1, 0
        self.loss: float | None = None
        self.start: float | None = None
        self.running: Sequence[tuple[Mapping[str, Any], Sequence[Trial]]] = ()
        self.alive: Sequence[str] = ()
        self.last_line, self.told = -math.inf, set[str]()
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("step"),
            MofNCompleteColumn(),
            TextColumn("{task.fields[state]}"),
            TimeRemainingColumn(),
        )
        self.task = self.bar.add_task("starting", total=None, state="")
        self.live = Live(console=self.rich, get_renderable=self._view, refresh_per_second=4, transient=True)

    def __enter__(self) -> Self:
        if self.rich.is_terminal:
            self.live.start()
        if self.already:
            many = f"{self.already} of {self.total} trials {'is' if self.already == 1 else 'are'} done already"
            self.say(many if self.total > 1 else "done already, not trained again")
        return self

    def __exit__(self, *_: object) -> None:
        if self.rich.is_terminal:
            self.live.stop()

    # --- What happens

    def tell(self) -> dict[str, Any]:
        """How far the fleet is, for others: what a worker's claim says."""
        best = {trial.folder.name: self.best[trial.folder] for trial in self.fleet if trial.folder in self.best}
        known = {"step": self.done, "steps": self.steps, "best": best} if self.fleet else {}
        return {"doing": str(self.bar.tasks[0].description), **known}

    def workers(self, running: Sequence[tuple[Mapping[str, Any], Sequence[Trial]]], alive: Sequence[str]) -> None:
        """What workers do, as seen from the command that started them.

        Args:
            running: what each fleet's claim tells, and the fleet's trials.
            alive: the states of the workers that have not ended.
        """
        self.running, self.alive = running, alive
        self.start = self.start or (time.monotonic() if running else None)
        over = {folder: status for folder, status in self.status.items() if status != "running"}
        self.status = {trial.folder: "running" for _, trials in running for trial in trials} | over
        for told, trials in running:
            by_name = {trial.folder.name: trial.folder for trial in trials}
            self.best |= {by_name[n]: score for n, score in told.get("best", {}).items() if n in by_name}
        self.fleet = [trial for _, trials in running for trial in trials]
        self.live.refresh() if self.live.is_started else self._line()

    def doing(self, what: str) -> None:
        """What takes its time before a fleet's training starts: shown in the place of the bar's title."""
        self.bar.reset(self.task, total=None, description=what, state="")
        if self.live.is_started:
            self.live.refresh()  # imports may hold back the thread that does so by itself

    def begin(self, trials: Sequence[Trial], headline: str, steps: int) -> None:
        """A fleet starts training."""
        self.fleet, self.headline, self.steps, self.done, self.loss = trials, headline, steps, 0, None
        self.start, self.folders = self.start or time.monotonic(), [trial.folder for trial in trials]
        over = {folder: status for folder, status in self.status.items() if status != "running"}
        self.status = dict.fromkeys(self.folders, "running") | over
        self.bar.reset(self.task, total=steps, description=self._title())

    def step(self, step: int, loss_K: Sequence[float | None]) -> None:
        """A training step was logged."""
        losses = [loss for loss in loss_K if loss is not None]
        self.done, self.loss = step, statistics.fmean(losses) if losses else None
        self._show()

    def evaluation(self, trial: int, evaluation: Mapping[str, Any], best: "Score | None") -> None:
        """A trial of the fleet was scored."""
        if best is not None:
            self.best[self.folders[trial]] = best.validation[self.headline]
        self.done = evaluation["step"]
        if trial == len(self.fleet) - 1:
            self._show(now=self.total == 1 and evaluation["epoch"] > 0)

    def diverged(self, trial: int, step: int) -> None:
        """A trial's loss stopped being finite."""
        self.status[self.folders[trial]] = "diverged"
        self.say(f"{self.fleet[trial].id} diverged in step {step}: the loss is not finite")

    def finished(self, trial: Trial, result: Result) -> None:
        """A trial's results are written."""
        self._ended(trial.folder, result)
        if self._over() == self.total > 1 and self.fleet:
            self._show(now=True)

    def failed(self, trial: Trial, message: str) -> None:
        """A trial broke off."""
        self.status[trial.folder] = "failed"
        if self.total > 1:
            self.say(f"{trial.id} failed: {message}")

    def say(self, text: str, once: bool = False) -> None:
        """A line for people, above the live view."""
        if not once or text not in self.told:
            self.told.add(text)
            self.rich.print(printable(text), highlight=False, markup=False, soft_wrap=True)

    # --- How it looks

    def _ended(self, folder: Path, result: Result) -> None:
        self.status[folder] = result["status"]
        if result["best"] and (score := result["best"]["validation"][result["headline"]]) is not None:
            self.best[folder] = score

    def _over(self) -> int:
        return sum(status != "running" for status in self.status.values())

    def _title(self) -> str:
        if self.total == 1:
            return f"{self.fleet[0].task.name} {self.fleet[0].method.name}"
        return title_of(self.fleet)

    def _counts(self) -> str:
        counted = Counter(self.status.values())
        others = [f"{counted[status]} {status}" for status in ("running", *WITHOUT_SCORE) if counted[status]]
        return ", ".join([f"{counted['done']} of {self.total} done", *others])

    def _state(self) -> str:
        parts = [] if self.loss is None else [f"loss {self.loss:.4f}"]
        scores = [self.best[folder] for folder in self.folders if folder in self.best]
        parts += [f"best {self.headline} {max(scores):.4f}"] if scores else []
        return "  ".join(parts)

    def _left(self) -> str:
        """The time that is left, if the trials that wait take as long as those that ran."""
        running = self._share_of(self.fleet, self.done, self.steps)
        if self.running:
            running = sum(self._share_of(t, told.get("step", 0), told.get("steps", 1)) for told, t in self.running)
        share = (self._over() - self.already + running) / max(1, self.total - self.already)
        if self.start is None or not 0 < share < 1:
            return ""
        return f", {duration((time.monotonic() - self.start) * (1 / share - 1))} left"

    def _share_of(self, trials: Sequence[Trial], done: int, steps: int) -> float:
        """The trials' training that is done, in trials."""
        return sum(self.status.get(trial.folder) == "running" for trial in trials) * done / max(1, steps)

    def _show(self, now: bool = False) -> None:
        self.bar.update(self.task, completed=self.done, state=self._state())
        if not self.rich.is_terminal:
            self._line(now)

    def _line(self, now: bool = False) -> None:
        """A line of a log, every few seconds."""
        if not (now or time.monotonic() - self.last_line >= SECONDS_BETWEEN_LINES):
            return
        self.last_line = time.monotonic()
        counts = f"{self._counts()}  " if self.total > 1 else ""
        if self.running or self.alive:
            line = f"{counts}{self._workers()}{self._left()}"
        else:
            state = f"  {state}" if (state := self._state()) else ""
            line = f"{counts}{self._title()}  step {self.done}/{self.steps}{state}{self._left()}"
        print(line, file=sys.stderr, flush=True)

    def _workers(self) -> str:
        """The workers in a few words."""
        at_work, queued = len(self.running), sum(state == "queued" for state in self.alive)
        starting = max(0, len(self.alive) - at_work - queued)
        parts = [f"{at_work} at work"] if at_work else []
        parts += [f"{n} {what}" for n, what in ((starting, "starting"), (queued, "queued")) if n]
        return f"workers: {', '.join(parts) or 'none'}"

    def _view(self) -> RenderableType:
        if self.total == 1 and not (self.running or self.alive):
            return self.bar
        marks = {folder: status for folder, status in self.status.items() if status in WITHOUT_SCORE}
        room = max(
            1, self.rich.height - 6 - (self.rich.height // 3 if self.running else 0)
        )  # beside the title, the factors, the rest, what ran and the bar
        title = f"best {self.headlines} on validation so far, by factor on the base rate"
        table = self.rows.table(self.best, marks, room=room, now=self.fleet)
        wide = self.rich.options.update(max_width=10_000)
        if self.rich.measure(table, options=wide).maximum > self.rich.width:
            title = f"best {self.headlines} in %, by factor on the base rate; ×: diverged, stopped or failed"
            table = self.rows.table(self.best, marks, room=room, now=self.fleet, short=True)
        hidden = len(set(self.rows.labels)) - table.row_count
        rest = [f"and {counted(hidden, 'more row')}"] if hidden else []
        below: RenderableType = self.bar
        if self.running or self.alive:
            below = workers_table(self.running, self._workers(), room=max(1, self.rich.height // 3))
        return Group(title, table, *rest, f"{self._counts()}{self._left()}", below)


class Rows:
    """Trials as a table of method × factor: a row for each task, method and whatever else differs but seed and rate."""

    def __init__(self, trials: Sequence[Trial]):
        self.trials = trials
        flats = [flatten(trial.resolved()) for trial in trials]
        hidden = ("seed", "lr", "lr_factor", "weight_decay", "method.weight_decay", "name")
        keys = [key for key in dict.fromkeys(k for flat in flats for k in flat) if key not in hidden]
        encoders = {trial.model.name for trial in trials}
        names = [(t.task.name, t.method.name, *([t.model.name] if len(encoders) > 1 else [])) for t in trials]
        by_name: dict[tuple[str, ...], list[dict[str, Any]]] = {}
        for name, flat in zip(names, flats, strict=True):
            by_name.setdefault(name, []).append(flat)
        varying = {
            name: [key for key in keys if len({str(flat.get(key)) for flat in some}) > 1]
            for name, some in by_name.items()
        }
        self.labels = [
            printable(" ".join([*name, *(f"{key.removeprefix('method.')}={flat.get(key)}" for key in varying[name])]))
            for name, flat in zip(names, flats, strict=True)
        ]

    def table(
        self,
        scores: Mapping[Path, float],
        marks: Mapping[Path, str] | None = None,
        *,
        room: int | None = None,
        now: Sequence[Trial] = (),
        short: bool = False,
    ) -> Table:
        """Mean, and standard deviation over seeds where there are several, of the scores by folder.

        Args:
            marks: of trials that have no score, what became of them.
            room: the most rows; with those of the trials that run `now`.
            short: means in percent alone, a × for each mark.
        """
        factors = sorted({round(trial.factor, 6) for trial in self.trials})
        table = Table("", box=None, pad_edge=False)
        for factor in factors:
            table.add_column(f"×{factor:g}", no_wrap=True)  # where room lacks it is the names that are folded
        cells: dict[tuple[str, float], list[Trial]] = {}
        for label, trial in zip(self.labels, self.trials, strict=True):
            cells.setdefault((label, round(trial.factor, 6)), []).append(trial)
        cell = self._short_cell if short else self._cell
        for label in self._shown(room, now):
            table.add_row(label, *(cell(cells.get((label, f), ()), scores, marks or {}) for f in factors))
        return table

    def _shown(self, room: int | None, now: Sequence[Trial]) -> list[str]:
        """The labels for which there is room, from the first one that runs."""
        labels, running = list(dict.fromkeys(self.labels)), {trial.folder for trial in now}
        if room is None or len(labels) <= room:
            return labels
        places = [
            labels.index(label)
            for label, trial in zip(self.labels, self.trials, strict=True)
            if trial.folder in running
        ]
        first = min([len(labels) - room, *places])
        return labels[first : first + room]

    def _short_cell(self, trials: Iterable[Trial], scores: Mapping[Path, float], marks: Mapping[Path, str]) -> str:
        trials = list(trials)
        values = [scores[trial.folder] for trial in trials if trial.folder in scores]
        text = f"{100 * statistics.fmean(values):.1f}" if values else "-"
        return text + "×" * sum(trial.folder in marks for trial in trials)

    def _cell(self, trials: Iterable[Trial], scores: Mapping[Path, float], marks: Mapping[Path, str]) -> str:
        values = [scores[trial.folder] for trial in trials if trial.folder in scores]
        marked = [marks[trial.folder] for trial in trials if trial.folder in marks]
        text = f"{statistics.fmean(values):.4f}" if values else "-"
        if len(values) > 1:
            text += f" ± {statistics.stdev(values):.4f} ({len(values)})"
        counted = [f"{marked.count(mark)} {mark}" for mark in dict.fromkeys(marked)]
        return ", ".join([text, *counted])


def title_of(trials: Sequence[Trial]) -> str:
    """A fleet in a few words."""
    methods = "+".join(sorted({f"{t.task.name} {t.method.name}" for t in trials}))
    return f"{methods}, {counted(len(trials), 'trial')}"


def workers_table(running: Sequence[tuple[Mapping[str, Any], Sequence[Trial]]], title: str, *, room: int) -> Table:
    """Who trains what and how far it is: what each fleet's claim tells, and its trials; so many rows at most."""
    table = Table(title, "fleet", "step", "best", box=None, pad_edge=False)
    for told, trials in running[:room]:
        step = f"{told['step']}/{told['steps']}" if "step" in told else str(told.get("doing", ""))
        scores = told.get("best", {}).values()
        name = f"{told.get('host', '?')}:{told.get('pid', '?')} {told.get('device', '')}"
        best = f"{max(scores):.4f}" if scores else ""
        table.add_row(printable(name), printable(title_of(trials)), printable(step), best)
    if len(running) > room:
        table.add_row(f"and {len(running) - room} more")
    return table


def duration(seconds: float) -> str:
    """Seconds for people."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def print_results(trials: Sequence[Trial], found: Sequence[Result | None]) -> None:
    """A short table of the results and where they are, on standard output."""
    rich = Rich(width=200, markup=False, emoji=False)  # a narrower terminal wraps the lines; it would cut the cells
    if len(trials) == 1:
        if result := found[0]:
            rich.print(_one(trials[0], result))
            print(f"results in {printable(str(trials[0].folder))}")
        return
    by_folder = {trial.folder: (trial, result) for trial, result in zip(trials, found, strict=True)}
    scores, marks, titles = {}, {}, dict[str, None]()
    for folder, (_, result) in by_folder.items():
        if result is None:
            marks[folder] = "failed"
            continue
        if result["status"] != "done":
            marks[folder] = result["status"]
        if result["best"]:
            part = "test" if result["best"]["test"] else "validation"
            titles |= {f"{result['headline']} on {part}": None}
            score = (result["best"]["test"] or result["best"]["validation"])[result["headline"]]
            if score is not None and result["status"] == "done":
                scores[folder] = score
    sources = sorted({result["made_by"]["data"]["source"] for _, result in by_folder.values() if result})
    encoders = sorted({trial.model.name for trial in trials})
    about = f"{', '.join(encoders)}, {' and '.join(sources)} data" if sources else ", ".join(encoders)
    for one in choose(StoredTrial(folder, result) for folder, (_, result) in by_folder.items() if result):
        print(one)
    print(f"{' or '.join(titles) or 'no scores'} ({about}), by factor on the method's base rate")
    rich.print(Rows([trial for trial, _ in by_folder.values()]).table(scores, marks))
    for folder, mark in marks.items():
        if mark != "stopped":  # they are many, and nobody looks for why
            print(f"{mark}: {printable(str(folder))}")
    if stopped := [result for _, result in by_folder.values() if result and result["status"] == "stopped"]:
        rungs = sorted(Counter(result["stopped_epoch"] for result in stopped).items())
        at = ", ".join(f"{n} at epoch {rung}" for rung, n in rungs)
        print(f"stopped: {counted(len(stopped), 'trial')}, {at}; the scores are those of the others")
    for root in dict.fromkeys(folder.parent for folder in by_folder):
        command = f"delora-report {shlex.quote(str(root))}"
        print(printable(f"results in {root}; curves, tables and a page: {command}"))


def _one(trial: Trial, result: Result) -> Table:
    best, status = result["best"], result["status"]
    rows = {
        "task": trial.task.name,
        "data": result["made_by"]["data"]["source"],
        "model": trial.model.name,
        "method": f"{trial.method.name}, lr {trial.rate:g}, seed {trial.seed}",
        "status": f"diverged in step {result['diverged_step']}" if status == "diverged" else status,
    }
    if best:
        rows["best epoch"] = f"{best['epoch']} of {result['epochs']}"
        rows["validation"] = _scores(best["validation"])
        rows |= {"test": _scores(best["test"])} if best["test"] else {}
    table = Table.grid(padding=(0, 2))
    for row in rows.items():
        table.add_row(*row)
    return table


def _scores(scores: Scores) -> str:
    shown = {name: value for name, value in scores.items() if name != "loss"}
    return ", ".join(f"{name} {'nan' if value is None else f'{value:.4f}'}" for name, value in shown.items())
