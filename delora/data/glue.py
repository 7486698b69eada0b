"""GLUE's rows from its TSV files, from the Hugging Face cache or from the hub, checked against GLUE's known facts.

Every source gives the rows of `nyu-mll/glue`: quotes are literal, blanks are kept, lines that lack a field or a label
are left out (QQP's files hold such lines), scores are rounded to float32. A text may be empty only where the task says
so (`Task.empty_text`).
"""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from huggingface_hub import constants

from delora.data import Rows, undecodable_line
from delora.data.hub import why_unreachable
from delora.errors import UserError
from delora.tasks import Task

if TYPE_CHECKING:
    import datasets

REPOSITORY = "nyu-mll/glue"
HIGHEST_SCORE = 5.0
SHOWN_LINES = 3  # of one file's faulty lines; the others are counted


def read_files(task: Task, folder: str) -> dict[str, Rows]:
    """Reads the task's TSV files under `folder`, which has GLUE's official layout.

    Raises:
        UserError: with the faults of all files, each with its file and line and what was expected.
    """
    if problem := missing_files(task, folder):
        raise UserError(problem)
    splits, faults = {}, []
    for split in task.rows:
        try:
            splits[split] = _read_tsv(task, split, Path(folder).expanduser() / task.folder / task.file(split))
        except UserError as error:
            faults.append(str(error))
    if faults:
        raise UserError("\n".join([f"the data of {task.name} cannot be used:", *faults]))
    return splits


def missing_files(task: Task, folder: str) -> str | None:
    """Which of the task's TSV files `folder` lacks and what is found in their place, or None."""
    root = Path(folder).expanduser()
    files = [task.file(split) for split in task.rows]
    try:
        problem = _misplaced(task, root, files)
    except OSError as error:
        problem = f"{error.filename} cannot be read: {error.strerror}"
    expected = f"the data of {task.name}: expected {' and '.join(files)} in {root / task.folder}"
    return problem and f"{expected}; {problem}"


def _misplaced(task: Task, root: Path, files: list[str]) -> str | None:
    if not root.is_dir():
        return f"{root} is not a folder" if root.exists() else f"there is no folder {root}"
    names = sorted(path.name for path in root.iterdir())
    if task.folder in names:
        names = sorted(path.name for path in (root / task.folder).glob("*"))
        lacking = [name for name in files if name not in names]
        return f"there is no {' and no '.join(lacking)} ({_found(names)})" if lacking else None
    if files[0] in names:
        return f"give the folder above {root}, and name that one {task.folder}"
    return f"{root} holds no folder {task.folder} ({_found(names, task.folder)})"


def _found(names: Sequence[str], wanted: str = "") -> str:
    """What a folder holds instead: only the near miss where one differs by case or punctuation alone."""
    near = [name for name in names if _letters(name) == _letters(wanted)]
    return f"found {', '.join(near or names[:10])}" if names else "it is empty"


def _letters(name: str) -> str:
    return "".join(filter(str.isalnum, name.lower()))


def _read_tsv(task: Task, split: str, path: Path) -> Rows:
    texts: list[tuple[str, ...]] = []
    labels: list[float] = []
    incomplete: list[tuple[int, str]] = []
    faults: list[tuple[int, str]] = []
    lines = _lines(path)
    *text_at, label_at = _columns(task, path, lines)
    width = max(*text_at, label_at) + 1
    number = 1
    for number, line in lines:
        fields = line.removesuffix("\n").split("\t")
        if len(fields) < width or not fields[label_at]:
            what = "no label" if len(fields) >= width else f"{len(fields)} of {width} fields"
            incomplete.append((number, what))
            continue
        texts.append(tuple(fields[column] for column in text_at))
        value = _label(task, fields[label_at])
        labels.append(-1 if value is None else value)
        if value is None:
            faults.append((number, f"label {fields[label_at]!r}, expected {_label_range(task)}"))
        elif not (task.empty_text or all(text.strip() for text in texts[-1])):
            faults.append((number, "an empty text, expected a sentence"))
        elif not line.endswith("\n") and len(fields) - 1 in text_at:
            faults.append((number, "the file ends inside this line, expected a line break after the text"))
    summary = []
    if len(texts) != task.rows[split]:
        expected = f"expected {task.rows[split]:,} ({task.name} {split})"
        summary = [f"{path}: {len(texts):,} full rows to line {number}, {expected}"]
        faults = sorted(faults + incomplete)
    if summary or faults:
        raise UserError("\n".join(summary + _shown(path, faults)))
    return _rows(task, texts, labels)


