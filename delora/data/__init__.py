"""Rows of a task, wherever they come from."""

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from delora.errors import UserError
from delora.tasks import Task


@dataclass
class Rows:
    """The rows of one split.

    Attributes:
        texts: a tuple of texts (one or two) a row; of one's own rows they are read when they are asked for.
        labels: (rows,) int64 class ids, or float64 scores.
    """

    texts: Sequence[tuple[str, ...]]
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.texts)


@dataclass
class Dataset:
    """The splits "train" and "validation" of a task; MNLI's validation is the matched one, beside
    "validation_mismatched"; of one's own rows there may be a "test".

    Attributes:
        source: "files", "cache", "hub" or "synthetic"; of one's own rows where those to train on are.
        sha256: a hash of all rows in order; the same rows have the same hash from every source.
        published: whether the rows are GLUE's published ones by their hash; None where that is not known.
    """

    task: Task
    splits: dict[str, Rows]
    source: str
    sha256: str
    published: bool | None


def load(
    task: Task,
    *,
    source: str = "auto",
    dir: str | None = None,
    rows: Mapping[str, int] | None = None,
    seed: int = 0,
    **places: Any,
) -> Dataset:
    """Loads the rows of a task: from TSV files if a folder is given, else the Hugging Face cache, else the hub.

    Args:
        source: "auto", "synthetic" for generated sentences, or "files" for one's own rows.
        dir: a folder with GLUE's official layout (MRPC/train.tsv, ...); None takes the environment variable
            DELORA_DATA, where set.
        rows: rows of "train" and "validation" (MNLI: of each), synthetic data only; None takes GLUE's sizes.
        seed: of the generator, or of the cut of one's own rows.
        places: of one's own rows, as `delora.data.files.read` takes them.

    Raises:
        UserError: rows are missing or not GLUE's; all faults of all files together.
    """
    if source == "files":
        from delora.data import files

        kind = "classes" if task.labels else "regression"
        _, own, _ = files.read(name=task.name, kind=kind, labels=task.labels, metric=task.metrics, seed=seed, **places)
        return Dataset(task, own, str(places["train"]), hash_of(task, own), None)
    if source == "synthetic":
        from delora.data.synthetic import generate

        sizes = {split: rows[split.split("_")[0]] if rows else n for split, n in task.rows.items()}
        return _dataset(task, generate(task, sizes, seed), "synthetic")
    from delora.data import glue

    if folder := dir or os.environ.get("DELORA_DATA"):
        return _dataset(task, glue.read_files(task, folder), "files")
    if (splits := glue.read_cache(task)) is not None:
        return _dataset(task, splits, "cache")
    return _dataset(task, glue.fetch(task), "hub")


def undecodable_line(lines: Iterable[bytes]) -> int:
    """The number of the first line that is not UTF-8."""
    for number, line in enumerate(lines, start=1):
        try:
            line.decode()
        except UnicodeDecodeError:
            return number
    return 1


def missing(task: Task, *, source: str = "auto", dir: str | None = None) -> str | None:
    """What `load` would not find and the commands that mend it, or None. Answers within seconds and reads no rows."""
    if source in ("synthetic", "files"):
        return None
    from delora.data import glue

    if folder := dir or os.environ.get("DELORA_DATA"):
        return glue.missing_files(task, folder)
    return glue.missing_from_hub(task)


def _dataset(task: Task, splits: dict[str, Rows], source: str) -> Dataset:
    splits = {"validation" if name == "validation_matched" else name: rows for name, rows in splits.items()}
    published: bool | None = False
    if source != "synthetic":
        _refuse_changed(task, splits)
        published = True if task.sha256 else None
    return Dataset(task, splits, source, hash_of(task, splits), published)


def _refuse_changed(task: Task, splits: Mapping[str, Rows]) -> None:
    """Refuses rows that are as many as GLUE's, but are not GLUE's.

    Raises:
        UserError: the hash of a split is not that of the published rows.
    """
    faults = []
    for name, published in task.sha256.items():
        found = hash_of(task, {name: splits[name]})
        if found != published:
            quoted = sum('""' in text for row in splits[name].texts for text in row)  # no published text holds that
            why = "texts or labels were changed, or stand in another order"
            if quoted:
                why = f'{quoted:,} texts hold "", as in a file that was rewritten with CSV quoting'
            faults.append(f"{task.name} {name}: sha256 {found}, published {published}: {why}")
    if faults:
        raise UserError("\n".join([f"the data of {task.name} are as many rows as GLUE's, but other ones:", *faults]))


def hash_of(task: Task, splits: Mapping[str, Rows]) -> str:
    """The sha256 of rows, in order, by split."""
    digest = hashlib.sha256(task.name.encode())
    for name, rows in sorted(splits.items()):
        labels = rows.labels.astype("<i8" if task.labels else "<f8")
        # Lengths keep the borders between texts, so that no two lists of rows hash alike.
        lengths = np.array([len(text.encode()) for row in rows.texts for text in row], dtype="<i8")
        digest.update(f"{name} {len(rows)}".encode() + lengths.tobytes())
        for row in rows.texts:
            digest.update("".join(row).encode())
        digest.update(labels.tobytes())
    return digest.hexdigest()
