"""Which kernels are defaults on a GPU: those alone that a results file shows right and faster there."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from fastloop.ops import REGISTRY

RESULTS = Path(__file__).resolve().parents[2] / "bench" / "results"
KERNELS = ("triton", "cuda", "flash_attn")
PLAIN = ("reference", "torch", "graph")


def unproven(defaults: Iterable[tuple[str, str]], folder: Path) -> list[str]:
    """Of (op, backend): what no result of bench/gpu_check.py in the folder proves."""
    runs = [json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))]
    runs = [run for run in runs if isinstance(run, dict) and run.get("dry_run") is False]
    return [
        f"{op}: {backend} is a default without a results file that shows it right and faster"
        for op, backend in defaults
        if backend in KERNELS and not any(_proves(run, op, backend) for run in runs)
    ]


def _proves(run: dict[str, Any], op: str, backend: str) -> bool:
    """Right in all that was checked, and faster than torch in the calls that it serves as the default, taken
    together: they are timed alone, while in a step ours overlap.
    """
    parity, timed = (run["sections"].get(name, {}) for name in ("parity", "ops"))
    errors = parity.get("values", {}).get("errors", {})
    checked = [found for name, found in errors.items() if name.startswith(f"{op}, {backend}, ")]
    right = bool(checked) and all(found is not None and found[0] <= found[1] for found in checked)
    times: dict[str, dict[str, float]] = {}
    for line in timed.get("lines", []):
        times.setdefault(line["name"], {})[line["variant"]] = line["median_us"]
    chosen = timed.get("values", {}).get("defaults", {})  # of the first run none are told: then all calls
    served = [
        found
        for name, found in times.items()
        if name.replace(",", " ").split()[0] == op
        and backend in found
        and chosen.get(name, backend) == backend
    ]
    plain = [(t[backend], min(t[p] for p in PLAIN if p in t)) for t in served if any(p in t for p in PLAIN)]
    ours, theirs = (sum(times) for times in zip(*plain, strict=True)) if plain else (0.0, 0.0)
    return right and ours < theirs


def test_no_kernel_is_a_default_that_nothing_proves() -> None:
    defaults = [(op.name, backend) for op in REGISTRY.values() for backend in op.defaults["cuda"]]
    assert unproven(defaults, RESULTS) == []


def gpu_run(error: float = 0.5, ours: float = 8.0) -> dict[str, Any]:
    errors = {"linear, triton, small, 0": [error, 1.0], "linear_quantised, triton, small, 1": None}
    lines = [
        {"name": "linear decoder qkv, 13 rows", "variant": variant, "median_us": time}
        for variant, time in (("triton", ours), ("torch", 9.0), ("reference", 20.0))
    ]
    lines.append({"name": "linear_quantised decoder down, fp8", "variant": "triton", "median_us": 1.0})
    chosen = {line["name"]: "triton" for line in lines}
    sections = {
        "parity": {"values": {"errors": errors}},
        "ops": {"lines": lines, "values": {"defaults": chosen}},
    }
    return {"dry_run": False, "sections": sections}


@pytest.mark.parametrize(
    ("run", "proven"),
    [
        (gpu_run(), True),
        (gpu_run(error=1.5), False),
        (gpu_run(ours=9.5), False),
        (gpu_run() | {"dry_run": True}, False),
        ({"sessions": 250}, False),
    ],
    ids=["right and faster", "wrong", "slower", "dry run", "another program's"],
)
def test_what_proves_a_default(run: dict[str, Any], proven: bool, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(json.dumps(run))
    assert (unproven([("linear", "triton")], tmp_path) == []) == proven
    assert unproven([("linear", "cuda")], tmp_path) and unproven([("linear_quantised", "triton")], tmp_path)
    assert unproven([("linear", "torch"), ("mel", "reference")], tmp_path) == []
