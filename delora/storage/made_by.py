"""What made a result: versions, commit, hardware and inputs."""

import contextlib
import functools
import os
import platform
import subprocess
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, cast

from delora.storage.schema import DataOrigin, MadeBy, Origin

PACKAGES = ("torch", "transformers", "tokenizers", "datasets", "numpy", "safetensors", "hydra-core")


def provenance(
    *,
    device: str,
    precision: str,
    determinism: Mapping[str, Any],
    data: DataOrigin,
    weights: Origin,
    start: Origin | None = None,
) -> MadeBy:
    """What made a result: versions, commit, hardware and inputs; neither user, host nor paths.

    Args:
        device: the name of what computes, "cpu" or a GPU's name.
        start: the trial whose adapter training began with, its id as the source.
        determinism: what decides whether the same run gives the same bits: threads, algorithms, TF32.
    """
    made_by = {
        **versions(),
        "os": platform.platform(),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "device": device,
        "precision": precision,
        "determinism": dict(determinism),
        "data": data,
        "weights": weights,
        **({"start": start} if start else {}),
    }
    return cast(MadeBy, made_by)


def versions() -> dict[str, str | None]:
    """Of delora, with the commit of its checkout, of Python and of the packages that results depend on."""
    own = {"delora": _version("delora"), "commit": _commit(Path(__file__).parent), "python": platform.python_version()}
    return {**own, **{package: _version(package) for package in PACKAGES}}


@functools.cache
def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def cpu_name() -> str:
    """As the processor calls itself."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


@functools.cache
def _commit(package: Path) -> str | None:
    """The commit of the checkout that the package runs from; None where it was installed from a wheel."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    environment["GIT_OPTIONAL_LOCKS"] = "0"

    def git(*arguments: str) -> str:
        run = subprocess.run(
            ["git", *arguments],
            cwd=package,
            env=environment,
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
        return run.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "--", Path(__file__).name)  # an environment may lie in a foreign checkout
        return git("describe", "--always", "--abbrev=40", "--dirty", "--exclude=*")
    except (OSError, subprocess.SubprocessError):
        return None
