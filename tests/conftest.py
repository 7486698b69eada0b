import functools
import importlib.util
import os
import signal
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import OverrideType
from omegaconf import DictConfig, OmegaConf

from delora.cli import conf_folder
from delora.config import Trial
from delora.methods.base import find

# Commands under test are interrupted; from a shell in the background they would inherit that SIGINT is ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)

# The methods of conf/method that train several trials together.
METHODS = [
    path.stem
    for path in sorted((conf_folder() / "method").glob("*.yaml"))
    if not find(OmegaConf.load(path)["_target_"]).alone
]
NARROWEST = 32  # width of an encoder of these tests: the ranks of methods that somebody adds may be above
GROUPS = {path.name for path in conf_folder().iterdir() if path.is_dir()}


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data and reference vectors beside the checkout."""
    folder = Path(__file__).resolve().parents[2] / "shared"
    if not folder.is_dir():
        reason = "no folder 'shared' beside the checkout: real GLUE files and reference vectors are not there"
        if os.environ.get("CI") or os.environ.get("DELORA_REQUIRE_SHARED"):
            pytest.fail(reason)
        pytest.skip(reason)
    return folder


def load_script(name: str) -> ModuleType:
    """A script as a module."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parents[1] / "scripts" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def compose_trial(*overrides: str) -> Trial:
    """The trial that a command line with these overrides runs.

    What chooses an option of a group is composed once: that takes Hydra a third of a second, setting a value none.
    """
    choices, values = [], {}
    for override in OverridesParser.create().parse_overrides(list(overrides)):
        key = override.key_or_group
        if override.type is OverrideType.CHANGE and key not in GROUPS and not isinstance(override.value(), dict):
            values[key] = override.value()
        else:
            choices.append(str(override.input_line))
    config = _composed(*choices).copy()
    for key, value in values.items():
        OmegaConf.update(config, key, value)
    return Trial.from_config(config)


@functools.cache
def _composed(*choices: str) -> DictConfig:
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        config = compose("config", overrides=list(choices))
    if (config.method.get("rank") or 0) > NARROWEST:
        config.method.rank = NARROWEST
    return config


def compose_trials(common: Iterable[str], values: Iterable[dict[str, object]]) -> list[Trial]:
    """Trials that differ in values by dotted key; composed once, which is what takes time."""
    composed, trials = _composed(*common), []
    for own in values:
        config = composed.copy()
        for key, value in own.items():
            OmegaConf.update(config, key, value)
        trials.append(Trial.from_config(config))
    return trials


SMALL = ["model=tiny", "data=synthetic", "data.rows.train=64", "data.rows.validation=40", "logger=none"]
SMALL += ["epochs=2", "batch_size=16", "max_length=64", "device=cpu"]
FEW = ["data.rows.train=16", "data.rows.validation=16"]  # after SMALL, where no score matters
RUN = [sys.executable, "-m", "delora.cli"]
OFFLINE = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def command(*arguments: str, cwd: Path, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Runs delora-run in a process of its own."""
    environment = os.environ | OFFLINE | (env or {})
    return subprocess.run(
        [*RUN, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, timeout=240, check=False
    )
