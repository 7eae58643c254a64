"""The op `mel`: every implementation against the float64 oracle, its state, and what it must not touch."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
import whisper.audio
from hypothesis import given, settings
from torch import Tensor

from fastloop.mel import MelState
from fastloop.ops import use_backend
from fastloop.ops.mel import (
    CLAMPS,
    EDGES,
    LOOKAHEAD_SAMPLES,
    RANGE_LOG10,
    mel,
    mel_cpu,
    mel_filters,
    mel_ref,
)
from fastloop.ops.native import native, reason
from fastloop.testing.mel_oracle import clamped, log_power, whisper_frames
from fastloop.testing.tolerance import error_bound, relative_error

needs_native = pytest.mark.skipif(native is None, reason=reason)
ISAS = native.isas().split() if native else []
NATIVE = {f"cpu-{isa}": functools.partial(mel_cpu, isa=isa) for isa in ISAS}
IMPLEMENTATIONS: dict[str, Callable[..., Tensor]] = {"reference": mel_ref, **NATIVE}
every = pytest.mark.parametrize("run", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS)
every_native = pytest.mark.parametrize("run", NATIVE.values(), ids=list(NATIVE))
every_edge = pytest.mark.parametrize("edge", EDGES)


@dataclass
class Streams:
    """A call's arguments for B streams in slots of a larger state."""

    state: MelState
    slots: Tensor
    bins: int = 128

    def call(
        self, run: Callable[..., Tensor], pcm: Tensor, edge: str = "reflect", clamp: str = "running"
    ) -> Tensor:
        s = self.state
        return run(pcm, self.slots, s.tail, s.peak, s.seen, *mel_filters(bins=self.bins), edge, clamp)

    def prime(self, pcm: Tensor, edge: str) -> Tensor:
        """Feed the lookahead where the edge wants one; the samples that are left."""
        if edge == "reflect":
            return pcm
        for slot, row in zip(self.slots.tolist(), pcm, strict=True):
            self.state.prime(slot, row[:LOOKAHEAD_SAMPLES])
        return pcm[:, LOOKAHEAD_SAMPLES:]


def fresh(slots: list[int], capacity: int = 0, bins: int = 128) -> Streams:
    return Streams(MelState.empty(capacity or max(slots) + 1), torch.tensor(slots), bins)


def sound(seed: int, streams: int, samples: int, level: float = 0.1) -> Tensor:
    """Noise with a tone in it: both the loud and the faint end of the range are there."""
    rng = np.random.default_rng(seed)
    t = np.arange(samples) / 16_000
    noise = rng.normal(size=(streams, samples)) * 10.0 ** rng.uniform(-4, 0, (streams, 1))
    tone = np.sin(2 * np.pi * rng.uniform(60, 7900, (streams, 1)) * t)
    return torch.from_numpy((level * (noise + tone)).astype(np.float32))


def test_filterbank_equals_whispers_table_to_the_bit() -> None:
    filters, bands = mel_filters()
    assert torch.equal(filters, whisper.audio.mel_filters("cpu", 128))
    assert torch.equal(mel_filters(bins=80)[0], whisper.audio.mel_filters("cpu", 80))
    inside = torch.arange(201)[None]
    inside = (inside >= bands[:, :1]) & (inside < bands[:, 1:])
    assert torch.equal(filters > 0, inside)


def test_filterbank_equals_librosas() -> None:
    librosa = pytest.importorskip("librosa", reason="the third opinion on the filterbank")
    theirs = torch.from_numpy(librosa.filters.mel(sr=16_000, n_fft=400, n_mels=128))
    assert torch.equal(mel_filters()[0], theirs)


@every
@every_edge
@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    hops=st.lists(st.integers(1, 45), min_size=1, max_size=4),
    streams=st.integers(1, 5),
)
def test_frames_are_inside_the_oracles_interval(
    run: Callable[..., Tensor], edge: str, seed: int, hops: list[int], streams: int
) -> None:
    """Calls of any number of hops, one after the other, on any number of streams."""
    pcm = sound(seed, streams, 160 * sum(hops) + LOOKAHEAD_SAMPLES)
    slots = np.random.default_rng(seed).permutation(streams + 3)[:streams].tolist()
    call = fresh(slots, streams + 3)
    rest = call.prime(pcm, edge)
    done = 0
    for count in hops:
        frames = call.call(run, rest[:, 160 * done : 160 * (done + count)], edge)
        before, done = done, done + count
        for row, stream in zip(frames, pcm, strict=True):
            # "wait" has the true frames, "reflect" those of a stream that ends here
            known = stream if edge == "wait" else stream[: 160 * done]
            y = log_power(known)[:done]
            if edge == "reflect":
                misses = clamped(y, y)[before:].misses(row)
            else:
                misses = clamped(y[before:], y).misses(row)
            assert not misses, misses


