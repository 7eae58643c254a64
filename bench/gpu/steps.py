"""One stream: perception, the listening step, the text token, and a whole decision from host to host."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from fastloop.testing.timing import Timing

from .clock import capture, measure
from .model import APART, OURS, DecoderStep, ListeningStep, Perception, backend
from .record import Context, Record

BACKENDS = (OURS, "graph")  # ours; torch's own ops, in the forms that can be captured
PRECISIONS = ("fp8", "int4")  # of the weights, beside the model's own dtype


def run(context: Context, record: Record) -> None:
    """Lines for each part at several contexts, captured; a decision with its copies from and to the host."""
    record.put(ratios={})
    histories = (20,) if context.dry else (0, 1024, 4096)
    for name in (OURS,) if context.dry else BACKENDS:
        _perception(name, context, record)
        _dependent(name, context, record)
        for history in histories:
            step = DecoderStep(context, [context.config.chunk_rows], [history])
            moved = step.weight_bytes + step.kv_bytes
            _line(f"listening step at {history}", name, step.run, moved, step.operations, context, record)
        for history in histories[-2:]:
            if context.left_s < 6:
                break
            step = DecoderStep(context, [1], [history])
            moved = step.weight_bytes + step.kv_bytes
            _line(f"text token at {history}", name, step.run, moved, step.operations, context, record)
        torch.cuda.empty_cache() if context.device == "cuda" else None
    for precision in ("", *PRECISIONS):
        if precision and context.left_s < 8:
            record.put(left_out_text=f"from {precision} weights on: out of time")
            break
        _in_few_bits(precision, histories[-2:], context, record)
        if precision == "fp8":
            _float8_pages(histories[-1], context, record)
        decision = ListeningStep(context, 1, histories[-1], OURS, precision)
        moved = decision.step.weight_bytes + decision.step.kv_bytes + decision.perception.weight_bytes
        record.line(
            f"decision at {histories[-1]}, host to host", variant(precision), host_to_host(decision, context),
            moved, ceilings=context.ceilings, note="pinned PCM in, decision out, one stream",
        )  # fmt: skip


def variant(precision: str) -> str:
    return f"{OURS}, {precision}" if precision else OURS


def _float8_pages(history: int, context: Context, record: Record) -> None:
    """The listening step with fp8 weights and float8 KV pages, for one stream and for many."""
    for streams in (1,) if context.dry else (1, 64):
        rows = [context.config.chunk_rows] * streams
        for precision, scaled in (("fp8", False), ("fp8", True)):
            if streams == 1 and not scaled:
                continue  # has its line
            step = DecoderStep(context, rows, [history] * streams, precision, scaled)
            told = variant(precision) + ", fp8 KV" * scaled
            name = f"listening step at {history}" + f", {streams} streams" * (streams > 1)
            moved = step.weight_bytes + step.kv_bytes
            _line(name, OURS, step.run, moved, step.operations, context, record, told)


def _in_few_bits(precision: str, histories: tuple[int, ...], context: Context, record: Record) -> None:
    """The encoder, the listening step and the text token with quantised weights."""
    if not precision:
        return
    perception = Perception(context, 1, precision)
    moved = perception.weight_bytes
    _line("encoder, 1 chunk", OURS, perception.encode, moved, 0, context, record, variant(precision))
    for what, rows in (("listening step", context.config.chunk_rows), ("text token", 1)):
        for history in histories:
            step = DecoderStep(context, [rows], [history], precision)
            moved = step.weight_bytes + step.kv_bytes
            name = f"{what} at {history}"
            _line(name, OURS, step.run, moved, step.operations, context, record, variant(precision))


def _dependent(name: str, context: Context, record: Record) -> None:
    """The listening step with programmatic dependent launch (sm_90), beside the same without."""
    if name != OURS:
        return
    step, seconds = DecoderStep(context, [context.config.chunk_rows], [20]), {}
    for variant in (APART, OURS):
        with backend(variant, context):
            seconds[variant] = measure([step.run], context.device)
        record.line("listening step at 20", variant, seconds[variant])
    gain = seconds[APART].median / seconds[OURS].median
    record.values["ratios"]["listening step: plain launches / dependent ones"] = gain


def _perception(name: str, context: Context, record: Record) -> None:
    perception = Perception(context, 1)
    _line("mel, 1 stream", name, perception.hear, 0, 0, context, record)
    _line("encoder, 1 chunk", name, perception.encode, perception.weight_bytes, 0, context, record)


def _line(
    what: str,
    name: str,
    call: Callable[[], object],
    moved: float,
    operations: float,
    context: Context,
    record: Record,
    told: str = "",
) -> None:
    """A line of a call under the backend `name`, which the table calls `told`."""

    def forced() -> None:
        with backend(name, context):
            call()

    note, timing = "", None
    try:
        timing = measure([forced], context.device)
    except Exception as error:  # torch's attention synchronises: it cannot be captured
        print(f"{what}, {name}: {type(error).__name__}: {error}")
        note = "eager, with the host's time"
        timing = measure([forced], context.device, graph=False)
    record.line(what, told or name, timing, moved, operations, context.ceilings, note)


def host_to_host(step: ListeningStep, context: Context) -> Timing:
    """Wall time from samples in pinned host memory to the decision there."""
    if context.device != "cuda":
        return measure([step.run], context.device)
    replay = capture([step.run])
    pcm = torch.randn(step.perception.pcm.shape).mul_(0.1).pin_memory()
    decision = torch.empty(step.out[1].shape, dtype=torch.int32).pin_memory()
    seconds = []
    for _ in range(300):
        begin = time.perf_counter()
        step.perception.pcm.copy_(pcm, non_blocking=True)
        replay()
        decision.copy_(step.out[1], non_blocking=True)
        torch.cuda.current_stream().synchronize()
        seconds.append(time.perf_counter() - begin)
    return Timing(tuple(seconds[20:]))
