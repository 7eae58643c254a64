"""Random ragged steps: listeners with audio tokens and a decision, speakers with one row and a draw."""

from __future__ import annotations

import numpy as np
import torch
from numpy.random import Generator

from ..config import ModelConfig, small
from ..engine.runner import StepBatch

MODEL = small()
LISTENING_ROWS = MODEL.chunk_tokens + 2  # without a pending token in front
PAGE_TOKENS, PAGES = 8, 256
SESSIONS = 40  # state slots of the sessions in a batch


def random_batch(
    rng: Generator, listeners: int, speakers: int, pending: bool | None = None, model: ModelConfig = MODEL
) -> StepBatch:
    """Sequences in random order over random pages, none of them shared; prefixes end in a gap.

    pending: whether listeners have a control token in front of their rows; None draws it.
    """
    speaks = rng.permutation(np.arange(listeners + speakers) < speakers)
    front = rng.integers(0, 2, len(speaks)) if pending is None else np.full(len(speaks), int(pending))
    counts = np.where(speaks, 1, model.chunk_tokens + 2 + front)
    starts = np.concatenate(([0], np.cumsum(counts)))
    prefix = rng.integers(1, PAGE_TOKENS + 1, len(counts))  # the first page, and the gap behind it
    lens = PAGE_TOKENS + rng.integers(0, 12, len(counts)) + counts
    table, slots = _tables(rng, lens, counts)
    rows = int(starts[-1])
    ends = starts[1:] - 1
    audio_rows = [np.arange(e - model.chunk_tokens, e) for e in ends[~speaks]]
    draws, owners = int(speaks.sum()), rng.permutation(SESSIONS)[: len(speaks)]
    return StepBatch(
        ids=rng.integers(0, model.decoder.vocab, rows),
        feed_slots=np.full(rows, -1),
        positions=np.concatenate([length - n + np.arange(n) for length, n in zip(lens, counts, strict=True)]),
        slots=slots,
        row_starts=starts.astype(np.int32),
        block_table=table,
        kv_lens=lens.astype(np.int32),
        gaps=np.stack((prefix, np.full(len(prefix), PAGE_TOKENS)), axis=1).astype(np.int32),
        audio_rows=np.concatenate([*audio_rows, np.empty(0, dtype=np.int64)]),
        audio=[
            torch.from_numpy(rng.standard_normal((len(r), model.decoder.width), dtype=np.float32))
            for r in audio_rows
        ],
        decide_rows=ends[~speaks],
        decide_slots=owners[~speaks],
        draw_rows=ends[speaks],
        draw_slots=owners[speaks],
        draw_phase=rng.integers(0, 2, draws),
        temperature=rng.choice([0.0, 0.8], draws).astype(np.float32),
        top_k=rng.choice([0, 20], draws),
        top_p=rng.choice([1.0, 0.9], draws).astype(np.float32),
        seed=rng.integers(0, 2**63, draws),
        counter=rng.integers(0, 2**20, draws),
    )


def _tables(rng: Generator, lens: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pages for sequences of these lengths -> block table int32 [B, M], slots int64 [N] of the new rows."""
    free = rng.permutation(PAGES)
    needed = -(-lens // PAGE_TOKENS)
    table = np.zeros((len(lens), int(needed.max())), dtype=np.int32)
    slots = []
    for b, (length, count) in enumerate(zip(lens, counts, strict=True)):
        table[b, : needed[b]], free = free[: needed[b]], free[needed[b] :]
        index = np.arange(length - count, length)
        slots.append(table[b, index // PAGE_TOKENS].astype(np.int64) * PAGE_TOKENS + index % PAGE_TOKENS)
    return table, np.concatenate(slots)
