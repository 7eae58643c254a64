"""Raw PCM from a pipe, and the microphone behind a stand-in for its library."""

from __future__ import annotations

import io
import os
import sys
import types
from typing import Any

import numpy as np
import pytest
import soxr
from hypothesis import given
from hypothesis import strategies as st

from fastloop.audio import AudioError, Microphone, read_pcm_stream


class Dribble(io.RawIOBase):
    """A pipe that gives its bytes in pieces of the given sizes, over and over."""

    def __init__(self, data: bytes, sizes: list[int]) -> None:
        self.data, self.sizes, self.turn = data, sizes, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        size = min(len(buffer), self.sizes[self.turn % len(self.sizes)])
        self.turn += 1
        piece, self.data = self.data[:size], self.data[size:]
        buffer[: len(piece)] = piece
        return len(piece)


def heard(blocks: Any) -> tuple[np.ndarray, str]:
    """All blocks, and the message of the AudioError behind them, if there is one."""
    got = [np.empty(0, dtype=np.float32)]
    try:
        got.extend(blocks)
    except AudioError as error:
        return np.concatenate(got), str(error)
    return np.concatenate(got), ""


@given(
    sizes=st.lists(st.integers(1, 3_000), min_size=1, max_size=6),
    sample_format=st.sampled_from(["s16le", "f32le"]),
    channels=st.integers(1, 3),
    rate=st.sampled_from([16_000, 24_000]),
)
def test_any_dribble_of_bytes_is_the_same_sound(
    sizes: list[int], sample_format: str, channels: int, rate: int
) -> None:
    rng = np.random.default_rng(len(sizes))
    pcm = rng.integers(-32768, 32768, (2_000, channels)).astype("<i2")
    data = pcm if sample_format == "s16le" else (pcm / 32768).astype("<f4")
    got, said = heard(read_pcm_stream(Dribble(data.tobytes(), [*sizes, 500]), rate, sample_format, channels))
    mono = data.astype(np.float32).mean(1, dtype=np.float32) / np.float32(32768 if data.dtype == "<i2" else 1)
    assert said == "" and np.array_equal(got, soxr.resample(mono, rate, 16_000))


def test_sound_comes_out_before_the_stream_ends() -> None:
    source, sink = os.pipe()
    with os.fdopen(source, "rb") as file, os.fdopen(sink, "wb", buffering=0) as out:
        blocks = read_pcm_stream(file, 16_000)
        for value in (1, 2, 3):
            out.write(np.full(100, value, dtype="<i2").tobytes())
            assert np.array_equal(next(blocks), np.full(100, value / 32768, dtype=np.float32))


@pytest.mark.parametrize(
    ("sample_format", "channels", "frame"), [("s16le", 1, 2), ("s16le", 2, 4), ("f32le", 2, 8)]
)
def test_an_end_inside_a_sample_is_said_after_the_whole_ones(
    sample_format: str, channels: int, frame: int
) -> None:
    for extra in range(1, frame):
        got, said = heard(
            read_pcm_stream(io.BytesIO(bytes(8_000 * frame + extra)), 16_000, sample_format, channels)
        )
        assert len(got) == 8_000
        assert (
            f"at 0.50 s: it ends inside a sample, {extra} of {frame} bytes" in said and sample_format in said
        )


@pytest.mark.parametrize("bad", [np.nan, -np.inf, 1e30])
def test_bytes_that_are_no_floats_end_the_stream_there(bad: float) -> None:
    pcm = np.zeros(16_000, dtype="<f4")
    pcm[4_000] = bad
    got, said = heard(read_pcm_stream(io.BytesIO(pcm.tobytes()), 16_000, "f32le"))
    assert len(got) == 4_000 and "at 0.25 s: the next sample" in said and "really f32le" in said


