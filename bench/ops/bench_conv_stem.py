"""conv_stem: 40 frames of 1 and of 16 chunks; cold weights, as they are read once a chunk."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from fastloop.config import MEL_BINS, ModelConfig
from fastloop.ops.conv_stem import conv_stem_bytes
from fastloop.testing.assertions import seeded
from fastloop.testing.implementations import Implementation
from fastloop.testing.op_cases import conv_stem_case


@pytest.mark.parametrize("blocks", [1, 16])
def test_conv_stem(
    clock: Callable[..., None],
    implementation: Implementation,
    config: ModelConfig,
    dtype: torch.dtype,
    blocks: int,
) -> None:
    frames, width = config.chunk_frames, config.encoder.width
    case = conv_stem_case(seeded(0), blocks=blocks, frames=frames, width=width, dtype=dtype)
    moved = conv_stem_bytes(blocks, frames, MEL_BINS, width, dtype.itemsize)
    clock(implementation, case, moved, cold=("weight1", "weight2"))
