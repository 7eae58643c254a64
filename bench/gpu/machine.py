"""The machine: what it is, and its clocks, power and temperature while a section runs (nvidia-ml-py)."""

from __future__ import annotations

import datetime
import platform
import subprocess
import sys
import threading
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = (
    *("torch", "triton", "transformers", "numpy", "cupy-cuda13x", "cuda-bindings", "nvidia-ml-py"),
    *("flash-attn", "flashinfer-python"),
)
INTERVAL_S = 0.1


def describe(device: str) -> dict[str, Any]:
    """Device, versions, commit; as plain data."""
    found: dict[str, Any] = {
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
        "commit": _git("rev-parse", "HEAD"),
        "changed_files": len(_git("status", "--porcelain").splitlines()),
        "device": _cpu(),
    }
    if device == "cuda":
        p = torch.cuda.get_device_properties(0)
        found |= {
            "device": p.name,
            "compute_capability": f"{p.major}.{p.minor}",
            "multiprocessors": p.multi_processor_count,
            "memory_bytes": p.total_memory,
            "l2_bytes": getattr(p, "L2_cache_size", None),
            "cuda": torch.version.cuda,
        }
    return found


def stamp(device: str = "cpu") -> dict[str, Any]:
    """What every results file begins with; of absolute paths in the command only the last name is kept."""
    machine = describe(device)
    given = [Path(word).name if Path(word).is_absolute() else word for word in sys.argv]
    return {
        "device": machine["device"],
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": machine["commit"],
        "command": " ".join([Path(sys.executable).name, *given]),
    }


def _cpu() -> str:
    """The processor's model; of one that does not tell, its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()


class Telemetry:
    """`with Telemetry() as t: ...; t.summary()`: SM and memory clock (MHz), power (W), temperature (C)."""

    def __init__(self) -> None:
        self.samples: list[tuple[float, ...]] = []
        self.reason = ""
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Telemetry:
        try:
            import pynvml

            pynvml.nvmlInit()
            handle = pynvml.nvmlDeviceGetHandleByIndex(0)
        except Exception as error:  # not installed, no driver, no device: the reason is what is reported
            self.reason = f"{type(error).__name__}: {error}"
            return self
        self._thread = threading.Thread(target=self._watch, args=(pynvml, handle), daemon=True)
        self._thread.start()
        return self

    def _watch(self, nvml: Any, handle: Any) -> None:
        while not self._stop.wait(INTERVAL_S):
            try:
                self.samples.append(
                    (
                        nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM),
                        nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_MEM),
                        nvml.nvmlDeviceGetPowerUsage(handle) / 1e3,
                        nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU),
                    )
                )
            except nvml.NVMLError as error:
                self.reason = str(error)
                return

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def summary(self) -> dict[str, Any]:
        """Least, mean and most of each; or why there is none."""
        if not self.samples:
            return {"reason": self.reason or "too short to sample"}
        names = ("sm_mhz", "memory_mhz", "power_w", "temperature_c")
        columns = zip(*self.samples, strict=True)
        return {
            name: {"least": min(c), "mean": sum(c) / len(c), "most": max(c)}
            for name, c in zip(names, columns, strict=True)
        }
