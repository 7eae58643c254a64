"""Random models and random sound. A random model is for tests and benchmarks only, never for listening."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..checkpoint import Model
from ..config import ModelConfig, small
from ..decoder import decoder_shapes
from ..encoder import encoder_shapes
from ..text import Tokenizer


def random_weights(
    config: ModelConfig, seed: int = 0, dtype: torch.dtype = torch.float32, lively: bool = True
) -> dict[str, Tensor]:
    """Weights of unit gain. `lively` raises the rows of the head that end and colour a response, so that
    decisions and response lengths vary as in a trained model.
    """
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in (encoder_shapes(config) | decoder_shapes(config)).items():
        noise = torch.randn(shape, generator=generator, dtype=torch.float32)
        if name.endswith("bias"):
            value = 0.1 * noise
        elif len(shape) == 1:
            value = 1 + 0.1 * noise
        else:
            fan_in = shape[1] * (shape[2] if len(shape) == 3 else 1)
            value = noise if name == "decoder.embed.weight" else noise / fan_in**0.5
        weights[name] = value.to(dtype)
    if lively and not config.decoder.tied:
        head, tokens = weights["decoder.head.weight"], config.tokens
        head[[tokens.text_end, *tokens.emotions.values()]] *= 3
    return weights


def byte_tokenizer(vocab: int) -> Tokenizer:
    """Byte-level: ids 0..255 are bytes, the rest are invented words; for random models."""
    if vocab < 256:
        raise ValueError(f"byte_tokenizer: vocab {vocab} is below the 256 bytes")
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [b for b in range(256) if b not in visible]
    symbols = {b: chr(b) for b in visible} | {b: chr(256 + i) for i, b in enumerate(hidden)}
    words = {symbols[b]: b for b in range(256)} | {f"Ġword{i}": i for i in range(256, vocab)}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    content: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": words,
            "merges": [],
        },
    }
    return Tokenizer.from_json(json.dumps(content))


def random_model(
    config: ModelConfig | None = None, seed: int = 0, dtype: torch.dtype = torch.float32
) -> Model:
    """A model of random weights over a byte tokenizer."""
    config = config or small()
    return Model(config, random_weights(config, seed, dtype), byte_tokenizer(config.decoder.vocab))


def random_sound(seconds: float, seed: int = 0) -> np.ndarray:
    """Noise under slowly changing loudness, float32 [S] at 16 kHz within [-1, 1]."""
    rng = np.random.default_rng(seed)
    count = round(seconds * 16_000)
    knots = np.arange(0, count + 1600, 1600)
    loudness = np.interp(np.arange(count), knots, rng.uniform(0, 0.5, len(knots)))
    return (rng.uniform(-1, 1, count) * loudness).astype(np.float32)
