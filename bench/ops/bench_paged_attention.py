"""paged_attention: listeners (13 rows) and speakers (1 row) at any length; cold keys and values."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from fastloop.config import ModelConfig
from fastloop.ops.paged_attention import paged_attention_bytes
from fastloop.testing.assertions import seeded
from fastloop.testing.implementations import Implementation
from fastloop.testing.op_cases import paged_attention_case

PAGE = 64
STEPS = {  # rows and slots of each sequence
    "listener at 100": ([13], [100]),
    "listener at 1k": ([13], [1024]),
    "listener at 4k": ([13], [4096]),
    "speaker at 1k": ([1], [1024]),
    "speaker at 4k": ([1], [4096]),
    "12 listeners and 4 speakers at 1k": ([13] * 12 + [1] * 4, [1024] * 16),
}


@pytest.mark.parametrize(("rows", "lens"), STEPS.values(), ids=STEPS)
def test_paged_attention(
    clock: Callable[..., None],
    implementation: Implementation,
    config: ModelConfig,
    dtype: torch.dtype,
    rows: list[int],
    lens: list[int],
) -> None:
    d = config.decoder
    dims = {"heads": d.heads, "kv_heads": d.kv_heads, "head_width": d.head_width}
    gaps = [(40, 51)] * len(rows)
    case = paged_attention_case(seeded(0), rows=rows, lens=lens, gaps=gaps, page=PAGE, dtype=dtype, **dims)
    moved = paged_attention_bytes(sum(rows), sum(lens), **dims, itemsize=dtype.itemsize)
    clock(implementation, case, moved, cold=("k_pages", "v_pages"))
