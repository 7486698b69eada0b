"""Hydra's plugins for `delora-run -m`: Hydra finds them by the name of this folder."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict

from delora.storage import flatten

if TYPE_CHECKING:
    from delora.config import Trial


class FleetLauncher(Launcher):
    """Trains the jobs of a multirun together, as many at a time as can share an encoder.

    A job returns what `delora.cli.train` does: its score, for sweepers that look for the best.

    Attributes:
        shows: whether the results of each launch are printed.
    """

    shows = True

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.context, self.config = hydra_context, config
        self.groups = set(hydra_context.config_loader.list_groups(""))
        self.composed: dict[tuple[str, ...], DictConfig] = {}
        self.plain: dict[tuple[str, ...], PlainConfig | None] = {}

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        from delora.cli import train

        trials = self.trials(job_overrides)
        scores = train(trials, shows=self.shows)
        if trials[0].plan:
            raise SystemExit(0)  # a sweeper that looks for the best would go on
        jobs = zip(job_overrides, scores, strict=True)
        return [JobReturn(list(words), status=JobStatus.COMPLETED, _return_value=score) for words, score in jobs]

    def trials(self, job_overrides: Sequence[Sequence[str]]) -> "list[Trial]":
        """The trial of each job.

        Jobs with the same options that set the same keys share one composed config, in which the values of each take
        the place of those before: composing a config takes a tenth of a second, copying one a thousandth.
        """
        from delora.config import Trial

        parser = OverridesParser.create(self.context.config_loader)
        parsed = {word: parser.parse_override(word) for word in {word for words in job_overrides for word in words}}
        jobs = [[parsed[word] for word in words] for words in job_overrides]
        return [self.of_values(job) or Trial.from_config(self.compose(job)) for job in jobs]

    def of_values(self, overrides: Sequence[Override]) -> "Trial | None":
        """The trial of a job whose words set plain values, if it has no fault: in a tenth of OmegaConf's time."""
        from delora.config import Trial

        values, key = self._parts(overrides)
        if not all(isinstance(v, bool | int | float | str | None) and not is_reference(v) for v in values.values()):
            return None
        if key not in self.plain:
            self._compose(key, values)
            self.plain[key] = PlainConfig.of(self.composed[key])
        plain = self.plain[key]
        config = plain.with_values(values) if plain else None
        return Trial.check(config)[0] if config else None

    def compose(self, overrides: Sequence[Override]) -> DictConfig:
        """The config of a job, as it is until the next call."""
        values, key = self._parts(overrides)
        self._compose(key, values)
        config = self.composed[key]
        held = [OmegaConf.select(config, name, throw_on_resolution_failure=False) for name in values]
        if any(isinstance(value, dict | DictConfig) for value in (*values.values(), *held)):
            config = config.copy()  # a part is not replaced: what it is set to is merged with what it holds
        for name, value in values.items():
            OmegaConf.update(config, name, value)
        return config

    def _parts(self, overrides: Sequence[Override]) -> tuple[dict[str, Any], tuple[str, ...]]:
        """The values that are set, and what decides which config they are set in."""
        values = {o.key_or_group: o.value() for o in overrides if self._is_value(o)}
        return values, (*(str(o.input_line) for o in overrides if not self._is_value(o)), *values)

    def _compose(self, key: tuple[str, ...], values: Mapping[str, Any]) -> None:
        if key not in self.composed:
            rest = list(key[: len(key) - len(values)])
            self.composed[key] = self.context.config_loader.load_sweep_config(self.config, rest)
            with open_dict(self.composed[key]):
                self.composed[key].pop("hydra")

    def _is_value(self, override: Override) -> bool:
        """Whether a word sets a value, and does not choose an option of a group."""
        changed = override.is_add() or override.is_force_add() or override.is_delete() or override.is_hydra_override()
        return not changed and override.key_or_group not in self.groups


