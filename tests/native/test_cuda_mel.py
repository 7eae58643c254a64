"""mel in CUDA C++, run on the CPU: against the float64 oracle and torch; its state; other streams."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import Tensor

from fastloop.mel import MelState
from fastloop.ops.mel import EDGES, LOOKAHEAD_SAMPLES, mel_filters, mel_ref
from fastloop.testing.assertions import seeded
from fastloop.testing.mel_oracle import clamped, log_power, whisper_frames
from fastloop.testing.op_cases import mel_case
from fastloop.testing.tolerance import error_bound, relative_error

every_seed = pytest.mark.parametrize("seed", [0, 1, 2])
examples = settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])


@dataclass
class Streams:
    """B streams in slots of a larger state."""

    kernels: Any
    state: MelState
    slots: Tensor
    bins: int = 128

    def call(self, pcm: Tensor, edge: str = "reflect", clamp: str = "running") -> Tensor:
        state = (self.state.tail, self.state.peak, self.state.seen)
        return self.kernels.mel(pcm, self.slots, *state, *mel_filters(bins=self.bins), edge, clamp)


def streams(kernels: Any, slots: list[int], capacity: int = 0, bins: int = 128) -> Streams:
    return Streams(kernels, MelState.empty(capacity or max(slots) + 1), torch.tensor(slots), bins)


def sound(seed: int, count: int, samples: int) -> Tensor:
    """Noise with a tone in it: both the loud and the faint end of the range are there."""
    rng = np.random.default_rng(seed)
    t = np.arange(samples) / 16_000
    noise = rng.normal(size=(count, samples)) * 10.0 ** rng.uniform(-4, 0, (count, 1))
    tone = np.sin(2 * np.pi * rng.uniform(60, 7900, (count, 1)) * t)
    return torch.from_numpy((0.1 * (noise + tone)).astype(np.float32))


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
    """Calls of any number of hops, one after the other."""
    pcm = sound(seed, 2, 160 * sum(hops) + LOOKAHEAD_SAMPLES)
    group, rest = streams(kernels, [3, 1], 5), pcm
    if edge == "wait":
        for slot, row in zip([3, 1], pcm, strict=True):
            group.state.prime(slot, row[:LOOKAHEAD_SAMPLES])
        rest = pcm[:, LOOKAHEAD_SAMPLES:]
    done = 0
    for count in hops:
        frames = group.call(rest[:, 160 * done : 160 * (done + count)], edge)
        before, done = done, done + count
        for row, stream in zip(frames, pcm, strict=True):
            y = log_power(stream if edge == "wait" else stream[: 160 * done])[:done]
            wanted = clamped(y[before:], y) if edge == "wait" else clamped(y, y)[before:]
            assert not wanted.misses(row), wanted.misses(row)


@pytest.mark.parametrize("bins", [1, 7, 80, 127, 201])
def test_of_any_number_of_bins(kernels: Any, bins: int) -> None:
    pcm = sound(1, 2, 800)
    frames = streams(kernels, [1, 0], bins=bins).call(pcm)
    assert frames.shape == (2, 5, bins)
    for row, stream in zip(frames, pcm, strict=True):
        assert not whisper_frames(stream, bins).misses(row)


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


@pytest.mark.parametrize("extra", [0, 1, 39, 41, 159])
def test_of_a_last_call_of_any_length(kernels: Any, extra: int) -> None:
    """And the tail is kept whole over calls shorter than itself."""
    pcm = sound(extra, 1, 480 + extra)
    group = streams(kernels, [0])
    frames = torch.cat([group.call(pcm[:, a:b]) for a, b in ((0, 160), (160, 320), (320, None))], dim=1)
    assert not whisper_frames(pcm[0])[2:].misses(frames[0, 2:])
    assert torch.equal(group.state.tail, pcm[:, -360:])


def test_errs_at_most_twice_as_much_as_torch(kernels: Any) -> None:
    """Typical error, not worst case: noise, tones and both, against float64."""
    pcm = sound(7, 4, 2400)
    state = MelState.empty(4)
    plain = mel_ref(pcm, torch.arange(4), state.tail, state.peak, state.seen, *mel_filters())
    window = torch.hann_window(400, dtype=torch.float64)
    power = torch.stft(pcm.double(), 400, 160, window=window, return_complex=True)[..., :-1].abs() ** 2
    y = (mel_filters()[0].double() @ power).clamp(min=1e-10).log10()
    truth = ((torch.maximum(y, y.amax((1, 2), keepdim=True) - 8) + 4) / 4).mT
    error = relative_error(streams(kernels, [0, 1, 2, 3]).call(pcm), truth)
    assert 0 < error <= error_bound(plain, truth, torch.float32)


def test_is_bit_equal_alone_and_in_a_batch(kernels: Any) -> None:
    pcm = sound(2, 5, 960)
    alone, beside = streams(kernels, [0]), streams(kernels, [0, 1, 2, 3, 4])
    for begin in (0, 320):
        kernels.seed = begin
        together = beside.call(pcm[:, begin : begin + 320])
        assert torch.equal(together[4], alone.call(pcm[4:5, begin : begin + 320])[0])
    for name, value in alone.state.export(0).items():
        assert torch.equal(beside.state.export(4)[name], value), name


def test_touches_no_other_slot(kernels: Any) -> None:
    group = streams(kernels, [1, 4], capacity=6)
    idle = torch.tensor([0, 2, 3, 5])
    group.state.tail[idle], group.state.peak[idle], group.state.seen[idle] = torch.nan, torch.nan, -77
    pcm = torch.full((2, 2000), torch.nan)
    pcm[:, 300:1260] = sound(4, 2, 960)  # samples that are not contiguous
    assert group.call(pcm[:, 300:1260]).isfinite().all()
    assert group.state.tail[idle].isnan().all() and group.state.peak[idle].isnan().all()
    assert (group.state.seen[idle] == -77).all()
    assert group.state.seen[group.slots].tolist() == [960, 960]
    assert torch.equal(group.state.tail[group.slots], pcm[:, 900:1260])


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, 3e38])
def test_keeps_what_is_not_finite_in_its_stream(kernels: Any, poison: float) -> None:
    """...and it stays visible there, until the slot is reset."""
    pcm = sound(5, 3, 3 * 320)
    dirty = pcm.clone()
    dirty[1, 400] = poison
    clean_run, dirty_run = streams(kernels, [0, 1, 2]), streams(kernels, [0, 1, 2])
    for begin in (0, 320, 640):
        clean = clean_run.call(pcm[:, begin : begin + 320])
        spoilt = dirty_run.call(dirty[:, begin : begin + 320])
        assert torch.equal(spoilt[[0, 2]], clean[[0, 2]])
        assert spoilt[1].isfinite().all() if begin == 0 else not spoilt[1].isfinite().any()
    dirty_run.state.reset(torch.ones(3, dtype=torch.bool))
    assert dirty_run.call(pcm[:, :320]).isfinite().all()


def test_of_a_long_stream_counts_on(kernels: Any) -> None:
    pcm = sound(6, 1, 960)
    young, old = streams(kernels, [0]), streams(kernels, [0])
    young.call(pcm[:, :480])
    old.state.load(0, young.state.export(0))
    old.state.seen[0] += 160 * 10**13
    assert torch.equal(young.call(pcm[:, 480:]), old.call(pcm[:, 480:]))
    assert int(old.state.seen[0]) == 160 * 10**13 + 960


def test_with_a_global_clamp_uses_the_given_peak_and_leaves_it(kernels: Any) -> None:
    group = streams(kernels, [0, 1])
    group.state.peak[:] = torch.tensor([9.0, -2.0])
    frames = group.call(sound(8, 2, 800), clamp="global")
    assert group.state.peak.tolist() == [9.0, -2.0]
    assert (frames[0] == 5 / 4).all()  # (9 - 8 + 4) / 4: everything is below the clamp
    assert frames[1].min() >= (-10 + 4) / 4


def test_of_silence(kernels: Any) -> None:
    """Power 0: the floor of 1e-10 everywhere."""
    frames = streams(kernels, [0]).call(torch.zeros(1, 480))
    torch.testing.assert_close(frames, torch.full_like(frames, (-10 + 4) / 4), rtol=2**-22, atol=0)
