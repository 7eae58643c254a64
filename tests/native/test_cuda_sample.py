"""sample in CUDA C++, run on the CPU: the token of the definition, whatever is kept, tied, banned or NaN."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings

from fastloop.testing.assertions import seeded
from fastloop.testing.hard_samples import HARD_CALLS, check_ties, same_tokens, sample_arguments
from fastloop.testing.op_cases import sample_case

examples = settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
every_float = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
every_team = pytest.mark.parametrize("blocks", [1, 2, 8])


@every_float
@every_team
@pytest.mark.parametrize("held", [True, False])
@pytest.mark.parametrize("vocab", [1, 64, 3000])
def test_is_the_definition(
    check: Callable[..., None], dtype: torch.dtype, blocks: int, held: bool, vocab: int
) -> None:
    """Greedy rows and drawn ones of every kind; in 16 bits most of 3,000 logits have equals."""
    check("sample", sample_case(seeded(vocab), rows=5, vocab=vocab, dtype=dtype), blocks=blocks, held=held)


@examples
@given(
    seed=st.integers(-(2**63), 2**63 - 1),
    levels=st.integers(1, 12),
    temperature=st.floats(2**-6, 50, width=32),
    top_k=st.integers(0, 700),
    top_p=st.floats(0, 1, width=32),
)
def test_cuts_through_ties(
    kernels: Any, seed: int, levels: int, temperature: float, top_k: int, top_p: float
) -> None:
    kernels.seed = seed % 5
    check_ties(
        kernels.sample, 600, seed=seed, levels=levels, temperature=temperature, top_k=top_k, top_p=top_p
    )


@pytest.mark.parametrize("hard", HARD_CALLS)
def test_of_a_hard_call(kernels: Any, hard: str) -> None:
    HARD_CALLS[hard](kernels.sample)


def test_is_the_same_with_any_team_and_in_any_order(kernels: Any) -> None:
    a = sample_case(seeded(4), rows=4, vocab=997, dtype=torch.float32).arguments
    tokens = []
    for seed, (blocks, held) in enumerate([(1, True), (1, False), (3, True), (8, False)]):
        kernels.seed, kernels.blocks, kernels.held = seed, blocks, held
        tokens.append(kernels.sample(**a))
    assert all(torch.equal(other, tokens[0]) for other in tokens)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_of_the_models_vocabulary(kernels: Any, dtype: torch.dtype) -> None:
    logits = 3 * torch.randn(3, 151_936, generator=seeded(7)).to(dtype)
    options = {"temperature": 0.8, "top_k": [0, 50, 0], "top_p": [0.95, 0.9, 1.0]}
    kernels.blocks = 8
    same_tokens(kernels.sample, sample_arguments(logits, seed=9, counter=[0, 1, 2], **options))
