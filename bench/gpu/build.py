"""Build what is compiled ahead: csrc/, in place, and the Triton kernels of the model, in many processes."""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

from .machine import ROOT
from .process import finished
from .record import Context, Record

WARMERS = 14


def run(context: Context, record: Record) -> None:
    """Values: seconds, and whether the compiled part loads. That there is no compiler is no problem."""
    import fastloop
    import fastloop.triton_kernels as kernels

    record.put(sources=str(fastloop.__version__), kernels_found=bool(kernels.__path__))
    if context.dry:
        record.put(native_text="not built in a dry run")
        return
    began = time.monotonic()
    script = str(Path(__file__).with_name("warm.py"))
    images = _images()
    warmers = [
        subprocess.Popen(
            [*yielding(), sys.executable, script, str(i), str(WARMERS)],
            stdout=subprocess.PIPE,
            text=True,
            env=alone(),
        )
        for i in range(WARMERS)
    ]
    _native(context, record)
    failed = 0
    for warmer in warmers:
        try:
            told, _ = warmer.communicate(timeout=max(context.left_s, 1))
        except subprocess.TimeoutExpired:
            warmer.kill()
            record.put(warm_late=True)
            continue
        failed += bool(warmer.returncode)
        print(told)
    record.put(images_text="; ".join(_image_texts(images, context)))
    record.put(seconds_of_all=time.monotonic() - began)
    if failed:
        record.problem(f"{failed} of {WARMERS} processes could not make all calls of the model; see the log")


def yielding() -> list[str]:
    """In front of a command that is to leave the processors to the compilers of the CUDA kernels, of which
    one takes as long as everything else together.
    """
    return ["nice", "-n", "10"] if shutil.which("nice") else []


def alone() -> dict[str, str]:
    """The environment of one of many processes side by side: with a thread each for what torch computes."""
    return os.environ | {"OMP_NUM_THREADS": "1"}


def _images() -> dict[str, subprocess.Popen[str]]:
    """Compilers of the CUDA kernels for this GPU, one for each op; they leave what they make in the cache."""
    import torch

    from fastloop.ops.cuda_images import architecture, source_folder

    arch = architecture(*torch.cuda.get_device_capability())
    command = [sys.executable, "-m", "fastloop.ops.cuda_images", "--arch", arch, "--out", os.devnull]
    return {
        op: subprocess.Popen([*command, op], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for op in sorted(source.stem for source in source_folder().glob("*.cu"))
    }


def _image_texts(images: dict[str, subprocess.Popen[str]], context: Context) -> list[str]:
    """What became of each. That nothing compiles them here is no problem: what uses them then says so."""
    texts = []
    for op, process in images.items():
        try:
            told, _ = process.communicate(timeout=max(context.left_s, 1))
            told = told.strip()[-300:] if process.returncode else "compiled"
        except subprocess.TimeoutExpired:
            process.kill()
            told = "not compiled in time"
        texts.append(f"{op}: {told}")
    return texts


def _is_built() -> bool:
    built = ROOT / "fastloop" / f"_native{sysconfig.get_config_var('EXT_SUFFIX')}"
    sources = [file for file in (ROOT / "csrc").rglob("*") if file.is_file()]
    return built.exists() and built.stat().st_mtime > max(file.stat().st_mtime for file in sources)


def _native(context: Context, record: Record) -> None:
    """csrc/, in place, unless what is there is newer than all sources."""
    if _is_built():
        record.put(native_text="newer than its sources: kept")
        return
    if shutil.which("nvcc") is None and shutil.which("c++") is None:
        record.put(native_text="no compiler here")
        return
    command = [*yielding(), sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    # `_images` compiles the kernels, for this GPU alone; nvcc would for all, minutes of it, and for nothing.
    code, said = finished(command, max(context.left_s - 5, 5), os.environ | {"FASTLOOP_CUDA": "0"})
    if code is None:
        record.problem("the build of csrc/ did not end in time")
        return
    if code:
        record.problem("the build of csrc/ failed: " + said[-600:])
        return
    importlib.invalidate_caches()
    check = [sys.executable, "-c", "from fastloop.ops.native import reason; print(reason or 'built, loads')"]
    told = subprocess.run(check, cwd=ROOT, capture_output=True, text=True)
    record.put(native_text=(told.stdout or told.stderr).strip()[-200:])
