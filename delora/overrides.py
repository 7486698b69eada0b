"""The words of a command, KEY=VALUE and GROUP=OPTION, checked against conf/ before anything heavy is loaded.

Hydra stops at the first fault and knows no types; this finds all faults at once. Hydra's own keys pass, all but those
that would lead a run astray.
"""

import hashlib
import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, IntervalSweep, Override, RangeSweep
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from delora.config import (
    MISSING,
    NOT_THE_TRIAL,
    ROWS,
    ConfigError,
    Fault,
    Trial,
    did_you_mean,
    expected,
    name_of,
    nearest,
)
from delora.errors import UserError
from delora.search import dimension

MOST_TRIALS = 100_000  # of a sweep
OURS = ("fleet", "basic")  # sweepers that run all combinations; others look for the best one

# Quoted text and references, which stay as they are, or text without the signs that hold lists and calls together.
_PIECES = re.compile(r"""'[^']*'|"[^"]*"|\$\{[^}]*\}|[^'"\[\](){},]+""")
_OPEN = re.compile(r"method\.config\.")  # how keys begin that conf has not: options of another library's
_BARE = re.compile(r"[\w/\\+.$%*@?|:=\s-]*", re.ASCII)  # what Hydra's grammar takes without quotes


def tidy(words: Iterable[str]) -> list[str]:
    """The words as Hydra takes them: flags first, `+experiment=x` as `experiment=x`, quotes around `~/glue` and `结果`.

    The config has each group and key already, so that nothing has to be added to it, but below `method.config`.
    """
    plain = [_quoted(re.sub(r"^\+{1,2}(?!hydra[./])", "", word)) for word in words]
    plain = [f"++{word}" if _OPEN.match(word) else word for word in plain]
    return sorted(plain, key=lambda word: "=" in word and not word.startswith("-"))


def with_encoders(words: Iterable[str], folders: Iterable[Path]) -> list[str]:
    """The words with an option for each encoder that is given by its place: model=FOLDER or model=ORG/NAME.

    Options of the group `model` go before folders of the same name. model.source=... takes the place of model=...

    Args:
        words: the command's arguments that are no flags, after `tidy`.
        folders: folders of configs.
    """
    roots = [folder / "model" for folder in folders]
    known = {path.relative_to(root).with_suffix("").as_posix() for root in roots for path in root.rglob("*.yaml")}
    words = list(words)
    if any(re.match(r"model\.source=(?!null$|\$)", word) for word in words):
        words = [word for word in words if not word.startswith("model=")]
    return [_with_encoders(word, known) for word in words]


def _with_encoders(word: str, known: Collection[str]) -> str:
    key, _, values = word.partition("=")
    if key not in ("model", "model.source") or values in ("", "null") or "${" in values:
        return word
    before, values, after = re.fullmatch(r"(choice\()?(.*?)((?(1)\)))", values).groups()  # type: ignore[union-attr]
    options = []
    for value in re.findall(r"'[^']*'|\"[^\"]*\"|[^,]+", values):
        text = value.strip()
        text = text[1:-1] if re.fullmatch(r"'.*'|\".*\"", text) else text
        is_place = "/" in text or text.startswith(("~", ".")) or Path(text).is_dir()
        if key == "model" and (text in known or not is_place):
            options.append(value)
            continue
        options.append(f"{name_of(text)}-{hashlib.sha256(text.encode()).hexdigest()[:6]}")
        node = {"name": None, "source": text, "revision": None, "sha256": None, "shape": None}
        ConfigStore.instance().store(group="model", name=options[-1], node=node)
    return f"model={before or ''}{','.join(options)}{after}"


