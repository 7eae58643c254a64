"""Measure block sizes where they count: in captured steps of a model with the published dims and few layers,
whose kernels overlap as in an engine. Of one call after the other, what makes the steps fastest is kept.

The result, OUT/<device>.json, goes to triton_kernels/tables/, and is there for the sections behind this one.
Every candidate must first compute what the shipped configuration computes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastloop.ops.dependent import dependent_launches
from fastloop.testing import op_cases as cases
from fastloop.testing.implementations import Implementation
from fastloop.testing.op_cases import Case
from fastloop.testing.tolerance import relative_error
from fastloop.triton_kernels import tuning
from fastloop.triton_kernels.tuning import overridden, table, table_path

from .build import alone
from .clock import measure
from .model import OURS, DecoderStep, Perception, backend
from .record import Context, Record
from .shapes import linears

GAIN = 0.995  # a candidate must take at most this share of the time of what it replaces
DRIFT = 1.02  # if what it replaces takes so much longer the second time, the machine has changed
LAYERS = 8  # whose weights are many times the size of the L2 cache
WARMERS = 14  # processes that compile
TIMED_S = 0.03  # of replays for each candidate and part

Config = dict[str, Any]


@dataclass(frozen=True)
class Target:
    """Calls of `op` whose `sizes` a table's entry names; what they are timed in; what may serve them."""

    name: str
    op: str
    sizes: dict[str, Any]
    draw: Callable[[torch.Generator], Case]
    parts: tuple[str, ...]
    candidates: tuple[Config, ...]


def run(context: Context, record: Record) -> None:
    """Values: the table's file, and what each target gained over the shipped configuration."""
    name = torch.cuda.get_device_name() if context.device == "cuda" else "dry run"
    small = context if context.dry else _of_few_layers(context)
    if not context.dry:
        _compile(record)
    parts, targets = Parts(small), all_targets(context)
    kept: dict[str, list[Config]] = {target.op: [] for target in targets}
    record.put(gains={}, shipped_us={part: 1e6 * parts.seconds(part) for part in parts.of(targets)})
    for target in targets:
        if context.left_s < 3:
            record.put(left_out_text=f"from {target.name} on: out of time")
            break
        best = _best(target, parts, context, record)
        if best is not None:
            kept[target.op].append(target.sizes | {"config": best})
            _put_first(target.op, kept[target.op][-1], context)
    record.put(tuned_us={part: 1e6 * parts.seconds(part) for part in parts.of(targets)})
    found = {"device": name, "measured": "bench/gpu_check.py --tune"}
    text = json.dumps(found | _in_front(kept, table_path(name)), indent=1)
    (context.out / table_path(name).name).write_text(text + "\n")
    if not context.dry:
        table_path(name).write_text(text + "\n")
    record.put(table_text=f"{sum(map(len, kept.values()))} entries in {table_path(name).name}")


def _in_front(kept: dict[str, list[Config]], path: Path) -> dict[str, list[Config]]:
    """What was found, the last one first, and behind it what the device's table says of other calls."""
    before = json.loads(path.read_text()) if path.exists() else {}
    merged: dict[str, list[Config]] = {}
    for op in dict.fromkeys((*kept, *(op for op, entries in before.items() if isinstance(entries, list)))):
        found = kept.get(op, [])[::-1]
        calls = [_call_of(entry) for entry in found]
        others = [entry for entry in before.get(op, []) if _call_of(entry) not in calls]
        if found or others:
            merged[op] = [*found, *others]
    return merged


def _call_of(entry: Config) -> Config:
    """The sizes of the calls that an entry serves."""
    return {name: value for name, value in entry.items() if name != "config"}


def _of_few_layers(context: Context) -> Context:
    config = context.config
    parts = {n: dataclasses.replace(getattr(config, n), layers=LAYERS) for n in ("encoder", "decoder")}
    return dataclasses.replace(context, config=dataclasses.replace(config, name="few layers", **parts))


