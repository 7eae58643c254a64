"""Measure block sizes of `linear` and write a table of those that beat the shipped ones.

The result, OUT/<device>.json, goes to triton_kernels/tables/. Every candidate must first compute what the
shipped configuration computes. Nothing of this runs inside a step.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from typing import Any

import torch

from fastloop.testing import op_cases as cases
from fastloop.testing.implementations import Implementation
from fastloop.testing.op_cases import Case
from fastloop.testing.timing import rotation
from fastloop.testing.tolerance import relative_error
from fastloop.triton_kernels.tuning import choose, overridden, table_path

from .clock import measure
from .record import Context, Record
from .shapes import linears

GAIN = 0.97  # a candidate must take at most this share of the shipped configuration's time


def run(context: Context, record: Record) -> None:
    """Values: the table's file; a line for each winner."""
    name = torch.cuda.get_device_name() if context.device == "cuda" else "dry run"
    found: dict[str, Any] = {"device": name, "measured": "bench/gpu_check.py --tune", "linear": []}
    target = context.out / table_path(name).name
    buckets = (1,) if context.dry else (16, 64)
    matrices = list(linears(context.config).items())[: 2 if context.dry else None]
    for rows, (matrix, dims) in itertools.product(buckets, matrices):
        if context.left_s < 6:
            record.put(left_out_text=f"from {matrix}, {rows} rows on: out of time")
            break
        case = cases.linear_case(torch.Generator().manual_seed(1), rows=rows, dtype=context.dtype, **dims)
        sizes = {"rows": rows, "width_in": dims["width_in"], "width_out": dims["width_out"]}
        sizes |= {
            "epilogue": dims.get("epilogue", "none"),
            "weight": str(context.dtype).removeprefix("torch."),
        }
        shipped = choose("linear", torch.device(context.device), **sizes)
        best = _best("linear", case, ("weight",), shipped, linear_candidates(rows, context.dry), context)
        if best is not None:
            config, gain = best
            entry = {"max_rows": rows, **{k: v for k, v in sizes.items() if k != "rows"}, "config": config}
            found["linear"].append(entry)
            record.put(**{f"{matrix}, {rows} rows": f"{gain:.2f} x faster with {config}"})
    target.write_text(json.dumps(found, indent=1))
    record.put(table_text=f"{len(found['linear'])} entries in {target.name}")


def linear_candidates(rows: int, dry: bool) -> Iterator[dict[str, Any]]:
    """Blocks whose stages fit 200 KB of shared memory and leave enough in flight (16 KB at least)."""
    block_rows = max(16, 1 << (rows - 1).bit_length())
    space = itertools.product((16, 32, 64, 128), (64, 128, 256), (3, 4, 6), (4, 8), (1, 4, 16))
    for out, depth, stages, warps, splits in itertools.islice(space, 2 if dry else None):
        held = 2 * stages * depth * (2 * out + block_rows)
        if dry or 16 << 10 <= held <= 200 << 10:
            yield {
                "BLOCK_OUT": out, "BLOCK_ROWS": block_rows, "BLOCK_DEPTH": depth, "warps": warps,
                "stages": stages, "max_splits": splits,
            }  # fmt: skip


def _best(
    op: str,
    case: Case,
    cold: tuple[str, ...],
    shipped: dict[str, Any],
    candidates: Iterator[dict[str, Any]],
    context: Context,
) -> tuple[dict[str, Any], float] | None:
    """The fastest configuration and its gain over the shipped one, or None where that one stays."""
    run = Implementation(op, "triton", context.device)
    placed = {name: run.place(value) for name, value in case.arguments.items()}
    sets, _ = rotation(placed, cold) if not context.dry else ([placed], False)
    calls: list[Callable[[], object]] = [lambda s=s: run.function(**s) for s in sets]
    wanted = run.function(**placed).clone()
    base = measure(calls, context.device, 0.05).median
    best, chosen = GAIN * base, None
    for config in candidates:
        if context.left_s < 3:
            break
        try:
            with overridden(op, config):
                if relative_error(run.function(**placed), wanted) > 4 * torch.finfo(context.dtype).eps:
                    continue
                taken = measure(calls, context.device, 0.02).median
        except Exception as error:  # does not fit this device
            print(f"{config}: {type(error).__name__}")
            continue
        if taken < best:
            best, chosen = taken, config
    return (chosen, base / best) if chosen is not None else None