def check(
    words: Sequence[str], conf: Path, *, multirun: bool, config: str = "config", more: Path | None = None
) -> None:
    """Finds all that is wrong with the words.

    Each value of a sweep is checked, but not each combination of values.

    Args:
        words: the command's arguments that are no flags, after `tidy`.
        conf: the folder of configs.
        multirun: whether a word may hold several values.
        config: the name of the primary config.
        more: another folder of configs, Hydra's --config-dir.

    Raises:
        ConfigError: with all faults together.
    """
    if more is not None and not more.is_dir():
        raise ConfigError([f"--config-dir {more}: no such folder"])
    with initialize_config_dir(str(conf), version_base="1.3"):
        faults = _Command(words, [conf, *([more.absolute()] if more else [])], multirun, config).faults
    if faults:
        raise ConfigError(faults)


def _quoted(word: str) -> str:
    """The word with quotes around values that hold letters or signs which Hydra's grammar lacks, as paths may."""
    key, sign, value = word.partition("=")
    if word.startswith("-") or value.startswith("="):
        return word
    return key + sign + _PIECES.sub(lambda found: _quoted_piece(found[0]), value)


def _quoted_piece(piece: str) -> str:
    if piece[0] in "'\"" or piece.startswith("${") or "\\" in piece or _BARE.fullmatch(piece):
        return piece
    return f"'{piece}'"


