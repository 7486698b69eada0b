"""GLUE's test files, and predictions for them as its leaderboard takes them: a zip with a TSV file a task.

Columns and files are those of the GLUE distribution, numbers of rows those of its published files, names and values of
the submission those of gluebenchmark.com's FAQ.
"""

import io
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from delora import storage, winner
from delora.config import Trial, look_up
from delora.errors import UserError
from delora.predict import Predictions, files, mean
from delora.storage import StoredTrial
from delora.tasks import TASKS, Task
from delora.terminal import printable

HIGHEST_SCORE = 5.0  # of STS-B


@dataclass(frozen=True)
class Test:
    """A test file of GLUE.

    Attributes:
        task: whose trials predict it.
        name: of its file in the submission.
        file: in the GLUE distribution.
        rows: of the published one.
        text: its text columns; None are those of the task's other files.
        index: the column that numbers its rows.
    """

    task: str
    name: str
    file: str
    rows: int
    text: tuple[str, ...] | None = None
    index: str = "index"


TESTS = (
    Test("cola", "CoLA.tsv", "CoLA/test.tsv", 1_063, text=("sentence",)),
    Test("sst2", "SST-2.tsv", "SST-2/test.tsv", 1_821),
    Test("mrpc", "MRPC.tsv", "MRPC/test.tsv", 1_725),
    Test("stsb", "STS-B.tsv", "STS-B/test.tsv", 1_379),
    Test("qqp", "QQP.tsv", "QQP/test.tsv", 390_965, index="id"),
    Test("mnli", "MNLI-m.tsv", "MNLI/test_matched.tsv", 9_796),
    Test("mnli", "MNLI-mm.tsv", "MNLI/test_mismatched.tsv", 9_847),
    Test("mnli", "AX.tsv", "diagnostic/diagnostic.tsv", 1_104),
    Test("qnli", "QNLI.tsv", "QNLI/test.tsv", 5_463),
    Test("rte", "RTE.tsv", "RTE/test.tsv", 3_000),
    Test("wnli", "WNLI.tsv", "WNLI/test.tsv", 146),
)

Predict = Callable[[Sequence[StoredTrial], list[tuple[str, ...]]], list[Predictions]]


def make(folders: Sequence[Path], glue: Path, predict: Predict, say: Callable[[str], object]) -> bytes:
    """The submission of the tasks that have trials below the folders: of each the seeds of the config that is best on
    validation, their probabilities averaged. Tasks without a trial are told, and not in it.

    Args:
        glue: the folder of GLUE's official layout.
        predict: gives the predictions of trials for rows, one for each trial.
        say: tells people which trials were taken, and what is missing.

    Raises:
        UserError: there is no trial of any task, they are of several protocols or data, or a test file is missing or
            not GLUE's; all faults together.
    """
    best: dict[str, winner.Best] = {}
    faults = []
    for trial in winner.choose(trial for folder in folders for trial in _trials(folder)):
        task = str(look_up(trial.result["config"], "task.name"))
        if task in best:
            faults.append(f"{task}: {best[task].folder} and {trial.folder} are of several protocols or data: name one")
        elif task in {test.task for test in TESTS}:
            best[task] = trial
    if not best:
        raise UserError(printable(f"{', '.join(map(str, folders))}: no trial of a task of GLUE is done"))
    for one in best.values():
        Trial.from_config(one.result["config"])  # of a stranger's folder
    rows: dict[str, list[tuple[int, tuple[str, ...]]]] = {}
    for test in TESTS:
        if test.task in best:
            try:
                rows[test.name] = _read(test, glue)
            except UserError as error:
                faults.append(str(error))
    if faults:
        raise UserError("\n".join(faults))

    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as packed:
        for task, one in best.items():
            config, made_by = one.result["config"], one.result["made_by"]
            told = f"{one.metric} {one.mean:.4f} on validation, {len(one.seeds)} seeds"
            told += ", trained on synthetic data" if made_by["data"]["source"] == "synthetic" else ""
            say(f"{task}: {config['method']['name']} in {one.folder}, {told}")
            tests = [test for test in TESTS if test.task == task]
            texts = [text for test in tests for _, text in rows[test.name]]
            made = mean(predict(one.seeds, texts))
            first = 0
            for test in tests:
                numbers = [number for number, _ in rows[test.name]]
                part = Predictions(made.names, made.logits[first : first + len(numbers)])
                first += len(numbers)
                name = zipfile.ZipInfo(test.name)  # of a fixed date: the same predictions are the same file
                packed.writestr(name, _tsv(TASKS[task], numbers, part), zipfile.ZIP_DEFLATED)
                if len(numbers) != test.rows:
                    say(f"{test.file}: {len(numbers):,} rows, GLUE's {test.rows:,}; the leaderboard takes no others")
    if lacking := [test for test in TESTS if test.task not in best]:
        tasks = ", ".join(dict.fromkeys(test.task for test in lacking))
        names = ", ".join(test.name for test in lacking)
        say(f"no trial of {tasks} is done: without {names}, which the leaderboard wants too")
    return archive.getvalue()


def _trials(folder: Path) -> list[StoredTrial]:
    if not folder.is_dir():
        raise UserError(printable(f"{folder}: no such folder"))
    return storage.find(folder).trials


def _read(test: Test, glue: Path) -> list[tuple[int, tuple[str, ...]]]:
    """Number and texts of each row."""
    path = glue.expanduser() / test.file
    try:
        text = files.decode(str(path), path.read_bytes())
    except OSError as error:
        raise UserError(printable(f"{path}: cannot be read: {error.strerror or error}")) from None
    columns = test.text or tuple(map(str, TASKS[test.task].tsv_text))
    rows = []
    for line, (number, *texts) in files.of_table(str(path), files.of_tsv(text), (test.index, *columns)):
        if not number.isdecimal():
            raise UserError(printable(f"{path}, line {line}: {test.index} {number!r}, expected a whole number"))
        rows.append((int(number), tuple(texts)))
    if not rows:
        raise UserError(printable(f"{path}: holds no row"))
    return rows


def _tsv(task: Task, numbers: Sequence[int], made: Predictions) -> str:
    """What the leaderboard reads: labels by name where the task's files have names, else by id; scores in range."""
    if made.scores is not None:
        values = [f"{score:.3f}" for score in made.scores.clip(0, HIGHEST_SCORE)]
    elif task.tsv_label_names:
        values = list(made.labels or ())
    else:
        values = [str(label) for label in made.logits.argmax(-1)]
    lines = [f"{number}\t{value}\n" for number, value in zip(numbers, values, strict=True)]
    return "".join(["index\tprediction\n", *lines])
