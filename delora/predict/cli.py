"""The command `delora-predict`."""

import argparse
import contextlib
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from delora import terminal
from delora.errors import UserError

if TYPE_CHECKING:
    from delora.predict import Predictions
    from delora.storage import StoredTrial

USAGE = """delora-predict FOLDER ... INPUT [--text COLUMN ...] [-o FILE] [--task TASK] [--device DEVICE]
       delora-predict FOLDER ... --glue FOLDER -o FILE.zip [--device DEVICE]"""
DESCRIPTION = """Predicts labels and probabilities, or scores, with trials of delora-run.

FOLDER is a trial's, or a sweep's: of that all seeds of the config that is best on validation are taken. The
probabilities of several trials are averaged. INPUT is a .csv, .tsv, .jsonl or .parquet file or one with a text a line;
- is standard input, which is CSV or JSON lines with --text, else a text a line. The output has a line for each row of
the input, in its order, with its number from 0."""
EXAMPLES = """examples:
  delora-predict outputs/robust texts.csv --text review -o predictions.csv
  delora-predict outputs/a outputs/b pairs.jsonl --text premise hypothesis -o predictions.jsonl
  cut -f 2 reviews | delora-predict outputs/a - | head
  delora-predict outputs/table4 --glue GLUE_DIR -o submission.zip      GLUE's test files, as its leaderboard wants them

exit status:
  0 done   1 the output cannot be written   2 bad input, or something is missing   130 interrupted
"""
INTERRUPTED = 130
BATCH = 32  # texts


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    terminal.prepare()
    options = _parser().parse_args(arguments)
    try:
        with _ending_at_ctrl_c():
            predict(options)
    except (UserError, OSError) as error:
        print(f"delora-predict: error: {terminal.printable(str(error))}", file=sys.stderr)
        return getattr(error, "status", 1)
    except KeyboardInterrupt:
        return INTERRUPTED
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "delora-predict",
        usage=USAGE,
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("paths", nargs="+", metavar="FOLDER", help="trials or sweeps; without --glue then INPUT, the texts")
    add("--text", nargs="+", default=[], metavar="COLUMN", help="of the texts; for a task of pairs two")
    add("--glue", type=Path, metavar="FOLDER", help="of GLUE's test files, TASK/test.tsv")
    add("-o", "--output", default="-", metavar="FILE", help=".csv or .jsonl, with --glue .zip; default: - for CSV")
    add("--task", help="of a sweep over several tasks, the one whose trials are meant")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    return parser


def predict(options: argparse.Namespace) -> None:
    """Reads, predicts and writes; tells on standard error which trials it took.

    Raises:
        UserError: an option, a folder, the input or the output is not as it must be.
    """
    from delora.predict import files, mean, submission

    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    if options.glue:
        if options.text or options.task:
            raise UserError("--glue takes the columns and tasks from GLUE's files: neither --text nor --task")
        if not options.output.endswith(".zip"):
            raise UserError(f"-o {options.output}: --glue makes a .zip file")
        files.check_output(options.output)
        data = submission.make([Path(path) for path in options.paths], options.glue, _with_trials(options.device), say)
    else:
        *folders, given = options.paths
        if not folders:
            raise UserError(f"expected a trial's folder and then the texts, got {given} alone; - is standard input")
        render = files.render(options.output)
        files.check_output(options.output)
        trials = members([Path(folder) for folder in folders], options.task)
        rows = files.read(given, options.text)
        data = render(mean(_with_trials(options.device)(trials, rows)))
    with _whole():
        files.write(options.output, data)


def members(folders: Sequence[Path], task: str | None = None) -> "list[StoredTrial]":
    """The trials that folders mean, which are told: each trial's itself, of a sweep's the best config's seeds.

    Raises:
        UserError: a folder holds none, or they predict other labels or read through another encoder than the first.
    """
    from delora import storage, winner
    from delora.config import Trial

    trials: list[StoredTrial] = []
    for folder in folders:
        if (folder / storage.RESULT).exists():
            trials.append(storage.read(folder))
        else:
            best = winner.best(folder, task=task)
            trials += best.seeds
            told = f"the best config by {best.metric} on validation, {best.mean:.4f}"
            say(f"{folder}: {told}, its {len(best.seeds)} seeds")
    trials = list({trial.folder.resolve(): trial for trial in trials}.values())

    def kind(trial: "StoredTrial") -> tuple[object, ...]:
        weights, config = trial.result["made_by"]["weights"], trial.result["config"]
        labels = Trial.from_config(config).task.facts.labels
        return labels, weights["sha256"] or f"{weights['source']} {config['model']}"

    for trial in trials:
        for one, other, what in zip(kind(trials[0]), kind(trial), ("labels", "encoders"), strict=True):
            if one != other:
                told = f"{trials[0].folder} and {trial.folder} have different {what}, no mean can be taken:"
                raise UserError(f"{told} {_shown(one)} and {_shown(other)}")
        config = trial.result["config"]
        told = f"{config['task']['name']}, {config['method']['name']}, seed {config['seed']}"
        source = trial.result["made_by"]["data"]["source"]
        told += ", trained on synthetic data" if source == "synthetic" else ""
        told += ", diverged" if trial.result["status"] == "diverged" else ""
        say(f"{trial.folder}: {told}")
    if len(trials) > 1:
        of = "scores" if kind(trials[0])[0] is None else "probabilities"
        say(f"the mean of the {of} of {len(trials)} trials")
    return trials


def _shown(value: object) -> str:
    return ", ".join(value) if isinstance(value, tuple) else "scores" if value is None else str(value)[:100]


def _with_trials(device: str) -> "Callable[[Sequence[StoredTrial], list[tuple[str, ...]]], list[Predictions]]":
    """Predicts rows with one trial after the other, a progress bar on standard error."""

    def predict(trials: "Sequence[StoredTrial]", rows: list[tuple[str, ...]]) -> "list[Predictions]":
        from rich.console import Console
        from rich.progress import BarColumn as Bar
        from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        import delora
        from delora.config import Trial
        from delora.predict import as_rows
        from delora.predict import predict as predict_rows

        texts = as_rows(Trial.from_config(trials[0].result["config"]).facts, rows)
        console = Console(stderr=True)
        columns = TextColumn("texts"), Bar(), MofNCompleteColumn(), TimeRemainingColumn()
        made = []
        with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
            task = bar.add_task("", total=len(trials) * len(texts))
            for trial in trials:
                model = delora.load(trial.folder, device=device)
                made.append(predict_rows(model, texts, BATCH, lambda done: bar.advance(task, done)))
        return made

    return predict


def say(text: str) -> None:
    """A line for people, on standard error."""
    print(terminal.printable(text), file=sys.stderr)


@contextlib.contextmanager
def _ending_at_ctrl_c() -> Iterator[None]:
    """Ends the process at Ctrl-C: many an import swallows a KeyboardInterrupt. Nothing is half written then."""
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:  # it is ignored, as under nohup
        yield
        return

    def leave(*_: object) -> None:
        print("delora-predict: interrupted; nothing was written", file=sys.stderr, flush=True)
        os._exit(INTERRUPTED)

    signal.signal(signal.SIGINT, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@contextlib.contextmanager
def _whole() -> Iterator[None]:
    """Lets what takes a moment come to its end before Ctrl-C is heard."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


if __name__ == "__main__":
    sys.exit(main())