class _Command:
    """The overrides of a command, with all that is wrong with them in `faults`."""

    def __init__(self, words: Sequence[str], folders: Sequence[Path], multirun: bool, config: str):
        self.faults: list[object] = []
        self._multirun, self._config = multirun, config
        overrides = self._parse(words)
        self._searches = any(str(o.input_line) == "hydra/sweeper=search" for o in overrides)
        self._looks_for_best = any(o.key_or_group == "hydra/sweeper" and o.value() not in OURS for o in overrides)
        self.faults += [fault for override in overrides if (fault := _astray(override))]
        self._folders = [*folders, *_search_path(overrides)]
        groups = {path.name for folder in self._folders for path in folder.iterdir() if path.is_dir()}
        groups.discard("hydra")
        self._options = {group: self._list(group) for group in sorted(groups)}
        self._count_trials(overrides)
        own = [override for override in overrides if not override.is_hydra_override() and self._is_plain(override)]
        choices = {o.key_or_group: self._choose(o) for o in own if o.key_or_group in self._options}
        values = {o.key_or_group: self._values(o) for o in own if o.key_or_group not in self._options}
        self._check_own_sweeps(choices.get("experiment", []), values)
        composed = [self._compose(choice) for choice in _each_once(choices)]
        configs = [config for config in composed if config is not None]
        self._check_keys(values, configs)
        self._check_values(values, configs)

    def _list(self, group: str) -> list[str]:
        """The options of a group, those of its folders as folder/option."""
        roots = [folder / group for folder in self._folders]
        paths = {path.relative_to(root).with_suffix("") for root in roots for path in root.rglob("*.yaml")}
        return sorted(path.as_posix() for path in paths)

    def _parse(self, words: Sequence[str]) -> list[Override]:
        parser = OverridesParser.create(GlobalHydra.instance().config_loader())
        overrides = []
        for word in words:
            try:
                if word.startswith("="):
                    raise HydraException("no key")
                overrides += parser.parse_overrides([word])
            except HydraException:
                self.faults.append(f"{word}: {_unreadable(word)}")
        return overrides

    def _is_plain(self, override: Override) -> bool:
        """Whether the word sets one key; the config's keys are neither removed nor moved."""
        key = override.get_key_element()
        if override.is_delete():
            self.faults.append(f"{key}: no key can be left out; set it to another value")
        elif override.package is not None:
            self.faults.append(f"{key}: no group can be put elsewhere (@)")
        else:
            return True
        return False

    def _count_trials(self, overrides: Sequence[Override]) -> None:
        """Refuses a sweep of more trials than can be told apart, before it is expanded."""
        if any(override.key_or_group == "hydra/sweeper" for override in overrides):
            return  # that sweeper has a number of its own
        counts = {str(o.input_line): _count(o) for o in overrides if o.is_sweep_override()}
        if (trials := math.prod(counts.values())) > MOST_TRIALS:
            words = " ".join(word for word, count in counts.items() if count > 1)
            self.faults.append(f"{words}: {trials:,} trials, a sweep has at most {MOST_TRIALS:,}")

    def _values(self, override: Override) -> list[Any]:
        """The value, or each value of a sweep."""
        if not override.is_sweep_override():
            return [override.value()]
        sweep = override.value()
        message = self._not_to_sweep(override.key_or_group, sweep)
        if self._searches and message is None:
            try:
                dimension(override)
            except UserError as error:
                message = str(error)
        if message:
            self.faults.append(f"{override.input_line}: {message}")
        if isinstance(sweep, IntervalSweep):
            return [sweep.start, sweep.end] if self._looks_for_best else []
        if isinstance(sweep, RangeSweep) and _count(override) > MOST_TRIALS:
            return [sweep.start]
        try:
            values = [Override._convert_value(value) for value in override.sweep_iterator()]  # type: ignore[arg-type]
        except (HydraException, ValueError, ArithmeticError):  # a range in steps of 0, or from nan
            values = []
        if not values and not message:
            self.faults.append(f"{override.input_line}: holds no value")
        return values

    def _not_to_sweep(self, key: str, sweep: object) -> str | None:
        """Why a key cannot have several values."""
        if not self._multirun:
            return "several values need -m, which runs each; a list is written [a,b]"
        same = [shared for shared in NOT_THE_TRIAL if shared not in ROWS]
        if any(key == shared or key.startswith(f"{shared}.") for shared in same):
            return "has one value for all trials: it says where or how they run, not what they are"
        if isinstance(sweep, IntervalSweep) and not self._looks_for_best:
            return "an interval needs hydra/sweeper=search, which looks for the best; for all values: a,b,c"
        return None

    def _choose(self, override: Override) -> list[str]:
        """The options chosen from a group; for a misspelt one the nearest, to find what else is wrong."""
        group, known = override.key_or_group, self._options[override.key_or_group]
        chosen: list[str] = []
        for value in self._values(override):
            if value in known or ConfigStore.instance().get_type(f"{group}/{value}.yaml") is ObjectType.CONFIG:
                chosen.append(value)
                continue
            self.faults.append(Fault(group, value, expected(value, known)))
            chosen += [near] if (near := nearest(str(value), known)) else []
        return chosen

    def _compose(self, choice: Mapping[str, str]) -> DictConfig | None:
        words = [f"{group}={option}" for group, option in choice.items()]
        search = ",".join(f"'file://{folder}'" for folder in self._folders[1:])
        try:
            config = compose(self._config, [*words, f"hydra.searchpath=[{search}]"])
            if {"experiment", "method"} <= choice.keys():
                plain = compose(self._config, [f"method={choice['method']}", f"hydra.searchpath=[{search}]"])
                message = f"set by experiment={choice['experiment']}, but method={choice['method']} has no such key"
                keys = [key for key in config.method if key not in plain.method]
                self.faults += [Fault(f"method.{key}", config.method[key], message) for key in keys]
            return config
        except Exception as error:  # Hydra's, and whatever a file of the user's makes it stumble over
            told = "its files refer to themselves" if isinstance(error, RecursionError) else str(error) or repr(error)
            told = told.partition("\n    full_key")[0]  # where OmegaConf was just then
            self.faults += self._unreadable_files() or [": ".join(filter(None, (" ".join(words), told)))]
            return None

    def _unreadable_files(self) -> list[str]:
        """What is wrong with configs that the user has added."""
        faults = []
        for path in (path for folder in self._folders[1:] for path in sorted(folder.rglob("*.yaml"))):
            try:
                yaml.safe_load(path.read_text(encoding="utf-8"))
            except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
                place = getattr(error, "problem_mark", None)
                line = f", line {place.line + 1}" if place else ""
                faults.append(f"{path}{line}: {getattr(error, 'problem', None) or error}")
        return faults

    def _check_own_sweeps(self, experiments: Sequence[str], values: Mapping[str, Any]) -> None:
        """Hydra reads what an experiment sweeps over by itself only where the experiment is not swept over."""
        if len(experiments) < 2:
            return
        own = {key: value for experiment in experiments for key, value in self._own_sweep(experiment).items()}
        lacking = [f"{key}={value}" for key, value in own.items() if key not in values]
        if lacking:
            names = ",".join(experiments)
            self.faults.append(f"experiment={names}: their own sweeps need one experiment; add {' '.join(lacking)}")

    def _own_sweep(self, experiment: str) -> Mapping[str, Any]:
        with suppress(Exception):  # a file that cannot be read is told of elsewhere
            paths = [folder / "experiment" / f"{experiment}.yaml" for folder in self._folders]
            loaded = yaml.safe_load(next(path for path in paths if path.exists()).read_text(encoding="utf-8"))
            inherited = [self._own_sweep(entry) for entry in loaded.get("defaults", ()) if isinstance(entry, str)]
            own = loaded.get("hydra", {}).get("sweeper", {}).get("params", {})
            return {key: value for sweep in (*inherited, own) for key, value in sweep.items()}
        return {}

    def _check_keys(self, values: Mapping[str, list[Any]], configs: Sequence[DictConfig]) -> None:
        for key in values:
            for config in configs:
                if key not in _keys(config) and not (_OPEN.match(key) and key.rpartition(".")[0] in _keys(config)):
                    self.faults.append(Fault(key, MISSING, self._no_such_key(key, config)))

    def _no_such_key(self, key: str, config: DictConfig) -> str:
        keys = _keys(config)
        part, _, last = key.rpartition(".")
        siblings = [k.rpartition(".")[2] for k in keys if k.rpartition(".")[0] == part]
        if part in self._options and part in keys:
            chosen = f"{part}={config[part].name or name_of(config[part].source)}"
            if owners := [o for o in self._options[part] if last in self._option_keys(part, o)]:
                return f"{chosen} has no such key; it belongs to {part}={','.join(owners)}"
            if near := nearest(last, siblings):
                return f"{chosen} has no such key; did you mean {part}.{near}?"
            return f"{chosen} has no such key; it has {', '.join(siblings)}"
        if near := nearest(last, siblings):
            return f"no such key; did you mean {f'{part}.{near}' if part else near}?"
        namesakes = [k for k in keys if k.rpartition(".")[2] == last]
        for group, options in self._options.items():
            owners = [option for option in options if key in self._option_keys(group, option)]
            if owners and not namesakes:
                return f"no such key; did you mean {group}.{key}, of {group}={','.join(owners)}?"
        return f"no such key{did_you_mean(namesakes[0] if namesakes else key, keys)}"

    @cache  # noqa: B019  (one command a process)
    def _option_keys(self, group: str, option: str) -> list[str]:
        paths = [folder / group / f"{option}.yaml" for folder in self._folders]
        with suppress(Exception):  # the option that was chosen is told of elsewhere
            return [str(key) for path in paths if path.exists() for key in OmegaConf.load(path)]
        return []

    def _check_values(self, values: Mapping[str, list[Any]], configs: Sequence[DictConfig]) -> None:
        """The first values in each config, and each other value with the first ones of the other keys."""
        first = {key: several[0] for key, several in values.items() if several}
        known = [set(_keys(config)) for config in configs]
        bases = [config.copy() for config in configs]
        for base, keys in zip(bases, known, strict=True):
            self._set(base, {key: value for key, value in first.items() if key in keys or _OPEN.match(key)})
            self.faults += Trial.check(base)[1]
        for key, several in values.items():
            having = next((b for b, keys in zip(bases, known, strict=True) if key in keys or _OPEN.match(key)), None)
            if having is None or not several[1:]:
                continue
            changed = having.copy()  # for all values, each of which takes the place of the one before
            for value in several[1:]:
                if isinstance(value, Mapping):  # is merged with what is there
                    changed = having.copy()
                self._set(changed, {key: value})
                self.faults += Trial.check(changed)[1]

    def _set(self, config: DictConfig, values: Mapping[str, Any]) -> None:
        for key, value in values.items():
            try:
                OmegaConf.update(config, key, value, force_add=_OPEN.match(key) is not None)
            except OmegaConfBaseException as error:
                self.faults.append(Fault(key, value, str(error).splitlines()[0]))


