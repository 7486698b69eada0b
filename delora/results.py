"""The results of a trial on disk: the only writer and the only reader. Imports no torch.

A trial's folder holds
    config.yaml              its resolved config
    metrics.jsonl            a line per `Step` and per `Evaluation`, numbers that are not finite as null
    result.json              a `Result`, written last: its `status` alone says how the trial ended
    adapter.safetensors      the best adapter with the head
    predictions.safetensors  logits of that checkpoint
    log.txt                  what happened, with the traceback of a trial that failed
Files other than the two that grow are replaced whole: a reader sees the old one or the new one, never a part.
"""

import contextlib
import errno
import fcntl
import functools
import itertools
import json
import logging
import math
import os
import platform
import socket
import subprocess
import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, cast

import yaml  # type: ignore[import-untyped]
from typing_extensions import TypedDict

from delora.errors import UserError

if TYPE_CHECKING:
    from pydantic import TypeAdapter
    from torch import Tensor

SCHEMA = 1
CONFIG, METRICS, RESULT, LOG = "config.yaml", "metrics.jsonl", "result.json", "log.txt"
ADAPTER, PREDICTIONS = "adapter.safetensors", "predictions.safetensors"
LOCK = ".lock"
WAYS_ON = "Choose another name=..., or go on with resume=force: results of the other config are kept beside."
OURS = (CONFIG, METRICS, RESULT, LOG, ADAPTER, PREDICTIONS, "wandb")

_YAML_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times faster than Python's
_YAML_DUMPER = getattr(yaml, "CSafeDumper", yaml.SafeDumper)

logger = logging.getLogger(__name__)


class ResultsError(UserError):
    """A result could not be written or read; the message names the file."""

    status = 1


class ConfigChanged(UserError):
    """The folder holds a trial with another config; the message shows the difference."""


class InUse(UserError):
    """Another process holds the folder; the message names it."""


# --- What result.json and metrics.jsonl hold

Scores = dict[str, float | None]


class Checkpoint(TypedDict):
    """Scores at one evaluation; `test` only for the best one under protocol=paper."""

    epoch: int
    step: int
    validation: Scores
    test: Scores | None


class Parameters(TypedDict):
    """Numbers of values: trained in the adapter, trained in the head, frozen in the encoder."""

    adapter: int
    head: int
    encoder: int


class Seconds(TypedDict):
    total: float
    train: float
    evaluate: float


class Tokens(TypedDict):
    """Tokens trained on: of the texts, and with padding."""

    real: int
    computed: int


class Origin(TypedDict):
    source: str
    sha256: str | None


class MadeBy(TypedDict):
    """What made a result, as `provenance` tells. `commit` ends with -dirty for an edited checkout."""

    delora: str | None
    commit: str | None
    python: str
    torch: str | None
    transformers: str | None
    device: str
    cpu: str
    precision: str
    data: Origin
    weights: Origin


class Result(TypedDict):
    """result.json. `best` and `last` are null where nothing was scored before the trial broke off."""

    schema: int
    id: str
    sweep: str | None
    status: Literal["done", "diverged", "failed"]
    config: dict[str, Any]
    headline: str
    best: Checkpoint | None
    last: Checkpoint | None
    diverged_step: int | None
    epochs: int
    steps: int
    parameters: Parameters
    seconds: Seconds
    tokens: Tokens
    fleet_size: int
    made_by: MadeBy


class Step(TypedDict):
    kind: Literal["step"]
    step: int
    epoch: float
    loss: float | None
    lr: float
    seconds: float


Evaluation = TypedDict(
    "Evaluation",
    {
        "kind": Literal["evaluation"],
        "step": int,
        "epoch": int,
        "loss": float | None,
        "metrics": Scores,
        "distance": dict[str, float | None],
        "lambda": dict[str, float | None],
    },
)
Evaluation.__doc__ = """Scores on validation, ‖W′ − W‖_F and λ by layer; epoch 0 is before training."""


@functools.cache
def _schema() -> "TypeAdapter[Result]":
    from pydantic import TypeAdapter

    return TypeAdapter(Result)


def _checked(value: Any) -> Result:
    """The value as a Result. Raises ValueError that says what is wrong with it."""
    from pydantic import ValidationError

    if not isinstance(value, dict) or "schema" not in value:
        raise ValueError("not a result of delora-run")
    if value["schema"] != SCHEMA:
        raise ValueError(f"schema {value['schema']!r}, this version reads {SCHEMA}")
    try:
        result = _schema().validate_python(value, strict=True)
    except ValidationError as error:
        faults = [f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors()]
        raise ValueError("; ".join(faults)) from None
    if result["status"] == "done" and not (result["best"] and result["last"]):
        raise ValueError("status is done, but there is no best or last score")
    if (result["status"] == "diverged") != (result["diverged_step"] is not None):
        raise ValueError(f"status is {result['status']}, diverged_step is {result['diverged_step']}")
    for place in ("best", "last"):
        checkpoint = result[place]  # type: ignore[literal-required]
        if checkpoint and result["headline"] not in checkpoint["validation"]:
            raise ValueError(f"{place}.validation lacks the headline metric {result['headline']}")
    return cast(Result, value)


