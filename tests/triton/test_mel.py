"""mel in Triton against the float64 oracle and torch: its frames, its state, and what it must not touch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import Tensor

from fastloop.mel import MelState
from fastloop.ops.mel import EDGES, LOOKAHEAD_SAMPLES, RANGE_LOG10, mel_filters, mel_ref
from fastloop.testing.implementations import Implementation
from fastloop.testing.mel_oracle import clamped, log_power, whisper_frames
from fastloop.testing.op_cases import Case, mel_case
from fastloop.testing.tolerance import error_bound, relative_error
from fastloop.triton_kernels.mel import spectrum_splits
from fastloop.triton_kernels.tuning import overridden

Check = Callable[[str, Case], None]
every_edge = pytest.mark.parametrize("edge", EDGES)


@dataclass
class Streams:
    """B streams in slots of a larger state, and the kernel that serves them."""

    run: Callable[..., Tensor]
    state: MelState
    slots: Tensor
    bins: int = 128

    def call(self, pcm: Tensor, edge: str = "reflect", clamp: str = "running") -> Tensor:
        filters, bands = mel_filters(bins=self.bins)
        state = {"tail": self.state.tail, "peak": self.state.peak, "seen": self.state.seen}
        return self.run(
            pcm=pcm, slots=self.slots, **state, filters=filters, bands=bands, edge=edge, clamp=clamp
        )


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
def streams(device: str) -> Callable[..., Streams]:
    def make(slots: list[int], capacity: int = 0, bins: int = 128) -> Streams:
        state = MelState.empty(capacity or max(slots) + 1)
        return Streams(Implementation("mel", "triton", device), state, torch.tensor(slots), bins)

    return make


def sound(seed: int, count: int, samples: int) -> Tensor:
    """Noise with a tone in it: both the loud and the faint end of the range are there."""
    rng = np.random.default_rng(seed)
    t = np.arange(samples) / 16_000
    noise = rng.normal(size=(count, samples)) * 10.0 ** rng.uniform(-4, 0, (count, 1))
    tone = np.sin(2 * np.pi * rng.uniform(60, 7900, (count, 1)) * t)
    return torch.from_numpy((0.1 * (noise + tone)).astype(np.float32))


def test_first_chunk_with_the_tables_blocks(check: Check) -> None:
    check("mel", mel_case(torch.Generator().manual_seed(1), streams=1, samples=6400))


@every_edge
@settings(max_examples=4, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32 - 1), hops=st.lists(st.integers(1, 17), min_size=2, max_size=3))
def test_frames_are_inside_the_oracles_interval(
    streams: Callable[..., Streams], edge: str, seed: int, hops: list[int]
) -> None:
    """Calls of any number of hops, one after the other."""
    pcm = sound(seed, 2, 160 * sum(hops) + LOOKAHEAD_SAMPLES)
    group, rest = streams([3, 1], 5), pcm
    if edge == "wait":
        for slot, row in zip([3, 1], pcm, strict=True):
            group.state.prime(slot, row[:LOOKAHEAD_SAMPLES])
        rest = pcm[:, LOOKAHEAD_SAMPLES:]
    done = 0
    for count in hops:
        frames = group.call(rest[:, 160 * done : 160 * (done + count)], edge)
        before, done = done, done + count
        for row, stream in zip(frames, pcm, strict=True):
            # "wait" has the true frames, "reflect" those of a stream that ends here
            y = log_power(stream if edge == "wait" else stream[: 160 * done])[:done]
            wanted = clamped(y[before:], y) if edge == "wait" else clamped(y, y)[before:]
            assert not wanted.misses(row), wanted.misses(row)


@pytest.mark.parametrize("bins", [1, 7, 80, 127])
def test_any_number_of_bins(streams: Callable[..., Streams], bins: int) -> None:
    pcm = sound(1, 2, 800)
    frames = streams([1, 0], bins=bins).call(pcm)
    assert frames.shape == (2, 5, bins)
    for row, stream in zip(frames, pcm, strict=True):
        assert not whisper_frames(stream, bins).misses(row)


@pytest.mark.parametrize("extra", [0, 1, 39, 41, 159])
def test_last_call_of_a_stream_may_have_any_length(streams: Callable[..., Streams], extra: int) -> None:
    """And the tail is kept whole over calls shorter than itself."""
    pcm = sound(extra, 1, 480 + extra)
    group = streams([0])
    frames = torch.cat([group.call(pcm[:, a:b]) for a, b in ((0, 160), (160, 320), (320, None))], dim=1)
    assert not whisper_frames(pcm[0])[2:].misses(frames[0, 2:])
    assert torch.equal(group.state.tail, pcm[:, -360:])


def test_errs_at_most_twice_as_much_as_torch_with_the_tables_blocks(streams: Callable[..., Streams]) -> None:
    """Typical error, not worst case: noise, tones and both, against float64."""
    pcm = sound(7, 4, 2400)
    state = MelState.empty(4)
    plain = mel_ref(pcm, torch.arange(4), state.tail, state.peak, state.seen, *mel_filters())
    truth = torch.stack([_float64_frames(stream) for stream in pcm])
    error = relative_error(streams(list(range(4))).call(pcm), truth)
    assert 0 < error <= error_bound(plain, truth, torch.float32)


def _float64_frames(stream: Tensor) -> Tensor:
    """Whisper's function in float64."""
    window = torch.hann_window(400, dtype=torch.float64)
    spectrum = torch.stft(stream.double(), 400, 160, window=window, return_complex=True)[:, :-1]
    y = (mel_filters()[0].double() @ spectrum.abs() ** 2).clamp(min=1e-10).log10()
    return ((torch.maximum(y, y.max() - RANGE_LOG10) + 4) / 4).T


