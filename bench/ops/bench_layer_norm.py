"""layer_norm of the audio tower: 20 positions of 1 and of 16 chunks; hot, as rows are between two ops."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from fastloop.config import ModelConfig
from fastloop.ops.layer_norm import layer_norm_bytes
from fastloop.testing.assertions import seeded
from fastloop.testing.implementations import Implementation
from fastloop.testing.op_cases import layer_norm_case


@pytest.mark.parametrize("rows", [20, 320])
def test_layer_norm(
    clock: Callable[..., None],
    implementation: Implementation,
    config: ModelConfig,
    dtype: torch.dtype,
    rows: int,
) -> None:
    width = config.encoder.width
    case = layer_norm_case(seeded(0), rows=rows, width=width, dtype=dtype)
    clock(implementation, case, layer_norm_bytes(rows, width, dtype.itemsize))
