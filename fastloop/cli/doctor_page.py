"""The report of `fastloop doctor` for people: plain aligned lines, a little colour on a terminal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import typer

from ..ops.dispatch import BackendError, forced_backends
from ..ops.native import native, reason
from .doctor import OpLine
from .machine import OPTIONAL
from .terminal import one_line

COLOURS = {"used": "green", "available": "cyan", "OFF": "red"}
VERSIONS_A_LINE = 5
LONGEST_DETAIL = 90  # characters


def page(report: dict[str, Any], lines: list[OpLine]) -> Iterator[str]:
    """The report, line by line."""
    yield _title("Machine")
    yield from _machine(report["machine"])
    yield _title("Versions")
    yield from _versions(report["versions"])
    yield from _ops(lines)
    yield _title("Memory")
    yield _row("models", ", ".join(report["models"]) or "none in this installation")
    yield from _memory(report["memory"])


def _machine(m: dict[str, Any]) -> Iterator[str]:
    yield _row("system", m["system"])
    cores = f"{m['usable_cores']} of {m['cores']} cores usable, torch uses {m['torch_threads']}"
    yield _row("processor", f"{m['cpu']}: {cores}")
    yield _row("instructions", " ".join(m["isa"]) or "unknown")
    compiled = reason if native is None else f"fastloop._native, instruction sets {native.isas()}"
    yield _row("compiled part", compiled)
    runner = "eager, op by op" if native is None else "native, one compiled call a step (eager on a GPU)"
    yield _row("runner", runner)
    yield _row("memory", f"{_gb(m['memory_bytes'])}, {_gb(m['available_bytes'])} available")
    for gpu in m["gpus"]:
        parts = [gpu["name"], _gb(gpu["memory_bytes"]), f"compute {gpu['compute_capability']}"]
        parts += [f"CUDA {gpu['cuda']}"] + ([f"driver {gpu['driver']}"] if gpu["driver"] else [])
        yield _row("GPU", ", ".join(parts))
    if m["no_gpu"]:
        yield _row("GPU", f"none: {m['no_gpu']}")


def _versions(found: dict[str, str | None]) -> Iterator[str]:
    there = [f"{name} {version}" for name, version in found.items() if version is not None]
    for start in range(0, len(there), VERSIONS_A_LINE):
        yield _row("" if start else "installed", ", ".join(there[start : start + VERSIONS_A_LINE]))
    for name in (name for name, version in found.items() if version is None):
        yield _row("missing", f"{name} (for {OPTIONAL[name]})" if name in OPTIONAL else f"{name} (NEEDED)")


def _ops(lines: list[OpLine]) -> Iterator[str]:
    for device in dict.fromkeys(line.device for line in lines):
        yield _title(f"Ops on {device}: backend, state, error relative to float64 (at most)")
        here = [line for line in lines if line.device == device]
        before = ""
        for line in (line for line in here if line.state != "unavailable"):
            yield _op("" if line.op == before else line.op, line)
            before = line.op
        missing: dict[tuple[str, str], list[str]] = {}
        for line in (line for line in here if line.state == "unavailable"):
            missing.setdefault((line.backend, line.detail), []).append(line.op)
        every = len({line.op for line in here})
        for (backend, why), names in missing.items():
            which = "every op" if len(names) == every else ", ".join(names)
            yield _row("unavailable", f"{backend} ({one_line(why, LONGEST_DETAIL)}): {which}")
    yield from _forced()


def _op(name: str, line: OpLine) -> str:
    state = line.state if line.ok else "OFF"
    coloured = typer.style(f"{state:<9}", fg=COLOURS[state])
    if not line.ok or line.error is None:
        told = one_line(line.detail, LONGEST_DETAIL)
    else:
        told = "exact" if line.error == line.bound == 0 else f"{line.error:.1e} ({line.bound:.1e})"
    return f"  {name:<15} {line.backend:<10} {coloured} {told}"


def _forced() -> Iterator[str]:
    try:
        forced = forced_backends()
    except BackendError:
        return  # told as a problem of every op
    if forced:
        yield _row("forced", ", ".join(f"{'every op' if op == '*' else op}: {b}" for op, b in forced.items()))


def _memory(plan: dict[str, Any] | None) -> Iterator[str]:
    if plan is None:
        yield _row("plan", "none: the model cannot be loaded")
        return
    yield _row("plan", f"{plan['model']} ({plan['dtype']}), {plan['text']}")
    if plan["fits"] is not None:
        verdict = "fits" if plan["fits"] else "does NOT fit"
        yield _row("", f"{verdict} into the {_gb(plan['available_bytes'])} available")


def _title(text: str) -> str:
    return typer.style(text, bold=True)


def _row(label: str, text: str) -> str:
    return f"  {label:<15} {text}"


def _gb(count: int | None) -> str:
    return "unknown" if count is None else f"{count / 1e9:.1f} GB"
