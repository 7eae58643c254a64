"""sample in Triton: the same token as the definition, whatever is kept, tied, banned or not finite."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings

from fastloop.testing.assertions import seeded
from fastloop.testing.hard_samples import HARD_CALLS, Run, check_ties, same_tokens, sample_arguments
from fastloop.testing.implementations import Implementation
from fastloop.testing.op_cases import Case, sample_case
from fastloop.triton_kernels.tuning import overridden

Check = Callable[[str, Case], None]


@pytest.fixture(autouse=True)
def small_chunks() -> Iterator[None]:
    """Several chunks of a small vocabulary."""
    with overridden("sample", {"CHUNK": 32, "BLOCK": 32, "warps": 4}):
        yield


@pytest.fixture
def run(device: str) -> Run:
    return Implementation("sample", "triton", device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocab", [1, 64, 700])
def test_equals_the_definition(check: Check, vocab: int, dtype: torch.dtype) -> None:
    """Greedy rows and drawn ones of every kind; in 16 bits most of the 700 logits have equals."""
    with overridden("sample", {"CHUNK": 256, "BLOCK": 256, "warps": 4}):
        check("sample", sample_case(seeded(vocab), rows=5, vocab=vocab, dtype=dtype))


def test_chunks_of_several_blocks(check: Check) -> None:
    with overridden("sample", {"CHUNK": 64, "BLOCK": 16, "warps": 4}):
        check("sample", sample_case(seeded(2), rows=5, vocab=90, dtype=torch.float16))


@settings(max_examples=6, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(-(2**63), 2**63 - 1),
    levels=st.integers(1, 12),
    temperature=st.floats(2**-6, 50, width=32),
    top_k=st.integers(0, 100),
    top_p=st.floats(0, 1, width=32),
)
def test_ties(run: Run, seed: int, levels: int, temperature: float, top_k: int, top_p: float) -> None:
    check_ties(run, 60, seed=seed, levels=levels, temperature=temperature, top_k=top_k, top_p=top_p)


@pytest.mark.parametrize("hard", HARD_CALLS)
def test_hard_calls(run: Run, hard: str) -> None:
    HARD_CALLS[hard](run)


def test_the_models_vocabulary(run: Run) -> None:
    logits = 3 * torch.randn(2, 151_936, generator=seeded(7)).bfloat16()
    options = {"temperature": 0.8, "top_k": [0, 50], "top_p": [0.95, 0.9], "seed": 9}
    with overridden("sample", {"CHUNK": 16_384, "BLOCK": 16_384, "warps": 8}):
        same_tokens(run, sample_arguments(logits, **options))
