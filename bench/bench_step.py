"""The model's steps through the engine's runner: a listening step, a text token, an encoder pass.

pytest bench/bench_step.py --benchmark-only                       the small dims
pytest bench/bench_step.py --benchmark-only --size 3b --threads 2 the published dims, random weights
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from fastloop.config import MEL_BINS, ModelConfig
from fastloop.decoder import Decoder, StepRows, decoder_shapes
from fastloop.encoder import Encoder, encoder_shapes

PAGE = 64


def cheap_weights(shapes: dict[str, tuple[int, ...]], dtype: torch.dtype) -> dict[str, Tensor]:
    """Random weights of a plausible scale; one random tile repeated, since 3B draws take a minute."""
    tile = torch.randn(1 << 20).to(dtype) * 0.02
    weights = {}
    for name, shape in shapes.items():
        count = int(np.prod(shape))
        weights[name] = tile.repeat(-(-count // len(tile)))[:count].view(shape)
    return weights


@pytest.fixture(scope="module")
def decoder(config: ModelConfig, dtype: torch.dtype) -> Decoder:
    return Decoder(config, cheap_weights(decoder_shapes(config), dtype))


def rows_at(context: int, count: int) -> StepRows:
    """`count` new rows of one sequence behind `context` positions, pages in order."""
    positions = torch.arange(context, context + count)
    pages = torch.arange(-(-(context + count) // PAGE), dtype=torch.int32)
    return StepRows(
        positions=positions,
        slots=positions,
        row_starts=torch.tensor([0, count], dtype=torch.int32),
        block_table=pages[None],
        kv_lens=torch.tensor([context + count], dtype=torch.int32),
        gaps=torch.zeros(1, 2, dtype=torch.int32),
    )


def pool(config: ModelConfig, context: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    c = config.decoder
    shape = (c.layers, context // PAGE + 2, PAGE, c.kv_heads, c.head_width)
    return torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)


@pytest.mark.parametrize("context", [0, 1024])
@torch.inference_mode()
def test_listening_step(
    benchmark: BenchmarkFixture, config: ModelConfig, decoder: Decoder, dtype: torch.dtype, context: int
) -> None:
    """13 rows and the two-row head."""
    keys, values = pool(config, context, dtype)
    rows = rows_at(context, config.chunk_rows)
    x = torch.randn(config.chunk_rows, config.decoder.width).to(dtype)

    def step() -> Tensor:
        return decoder.forward(x, rows, keys, values)[-1] @ decoder.control_head.T

    assert step().isfinite().all()
    benchmark.pedantic(step, rounds=5 if decoder.embedding.numel() > 1e8 else 100, warmup_rounds=1)
    benchmark.extra_info["weight_bytes"] = sum(w.nbytes for w in decoder.weights.values())


@pytest.mark.parametrize("context", [13, 1024])
@torch.inference_mode()
def test_text_token(
    benchmark: BenchmarkFixture, config: ModelConfig, decoder: Decoder, dtype: torch.dtype, context: int
) -> None:
    """One row and the whole vocabulary."""
    keys, values = pool(config, context, dtype)
    rows = rows_at(context, 1)
    x = torch.randn(1, config.decoder.width).to(dtype)

    def token() -> Tensor:
        return decoder.logits(decoder.forward(x, rows, keys, values)).argmax()

    assert int(token()) >= 0
    benchmark.pedantic(token, rounds=5 if decoder.embedding.numel() > 1e8 else 100, warmup_rounds=1)


@torch.inference_mode()
def test_encoder_chunk(benchmark: BenchmarkFixture, config: ModelConfig, dtype: torch.dtype) -> None:
    """One chunk of mel frames to audio tokens."""
    encoder = Encoder(config, cheap_weights(encoder_shapes(config), dtype))
    frames = torch.randn(1, config.chunk_frames, MEL_BINS)
    assert encoder.encode(frames).shape == (1, config.chunk_tokens, config.decoder.width)
    benchmark.pedantic(
        lambda: encoder.encode(frames), rounds=5 if config.encoder.width > 1000 else 100, warmup_rounds=1
    )
