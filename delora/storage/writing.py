"""The folder of a trial while it is trained."""

import contextlib
import errno
import fcntl
import hashlib
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
from delora.storage.files import LOG_LIMIT, Folder, ResultsError, explain, write
from delora.storage.reading import StoredTrial, parse_config, parse_result
from delora.storage.schema import (
    ADAPTER,
    CONFIG,
    LOG,
    METRICS,
    PREDICTIONS,
    RESULT,
    SCHEMA,
    Extent,
    Result,
    checked,
    differences,
    digest,
    has_ended,
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

    def __init__(self, path: Path, holder: object):
        super().__init__(f"{path} is in use by {holder}. Wait for it, or choose another name=...")


class TrialFolder:
    """The folder of one trial, held by this process alone until `close`; made by `open_trial`.

    It is held by its handle, not its name: nothing is ever written to another folder that took the name.
    All methods that write raise ResultsError where the disk is full or the folder was removed.

    Attributes:
        path: where it is.
        finished: the stored result of a trial that is done or diverged; such a folder is never written to.
        left_over: an earlier process began this trial and did not finish it: `restart`, or `rewind` to go on.
    """

    def __init__(self, path: Path, config: dict[str, Any], root: Path | None):
        self.path, self.root = path, root
        self.config = config
        self.finished: Result | None = None
        self.left_over = False
        self._handles = contextlib.ExitStack()
        self._hashes: dict[str, str] = {}  # of the files that `save` wrote
        self._forget_log()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Gives the folder free for other processes."""
        self._handles.close()

    def withdraw(self) -> None:
        """Removes the folder if it was made for this trial and nothing happened in it."""
        files = {CONFIG, METRICS, LOCK}
        with contextlib.suppress(OSError):
            if self._folder.made and not self._log_size and files.issuperset(os.listdir(self._folder.descriptor)):
                for name in files:
                    self._folder.remove(name)
                os.rmdir(self.path)

    def restart(self) -> None:
        """Forgets what an earlier process recorded, all but the log."""
        with self._writing(RESULT):  # first: a failed trial that begins anew is not failed
            for name in (RESULT, ADAPTER, PREDICTIONS):
                self._hashes.pop(name, None)
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(name, dir_fd=self._folder.descriptor)
        self._cut(METRICS, 0)
        self._forget_log()

    def holds(self, extent: Extent | None) -> bool:
        """Whether metrics.jsonl begins with what it held when a checkpoint was made; None: it was not recorded."""
        if extent is None:
            return False
        with self._writing(METRICS):
            data = self._folder.read(METRICS, LOG_LIMIT)[: extent["size"]]
        return len(data) == extent["size"] and hashlib.sha256(data).hexdigest() == extent["sha256"]

    def rewind(self, extent: Extent) -> list[Any]:
        """Keeps what metrics.jsonl held when a checkpoint was made, from where the trial goes on.

        Returns:
            What is kept: `Step`s and `Evaluation`s.
        """
        self._cut(METRICS, extent["size"])
        with self._writing(METRICS):
            data = self._folder.read(METRICS, LOG_LIMIT)
        self._forget_log()
        self._remember(data)
        return [json.loads(line) for line in data.splitlines()]

    def sync(self) -> Extent:
        """Has what was recorded on disk, for a checkpoint that says how far the trial is."""
        with self._writing(METRICS):
            self._sync()
        return {"size": self._log_size, "sha256": self._log_hash.hexdigest()}

    def record(self, line: Mapping[str, Any]) -> None:
        """Adds a `Step` or an `Evaluation` to metrics.jsonl."""
        data = (json.dumps(plain(line), allow_nan=False) + "\n").encode()
        with self._writing(METRICS), self._folder.opened(METRICS, os.O_WRONLY | os.O_APPEND) as file:
            whole = os.fstat(file).st_size
            try:
                write(file, data)
            except OSError:
                os.ftruncate(file, whole)
                raise
        self._remember(data)

    def save(self, name: str, data: bytes) -> None:
        """Writes a file whole, or leaves the earlier one. What was recorded before is on disk before."""
        with self._writing(name):
            self._sync()
            self._folder.replace(name, data)
        self._hashes[name] = hashlib.sha256(data).hexdigest()

    def save_tensors(self, name: str, tensors: Mapping[str, "Tensor"], metadata: Mapping[str, str]) -> None:
        """Writes named tensors, any shape, as a safetensors file."""
        import safetensors.torch

        contiguous = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
        self.save(name, safetensors.torch.save(contiguous, dict(metadata)))

    def copy(self, trained: StoredTrial) -> None:
        """Takes the log and the tensors of a trial whose training was the same, each as it was when that ended.

        Raises:
            ResultsError: one of them is missing or damaged.
        """
        self.restart()
        for name in (METRICS, ADAPTER, PREDICTIONS):
            if name in trained.result["files"]:
                self.save(name, data := trained.content(name))
                if name == METRICS:
                    self._remember(data)

    def finish(self, result: Result) -> None:
        """Writes result.json with the hashes of the files beside it, after which the trial is over.

        Raises:
            ValueError: the result is not valid, or is not of this folder's config.
        """
        whole = {**plain(result), "schema": SCHEMA, "files": {**self._hashes, METRICS: self._log_hash.hexdigest()}}
        valid = checked({**whole, "sha256": digest(whole)})
        if valid["config"] != self.config:
            raise ValueError(f"{self.path}: the result is of another config")
        self.save(RESULT, (json.dumps(valid, indent=1, allow_nan=False) + "\n").encode())
        if valid["status"] != "failed":
            self.finished = valid

    def log(self, text: str) -> None:
        """Adds to log.txt, with the time. Never raises: it also tells of failures to write."""
        entry = f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text.rstrip()}\n"
        try:
            with self._folder.opened(LOG, os.O_WRONLY | os.O_APPEND | os.O_CREAT) as file:
                write(file, entry.encode(errors="replace"))
        except OSError as error:
            logger.warning("%s", explain(self.path / LOG, error))

    def _open(self, ignore: Collection[str]) -> None:
        """Takes the folder, or finds it finished."""
        while True:
            self._folder = Folder(self.path, self.root)
            self._handles.callback(self._folder.close)
            self._refuse_foreign()
            self._compare(ignore)
            if self.finished:
                return self.close()
            with self._writing(LOCK):
                lock(self._handles, self._folder, self.path)
            if self._folder.is_in_place():
                break
            self.close()  # another process has withdrawn it just then
        self._compare(ignore)  # another process may have finished it just before
        if self.finished:
            return self.close()
        with self._writing(METRICS), self._folder.opened(METRICS, os.O_WRONLY | os.O_CREAT):
            pass
        for name in os.listdir(self._folder.descriptor):
            if name.startswith(".") and name.endswith(".tmp"):
                self._folder.remove(name)
        self.save(CONFIG, yaml.dump(self.config, Dumper=_YAML_DUMPER, sort_keys=False, allow_unicode=True).encode())

    def _refuse_foreign(self) -> None:
        names = os.listdir(self._folder.descriptor)
        others = [name for name in sorted(names) if name not in OURS and not name.startswith(".")]
        if CONFIG not in names and others:
            listed = ", ".join(others[:3]) + (", ..." if len(others) > 3 else "")
            raise UserError(f"{self.path} holds files that are no trial's: {listed}. Choose another name=...")

    def _compare(self, ignore: Collection[str]) -> None:
        """Compares with what the folder holds; sets `finished` and `left_over`."""
        try:
            stored = parse_config(self._folder.read(CONFIG))
        except FileNotFoundError:
            return
        except (ValueError, OSError) as error:
            raise UserError(f"{self.path / CONFIG}: {_reason(error)}. Choose another name=...") from None
        changes = differences(stored, self.config, ignore)
        if changes:
            more = [f"  and {len(changes) - 20} more"] if len(changes) > 20 else []
            told = "\n".join([f"{self.path} holds a trial with another config:", *changes[:20], *more])
            raise ConfigChanged(f"{told}\n{WAYS_ON}")
        self.left_over = True
        try:
            result = parse_result(self._folder.read(RESULT))
        except FileNotFoundError:
            return
        except (ValueError, OSError) as error:
            advice = "Choose another name=..., or delete the folder to run the trial anew."
            raise UserError(f"{self.path / RESULT}: {_reason(error)}. {advice}") from None
        if has_ended(result, self.config):
            self.finished, self.left_over = result, False

    def _forget_log(self) -> None:
        self._log_size, self._log_hash = 0, hashlib.sha256()

    def _remember(self, data: bytes) -> None:
        self._log_size += len(data)
        self._log_hash.update(data)

    def _sync(self) -> None:
        with self._folder.opened(METRICS, os.O_WRONLY) as file:
            os.fsync(file)

    def _cut(self, name: str, size: int) -> None:
        with self._writing(name):
            self._folder.cut(name, size)

    @contextlib.contextmanager
    def _writing(self, name: str) -> Iterator[None]:
        if self.finished:
            raise RuntimeError(f"{self.path} is finished and is not written to")
        try:
            yield
        except OSError as error:
            raise ResultsError(explain(self.path / name, error)) from error


def open_trial(
    path: Path | str, config: Mapping[str, Any], ignore: Collection[str] = (), root: Path | None = None
) -> TrialFolder:
    """Opens the folder of a trial, making it where there is none, and holds it for this process.

    Args:
        config: the resolved config.
        ignore: dotted keys or groups ("logger") that may differ from an earlier run of the same trial.
        root: of `files.Folder`.

    Raises:
        UserError: another process holds the folder; it holds a trial with another config, or foreign files; a part
            of its path is a link.
        ResultsError: it cannot be made or written.
    """
    folder = TrialFolder(Path(path), plain(config), root)
    with contextlib.ExitStack() as on_failure:
        on_failure.callback(folder.close)
        try:
            folder._open(ignore)
        except OSError as error:
            raise ResultsError(explain(folder.path, error)) from error
        on_failure.pop_all()
    return folder


def _reason(error: ValueError | OSError) -> str:
    """Why a file cannot be read; a link is not followed to where a stranger's folder may want it."""
    if isinstance(error, OSError):
        return "a link, which is not followed" if error.errno == errno.ELOOP else error.strerror or str(error)
    return str(error)


def lock(handles: contextlib.ExitStack, folder: Folder, path: Path) -> None:
    """Locks the folder. The system releases the lock when the process ends, however it ends."""
    file = folder.open(LOCK, os.O_RDWR | os.O_CREAT)
    handles.callback(os.close, file)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(file, 200, 0).decode(errors="replace").strip() or "another process"
        raise InUse(path, holder) from None
    except OSError as error:  # some cluster file systems have no locks
        logger.warning("%s cannot be locked (%s): run no other process on it", path, error.strerror)
    os.ftruncate(file, 0)
    os.pwrite(file, f"process {os.getpid()} on host {socket.gethostname()}\n".encode(), 0)


def set_aside(path: Path) -> Path:
    """Renames a folder or file to a name that is free, path.old-1 and so on; returns that."""
    free = next(p for n in itertools.count(1) if not os.path.lexists(p := path.with_name(f"{path.name}.old-{n}")))
    path.rename(free)
    return free