def _plain(value: Any) -> Any:
    """The value as JSON has it: scalars of numpy and torch as numbers, what is not finite as None."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if value is None or isinstance(value, str | int):
        return value
    if hasattr(value, "item"):
        return _plain(value.item())
    raise TypeError(f"{value!r} of {type(value)} has no place in a result")


# --- Writing


class TrialFolder:
    """The folder of one trial, held by this process alone until `close`; made by `open_trial`.

    It is held by its handle, not its name: nothing is ever written to another folder that took the name.
    All methods that write raise ResultsError where the disk is full or the folder was removed.

    Attributes:
        path: where it is.
        finished: the stored result of a trial that is done or diverged; such a folder is never written to.
        left_over: an earlier process began this trial and did not finish it: `restart`, or `rewind` to go on.
    """

    def __init__(self, path: Path, config: dict[str, Any]):
        self.path = path
        self.config = config
        self.finished: Result | None = None
        self.left_over = False
        self._handles = contextlib.ExitStack()
        self._folder = -1  # file descriptor

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Gives the folder free for other processes."""
        self._handles.close()
        self._folder = -1

    def restart(self) -> None:
        """Forgets what an earlier process recorded, all but the log."""
        with self._writing(RESULT):  # first: a failed trial that begins anew is not failed
            for name in (RESULT, ADAPTER, PREDICTIONS):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(name, dir_fd=self._folder)
        self._cut(METRICS, 0)

    def rewind(self, step: int, epoch: int) -> list[Any]:
        """Keeps the `Step`s up to `step` and the `Evaluation`s up to `epoch`, from where the trial goes on.

        Returns:
            What is kept.
        """
        kept, size = [], 0
        with self._writing(METRICS):
            data = self._read(METRICS)
        for number, line in enumerate(data.splitlines(keepends=True), start=1):
            if not line.endswith(b"\n"):
                break  # torn by the end of the earlier process
            try:
                record = json.loads(line)
                later = record["epoch"] > epoch if record["kind"] == "evaluation" else record["step"] > step
            except (ValueError, KeyError, TypeError):
                where = f"{self.path / METRICS}, line {number}"
                raise ResultsError(f"{where}: damaged. Delete the folder to run the trial anew.") from None
            if later:
                break
            kept.append(record)
            size += len(line)
        self._cut(METRICS, size)
        return kept

    def record(self, line: Mapping[str, Any]) -> None:
        """Adds a `Step` or an `Evaluation` to metrics.jsonl."""
        data = (json.dumps(_plain(line), allow_nan=False) + "\n").encode()
        with self._writing(METRICS), self._opened(METRICS, os.O_WRONLY | os.O_APPEND) as file:
            whole = os.fstat(file).st_size
            try:
                _write(file, data)
            except OSError:
                os.ftruncate(file, whole)
                raise

    def save(self, name: str, data: bytes) -> None:
        """Writes a file whole, or leaves the earlier one. What was recorded before is on disk before."""
        with self._writing(name):
            with self._opened(METRICS, os.O_WRONLY) as file:
                os.fsync(file)
            _replace(self._folder, name, data)

    def save_tensors(self, name: str, tensors: Mapping[str, "Tensor"], metadata: Mapping[str, str]) -> None:
        """Writes named tensors, any shape, as a safetensors file."""
        import safetensors.torch

        contiguous = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
        self.save(name, safetensors.torch.save(contiguous, dict(metadata)))

    def finish(self, result: Result) -> None:
        """Writes result.json, after which the trial is over.

        Raises:
            ValueError: the result is not valid, or is not of this folder's config.
        """
        checked = _checked(_plain(result))
        if checked["config"] != self.config:
            raise ValueError(f"{self.path}: the result is of another config")
        self.save(RESULT, (json.dumps(checked, indent=1, allow_nan=False) + "\n").encode())
        if checked["status"] != "failed":
            self.finished = checked

    def log(self, text: str) -> None:
        """Adds to log.txt, with the time. Never raises: it also tells of failures to write."""
        entry = f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text.rstrip()}\n"
        try:
            with self._opened(LOG, os.O_WRONLY | os.O_APPEND | os.O_CREAT) as file:
                _write(file, entry.encode(errors="replace"))
        except OSError as error:
            logger.warning("%s", _explain(self.path / LOG, error))

    def _open(self, ignore: Collection[str]) -> None:
        """Takes the folder, or finds it finished."""
        self._make()
        self._refuse_foreign()
        self._compare(ignore)
        if not self.finished:
            _lock(self._handles, self._folder, self.path)
            self._compare(ignore)  # another process may have finished it just before
        if self.finished:
            self.close()
            return
        with self._opened(METRICS, os.O_WRONLY | os.O_CREAT):
            pass
        for name in os.listdir(self._folder):
            if name.startswith(".") and name.endswith(".tmp"):
                os.unlink(name, dir_fd=self._folder)
        self.save(CONFIG, yaml.dump(self.config, Dumper=_YAML_DUMPER, sort_keys=False, allow_unicode=True).encode())

    def _make(self) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._folder = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
        except (FileExistsError, NotADirectoryError) as error:
            raise UserError(f"{error.filename} is a file, not a folder. Choose another name=...") from None
        self._handles.callback(os.close, self._folder)

    def _refuse_foreign(self) -> None:
        names = os.listdir(self._folder)
        others = [name for name in sorted(names) if name not in OURS and not name.startswith(".")]
        if CONFIG not in names and others:
            listed = ", ".join(others[:3]) + (", ..." if len(others) > 3 else "")
            raise UserError(f"{self.path} holds files that are no trial's: {listed}. Choose another name=...")

    def _compare(self, ignore: Collection[str]) -> None:
        """Compares with what the folder holds; sets `finished` and `left_over`."""
        try:
            stored = yaml.load(self._read(CONFIG), Loader=_YAML_LOADER)
        except FileNotFoundError:
            return
        except (yaml.YAMLError, ValueError):
            stored = None
        if not isinstance(stored, dict):
            raise UserError(f"{self.path / CONFIG} is no config of a trial. Choose another name=...")
        changes = differences(stored, self.config, ignore)
        if changes:
            more = [f"  and {len(changes) - 20} more"] if len(changes) > 20 else []
            told = "\n".join([f"{self.path} holds a trial with another config:", *changes[:20], *more])
            raise ConfigChanged(f"{told}\n{WAYS_ON}")
        self.left_over = True
        try:
            result = _checked(json.loads(self._read(RESULT)))
        except FileNotFoundError:
            return
        except (ValueError, RecursionError) as error:
            advice = "Choose another name=..., or delete the folder to run the trial anew."
            raise UserError(f"{self.path / RESULT}: {error}. {advice}") from None
        if result["status"] != "failed":
            self.finished, self.left_over = result, False

    def _read(self, name: str) -> bytes:
        with self._opened(name, os.O_RDONLY) as file, open(file, "rb", closefd=False) as stream:
            return stream.read()

    def _cut(self, name: str, size: int) -> None:
        with self._writing(name), self._opened(name, os.O_WRONLY) as file:
            os.ftruncate(file, size)

    @contextlib.contextmanager
    def _opened(self, name: str, flags: int) -> Iterator[int]:
        file = os.open(name, flags, 0o666, dir_fd=self._folder)
        try:
            yield file
        finally:
            os.close(file)

    @contextlib.contextmanager
    def _writing(self, name: str) -> Iterator[None]:
        if self.finished:
            raise RuntimeError(f"{self.path} is finished and is not written to")
        try:
            yield
        except OSError as error:
            raise ResultsError(_explain(self.path / name, error)) from error


