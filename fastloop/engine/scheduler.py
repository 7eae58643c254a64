"""Which sessions go into a step, the ragged batch they make, and the way back of its results.

Sessions enter in the order of the admission policy (fastloop.engine.admission), until the step is full.
Listening sessions (13 rows a chunk) and responding ones (1 row) share one pass of the decoder; sessions never
wait for each other's ticks.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate, chain

import numpy as np

from .admission import Order, fifo
from .protocol import Chunk, Item, Stream
from .runner import StepBatch, StepResult


def plan(
    streams: Iterable[Stream],
    max_rows: int,
    order: Order = fifo,
    now: float = 0.0,
    step_seconds: float = 0.0,
) -> list[Item]:
    """The items of the next step, in the policy's order; their KV slots are taken.

    now: when the step begins, monotonic seconds; step_seconds: what it takes about.
    """
    by_id = {stream.id: stream for stream in streams}
    waiting = [w for stream in by_id.values() if (w := stream.waiting) is not None]
    items: list[Item] = []
    budget = max_rows
    for entry in order(waiting, now, step_seconds):
        if budget <= 0:
            break
        stream = by_id[entry.key]
        item = stream.plan(budget)
        if item is None:
            continue
        if items and len(item.ids) > budget:
            stream.undo(item)
            break
        items.append(item)
        budget -= len(item.ids)
    return items


def build(items: list[Item]) -> StepBatch:
    """Items -> one ragged batch of host arrays."""
    counts = [len(item.ids) for item in items]
    starts = list(accumulate(counts, initial=0))
    tables = [item.stream.kv.table for item in items]
    width = max(map(len, tables))
    decide = [
        (start + row, item.stream.slot)
        for item, start in zip(items, starts, strict=False)
        for row in item.decide_rows
    ]
    audio = [
        (start + first, tokens)
        for item, start in zip(items, starts, strict=False)
        for first, tokens in item.audio
    ]
    drawn = [
        (item, start + len(item.ids) - 1) for item, start in zip(items, starts, strict=False) if item.draws
    ]
    configs = [item.stream.config for item, _ in drawn]
    return StepBatch(
        ids=np.fromiter(chain.from_iterable(item.ids for item in items), np.int64, starts[-1]),
        feed_slots=np.repeat([item.stream.slot if item.feeds else -1 for item in items], counts),
        positions=runs([item.position for item in items], counts),
        slots=np.concatenate([item.slots for item in items]),
        row_starts=np.array(starts, dtype=np.int32),
        block_table=np.array([t + [0] * (width - len(t)) for t in tables], dtype=np.int32),
        kv_lens=np.array([item.stream.kv.kv_len - item.reserve for item in items], dtype=np.int32),
        gaps=np.array([item.stream.kv.gap for item in items], dtype=np.int32),
        audio_rows=runs([first for first, _ in audio], [len(tokens) for _, tokens in audio]),
        audio=[tokens for _, tokens in audio],
        decide_rows=np.array([row for row, _ in decide], dtype=np.int64),
        decide_slots=np.array([slot for _, slot in decide], dtype=np.int64),
        draw_rows=np.array([row for _, row in drawn], dtype=np.int64),
        draw_slots=np.array([item.stream.slot for item, _ in drawn], dtype=np.int64),
        draw_phase=np.array([item.phase for item, _ in drawn], dtype=np.int64),
        temperature=np.array([c.sampling.temperature for c in configs], dtype=np.float32),
        top_k=np.array([c.sampling.top_k for c in configs], dtype=np.int64),
        top_p=np.array([c.sampling.top_p for c in configs], dtype=np.float32),
        seed=np.array([c.seed for c in configs], dtype=np.int64),
        counter=np.array([item.position + len(item.ids) - 1 for item, _ in drawn], dtype=np.int64),
    )


def runs(firsts: Sequence[int], counts: Sequence[int]) -> np.ndarray:
    """Whole numbers in runs, `counts[i]` of them from `firsts[i]` on: int64 [sum of counts]."""
    each = np.array(counts, dtype=np.int64)
    ends = np.cumsum(each)
    return np.repeat(np.array(firsts, dtype=np.int64) - ends + each, each) + np.arange(each.sum())


def commit(items: list[Item], result: StepResult) -> tuple[list[Chunk], int]:
    """Hand every session its results; returns the chunks that were decided, and how many tokens were taken.

    Void items have results too; nobody takes them.
    """
    decided: list[Chunk] = []
    row, draw, tokens = 0, 0, 0
    for item in items:
        rows, mine = slice(row, row + len(item.decide_rows)), draw
        row, draw = rows.stop, draw + item.draws
        if item.void:
            continue
        item.stream.ahead.remove(item)
        if item.draws:
            item.stream.commit_text(item, result.drawn[mine])
            tokens += 1
        else:
            decided += item.stream.commit_listening(item, result.decisions[rows], result.p_respond[rows])
    return decided, tokens
