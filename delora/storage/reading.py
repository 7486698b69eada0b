"""Trials that have ended, and what else lies in folders of results."""

import errno
import hashlib
import json
import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import yaml  # type: ignore[import-untyped]

from delora.storage.files import LOG_LIMIT, TENSOR_LIMIT, ResultsError, content, regular
from delora.storage.schema import (
    CONFIG,
    METRICS,
    RESULT,
    WITHOUT_HASHES,
    Evaluation,
    Result,
    Step,
    checked,
    differences,
    has_ended,
    plain,
)

_YAML_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times faster than Python's


@dataclass(frozen=True)
class StoredTrial:
    """A trial that has ended. A file beside its result that is not the one it ended with is never read as if it were.

    Files of a result that holds no hashes, as earlier versions wrote it, are taken as they are.
    """

    folder: Path
    result: Result

    def evaluations(self) -> Iterator[Evaluation]:
        """Its evaluations in order. Raises ResultsError where metrics.jsonl is missing or damaged."""
        return cast(Iterator[Evaluation], self._records("evaluation", other="step"))

    def steps(self) -> Iterator[Step]:
        """Its recorded steps in order. Raises ResultsError where metrics.jsonl is missing or damaged."""
        return cast(Iterator[Step], self._records("step", other="evaluation"))

    def tensors(self, name: str, framework: Literal["numpy", "pt"]) -> dict[str, Any]:
        """Tensors by name, any shape, of `ADAPTER` or `PREDICTIONS`. Raises ResultsError where it is not as it was."""
        return read_tensors(self.folder / name, framework, self._sha256(name))[0]

    def content(self, name: str) -> bytes:
        """The bytes of a file of the trial. Raises ResultsError where it is missing or not as it was."""
        path, sha256 = self.folder / name, self._sha256(name)
        try:
            data = content(path, LOG_LIMIT if name == METRICS else TENSOR_LIMIT)
        except OSError as error:
            raise ResultsError(f"{path}: {error.strerror or error}") from None
        if sha256 and hashlib.sha256(data).hexdigest() != sha256:
            raise ResultsError(_damaged(path))
        return data

    def _sha256(self, name: str) -> str | None:
        """The stored hash of a file. Raises ResultsError for a name that the trial did not end with."""
        if self.result["schema"] == WITHOUT_HASHES:
            return None
        if name not in self.result["files"]:
            raise ResultsError(f"{self.folder / name}: the trial ended without it")
        return self.result["files"][name]

    def _records(self, kind: str, other: str) -> Iterator[Any]:
        return _records(self.folder / METRICS, self.content(METRICS), kind, other)


def _records(path: Path, data: bytes, kind: str, other: str) -> Iterator[Any]:
    other_line = f'{{"kind": "{other}"'.encode()
    for number, line in enumerate(data.splitlines(keepends=True), start=1):
        if line.startswith(other_line) or not line.endswith(b"\n"):
            continue  # without its end it was torn off by a kill
        try:
            record = json.loads(line)
            wanted = record["kind"] == kind
        except (ValueError, KeyError, TypeError, RecursionError):
            raise ResultsError(f"{path}, line {number}: damaged") from None
        if wanted:
            yield record


def evaluations(folder: Path) -> Iterator[Evaluation]:
    """The evaluations in order of the trial in a folder, whether it has ended or not.

    Raises:
        ResultsError: metrics.jsonl is missing or damaged.
    """
    path = folder / METRICS
    try:
        data = content(path, LOG_LIMIT)
    except OSError as error:
        raise ResultsError(f"{path}: {error.strerror or error}") from None
    return cast(Iterator[Evaluation], _records(path, data, "evaluation", other="step"))


@dataclass
class Found:
    """What lies below a folder: trials that ended, folders of those that did not, damaged files and why."""

    trials: list[StoredTrial] = field(default_factory=list)
    unfinished: list[Path] = field(default_factory=list)
    problems: list[tuple[Path, str]] = field(default_factory=list)


def read(folder: Path | str) -> StoredTrial:
    """Reads the trial in a folder. Raises ResultsError where it has not ended or its result is not valid."""
    try:
        return _stored(Path(folder))
    except ValueError as error:
        raise ResultsError(f"{Path(folder) / RESULT}: {error}") from None