def open_trial(path: Path | str, config: Mapping[str, Any], ignore: Collection[str] = ()) -> TrialFolder:
    """Opens the folder of a trial, making it where there is none, and holds it for this process.

    Args:
        config: the resolved config.
        ignore: dotted keys or groups ("logger") that may differ from an earlier run of the same trial.

    Raises:
        UserError: another process holds the folder; it holds a trial with another config, or foreign files.
        ResultsError: it cannot be made or written.
    """
    folder = TrialFolder(Path(path), _plain(config))
    with contextlib.ExitStack() as on_failure:
        on_failure.callback(folder.close)
        try:
            folder._open(ignore)
        except OSError as error:
            raise ResultsError(_explain(folder.path, error)) from error
        on_failure.pop_all()
    return folder


def differences(old: Mapping[str, Any], new: Mapping[str, Any], ignore: Collection[str] = ()) -> list[str]:
    """Lines "  key: old → new" of the dotted keys in which two configs differ."""
    old, new = flatten(old), flatten(new)
    keys = [key for key in {**old, **new} if not any(key == i or key.startswith(f"{i}.") for i in ignore)]
    pairs = [(key, old.get(key, "(absent)"), new.get(key, "(absent)")) for key in keys]
    return [f"  {key}: {before} → {after}" for key, before, after in pairs if before != after]


