"""fastloop listens all the time: every 0.4 s of sound it perceives, decides, and responds only if it should.

    from fastloop import Engine

    engine = Engine.load("demo")
    session = engine.open()
    session.push(pcm)  # float32 or int16, any length
    engine.run_until_idle()
    for event in session.poll():
        print(event)

The names below are the public ones. Those that need torch are imported at their first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from . import errors, events
from .config import ModelConfig
from .options import DecisionPolicy, EngineConfig, Sampling, SessionConfig

if TYPE_CHECKING:
    from .checkpoint import Model, load
    from .engine import AsyncEngine, Engine, Session, StepItem

__version__ = "0.1.0"

__all__ = [
    "AsyncEngine",
    "DecisionPolicy",
    "Engine",
    "EngineConfig",
    "Model",
    "ModelConfig",
    "Sampling",
    "Session",
    "SessionConfig",
    "StepItem",
    "__version__",
    "errors",
    "events",
    "load",
]

_LAZY = {
    "AsyncEngine": "engine",
    "Engine": "engine",
    "Session": "engine",
    "StepItem": "engine",
    "Model": "checkpoint",
    "load": "checkpoint",
}


def __getattr__(name: str) -> Any:
    """The public names that need torch (PEP 562); AttributeError for any other."""
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; its public names are {__all__}")
    value = getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
