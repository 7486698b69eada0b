"""Families of encoders: one file a family, found by existing. Imports no torch."""

import functools
import importlib
import pkgutil
from collections.abc import Mapping
from typing import Any, ClassVar

from delora.encoders.base import Encoder, Shape, matches

__all__ = ["Encoder", "Shape", "families", "matches", "of", "unknown"]


class Unknown(Encoder):
    """Of a family without a file: targets are names alone, and examples are padded."""

    roles: ClassVar[Mapping[str, str]] = {}
    packs = False


unknown = Unknown()


@functools.cache
def families() -> dict[str, Encoder]:
    """The families by the name of their file."""
    modules = [importlib.import_module(f"{__name__}.{found.name}") for found in pkgutil.iter_modules(__path__)]
    known = [one for module in modules for one in vars(module).values() if isinstance(one, type)]
    encoders = [one() for one in known if issubclass(one, Encoder) and one is not Encoder]
    return {encoder.family: encoder for encoder in encoders}


def of(config: Mapping[str, Any]) -> Encoder | None:
    """The family of a checkpoint by its config.json; None where it is not known."""
    kind = config.get("model_type")
    return next((encoder for encoder in families().values() if kind in encoder.types), None)
