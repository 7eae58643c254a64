"""The errors of the engine. Each says what was wrong, where, and what to do."""

from __future__ import annotations


class FastloopError(Exception):
    """Base of the engine's own errors."""


class CapacityError(FastloopError, RuntimeError):
    """No room for another session or another page; sessions that run are not touched."""


class QueueFullError(FastloopError, RuntimeError):
    """A push would exceed the input bound; nothing of it was taken."""


class SessionClosedError(FastloopError, RuntimeError):
    """The session is closed (or has failed, or its clip is finished) and takes no more sound."""


class SnapshotError(FastloopError, ValueError):
    """A snapshot is damaged or belongs to another model."""
