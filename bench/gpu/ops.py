"""Each op at the dims of the model: time, bytes, share of the roofline; weights and KV pages cold; every
implementation in the same run, so that cuBLAS (linear, torch) and SDPA stand beside the kernels.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fastloop.ops import REGISTRY
from fastloop.ops.cuda import ATTENTION
from fastloop.testing.implementations import Implementation, implementations
from fastloop.testing.timing import rotation

from .clock import measure
from .record import Context, Record
from .shapes import Shape, shapes

BUDGET_S = 0.12


def run(context: Context, record: Record) -> None:
    """A line for each shape and implementation; what cannot be captured is timed eagerly and says so."""
    record.put(ratios={}, defaults={})
    for shape in shapes(context.config, context.dtype, context.dry):
        if context.left_s < 3:
            record.put(left_out_text=f"from {shape.name} on: out of time")
            return
        case = shape.draw(torch.Generator().manual_seed(1))
        times = {}
        record.values["defaults"][shape.name] = _default(shape, case.arguments, context)
        for name, chosen, function in _variants(shape, context):
            if chosen.refusal(case.arguments):
                continue
            placed = {argument: chosen.place(value) for argument, value in case.arguments.items()}
            sets, cold = rotation(placed, shape.cold) if not context.dry else ([placed], False)
            calls = [lambda s=s, f=function: f(**s) for s in sets]
            found = _time(calls, context)
            if found is None:
                if chosen.backend in ("triton", "cuda"):
                    record.problem(f"{shape.name}: {name} failed; see the log")
                continue
            timing, note = found
            note = ", ".join(filter(None, [note, "" if cold or not shape.cold else "weights hot"]))
            roof = context.ceilings if cold or not shape.cold else None
            record.line(shape.name, name, timing, shape.moved, shape.operations, roof, note)
            times[name] = timing.median
            del placed, sets, calls
        _ratio(shape, times, record)


def _default(shape: Shape, arguments: dict[str, Any], context: Context) -> str:
    """The backend that runs such a call where none is forced."""
    placed = {n: v.to(context.device) if isinstance(v, Tensor) else v for n, v in arguments.items()}
    return REGISTRY[shape.op].serving(context.device, (), placed)


def _variants(shape: Shape, context: Context) -> Iterator[tuple[str, Implementation, Callable[..., object]]]:
    """Implementations by name; of a batch's paged_attention each kernel, whichever the shape would choose."""
    if context.dry:
        chosen = Implementation(shape.op, "triton", "cpu")
        yield chosen.backend, chosen, chosen.function
        return
    for chosen in implementations(shape.op):
        if chosen.device != "cuda" or chosen.missing:
            continue
        yield chosen.backend, chosen, chosen.function
        if chosen.backend == "cuda" and shape.batch and torch.cuda.get_device_capability()[0] == 9:
            for kernel in ATTENTION[1:]:
                yield f"cuda, {kernel}", chosen, functools.partial(chosen.function, kernel=kernel)


def _time(calls: list[Callable[[], object]], context: Context) -> tuple[object, str] | None:
    for graph, note in ((True, ""), (False, "eager, with the host's time")):
        try:
            return measure(calls, context.device, BUDGET_S, graph), note
        except Exception as error:  # an implementation that synchronises cannot be captured
            print(f"{note or 'captured'}: {type(error).__name__}: {error}")
            torch.cuda.synchronize() if context.device == "cuda" else None
    return None


def _ratio(shape: Shape, times: dict[str, float], record: Record) -> None:
    """How many times as fast as torch's own implementation."""
    plain = times.get("torch", times.get("reference"))
    for backend in ("triton", "cuda"):
        if plain and backend in times:
            record.values["ratios"][f"{shape.name}: {backend} against torch"] = plain / times[backend]
    record.save()
