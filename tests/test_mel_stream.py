"""MelStream, MelState and log_mel against openai-whisper's own function.

Two float32 results of one sound are each inside the oracle's interval, so they differ by no more than its
width, which scales with the sound (fastloop.testing.mel_oracle). The reference backend runs the same torch
calls as Whisper; there only the order of the filterbank's sums may differ (TIGHT).
"""

from __future__ import annotations

from collections.abc import Callable

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from torch import Tensor
from whisper.audio import log_mel_spectrogram

from fastloop.mel import MelState, MelStream, log_mel, mel_chunk
from fastloop.ops import use_backend
from fastloop.ops.mel import LOOKAHEAD_SAMPLES, mel
from fastloop.testing.mel_oracle import clamped, log_power, whisper_frames

# Sums of at most 11 filtered columns in another order: 22 x 2^-24 of a power, over 4 ln 10; and one unit in
# the last place, 2^-20, of a logarithm below 16 on each side, over 4.
TIGHT = 22 * 2.0**-24 / (4 * np.log(10)) + 2 * 2.0**-20 / 4

BACKENDS = [name for name in ("reference", "cpu") if name in mel.implementations]
every_backend = pytest.mark.parametrize("backend", BACKENDS)


def shape_of(kind: str, n: int, rng: np.random.Generator) -> np.ndarray:
    t = np.arange(n) / 16_000
    return {
        "noise": lambda: rng.normal(size=n) * 10.0 ** rng.uniform(-5, 0),
        "tone": lambda: np.sin(2 * np.pi * rng.uniform(30, 7990) * t),
        "growing": lambda: rng.normal(size=n) * np.geomspace(1e-5, 1, n),
        "fading": lambda: rng.normal(size=n) * np.geomspace(1, 1e-5, n),
        "clicks": lambda: (rng.random(n) < 0.002).astype(float),
        "silence": lambda: np.zeros(n),
        "constant": lambda: np.full(n, rng.uniform(-1, 1)),
        "clipped": lambda: np.clip(20 * np.sin(2 * np.pi * 333 * t) + rng.normal(size=n), -1, 1),
        "denormal": lambda: rng.normal(size=n) * 1e-39,
        "16 bit": lambda: np.round(rng.normal(size=n) * 3000).clip(-32768, 32767) / 32768,
    }[kind]()


KINDS = (
    "noise",
    "tone",
    "growing",
    "fading",
    "clicks",
    "silence",
    "constant",
    "clipped",
    "denormal",
    "16 bit",
)


def sound(kind: str, n: int, seed: int) -> Tensor:
    return torch.from_numpy(shape_of(kind, n, np.random.default_rng(seed)).astype(np.float32))


def whispers(pcm: Tensor) -> Tensor:
    return log_mel_spectrogram(pcm, n_mels=128).T


def pieces(pcm: Tensor, sizes: list[int]) -> list[Tensor]:
    """Cut [B, n] into pushes of these sizes, again and again."""
    cuts, at, turn = [], 0, 0
    while at < pcm.shape[1]:
        cuts.append(pcm[:, at : at + sizes[turn % len(sizes)]])
        at, turn = at + sizes[turn % len(sizes)], turn + 1
    return cuts


def run(stream: MelStream, pcm: Tensor, sizes: list[int]) -> list[Tensor]:
    """Everything that [B, n] gives, per stream."""
    got = [stream.push(piece) for piece in pieces(pcm, sizes)]
    return [torch.cat(parts) for parts in zip(*got, strict=True)]


def assert_whispers(frames: Tensor, heard: Tensor, last: int, tight: bool) -> None:
    """frames [last, C] are the last columns of Whisper's log-mel of `heard`."""
    theirs = whispers(heard)[-last:]
    if tight:
        assert (frames - theirs).abs().max().item() <= TIGHT
        return
    interval = whisper_frames(heard)[-last:]
    assert not interval.misses(theirs), interval.misses(theirs)
    assert not interval.misses(frames), interval.misses(frames)