@every
@pytest.mark.parametrize("bins", [1, 5, 7, 80, 127])
def test_any_number_of_bins(run: Callable[..., Tensor], bins: int) -> None:
    pcm = sound(1, 3, 1600)
    frames = fresh([2, 0, 1], bins=bins).call(run, pcm)
    assert frames.shape == (3, 10, bins) and frames.is_contiguous()
    for row, stream in zip(frames, pcm, strict=True):
        assert not whisper_frames(stream, bins).misses(row)


@every
def test_last_call_of_a_stream_may_have_any_length(run: Callable[..., Tensor]) -> None:
    for extra in (0, 1, 39, 40, 41, 159):
        pcm = sound(extra, 2, 800 + extra)
        call = fresh([0, 1])
        frames = torch.cat((call.call(run, pcm[:, :320]), call.call(run, pcm[:, 320:])), dim=1)
        assert frames.shape[1] == 5
        for row, stream in zip(frames, pcm, strict=True):
            # the first call's frames were emitted with less known; the last call's are final
            assert not whisper_frames(stream)[2:].misses(row[2:])


@every_native
@pytest.mark.parametrize("level", [1e-3, 1.0])
def test_errs_at_most_twice_as_much_as_torch(run: Callable[..., Tensor], level: float) -> None:
    """Typical error, not worst case: 64 streams of noise, tones and both, against float64."""
    pcm = sound(7, 64, 6400, level)
    plain, ours = fresh(list(range(64))).call(mel_ref, pcm), fresh(list(range(64))).call(run, pcm)
    truth = torch.stack([float64_frames(stream) for stream in pcm])
    error = relative_error(ours, truth)
    assert 0 < error <= error_bound(plain, truth, torch.float32)


def float64_frames(stream: Tensor) -> Tensor:
    """Whisper's function in float64."""
    x = stream.double()
    window = torch.hann_window(400, dtype=torch.float64)
    spectrum = torch.stft(x, 400, 160, window=window, return_complex=True)[:, :-1]
    y = (mel_filters()[0].double() @ spectrum.abs() ** 2).clamp(min=1e-10).log10()
    return ((torch.maximum(y, y.max() - RANGE_LOG10) + 4) / 4).T


@every_native
@every_edge
@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1), others=st.integers(0, 40), hops=st.integers(1, 41), place=st.floats(0, 1)
)
def test_a_stream_is_bit_equal_alone_and_in_any_batch(
    run: Callable[..., Tensor], edge: str, seed: int, others: int, hops: int, place: float
) -> None:
    pcm = sound(seed, others + 1, 2 * 160 * hops + LOOKAHEAD_SAMPLES)
    mine = round(place * others)
    beside, alone = fresh(list(range(others + 1))), fresh([0])
    rest, own = beside.prime(pcm, edge), alone.prime(pcm[mine : mine + 1], edge)
    for begin in (0, 160 * hops):
        together = beside.call(run, rest[:, begin : begin + 160 * hops], edge)
        single = alone.call(run, own[:, begin : begin + 160 * hops], edge)
        assert torch.equal(together[mine], single[0])
    for name, value in alone.state.export(0).items():
        assert torch.equal(beside.state.export(mine)[name], value), name


@every
def test_repeats_are_bit_equal(run: Callable[..., Tensor]) -> None:
    pcm = sound(3, 5, 6400)
    first = fresh([4, 1, 0, 2, 3]).call(run, pcm)
    assert all(torch.equal(first, fresh([4, 1, 0, 2, 3]).call(run, pcm)) for _ in range(5))


@every
def test_other_slots_are_not_touched(run: Callable[..., Tensor]) -> None:
    call = fresh([1, 4], capacity=6)
    idle = torch.tensor([0, 2, 3, 5])
    call.state.tail[idle], call.state.peak[idle], call.state.seen[idle] = torch.nan, torch.nan, -77
    pcm = sound(4, 2, 960)
    frames = call.call(run, pcm)
    assert frames.isfinite().all()
    assert call.state.tail[idle].isnan().all() and call.state.peak[idle].isnan().all()
    assert (call.state.seen[idle] == -77).all()
    assert call.state.seen[call.slots].tolist() == [960, 960]
    assert torch.equal(call.state.tail[call.slots], pcm[:, -360:])