def flatten(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} as {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        inner = isinstance(value, Mapping) and value
        flat |= flatten(value, f"{prefix}{key}.") if inner else {f"{prefix}{key}": value}
    return flat


def _lock(handles: contextlib.ExitStack, folder: int, path: Path) -> None:
    """Locks the folder. The system releases the lock when the process ends, however it ends."""
    file = os.open(LOCK, os.O_RDWR | os.O_CREAT, 0o666, dir_fd=folder)
    handles.callback(os.close, file)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(file, 200, 0).decode(errors="replace").strip() or "another process"
        raise InUse(f"{path} is in use by {holder}. Wait for it, or choose another name=...") from None
    except OSError as error:  # some cluster file systems have no locks
        logger.warning("%s cannot be locked (%s): run no other process on it", path, error.strerror)
    os.ftruncate(file, 0)
    os.pwrite(file, f"process {os.getpid()} on host {socket.gethostname()}\n".encode(), 0)


def set_aside(path: Path) -> Path:
    """Renames a folder to one that is free, path.old-1 and so on; returns that."""
    free = next(p for n in itertools.count(1) if not (p := path.with_name(f"{path.name}.old-{n}")).exists())
    path.rename(free)
    return free


def replace(path: Path, data: bytes) -> None:
    """Writes a file whole, or leaves the earlier one. Raises ResultsError where that fails."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            _replace(folder, path.name, data)
        finally:
            os.close(folder)
    except OSError as error:
        raise ResultsError(_explain(path, error)) from error


def _replace(folder: int, name: str, data: bytes) -> None:
    temporary = f".{name}.tmp"
    try:
        file = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666, dir_fd=folder)
        try:
            _write(file, data)
            os.fsync(file)
        finally:
            os.close(file)
        os.replace(temporary, name, src_dir_fd=folder, dst_dir_fd=folder)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary, dir_fd=folder)
        raise
    with contextlib.suppress(OSError):  # some network file systems cannot sync a folder
        os.fsync(folder)


def _write(file: int, data: bytes) -> None:
    while data:  # a disk that fills up takes a part first
        data = data[os.write(file, data) :]


def _explain(path: Path, error: OSError) -> str:
    advice = "Finished trials stay valid."
    if error.errno == errno.ENOENT:
        advice = f"It was removed while the trial ran. {advice}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        advice = f"{advice} Free some space and run the same command again."
    return f"cannot write {path}: {error.strerror or error}. {advice}"


# --- Reading


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
            data = _content(path)
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
        config = yaml.load(_content(Path(folder) / CONFIG), Loader=_YAML_LOADER)
    except (OSError, yaml.YAMLError, ValueError):
        return None
    return config if isinstance(config, dict) else None


def _stored(folder: Path) -> StoredTrial:
    try:
        return StoredTrial(folder, _checked(json.loads(_content(folder / RESULT))))
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


def _content(path: Path) -> bytes:
    """The bytes of a regular file; of a pipe or device they might never end."""
    if not path.is_file() and path.exists():
        raise OSError(errno.EINVAL, "not a file")
    return path.read_bytes()


# --- What made a result

PACKAGES = ("torch", "transformers", "tokenizers", "datasets", "numpy", "safetensors", "hydra-core")


def provenance(*, device: str, precision: str, determinism: Mapping[str, Any], data: Origin, weights: Origin) -> MadeBy:
    """What made a result: versions, commit, hardware and inputs; neither user, host nor paths.

    Args:
        device: the name of what computes, "cpu" or a GPU's name.
        determinism: what decides whether the same run gives the same bits: threads, algorithms, TF32.
    """
    made_by = {
        "delora": _version("delora"),
        "commit": _commit(Path(__file__).parent),
        "python": platform.python_version(),
        **{package: _version(package) for package in PACKAGES},
        "os": platform.platform(),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "device": device,
        "precision": precision,
        "determinism": dict(determinism),
        "data": data,
        "weights": weights,
    }
    return cast(MadeBy, made_by)


@functools.cache
def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def cpu_name() -> str:
    """As the processor calls itself."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


@functools.cache
def _commit(package: Path) -> str | None:
    """The commit of the checkout that the package runs from; None where it was installed from a wheel."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    environment["GIT_OPTIONAL_LOCKS"] = "0"

    def git(*arguments: str) -> str:
        run = subprocess.run(
            ["git", *arguments],
            cwd=package,
            env=environment,
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
        return run.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "--", Path(__file__).name)  # an environment may lie in a foreign checkout
        return git("describe", "--always", "--abbrev=40", "--dirty", "--exclude=*")
    except (OSError, subprocess.SubprocessError):
        return None