def _count(override: Override) -> int:
    """How many values a word stands for, as far as that is known without expanding it."""
    sweep = override.value()
    if isinstance(sweep, ChoiceSweep):
        return len(sweep.list)
    if isinstance(sweep, RangeSweep) and sweep.step:
        steps = (sweep.stop - sweep.start) / sweep.step  # type: ignore[operator]
        return math.ceil(min(steps, 1e18)) if steps > 0 else 0
    return 1


def _unreadable(word: str) -> str:
    """Why Hydra's grammar has no place for a word."""
    if "=" not in word:
        return "expected KEY=VALUE, such as lr=1e-3"
    if not re.match(r"[\w./@+~$-]+=", word, re.ASCII):
        return "no such key"
    if re.search(r"[=,]\s*,|,\s*$", word):
        return "a value is missing beside a comma"
    return "cannot be read as KEY=VALUE; signs and spaces need quotes: 'KEY=\"a = b\"'"


def _astray(override: Override) -> object | None:
    """What is wrong with a word of Hydra's that would end in the midst of it, or lead the run astray."""
    if override.is_hydra_override() and override.is_sweep_override():
        return f"{override.input_line}: Hydra's own keys have one value"
    key = override.key_or_group
    value: Any = override.value()
    if key.startswith("hydra/") and value is None:
        return Fault(key, value, "expected the name of an option")
    if key in ("hydra.launcher._target_", "hydra.sweeper._target_"):
        group = key.removesuffix("._target_").replace(".", "/")
        return Fault(key, value, f"is chosen by name, as in {group}=basic")
    if key == "hydra.job.chdir" and value is not False:
        return Fault(key, value, "runs stay in the folder of the command; results go to output_dir")
    if key == "hydra.searchpath" and (lost := [path for path in _paths(value) if not path.is_dir()]):
        return Fault(key, value, f"no such folder: {', '.join(map(str, lost))}")
    return None


