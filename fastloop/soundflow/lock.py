"""One process at a time."""

from __future__ import annotations

import fcntl
from typing import IO, Any


def alone(file: IO[Any]) -> bool:
    """Lock an open file until it is closed or the process ends, killed or not; False: another one has it.
    OSError where the file system has no locks.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
