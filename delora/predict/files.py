"""Texts from files and predictions into files. Imports nothing heavy."""

import csv
import io
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from delora import storage
from delora.config import did_you_mean
from delora.data.files import RECORDS, kind_of, records
from delora.errors import UserError
from delora.predict import Predictions
from delora.terminal import printable

STANDARD = "-"  # input or output, for a file's name


def read(path: str, columns: Sequence[str]) -> list[tuple[str, ...]]:
    """The texts of a file, a tuple a row, by its suffix: tables as `delora.data.files` reads them, or .parquet; others
    hold a text a line.

    Of standard input, "-", and with columns: JSON lines where it begins with {, else CSV.

    Args:
        columns: those of the texts, in the order that the encoder gets them; none for a text a line.

    Raises:
        UserError: the file cannot be read, is empty, or holds a row without the texts; with its line.
    """
    kind = kind_of(Path(path))
    if kind == ".parquet":
        rows = list(_of_parquet(path, columns))
    elif kind in RECORDS:
        rows = list(_of_records(path, records(Path(path), columns), columns))
    else:
        text = decode(path, _content(path))
        lines = io.StringIO(text, newline=None)
        if path == STANDARD and columns:
            kind = ".jsonl" if text.lstrip().startswith("{") else ".csv"
            rows = list(_of_records(path, RECORDS[kind](path, io.StringIO(text, newline=""), columns), columns))
        elif columns:
            known = ", ".join([*RECORDS, ".parquet"])
            raise UserError(f"{printable(path)}: --text is for {known}; this is a text a line")
        else:
            rows = [(line.rstrip("\n"),) for line in lines]
    if not rows:
        raise UserError(f"{printable(path)}: holds no row")
    return rows


def _content(path: str) -> bytes:
    try:
        return sys.stdin.buffer.read() if path == STANDARD else Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{printable(path)}: cannot be read: {error.strerror or error}") from None


def decode(path: str, data: bytes) -> str:
    """The text of a file in UTF-8. Raises UserError with the line that is not."""
    if not data.strip():
        raise UserError(f"{printable(path)}: the file is empty")
    try:
        text, wrong = data.decode("utf-8-sig"), data.find(b"\0")
    except UnicodeDecodeError as error:
        text, wrong = "", error.start
    if wrong < 0:
        return text
    line = data.count(b"\n", 0, wrong) + 1
    told = "not text in UTF-8; of another encoding: iconv -f latin1 -t utf-8 FILE"
    raise UserError(f"{printable(path)}, line {line}: {told}")


Lines = Iterator[tuple[int, list[str]]]  # the number of its first line, and the fields of a row


def of_tsv(text: str) -> Lines:
    """Rows of tab-separated text, in which quotes stand for themselves."""
    for number, line in enumerate(io.StringIO(text, newline=None), start=1):
        if line.strip("\n"):
            yield number, line.rstrip("\n").split("\t")


def of_table(path: str, lines: Lines, columns: Sequence[str]) -> Iterator[tuple[int, tuple[str, ...]]]:
    """The chosen columns of rows below a header, each row with its line.

    Raises:
        UserError: there is no such column, or a row lacks a field.
    """
    _need_columns(path, columns)
    number, header = next(lines, (1, []))
    places = [header.index(_column(f"{path}, line {number}", column, header)) for column in columns]
    for number, fields in lines:
        if len(fields) <= max(places):
            lacking = [column for column, place in zip(columns, places, strict=True) if place >= len(fields)]
            named = f", none is {' or '.join(lacking)}" if lacking else ""
            told = f"{len(fields)} fields{named}, the header has {len(header)}"
            raise UserError(printable(f"{path}, line {number}: {told}"))
        yield number, tuple(fields[place] for place in places)


def _column(place: str, column: str, header: Sequence[str]) -> str:
    if header.count(column) == 1:
        return column
    if column in header:
        told = f"{header.count(column)} columns are called {column}"
    else:
        shown = ", ".join(header[:20]) + (", ..." if len(header) > 20 else "")
        told = f"no column {column}{did_you_mean(column, header)} (columns: {shown})"
    raise UserError(printable(f"{place}: {told}"))


