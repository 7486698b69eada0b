"""Texts as token ids, and a cache of them for data sets that take long.

    <cache>/<key>.safetensors     the ids of one split, one example after the other

<cache> is $XDG_CACHE_HOME/delora/tokens, or ~/.cache/delora/tokens. The key is a hash of all that decides the ids, the
file holds a hash of what is in it: a file that is damaged, or another's, is made anew. Files are replaced whole, so any
number of processes may share the folder; those unused for longest are removed where all take more than `CACHE_BYTES`.
"""

import contextlib
import hashlib
import importlib.metadata
import json
import logging
import os
import tempfile
import time
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import safetensors
import safetensors.numpy
import transformers

CHUNK = 256  # examples encoded at once: with what is cut off, the library's objects take megabytes for each hundred
CACHED_FROM = 50_000  # examples, which take seconds
CACHE_BYTES = 2**30
STALE_SECONDS = 3600  # after which no process still writes a file
FORMAT = 2  # of the files, and of how texts are encoded here

logger = logging.getLogger(__name__)


@dataclass
class Encoded:
    """Examples as token ids.

    Attributes:
        inputs: "input_ids", int32, and, for encoders that know them, "token_type_ids", int8: (tokens,), one example
            after the other.
        lengths_S: tokens of each of the S examples, int64.
        cut: how many examples were longer.
    """

    inputs: dict[str, np.ndarray]
    lengths_S: np.ndarray
    cut: int


def encode(
    texts: Sequence[tuple[str, ...]], tokenizer: transformers.PreTrainedTokenizerBase, max_length: int
) -> Encoded:
    """Tokens of each text or pair, as `tokenizer(..., truncation=True, max_length=max_length)` gives them."""
    if tokenizer.is_fast:
        backend = tokenizer.backend_tokenizer
        backend.enable_truncation(max_length, strategy="longest_first", direction=tokenizer.truncation_side)
        backend.no_padding()
        backend.encode_special_tokens = tokenizer.split_special_tokens
    if len(texts) < CACHED_FROM or not tokenizer.is_fast:
        return _encode(texts, tokenizer, max_length)
    key = _key(texts, tokenizer, max_length)
    path = _folder() / f"{key}.safetensors"
    encoded = _read(path, key)
    if encoded is None:
        encoded = _encode(texts, tokenizer, max_length)
        _write(path, key, encoded)
    return encoded


def _encode(
    texts: Sequence[tuple[str, ...]], tokenizer: transformers.PreTrainedTokenizerBase, max_length: int
) -> Encoded:
    # They grow in place: a list of parts would take the memory twice when it is joined.
    grown = {name: array(code) for name, code in (("input_ids", "i"), ("token_type_ids", "b"))}
    lengths: list[int] = []
    cut = 0
    for first in range(0, len(texts), CHUNK):
        chunk = texts[first : first + CHUNK]
        if tokenizer.is_fast:  # `encode_batch_fast` leaves out the offsets, which take a third of the time
            encodings = tokenizer.backend_tokenizer.encode_batch_fast([text if text[1:] else text[0] for text in chunk])
            columns = {"input_ids": [e.ids for e in encodings]}
            if "token_type_ids" in tokenizer.model_input_names:
                columns["token_type_ids"] = [e.type_ids for e in encodings]
            cut += sum(bool(e.overflowing) for e in encodings)
        else:
            given = [list(column) for column in zip(*chunk, strict=True)]
            whole = tokenizer(*given)["input_ids"]
            columns = dict(tokenizer(*given, truncation=True, max_length=max_length))
            cut += sum(len(ids) > max_length for ids in whole)
        lengths += map(len, columns["input_ids"])
        for name, ids in grown.items():
            ids.extend(chain.from_iterable(columns.get(name, ())))
    inputs = {name: np.frombuffer(ids, f"i{ids.itemsize}") for name, ids in grown.items() if ids}
    return Encoded(inputs, np.array(lengths), cut)


# --- The cache


def _folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "delora" / "tokens"


def _key(texts: Sequence[tuple[str, ...]], tokenizer: transformers.PreTrainedTokenizerBase, max_length: int) -> str:
    """A hash of all that decides what `_encode` gives."""
    versions = [importlib.metadata.version(package) for package in ("tokenizers", "transformers")]
    about = [FORMAT, versions, max_length, "token_type_ids" in tokenizer.model_input_names]
    digest = hashlib.sha256(json.dumps(about).encode())
    digest.update(tokenizer.backend_tokenizer.to_str().encode())
    for text in texts:
        for part in text:
            data = part.encode()
            digest.update(b"%d " % len(data) + data)
        digest.update(b"\n")
    return digest.hexdigest()


def _read(path: Path, key: str) -> Encoded | None:
    """What the file holds, or None where it is not whole or not this key's."""
    try:
        if not path.is_file() or path.stat().st_size > CACHE_BYTES:
            return None
        with safetensors.safe_open(path, "numpy") as file:
            about = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, safetensors.SafetensorError):
        return None
    if about.get("key") != key or about.get("sha256") != _content_hash(arrays):
        return None
    lengths_S, cut = arrays.pop("lengths"), arrays.pop("cut")
    with contextlib.suppress(OSError):
        os.utime(path)  # used now
    return Encoded(arrays, lengths_S, int(cut[0]))


def _write(path: Path, key: str, encoded: Encoded) -> None:
    """Keeps what was encoded, and makes room for it. That it cannot be kept is no reason to end."""
    arrays = {**encoded.inputs, "lengths": encoded.lengths_S, "cut": np.array([encoded.cut])}
    if sum(array.nbytes for array in arrays.values()) > CACHE_BYTES // 2:
        return
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        _make_room(path.parent, CACHE_BYTES // 2)
        file, temporary = tempfile.mkstemp(prefix=".", suffix=".tmp", dir=path.parent)
        os.close(file)
        about = {"key": key, "sha256": _content_hash(arrays)}
        safetensors.numpy.save_file(arrays, temporary, about)
        os.replace(temporary, path)
    except (OSError, safetensors.SafetensorError) as error:
        logger.info("the tokens are not kept for the next run: %s", error)
        if temporary:
            with contextlib.suppress(OSError):
                os.unlink(temporary)


def _make_room(folder: Path, most: int) -> None:
    """Removes those files that were not used for longest, so that the others take at most so many bytes."""
    files = []
    for path in folder.iterdir():
        with contextlib.suppress(OSError):  # another process has just removed it
            about = path.lstat()
            if path.name.endswith(".safetensors"):
                files.append((about.st_mtime, about.st_size, path))
            elif path.name.endswith(".tmp") and time.time() - about.st_mtime > STALE_SECONDS:
                path.unlink()  # of a process that was killed
    kept = 0
    for _, size, path in sorted(files, reverse=True):
        kept += size
        if kept > most:
            path.unlink(missing_ok=True)


def _content_hash(arrays: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name, values in sorted(arrays.items()):
        digest.update(f"{name} {values.dtype} {values.shape} ".encode())
        digest.update(np.ascontiguousarray(values).data)
    return digest.hexdigest()
