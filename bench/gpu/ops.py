"""Each op at the dims of the model: time, bytes, share of the roofline; weights and KV pages cold; every
implementation in the same run, so that cuBLAS (linear, torch) and SDPA stand beside the kernels.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from fastloop.testing.implementations import Implementation, implementations
from fastloop.testing.timing import rotation

from .clock import measure
from .record import Context, Record
from .shapes import Shape, shapes

BUDGET_S = 0.12


def run(context: Context, record: Record) -> None:
    """A line for each shape and implementation; what cannot be captured is timed eagerly and says so."""
    record.put(ratios={})
    for shape in shapes(context.config, context.dtype, context.dry):
        if context.left_s < 3:
            record.put(left_out_text=f"from {shape.name} on: out of time")
            return
        case = shape.draw(torch.Generator().manual_seed(1))
        times = {}
        for chosen in _variants(shape.op, context):
            if chosen.refusal(case.arguments):
                continue
            placed = {name: chosen.place(value) for name, value in case.arguments.items()}
            sets, cold = rotation(placed, shape.cold) if not context.dry else ([placed], False)
            calls = [lambda s=s, f=chosen.function: f(**s) for s in sets]
            found = _time(calls, context)
            if found is None:
                if chosen.backend in ("triton", "cuda"):
                    record.problem(f"{shape.name}: {chosen.backend} failed; see the log")
                continue
            timing, note = found
            note = ", ".join(filter(None, [note, "" if cold or not shape.cold else "weights hot"]))
            roof = context.ceilings if cold or not shape.cold else None
            record.line(shape.name, chosen.backend, timing, shape.moved, shape.operations, roof, note)
            times[chosen.backend] = timing.median
            del placed, sets, calls
        _ratio(shape, times, record)


def _variants(op: str, context: Context) -> list[Implementation]:
    if context.dry:
        return [Implementation(op, "triton", "cpu")]
    return [i for i in implementations(op) if i.device == "cuda" and not i.missing]


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
