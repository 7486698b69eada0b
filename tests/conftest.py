import os
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from delora.cli import conf_folder
from delora.config import Trial


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


def compose_trial(*overrides: str) -> Trial:
    """The trial that a command line with these overrides runs."""
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        return Trial.from_config(compose("config", overrides=list(overrides)))
