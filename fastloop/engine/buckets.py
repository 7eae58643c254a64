"""Buckets: the few shapes that steps are padded to, so that a captured step serves every batch that fits it.

    StepBatch (any sizes) -> Bucket (the least one that holds it) -> padded host arrays, in place

Padding must leave no trace. A padded row stores no key (slot -1) and is a sequence of its own that sees
one slot, so that every row belongs to a sequence, as the ops demand; sequences behind those have no rows.
A padded decision goes to the spare state slot, which belongs to no session; a padded draw is greedy and
nobody reads it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .runner import StepBatch

# One listener has 12 or 13 rows, which one tile of 16 holds; 64 is where the skinny `linear` ends. Up to
# there padding costs next to nothing, because the weights are the traffic. From the cohort of 208 = 16 x 13
# rows on arithmetic decides, so at most a third of a bucket is padding. The last one is a full step
# (EngineConfig.max_step_rows): 64 chunks, 832 rows, and the tokens of those who speak meanwhile. Only single
# items are larger, clips, whose buckets double.
ROWS = (16, 32, 64, 128, 208, 312, 416, 624, 832, 1024)
LEAST_DRAWS = 16  # rows of the whole vocabulary's head: one tile
LEAST_PAGES = 8  # columns of the block table
# On a GPU kernels look at no more columns than a sequence has, and a new bucket is 100 ms of capturing: those
# of 4,096 slots in pages of 64, of which a window of a minute and its prefix take 34.
LEAST_PAGES_GPU = 64

# Chunks of one pass of the encoder at most: 64 chunks are 1,280 rows, where arithmetic decides and a larger
# pass saves nothing.
MOST_CHUNKS = 64
SPARE_STREAMS = MOST_CHUNKS  # slots of the mel state that padded streams of one edge need while capturing


@dataclass(frozen=True, order=True)
class Bucket:
    """The sizes of one captured step, all of them at least as large as the batch's.

    Each row may be a sequence of its own, so there are as many sequences as rows.
    """

    rows: int  # N
    decides: int  # R
    draws: int  # T; 0: the step has no text, and the vocabulary's head does not run
    pages: int  # M

    def shapes(self) -> dict[str, tuple[np.dtype[Any], tuple[int, ...]]]:
        """Name -> (dtype, shape) of every array that a step of this bucket reads from the host."""
        n, r, t, m = self.rows, self.decides, self.draws, self.pages
        whole, index, real = (np.dtype(kind) for kind in (np.int64, np.int32, np.float32))
        return {
            "ids": (whole, (n,)),
            "feed_slots": (whole, (n,)),
            "positions": (whole, (n,)),
            "slots": (whole, (n,)),
            "row_starts": (index, (n + 1,)),
            "block_table": (index, (n, m)),
            "kv_lens": (index, (n,)),
            "gaps": (index, (n, 2)),
            "audio_index": (whole, (n,)),  # which audio token a row takes, -1: its own embedding
            "decide_rows": (whole, (r,)),
            "decide_slots": (whole, (r,)),
            "draw_rows": (whole, (t,)),
            "draw_slots": (whole, (t,)),
            "draw_phase": (whole, (t,)),
            "temperature": (real, (t,)),
            "top_k": (whole, (t,)),
            "top_p": (real, (t,)),
            "seed": (whole, (t,)),
            "counter": (whole, (t,)),
        }


def rows_bucket(rows: int) -> int:
    """The least bucket that holds so many rows: ROWS, then doubling.

    >>> [rows_bucket(n) for n in (1, 13, 17, 129, 209, 840, 1025)]
    [16, 16, 32, 208, 312, 1024, 2048]
    """
    if rows < 1:
        raise ValueError(f"rows_bucket: a step has at least one row, got {rows}")
    return next(size for size in _row_sizes() if size >= rows)


def chunks_bucket(chunks: int) -> int:
    """The least power of two that holds so many chunks, at most MOST_CHUNKS.

    >>> [chunks_bucket(n) for n in (1, 2, 3, 33, 64)]
    [1, 2, 4, 64, 64]
    """
    if not 1 <= chunks <= MOST_CHUNKS:
        raise ValueError(f"chunks_bucket: a pass has 1 to {MOST_CHUNKS} chunks, got {chunks}")
    return _doubled(1, chunks)


def buckets_of(rows: int, draws: int, listening_rows: int, pages: int) -> Iterator[Bucket]:
    """Every bucket that steps of up to so many rows fall into, up to so many of which draw a token, and whose
    sequences have no more than `pages` pages.
    """
    for size in itertools.takewhile(lambda size: size <= rows_bucket(rows), _row_sizes()):
        most = min(size, _doubled(LEAST_DRAWS, draws)) if draws else 0
        counts = {0, *(min(most, LEAST_DRAWS << doublings) for doublings in range(most.bit_length()))}
        yield from (Bucket(size, max(1, size // listening_rows), n, pages) for n in sorted(counts))


def _row_sizes() -> Iterator[int]:
    yield from ROWS
    size = ROWS[-1]
    while True:
        size *= 2
        yield size


def _doubled(least: int, count: int) -> int:
    """least x 2^k, the smallest that is not below `count`."""
    while least < count:
        least *= 2
    return least


def least_pages(device: torch.device) -> int:
    """Columns of the block table that every bucket has at least."""
    return LEAST_PAGES_GPU if device.type == "cuda" else LEAST_PAGES


def bucket_of(batch: StepBatch, listening_rows: int, pages: int = LEAST_PAGES) -> Bucket:
    """The least bucket that holds a batch.

    listening_rows: rows of a listening step without a pending token in front; each decision stands behind
    so many rows, so their number needs no bucket of its own (and two rows of the head cost nothing). The
    draws double from 16, for they cost a pass over the vocabulary's head; the columns of the block table
    double from `pages`, for what an op spends on them may follow their number.
    """
    rows = rows_bucket(len(batch.ids))
    draws, width = len(batch.draw_rows), batch.block_table.shape[1]
    return Bucket(
        rows=rows,
        decides=max(1, rows // listening_rows),
        draws=min(rows, _doubled(LEAST_DRAWS, draws)) if draws else 0,
        pages=_doubled(pages, width),
    )


def check_fits(batch: StepBatch, bucket: Bucket, audio_tokens: int) -> None:
    """ValueError naming argument and shapes where a batch does not fit a bucket."""
    rows, decides, draws = len(batch.ids), len(batch.decide_rows), len(batch.draw_rows)
    sequences = len(batch.kv_lens)
    if sequences > rows:
        raise ValueError(f"step: kv_lens is [{sequences}], more sequences than the {rows} rows of ids")
    if len(batch.audio_rows) != audio_tokens:
        raise ValueError(
            f"step: audio_rows is [{len(batch.audio_rows)}], but audio holds {audio_tokens} tokens"
        )
    limits = (rows, bucket.rows), (decides, bucket.decides), (draws, bucket.draws)
    for name, (size, limit) in zip(("ids", "decide_rows", "draw_rows"), limits, strict=True):
        if size > limit:
            raise ValueError(f"step: {name} is [{size}], the captured step takes [{limit}] ({bucket})")
    if batch.block_table.shape[1] > bucket.pages:
        raise ValueError(
            f"step: block_table is {list(batch.block_table.shape)}, the captured step takes "
            f"{[bucket.rows, bucket.pages]} ({bucket})"
        )
    exact = {"positions": rows, "slots": rows, "row_starts": sequences + 1, "decide_slots": decides}
    exact |= dict.fromkeys(("draw_phase", "temperature", "top_k", "top_p", "seed", "counter"), draws)
    for name, size in exact.items():
        if (shape := getattr(batch, name).shape) != (size,):
            raise ValueError(f"step: {name} is {list(shape)}, must be [{size}]")
    for name, wanted in (("block_table", (sequences, bucket.pages)), ("gaps", (sequences, 2))):
        shape = getattr(batch, name).shape
        if len(shape) != 2 or shape[0] != wanted[0] or (name == "gaps" and shape != wanted):
            raise ValueError(f"step: {name} is {list(shape)}, must be {list(wanted)}")


def clear(out: Mapping[str, np.ndarray], spare_slot: int) -> None:
    """Padding and nothing else, in place: what a step is captured on. No session's state is touched by it."""
    rows = len(out["ids"])
    for array in out.values():
        array.fill(0)
    out["feed_slots"].fill(-1)
    out["slots"].fill(-1)
    out["audio_index"].fill(-1)
    out["top_p"].fill(1)
    out["decide_slots"].fill(spare_slot)
    out["draw_slots"].fill(spare_slot)
    out["row_starts"][:] = np.arange(rows + 1)
    out["kv_lens"].fill(1)
    out["gaps"].fill(1)


def pad(batch: StepBatch, bucket: Bucket, spare_slot: int, out: Mapping[str, np.ndarray]) -> None:
    """Write a batch and the padding behind it into `out`, the arrays of `bucket.shapes()`, in place."""
    check_fits(batch, bucket, sum(len(tokens) for tokens in batch.audio))
    rows, sequences = len(batch.ids), len(batch.kv_lens)
    clear(out, spare_slot)
    for name in out.keys() - {"audio_index", "row_starts", "block_table"}:
        given = getattr(batch, name)
        out[name][: len(given)] = given
    out["audio_index"][batch.audio_rows] = np.arange(len(batch.audio_rows))
    out["block_table"][:sequences, : batch.block_table.shape[1]] = batch.block_table
    # Sequences: the batch's, then one for each padded row, then those without rows.
    padded = bucket.rows - rows
    out["row_starts"][: sequences + 1] = batch.row_starts
    out["row_starts"][sequences : sequences + padded] = np.arange(rows, bucket.rows)
    out["row_starts"][sequences + padded :] = bucket.rows
    out["kv_lens"][sequences + padded :] = 0
    out["gaps"][sequences + padded :] = 0
