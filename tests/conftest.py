import os
from pathlib import Path

import pytest


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
