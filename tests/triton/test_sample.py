"""sample in Triton: the same token as the definition, whatever is kept, tied, banned or not finite."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import Tensor

from fastloop.ops.sample import NONFINITE, sample_ref
from fastloop.testing.implementations import Implementation
from fastloop.testing.op_cases import Case, sample_case
from fastloop.triton_kernels.tuning import overridden

Check = Callable[[str, Case], None]


def generator(seed: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(autouse=True)
def small_chunks() -> Iterator[None]:
    """Several chunks of a small vocabulary."""
    with overridden("sample", {"CHUNK": 32, "BLOCK": 32, "warps": 4}):
        yield


def arguments(logits: Tensor, **options: Any) -> dict[str, Any]:
    """One call; options per row as scalars or lists: temperature, top_k, top_p, seed, counter."""
    rows, vocab = logits.shape
    given_options = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "seed": 0, "counter": 0} | options
    kinds = {"temperature": torch.float32, "top_p": torch.float32}
    return {
        "logits": logits,
        "banned": torch.zeros(1, vocab, dtype=torch.bool),
        "phase": torch.zeros(rows, dtype=torch.int64),
    } | {
        name: torch.as_tensor(value, dtype=kinds.get(name, torch.int64)).expand(rows).contiguous()
        for name, value in given_options.items()
    }


def same_tokens(device: str, call: dict[str, Any]) -> Tensor:
    ids = Implementation("sample", "triton", device)(**call)
    assert torch.equal(ids, sample_ref(**call))
    return ids


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocab", [1, 64, 700])
def test_equals_the_definition(check: Check, vocab: int, dtype: torch.dtype) -> None:
    """Greedy rows and drawn ones of every kind; in 16 bits most of the 700 logits have equals."""
    with overridden("sample", {"CHUNK": 256, "BLOCK": 256, "warps": 4}):
        check("sample", sample_case(generator(vocab), rows=5, vocab=vocab, dtype=dtype))


def test_chunks_of_several_blocks(check: Check) -> None:
    with overridden("sample", {"CHUNK": 64, "BLOCK": 16, "warps": 4}):
        check("sample", sample_case(generator(2), rows=5, vocab=90, dtype=torch.float16))


@settings(max_examples=6, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(-(2**63), 2**63 - 1),
    levels=st.integers(1, 12),
    temperature=st.floats(2**-6, 50, width=32),
    top_k=st.integers(0, 100),
    top_p=st.floats(0, 1, width=32),
)
def test_ties(device: str, seed: int, levels: int, temperature: float, top_k: int, top_p: float) -> None:
    """Few distinct logits: thresholds cut through ties, whose first ids stay."""
    logits = torch.randint(levels, (2, 60), generator=generator(seed % 2**40)).half() - levels / 2
    logits[logits == 0] *= -1  # a negative zero is equal to a zero
    call = arguments(logits, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed, counter=[1, 2**40])
    call["banned"] = torch.rand(1, 60, generator=generator(3)) < 0.3
    call["banned"][0, 5] = False
    same_tokens(device, call)


def test_every_token_of_a_distribution(device: str) -> None:
    """Many draws of one distribution: nothing outside its nucleus, and more than one token of it."""
    draws = 32
    logits = torch.tensor([0.0, 2.0, 1.0, -1.0, 1.5, -9.0], dtype=torch.bfloat16).expand(draws, 6)
    call = arguments(
        logits.contiguous(), top_p=0.95, seed=torch.arange(draws), counter=torch.arange(draws) * 7
    )
    counts = same_tokens(device, call).bincount(minlength=6)
    assert counts[3] == counts[5] == 0 and (counts[[1, 2, 4]] > 0).all()


@pytest.mark.parametrize("top_k", [1, 2, 90, 1000])
def test_top_k_at_its_ends(device: str, top_k: int) -> None:
    logits = torch.randn(3, 90, generator=generator(top_k))
    ids = same_tokens(device, arguments(logits, top_k=top_k, seed=torch.arange(3)))
    assert top_k > 1 or torch.equal(ids, logits.argmax(1))


@pytest.mark.parametrize("top_p", [0.0, 1e-30, 0.5, 0.99999994])
def test_top_p_at_its_ends(device: str, top_p: float) -> None:
    """0 keeps the most likely token; equal logits are cut exactly in half by 0.5."""
    logits = torch.randn(3, 90, generator=generator(5))
    logits[:2] = 1.0
    ids = same_tokens(device, arguments(logits, top_p=top_p, seed=torch.arange(3)))
    assert top_p != 0.5 or (ids[:2] < 45).all()
    assert top_p > 1e-29 or torch.equal(ids, logits.argmax(1))


def test_far_apart(device: str) -> None:
    """Masses that underflow to 0, and a temperature that makes them."""
    logits = torch.tensor([[0.0, 800.0, 799.0, -1e30, 797.0], [1.0, 1.0 + 2**-20, 0.5, 0.0, 1.0]])
    for temperature in (1.0, 1e-4, 1e30):
        for options in ({"top_k": 4}, {"top_k": 3, "top_p": 0.999}):
            same_tokens(device, arguments(logits, temperature=temperature, seed=[11, 12], **options))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_not_finite(device: str, temperature: float) -> None:
    """NaN and +Inf where they are legal; harmless where banned; -Inf is a token that is never drawn."""
    logits = torch.randn(6, 90, generator=generator(6))
    logits[0, 40], logits[1, 41], logits[2, 42], logits[3, 43] = torch.nan, torch.inf, torch.nan, torch.inf
    logits[4, :80] = -torch.inf
    logits[5] = -torch.inf
    call = arguments(
        logits, temperature=temperature, top_k=[0, 5, 0, 5, 20, 0], top_p=[1, 1, 0.5, 0.5, 0.9, 1]
    )
    call["banned"][0, 42:44] = True
    ids = same_tokens(device, call)
    assert ids[[0, 1, 5]].tolist() == [NONFINITE] * 3
    assert (ids[2:5] >= 0).all() and ids[4] >= 80


def test_phases(device: str) -> None:
    logits = torch.zeros(4, 90)
    call = arguments(logits, temperature=[0, 0, 1, 1])
    call["banned"] = torch.zeros(2, 90, dtype=torch.bool)
    call["banned"][1, :70] = True
    call["phase"] = torch.tensor([0, 1, 0, 1])
    ids = same_tokens(device, call)
    assert ids[0] == 0 and ids[1] == 70 and ids[3] >= 70


def test_the_models_vocabulary(device: str) -> None:
    logits = 3 * torch.randn(2, 151_936, generator=generator(7)).bfloat16()
    options = {"temperature": 0.8, "top_k": [0, 50], "top_p": [0.95, 0.9], "seed": 9}
    with overridden("sample", {"CHUNK": 16_384, "BLOCK": 16_384, "warps": 8}):
        same_tokens(device, arguments(logits, **options))
