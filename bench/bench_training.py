"""Attention over whole sequences on a CPU, forward and backward: products beside torch's fused kernel.

pytest bench/bench_training.py --benchmark-only
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastloop.soundflow.trainable import causal_products


def fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


@pytest.mark.parametrize("attention", [fused, causal_products])
@pytest.mark.parametrize(("rows", "positions"), [(4, 498), (2, 980), (1, 1950)])
def test_attention(
    benchmark: Any, rows: int, positions: int, attention: Callable[[Tensor, Tensor, Tensor], Tensor]
) -> None:
    generator = torch.Generator().manual_seed(0)

    def random(heads: int) -> Tensor:
        x = torch.randn(rows, heads, positions, 64, generator=generator, dtype=torch.bfloat16)
        return x.requires_grad_()

    q, k, v = random(4), random(2), random(2)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        benchmark(lambda: attention(q, k, v).sum().backward())
    finally:
        torch.set_num_threads(threads)
