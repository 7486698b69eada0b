"""Files and folders of results: never written through a link, read only where they are regular and of a sane size.

A folder of results may be a stranger's: what looks like a file in it may be a link out of it, a pipe or a device.
"""

import contextlib
import errno
import os
import shutil
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Self

from delora.errors import UserError

TEXT_LIMIT, LOG_LIMIT, TENSOR_LIMIT = 1 << 25, 1 << 30, 1 << 35  # bytes of what is read: far above what is written


class ResultsError(UserError):
    """A result could not be written or read; the message names the file."""

    status = 1


class Folder:
    """A folder held by its descriptor: nothing is written through a link, or to another folder that took its name.

    Args:
        path: where it is.
        root: the part of the path that the user named: below it, no part of the path may be a link. By default the
            folder that holds this one.
        make: whether it is made where there is none; else that is a FileNotFoundError.

    Attributes:
        made: whether this process made it.

    Raises:
        UserError: a part of the path is a link or a file.
        OSError: it cannot be made or opened.
    """

    def __init__(self, path: Path, root: Path | None = None, make: bool = True):
        root = path.parent if root is None else root
        self.path, self.made, self._make = path, False, make
        try:
            if make:
                root.mkdir(parents=True, exist_ok=True)
            self.descriptor = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
        except (FileExistsError, NotADirectoryError) as error:
            raise UserError(_not_a_folder(Path(error.filename))) from None
        for name in path.relative_to(root).parts:
            root /= name
            above = self.descriptor
            try:
                self.descriptor = self._enter(name, root)
            finally:
                os.close(above)

    def _enter(self, name: str, path: Path) -> int:
        try:
            return self._subfolder(name)
        except FileNotFoundError:
            if not self._make:
                raise
            with contextlib.suppress(FileExistsError):  # another process may have made it just then
                os.mkdir(name, dir_fd=self.descriptor)
                self.made = path == self.path
            sync(self.descriptor)
        except OSError as error:
            if error.errno not in (errno.ENOTDIR, errno.ELOOP):
                raise
            raise UserError(_not_a_folder(path)) from None
        return self._subfolder(name)

    def _subfolder(self, name: str) -> int:
        return os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=self.descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        os.close(self.descriptor)

    def is_in_place(self) -> bool:
        """Whether its path leads to it: another process may have removed it."""
        try:
            return os.path.samestat(os.fstat(self.descriptor), os.stat(self.path))
        except FileNotFoundError:
            return False

    def open(self, name: str, flags: int) -> int:
        """The descriptor of a regular file in it. Raises OSError for a link, a pipe, a device."""
        safe = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY
        try:
            file = os.open(name, flags | safe, 0o666, dir_fd=self.descriptor)
        except OSError as error:
            if error.errno == errno.ENXIO:  # a pipe that nobody reads
                raise _irregular() from None
            raise
        return _only_regular(file)

    @contextlib.contextmanager
    def opened(self, name: str, flags: int) -> Iterator[int]:
        """As `open`, closed again."""
        file = self.open(name, flags)
        try:
            yield file
        finally:
            os.close(file)

    def read(self, name: str, limit: int = TEXT_LIMIT) -> bytes:
        """The bytes of a regular file. Raises OSError where it is none, or larger than the limit."""
        with self.opened(name, os.O_RDONLY) as file:
            return _read(file, limit)

    def replace(self, name: str, data: bytes) -> None:
        """Writes a file whole, or leaves the earlier one; a link of this name is replaced, not followed."""
        temporary = f".{name}.tmp"
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary, dir_fd=self.descriptor)
        try:
            with self.opened(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL) as file:
                write(file, data)
                os.fsync(file)
            os.replace(temporary, name, src_dir_fd=self.descriptor, dst_dir_fd=self.descriptor)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary, dir_fd=self.descriptor)
            raise
        sync(self.descriptor)

    def append(self, name: str, data: bytes) -> None:
        """Adds to the end of a regular file, made where there is none; it is on disk then. Raises OSError."""
        with self.opened(name, os.O_WRONLY | os.O_CREAT | os.O_APPEND) as file:
            write(file, data)
            os.fsync(file)
        sync(self.descriptor)

    def cut(self, name: str, size: int) -> None:
        """Cuts a regular file to so many bytes. Raises OSError."""
        with self.opened(name, os.O_WRONLY) as file:
            os.ftruncate(file, size)

    def remove(self, name: str) -> None:
        """Removes a file, or a folder with all that is in it; of a link the link alone. Never raises."""
        with contextlib.suppress(OSError):
            if stat.S_ISDIR(os.stat(name, dir_fd=self.descriptor, follow_symlinks=False).st_mode):
                shutil.rmtree(name, ignore_errors=True, dir_fd=self.descriptor)
            else:
                os.unlink(name, dir_fd=self.descriptor)


