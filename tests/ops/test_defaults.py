"""Which kernels are defaults on a GPU: those alone that a results file shows right and faster there."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastloop.ops import REGISTRY, cuda
from fastloop.ops.dispatch import capturable
from fastloop.ops.native import native, reason
from fastloop.testing import op_cases as cases
from fastloop.testing.assertions import seeded
from fastloop.testing.op_cases import Case

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


def served(op: str, case: Case) -> str:
    return REGISTRY[op].serving("cuda", (), case.arguments)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no triton")
@pytest.mark.parametrize("missing", ["", "no compiler"])
def test_each_call_is_served_by_what_is_fastest_for_it(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA C++ where its kernels are there, for the calls that it is faster for; then Triton; then torch."""
    if native is None:
        pytest.skip(reason)
    monkeypatch.setattr(cuda, "_missing", lambda kernels, device: missing)
    first = "triton" if missing else "cuda"
    sizes = {"heads": 16, "kv_heads": 2, "head_width": 64, "dtype": torch.bfloat16}

    def attention(count: int, **more: Any) -> Case:
        shape = {"rows": [13] * count, "lens": [20] * count, "gaps": [(0, 0)] * count}
        return cases.paged_attention_case(seeded(1), **shape, **sizes, **more)

    assert served("paged_attention", attention(5)) == first
    assert served("paged_attention", attention(4)) == "triton" == served("paged_attention", attention(1))
    assert served("paged_attention", attention(5, scaled=True)) == "triton", "CUDA reads no scaled pages"
    for kind, wanted in (("int4", first), ("fp8", "triton"), ("int8", "triton")):
        small = {"rows": 3, "width_in": 64, "width_out": 8, "dtype": torch.bfloat16}
        assert (
            served("linear_quantised", cases.linear_quantised_case(seeded(1), kind=kind, **small)) == wanted
        )
    for rows, wanted in ((1, "triton"), (64, "triton"), (65, "reference")):
        assert served("linear", cases.linear_case(seeded(1), rows=rows, dtype=torch.bfloat16)) == wanted
    assert served("mel", cases.mel_case(seeded(1))) == first
    decide = cases.CASES["decide"](seeded(1))[0]
    assert served("decide", decide) == "triton"
    wide = Case({n: v.double() if n == "x" else v for n, v in decide.arguments.items()}, decide.mutates)
    assert served("decide", wide) == "reference"
    with capturable():
        assert served("decide", wide) == "graph"


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
