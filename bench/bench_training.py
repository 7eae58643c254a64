"""Training: attention as products beside the fused kernel, forward and backward; a step whose batches are
computed side by side or one by one; how long a batch is drawn, made and on its way.

pytest bench/bench_training.py --benchmark-only              all but a step, on one thread
pytest bench/bench_training.py --benchmark-only --threads 2  and a step
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastloop import ops
from fastloop.soundflow.ahead import made
from fastloop.soundflow.batches import Batches, sound_classes
from fastloop.soundflow.features import FeatureSet
from fastloop.soundflow.objective import Batch, Objective, Weighting, collate
from fastloop.soundflow.sequence import Reply, Step, build
from fastloop.soundflow.shards import Stream, Turn
from fastloop.soundflow.side_by_side import SideBySide
from fastloop.soundflow.stage import read_stage
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


def batches() -> Batches:
    """As a step of nano_gpu has them (2,048 chunks), of 64 streams of 40 s in which much happens."""
    rng = np.random.default_rng(0)
    streams = []
    for number in range(64):
        turns = []
        for start_s in np.sort(rng.uniform(0, 38, 12)):
            label, reply = (("siren", "Siren!"), ("spoken_digits", "4"), ("dog", None))[rng.integers(3)]
            answer_s = None if reply is None else start_s + 1
            turns.append(Turn(label, reply, None, label, "", start_s, start_s + 1.2, answer_s))
        streams.append(Stream(str(number), "street", "a", "b", "train", 40.0, tuple(turns)))
    frames = rng.normal(-4, 1, (64 * 100, 40, 128)).astype(np.float16)
    places = tuple((100 * i, 100 * i + 100) for i in range(64))
    features, stage = FeatureSet(tuple(streams), places, frames), read_stage("nano_gpu")
    config, tokenizer = nano()
    return Batches(config, tokenizer, features, sound_classes(streams), seed=0, plan=stage.batch,
                   augment=stage.augment, prompts=stage.prompts)  # fmt: skip


def test_drawing(benchmark: Any) -> None:
    """What each process that draws ahead of a GPU does."""
    source = batches()
    numbers = iter(range(10**6))
    benchmark(lambda: source.draw(next(numbers)))


def test_making(benchmark: Any) -> None:
    """The frames of a drawn batch, here on a CPU."""
    source = batches()
    drawn, kept = source.draw(0), source.features.kept
    benchmark(lambda: drawn.made_of(kept))


@pytest.mark.parametrize("way", ["one by one", "packed"])
def test_arriving(benchmark: Any, way: str) -> None:
    """A drawn batch from another process, in 20 tensors or in one."""
    drawn = batches().draw(0)
    coming = made(lambda number: drawn if way == "one by one" else drawn.packed(), range(10**6), 1, ahead=4)
    benchmark(lambda: next(coming))