def _search_path(overrides: Iterable[Override]) -> list[Path]:
    """The folders that hydra.searchpath adds."""
    values = [o.value() for o in overrides if o.key_or_group == "hydra.searchpath"]
    return [path.absolute() for value in values for path in _paths(value) if path.is_dir()]


def _paths(search_path: object) -> list[Path]:
    """The folders of a search path; it may also name Python packages, pkg://."""
    paths = map(str, search_path) if isinstance(search_path, list) else ()
    return [Path(path.removeprefix("file://")) for path in paths if not path.startswith("pkg://")]


def _each_once(choices: Mapping[str, list[str]]) -> list[dict[str, str]]:
    """Choices that hold each option at least once, the first of each group beside the others' options."""
    first = {group: options[0] for group, options in choices.items() if options}
    return [
        first,
        *({**first, group: option} for group, options in choices.items() for option in options[1:]),
    ]


def _keys(config: DictConfig) -> list[str]:
    """The dotted keys of a config, groups of keys included."""

    def walk(node: Mapping[Any, Any], prefix: str) -> Iterable[str]:
        for key, value in node.items():
            yield f"{prefix}{key}"
            if isinstance(value, dict):
                yield from walk(value, f"{prefix}{key}.")

    return list(walk(OmegaConf.to_container(config, resolve=False), ""))  # type: ignore[arg-type]
