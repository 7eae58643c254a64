"""The steps of TFJP on signals whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastloop.config import SAMPLE_RATE
from fastloop.soundflow import tfjp
from fastloop.soundflow.tfjp import BINS, HALF_CHUNK_S, HOP, WINDOW

EPS = np.finfo(np.float64).eps


def noise(seed: int, seconds: float, sigma: float = 1.0) -> np.ndarray:
    return sigma * np.random.default_rng(seed).standard_normal(round(seconds * SAMPLE_RATE))


def tone(seconds: float, hz: float = 1000.0, peak: float = 0.3) -> np.ndarray:
    return peak * np.sin(2 * np.pi * hz * np.arange(round(seconds * SAMPLE_RATE)) / SAMPLE_RATE)


def with_tone(floor: float, spans: list[tuple[float, float]], seconds: float, seed: int = 0) -> np.ndarray:
    x = noise(seed, seconds, floor)
    for a, b in spans:
        first, end = round(a * SAMPLE_RATE), round(b * SAMPLE_RATE)
        x[first:end] += tone(seconds)[first:end]
    return x


# ---- transform


@given(count=st.integers(1, 3000), seed=st.integers(0, 2**32 - 1))
def test_istft_inverts_stft(count: int, seed: int) -> None:
    x = np.random.default_rng(seed).standard_normal(count)
    # an FFT there and back, windows that multiply to one: log2(512) roundings each way, a few around it
    bound = 4 * np.log2(WINDOW) * EPS * np.linalg.norm(x)
    assert np.linalg.norm(tfjp.istft(tfjp.stft(x), count) - x) <= bound


def test_power_of_white_noise_is_its_variance_times_the_windows_energy() -> None:
    frames = tfjp.power(tfjp.stft(noise(1, 20.0, 0.1)))[4:-4, 1:-1]
    expected = 0.01 * np.sum(tfjp._TAPER**2)
    sigma = expected * np.sqrt(2.0 * WINDOW / HOP / frames.size)  # of a mean of exponentials, overlap counted
    assert abs(frames.mean() - expected) < 5 * sigma


# ---- silences


def test_long_inner_silence_is_cut_and_times_move_with_it() -> None:
    x = with_tone(1e-4, [(0.5, 1.0), (4.0, 4.5)], 5.5)
    y, kept = tfjp.cut_silences(x, longest_s=1.0)
    block = tfjp.LEVEL_BLOCK / SAMPLE_RATE
    assert len(kept) == 2
    assert (4.0 - 1.0) - (len(x) - len(y)) / SAMPLE_RATE == pytest.approx(1.0, abs=2 * block)
    for original in (0.5, 0.75, 1.0, 4.0, 4.25, 4.5):
        at, moved = round(original * SAMPLE_RATE), round(tfjp.moved(original, kept) * SAMPLE_RATE)
        if original in (0.75, 4.25):  # inside a tone: the same samples
            assert np.array_equal(x[at : at + 800], y[moved : moved + 800])
    assert tfjp.moved(2.5, kept) == pytest.approx(1.5, abs=0.6)  # cut out: at the join


@pytest.mark.parametrize(
    "x",
    [
        noise(2, 3.0),
        with_tone(1e-4, [(0.2, 0.6), (1.0, 1.4)], 2.0),
        np.zeros(9000),
        np.zeros(7),
        noise(3, 0.004),
    ],
    ids=["steady noise", "short pause", "digital silence", "7 samples", "less than a block"],
)
def test_nothing_is_cut_where_there_is_no_long_silence(x: np.ndarray) -> None:
    y, kept = tfjp.cut_silences(x)
    assert np.array_equal(y, x) and kept == ((0, len(x)),)


def test_silence_at_the_ends_stays() -> None:
    x = with_tone(1e-4, [(2.0, 2.5)], 5.0)
    assert len(tfjp.cut_silences(x)[0]) == len(x)


# ---- noise


def test_noise_profile_is_the_noise_of_the_pauses() -> None:
    sigma = 0.01
    x = with_tone(sigma, [(1.0, 2.0)], 6.0)
    share = 0.1
    expected = sigma**2 * np.sum(tfjp._TAPER**2)
    found = tfjp.noise_profile(x, share)[2:-2].mean() / expected
    # the quietest tenth of frames: each frame's energy varies by sqrt(2 / WINDOW_eff); the mean of the lowest
    # tenth of a normal distribution is 1.755 deviations below its mean
    effective = np.sum(tfjp._TAPER**2) ** 2 / np.sum(tfjp._TAPER**4)
    bias = 1 - 1.755 * np.sqrt(2 / effective)
    frames = share * len(x) / HOP
    spread = np.sqrt(2.0 * (WINDOW / HOP) / (frames * BINS))
    assert abs(found - bias) < 5 * spread + 0.02


@pytest.mark.parametrize(
    "x",
    [noise(4, 2.0), tone(2.0), np.zeros(16000), noise(5, 0.05), np.zeros(1)],
    ids=["steady noise", "steady tone", "silence", "50 ms", "1 sample"],
)
def test_no_noise_is_found_without_a_pause_to_hear_it_in(x: np.ndarray) -> None:
    assert not tfjp.noise_profile(x).any()


def test_digital_silence_is_no_pause() -> None:
    x = np.concatenate((np.zeros(8000), with_tone(0.01, [(0.5, 1.0)], 3.0), np.zeros(8000)))
    assert tfjp.noise_profile(x)[5:-5].mean() > 0.5 * 1e-4 * np.sum(tfjp._TAPER**2)


def test_denoise_without_noise_changes_nothing() -> None:
    x = noise(6, 1.0)
    y = tfjp.denoise(x, np.zeros(BINS))
    assert np.linalg.norm(y - x) <= 4 * np.log2(WINDOW) * EPS * np.linalg.norm(x)


def test_denoise_takes_the_floor_down_and_leaves_the_tone() -> None:
    x = with_tone(0.01, [(1.0, 2.0)], 3.0)
    clean = with_tone(0.0, [(1.0, 2.0)], 3.0)
    y = tfjp.denoise(x, tfjp.noise_profile(x))
    pause, inside = slice(0, 14000), slice(17000, 31000)
    assert 20 * np.log10(np.std(x[pause]) / np.std(y[pause])) > 12  # of at most 20, the floor
    before = np.sum((x - clean)[inside] ** 2)
    after = np.sum((y - clean)[inside] ** 2)
    assert 10 * np.log10(before / after) > 8
    assert np.std(y[inside]) == pytest.approx(np.std(clean[inside]), rel=0.03)


def test_no_bin_is_attenuated_below_the_floor() -> None:
    x, huge = noise(7, 1.0), np.full(BINS, 1e9)
    y = tfjp.denoise(x, huge, floor_db=-20)
    assert np.linalg.norm(y - 0.1 * x) <= 4 * np.log2(WINDOW) * EPS * np.linalg.norm(x)


# ---- core


@given(start=st.floats(0.05, 2.0), length=st.floats(0.1, 2.0), seed=st.integers(0, 1000))
def test_core_is_where_the_tone_is(start: float, length: float, seed: int) -> None:
    x = with_tone(1e-3, [(start, start + length)], start + length + 0.8, seed)
    first, end = tfjp.informative_core(x, tfjp.noise_profile(x))
    assert abs(first - start * SAMPLE_RATE) <= WINDOW
    assert abs(end - (start + length) * SAMPLE_RATE) <= WINDOW


def test_core_leaves_a_click_before_the_sound_out_and_keeps_its_pauses() -> None:
    x = with_tone(1e-4, [(2.0, 2.4), (2.7, 3.5)], 5.0)
    x[8000:8020] += 0.3
    first, end = tfjp.informative_core(x, tfjp.noise_profile(x))
    assert abs(first - 2.0 * SAMPLE_RATE) <= WINDOW and abs(end - 3.5 * SAMPLE_RATE) <= WINDOW


def test_core_of_silence_is_all_of_it() -> None:
    assert tfjp.informative_core(np.zeros(5000), np.zeros(BINS)) == (0, 5000)


# ---- alignment


@given(first=st.integers(0, 9000), length=st.integers(1, 9000), behind=st.integers(0, 9000))
def test_align_gives_whole_half_chunks_with_the_span_inside(first: int, length: int, behind: int) -> None:
    x = np.arange(1.0, first + length + behind + 1)
    y, (a, b) = tfjp.align(x, (first, first + length))
    unit = round(HALF_CHUNK_S * SAMPLE_RATE)
    assert len(y) % unit == 0 and len(y) - length < unit + (length == 0)
    assert np.array_equal(y[a:b], x[first : first + length])
    around = y[y > 0]  # what is added is what was there, or zeros beyond the ends
    assert np.array_equal(around, np.arange(around[0], around[-1] + 1))


# ---- joins


@given(lap=st.integers(0, 4000), seed=st.integers(0, 1000))
def test_join_of_a_sound_with_itself_is_that_sound(lap: int, seed: int) -> None:
    x = np.random.default_rng(seed).standard_normal(9000)
    cut = 4500
    y = tfjp.join(x[: cut + lap], x[cut:], lap)
    assert len(y) == len(x)
    assert np.linalg.norm(y - x) <= 8 * np.log2(WINDOW) * EPS * np.linalg.norm(x)


@pytest.mark.parametrize("lap", [1600, 4000, 8000])
def test_join_of_unlike_sounds_keeps_the_power_where_a_cross_fade_dips(lap: int) -> None:
    a, b = noise(8, 2.0), noise(9, 2.0)
    middle = slice(len(a) - lap * 3 // 4, len(a) - lap // 4)
    joined = 10 * np.log10(np.mean(tfjp.join(a, b, lap)[middle] ** 2))
    ramp = (np.arange(lap) + 0.5) / lap
    faded = np.concatenate((a[: len(a) - lap], a[-lap:] * (1 - ramp) + b[:lap] * ramp))
    spread = 10 * np.log10(1 + 3 * np.sqrt(2 / (lap / 2)))  # of a power measured on lap / 2 samples
    assert abs(joined) < spread + 0.5
    assert 10 * np.log10(np.mean(faded[middle] ** 2)) < -2.0 + spread


def test_join_keeps_what_lies_outside_of_the_overlap() -> None:
    a, b = noise(10, 1.0), noise(11, 0.5)
    y = tfjp.join(a, b, 1000)
    assert np.array_equal(y[:15000], a[:15000]) and np.array_equal(y[16000:], b[1000:])


# ---- all


def test_prepare_finds_the_sound_in_its_noise() -> None:
    x = with_tone(1e-3, [(1.0, 1.6)], 4.0)
    done = tfjp.prepare(x)
    first, end = done.core
    assert len(done.pcm) % round(HALF_CHUNK_S * SAMPLE_RATE) == 0
    assert abs((end - first) - 0.6 * SAMPLE_RATE) <= 2 * WINDOW
    loud = np.std(done.pcm[first + WINDOW : end - WINDOW])
    assert loud == pytest.approx(0.3 / np.sqrt(2), rel=0.03)
    assert next(iter(done.steps)) == "as recorded" and done.steps["aligned to half chunks"] is done.pcm


@pytest.mark.parametrize("count", [1, 2, 127, 128, 159, 160, 511, 512, 513, 3199, 3200, 3201])
def test_prepare_of_any_length_is_finite_and_whole(count: int) -> None:
    done = tfjp.prepare(np.random.default_rng(count).standard_normal(count))
    assert np.isfinite(done.pcm).all() and len(done.pcm) % 3200 == 0 and len(done.pcm) >= count
