"""decide: one session's decision, 64 sessions' at once, and 8 queued chunks of one; hot."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from fastloop.config import ModelConfig
from fastloop.ops.decide import decide_bytes
from fastloop.testing.assertions import seeded
from fastloop.testing.implementations import Implementation
from fastloop.testing.op_cases import decide_case


@pytest.mark.parametrize(("rows", "sessions"), [(1, 1), (64, 64), (8, 1)], ids=["1x1", "64x1", "1x8"])
def test_decide(
    clock: Callable[..., None],
    implementation: Implementation,
    config: ModelConfig,
    dtype: torch.dtype,
    rows: int,
    sessions: int,
) -> None:
    width = config.decoder.width
    case = decide_case(seeded(0), rows=rows, width=width, sessions=sessions, dtype=dtype)
    clock(implementation, case, decide_bytes(rows, width, dtype.itemsize))
