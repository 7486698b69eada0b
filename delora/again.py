"""Repeating a trial from its stored config, and what tells the repetition from the first. Imports no torch."""

import sys
from collections.abc import Sequence
from pathlib import Path

import yaml  # type: ignore[import-untyped]
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from delora import storage, winner
from delora.cli import conf_folder
from delora.config import ConfigError, look_up
from delora.errors import UserError
from delora.metrics import OF_CLASSES, OF_SCORES
from delora.storage import Result, StoredTrial
from delora.terminal import printable

NAME = "again"  # of the primary config, which no file of conf/ has
# Keys that a repetition does not take from the first: where it goes, and how it is run beside others.
OWN = ("name", "sweep", "output_dir", "plan", "resume", "on_error", "fleet")
# Of what made a result: where from, which makes no difference where the hashes are the same.
UNTOLD = ("start.source", "weights.source", "data.source", "data.published")


def known_packages() -> set[str]:
    """The packages with an encoder that conf/model names."""
    options = [OmegaConf.load(path) for path in (conf_folder() / "model").glob("*.yaml")]
    named = [option.package for option in options if "package" in option]
    return {package for names in named for package in ([names] if isinstance(names, str) else names)}


def check_source(folder: Path | str, target: str, packages: Sequence[str], known: Sequence[str], way: str) -> None:
    """Refuses to run what a folder names, which may be a stranger's, but for code that is known.

    Args:
        target: the class of the trial's method.
        packages: those of its encoder.
        known: classes that are known beside those of `delora.methods`.
        way: what to do about one's own class.

    Raises:
        UserError: the method or a package is not known.
    """
    if target not in known and not target.startswith("delora.methods."):
        raise UserError(f"{folder}: trained with {target}, which is no method of delora; if it is yours: {way}")
    if unknown := set(packages) - known_packages():
        raise UserError(f"{folder}: its encoder is in {', '.join(sorted(unknown))}, which no file of conf/model names")


def take(folder: str, words: Sequence[str]) -> StoredTrial:
    """The trial in a folder; Hydra has a primary config `NAME` then that repeats it.

    It goes to the name of its folder with "-again" in the output folder of any run.

    Args:
        words: KEY=VALUE words of the command.

    Raises:
        UserError: the folder holds no trial that has ended, its config is not of delora-run, or a word chooses an
            option of a group.
    """
    groups = {path.name for path in conf_folder().iterdir() if path.is_dir()} - {"hydra"}
    faults = [
        f"{word}: --again keeps the trial's {key}; its keys can be changed, as in method.rank=4 or logger.mode=disabled"
        for word in words
        if (key := word.partition("=")[0].lstrip("+~")) in groups
    ]
    if faults:
        raise ConfigError(faults)
    stored = winner.trial_in(folder)
    values = stored.result["config"]
    given = {key: value for key, sign, value in (word.partition("=") for word in words) if sign}
    flat = storage.flatten(values)
    if odd := [key for key, value in flat.items() if "${" in str(value) or "???" in str(value)]:
        raise UserError(printable(f"{folder}: {odd[0]}={flat[odd[0]]} is no value of a resolved config"))
    target, packages = str(flat.get("method._target_")), flat.get("model.package") or ()
    packages = [packages] if isinstance(packages, str) else packages
    check_source(folder, target, packages, [given.get("method._target_", "")], f"method._target_={target}")
    metric = [name for name in look_up(values, "task.metric") or () if name not in (*OF_CLASSES, *OF_SCORES)]
    if metric and "task.metric" not in given:  # evaluate would run its script
        told = f"scored by {metric[0]}, which is none of delora's metrics; if you know it: task.metric=[{metric[0]}]"
        raise UserError(printable(f"{folder}: {told}"))
    plain = yaml.safe_load((conf_folder() / "config.yaml").read_text(encoding="utf-8"))
    hydra_s = [entry for entry in plain["defaults"] if any(str(key).startswith("override hydra/") for key in entry)]
    plain |= {"defaults": ["_self_", *(entry for entry in hydra_s if isinstance(entry, dict))]}
    plain |= {key: value for key, value in values.items() if key not in OWN}
    plain["method"] = {"start": None, **values["method"]}
    plain["name"] = f"{Path(folder).resolve().name[:94]}-again"
    ConfigStore.instance().store(NAME, plain)
    return stored


def differences(first: Result, second: Result) -> list[str]:
    """Lines, for people, of what differs between a trial and its repetition: config, what made them, best scores."""
    before, after = ({"status": result["status"], "best": result["best"]} for result in (first, second))
    return [
        *storage.differences(first["config"], second["config"], (*OWN, "logger")),
        *storage.differences(first["made_by"], second["made_by"], UNTOLD),
        *storage.differences(before, after),
    ]


def say_versions(first: StoredTrial) -> None:
    """Prints, before anything is trained, which versions are not those that made the trial; on standard error."""
    now = storage.versions()
    made_by = {key: value for key, value in first.result["made_by"].items() if key in now}
    if lines := storage.differences(made_by, now):
        told = "\n".join([f"{first.folder} was made by other versions than those here:", *lines])
        print(printable(told), file=sys.stderr)


def say_differences(first: StoredTrial, second: Result) -> None:
    """Prints what tells a repetition from the first."""
    lines = differences(first.result, second)
    same = f"the same config, versions, data, weights and scores as {first.folder}"
    print(printable("\n".join([f"what differs from {first.folder}:", *lines] if lines else [same])))