def _of_records(path: str, found: Iterator[dict[str, Any]], columns: Sequence[str]) -> Iterator[tuple[str, ...]]:
    _need_columns(path, columns)
    try:
        if not (names := list(next(found, {}))):
            raise UserError(f"{printable(path)}: the file is empty")
        for column in columns:
            _column(f"{path}, line 1", column, names)
        for number, record in enumerate(found, start=1):
            yield tuple(_text(f"{path}, row {number}", column, record) for column in columns)
    except OSError as error:
        raise UserError(f"{printable(path)}: cannot be read: {error.strerror or error}") from None


def _of_parquet(path: str, columns: Sequence[str]) -> Iterator[tuple[str, ...]]:
    import pyarrow
    import pyarrow.parquet

    _need_columns(path, columns)
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for column in columns:
                _column(path, column, file.schema_arrow.names)
            batches = file.iter_batches(columns=list(columns))
            for number, row in enumerate(row for batch in batches for row in batch.to_pylist()):
                yield tuple(_text(f"{path}, row {number}", column, row) for column in columns)
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(printable(f"{path}: cannot be read: {str(error).splitlines()[0]}")) from None


def _need_columns(path: str, columns: Sequence[str]) -> None:
    if not columns:
        raise UserError(f"{printable(path)}: --text COLUMN says which column holds the texts, for pairs two of them")


def _text(place: str, column: str, row: dict[str, Any]) -> str:
    if column not in row:
        _column(place, column, list(row))
    if not isinstance(row[column], str):
        shown = json.dumps(row[column], default=str)[:80]
        raise UserError(printable(f"{place}, column {column}: expected text, not {shown}"))
    return row[column]


# --- Predictions


def render(name: str) -> Callable[[Predictions], bytes]:
    """What makes of predictions the content of a file of this name: CSV or JSON lines, by its suffix.

    Raises:
        UserError: it has another suffix.
    """
    suffix = Path(name).suffix.lower()
    if name == STANDARD or suffix == ".csv":
        return _as_csv
    if suffix == ".jsonl":
        return _as_json
    raise UserError(f"-o {printable(name)}: expected a file that ends in .csv or .jsonl, or - for standard output")


def _rows(made: Predictions) -> Iterator[tuple[Any, list[float]]]:
    """The label and the probability of each label, or the score and nothing, of each text."""
    if made.probabilities is None:
        yield from ((float(f"{score:.6g}"), []) for score in made.logits[:, 0])
    else:
        yield from zip(made.labels or (), made.probabilities.round(6).tolist(), strict=True)


def _as_csv(made: Predictions) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["row", "score" if made.names is None else "label", *(f"p({name})" for name in made.names or ())])
    writer.writerows([row, what, *probabilities] for row, (what, probabilities) in enumerate(_rows(made)))
    return text.getvalue().encode()


def _as_json(made: Predictions) -> bytes:
    lines = []
    for row, (what, probabilities) in enumerate(_rows(made)):
        if made.names is None:
            lines.append({"row": row, "score": what})
        else:
            shares = dict(zip(made.names, probabilities, strict=True))
            lines.append({"row": row, "label": what, "probabilities": shares})
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode()


def check_output(name: str) -> None:
    """Raises UserError where a file of this name cannot be made, as far as that is seen before."""
    path = Path(name)
    if name != STANDARD and path.is_dir():
        raise UserError(f"-o {printable(name)}: is a folder")
    if name != STANDARD and not path.absolute().parent.is_dir():
        raise UserError(f"-o {printable(name)}: there is no folder {printable(str(path.parent))}")


def write(name: str, data: bytes) -> None:
    """Writes a file whole, or leaves the earlier one. Raises ResultsError where that fails.

    Where nobody reads standard output any more, as behind `| head`, the rest is dropped.
    """
    if name == STANDARD:
        try:
            sys.stdout.buffer.write(data)
            sys.stdout.buffer.flush()
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    else:
        storage.replace(Path(name).absolute(), data)
