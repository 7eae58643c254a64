"""linear_quantised: the matrices of the decoder in 8 and 4 bits; cold weights, read once a step each."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from fastloop.config import ModelConfig
from fastloop.ops.linear_quantised import linear_quantised_bytes
from fastloop.testing.assertions import seeded
from fastloop.testing.implementations import Implementation
from fastloop.testing.op_cases import Arguments, linear_quantised_case

BITS = {"int8": 8, "fp8": 8, "int4": 4}


def matrices(config: ModelConfig) -> dict[str, Arguments]:
    """The dims and epilogue of each matrix, by its name in the checkpoint."""
    d = config.decoder
    return {
        "decoder.qkv": {"width_in": d.width, "width_out": d.qkv_rows},
        "decoder.out": {"width_in": d.heads * d.head_width, "width_out": d.width, "residual": True},
        "decoder.gate_up": {"width_in": d.width, "width_out": 2 * d.ffn, "epilogue": "silu_gate"},
        "decoder.down": {"width_in": d.ffn, "width_out": d.width, "residual": True},
    }


@pytest.mark.parametrize("rows", [1, 13, 64])
@pytest.mark.parametrize("name", ["decoder.qkv", "decoder.out", "decoder.gate_up", "decoder.down"])
@pytest.mark.parametrize("kind", list(BITS))
def test_linear_quantised(
    clock: Callable[..., None],
    implementation: Implementation,
    config: ModelConfig,
    dtype: torch.dtype,
    kind: str,
    name: str,
    rows: int,
) -> None:
    dims = matrices(config)[name]
    case = linear_quantised_case(seeded(0), kind=kind, rows=rows, dtype=dtype, **dims)
    group = 32 if kind == "int4" else 0
    moved = linear_quantised_bytes(
        rows, dims["width_in"], dims["width_out"], dtype.itemsize, BITS[kind], group
    )
    clock(implementation, case, moved, cold=("values",))