@every
@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf, 3e38])
def test_what_is_not_finite_stays_in_its_stream(run: Callable[..., Tensor], poison: float) -> None:
    """...and stays visible there: every frame from then on, as in Whisper's log-mel of such sound."""
    pcm = sound(5, 18, 3 * 640)
    dirty = pcm.clone()
    dirty[7, 700] = poison
    clean_run, dirty_run = fresh(list(range(18))), fresh(list(range(18)))
    others = torch.arange(18) != 7
    for begin in (0, 640, 1280):
        clean = clean_run.call(run, pcm[:, begin : begin + 640])
        spoilt = dirty_run.call(run, dirty[:, begin : begin + 640])
        assert torch.equal(spoilt[others], clean[others])
        assert spoilt[7].isfinite().all() if begin == 0 else not spoilt[7].isfinite().any()
    dirty_run.state.reset(torch.ones(18, dtype=torch.bool))
    assert dirty_run.call(run, pcm[:, :640]).isfinite().all()


@every
def test_state_of_a_long_stream_counts_on(run: Callable[..., Tensor]) -> None:
    """Behind its first 360 samples a stream's frames do not depend on how long it has been running."""
    pcm = sound(6, 1, 1600)
    young, old = fresh([0]), fresh([0])
    young.call(run, pcm[:, :800])
    old.state.load(0, young.state.export(0))
    old.state.seen[0] += 160 * 10**13
    assert torch.equal(young.call(run, pcm[:, 800:]), old.call(run, pcm[:, 800:]))
    assert int(old.state.seen[0]) == 160 * 10**13 + 1600


@every
def test_global_clamp_uses_the_given_peak_and_leaves_it(run: Callable[..., Tensor]) -> None:
    pcm = sound(8, 2, 1600)
    call = fresh([0, 1])
    call.state.peak[:] = torch.tensor([9.0, -2.0])
    frames = call.call(run, pcm, clamp="global")
    assert call.state.peak.tolist() == [9.0, -2.0]
    assert (frames[0] == 5 / 4).all()  # (9 - 8 + 4) / 4: everything is below the clamp
    y = log_power(pcm[1])
    low, high = (np.maximum(side, -10.0) for side in (y.low, y.high))
    assert not clamped(type(y)(low, high), type(y)(np.full(1, -2.0), np.full(1, -2.0))).misses(frames[1])


@every
def test_samples_that_are_not_contiguous(run: Callable[..., Tensor]) -> None:
    pcm = sound(9, 3, 1280)
    expected = fresh([0, 1, 2]).call(run, pcm)
    wide = torch.full((3, 2000), torch.nan)
    wide[:, 300:1580] = pcm
    assert torch.equal(fresh([0, 1, 2]).call(run, wide[:, 300:1580]), expected)  # rows apart
    assert torch.equal(fresh([0, 1, 2]).call(run, pcm.T.contiguous().T), expected)  # samples apart
    shared = fresh([0, 1, 2]).call(run, pcm[:1].expand(3, 1280))  # one row for all
    assert torch.equal(shared, fresh([0, 1, 2]).call(run, pcm[:1].repeat(3, 1)))


@needs_native
def test_native_writes_its_frames_and_nothing_else() -> None:
    pcm, call, bins = sound(10, 3, 480), fresh([0, 1, 2], bins=6), 6
    expected = call.call(mel_cpu, pcm)
    state = MelState.empty(3)
    filters, bands = mel_filters(bins=bins)
    guard = 64
    buffer = torch.full((expected.numel() + 2 * guard,), 1234.5)
    assert native is not None
    for isa in ISAS:
        native.mel(
            batch=3,
            samples=480,
            pcm=pcm.data_ptr(),
            pcm_stride=480,
            slots=call.slots.data_ptr(),
            slot_count=3,
            tail=state.tail.data_ptr(),
            peak=state.peak.data_ptr(),
            seen=state.seen.data_ptr(),
            bins=bins,
            filters=filters.data_ptr(),
            bands=bands.data_ptr(),
            edge=0,
            clamp=0,
            frames=buffer.data_ptr() + 4 * guard,
            isa=isa,
        )
        state.reset(torch.ones(3, dtype=torch.bool))
        assert (buffer[:guard] == 1234.5).all() and (buffer[-guard:] == 1234.5).all()
        assert (buffer[guard:-guard] != 1234.5).all()


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=needs_native)])
@every_edge
@pytest.mark.parametrize("clamp", CLAMPS)
def test_opcheck(backend: str, edge: str, clamp: str) -> None:
    call = fresh([2, 0], capacity=3)
    pcm = call.prime(sound(11, 2, 640 + LOOKAHEAD_SAMPLES), edge)[:, :640]
    s = call.state
    with use_backend(f"mel={backend}"):
        torch.library.opcheck(
            mel.torch_op, (pcm, call.slots, s.tail, s.peak, s.seen, *mel_filters(), edge, clamp)
        )


