"""compute-sanitizer over every Triton kernel on small sizes: memcheck and racecheck, where it exists."""

from __future__ import annotations

import os
import re
import shutil
import sys
from pathlib import Path

from .process import finished
from .record import Context, Record

TOOLS = ("memcheck", "racecheck")
DONE = "every op ran"


def run(context: Context, record: Record) -> None:
    """Values: what each tool says; a problem for errors found, and where a tool did not really run."""
    command = [sys.executable, str(Path(__file__).with_name("sanitized.py"))]
    command += ["--dry-run"] if context.dry else []
    tool = shutil.which("compute-sanitizer")
    if tool is None or context.dry:
        _report("plain", command, record, context.left_s, sanitized=False)
        record.put(sanitizer_text="no compute-sanitizer here" if tool is None else "not used in a dry run")
        return
    for name in TOOLS:
        options = [tool, "--tool", name, "--error-exitcode", "9", "--print-limit", "5"]
        _report(name, [*options, *command], record, context.left_s / (len(TOOLS) - TOOLS.index(name)))


def _report(name: str, command: list[str], record: Record, limit: float, sanitized: bool = True) -> None:
    # Without the caching allocator every tensor is an allocation of its own, with nothing legal behind it.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    code, told = finished(command, limit, env=environment)
    if code is None:
        record.problem(f"{name} did not end within {limit:.0f} s")
        return
    found = re.search(r"(ERROR|RACECHECK) SUMMARY: (\d+)", told)
    if DONE not in told or code or (sanitized and found is None):
        record.problem(f"{name} did not run to its end (exit code {code}): {told[-800:]}")
    elif found is not None and int(found[2]):
        record.problem(f"{name}: {found[0]}; {told[:800]}")
    else:
        record.put(**{f"{name}_text": found[0] if found else DONE})
