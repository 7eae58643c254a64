"""sample: greedy, and with temperature, top-k and top-p, over the whole vocabulary; hot, as logits are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from fastloop.config import ModelConfig
from fastloop.ops.sample import sample_bytes
from fastloop.testing.assertions import seeded
from fastloop.testing.implementations import Implementation
from fastloop.testing.op_cases import sample_case

KINDS = {
    "greedy": (0.0, 0, 1.0),
    "plain": (1.0, 0, 1.0),
    "top 50": (1.0, 50, 1.0),
    "nucleus 0.9": (0.7, 0, 0.9),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [1, 16])
def test_sample(
    clock: Callable[..., None],
    implementation: Implementation,
    config: ModelConfig,
    rows: int,
    kind: str,
) -> None:
    vocab = config.decoder.vocab_padded
    case = sample_case(seeded(0), rows=rows, vocab=vocab)
    options = {
        name: torch.full_like(case.arguments[name], value)
        for name, value in zip(("temperature", "top_k", "top_p"), KINDS[kind], strict=True)
    }
    case = replace(case, arguments=case.arguments | options)
    clock(implementation, case, sample_bytes(rows, vocab))
