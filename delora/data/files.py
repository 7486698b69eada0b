"""One's own rows through `datasets`: CSV, TSV, JSON lines, parquet, folders that it saved, and the hub.

Large files are read as a stream into the cache of `datasets`, whose files are mapped into memory: neither their size
nor the number of rows decides how much of it is taken.
"""

import contextlib
import csv
import functools
import hashlib
import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from delora.config import did_you_mean
from delora.data import Rows, undecodable_line
from delora.data.hub import from_cache_where_offline, why_unreachable
from delora.errors import UserError
from delora.tasks import Task

if TYPE_CHECKING:
    import datasets

HUB = "hub:"  # how a place on the hub begins
NAMES = {"train": ("train",), "validation": ("validation", "valid", "dev"), "test": ("test",)}  # of a set's splits
FORMAT = 1  # of the rows in the cache
SHOWN_FAULTS = 3  # of one file; the others are counted
CHUNK = 1000  # rows looked at together
LARGEST_FIELD = 10_000_000  # characters of one CSV field: more is a quote that nothing closes
MOST_WHOLE = 20  # different whole numbers that are taken for classes
MOST_CLASSES = 1000
DEFAULT_METRICS = {  # by the number of labels; the first is the headline
    0: ("pearson_spearman", "pearson", "spearman", "mse"),
    2: ("accuracy", "f1"),
    3: ("accuracy", "macro_f1"),
}


class Texts(Sequence[tuple[str, ...]]):
    """The texts of rows, one or two of each, read from the disk when they are asked for."""

    def __init__(self, table: "datasets.Dataset", columns: Sequence[str]):
        self._table, self._columns = table, list(columns)

    def __len__(self) -> int:
        return len(self._table)

    @overload
    def __getitem__(self, rows: int) -> tuple[str, ...]: ...
    @overload
    def __getitem__(self, rows: slice) -> list[tuple[str, ...]]: ...
    def __getitem__(self, rows: int | slice) -> Any:
        found = self._table[rows]
        if isinstance(rows, int):
            return tuple(found[name] for name in self._columns)
        return list(zip(*(found[name] for name in self._columns), strict=True))

    def __iter__(self) -> Iterator[tuple[str, ...]]:
        for first in range(0, len(self), CHUNK):
            yield from self[first : first + CHUNK]

    def select(self, rows: np.ndarray) -> "Texts":
        return Texts(self._table.select(rows), self._columns)


@dataclass(frozen=True)
class _Split:
    """The rows of one place: their texts, their labels as the file has them, and label names that it states."""

    place: str
    texts: Texts
    labels: Sequence[Any]
    names: tuple[str, ...] | None


def read(
    *,
    name: str,
    train: str,
    validation: str | None = None,
    test: str | None = None,
    text: Sequence[str] | None = None,
    label: str | None = None,
    share: float = 0.1,
    seed: int = 0,
    kind: str | None = None,
    labels: Sequence[str] | None = None,
    metric: Sequence[str] | None = None,
) -> tuple[Task, dict[str, Rows], bool]:
    """Reads the rows, and finds out of what task they are where that is not said.

    Args:
        name: what the task is called.
        train, validation, test: files, folders or hub:ORG/NAME. Without validation rows they are cut from train.
        text: the columns of a text, or of a pair.
        label: the column of the label.
        share: of the training rows, to be cut; of each label the same.
        seed: of that cut.
        kind, labels, metric: what is known of the task beside.

    Returns:
        The task; the rows of "train", "validation" and, where there is one, "test"; whether validation was cut.

    Raises:
        UserError: with all faults of all files, each with its file, row and column.
    """
    splits = _read(train, validation, test, tuple(text or ()), label)
    found = _labels(splits, kind, labels)
    rows, faults = {}, []
    for split, table in splits.items():
        try:
            rows[split] = Rows(table.texts, _ids(table, str(label), found))
        except UserError as error:
            faults.append(str(error))
    if faults:
        raise UserError("\n".join(faults))
    cut = "validation" not in rows
    if cut:
        rows |= _cut(rows["train"], share, seed, bool(found))
    if found:
        _refuse_unseen(rows, splits, found)
    metrics = tuple(metric) if metric else DEFAULT_METRICS[min(3, len(found or ()))]
    task = Task(name, found, name, text=tuple(text or ()), metrics=metrics, headline=metrics[0])
    return task, {name: rows[name] for name in NAMES if name in rows}, cut


