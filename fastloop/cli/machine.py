"""What this machine has: processor, memory, graphics processors, and the versions of what fastloop uses."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

import torch

from .. import __version__

# What kernels are written for; a processor has dozens more.
ISA_FLAGS = (
    "sse4_2 avx avx2 fma f16c avx_vnni avx512f avx512bw avx512vl avx512_vnni avx512_bf16 avx512_fp16 "
    "amx_tile amx_int8 amx_bf16 asimd asimddp i8mm bf16 sve sve2"
)
NEEDED = ("torch", "numpy", "tokenizers", "safetensors", "soundfile", "soxr", "typer", "rich")
OPTIONAL = {
    "sounddevice": "the microphone",
    "triton": "Triton kernels",
    "flash-attn": "attention on NVIDIA GPUs",
    "cupy-cuda13x": "CUDA kernels",
    "nvidia-ml-py": "GPU driver and clocks in this report",
}
CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


def machine() -> dict[str, Any]:
    """Hardware as plain data; bytes for memory, None where the system does not tell."""
    info = _proc("/proc/cpuinfo")
    flags = set((info.get("flags") or info.get("Features") or "").split())
    gpus, why = _gpus()
    return {
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": info.get("model name") or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "usable_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "isa": [flag for flag in ISA_FLAGS.split() if flag in flags],
        "memory_bytes": _memory_bytes(),
        "available_bytes": available_bytes(),
        "gpus": gpus,
        "no_gpu": why,
    }


def available_bytes() -> int | None:
    """Memory that can still be taken: of the machine, or of the container where that is less."""
    free = _proc("/proc/meminfo").get("MemAvailable", "").split()
    return int(free[0]) * 1024 if free else None


def versions() -> dict[str, str | None]:
    """Distribution -> version, None where it is not installed; fastloop and Python first."""
    found: dict[str, str | None] = {"fastloop": __version__, "python": platform.python_version()}
    for name in (*NEEDED, *OPTIONAL):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def _proc(path: str) -> dict[str, str]:
    """The `key : value` lines of a /proc file (of the first processor); {} where there is no such file."""
    try:
        lines = Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # not Linux
        return {}
    values: dict[str, str] = {}
    for key, colon, value in (line.partition(":") for line in lines):
        if colon:
            values.setdefault(key.strip(), value.strip())
    return values


def _memory_bytes() -> int | None:
    """Physical memory, or the container's limit where that is less."""
    if not hasattr(os, "sysconf"):
        return None
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = CGROUP_LIMIT.read_text().strip() if CGROUP_LIMIT.is_file() else ""
    return min(physical, int(limit)) if limit.isdigit() else physical


def _gpus() -> tuple[list[dict[str, Any]], str | None]:
    """The GPUs torch can use, and why there is none."""
    if not torch.cuda.is_available():
        if torch.version.cuda is None and torch.version.hip is None:
            return [], f"torch {torch.__version__} is built without GPU support"
        return [], f"torch {torch.__version__} sees no GPU: none is there, or its driver does not load"
    driver = _driver_version()
    gpus = []
    for index in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(index)
        gpus.append(
            {
                "name": p.name,
                "compute_capability": f"{p.major}.{p.minor}",
                "memory_bytes": p.total_memory,
                "multiprocessors": p.multi_processor_count,
                "cuda": torch.version.cuda,
                "driver": driver,
            }
        )
    return gpus, None


def _driver_version() -> str | None:
    """The NVIDIA driver's version; None without nvidia-ml-py or without such a driver."""
    try:
        pynvml = importlib.import_module("pynvml")
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        return str(pynvml.nvmlSystemGetDriverVersion())
    except pynvml.NVMLError:
        return None