def with_changes(**changes: object) -> dict[str, object]:
    s = MelState.empty(3)
    filters, bands = mel_filters()
    arguments: dict[str, object] = {
        "pcm": torch.zeros(2, 320),
        "slots": torch.tensor([0, 2]),
        "tail": s.tail,
        "peak": s.peak,
        "seen": s.seen,
        "filters": filters,
        "bands": bands,
        "edge": "reflect",
        "clamp": "running",
    }
    assert set(changes) <= set(arguments)
    return arguments | changes


BAD = {
    "pcm of one dimension": ({"pcm": torch.zeros(320)}, ValueError, "pcm must have 2 dimensions"),
    "pcm too short": ({"pcm": torch.zeros(2, 159)}, ValueError, "160 samples"),
    "no stream": ({"pcm": torch.zeros(0, 320), "slots": torch.zeros(0).long()}, ValueError, "1 stream"),
    "pcm of integers": ({"pcm": torch.zeros(2, 320).short()}, TypeError, "pcm must be torch.float32"),
    "pcm in double": ({"pcm": torch.zeros(2, 320).double()}, TypeError, "pcm must be torch.float32"),
    "slots for another batch": ({"slots": torch.tensor([0])}, ValueError, "dimension B of slots is 1"),
    "slots in int32": ({"slots": torch.tensor([0, 1]).int()}, TypeError, "slots must be torch.int64"),
    "slots twice": ({"slots": torch.tensor([1, 1])}, ValueError, "distinct"),
    "slot beyond the state": ({"slots": torch.tensor([0, 3])}, ValueError, "slot 3 is outside the 3 slots"),
    "slot below zero": ({"slots": torch.tensor([-1, 0])}, ValueError, "slot -1 is outside"),
    "tail too short": ({"tail": torch.zeros(3, 240)}, ValueError, "dimension 360 of tail is 240"),
    "peak for another state": ({"peak": torch.zeros(4)}, ValueError, "dimension Z of peak is 4"),
    "seen in int32": ({"seen": torch.zeros(3).int()}, TypeError, "seen must be torch.int64"),
    "seen between two hops": ({"seen": torch.tensor([0, 0, 161])}, ValueError, "slot 2 has seen 161"),
    "seen below zero": ({"seen": torch.tensor([0, 0, -160])}, ValueError, "slot 2 has seen -160"),
    "filters of another width": ({"filters": torch.zeros(128, 200)}, ValueError, "dimension 201 of filters"),
    "bands for other filters": (
        {"bands": torch.zeros(80, 2).int()},
        ValueError,
        "dimension C of bands is 80",
    ),
    "another device": ({"filters": torch.zeros(128, 201, device="meta")}, ValueError, "filters is on meta"),
    "unknown edge": ({"edge": "mirror"}, ValueError, "edge must be one of"),
    "unknown clamp": ({"clamp": "local"}, ValueError, "clamp must be one of"),
    "not primed": ({"edge": "wait"}, ValueError, "Prime a stream"),
}


@every
@pytest.mark.parametrize(("changes", "error", "message"), BAD.values(), ids=BAD)
def test_bad_arguments_are_named_and_nothing_changes(
    run: Callable[..., Tensor], changes: dict[str, object], error: type[Exception], message: str
) -> None:
    arguments = with_changes(**changes)
    before = {name: value.clone() for name, value in arguments.items() if isinstance(value, Tensor)}
    with pytest.raises(error, match=message):
        run(**arguments)
    for name, value in before.items():
        assert value.device.type == "meta" or torch.equal(arguments[name], value), name  # type: ignore[arg-type]


@every_native
def test_native_refuses_state_that_is_not_contiguous(run: Callable[..., Tensor]) -> None:
    with pytest.raises(ValueError, match="tail is changed in place and must be contiguous"):
        run(**with_changes(tail=torch.zeros(3, 720)[:, ::2]))


@every_native
@pytest.mark.parametrize("band", [(-1, 3), (3, 2), (0, 202)])
def test_native_refuses_bands_outside_the_spectrum(run: Callable[..., Tensor], band: tuple[int, int]) -> None:
    bands = mel_filters()[1].clone()
    bands[17] = torch.tensor(band)
    with pytest.raises(ValueError, match=r"band 17 is \["):
        run(**with_changes(bands=bands))


@needs_native
def test_native_is_the_default_on_cpus() -> None:
    assert mel.defaults["cpu"][0] == "cpu"
    assert mel.implementations["cpu"] is mel_cpu
