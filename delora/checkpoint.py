"""A checkpoint on this machine: where it lies, which files its weights are, their hash, and what its config.json says.

It may lie in a local folder, in the hub's cache or in installed packages (`delora.packaged`). Nothing here imports
torch, so that what cannot be trained on is refused within seconds.
"""

import functools
import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from delora import packaged
from delora.errors import UserError

# A checkpoint holds its weights under one of these, the first found is used.
WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
TOKENIZERS = ("tokenizer.json", "vocab.*", "*.model")
OTHER_FILES = ("*.json", "*.txt", "*.model")
SIZES = ("hidden_size", "intermediate_size", "max_position_embeddings", "num_attention_heads", "num_hidden_layers")
LARGEST_JSON = 64 * 2**20  # bytes
LFS = b"version https://git-lfs.github.com/spec/"  # how the files begin that Git LFS leaves in the place of others


# --- Where it lies


def find(source: str | None, revision: str | None = None, packages: tuple[str, ...] = ()) -> Path | None:
    """The folder of a checkpoint that is whole; None where it has to be fetched or joined first, or is not there."""
    if packages:
        return packaged.find(packages)
    if source is None:
        return None
    folder = Path(source).expanduser()
    if folder.is_dir():
        return None if lacking(folder) else folder
    try:
        return snapshot(source, revision, local_files_only=True)
    except ValueError:  # no id of a repository
        return None


def snapshot(source: str, revision: str | None, local_files_only: bool = False) -> Path | None:
    """The hub's files in the cache, with weights of one kind alone; fetched where they are not there.

    Raises:
        HfHubHTTPError, LocalEntryNotFoundError, ValueError: they cannot be fetched.
    """
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    for weights in ("model*.safetensors", "pytorch_model*.bin"):
        # Without the patterns that it was fetched by, the hub's library takes a snapshot in the cache for incomplete.
        patterns = [*OTHER_FILES, weights]
        try:
            folder = Path(
                huggingface_hub.snapshot_download(
                    source, revision=revision, allow_patterns=patterns, local_files_only=local_files_only
                )
            )
        except LocalEntryNotFoundError:
            if local_files_only:
                continue
            raise
        if not lacking(folder):
            return folder
    return None


def lacking(folder: Path) -> list[str]:
    """What a folder lacks to be a checkpoint; without a tokenizer's files transformers would make an empty one."""
    parts = {
        "config.json": (folder / "config.json").is_file(),
        f"weights ({' or '.join(WEIGHTS)})": weights_file(folder),
        f"a tokenizer ({' or '.join(TOKENIZERS)})": any(p.is_file() for t in TOKENIZERS for p in folder.glob(t)),
    }
    return [part for part, there in parts.items() if not there]


def commit(folder: Path) -> str | None:
    """The commit on the hub of a snapshot in its cache."""
    cached = folder.parent.name == "snapshots" and re.fullmatch(r"[0-9a-f]{40}", folder.name)
    return folder.name if cached else None


# --- Its config.json


def config(source: str | None, revision: str | None = None, packages: tuple[str, ...] = ()) -> dict[str, Any] | None:
    """What config.json says; None where it is not on this machine.

    Raises:
        UserError: it cannot be read, or is that of a model that cannot be trained here.
    """
    if packages:
        path = (packaged.find(packages) or Path()) / "config.json"
    elif source is None:
        return None
    else:
        path = Path(source).expanduser() / "config.json"
        if not path.parent.is_dir():
            path = _cached_config(source, revision) or path
    return read_config(path) if path.is_file() else None


def read_config(path: Path) -> dict[str, Any]:
    """What a config.json says. Raises UserError as `config` does."""
    state = path.stat()
    return _checked_config(path, state.st_size, state.st_mtime_ns)


def _cached_config(source: str, revision: str | None) -> Path | None:
    """config.json in the hub's cache."""
    import huggingface_hub
    from huggingface_hub.constants import HF_HUB_CACHE

    if not Path(HF_HUB_CACHE, f"models--{source.replace('/', '--')}").is_dir():
        return None  # without the seconds that the rest of the hub's library takes to be imported
    try:
        found = huggingface_hub.try_to_load_from_cache(source, "config.json", revision=revision)
    except ValueError:  # no id of a repository
        return None
    return Path(found) if isinstance(found, str) else None


