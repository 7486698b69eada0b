"""The folder of a trial while it is trained."""

import contextlib
import fcntl
import itertools
import json
import logging
import os
import socket
import time
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import yaml  # type: ignore[import-untyped]

from delora.errors import UserError
from delora.results.files import ResultsError, explain, replace_in, write
from delora.results.reading import YAML_LOADER
from delora.results.schema import (
    ADAPTER,
    CONFIG,
    LOG,
    METRICS,
    PREDICTIONS,
    RESULT,
    Result,
    checked,
    differences,
    plain,
)

if TYPE_CHECKING:
    from torch import Tensor

LOCK = ".lock"
WAYS_ON = "Choose another name=..., or go on with resume=force: results of the other config are kept beside."
OURS = (CONFIG, METRICS, RESULT, LOG, ADAPTER, PREDICTIONS, "wandb")

_YAML_DUMPER = getattr(yaml, "CSafeDumper", yaml.SafeDumper)

logger = logging.getLogger(__name__)


class ConfigChanged(UserError):
    """The folder holds a trial with another config; the message shows the difference."""


class InUse(UserError):
    """Another process holds the folder; the message names it."""


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
        data = (json.dumps(plain(line), allow_nan=False) + "\n").encode()
        with self._writing(METRICS), self._opened(METRICS, os.O_WRONLY | os.O_APPEND) as file:
            whole = os.fstat(file).st_size
            try:
                write(file, data)
            except OSError:
                os.ftruncate(file, whole)
                raise

    def save(self, name: str, data: bytes) -> None:
        """Writes a file whole, or leaves the earlier one. What was recorded before is on disk before."""
        with self._writing(name):
            with self._opened(METRICS, os.O_WRONLY) as file:
                os.fsync(file)
            replace_in(self._folder, name, data)

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
        valid = checked(plain(result))
        if valid["config"] != self.config:
            raise ValueError(f"{self.path}: the result is of another config")
        self.save(RESULT, (json.dumps(valid, indent=1, allow_nan=False) + "\n").encode())
        if valid["status"] != "failed":
            self.finished = valid

    def log(self, text: str) -> None:
        """Adds to log.txt, with the time. Never raises: it also tells of failures to write."""
        entry = f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text.rstrip()}\n"
        try:
            with self._opened(LOG, os.O_WRONLY | os.O_APPEND | os.O_CREAT) as file:
                write(file, entry.encode(errors="replace"))
        except OSError as error:
            logger.warning("%s", explain(self.path / LOG, error))

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
            stored = yaml.load(self._read(CONFIG), Loader=YAML_LOADER)
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
            result = checked(json.loads(self._read(RESULT)))
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
            raise ResultsError(explain(self.path / name, error)) from error


def open_trial(path: Path | str, config: Mapping[str, Any], ignore: Collection[str] = ()) -> TrialFolder:
    """Opens the folder of a trial, making it where there is none, and holds it for this process.

    Args:
        config: the resolved config.
        ignore: dotted keys or groups ("logger") that may differ from an earlier run of the same trial.

    Raises:
        UserError: another process holds the folder; it holds a trial with another config, or foreign files.
        ResultsError: it cannot be made or written.
    """
    folder = TrialFolder(Path(path), plain(config))
    with contextlib.ExitStack() as on_failure:
        on_failure.callback(folder.close)
        try:
            folder._open(ignore)
        except OSError as error:
            raise ResultsError(explain(folder.path, error)) from error
        on_failure.pop_all()
    return folder


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
