"""What every command needs of the terminal: text fit for one line, and errors that are one line."""

from __future__ import annotations

import os
import sys

from ..config import ConfigError

LONGEST = 600  # characters of an error


class UsageProblem(Exception):
    """What the caller asked for cannot be done: bad input or bad options (exit code 2)."""


def one_line(text: str, longest: int | None = None) -> str:
    """Text of a file, a model or a file's name as one harmless line: runs of white space become a space,
    what does not print (control and escape characters, halves of surrogates) is spelled out. Of more than
    `longest` characters the beginning.
    """
    line = "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in " ".join(text.split())
    )
    return line if longest is None or len(line) <= longest else line[: longest - 2] + " …"


def complain(command: str, message: object) -> None:
    """One line on standard error: which command, what is wrong."""
    print(f"{' '.join(('fastloop', *command.split()))}: {one_line(str(message), LONGEST)}", file=sys.stderr)


def cpu_threads(asked: int) -> int:
    """What --threads means: 0 is as many as there are cores; more than those would wait for each other."""
    cores = os.cpu_count() or 1
    if not 0 <= asked <= cores:
        raise ConfigError(
            f"--threads: choose from 1 to {cores}, or 0 for all cores of this machine; got {asked}"
        )
    return asked or cores
