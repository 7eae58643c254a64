"""mel in CUDA C++, run on the CPU: against the float64 oracle and torch; its state; other streams."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings

from fastloop.mel import MelState
from fastloop.ops.mel import EDGES, mel_ref
from fastloop.testing.assertions import seeded
from fastloop.testing.hard_mels import HARD_CALLS, check_batch, check_error, check_hops, sound
from fastloop.testing.op_cases import mel_case

every_seed = pytest.mark.parametrize("seed", [0, 1, 2])
examples = settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])


@every_seed
@pytest.mark.parametrize("samples", [480, 6400, 6400 + 37, 16_000])
def test_of_the_first_call(check: Callable[..., None], seed: int, samples: int) -> None:
    """Also of more frames than a block holds at a time."""
    check("mel", mel_case(seeded(seed), streams=2, samples=samples), seed=seed)


@examples
@given(
    seed=st.integers(0, 2**32 - 1),
    edge=st.sampled_from(EDGES),
    hops=st.lists(st.integers(1, 50), min_size=2, max_size=3),
)
def test_is_inside_the_oracles_interval(kernels: Any, seed: int, edge: str, hops: list[int]) -> None:
    check_hops(kernels.mel, seed, edge, hops)


@pytest.mark.parametrize("hard", HARD_CALLS)
def test_of_a_hard_call(kernels: Any, hard: str) -> None:
    HARD_CALLS[hard](kernels.mel)


def test_errs_at_most_twice_as_much_as_torch(kernels: Any) -> None:
    check_error(kernels.mel)


@every_seed
def test_is_bit_equal_alone_and_in_a_batch(kernels: Any, seed: int) -> None:
    kernels.seed = seed
    check_batch(kernels.mel, 5)


def test_of_filters_that_do_not_fit_into_shared_memory(kernels: Any) -> None:
    """Dense ones, whose weights stay where they are."""
    filters = torch.rand(20, 201, generator=seeded(2))
    bands = torch.tensor([[0, 201]] * 20, dtype=torch.int32)
    pcm, results = sound(2, 1, 800), []
    for function in (kernels.mel, mel_ref):
        state = MelState.empty(1)
        a = (pcm, torch.tensor([0]), state.tail, state.peak, state.seen, filters, bands)
        results.append(function(*a))
    assert (results[0] - results[1]).abs().max() < 2**-20
