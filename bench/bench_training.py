"""Training on a CPU, forward and backward: attention as products beside the fused kernel, and a step whose
batches are computed side by side or one by one.

pytest bench/bench_training.py --benchmark-only              attention, on one thread
pytest bench/bench_training.py --benchmark-only --threads 2  and a step
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastloop import ops
from fastloop.soundflow.objective import Batch, Objective, Weighting, collate
from fastloop.soundflow.sequence import Reply, Step, build
from fastloop.soundflow.side_by_side import SideBySide
from fastloop.soundflow.trainable import Trainable, block_products, causal_products, initial_weights
from fastloop.testing.streams import nano

CLASSES = 147  # of the probes, as the packaged model was trained with


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
    benchmark(lambda: attention(q, k, v).sum().backward())


@pytest.mark.parametrize("attention", [ops.block_attention_ref, block_products])
def test_attention_in_blocks(benchmark: Any, attention: Callable[[Tensor, int], Tensor]) -> None:
    """128 chunks of 20 positions, 3 heads of 64."""
    qkv = torch.randn(128, 20, 576, generator=torch.Generator().manual_seed(0), dtype=torch.bfloat16)
    qkv.requires_grad_()
    benchmark(lambda: attention(qkv, 3).sum().backward())


@pytest.mark.parametrize("way", ["one by one", "side by side"])
def test_step(benchmark: Any, way: str, threads: int) -> None:
    """Two batches of 64 chunks of the packaged model; without the optimiser."""
    if threads < 2:
        pytest.skip("one thread has nothing to share: give --threads 2")
    config, tokenizer = nano()
    generator = torch.Generator().manual_seed(0)
    said = Reply("Careful, glass is breaking!")
    row = [Step(said, said) if i % 3 == 0 else Step() for i in range(32)]

    def batch() -> Batch:
        frames = torch.randn(64, config.chunk_frames, 128, generator=generator)
        active = torch.rand(64, config.chunk_tokens, CLASSES, generator=generator) < 0.01
        past = torch.rand(64, 3, CLASSES, generator=generator) < 0.02
        return collate(frames, active, past, [build(config, tokenizer, row)] * 2, config.tokens.audio_begin)

    batches = [batch(), batch()]
    model = Trainable(config, initial_weights(config, 0), CLASSES, torch.bfloat16)
    objective = Objective(model, Weighting(probe_weight=0.1, recalled_weight=0.02))

    def one_by_one() -> None:
        for part in batches:
            objective(part)[0].backward()

    beside = SideBySide(objective, 2)
    benchmark(one_by_one if way == "one by one" else lambda: beside.gradients(iter(batches), 2))
    beside.close()
