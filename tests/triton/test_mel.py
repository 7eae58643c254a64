"""mel in Triton against the float64 oracle and torch: its frames, its state, and what it must not touch."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings

from fastloop.ops.mel import EDGES
from fastloop.testing.hard_mels import HARD_CALLS, Run, check_batch, check_error, check_hops
from fastloop.testing.implementations import Implementation
from fastloop.testing.op_cases import Case, mel_case
from fastloop.triton_kernels.mel import spectrum_splits
from fastloop.triton_kernels.tuning import overridden

Check = Callable[[str, Case], None]
every_edge = pytest.mark.parametrize("edge", EDGES)


WIDE = {"BLOCK_FRAMES": 16, "BLOCK_DEPTH": 128, "warps": 4, "stages": 1}


@pytest.fixture(autouse=True)
def blocks(request: pytest.FixtureRequest) -> Iterator[None]:
    """Deep blocks, which the interpreter is five times as fast with; those of the table where it matters."""
    if "table" in request.node.name or torch.cuda.is_available():
        yield
        return
    with overridden("mel", WIDE):
        yield


@pytest.fixture
def run(device: str) -> Run:
    return Implementation("mel", "triton", device)


def test_first_chunk_with_the_tables_blocks(check: Check) -> None:
    check("mel", mel_case(torch.Generator().manual_seed(1), streams=1, samples=6400))


@every_edge
@settings(max_examples=4, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32 - 1), hops=st.lists(st.integers(1, 17), min_size=2, max_size=3))
def test_frames_are_inside_the_oracles_interval(run: Run, edge: str, seed: int, hops: list[int]) -> None:
    check_hops(run, seed, edge, hops)


@pytest.mark.parametrize("hard", HARD_CALLS)
def test_hard_calls(run: Run, hard: str) -> None:
    HARD_CALLS[hard](run)


def test_errs_at_most_twice_as_much_as_torch_with_the_tables_blocks(run: Run) -> None:
    check_error(run)


def test_a_stream_is_bit_equal_alone_and_in_a_batch(run: Run) -> None:
    """Alone its spectrum is cut into parts, in a batch it is not; the sums are the same."""
    assert spectrum_splits(1, 8) == 4 and spectrum_splits(9, 8) == 1
    check_batch(run, 9)
