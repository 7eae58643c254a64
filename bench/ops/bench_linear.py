"""linear: every matrix of the encoder and the decoder; cold weights, as each is read once a step."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from fastloop.config import ModelConfig
from fastloop.ops.linear import linear_bytes
from fastloop.testing.assertions import seeded
from fastloop.testing.implementations import Implementation
from fastloop.testing.op_cases import Arguments, linear_case


def matrices(config: ModelConfig) -> dict[str, Arguments]:
    """The dims and epilogue of each matrix, by its name in the checkpoint."""
    e, d = config.encoder, config.decoder
    return {
        "encoder.qkv": {"width_in": e.width, "width_out": 3 * e.width, "bias": True},
        "encoder.out": {"width_in": e.width, "width_out": e.width, "bias": True, "residual": True},
        "encoder.fc1": {"width_in": e.width, "width_out": e.ffn, "bias": True, "epilogue": "gelu"},
        "encoder.fc2": {"width_in": e.ffn, "width_out": e.width, "bias": True, "residual": True},
        "decoder.qkv": {"width_in": d.width, "width_out": d.qkv_rows},
        "decoder.out": {"width_in": d.heads * d.head_width, "width_out": d.width, "residual": True},
        "decoder.gate_up": {"width_in": d.width, "width_out": 2 * d.ffn, "epilogue": "silu_gate"},
        "decoder.down": {"width_in": d.ffn, "width_out": d.width, "residual": True},
        "decoder.head": {"width_in": d.width, "width_out": d.vocab_padded},
    }


CASES = [(name, 20) for name in ("encoder.qkv", "encoder.out", "encoder.fc1", "encoder.fc2")]
CASES += [(f"decoder.{name}", rows) for name in ("qkv", "out", "gate_up", "down") for rows in (1, 13, 64)]
CASES += [("decoder.head", 1)]


@pytest.mark.parametrize(("name", "rows"), CASES, ids=[f"{name}-{rows}" for name, rows in CASES])
def test_linear(
    clock: Callable[..., None],
    implementation: Implementation,
    config: ModelConfig,
    dtype: torch.dtype,
    name: str,
    rows: int,
) -> None:
    dims = matrices(config)[name]
    case = linear_case(seeded(0), rows=rows, dtype=dtype, **dims)
    moved = linear_bytes(rows, dims["width_in"], dims["width_out"], dtype.itemsize, dtype.itemsize)
    clock(implementation, case, moved, cold=("weight",))
