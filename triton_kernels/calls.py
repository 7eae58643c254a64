"""The calls that a step of the 3B model makes of each op, on tensors without memory ("meta").

    {op: {name of the call: a function that makes it}}

For whatever wants to know what would run without running it: `resources` compiles them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..config import published_3b
from .layer_norm import layer_norm_triton
from .rms_norm import rms_norm_triton

MODEL = published_3b()
E, D = MODEL.encoder.width, MODEL.decoder.width
BF16, F32 = torch.bfloat16, torch.float32


def _empty(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _layer_norm(rows: int, dtype: torch.dtype = BF16) -> None:
    weight = _empty(E, dtype=dtype)
    layer_norm_triton(_empty(rows, E, dtype=dtype), weight, weight, 1e-5)


def _rms_norm(rows: int, dtype: torch.dtype = BF16, residual: bool = False) -> None:
    x = _empty(rows, D, dtype=dtype)
    rms_norm_triton(x, _empty(D, dtype=dtype), 1e-6, x if residual else None)


CALLS: dict[str, dict[str, Callable[[], Any]]] = {
    "layer_norm": {"a chunk": lambda: _layer_norm(20), "float32": lambda: _layer_norm(20, F32)},
    "rms_norm": {
        "a listening step": lambda: _rms_norm(13),
        "with a residual": lambda: _rms_norm(13, residual=True),
        "float32": lambda: _rms_norm(13, F32),
    },
}
