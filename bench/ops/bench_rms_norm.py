"""rms_norm of the decoder: a text token, a listening step, 64 tokens; hot, as rows are between two ops."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from fastloop.config import ModelConfig
from fastloop.ops.rms_norm import rms_norm_bytes
from fastloop.testing.assertions import seeded
from fastloop.testing.implementations import Implementation
from fastloop.testing.op_cases import rms_norm_case


@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("rows", [1, 13, 64])
def test_rms_norm(
    clock: Callable[..., None],
    implementation: Implementation,
    config: ModelConfig,
    dtype: torch.dtype,
    rows: int,
    residual: bool,
) -> None:
    width = config.decoder.width
    case = rms_norm_case(seeded(0), rows=rows, width=width, residual=residual, dtype=dtype)
    clock(implementation, case, rms_norm_bytes(rows, width, dtype.itemsize, residual))
