"""How many sessions run, never what they compute.

kv_pages (page books) -> kv_cache (pages of tensors, one sequence a session) -> session (state machine)
-> scheduler (ragged batches) -> runner (the model) -> engine (the public object) -> async_engine.
"""

from .async_engine import AsyncEngine
from .engine import Engine
from .sequences import StepItem
from .session import Session

__all__ = ["AsyncEngine", "Engine", "Session", "StepItem"]
