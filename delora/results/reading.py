"""Trials that have ended, and what else lies in folders of results."""

import json
import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import yaml  # type: ignore[import-untyped]

from delora.results.files import ResultsError, content
from delora.results.schema import CONFIG, METRICS, RESULT, Evaluation, Result, Step, checked, differences

YAML_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times faster than Python's


@dataclass(frozen=True)
class StoredTrial:
    """A trial that has ended."""

    folder: Path
    result: Result

    def evaluations(self) -> Iterator[Evaluation]:
        """Its evaluations in order. Raises ResultsError where metrics.jsonl is missing or damaged."""
        return cast(Iterator[Evaluation], self._records("evaluation", other="step"))

    def steps(self) -> Iterator[Step]:
        """Its recorded steps in order. Raises ResultsError where metrics.jsonl is missing or damaged."""
        return cast(Iterator[Step], self._records("step", other="evaluation"))

    def _records(self, kind: str, other: str) -> Iterator[Any]:
        path, other_line = self.folder / METRICS, f'{{"kind": "{other}"'.encode()
        try:
            data = content(path)
        except OSError as error:
            raise ResultsError(f"{path}: {error.strerror or error}") from None
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
    """The result in a folder of a trial with this config that is done or diverged; None where there is none.

    Args:
        ignore: dotted keys or groups ("logger") that may differ.
    """
    try:
        result = read(folder).result
    except ResultsError:
        return None
    same = not differences(result["config"], config, ignore)
    return result if same and result["status"] != "failed" else None


def stored_config(folder: Path | str) -> dict[str, Any] | None:
    """The config of the trial in a folder, None where there is none."""
    try:
        config = yaml.load(content(Path(folder) / CONFIG), Loader=YAML_LOADER)
    except (OSError, yaml.YAMLError, ValueError):
        return None
    return config if isinstance(config, dict) else None


def _stored(folder: Path) -> StoredTrial:
    try:
        return StoredTrial(folder, checked(json.loads(content(folder / RESULT))))
    except FileNotFoundError:
        raise ValueError("there is none, no trial has ended here") from None
    except OSError as error:
        raise ValueError(error.strerror or str(error)) from None
    except RecursionError:
        raise ValueError("not a result of delora-run") from None


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


def read_tensors(path: Path | str, framework: Literal["numpy", "pt"]) -> tuple[dict[str, Any], dict[str, str]]:
    """Tensors by name, any shape, and metadata of a safetensors file.

    Raises:
        ResultsError: the file is missing or not whole.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework) as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ResultsError(f"{path}: {error}") from None