@every_backend
@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    seed=st.integers(0, 2**32 - 1),
    chunk_frames=st.sampled_from([2, 20, 40, 80]),
    samples=st.integers(1, 30_000),
    sizes=st.lists(st.integers(1, 20_000), min_size=1, max_size=6),
)
@example(kind="noise", seed=0, chunk_frames=40, samples=12_800, sizes=[1])
@example(kind="tone", seed=1, chunk_frames=40, samples=19_200, sizes=[6400])
def test_after_every_chunk_the_new_frames_are_whispers_last(
    backend: str, kind: str, seed: int, chunk_frames: int, samples: int, sizes: list[int]
) -> None:
    pcm = sound(kind, samples, seed)
    with use_backend(f"mel={backend}"):
        (frames,) = run(MelStream(chunk_frames=chunk_frames), pcm[None], sizes)
    chunk = 160 * chunk_frames
    assert len(frames) == samples // chunk * chunk_frames
    for number in range(samples // chunk):
        new = frames[number * chunk_frames : (number + 1) * chunk_frames]
        assert_whispers(new, pcm[: (number + 1) * chunk], chunk_frames, tight=backend == "reference")


@every_backend
@settings(max_examples=25, deadline=None)
@given(kind=st.sampled_from(KINDS), seed=st.integers(0, 2**32 - 1), samples=st.integers(201, 20_000))
def test_offline_equals_whisper(backend: str, kind: str, seed: int, samples: int) -> None:
    pcm = sound(kind, samples, seed)
    with use_backend(f"mel={backend}"):
        frames = log_mel(pcm)
        both = log_mel(torch.stack((pcm, pcm.flip(0))))
    assert_whispers(frames, pcm, samples // 160, tight=backend == "reference")
    assert_whispers(both[1], pcm.flip(0), samples // 160, tight=False)


@every_backend
def test_offline_short_clips(backend: str) -> None:
    """160 to 200 samples are mirrored several times over (torch refuses); below a hop there is no frame."""
    with use_backend(f"mel={backend}"):
        for samples in (160, 161, 199, 200):
            pcm = sound("noise", samples, samples)
            assert not whisper_frames(pcm).misses(log_mel(pcm))
        for samples in (1, 2, 159):
            assert log_mel(torch.ones(samples)).shape == (0, 128)
            assert log_mel(torch.ones(3, samples)).shape == (3, 0, 128)


@pytest.mark.parametrize(
    ("pcm", "error", "message"),
    [
        (torch.zeros(0), ValueError, "not empty"),
        (torch.zeros(0, 400), ValueError, "not empty"),
        (torch.tensor(1.0), ValueError, r"must be \[S\]"),
        (torch.zeros(1, 1, 400), ValueError, r"must be \[S\]"),
        (torch.zeros(400).short(), TypeError, "float32"),
    ],
)
def test_offline_bad_input(pcm: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        log_mel(pcm)


@every_backend
@settings(max_examples=25, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    seed=st.integers(0, 2**32 - 1),
    samples=st.integers(240, 20_000),
    sizes=st.lists(st.integers(1, 20_000), min_size=1, max_size=6),
    chunk_frames=st.sampled_from([1, 20, 40]),
)
def test_wait_equals_offline_up_to_the_clamp(
    backend: str, kind: str, seed: int, samples: int, sizes: list[int], chunk_frames: int
) -> None:
    """Clamped again by the whole clip's loudest, all frames that came are offline's, and so is the clamp if
    it is known beforehand. Only what needs samples behind the end is missing.
    """
    pcm = sound(kind, samples, seed)
    peak = 4 * whispers(pcm).max() - 4
    with use_backend(f"mel={backend}"):
        (running,) = run(MelStream(chunk_frames=chunk_frames, edge="wait"), pcm[None], sizes)
        (known,) = run(MelStream(1, chunk_frames, "wait", clamp="global", peak=peak), pcm[None], sizes)
    count = max(0, samples - LOOKAHEAD_SAMPLES) // (160 * chunk_frames) * chunk_frames
    assert len(running) == len(known) == count
    y, truth = log_power(pcm), whisper_frames(pcm)[:count]
    clamp = torch.tensor((y.low.max() - 8 + 4) / 4).float()
    for frames in (torch.maximum(running, clamp), known):
        assert not truth.misses(frames), truth.misses(frames)
    for number, new in enumerate(running.split(chunk_frames) if count else ()):
        so_far = y[: (number + 1) * chunk_frames]
        assert not clamped(so_far[-chunk_frames:], so_far).misses(new)


@every_backend
def test_global_clamp_with_the_clips_own_peak_is_offline(backend: str) -> None:
    """edge="reflect": all but each chunk's last frame, which is provisional."""
    pcm = sound("growing", 12_800, 5)
    with use_backend(f"mel={backend}"):
        offline = log_mel(pcm)
        (frames,) = run(MelStream(clamp="global", peak=4 * offline.amax() - 4), pcm[None], [777])
    kept = torch.arange(80) % 40 != 39
    assert (frames[kept] - offline[kept]).abs().max().item() <= TIGHT  # the peak went through two roundings
    assert (frames[39] - offline[39]).abs().max().item() > TIGHT


@every_backend
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), data=st.data())
def test_streams_are_independent_of_each_other(backend: str, seed: int, data: st.DataObject) -> None:
    """Pushes to any subset, by index or by mask, in any order: each stream gives what it gives alone."""
    count, edge = 4, data.draw(st.sampled_from(["reflect", "wait"]))
    pcm = torch.stack([sound("noise", 6000, seed + z) for z in range(count)])
    at, got = [0] * count, [[] for _ in range(count)]
    with use_backend(f"mel={backend}"):
        stream = MelStream(count, chunk_frames=5, edge=edge)
        for _ in range(data.draw(st.integers(1, 8))):
            rows = data.draw(st.lists(st.integers(0, count - 1), min_size=1, max_size=count, unique=True))
            n = data.draw(st.integers(1, 1500))
            rows = [z for z in rows if at[z] + n <= pcm.shape[1]]
            if not rows:
                continue
            chosen = torch.tensor(rows)
            if data.draw(st.booleans()):
                rows, chosen = sorted(rows), torch.isin(torch.arange(count), chosen)
            block = torch.stack([pcm[z, at[z] : at[z] + n] for z in rows])
            for z, frames in zip(rows, stream.push(block, chosen), strict=True):
                at[z] += n
                got[z].append(frames)
        for z in range(count):
            (alone,) = MelStream(1, chunk_frames=5, edge=edge).push(pcm[z : z + 1, : at[z]])
            together = torch.cat([alone[:0], *got[z]])
            if backend == "cpu":
                assert torch.equal(together, alone)
            else:
                assert together.shape == alone.shape
                assert not len(alone) or (together - alone).abs().max().item() <= TIGHT


def whole(samples: int, chunk: int) -> int:
    return -(-samples // chunk) * chunk


@every_backend
@pytest.mark.parametrize("samples", [1, 39, 40, 41, 6399, 6400, 6401, 6440, 9000])
def test_flush_pads_with_zeros(backend: str, samples: int) -> None:
    pcm = sound("noise", samples, samples)
    padded = torch.nn.functional.pad(pcm, (0, whole(samples, 6400) - samples))
    with use_backend(f"mel={backend}"):
        for edge in ("reflect", "wait"):
            stream = MelStream(edge=edge)
            (early,), (late,) = stream.push(pcm[None]), stream.flush()
            assert len(early) + len(late) == len(padded) // 160
            if edge == "reflect" and len(late):
                assert_whispers(late, padded, len(late), tight=backend == "reference")
            if edge == "wait":
                beyond = torch.nn.functional.pad(padded, (0, LOOKAHEAD_SAMPLES))
                y = log_power(beyond)[: len(padded) // 160]
                assert not clamped(y[-40:], y).misses(late[-40:])
            assert all(len(more) == 0 for more in stream.flush())  # nothing new


@every_backend
def test_a_flushed_stream_goes_on_behind_the_zeros(backend: str) -> None:
    first, second = sound("noise", 5000, 1), sound("tone", 6400, 2)
    padded = torch.cat((first, torch.zeros(1400), second))
    with use_backend(f"mel={backend}"):
        stream = MelStream()
        stream.push(first[None])
        stream.flush()
        (frames,) = stream.push(second[None])
    assert_whispers(frames, padded, 40, tight=backend == "reference")


def test_flush_of_some_streams_leaves_the_others() -> None:
    stream = MelStream(3)
    stream.push(torch.ones(3, 100))
    assert [len(f) for f in stream.flush(torch.tensor([2]))] == [40]
    assert stream.received == [100, 100, 6400]
    assert [len(f) for f in stream.flush()] == [40, 40, 0]


@pytest.mark.parametrize("edge", ["reflect", "wait"])
def test_reset_streams_begin_anew(edge: str) -> None:
    old, new = torch.ones(2, 8000), torch.stack([sound("noise", 7000, s) for s in (1, 2)])
    stream, kept = MelStream(2, edge=edge), MelStream(2, edge=edge)
    for each in (stream, kept):
        each.push(old)
    stream.reset(torch.tensor([True, False]))
    (anew, on), (fresh, _) = stream.push(new), MelStream(2, edge=edge).push(new)
    assert torch.equal(anew, fresh)
    assert torch.equal(on, kept.push(new)[1])


def test_reset_keeps_a_known_peak() -> None:
    stream = MelStream(2, clamp="global", peak=torch.tensor([3.0, 4.0]))
    stream.push(torch.ones(2, 6400))
    stream.reset(torch.tensor([True, True]))
    assert stream.state.peak.tolist() == [3.0, 4.0]


@pytest.mark.parametrize("edge", ["reflect", "wait"])
def test_an_exported_stream_goes_on_elsewhere(edge: str) -> None:
    """In another slot of another state, beside other streams: the same to the bit."""
    pcm = sound("noise", 3 * 1600 + LOOKAHEAD_SAMPLES, 3)
    one, other = MelState.empty(1), MelState.empty(5)
    if edge == "wait":
        one.prime(0, pcm[:LOOKAHEAD_SAMPLES])
        pcm = pcm[LOOKAHEAD_SAMPLES:]
    mel_chunk(one, torch.tensor([0]), pcm[None, :1600], edge)
    saved = one.export(0)
    expected = mel_chunk(one, torch.tensor([0]), pcm[None, 1600:3200], edge)
    other.load(3, saved)
    assert torch.equal(mel_chunk(other, torch.tensor([3]), pcm[None, 1600:3200], edge), expected)
    assert (other.seen[[0, 1, 2, 4]] == 0).all()


def without(name: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda values: {key: value for key, value in values.items() if key != name}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without("peak"), r"needs \['peak', 'seen', 'tail'\]"),
        (lambda v: v | {"more": torch.zeros(1)}, "got .*'more'"),
        (lambda v: v | {"tail": torch.zeros(359)}, r"tail must be torch.float32 \[360\]"),
        (lambda v: v | {"seen": torch.tensor(1.0)}, "seen must be torch.int64"),
    ],
)
def test_load_names_what_does_not_fit(
    damage: Callable[[dict[str, Tensor]], dict[str, Tensor]], message: str
) -> None:
    state = MelState.empty(2)
    before = state.export(1)
    with pytest.raises(ValueError, match=message):
        state.load(1, damage(MelState.empty(1).export(0)))
    assert all(torch.equal(value, before[name]) for name, value in state.export(1).items())


def test_what_is_not_finite_stays_in_its_stream_until_reset() -> None:
    pcm = torch.stack([sound("noise", 12_800, s) for s in range(3)])
    dirty = pcm.clone()
    dirty[1, 3000] = torch.nan
    spoilt, clean = run(MelStream(3), dirty, [1000]), run(MelStream(3), pcm, [1000])
    assert torch.equal(spoilt[0], clean[0]) and torch.equal(spoilt[2], clean[2])
    assert spoilt[1].isnan().all() and whispers(dirty[1]).isnan().all()


BAD_CALLS: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "no stream": (lambda: MelStream(0), ValueError, "at least 1"),
    "no frame": (lambda: MelStream(1, 0), ValueError, "at least 1"),
    "edge": (lambda: MelStream(edge="none"), ValueError, "edge='none'"),
    "clamp": (lambda: MelStream(clamp="none"), ValueError, "clamp='none'"),
    "no peak": (lambda: MelStream(clamp="global"), ValueError, "needs peak"),
    "idle peak": (lambda: MelStream(peak=1.0), ValueError, "takes none"),
    "flat push": (lambda: MelStream().push(torch.zeros(160)), ValueError, r"must be \[1, n\]"),
    "other batch": (lambda: MelStream(2).push(torch.zeros(3, 160)), ValueError, r"must be \[2, n\]"),
    "integers": (lambda: MelStream().push(torch.zeros(1, 160).short()), TypeError, "float32"),
    "unknown stream": (
        lambda: MelStream(2).push(torch.zeros(1, 9), torch.tensor([2])),
        ValueError,
        "below 2",
    ),
    "stream twice": (lambda: MelStream(2).flush(torch.tensor([1, 1])), ValueError, "distinct"),
    "wrong mask": (lambda: MelStream(2).flush(torch.tensor([True])), ValueError, r"bool \[2\]"),
    "reset by index": (lambda: MelState.empty(2).reset(torch.tensor([0, 1])), ValueError, r"bool \[2\]"),
    "prime by 41": (lambda: MelState.empty(2).prime(0, torch.zeros(41)), ValueError, r"must be \[40\]"),
    "half a hop": (
        lambda: mel_chunk(MelState.empty(1), torch.tensor([0]), torch.zeros(1, 200)),
        ValueError,
        "multiple of 160",
    ),
}


@pytest.mark.parametrize(("call", "error", "message"), BAD_CALLS.values(), ids=BAD_CALLS)
def test_bad_calls_are_named(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_priming_twice_is_an_error() -> None:
    state = MelState.empty(1)
    state.prime(0, torch.zeros(40))
    with pytest.raises(ValueError, match="slot 0 has seen 40 samples"):
        state.prime(0, torch.zeros(40))
