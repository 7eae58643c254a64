"""sample in CUDA C++, run on the CPU: the token of the definition, whatever is kept, tied, banned or NaN."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import Tensor

from fastloop.ops.sample import NONFINITE as NO_TOKEN
from fastloop.ops.sample import sample_ref
from fastloop.testing.assertions import seeded
from fastloop.testing.op_cases import sample_case

examples = settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
every_float = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
every_team = pytest.mark.parametrize("blocks", [1, 2, 8])


def call(logits: Tensor, **options: Any) -> dict[str, Any]:
    """The arguments of one call; options as scalars or a list: temperature, top_k, top_p, seed, counter."""
    rows, vocab = logits.shape
    whole = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "seed": 0, "counter": 0} | options
    kinds = {"temperature": torch.float32, "top_p": torch.float32}
    return {
        "logits": logits,
        "banned": torch.zeros(1, vocab, dtype=torch.bool),
        "phase": torch.zeros(rows, dtype=torch.int64),
    } | {
        name: torch.as_tensor(value, dtype=kinds.get(name, torch.int64)).expand(rows).contiguous()
        for name, value in whole.items()
    }


def same_tokens(kernels: Any, arguments: dict[str, Any]) -> Tensor:
    tokens = kernels.sample(**arguments)
    assert torch.equal(tokens, sample_ref(**arguments))
    return tokens


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
    """Few distinct logits, whose first ids stay."""
    logits = torch.randint(levels, (2, 600), generator=seeded(seed % 2**40)).half() - levels / 2
    logits[logits == 0] *= -1  # a negative zero is equal to a zero
    a = call(logits, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed, counter=[1, 2**40])
    a["banned"] = torch.rand(1, 600, generator=seeded(3)) < 0.3
    a["banned"][0, 5] = False
    kernels.seed = seed % 5
    same_tokens(kernels, a)


@every_float
def test_draws_every_token_of_a_distribution(kernels: Any, dtype: torch.dtype) -> None:
    """Many draws of one distribution: nothing outside its nucleus, and more than one token of it."""
    logits = torch.tensor([0.0, 2.0, 1.0, -1.0, 1.5, -9.0], dtype=dtype).expand(64, 6).contiguous()
    counts = same_tokens(kernels, call(logits, top_p=0.95, seed=torch.arange(64))).bincount(minlength=6)
    assert counts[3] == counts[5] == 0 and (counts[[1, 2, 4]] > 0).all()


@pytest.mark.parametrize("top_k", [1, 2, 90, 1000])
def test_with_top_k_at_its_ends(kernels: Any, top_k: int) -> None:
    logits = torch.randn(3, 90, generator=seeded(top_k))
    tokens = same_tokens(kernels, call(logits, top_k=top_k, seed=torch.arange(3)))
    assert top_k > 1 or torch.equal(tokens, logits.argmax(1))


@pytest.mark.parametrize("top_p", [0.0, 1e-30, 0.5, 0.99999994])
def test_with_top_p_at_its_ends(kernels: Any, top_p: float) -> None:
    """0 keeps the most likely token; equal logits are cut exactly in half by 0.5."""
    logits = torch.randn(3, 90, generator=seeded(5))
    logits[:2] = 1.0
    tokens = same_tokens(kernels, call(logits, top_p=top_p, seed=torch.arange(3)))
    assert top_p != 0.5 or (tokens[:2] < 45).all()
    assert top_p > 1e-29 or torch.equal(tokens, logits.argmax(1))


def test_of_logits_far_apart(kernels: Any) -> None:
    """Masses that underflow to 0, and a temperature that makes them."""
    logits = torch.tensor([[0.0, 800.0, 799.0, -1e30, 797.0], [1.0, 1.0 + 2**-20, 0.5, 0.0, 1.0]])
    for temperature in (1.0, 1e-4, 1e-30, 1e30):
        for options in ({"top_k": 4}, {"top_k": 3, "top_p": 0.999}, {"top_p": 0.7}):
            same_tokens(kernels, call(logits, temperature=temperature, seed=[11, 12], **options))


@every_float
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_of_what_is_not_finite(kernels: Any, dtype: torch.dtype, temperature: float) -> None:
    """NaN and +Inf where they are legal; harmless where banned; -Inf is a token that is never drawn."""
    logits = torch.randn(6, 90, generator=seeded(6)).to(dtype)
    logits[0, 40], logits[1, 41], logits[2, 42], logits[3, 43] = torch.nan, torch.inf, -torch.nan, torch.inf
    logits[4, :80] = -torch.inf
    logits[5] = -torch.inf
    a = call(logits, temperature=temperature, top_k=[0, 5, 0, 5, 20, 0], top_p=[1, 1, 0.5, 0.5, 0.9, 1])
    a["banned"][0, 42:44] = True
    tokens = same_tokens(kernels, a)
    assert tokens[[0, 1, 5]].tolist() == [NO_TOKEN] * 3
    assert (tokens[2:5] >= 0).all() and tokens[4] >= 80


def test_in_phases(kernels: Any) -> None:
    a = call(torch.zeros(4, 90), temperature=[0, 0, 1, 1])
    a["banned"] = torch.zeros(2, 90, dtype=torch.bool)
    a["banned"][1, :70] = True
    a["phase"] = torch.tensor([0, 1, 0, 1])
    tokens = same_tokens(kernels, a)
    assert tokens[0] == 0 and tokens[1] == 70 and tokens[3] >= 70


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
    a = call(logits, temperature=0.8, top_k=[0, 50, 0], top_p=[0.95, 0.9, 1.0], seed=9, counter=[0, 1, 2])
    kernels.blocks = 8
    same_tokens(kernels, a)