def replace(path: Path, data: bytes, root: Path | None = None) -> None:
    """Writes a file whole, or leaves the earlier one, as `Folder.replace`.

    Args:
        root: of `Folder`.

    Raises:
        UserError: a part of the path is a link or a file.
        ResultsError: it cannot be written.
    """
    try:
        with Folder(path.parent, root) as folder:
            folder.replace(path.name, data)
    except OSError as error:
        raise ResultsError(explain(path, error)) from error


def forget(folder: Folder, made: Iterable[Path]) -> None:
    """Removes the files of a folder, and the folders made for it, inner ones first, as far as they are empty."""
    for name in os.listdir(folder.descriptor):
        folder.remove(name)
    for path in made:
        with contextlib.suppress(OSError):  # others are in it
            path.rmdir()


def content(path: Path, limit: int = TEXT_LIMIT) -> bytes:
    """The bytes of a regular file. Raises OSError where it is none, or larger than the limit."""
    with regular(path) as file:
        return _read(file, limit)


@contextlib.contextmanager
def regular(path: Path) -> Iterator[int]:
    """The descriptor of a regular file, to read. Raises OSError where it is none; never waits for a pipe's writer."""
    file = _only_regular(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY))
    try:
        yield file
    finally:
        os.close(file)


def sync(folder: int) -> None:
    """Has the names in a folder on disk, where the file system can do that; some network file systems cannot."""
    with contextlib.suppress(OSError):
        os.fsync(folder)


def write(file: int, data: bytes) -> None:
    while data:  # a disk that fills up takes a part first
        data = data[os.write(file, data) :]


def explain(path: Path, error: OSError) -> str:
    advice = "Finished trials stay valid."
    if error.errno == errno.ENOENT:
        advice = f"It cannot be made there, or was removed while the trial ran. {advice}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        advice = f"{advice} Free some space and run the same command again."
    if error.errno == errno.ELOOP:
        return f"cannot write {path}: it is a link, and nothing is written through links. Remove it."
    return f"cannot write {path}: {error.strerror or error}. {advice}"


def _not_a_folder(path: Path) -> str:
    if path.is_symlink():
        return f"{path} is a link, and nothing is written through links below a folder of results. Remove it."
    return f"{path} is a file, not a folder. Choose another name."


def _only_regular(file: int) -> int:
    if stat.S_ISREG(os.fstat(file).st_mode):
        return file
    os.close(file)
    raise _irregular()


def _irregular() -> OSError:
    return OSError(errno.EINVAL, "not a regular file")


def _read(file: int, limit: int) -> bytes:
    parts, left = [], limit
    if os.fstat(file).st_size > limit:
        raise OSError(errno.EFBIG, f"larger than {limit >> 20} MiB")
    while part := os.read(file, min(left + 1, 1 << 24)):
        parts.append(part)
        left -= len(part)
        if left < 0:
            raise OSError(errno.EFBIG, f"larger than {limit >> 20} MiB")
    return b"".join(parts)
