"""Files that are replaced whole and read whole."""

import contextlib
import errno
import os
from pathlib import Path

from delora.errors import UserError


class ResultsError(UserError):
    """A result could not be written or read; the message names the file."""

    status = 1


def replace(path: Path, data: bytes) -> None:
    """Writes a file whole, or leaves the earlier one. Raises ResultsError where that fails."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            replace_in(folder, path.name, data)
        finally:
            os.close(folder)
    except OSError as error:
        raise ResultsError(explain(path, error)) from error


def replace_in(folder: int, name: str, data: bytes) -> None:
    temporary = f".{name}.tmp"
    try:
        file = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666, dir_fd=folder)
        try:
            write(file, data)
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


def write(file: int, data: bytes) -> None:
    while data:  # a disk that fills up takes a part first
        data = data[os.write(file, data) :]


def explain(path: Path, error: OSError) -> str:
    advice = "Finished trials stay valid."
    if error.errno == errno.ENOENT:
        advice = f"It was removed while the trial ran. {advice}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        advice = f"{advice} Free some space and run the same command again."
    return f"cannot write {path}: {error.strerror or error}. {advice}"


def content(path: Path) -> bytes:
    """The bytes of a regular file; of a pipe or device they might never end."""
    if not path.is_file() and path.exists():
        raise OSError(errno.EINVAL, "not a file")
    return path.read_bytes()
