"""block_attention: the 20 positions of 1 and of 16 chunks, and an offline block of 100; hot."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from fastloop.config import ModelConfig
from fastloop.ops.block_attention import block_attention_bytes
from fastloop.testing.assertions import seeded
from fastloop.testing.implementations import Implementation
from fastloop.testing.op_cases import block_attention_case


@pytest.mark.parametrize(
    ("blocks", "positions"), [(1, 20), (16, 20), (1, 100)], ids=["1x20", "16x20", "1x100"]
)
def test_block_attention(
    clock: Callable[..., None],
    implementation: Implementation,
    config: ModelConfig,
    dtype: torch.dtype,
    blocks: int,
    positions: int,
) -> None:
    e = config.encoder
    dims = {"blocks": blocks, "positions": positions, "heads": e.heads, "head_width": e.head_width}
    case = block_attention_case(seeded(0), dtype=dtype, **dims)
    clock(implementation, case, block_attention_bytes(blocks, positions, e.width, dtype.itemsize))
