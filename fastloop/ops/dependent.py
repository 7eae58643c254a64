"""Programmatic dependent launch: on sm_90 and newer a kernel may start before the one in front of it ends.

It then does what needs nothing of that one, such as asking for its weights, and waits. For every kernel of
"triton" and "cuda" alike; others in between wait for all that is before them, and are waited for.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator

_wanted: contextvars.ContextVar[bool] = contextvars.ContextVar("dependent", default=False)


@contextlib.contextmanager
def dependent_launches(wanted: bool) -> Iterator[None]:
    """Inside, kernels are launched so or not: so no kernel directly in front of one may write its weights."""
    token = _wanted.set(wanted)
    try:
        yield
    finally:
        _wanted.reset(token)


def are_dependent() -> bool:
    """Whether launches are wanted so here. (GPUs that have none ignore it.)"""
    return _wanted.get()
