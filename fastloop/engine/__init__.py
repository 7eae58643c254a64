"""How many sessions run, never what they compute.

kv_pages (page books) -> kv_cache (pages of tensors, one sequence a session) -> session (state machine)
-> admission (who goes first) -> scheduler (ragged batches) -> runner (the model) -> engine (the public
object) -> async_engine.

The captured runner: buckets -> step_buffers (fixed addresses) -> device_step (no host in it) -> recorder or
CUDA graph -> streams (the schedule) -> captured_runner. What proves them without a GPU: recorder,
stream_simulation (order of buffers), simulation (deadlines).
"""

from .async_engine import AsyncEngine
from .engine import Engine
from .sequences import StepItem
from .session import Session

__all__ = ["AsyncEngine", "Engine", "Session", "StepItem"]
