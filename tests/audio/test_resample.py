"""Streaming resampling equals resampling at once, to the bit; so does a stream that was saved and rebuilt."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import soxr
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fastloop.audio import Resampler
from fastloop.errors import SnapshotError

COMMON = (8_000, 11_025, 12_000, 22_050, 24_000, 32_000, 44_100, 48_000, 88_200, 96_000, 176_400, 192_000)


def noise(samples: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1, 1, samples).astype(np.float32)


def pushed(resampler: Resampler, sound: np.ndarray, sizes: list[int]) -> np.ndarray:
    """Push the sound in pieces of these sizes, over and over."""
    out, at, turn = [np.empty(0, dtype=np.float32)], 0, 0
    while at < len(sound):
        size = sizes[turn % len(sizes)]
        out.append(resampler.push(sound[at : at + size]))
        at, turn = at + size, turn + 1
    return np.concatenate(out)


@given(
    rate=st.one_of(st.sampled_from(COMMON), st.integers(1_000, 768_000)),
    samples=st.integers(1, 9_000),
    sizes=st.lists(st.integers(1, 5_000), min_size=1, max_size=5),
)
def test_any_split_equals_soxr_at_once(rate: int, samples: int, sizes: list[int]) -> None:
    if sum(sizes) * 400 < samples * len(sizes):  # at most some 400 pushes
        sizes = [*sizes, samples]
    sound = noise(samples)
    resampler = Resampler(rate)
    out = np.concatenate([pushed(resampler, sound, sizes), resampler.flush()])
    assert np.array_equal(out, soxr.resample(sound, rate, 16_000))


@given(
    rate=st.sampled_from((100_000, 200_000, *COMMON)),
    sizes=st.lists(st.integers(1, 300_000), min_size=1, max_size=4),
)
@example(rate=100_000, sizes=[64_000] * 4)  # more blocks are ready than soxr hands out at once
@settings(max_examples=10)
def test_what_is_ready_does_not_depend_on_the_split(rate: int, sizes: list[int]) -> None:
    sound = noise(sum(sizes))
    assert np.array_equal(pushed(Resampler(rate), sound, sizes), pushed(Resampler(rate), sound, [len(sound)]))


def test_one_sample_at_a_time() -> None:
    sound, resampler = noise(3_000), Resampler(48_000)
    out = np.concatenate([pushed(resampler, sound, [1]), resampler.flush()])
    assert np.array_equal(out, soxr.resample(sound, 48_000, 16_000))


@pytest.mark.parametrize("rate", COMMON)
def test_delay_is_as_stated(rate: int) -> None:
    """A sample is held back for less than delay_s: what came out reaches that near to what went in."""
    resampler, size = Resampler(rate), max(1, rate // 1000)
    out, worst = 0, 0.0
    for _ in range(400):
        worst = max(worst, (resampler.received - size) / rate - out / 16_000)
        out += len(resampler.push(np.zeros(size, dtype=np.float32)))
    # One output and one push of slack: time is counted in those.
    assert 0.5 * resampler.delay_s < worst <= resampler.delay_s + size / rate + 1 / 16_000


def test_after_a_flush_the_stream_is_new() -> None:
    sound, resampler = noise(5_000), Resampler(44_100)
    first = np.concatenate([resampler.push(sound), resampler.flush()])
    assert not resampler.busy and len(resampler.flush()) == 0
    second = np.concatenate([resampler.push(sound), resampler.flush()])
    assert np.array_equal(first, second)


def test_16_khz_passes_unchanged_and_undelayed() -> None:
    sound, resampler = noise(1_000), Resampler(16_000)
    assert np.array_equal(pushed(resampler, sound, [7, 100]), sound)
    assert len(resampler.flush()) == 0 and not resampler.busy and resampler.delay_s == 0


def test_empty_pushes_change_nothing() -> None:
    resampler = Resampler(48_000)
    assert len(resampler.push(noise(0))) == 0 and not resampler.busy
    resampler.push(noise(10))
    assert len(resampler.push(noise(0))) == 0 and resampler.received == 10


@pytest.mark.parametrize(
    "rate", [0, -16_000, 999, 768_001, True, False, 16_000.0, float("nan"), float("inf"), "16000", None]
)
def test_rates_that_are_none_are_refused(rate: Any) -> None:
    with pytest.raises(ValueError, match=r"^sample rate: "):
        Resampler(rate)


def test_numpy_integers_are_rates() -> None:
    assert Resampler(np.int64(48_000)).rate == 48_000  # type: ignore[arg-type]


@pytest.mark.parametrize("samples", [[0.0], np.zeros(3), np.zeros((3, 1), dtype=np.float32)])
def test_push_takes_float32_only(samples: Any) -> None:
    with pytest.raises(TypeError, match=r"float32 array"):
        Resampler(48_000).push(samples)


# ---- saving and rebuilding ---------------------------------------------------------------------------


@given(
    rate=st.sampled_from((8_000, 12_000, 16_000, 24_000, 32_000, 48_000, 96_000)),
    before=st.integers(0, 400_000),
    after=st.integers(1, 20_000),
    sizes=st.lists(st.integers(200, 50_000), min_size=1, max_size=4),
)
@settings(max_examples=20)
def test_a_saved_stream_goes_on_to_the_bit(rate: int, before: int, after: int, sizes: list[int]) -> None:
    sound = noise(before + after, before)
    resampler = Resampler(rate)
    pushed(resampler, sound[:before], sizes)
    other = Resampler.restore(json.loads(json.dumps(resampler.export())))
    assert other.busy == resampler.busy
    for _ in range(2):  # the rest of this sound, then a sound behind a flush
        assert np.array_equal(
            pushed(other, sound[before:], sizes), pushed(resampler, sound[before:], [after])
        )
        assert np.array_equal(other.flush(), resampler.flush())


@pytest.mark.parametrize("rate", [11_025, 22_050, 44_100, 88_200, 176_400], ids=lambda rate: f"{rate}Hz")
def test_rates_of_long_grids_are_saved_too(rate: int) -> None:
    sound = noise(40 * rate)
    resampler = Resampler(rate)
    resampler.push(sound[:-10_000])
    other = Resampler.restore(resampler.export())
    assert np.array_equal(other.push(sound[-10_000:]), resampler.push(sound[-10_000:]))
    assert np.array_equal(other.flush(), resampler.flush())


def test_what_is_remembered_is_bounded_and_saving_twice_is_the_same() -> None:
    resampler = Resampler(48_000)
    for _ in range(60):
        resampler.push(noise(48_000))
    state = resampler.export()
    assert len(state["samples"]) < 4 * 10_000 * 4 / 3  # a grid of 4,404 and three blocks of 1,758 samples
    assert Resampler.restore(state).export() == state == resampler.export()


@pytest.mark.parametrize("rate", [2_000, 44_056])
def test_a_stream_that_cannot_be_saved_says_so_and_goes_on(rate: int) -> None:
    sound, resampler = noise(10_000), Resampler(rate)
    resampler.export()  # nothing in it yet
    head = resampler.push(sound[:5_000])
    with pytest.raises(SnapshotError, match=rf"{rate} Hz.*flush\(\)"):
        resampler.export()
    out = np.concatenate([head, resampler.push(sound[5_000:]), resampler.flush()])
    assert np.array_equal(out, soxr.resample(sound, rate, 16_000))


@pytest.mark.parametrize(
    "change",
    [
        {"rate": 0},
        {"rate": None},
        {"samples": "&"},
        {"samples": "AAAAAAA="},
        {"samples": "AADAfw=="},
        {"emitted": 7},
        {"emitted": "x"},
        {"last": ""},
    ],
    ids=str,
)
def test_a_damaged_state_is_refused(change: dict[str, Any]) -> None:
    resampler = Resampler(48_000)
    resampler.push(noise(20_000))
    with pytest.raises(SnapshotError, match=r"take a new one|flush"):
        Resampler.restore(resampler.export() | change)
    with pytest.raises(SnapshotError, match="take a new one"):
        Resampler.restore({})
