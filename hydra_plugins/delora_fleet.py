"""Hydra's plugins for `delora-run -m`: Hydra finds them by the name of this folder."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict

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
        return [Trial.from_config(self.compose([parsed[word] for word in words])) for words in job_overrides]

    def compose(self, overrides: Sequence[Override]) -> DictConfig:
        """The config of a job, as it is until the next call."""
        values = {o.key_or_group: o.value() for o in overrides if self._is_value(o)}
        rest = [str(o.input_line) for o in overrides if not self._is_value(o)]
        key = (*rest, *values)
        if key not in self.composed:
            self.composed[key] = self.context.config_loader.load_sweep_config(self.config, rest)
            with open_dict(self.composed[key]):
                self.composed[key].pop("hydra")
        config = self.composed[key]
        held = [OmegaConf.select(config, name, throw_on_resolution_failure=False) for name in values]
        if any(isinstance(value, dict | DictConfig) for value in (*values.values(), *held)):
            config = config.copy()  # a part is not replaced: what it is set to is merged with what it holds
        for name, value in values.items():
            OmegaConf.update(config, name, value)
        return config

    def _is_value(self, override: Override) -> bool:
        """Whether a word sets a value, and does not choose an option of a group."""
        changed = override.is_add() or override.is_force_add() or override.is_delete() or override.is_hydra_override()
        return not changed and override.key_or_group not in self.groups


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
