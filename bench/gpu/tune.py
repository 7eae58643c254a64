"""Measure block sizes of `linear` and `paged_attention`; write a table of what beats the shipped ones.

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
    """Values: the table's file; what each winner gains."""
    name = torch.cuda.get_device_name() if context.device == "cuda" else "dry run"
    found: dict[str, Any] = {"device": name, "measured": "bench/gpu_check.py --tune"}
    target = context.out / table_path(name).name
    found["linear"] = list(_linear(context, record))
    found["paged_attention"] = list(_attention(context, record))
    target.write_text(json.dumps(found, indent=1))
    entries = len(found["linear"]) + len(found["paged_attention"])
    record.put(table_text=f"{entries} entries in {target.name}")


def _linear(context: Context, record: Record) -> Iterator[dict[str, Any]]:
    """An entry for each matrix and bucket of rows whose best blocks are not the shipped ones."""
    matrices = list(linears(context.config).items())[: 2 if context.dry else None]
    for rows, (matrix, dims) in itertools.product((1,) if context.dry else (16, 64), matrices):
        case = cases.linear_case(torch.Generator().manual_seed(1), rows=rows, dtype=context.dtype, **dims)
        sizes = {"width_in": dims["width_in"], "width_out": dims["width_out"]}
        sizes["epilogue"] = dims.get("epilogue", "none")
        sizes["weight"] = str(context.dtype).removeprefix("torch.")
        shipped = choose("linear", torch.device(context.device), rows=rows, **sizes)
        candidates = linear_candidates(rows, context.dry)
        best = _best("linear", case, ("weight",), shipped, candidates, context)
        if best is not None:
            record.put(**{f"{matrix}, {rows} rows": f"{best[1]:.2f} x faster with {best[0]}"})
            yield {"max_rows": rows, **sizes, "config": best[0]}


def _attention(context: Context, record: Record) -> Iterator[dict[str, Any]]:
    """An entry for one listener and one for many, at 1,024 slots of context."""
    d, rows, history = context.config.decoder, context.config.chunk_rows, 20 if context.dry else 1024
    for streams in (1,) if context.dry else (1, 64):
        case = cases.paged_attention_case(
            torch.Generator().manual_seed(1), rows=[rows] * streams, lens=[history + rows] * streams,
            gaps=[(0, 0)] * streams, heads=d.heads, kv_heads=d.kv_heads, head_width=d.head_width, page=64,
            dtype=context.dtype,
        )  # fmt: skip
        shape = {"itemsize": context.dtype.itemsize, "head": d.head_width}
        sizes = {"rows": rows * streams, **shape}
        shipped = choose("paged_attention", torch.device(context.device), **sizes)
        candidates = attention_candidates(context.dry)
        best = _best("paged_attention", case, ("k_pages", "v_pages"), shipped, candidates, context)
        if best is not None:
            record.put(**{f"attention, {streams} listeners": f"{best[1]:.2f} x faster with {best[0]}"})
            yield ({"max_rows": 4 * rows} if streams == 1 else {}) | shape | {"config": best[0]}


def attention_candidates(dry: bool) -> Iterator[dict[str, Any]]:
    """Blocks for packed rows of listeners; what does not fit the device is refused when it is compiled."""
    space = itertools.product((32, 64, 128), (2, 3), (4, 8), (16, 32, 64), (1, 2))
    for slots, stages, warps, splits, programs in itertools.islice(space, 1 if dry else None):
        yield {
            "BLOCK_ROWS": 16 if dry else 128, "BLOCK_SLOTS": slots, "warps": warps, "stages": stages,
            "max_splits": splits, "programs_per_processor": programs,
        }  # fmt: skip


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