def test_a_stream_is_bit_equal_alone_and_in_a_batch(streams: Callable[..., Streams]) -> None:
    """Alone its spectrum is cut into parts, in a batch it is not; the sums are the same."""
    pcm = sound(2, 9, 640)
    assert spectrum_splits(1, 8) == 4 and spectrum_splits(9, 8) == 1
    alone, beside = streams([0]), streams(list(range(9)))
    for begin in (0, 320):
        together = beside.call(pcm[:, begin : begin + 320])
        assert torch.equal(together[4], alone.call(pcm[4:5, begin : begin + 320])[0])
    for name, value in alone.state.export(0).items():
        assert torch.equal(beside.state.export(4)[name], value), name


def test_other_slots_are_not_touched(streams: Callable[..., Streams]) -> None:
    group = streams([1, 4], capacity=6)
    idle = torch.tensor([0, 2, 3, 5])
    group.state.tail[idle], group.state.peak[idle], group.state.seen[idle] = torch.nan, torch.nan, -77
    pcm = sound(4, 2, 960)
    assert group.call(pcm).isfinite().all()
    assert group.state.tail[idle].isnan().all() and group.state.peak[idle].isnan().all()
    assert (group.state.seen[idle] == -77).all()
    assert group.state.seen[group.slots].tolist() == [960, 960]
    assert torch.equal(group.state.tail[group.slots], pcm[:, -360:])


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, 3e38])
def test_what_is_not_finite_stays_in_its_stream(streams: Callable[..., Streams], poison: float) -> None:
    """...and stays visible there, until the slot is reset."""
    pcm = sound(5, 3, 3 * 320)
    dirty = pcm.clone()
    dirty[1, 400] = poison
    clean_run, dirty_run = streams([0, 1, 2]), streams([0, 1, 2])
    for begin in (0, 320, 640):
        clean = clean_run.call(pcm[:, begin : begin + 320])
        spoilt = dirty_run.call(dirty[:, begin : begin + 320])
        assert torch.equal(spoilt[[0, 2]], clean[[0, 2]])
        assert spoilt[1].isfinite().all() if begin == 0 else not spoilt[1].isfinite().any()
    dirty_run.state.reset(torch.ones(3, dtype=torch.bool))
    assert dirty_run.call(pcm[:, :320]).isfinite().all()


def test_state_of_a_long_stream_counts_on(streams: Callable[..., Streams]) -> None:
    pcm = sound(6, 1, 960)
    young, old = streams([0]), streams([0])
    young.call(pcm[:, :480])
    old.state.load(0, young.state.export(0))
    old.state.seen[0] += 160 * 10**13
    assert torch.equal(young.call(pcm[:, 480:]), old.call(pcm[:, 480:]))
    assert int(old.state.seen[0]) == 160 * 10**13 + 960


def test_global_clamp_uses_the_given_peak_and_leaves_it(streams: Callable[..., Streams]) -> None:
    group = streams([0, 1])
    group.state.peak[:] = torch.tensor([9.0, -2.0])
    frames = group.call(sound(8, 2, 800), clamp="global")
    assert group.state.peak.tolist() == [9.0, -2.0]
    assert (frames[0] == 5 / 4).all()  # (9 - 8 + 4) / 4: everything is below the clamp
    assert frames[1].min() >= (-10 + 4) / 4


def test_samples_that_are_not_contiguous(streams: Callable[..., Streams]) -> None:
    pcm = sound(9, 2, 640)
    expected = streams([0, 1]).call(pcm)
    wide = torch.full((2, 1000), torch.nan)
    wide[:, 300:940] = pcm
    assert torch.equal(streams([0, 1]).call(wide[:, 300:940]), expected)


def test_silence(streams: Callable[..., Streams]) -> None:
    """Power 0: the floor of 1e-10 everywhere."""
    frames = streams([0]).call(torch.zeros(1, 480))
    torch.testing.assert_close(frames, torch.full_like(frames, (-10 + 4) / 4), rtol=2**-22, atol=0)
