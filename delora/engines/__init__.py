"""Engines: who runs a sweep's fleets. `base.py` is the contract; an engine is one file and one yaml in conf/engine."""

import importlib

from delora.config import EngineConfig
from delora.engines.base import Engine
from delora.errors import UserError


def of(config: EngineConfig | None) -> Engine:
    """The engine of a config.

    Raises:
        UserError: there is no such class, or a package that it needs is not installed.
    """
    config = config or EngineConfig.model_validate({"_target_": "delora.engines.here.Here", "name": "here"})
    module, _, name = config.target.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise UserError(f"engine._target_={config.target}: {error}") from None
    if not (isinstance(found, type) and issubclass(found, Engine)):
        raise UserError(f"engine._target_={config.target}: is no engine")
    return found(config)