def test_no_bytes_and_a_non_blocking_stream() -> None:
    assert "no sound came" in heard(read_pcm_stream(io.BytesIO(), 16_000))[1]
    source, sink = os.pipe()
    os.set_blocking(source, False)
    with os.fdopen(source, "rb", buffering=0) as file, os.fdopen(sink, "wb"):
        assert "non-blocking" in heard(read_pcm_stream(file, 16_000))[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0,), "sample rate: 0 Hz"),
        ((16_000, "mp3"), "sample format: 'mp3' is unknown"),
        ((16_000, "s16le", 0), "channels: must be an int from 1 to 8, got 0"),
        ((16_000, "s16le", True), "channels"),
        ((16_000, "s16le", 9), "channels"),
    ],
)
def test_what_does_not_exist_is_refused_before_reading(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_pcm_stream(io.BytesIO(), *arguments)


# ---- microphone --------------------------------------------------------------------------------------


class FakeSounddevice(types.ModuleType):
    """Just the part of sounddevice that Microphone calls; `feed` plays the device."""

    class PortAudioError(Exception):
        pass

    def __init__(self, rates: tuple[int, ...]) -> None:
        super().__init__("sounddevice")
        self.rates, self.stream = rates, None

    def query_devices(self, device: Any, kind: str) -> dict[str, Any]:
        if device == "none":
            raise ValueError("no input device matching 'none'")
        return {"default_samplerate": float(self.rates[0])}

    def check_input_settings(self, samplerate: int, **_: Any) -> None:
        if samplerate not in self.rates:
            raise self.PortAudioError("Invalid sample rate")

    def InputStream(self, **options: Any) -> Any:
        self.check_input_settings(options["samplerate"])
        self.options = options
        self.stream = types.SimpleNamespace(active=False, closed=False)
        self.stream.start = lambda: setattr(self.stream, "active", True)
        self.stream.close = lambda: setattr(self.stream, "closed", True)
        return self.stream

    def feed(self, block: np.ndarray, overflow: bool = False) -> None:
        data = block.astype(np.float32)[:, None]
        self.options["callback"](data, len(data), None, types.SimpleNamespace(input_overflow=overflow))
        data[:] = np.nan  # the device reuses its buffer


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> FakeSounddevice:
    fake = FakeSounddevice((48_000, 16_000))
    monkeypatch.setitem(sys.modules, "sounddevice", fake)
    return fake


def test_the_microphone_prefers_16_khz(device: FakeSounddevice) -> None:
    with Microphone() as microphone:
        blocks = iter(microphone)
        for value in (0.1, 0.2):
            device.feed(np.full(320, value))
            assert np.array_equal(next(blocks), np.full(320, value, dtype=np.float32))
        assert device.options["blocksize"] == 320 and microphone.overruns == 0
    assert device.stream.closed


def test_another_rate_is_resampled_without_seams(device: FakeSounddevice) -> None:
    device.rates = (48_000,)
    sound = np.random.default_rng(0).uniform(-1, 1, 48_000).astype(np.float32)
    got: list[np.ndarray] = []
    with Microphone() as microphone:
        assert microphone.sample_rate == 48_000
        for at in range(0, len(sound), 960):
            device.feed(sound[at : at + 960])
        blocks = iter(microphone)
        while sum(map(len, got)) < 15_000:
            got.append(next(blocks))
    heard_so_far = np.concatenate(got)
    assert np.array_equal(heard_so_far, soxr.resample(sound, 48_000, 16_000)[: len(heard_so_far)])


def test_sound_lost_to_a_slow_reader_is_counted(
    device: FakeSounddevice, caplog: pytest.LogCaptureFixture
) -> None:
    with Microphone() as microphone:
        for _ in range(503):  # 10 s of 20 ms wait at most
            device.feed(np.zeros(320))
        assert microphone.overruns == 3 and microphone.lost_s == pytest.approx(0.06)
        device.feed(np.zeros(320), overflow=True)
        assert microphone.overruns == 5  # the device's word, and the queue is full
    assert "0.06 s lost so far" in caplog.text and "the device reports lost sound" in caplog.text


def test_a_device_that_is_missing_or_goes_away(device: FakeSounddevice) -> None:
    with pytest.raises(AudioError, match=r"'none'.*lists the devices"):
        Microphone(device="none")
    with pytest.raises(AudioError, match="cannot be opened at 44100 Hz"), Microphone(44_100):
        pass
    with pytest.raises(ValueError, match="sample rate"):
        Microphone(0)
    with pytest.raises(AudioError, match="in a `with` block"):
        iter(Microphone()).__next__()
    with Microphone() as microphone, pytest.raises(AudioError, match="unplugged"):
        device.stream.active = False
        next(iter(microphone))


def test_without_the_library_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sounddevice", None)
    with pytest.raises(AudioError, match=r"pip install fastloop\[mic\]"):
        Microphone()