# --- Reading


@functools.lru_cache(maxsize=2)
def _read(
    train: str, validation: str | None, test: str | None, text: tuple[str, ...], label: str | None
) -> dict[str, _Split]:
    """The rows of each place, with all faults of all of them; read once a process."""
    places = {"train": train, "validation": validation, "test": test}
    own = train.startswith(HUB) or Path(train).expanduser().is_dir()
    splits, faults = {}, []
    for split, place in places.items():
        if place is None and not (own and split == "validation" and "train" in splits):
            continue
        try:
            table = _open(place or train, split, text, label, optional=place is None)
            if table is not None:
                splits[split] = _checked(place or train, table, text, str(label))
        except UserError as error:
            faults.append(str(error))
    if faults:
        raise UserError("\n".join(dict.fromkeys(faults)))
    return splits


def _open(
    place: str, split: str, text: tuple[str, ...], label: str | None, optional: bool
) -> "datasets.Dataset | None":
    """The rows of a place with the columns that are asked for; None for a split that it may lack.

    Raises:
        UserError: it cannot be read, or has no such columns.
    """
    import datasets

    datasets.disable_progress_bars()
    if place.startswith(HUB):
        table = _from_hub(place, split, optional)
    else:
        path = Path(place).expanduser()
        try:
            if path.is_dir():
                table = _from_folder(path, split, optional)
            elif not path.exists():
                beside = sorted(p.name for p in path.parent.iterdir()) if path.parent.is_dir() else []
                raise UserError(f"data.{split}={place}: no such file{did_you_mean(path.name, beside)}")
            elif path.stat().st_size == 0:
                raise UserError(f"{place}: the file is empty")
            else:
                table = _from_file(path, text, label)
        except OSError as error:
            raise UserError(f"{place}: cannot be read: {error.strerror or error}") from error
    if table is not None:
        require_columns(place, table.column_names, text, label)
    return table


def require_columns(place: str, names: Sequence[str], text: Sequence[str], label: str | None) -> None:
    """Raises UserError where columns are not named, or are not there."""
    has = f"{place} has the columns {', '.join(map(str, names))}"
    faults = [f"data.text: which column holds the text? {has}"] if not text else []
    faults += [f"data.label={label}: it is a text column too"] if label in text else []
    faults += [f"data.label: which column holds the label? {has}"] if not label else []
    for key, column in (*(("text", column) for column in text), *([("label", label)] if label else [])):
        if column not in names:
            faults.append(f"{place}: no column {column} (data.{key}){did_you_mean(column, names) or f'; {has}'}")
    if faults:
        raise UserError("\n".join(faults))


def _from_file(path: Path, text: tuple[str, ...], label: str | None) -> "datasets.Dataset":
    """The columns of a file, of one that is no parquet the labels as JSON; of one that lacks a column no row."""
    import datasets

    kind = kind_of(path)
    if kind == ".parquet":
        try:
            return datasets.Dataset.from_parquet(str(path))
        except Exception as error:  # of pyarrow or of datasets, which wraps it
            raise UserError(f"{path}: not a parquet file: {_cause(error)}") from error
    if kind not in RECORDS:
        known = ", ".join([*RECORDS, ".parquet"])
        raise UserError(f"{path}: what kind of file is it? Expected one of {known} at the end of its name")
    names = next(records(path, ()), {})
    if not text or label not in names or not names.keys() >= {*text}:
        return datasets.Dataset.from_dict({name: [] for name in names})
    about = path.stat()
    # A tuple: what is a list there, datasets takes in parts.
    given = {"path": str(path), "text": tuple(text), "label": label}
    stamp = json.dumps([given, str(path.resolve()), about.st_size, about.st_mtime_ns, FORMAT])
    try:
        return datasets.Dataset.from_generator(
            _records,
            features=datasets.Features({column: datasets.Value("string") for column in (*text, label)}),
            gen_kwargs=given,
            fingerprint=hashlib.sha256(stamp.encode()).hexdigest()[:32],
        )
    except Exception as error:  # datasets wraps what the generator raises
        told = _cause(error)
        raise UserError(f"{path}: no rows" if "corresponds to no data" in told else told) from error