def _compile(record: Record) -> None:
    """All candidates, in many processes; triton keeps what they compile."""
    script = str(Path(__file__).with_name("warm.py"))
    workers = [
        subprocess.Popen([sys.executable, script, str(i), str(WARMERS), "tune"], env=alone())
        for i in range(WARMERS)
    ]
    codes = [worker.wait() for worker in workers]
    record.put(compilers_failed=sum(map(bool, codes)))  # some candidates do not fit the device


class Parts:
    """The steps that candidates are timed in."""

    def __init__(self, context: Context) -> None:
        self.context = context
        self._made: dict[str, Callable[[], object]] = {}

    def of(self, targets: list[Target]) -> list[str]:
        return list(dict.fromkeys(part for target in targets for part in target.parts))

    def seconds(self, part: str) -> float:
        call = self._made.get(part) or self._made.setdefault(part, self._make(part))
        with backend(OURS, self.context):
            return measure([call], self.context.device, TIMED_S).median

    def _make(self, part: str) -> Callable[[], object]:
        what, _, precision = part.partition(", ")
        if what == "encoder":
            return Perception(self.context, 1, precision).encode
        kind, _, history = what.partition(" at ")
        rows = self.context.config.chunk_rows if kind == "listening" else 1
        return DecoderStep(self.context, [rows], [int(history)], precision).run