@functools.lru_cache(maxsize=64)
def _checked_config(path: Path, size: int, modified: int) -> dict[str, Any]:
    """Size and time of the file are there for the cache alone."""
    config = read_json(path)
    if problem := _unfit(config):
        raise UserError(f"{path}: {problem}")
    return config


def _unfit(config: Mapping[str, Any]) -> str | None:
    """Why a model with this config.json cannot be trained here, as far as that alone tells."""
    kind = config.get("model_type")
    if not isinstance(kind, str) or not kind:
        return "names no model_type, the family of the encoder"
    if config.get("is_encoder_decoder"):
        return f"an encoder-decoder ({kind}) cannot be used, only an encoder"
    if config.get("is_decoder") or config.get("add_cross_attention"):
        return f"a decoder (is_decoder, {kind}) cannot be used, only an encoder"
    if config.get("quantization_config"):
        return "the weights are quantized (quantization_config): use the checkpoint that they were made from"
    for key, value in config.items():
        least = 1 if key in SIZES else 0 if key == "pad_token_id" and value is not None else None
        if least is not None and (type(value) is not int or value < least):
            return f"{key}={json.dumps(value)[:80]}, expected a whole number of at least {least}"
    return None


def read_json(path: Path) -> dict[str, Any]:
    """A checkpoint's file of JSON.

    Raises:
        UserError: it is none, or is no object.
    """
    refuse_lfs_pointer(path)
    if path.stat().st_size > LARGEST_JSON:
        raise UserError(f"{path}: larger than {LARGEST_JSON >> 20} MiB")
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: no JSON ({str(error).splitlines()[0]})") from error
    except RecursionError:
        raise UserError(f"{path}: no JSON that can be read (nested too deeply)") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a JSON object")
    return content


# --- Its weights


def weights_file(folder: Path) -> Path | None:
    """The weights of a checkpoint, or the index of their shards."""
    return next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)


def weights(folder: Path) -> list[Path]:
    """The files that hold the weights: one, or the shards that the index names, by name.

    Raises:
        UserError: there are none, the index is damaged or names other than its shards, or a file is not there.
    """
    path = weights_file(folder)
    if path is None:
        raise UserError(f"{folder} holds none of {', '.join(WEIGHTS)}")
    if path.suffix != ".json":
        refuse_lfs_pointer(path)
        return [path]
    shards = read_json(path).get("weight_map")
    if not isinstance(shards, dict) or not shards or not all(isinstance(name, str) for name in shards.values()):
        raise UserError(f"{path}: expected a weight_map that names the file of each tensor")
    suffix = path.name.removesuffix(".index.json").rpartition(".")[2]
    files = [folder / name for name in sorted(set(shards.values()))]
    for file, name in zip(files, sorted(set(shards.values())), strict=True):
        if not re.fullmatch(rf"[\w-][\w.-]*\.{suffix}", name):
            raise UserError(f"{path}: names {name!r}, expected .{suffix} files in the same folder")
        if not file.is_file():
            raise UserError(f"{path}: names {name}, which is not there")
        refuse_lfs_pointer(file)
    return files


def refuse_lfs_pointer(path: Path) -> None:
    """Raises UserError where Git LFS has left a pointer in the place of the file."""
    with path.open("rb") as file:
        if file.read(len(LFS)) == LFS:
            raise UserError(f"{path}: a pointer of Git LFS, not the file itself; `git lfs pull` fetches it")


def sha256(folder: Path) -> str:
    """The sha256 of the weights' file; of several that of their list, as `sha256sum model-*.safetensors | sha256sum`.

    Raises:
        UserError: as `weights`.
    """
    files = weights(folder)
    digests = [_sha256(file, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    if len(files) == 1 and not weights_file(folder).name.endswith(".json"):  # type: ignore[union-attr]
        return digests[0]
    listed = "".join(f"{digest}  {file.name}\n" for digest, file in zip(digests, files, strict=True))
    return hashlib.sha256(listed.encode()).hexdigest()


@functools.lru_cache(maxsize=64)
def _sha256(path: Path, size: int, modified: int) -> str:
    """Of a file; its size and time are there for the cache alone."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