def _records(path: str, text: tuple[str, ...], label: str) -> Iterator[dict[str, str]]:
    """The records of a file, the label as JSON: a column of one type, whatever the file has.

    Raises:
        UserError: a text is none; with the first such rows.
    """
    faults = []
    for row, record in enumerate(itertools.islice(records(Path(path), (*text, label)), 1, None), start=1):
        others = [column for column in text if not isinstance(record[column], str | None)]
        faults += [f"row {row}, column {column}: not a text: {record[column]!r}"[:200] for column in others]
        if not others:
            yield {**{column: record[column] for column in text}, label: json.dumps(record[label])}
    _refuse(path, faults)


def kind_of(path: Path) -> str:
    """The suffix that tells what kind of file it is, packed or not."""
    return next((suffix.lower() for suffix in reversed(path.suffixes) if suffix.lower() != ".gz"), "")


def records(path: Path, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The names that a file of a kind in `RECORDS` has, as keys of a record, then the columns of each of its records.

    Raises:
        UserError: the file is no such table; with the first of its faulty lines.
    """
    with _opened(path) as lines:
        yield from RECORDS[kind_of(path)](str(path), lines, columns)


def _separated(path: str, file: Iterable[str], columns: Sequence[str], separator: str) -> Iterator[dict[str, Any]]:
    """`records` of lines with a header; all values are texts."""
    faults: list[str] = []
    csv.field_size_limit(LARGEST_FIELD)
    number = 1
    lines = csv.reader(_without_nul(path, file), delimiter=separator, strict=True)
    try:
        header = next(lines, [])
        if twice := [name for name, count in Counter(header).items() if count > 1]:
            raise UserError(f"{path}: line 1: the column {', '.join(twice)} is there twice")
        yield dict.fromkeys(header)
        at = [header.index(column) for column in columns]
        for fields in lines:
            number = lines.line_num
            if not fields:
                continue
            if len(fields) != len(header):
                hint = ": a text that holds the separator needs quotes" if len(fields) > len(header) else ""
                faults.append(f"line {number}: {len(fields)} fields, the header has {len(header)}{hint}")
                continue
            yield {column: fields[place] for column, place in zip(columns, at, strict=True)}
    except csv.Error as error:
        raise UserError(f"{path}: line {max(number, lines.line_num)}: {error}: is a quote not closed?") from error
    _refuse(path, faults)


def _json_lines(path: str, file: Iterable[str], columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    """`records` of an object on each line, of which the first one names the columns."""
    faults: list[str] = []
    first = True
    for number, line in enumerate(_without_nul(path, file), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            record = f"not JSON: {error.msg}, character {error.pos + 1}"
        if not isinstance(record, dict):
            if number == 1 and (isinstance(record, list) or line.strip() == "["):
                raise UserError(f"{path}: line 1: a list, expected an object on each line (jq -c '.[]' makes that)")
            faults.append(f"line {number}: {record if isinstance(record, str) else 'expected an object'}")
            continue
        if first:
            yield dict.fromkeys(record)
            first = False
        if lacking := [column for column in columns if column not in record]:
            faults.append(f"line {number}: no {' and no '.join(lacking)}")
            continue
        yield {column: record[column] for column in columns}
    _refuse(path, faults)


RECORDS: dict[str, Callable[[str, Iterable[str], Sequence[str]], Iterator[dict[str, Any]]]] = {
    ".csv": functools.partial(_separated, separator=","),
    ".tsv": functools.partial(_separated, separator="\t"),
    ".jsonl": _json_lines,
    ".json": _json_lines,
    ".ndjson": _json_lines,
}


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Iterable[str]]:
    """A UTF-8 text file, packed with gzip or not. Raises UserError with the line that is not UTF-8."""
    import gzip

    packed = path.suffix.lower() == ".gz"
    try:
        with (
            gzip.open(path, "rt", encoding="utf-8-sig", newline="")
            if packed
            else path.open(encoding="utf-8-sig", newline="") as file
        ):
            yield file
    except UnicodeDecodeError as error:
        with gzip.open(path) if packed else path.open("rb") as binary:
            line = undecodable_line(binary)
        mend = f"iconv -f latin1 -t utf-8 {path} > utf8{path.suffix}"
        raise UserError(f"{path}: line {line}: not UTF-8; if it is Latin-1: {mend}") from error
    except gzip.BadGzipFile as error:
        raise UserError(f"{path}: not a gzip file: {error}") from error


def _without_nul(path: str, lines: Iterable[str]) -> Iterator[str]:
    for number, line in enumerate(lines, start=1):
        if "\0" in line:
            raise UserError(f"{path}: line {number}: not a text file")
        yield line


def _from_folder(path: Path, split: str, optional: bool) -> "datasets.Dataset | None":
    """A split of what `save_to_disk` of `datasets` left in a folder."""
    import datasets

    try:
        found = datasets.load_from_disk(str(path))
    except Exception as error:
        told = f"data.{split}={path}: no folder that datasets saved, nor a file: {_cause(error)}"
        raise UserError(told) from error
    if isinstance(found, datasets.Dataset):
        return None if optional else found
    return _of(found, str(path), split, optional)


def _from_hub(place: str, split: str, optional: bool) -> "datasets.Dataset | None":
    """A split of a data set of the hub, or of its cache: hub:ORG/NAME, hub:ORG/NAME/CONFIG."""
    import datasets

    repository = re.fullmatch(r"([\w.-]+/[\w.-]+)(?:/([\w.-]+))?", place.removeprefix(HUB))
    if not repository:
        raise UserError(f"data.{split}={place}: expected {HUB}ORG/NAME or {HUB}ORG/NAME/CONFIG")
    try:
        with from_cache_where_offline():
            found = datasets.load_dataset(repository[1], repository[2])
    except Exception as error:  # network, hub, disk and format each have exceptions of their own
        offline = why_unreachable()
        why = f"not in the cache, and the hub cannot be reached ({offline})" if offline else _cause(error)
        raise UserError(f"data.{split}={place}: {why}") from error
    return _of(found, place, split, optional)


def _of(found: Mapping[str, "datasets.Dataset"], place: str, split: str, optional: bool) -> "datasets.Dataset | None":
    for name in NAMES[split]:
        if name in found:
            return found[name]
    if optional:
        return None
    raise UserError(f"data.{split}={place}: it has no split {' or '.join(NAMES[split])}, but {', '.join(found)}")


def _cause(error: BaseException) -> str:
    """What was wrong at first, below what wraps it: of our own errors the message, of others its first line."""
    while error.__cause__ is not None and not isinstance(error, UserError):
        error = error.__cause__
    lines = str(error).splitlines()
    return str(error) if isinstance(error, UserError) else lines[0] if lines else type(error).__name__


# --- What the rows say


def _checked(place: str, table: "datasets.Dataset", text: tuple[str, ...], label: str) -> _Split:
    """The rows of a table. Raises UserError where a text is none, or a label is lacking."""
    if len(table) == 0:
        raise UserError(f"{place}: no rows")
    of_json = kind_of(Path(place)) in RECORDS and Path(place).expanduser().is_file()
    labels: list[Any] = []
    faults: list[str] = []
    for first in range(0, len(table), CHUNK):
        chunk = table[first : first + CHUNK]
        for column in text:
            for row, value in enumerate(chunk[column], start=first + 1):
                if not isinstance(value, str | None):
                    faults.append(f"row {row}, column {column}: not a text: {value!r}"[:200])
                elif not (value and value.strip()):
                    faults.append(f"row {row}, column {column}: an empty text")
        for row, value in enumerate(chunk[label], start=first + 1):
            value = json.loads(value) if of_json else value
            if value is None or value == "" or (isinstance(value, float) and not math.isfinite(value)):
                faults.append(f"row {row}, column {label}: no label" + (f": {value}" if value else ""))
            elif not isinstance(value, str | int | float):
                faults.append(f"row {row}, column {label}: expected a text or a number, found {value!r}"[:200])
            labels.append(value)
    _refuse(place, faults)
    names = getattr(table.features[label], "names", None)
    if names:
        _refuse(
            place, [f"row {row}, column {label}: no label (-1)" for row, value in enumerate(labels, 1) if value < 0]
        )
    return _Split(place, Texts(table, text), labels, tuple(names) if names else None)


def _refuse(place: str, faults: Sequence[str]) -> None:
    """Raises UserError with the first of the faults of a place."""
    if faults:
        shown = [f"{place}: {fault}" for fault in faults[:SHOWN_FAULTS]]
        others = len(faults) - len(shown)
        raise UserError("\n".join([*shown, *([f"{place}: {others:,} more such rows"] if others else [])]))


def _labels(splits: Mapping[str, _Split], kind: str | None, labels: Sequence[str] | None) -> tuple[str, ...] | None:
    """The names of the labels in the order of their ids; None for a regression.

    Classes are what is said, else the names that the data state, else texts, true and false, or up to `MOST_WHOLE`
    different whole numbers of the training rows.

    Raises:
        UserError: labels are of mixed kinds, of one class, or of too many.
    """
    train = splits["train"]
    if labels:
        return tuple(labels)
    if kind == "regression":
        return None
    if train.names:
        return train.names
    values = train.labels
    numbers = [_number(value) for value in values]
    if kind is None:
        wordy = next((row for row, number in enumerate(numbers) if number is None), None)
        numeric = next((row for row, number in enumerate(numbers) if number is not None), None)
        if wordy is not None and numeric is not None:
            told = f"row {wordy + 1} has {values[wordy]!r}, row {numeric + 1} {values[numeric]!r}"
            raise UserError(f"{train.place}: labels are texts and numbers: {told}; if all are names: task.kind=classes")
        whole = wordy is None and all(number == int(number) for number in numbers if number is not None)
        if wordy is None and not (whole and len(set(numbers)) <= MOST_WHOLE):
            return None
    named = {_name(value) for value in values}
    if len(named) > MOST_CLASSES or (len(named) > MOST_WHOLE and len(named) == len(values)):
        raise UserError(
            f"{train.place}: {len(named):,} different labels in {len(values):,} rows: is data.label the right column?"
        )
    by_number = all(_number(name) is not None for name in named)
    found = tuple(sorted(named, key=lambda name: (_number(name) if by_number else 0, name)))
    if len(found) == 1:
        raise UserError(f"{train.place}: all {len(values):,} rows have the label {found[0]}: there is nothing to learn")
    return found


def _number(value: Any) -> float | None:
    """The finite number that a label is, or that its text is; None where it is none."""
    if isinstance(value, bool):
        return None
    try:
        number = float(value)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _name(value: Any) -> str:
    """What a class is called by its label: true, 3, positive."""
    if isinstance(value, bool):
        return str(value).lower()
    return str(int(value)) if isinstance(value, float) and value == int(value) else str(value)


def _ids(split: _Split, column: str, labels: tuple[str, ...] | None) -> np.ndarray:
    """Class ids, int64, or scores, float64. Raises UserError for labels that are not known, or no numbers."""
    faults = []
    if labels is None:
        numbers = [_number(value) for value in split.labels]
        for row, number in enumerate(numbers, start=1):
            if number is None:
                faults.append(f"row {row}, column {column}: expected a number, found {split.labels[row - 1]!r}"[:200])
        _refuse(split.place, faults)
        return np.array(numbers, dtype=np.float32).astype(np.float64)
    known = {name: index for index, name in enumerate(labels)}
    stated = split.names
    names = [stated[value] if stated and isinstance(value, int) else _name(value) for value in split.labels]
    for row, name in enumerate(names, start=1):
        if name not in known:
            hint = did_you_mean(name, labels) or f"; the labels are {', '.join(labels[:20])}"
            faults.append(f"row {row}, column {column}: label {name!r}{hint}"[:300])
    _refuse(split.place, faults)
    return np.array([known[name] for name in names], dtype=np.int64)


def _cut(rows: Rows, share: float, seed: int, stratified: bool) -> dict[str, Rows]:
    """Training rows in two, "train" and "validation", each in their order; of each class the same share."""
    random = np.random.RandomState(seed)
    groups = [np.flatnonzero(rows.labels == label) for label in np.unique(rows.labels)] if stratified else []
    groups = groups or [np.arange(len(rows))]
    taken = [random.permutation(group)[: max(1, round(share * len(group)))] for group in groups if len(group) > 1]
    if not taken:
        raise UserError(f"{len(rows)} training rows are too few to cut validation rows from them: give data.validation")
    chosen = np.zeros(len(rows), dtype=bool)
    chosen[np.concatenate(taken)] = True
    texts = rows.texts
    assert isinstance(texts, Texts)
    return {
        name: Rows(texts.select(np.flatnonzero(mask)), rows.labels[mask])
        for name, mask in (("train", ~chosen), ("validation", chosen))
    }


def _refuse_unseen(rows: Mapping[str, Rows], splits: Mapping[str, _Split], labels: tuple[str, ...]) -> None:
    """Raises UserError for labels that no training row has, or where all rows have one."""
    seen = np.unique(rows["train"].labels)
    if len(seen) == 1:
        told = f"all {len(rows['train']):,} training rows have the label {labels[seen[0]]}: there is nothing to learn"
        raise UserError(f"{splits['train'].place}: {told}")
    for split in ("validation", "test"):
        if split in rows and len(new := np.setdiff1d(rows[split].labels, seen)):
            place = splits[split].place if split in splits else splits["train"].place
            names = ", ".join(labels[label] for label in new[:10])
            raise UserError(f"{place}: {split} rows have the label {names}, which no training row has")


def describe(task: Task, rows: Mapping[str, Rows], label: str | None, cut: bool) -> str:
    """What `read` found, in a few lines for people; with the rows that are in train and in what scores it."""
    labels = np.concatenate([rows[name].labels for name in (("train", "validation") if cut else ("train",))])
    if task.labels:
        counts = np.bincount(labels, minlength=len(task.labels))
        each = ", ".join(f"{name} {count:,}" for name, count in list(zip(task.labels, counts, strict=True))[:10])
        more = ", ..." if len(task.labels) > 10 else ""
        kind = f"{len(task.labels)} classes of {label}: {each}{more}"
    else:
        low, high = labels.min(), labels.max()
        kind = f"{label} is a number from {low:g} to {high:g}: a regression"
    sizes = ", ".join(f"{len(value):,} {name}" for name, value in rows.items())
    lines = [f"{task.name}: {sizes} rows{', validation cut from train' if cut else ''}; {kind}"]
    for name in ("validation", "test"):
        if name in rows and (again := _shared(rows["train"], rows[name])):
            lines.append(f"{task.name}: {again:,} of {len(rows[name]):,} {name} rows are training rows too")
    return "\n".join(lines)


def _shared(train: Rows, other: Rows) -> int:
    """How many of the other rows have the texts of a training row."""

    def key(row: tuple[str, ...]) -> bytes:
        return hashlib.blake2b(json.dumps(row).encode(), digest_size=12).digest()

    keys = Counter(key(row) for row in other.texts)
    found = {k for row in train.texts if (k := key(row)) in keys}
    return sum(keys[k] for k in found)
