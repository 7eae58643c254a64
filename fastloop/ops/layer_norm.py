"""layer_norm: y = (x - mean) / sqrt(var + eps) * weight + bias, over the last dimension.

Source: Ba et al. 2016, arXiv 1607.06450; the audio tower's pre-norm.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .contract import check_dims, check_floats
from .dispatch import define


def layer_norm_ref(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """x [N, E], weight [E], bias [E] -> y [N, E] in x's dtype."""
    check_dims("layer_norm", x=(x, "N E"), weight=(weight, "E"), bias=(bias, "E"))
    check_floats("layer_norm", x=x, weight=weight, bias=bias)
    return F.layer_norm(x, (x.shape[-1],), weight, bias, eps)


def _fake(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return x.new_empty(x.shape)


layer_norm = define(layer_norm_ref, _fake)


def layer_norm_bytes(rows: int, width: int, itemsize: int = 4) -> int:
    """Bytes moved: rows in and out, weight and bias once."""
    return (2 * rows * width + 2 * width) * itemsize
