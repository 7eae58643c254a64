"""Build what is compiled ahead (csrc/), in place; Triton kernels are compiled when they are first called."""

from __future__ import annotations

import importlib
import shutil
import subprocess
import sys
import time

from .machine import ROOT
from .record import Context, Record


def run(context: Context, record: Record) -> None:
    """Values: seconds, and whether the compiled part loads. That there is no compiler is no problem."""
    import fastloop
    import fastloop.triton_kernels as kernels

    record.put(sources=str(fastloop.__version__), kernels_found=bool(kernels.__path__))
    if context.dry:
        record.put(native_text="not built in a dry run")
        return
    if shutil.which("nvcc") is None and shutil.which("c++") is None:
        record.put(native_text="no compiler here")
        return
    began = time.monotonic()
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    record.put(build_s=time.monotonic() - began)
    if done.returncode:
        record.problem("the build of csrc/ failed: " + (done.stderr or done.stdout)[-600:])
        return
    importlib.invalidate_caches()
    check = [sys.executable, "-c", "from fastloop.ops.native import reason; print(reason or 'built, loads')"]
    told = subprocess.run(check, cwd=ROOT, capture_output=True, text=True)
    record.put(native_text=(told.stdout or told.stderr).strip()[-200:])