def all_targets(context: Context) -> list[Target]:
    """In the order in which they are decided."""
    history = "20" if context.dry else "1024"
    both = (f"listening at {history}", f"text at {history}")
    deep = () if context.dry else ("listening at 4096",)
    rows = context.config.chunk_rows
    order = ("decoder gate_up", "decoder down", "decoder out", "decoder qkv")
    found = [_linear(name, 16, rows, both, context) for name in order]
    order = ("encoder fc1", "encoder fc2", "encoder qkv", "encoder out")
    found += [_linear(name, 32, context.config.chunk_frames // 2, ("encoder",), context) for name in order]
    found += [
        _attention("attention of a listener", rows, 4 * rows, (both[0], *deep), FEW_ROWS, context),
        _attention("attention of a speaker", 1, 4, (both[1],), ONE_ROW, context),
    ]
    fp8 = tuple(f"{part}, fp8" for part in both)
    found += [_quantised(name, fp8, context) for name in ("decoder gate_up", "decoder down", "decoder qkv")]
    if context.dry:
        found = [dataclasses.replace(t, candidates=t.candidates[:1]) for t in found[:3]]
    return found


def _attention(
    name: str,
    rows: int,
    most: int,
    parts: tuple[str, ...],
    blocks: tuple[tuple[int, ...], ...],
    context: Context,
) -> Target:
    d = context.config.decoder
    sizes = {"max_rows": most, "itemsize": context.dtype.itemsize, "head": d.head_width, "scaled": False}
    draw = functools.partial(
        cases.paged_attention_case, rows=[rows], lens=[1000 + rows], gaps=[(0, 0)], heads=d.heads,
        kv_heads=d.kv_heads, head_width=d.head_width, page=64, dtype=context.dtype,
    )  # fmt: skip
    found = tuple(dict(zip(ATTENDING, numbers, strict=True)) for numbers in blocks)
    return Target(name, "paged_attention", sizes, draw, parts, found)


ATTENDING = (
    "BLOCK_ROWS", "BLOCK_SLOTS", "warps", "stages", "max_splits", "least_steps", "programs_per_processor",
)  # fmt: skip
FEW_ROWS = (
    (32, 64, 8, 3, 32, 2, 2), (64, 64, 8, 3, 32, 2, 2), (32, 64, 4, 3, 16, 4, 2), (32, 128, 8, 2, 32, 1, 2),
    (16, 128, 4, 1, 32, 1, 2), (32, 64, 4, 3, 32, 2, 2), (64, 64, 4, 2, 32, 1, 2), (128, 64, 8, 2, 32, 1, 2),
    (32, 64, 4, 3, 64, 1, 2), (32, 64, 4, 2, 64, 1, 4), (16, 128, 4, 1, 64, 1, 4), (16, 64, 4, 3, 64, 1, 2),
    (64, 64, 4, 3, 32, 1, 2), (64, 128, 8, 2, 32, 1, 2),
)  # fmt: skip
ONE_ROW = (
    (16, 64, 4, 2, 32, 1, 2), (16, 64, 4, 3, 32, 1, 2), (16, 128, 4, 1, 32, 1, 2), (16, 128, 8, 1, 32, 1, 2),
    (16, 32, 4, 3, 32, 1, 2), (16, 64, 2, 2, 32, 1, 2), (16, 64, 4, 2, 16, 1, 2),
)  # fmt: skip


MULTIPLYING = ("BLOCK_OUT", "channels", "BLOCK_DEPTH", "warps", "stages", "max_splits")
# Each with some `prefetch_kb`: none was never best. Channels deal tiles out evenly over 132 processors.
PREFETCHES = (16, 32)
BLOCKS = {
    "decoder gate_up": ((32, 32, 128, 4, 4, 1), (32, 28, 128, 4, 4, 1), (32, 28, 128, 2, 4, 1),
                        (32, 28, 128, 2, 3, 1), (32, 32, 128, 2, 4, 1), (32, 28, 64, 2, 6, 1)),
    "decoder down": ((64, 64, 128, 4, 4, 16), (64, 63, 128, 4, 4, 8), (64, 64, 256, 4, 3, 8),
                     (64, 63, 128, 4, 5, 8)),
    "decoder out": ((64, 64, 128, 4, 4, 16), (64, 64, 64, 4, 6, 8), (32, 32, 128, 4, 4, 4),
                    (64, 64, 256, 4, 3, 2), (16, 16, 256, 2, 4, 1)),
    "decoder qkv": ((64, 64, 128, 4, 4, 16), (32, 32, 256, 4, 4, 1), (32, 32, 128, 4, 4, 2),
                    (32, 20, 256, 4, 4, 1), (32, 20, 256, 2, 4, 1)),
    "encoder fc1": ((64, 64, 128, 4, 3, 16), (16, 16, 128, 4, 6, 1), (32, 32, 256, 4, 4, 1),
                    (32, 20, 256, 2, 4, 1), (32, 20, 128, 2, 6, 1)),
    "encoder fc2": ((64, 64, 128, 4, 3, 16), (32, 32, 256, 4, 4, 4), (32, 32, 128, 4, 6, 4),
                    (32, 20, 256, 4, 4, 2), (32, 30, 256, 4, 4, 6)),
    "encoder qkv": ((64, 64, 128, 4, 3, 16), (32, 32, 256, 4, 4, 1), (16, 16, 128, 4, 6, 1),
                    (32, 30, 256, 4, 4, 1)),
    "encoder out": ((64, 64, 128, 4, 3, 16), (32, 32, 256, 4, 4, 1), (16, 16, 256, 4, 4, 1),
                    (16, 10, 256, 4, 4, 1)),
}  # fmt: skip
BYTE_BLOCKS = ((32, 32, 256, 4, 4, 8), (32, 28, 256, 4, 4, 8), (64, 64, 256, 4, 4, 8), (32, 32, 512, 4, 3, 8),
               (64, 63, 256, 4, 4, 8), (32, 32, 256, 4, 5, 4))  # fmt: skip


def _multiplying(block_rows: int, sizes: tuple[int, ...], kilobytes: int) -> Config:
    blocks = dict(zip(MULTIPLYING, sizes, strict=True))
    return blocks | {"BLOCK_ROWS": block_rows, "prefetch_kb": kilobytes}


def _linear(name: str, block_rows: int, rows: int, parts: tuple[str, ...], context: Context) -> Target:
    dims = linears(context.config)[name]
    draw = functools.partial(cases.linear_case, rows=rows, dtype=context.dtype, **dims)
    sizes = _sizes(block_rows, dims, str(context.dtype).removeprefix("torch."))
    found = tuple(_multiplying(block_rows, blocks, kb) for blocks in BLOCKS[name] for kb in PREFETCHES)
    return Target(name, "linear", sizes, draw, parts, found)


def _quantised(name: str, parts: tuple[str, ...], context: Context) -> Target:
    dims = linears(context.config)[name]
    rows = context.config.chunk_rows
    draw = functools.partial(cases.linear_quantised_case, kind="fp8", rows=rows, dtype=context.dtype, **dims)
    found = tuple(_multiplying(16, blocks, kb) for blocks in BYTE_BLOCKS for kb in (0, 16))
    return Target(f"{name}, fp8", "linear_quantised", _sizes(16, dims, "float8_e4m3fn"), draw, parts, found)


def _sizes(most: int, dims: dict[str, Any], weight: str) -> dict[str, Any]:
    kept = {"width_in": dims["width_in"], "width_out": dims["width_out"], "weight": weight}
    return {"max_rows": most} | kept | {"epilogue": dims.get("epilogue", "none")}


def jobs(context: Context) -> Iterator[Callable[[], object]]:
    """Calls that compile every candidate, as it is launched in a step."""
    for target in all_targets(context):
        for config in target.candidates:
            yield functools.partial(_call, target, config, context)


def _call(target: Target, config: Config, context: Context) -> torch.Tensor:
    """The target's call in the candidate's configuration; equal inputs each time."""
    run, case = Implementation(target.op, "triton", context.device), _drawn(target)
    with overridden(target.op, config), dependent_launches(True):
        result = run.function(**{name: run.place(value) for name, value in case.arguments.items()})
    return result


_CASES: dict[str, Case] = {}  # by the name of their target


def _drawn(target: Target) -> Case:
    if target.name not in _CASES:
        _CASES[target.name] = target.draw(torch.Generator().manual_seed(1))
    return _CASES[target.name]


def _best(target: Target, parts: Parts, context: Context, record: Record) -> Config | None:
    """The configuration with which the target's parts take least, or None where the present one stays."""

    def taken() -> float:
        return sum(parts.seconds(part) for part in target.parts)

    run, case = Implementation(target.op, "triton", context.device), _drawn(target)
    placed = {name: run.place(value) for name, value in case.arguments.items()}
    wanted, base = run.function(**placed).float(), taken()
    best, chosen = GAIN * base, None
    times: list[tuple[float, Config]] = []
    for config in target.candidates:
        if context.left_s < 3:
            break
        try:
            error = relative_error(_call(target, config, context).float(), wanted)
            if not error <= 4 * torch.finfo(context.dtype).eps:
                record.problem(f"{target.name}: {config} is off by {error}")
                continue
            with _first(target, config, context):
                times.append((taken(), config))
        except Exception as error:  # does not fit this device
            print(f"{target.name}, {config}: {type(error).__name__}: {error}"[:300])
            continue
        if times[-1][0] < best:
            best, chosen = times[-1]
    if chosen is not None and taken() > DRIFT * base:
        chosen = None
    record.values["gains"][target.name] = {
        "gain": base / best if chosen else 1.0,
        "us": [[round(1e6 * t, 1), *config.values()] for t, config in sorted(times, key=lambda x: x[0])],
        "before_us": round(1e6 * base, 1),
    }
    record.save()
    return chosen


@contextlib.contextmanager
def _first(target: Target, config: Config, context: Context) -> Iterator[None]:
    """Inside, an entry of the target in front of the device's table."""
    _put_first(target.op, target.sizes | {"config": config}, context)
    try:
        yield
    finally:
        _entries(target.op, context).pop(0)
        tuning._choose.cache_clear()


def _put_first(op: str, entry: Config, context: Context) -> None:
    _entries(op, context).insert(0, entry)
    tuning._choose.cache_clear()


def _entries(op: str, context: Context) -> list[Config]:
    """Of the table that this process reads for the device."""
    device = torch.device(context.device, 0) if context.device == "cuda" else torch.device(context.device)
    found: list[Config] = table(device)[op]
    return found