def finished(folder: Path | str, config: Mapping[str, Any], ignore: Collection[str] = ()) -> Result | None:
    """The result in a folder of a trial with this config that `has_ended`; None where there is none.

    Args:
        ignore: dotted keys or groups ("logger") that may differ.
    """
    try:
        result = read(folder).result
    except ResultsError:
        return None
    same = not differences(result["config"], config, ignore)
    return result if same and has_ended(result, config) else None


def stored_config(folder: Path | str) -> dict[str, Any] | None:
    """The config of the trial in a folder, None where there is none."""
    try:
        return parse_config(content(Path(folder) / CONFIG))
    except (OSError, ValueError):
        return None


def parse_config(data: bytes) -> dict[str, Any]:
    """The content of a config.yaml. Raises ValueError where it is no config that delora-run wrote."""
    try:
        if b"*" in data or len(data) > 1 << 14:
            _refuse_bombs(data)
        config = plain(yaml.load(data, _YAML_LOADER))
    except (yaml.YAMLError, RecursionError, TypeError, ValueError) as error:
        raise ValueError(f"not a config of delora-run: {error}") from None
    if not isinstance(config, dict):
        raise ValueError("not a config of delora-run")
    return config


def _refuse_bombs(data: bytes) -> None:
    """Refuses YAML that stands for a million values, or so deep that the C library, which is recursive, crashes."""
    depth = 0
    for event in yaml.parse(data, _YAML_LOADER):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if isinstance(event, yaml.AliasEvent) or depth > 100:
            raise ValueError("it holds an alias, or is too deep")


def parse_result(data: bytes) -> Result:
    """The content of a result.json. Raises ValueError that says what is wrong with it."""
    try:
        value = json.loads(data)
        if rb"\ud" in data.lower():
            json.dumps(value, ensure_ascii=False).encode()  # half a character could be neither written nor printed
    except (RecursionError, UnicodeError):
        raise ValueError("not a result of delora-run") from None
    return checked(value)


def _stored(folder: Path) -> StoredTrial:
    try:
        return StoredTrial(folder, parse_result(content(folder / RESULT)))
    except FileNotFoundError:
        raise ValueError("there is none, no trial has ended here") from None
    except OSError as error:
        raise ValueError(error.strerror or str(error)) from None


def find(root: Path | str) -> Found:
    """Reads all trials below a folder, in the order of their paths. Never raises for what it finds there."""
    found = Found()

    def unreadable(error: OSError) -> None:
        found.problems.append((Path(error.filename), error.strerror or str(error)))

    for folder, subfolders, files in os.walk(root, onerror=unreadable):
        subfolders[:] = sorted(name for name in subfolders if name != "wandb" and not name.startswith("."))
        if RESULT in files:
            try:
                found.trials.append(_stored(Path(folder)))
            except ValueError as error:
                found.problems.append((Path(folder) / RESULT, str(error)))
        elif CONFIG in files and METRICS in files:
            found.unfinished.append(Path(folder))
    return found


def read_tensors(
    path: Path | str, framework: Literal["numpy", "pt"], sha256: str | None = None
) -> tuple[dict[str, Any], dict[str, str]]:
    """Tensors by name, any shape, and metadata of a safetensors file.

    Args:
        sha256: what the file has to have; None takes it as it is.

    Raises:
        ResultsError: the file is missing, not whole, or another one.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with regular(Path(path)) as file, open(file, "rb", closefd=False) as stream:
            if os.fstat(file).st_size > TENSOR_LIMIT:
                raise OSError(errno.EFBIG, f"larger than {TENSOR_LIMIT >> 20} MiB")
            if sha256 and hashlib.file_digest(stream, "sha256").hexdigest() != sha256:
                raise ResultsError(_damaged(Path(path)))
        with safe_open(path, framework) as tensors:
            return {name: tensors.get_tensor(name) for name in tensors.keys()}, tensors.metadata() or {}  # noqa: SIM118
    except OSError as error:
        raise ResultsError(f"{path}: {error.strerror or error}") from None
    except SafetensorError as error:
        raise ResultsError(f"{path}: {error}") from None


def _damaged(path: Path) -> str:
    return f"{path}: damaged: it has another sha256 than when the trial ended, which {RESULT} holds"
