"""Compares parameter-efficient finetuning methods on GLUE."""

from typing import Any

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # Loading a model imports torch; importing the package must not.
    if name == "load":
        from delora.run import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
