"""Programs that a section starts, with a limit of time."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from .machine import ROOT


def finished(
    command: Sequence[str], limit: float, env: Mapping[str, str] | None = None, folder: Path = ROOT
) -> tuple[int | None, str]:
    """Runs it in a folder, the checkout: its exit code, None where it was stopped after `limit` seconds, and
    what it had said by then.

    What it says goes through a file: the end of a pipe would be waited for as long as anything lives that the
    program had started. That is ended with the section.
    """
    with tempfile.TemporaryFile("w+", errors="replace") as said:
        process = subprocess.Popen(
            command, cwd=folder, env=env, stdin=subprocess.DEVNULL, stdout=said, stderr=subprocess.STDOUT
        )
        code: int | None = None
        try:
            code = process.wait(max(limit, 1))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        said.seek(0)
        return code, said.read()
