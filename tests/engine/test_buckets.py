"""Buckets of a captured step: they hold what they must, waste little; padding keeps the ops' contracts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastloop.config import published_3b
from fastloop.engine.buckets import (
    ROWS,
    Bucket,
    bucket_of,
    buckets_of,
    clear,
    least_pages,
    pad,
    rows_bucket,
)
from fastloop.engine.memory import session_pages
from fastloop.engine.runner import StepBatch
from fastloop.options import EngineConfig, SessionConfig
from fastloop.testing.steps import LISTENING_ROWS, random_batch

SPARE = 99


def arrays(bucket: Bucket) -> dict[str, np.ndarray]:
    """Arrays of a bucket that hold what nobody may read."""
    return {name: np.full(shape, 77, dtype) for name, (dtype, shape) in bucket.shapes().items()}


@given(rows=st.integers(1, 5000))
def test_rows_bucket_is_the_least_that_holds_them(rows: int) -> None:
    size = rows_bucket(rows)
    assert size >= rows
    assert rows_bucket(size) == size
    assert size <= max(ROWS[0], 2 * rows), "more than half of it is padding"
    if 208 <= rows <= 1024:
        assert 3 * (size - rows) <= size, "more than a third of it is padding"
    if size > ROWS[0]:
        smaller = [n for n in range(1, size) if rows_bucket(n) == n]
        assert smaller[-1] < rows


def test_a_full_step_is_a_bucket() -> None:
    """Else every full step is padded to the next one, which is nearly twice as large."""
    most = EngineConfig().max_step_rows
    assert rows_bucket(most) == most == ROWS[-1]


def test_buckets_ahead_are_those_of_the_batches() -> None:
    """Those of three listeners or speakers at once, in any mixture."""
    ahead = set(buckets_of(3 * 13, 3, LISTENING_ROWS, 8))
    rng = np.random.default_rng(3)
    met = {
        bucket_of(random_batch(rng, listening, speaking), LISTENING_ROWS)
        for listening in range(4)
        for speaking in range(4 - listening)
        if listening + speaking
    }
    assert {b.draws for b in buckets_of(3 * 13, 0, LISTENING_ROWS, 8)} == {0}
    assert met <= ahead and {b.draws for b in ahead} == {0, 16} and {b.rows for b in ahead} == {16, 32, 64}


def test_block_tables_are_wide_on_gpus_from_the_start() -> None:
    """So a window of a minute meets no second bucket, which would be captured while its session waits."""
    pages = least_pages(torch.device("cuda", 0))
    assert bucket_of(random_batch(np.random.default_rng(1), 1, 0), LISTENING_ROWS, pages).pages == 64
    assert session_pages(published_3b(), EngineConfig(), SessionConfig(), (64, 0)) <= pages
    assert least_pages(torch.device("cpu")) == 8


def test_a_step_without_rows_has_no_bucket() -> None:
    with pytest.raises(ValueError, match="at least one row, got 0"):
        rows_bucket(0)


@given(seed=st.integers(0, 2**32 - 1), listeners=st.integers(0, 9), speakers=st.integers(0, 20))
def test_bucket_holds_the_batch_and_padding_keeps_it(seed: int, listeners: int, speakers: int) -> None:
    batch = random_batch(np.random.default_rng(seed), max(listeners, int(not speakers)), speakers)
    bucket = bucket_of(batch, LISTENING_ROWS)
    out = arrays(bucket)
    pad(batch, bucket, SPARE, out)
    for name in out.keys() - {"audio_index", "block_table", "row_starts"}:
        given_ = getattr(batch, name)
        assert np.array_equal(out[name][: len(given_)], given_), name
    table = out["block_table"]
    assert np.array_equal(table[: len(batch.kv_lens), : batch.block_table.shape[1]], batch.block_table)
    assert np.array_equal(np.flatnonzero(out["audio_index"] >= 0), batch.audio_rows)
    assert (bucket.draws == 0) == (speakers == 0)


@given(seed=st.integers(0, 2**32 - 1), listeners=st.integers(0, 9), speakers=st.integers(0, 20))
def test_padding_leaves_no_trace(seed: int, listeners: int, speakers: int) -> None:
    batch = random_batch(np.random.default_rng(seed), max(listeners, int(not speakers)), speakers)
    bucket = bucket_of(batch, LISTENING_ROWS)
    out = arrays(bucket)
    pad(batch, bucket, SPARE, out)
    rows = len(batch.ids)
    assert (out["slots"][rows:] == -1).all() and (out["slots"][:rows] >= 0).all()
    assert (out["decide_slots"][len(batch.decide_rows) :] == SPARE).all()
    assert (out["temperature"][len(batch.draw_rows) :] == 0).all()
    assert_sequences_are_whole(out, batch)


def assert_sequences_are_whole(out: dict[str, np.ndarray], batch: StepBatch) -> None:
    """As paged_attention demands, every row is in one sequence, which is at least as long as its rows."""
    starts, lens, gaps = out["row_starts"], out["kv_lens"], out["gaps"]
    counts = np.diff(starts)
    assert starts[0] == 0 and starts[-1] == len(out["ids"]) and (counts >= 0).all()
    assert (counts <= lens).all()
    real = len(batch.kv_lens)
    assert set(counts[real:]) <= {0, 1} and np.array_equal(lens[real:], counts[real:])
    assert np.array_equal(gaps[real:, 0], lens[real:]) and np.array_equal(gaps[real:, 1], lens[real:])


def test_ops_take_a_cleared_bucket() -> None:
    """The reference of paged_attention checks its contract on the padding alone."""
    from fastloop.ops import paged_attention_ref

    out = arrays(bucket := Bucket(rows=16, decides=1, draws=0, pages=8))
    clear(out, SPARE)
    pages = torch.randn(3, 4, 2, 8)
    q = torch.randn(bucket.rows, 4, 8)
    given_ = (torch.from_numpy(out[n]) for n in ("block_table", "row_starts", "kv_lens", "gaps"))
    assert paged_attention_ref(q, pages, pages, *given_).isfinite().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ids": np.zeros(40, dtype=np.int64)}, r"ids is \[40\], the captured step takes \[32\]"),
        ({"positions": np.zeros(3, dtype=np.int64)}, r"positions is \[3\], must be \[26\]"),
        (
            {"decide_rows": np.zeros(9, dtype=np.int64)},
            r"decide_rows is \[9\], .* step takes \[2\]",
        ),
        ({"draw_rows": np.zeros(1, dtype=np.int64)}, r"draw_rows is \[1\], the captured step takes \[0\]"),
        ({"gaps": np.zeros((1, 2), dtype=np.int32)}, r"gaps is \[1, 2\], must be \[2, 2\]"),
        ({"block_table": np.zeros((2, 9), dtype=np.int32)}, r"block_table is \[2, 9\].* takes \[32, 8\]"),
        ({"block_table": np.zeros((1, 8), dtype=np.int32)}, r"block_table is \[1, 8\], must be \[2, 8\]"),
        ({"kv_lens": np.zeros(27, dtype=np.int32)}, r"kv_lens is \[27\], more sequences than the 26 rows"),
        ({"audio": []}, r"audio_rows is \[20\], but audio holds 0 tokens"),
    ],
)
def test_a_mismatch_names_argument_and_shapes(change: dict[str, Any], message: str) -> None:
    batch = random_batch(np.random.default_rng(0), listeners=2, speakers=0, pending=True)
    bucket = bucket_of(batch, LISTENING_ROWS)
    with pytest.raises(ValueError, match=message):
        pad(replace(batch, **change), bucket, SPARE, arrays(bucket))
