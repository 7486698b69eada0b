"""Compares parameter-efficient finetuning methods on GLUE and on rows of one's own."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from delora.predict import predictions
    from delora.run import load
    from delora.winner import best, results

__all__ = ["__version__", "best", "load", "predictions", "results"]

__version__ = "0.1.0"

# Where each name is: importing the package imports none of them, for torch and pandas take seconds.
_PLACES = {"best": "delora.winner", "load": "delora.run", "predictions": "delora.predict", "results": "delora.winner"}


def __getattr__(name: str) -> Any:
    if name in _PLACES:
        return getattr(importlib.import_module(_PLACES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