def _shown(path: Path, faults: list[tuple[int, str]]) -> list[str]:
    shown = [f"{path}: line {number}: {what}" for number, what in faults[:SHOWN_LINES]]
    others = len(faults) - len(shown)
    return [*shown, f"{path}: {others:,} more such lines"] if others else shown


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """The numbered lines of a UTF-8 file; each ends with one line feed, the last perhaps without."""
    binary = "not a text file, expected tab-separated text in UTF-8"
    try:
        if path.stat().st_size == 0:
            raise UserError(f"{path}: the file is empty")
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, start=1):
                if "\0" in line:
                    raise UserError(f"{path}: line {number}: {binary}")
                yield number, line
    except UnicodeDecodeError:
        with path.open("rb") as raw:
            wrong = undecodable_line(raw)
        raise UserError(f"{path}: line {wrong}: {binary}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error


def _columns(task: Task, path: Path, lines: Iterator[tuple[int, str]]) -> list[int]:
    """Positions of the text columns and of the label; takes the header off `lines` where the task has one."""
    columns = [*task.tsv_text, task.tsv_label]
    positions = [column for column in columns if isinstance(column, int)]
    if positions:
        return positions
    names = [str(column) for column in columns]
    header = next(lines, (1, ""))[1].removesuffix("\n").split("\t")
    lacking = [name for name in names if name not in header]
    if lacking:
        hint = "; GLUE's test files hold no labels" if lacking == names[-1:] else ""
        raise UserError(
            f"{path}: line 1: no column {' and no '.join(lacking)}, expected a header with {', '.join(names)}, "
            f"found {', '.join(header)[:200]!r}{hint}"
        )
    return [header.index(name) for name in names]


def _label(task: Task, text: str) -> float | None:
    """The id or score that a TSV file's label means, or None."""
    if task.labels:
        known = task.labels if task.tsv_label_names else [str(i) for i in range(task.num_labels)]
        return known.index(text) if text in known else None
    try:
        score = float(text)
    except ValueError:
        return None
    return score if 0 <= score <= HIGHEST_SCORE else None


def _label_range(task: Task) -> str:
    if task.labels is None:
        return f"a number from 0 to {HIGHEST_SCORE:.0f}"
    return " or ".join(task.labels) if task.tsv_label_names else f"a whole number from 0 to {task.num_labels - 1}"


def _rows(task: Task, texts: list[tuple[str, ...]], labels: Sequence[float]) -> Rows:
    if task.labels:
        return Rows(texts, np.array(labels, dtype=np.int64))
    return Rows(texts, np.array(labels, dtype=np.float32).astype(np.float64))


def read_cache(task: Task) -> dict[str, Rows] | None:
    """The rows that `hf download` or `datasets` left in the Hugging Face cache, or None; uses no network.

    Raises:
        UserError: a cached file cannot be read or does not hold GLUE's rows.
    """
    files = _cached_files(task)
    if files is None:
        return None
    import datasets
    import pyarrow
    import pyarrow.parquet

    splits = {}
    for split, path in files.items():
        try:
            if path.suffix == ".arrow":
                dataset = datasets.Dataset.from_file(str(path))
            else:
                dataset = datasets.Dataset(pyarrow.parquet.read_table(path))
            splits[split] = _from_dataset(task, split, dataset)
        except (OSError, pyarrow.ArrowException, UserError) as error:
            raise UserError(f"the data of {task.name}: cannot use {path}: {error}; delete its folder") from error
    return splits


def missing_from_hub(task: Task) -> str | None:
    """Why neither the Hugging Face cache nor the hub has the task's rows, and what to do, or None; within seconds."""
    if _cached_files(task):
        return None
    offline = os.environ.get("HF_DATASETS_OFFLINE", "").upper() in constants.ENV_VARS_TRUE_VALUES
    reason = "HF_DATASETS_OFFLINE is set" if offline else why_unreachable()
    return reason and (
        f"the data of {task.name}: {REPOSITORY} is not in the Hugging Face cache and the hub cannot be reached "
        f"({reason}).\n{_ways_out(task)}"
    )


def fetch(task: Task) -> dict[str, Rows]:
    """Downloads the rows from the hub through `datasets`, which keeps them in its cache.

    Raises:
        UserError: the hub cannot be reached, does not have the rows, or has others than GLUE's.
    """
    if problem := missing_from_hub(task):
        raise UserError(problem)
    import datasets

    try:
        splits = datasets.load_dataset(REPOSITORY, task.name)
        return {split: _from_dataset(task, split, splits[split]) for split in task.rows}
    except Exception as error:  # network, hub, disk and format each have exceptions of their own
        raise UserError(
            f"the data of {task.name}: cannot use {REPOSITORY} from the hub: {error}\n{_ways_out(task)}"
        ) from error


def _ways_out(task: Task) -> str:
    ways = {
        f"hf download --repo-type dataset {REPOSITORY} --include '{task.name}/*'": "once, where there is a network",
        f"delora-run task={task.name} data.dir=FOLDER": f"GLUE's own files: FOLDER/{task.folder}/train.tsv, ...",
        f"delora-run task={task.name} data=synthetic": "generated sentences, for a try without GLUE",
    }
    width = max(len(command) for command in ways)
    return "\n".join(f"    {command:{width}}   {what}" for command, what in ways.items())


def _cached_files(task: Task) -> dict[str, Path] | None:
    """One file a split, of the first complete copy in the caches of huggingface_hub (parquet) and datasets (arrow)."""
    arrow = Path(os.environ.get("HF_DATASETS_CACHE") or Path(constants.HF_HOME, "datasets")).expanduser()
    hub = Path(constants.HF_HUB_CACHE, f"datasets--{REPOSITORY.replace('/', '--')}", "snapshots")
    tables = arrow.glob(f"{REPOSITORY.replace('/', '___')}/{task.name}/*/*")
    copies = [(folder, "{}-00000-of-00001.parquet") for folder in sorted(hub.glob(f"*/{task.name}"))]
    copies += [(folder, "glue-{}.arrow") for folder in sorted(tables) if folder.suffix != ".incomplete"]
    for folder, pattern in copies:
        files = {split: folder / pattern.format(split) for split in task.rows}
        if all(path.is_file() for path in files.values()):
            return files
    return None


def _from_dataset(task: Task, split: str, dataset: "datasets.Dataset") -> Rows:
    """The rows of a split as the hub has them."""
    lacking = [name for name in (*task.text, "label") if name not in dataset.column_names]
    if lacking:
        raise UserError(f"no column {' and no '.join(lacking)}")
    names = getattr(dataset.features["label"], "names", None)
    if names != (list(task.labels) if task.labels else None):
        raise UserError(f"labels {names}, expected {task.labels}")
    if len(dataset) != task.rows[split]:
        raise UserError(f"{len(dataset):,} rows, expected {task.rows[split]:,} ({task.name} {split})")
    columns = dataset.select_columns([*task.text, "label"])[:]
    labels = columns["label"]
    highest = task.num_labels - 1 if task.labels else HIGHEST_SCORE
    for row, label in enumerate(labels):
        if label is None or not 0 <= label <= highest:
            raise UserError(f"row {row}: label {label}, expected {_label_range(task)}")
    return _rows(task, list(zip(*(columns[name] for name in task.text), strict=True)), labels)