@dataclass(frozen=True)
class PlainConfig:
    """A composed config as plain data.

    Attributes:
        copies: the keys that are copies of other keys, ${method.base_lr}.
    """

    config: dict[str, Any]
    copies: Mapping[str, str]

    @classmethod
    def of(cls, composed: DictConfig) -> "PlainConfig | None":
        """None where OmegaConf has more to say than that keys are copies of others."""
        config: dict[str, Any] = OmegaConf.to_container(composed, resolve=False)  # type: ignore[assignment]
        copies = {}
        for key, value in flatten(config).items():
            if is_reference(value):
                found = re.fullmatch(r"\$\{(\w+(?:\.\w+)*)\}", str(value))
                if not found:
                    return None
                copies[key] = found[1]
        return cls(config, copies)

    def with_values(self, values: Mapping[str, Any]) -> dict[str, Any] | None:
        """The config with other values of some keys; None where a key holds more than a value, or is not there."""
        config = _copied(self.config)
        for key, value in values.items():
            part, name = _place(config, key)
            if name not in part or isinstance(part[name], dict | list):
                return None
            part[name] = value
        for key, of in self.copies.items():
            if key not in values:
                part, name = _place(config, of)
                copy = part.get(name)
                if name not in part or of in self.copies or isinstance(copy, dict | list):
                    return None
                part, name = _place(config, key)
                part[name] = copy
        return config


def is_reference(value: Any) -> bool:
    """Whether OmegaConf has more to say of a value than what is written."""
    return isinstance(value, str | list) and ("${" in str(value) or "???" in str(value))


def _copied(config: dict[str, Any]) -> dict[str, Any]:
    return {key: _copied(value) if isinstance(value, dict) else value for key, value in config.items()}


def _place(config: dict[str, Any], key: str) -> tuple[dict[str, Any], str]:
    """The part of a config in which a dotted key is, and its last name; an empty part where there is none."""
    *path, name = key.split(".")
    part: Any = config
    for one in path:
        part = part.get(one)
        if not isinstance(part, dict):
            return {}, name
    return part, name


class FleetSweeper(BasicSweeper):
    """Hydra's own sweeper, which here writes no file and leaves it to the launcher to compose the jobs."""

    launched = 0

    def parsed(self, arguments: list[str]) -> list[Override]:
        """The command's words, and those of an experiment's own sweep whose keys it has not."""
        assert self.hydra_context is not None
        parser = OverridesParser.create(config_loader=self.hydra_context.config_loader)
        given = parser.parse_overrides(arguments)
        keys = {override.key_or_group for override in given}  # take the place of what an experiment sweeps over
        theirs = parser.parse_overrides(self._parse_config())
        return [*(override for override in theirs if override.key_or_group not in keys), *given]

    def sweep(self, arguments: list[str]) -> Any:
        assert self.launcher is not None
        returns = []
        for batch in self.split_arguments(self.parsed(arguments), self.max_batch_size):
            returns.append(self.launcher.launch(batch, initial_job_idx=self.launched))
            _ = [job.return_value for job in returns[-1]]  # raises what a job of another launcher raised
            self.launched += len(batch)
        return returns


class SearchSweeper(FleetSweeper):
    """Looks for the config with the highest score on validation, in batches that the launcher trains."""

    def sweep(self, arguments: list[str]) -> Any:
        from delora.errors import UserError
        from delora.search import Search, dimension

        assert self.launcher is not None
        if isinstance(self.launcher, FleetLauncher):
            self.launcher.shows = False  # the search shows its own results when it is over
        overrides = {override.key_or_group: override for override in self.parsed(arguments)}  # the last of a key
        space = {}
        for key, override in overrides.items():
            if override.is_sweep_override():
                try:
                    space[key] = dimension(override)
                except UserError as error:  # of an experiment's own words: those of the command are checked before
                    raise UserError(f"{override.input_line}: {error}") from None
        words = [str(override.input_line) for key, override in overrides.items() if key not in space]
        Search(words, space, self._compose, self._launch).run()

    def _compose(self, words: list[str]) -> "Trial":
        from delora.config import Trial

        assert self.hydra_context is not None and self.config is not None
        config = self.hydra_context.config_loader.load_sweep_config(self.config, words)
        with open_dict(config):
            config.pop("hydra")
        return Trial.from_config(config)

    def _launch(self, jobs: list[list[str]]) -> list[float | None]:
        assert self.launcher is not None
        returns = self.launcher.launch(jobs, initial_job_idx=self.launched)
        self.launched += len(jobs)
        return [job.return_value for job in returns]  # raises what a job of another launcher raised
