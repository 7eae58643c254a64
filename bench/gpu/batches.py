"""Many streams in one step: 1 to 1,024 listeners, and listeners beside speakers; time a step, and how many
streams that would serve live (one chunk of 0.4 s each).
"""

from __future__ import annotations

import torch

from .clock import measure
from .model import OURS, DecoderStep, Perception, backend
from .record import Context, Record

WINDOW_SLOTS = 1950  # 60 s of sound: 150 chunks of 13 positions


def run(context: Context, record: Record) -> None:
    """Lines: perception and decoder step of B listeners; mixed steps. Values: live streams by B."""
    sizes, window = ((2,), 20) if context.dry else ((1, 4, 16, 64, 256, 1024), WINDOW_SLOTS)
    rows = context.config.chunk_rows
    live: dict[str, float] = {}
    for streams in sizes:
        if context.left_s < 8:
            record.put(left_out_text=f"from {streams} listeners on: out of time")
            break
        heard = _perception(streams, context, record)
        step = DecoderStep(context, [rows] * streams, [window] * streams)
        decided = _step(f"{streams} listeners at {window}", step, context, record)
        live[str(streams)] = streams * context.config.chunk_seconds / (heard + decided)
        record.put(live_streams=live, live_text=f"{max(live.values()):.0f} streams keep up at most")
        del step
        _free(context)
    for listeners, speakers in ((2, 2),) if context.dry else ((15, 1), (60, 4), (240, 16)):
        if context.left_s < 6:
            break
        step = DecoderStep(
            context, [rows] * listeners + [1] * speakers, [window] * (listeners + speakers)
        )  # fmt: skip
        _step(f"{listeners} listeners + {speakers} speakers at {window}", step, context, record)
        del step
        _free(context)


def _perception(streams: int, context: Context, record: Record) -> float:
    perception = Perception(context, streams)
    encoder = perception.encoder
    products = sum(w.numel() for name, w in encoder.weights.items() if w.dim() == 2)
    operations = 2.0 * products * streams * context.config.chunk_frames / 2

    def call() -> None:
        with backend(OURS, context):
            perception.run()

    timing = measure([call], context.device)
    moved = perception.weight_bytes
    record.line(f"perception of {streams}", OURS, timing, moved, operations, context.ceilings)
    return timing.median


def _step(name: str, step: DecoderStep, context: Context, record: Record) -> float:
    def call() -> None:
        with backend(OURS, context):
            step.run()

    timing = measure([call], context.device)
    moved = step.weight_bytes + step.kv_bytes
    record.line(name, OURS, timing, moved, step.operations, context.ceilings)
    return timing.median


def _free(context: Context) -> None:
    if context.device == "cuda":
        torch.cuda.empty_cache()
