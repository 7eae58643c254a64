"""Sound files: every container, damaged in every way; what they hold is delivered, what is wrong is said."""

from __future__ import annotations

import os
import re
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import soxr
from hypothesis import given
from hypothesis import strategies as st

from fastloop.audio import AudioError, open_audio, read, write_wav

CONTAINERS: dict[str, dict[str, Any]] = {
    "wav": {"format": "WAV", "subtype": "PCM_16"},
    "flac": {"format": "FLAC", "subtype": "PCM_16"},
    "vorbis": {"format": "OGG", "subtype": "VORBIS"},
    "opus": {"format": "OGG", "subtype": "OPUS"},
    "mp3": {"format": "MP3", "subtype": "MPEG_LAYER_III"},
}


def sound(seconds: float, rate: int, channels: int) -> np.ndarray:
    """float32 [S, channels]: tones over noise, so that no codec can shorten it to nothing."""
    time = np.arange(round(seconds * rate)) / rate
    rng = np.random.default_rng(rate + channels)
    tones = np.stack([0.3 * np.sin(2 * np.pi * (300 + 200 * c) * time) for c in range(channels)], axis=1)
    return (tones + 0.05 * rng.standard_normal(tones.shape)).astype(np.float32)


def make(path: Path, container: str, seconds: float = 3.0, rate: int = 48_000, channels: int = 2) -> Path:
    soundfile.write(path, sound(seconds, rate, channels), rate, **CONTAINERS[container])
    return path


def decoded(path: Path) -> np.ndarray:
    """The oracle: libsndfile at once, the mean of the channels, soxr at once."""
    with soundfile.SoundFile(
        path
    ) as file:  # soundfile.read would seek first: mp3 then differs in its last bit
        pcm, rate = file.read(dtype="float32", always_2d=True), file.samplerate
    return soxr.resample(pcm.mean(1, dtype=np.float32), rate, 16_000)


def until_it_breaks(path: Path, **options: Any) -> tuple[np.ndarray, str]:
    """All blocks, and the message of the error that follows them."""
    blocks = [np.empty(0, dtype=np.float32)]
    with open_audio(path, **options) as file, pytest.raises(AudioError) as caught:
        blocks.extend(file)
    return np.concatenate(blocks), str(caught.value)


# ---- whole files -------------------------------------------------------------------------------------


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize(("rate", "channels"), [(48_000, 2), (16_000, 1), (8_000, 2)])
def test_blocks_equal_decoding_at_once(tmp_path: Path, container: str, rate: int, channels: int) -> None:
    path = make(tmp_path / "sound", container, 3.0, rate, channels)
    with open_audio(path) as file:
        blocks = list(file)
        assert (file.format, file.codec) == tuple(CONTAINERS[container].values())
        assert file.channels == channels and file.seconds == pytest.approx(3.0) == file.position_s
    assert max(len(block) for block in blocks) <= 16_000 and len(blocks) > 3
    assert all(block.dtype == np.float32 and block.ndim == 1 for block in blocks)
    assert np.array_equal(np.concatenate(blocks), decoded(path))


@pytest.mark.parametrize("codec", ["PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE", "ALAW", "ULAW"])
@pytest.mark.parametrize("container", ["WAV", "WAVEX", "RF64"])
def test_every_wav_codec(tmp_path: Path, codec: str, container: str) -> None:
    path = tmp_path / "sound.wav"
    soundfile.write(path, sound(0.3, 44_100, 3), 44_100, codec, format=container)
    assert np.array_equal(np.concatenate(list(read(path))), decoded(path))


def test_a_wav_with_more_chunks_and_one_from_a_pipe(tmp_path: Path) -> None:
    path = make(tmp_path / "a.wav", "wav", 0.5)
    data = path.read_bytes()
    expected = decoded(path)
    at = data.index(b"data")
    more = data[:at] + b"LIST" + struct.pack("<I", 5) + b"INFOx\0" + data[at:] + b"id3 \4\0\0\0abcd"
    path.write_bytes(more)
    assert np.array_equal(np.concatenate(list(read(path))), expected)
    for size in (0xFFFFFFFF, 0x7FFFF000, 0x80000000):
        path.write_bytes(data[: at + 4] + struct.pack("<I", size) + data[at + 8 :])
        with open_audio(path) as file:
            assert file.seconds is None
            assert np.array_equal(np.concatenate(list(file)), expected)


def test_an_mp3_behind_a_tag(tmp_path: Path) -> None:
    path = make(tmp_path / "a.mp3", "mp3")
    expected = decoded(path)
    path.write_bytes(b"ID3\4\0\0" + bytes([0, 0, 1, 2]) + bytes(130) + path.read_bytes())
    assert np.array_equal(np.concatenate(list(read(path))), expected)


def test_the_content_counts_not_the_name(tmp_path: Path) -> None:
    path = make(tmp_path / "song.vox", "flac", 0.5)  # by its name libsndfile would guess raw ADPCM
    assert len(np.concatenate(list(read(path)))) == 8_000


def test_write_wav_and_read_again(tmp_path: Path) -> None:
    pcm = sound(0.5, 16_000, 1)[:, 0]
    write_wav(tmp_path / "a.wav", pcm)
    back = np.concatenate(list(read(tmp_path / "a.wav")))
    assert np.abs(back - pcm).max() <= 1 / 32768  # one step of 16 bits
    loud = np.array([3.0, -3.0], dtype=np.float32)
    write_wav(tmp_path / "a.wav", loud)
    assert np.concatenate(list(read(tmp_path / "a.wav"))).tolist() == [32767 / 32768, -1.0]


def test_a_file_is_read_once(tmp_path: Path) -> None:
    with open_audio(make(tmp_path / "a.wav", "wav")) as file:
        assert list(file)
        with pytest.raises(AudioError, match="open it again"):
            iter(file)


# ---- damaged files -----------------------------------------------------------------------------------


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("keep", [0.95, 0.5])
def test_a_cut_file_gives_what_it_holds_and_then_the_second(
    tmp_path: Path, container: str, keep: float
) -> None:
    path = make(tmp_path / "sound", container)
    whole, data = decoded(path), path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])
    got, message = until_it_breaks(path)
    said = re.search(r"breaks off at (\d+\.\d\d) s of 3.00 s|breaks off at (\d+\.\d\d) s", message)
    assert said and abs(float(said[1] or said[2]) - len(got) / 16_000) < 0.01 and "delivered" in message
    # Compressed sound is not spread evenly over the bytes; a codec frame or page at the cut is lost.
    assert (keep - 0.2) * len(whole) < len(got) < (keep + 0.1) * len(whole)
    settled = len(got) - 2_000  # the last codec frame overlaps with one that is gone
    assert np.array_equal(got[:settled], whole[:settled])


def test_a_cut_wav_loses_no_sample(tmp_path: Path) -> None:
    path = make(tmp_path / "a.wav", "wav", 2.0, 16_000, 2)
    whole, data = decoded(path), path.read_bytes()
    path.write_bytes(data[:-1001])  # 250 frames of 4 bytes, and one byte more
    got, message = until_it_breaks(path)
    assert np.array_equal(got, whole[:-251])
    assert "1.98 s of 2.00 s" in message and "128000 bytes of sound, 126999 are there" in message


def test_a_cut_flac_loses_no_whole_frame(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The decoder fails inside a read whose first part is good; its frames are 4,096 samples each."""
    monkeypatch.setattr("fastloop.audio.files.PIECE_FRAMES", 1000)
    path = make(tmp_path / "a.flac", "flac", 3.0, 16_000, 1)
    whole, data = decoded(path), path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    got, _ = until_it_breaks(path)
    assert len(got) >= 4096 and len(got) % 4096 == 0 and np.array_equal(got, whole[: len(got)])


@pytest.mark.parametrize("container", ["flac", "vorbis", "opus", "mp3"])
def test_a_hole_in_the_middle_is_reported(tmp_path: Path, container: str) -> None:
    path = make(tmp_path / "sound", container)
    data, middle = path.read_bytes(), os.path.getsize(path) // 2
    path.write_bytes(data[:middle] + bytes(6000) + data[middle + 6000 :])
    got, message = until_it_breaks(path)
    assert "breaks off at" in message and len(got) > 16_000


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("length", [1, 4, 11, 12, 20, 40])
def test_a_stump_of_a_file_is_refused(tmp_path: Path, container: str, length: int) -> None:
    path = make(tmp_path / "sound", container, 0.5)
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(AudioError, match=r"sound: (is|begins|breaks)"), open_audio(path) as file:
        list(file)


@pytest.mark.parametrize("container", CONTAINERS)
@given(data=st.data())
def test_damage_anywhere_ends_in_sound_or_an_audio_error(
    tmp_path_factory: pytest.TempPathFactory, container: str, data: st.DataObject
) -> None:
    path = make(tmp_path_factory.mktemp("damage") / "sound", container, 0.2, 16_000, 1)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.one_of(st.integers(0, 63), st.integers(0, len(content) - 1)))
        content[at] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(len(content) // 2, len(content)))])
    try:
        for block in read(path):
            assert np.isfinite(block).all() and len(block) <= 16_000
    except AudioError as error:
        assert str(path) in str(error)


# ---- what is no sound file ---------------------------------------------------------------------------


def test_what_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(AudioError, match=r"gone\.wav: no such file"):
        open_audio(tmp_path / "gone.wav")
    with pytest.raises(AudioError, match="is a directory"):
        open_audio(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(AudioError, match=r"not a regular file.*standard input"):
        open_audio(tmp_path / "pipe")
    with pytest.raises(AudioError, match=r"cannot be opened.*null"):
        open_audio("a\0b")


def test_what_is_no_sound(tmp_path: Path) -> None:
    path = tmp_path / "sound.wav"
    path.touch()
    with pytest.raises(AudioError, match=r"sound\.wav: is empty \(0 bytes\)"):
        open_audio(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a", "b")
    with pytest.raises(AudioError, match=r"a zip archive, whatever its name says.*ffmpeg"):
        open_audio(path)
    path.write_text("hello, world")
    with pytest.raises(AudioError, match="begins with b'hello, w'"):
        open_audio(path)
    for container, what in (("AIFF", "an AIFF file"), ("AU", "an AU file"), ("W64", "begins with b'riff")):
        soundfile.write(path, sound(0.1, 16_000, 1), 16_000, "PCM_16", format=container)
        with pytest.raises(AudioError, match=what):
            open_audio(path)


@pytest.mark.parametrize("codec", ["IMA_ADPCM", "MS_ADPCM", "GSM610"])
def test_risky_codecs_never_reach_the_decoder(
    tmp_path: Path, codec: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "sound.wav"
    soundfile.write(path, sound(0.5, 16_000, 1), 16_000, codec, format="WAV")
    tagged = tmp_path / "tagged.wav"  # libsndfile skips a tag and looks again
    tagged.write_bytes(b"ID3\4\0\0\0\0\0\0" + path.read_bytes())
    monkeypatch.setattr(soundfile, "SoundFile", None)
    with pytest.raises(AudioError, match=r"(IMA ADPCM|Microsoft ADPCM|GSM 6.10) .*not read.*ffmpeg"):
        open_audio(path)
    with pytest.raises(AudioError, match="no wav, flac, ogg or mp3"):
        open_audio(tagged)


def wav(fmt: bytes, data: bytes = bytes(3200), before: bytes = b"", size: int | None = None) -> bytes:
    """A WAV file with this `fmt ` body, whatever it says."""
    declared = len(data) if size is None else size
    body = b"WAVE" + before + b"fmt " + struct.pack("<I", len(fmt)) + fmt
    return b"RIFF\0\0\0\0" + body + b"data" + struct.pack("<I", declared) + data


def fmt(tag: int = 1, channels: int = 1, rate: int = 16_000, align: int = 2, bits: int = 16) -> bytes:
    return struct.pack("<HHIIHH", tag, channels, rate, rate * align % 2**32, align, bits)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (wav(fmt(channels=0, align=0)), "has 0 channels"),
        (wav(fmt(channels=9, align=18)), "has 9 channels"),
        (wav(fmt(rate=0)), "0 Hz is outside"),
        (wav(fmt(rate=4_000_000_000)), "4000000000 Hz is outside"),
        (wav(fmt(bits=12)), "format 0x0001 of 12 bits"),
        (wav(fmt(tag=0xFFFE)), "format 0xfffe"),
        (wav(fmt(align=4)), "make 2 bytes, its format says 4"),
        (wav(b"\1\0"), "its format has 2 bytes"),
        (wav(fmt(), data=b""), "holds no sound"),
        (wav(fmt(), size=0), "promises 0 bytes of sound and 3200 follow"),
        (wav(fmt(), before=b"fmt \x10\0\0\0" + fmt()), "a second format"),
        (wav(fmt(), before=b"junk\xff\xff\xff\0"), "no valid chunk at byte 12"),
        (wav(fmt(), before=b"\0\1\2\3\0\0\0\0"), "no valid chunk at byte 12"),
        (wav(fmt(), before=b"junk\0\0\0\0" * 1001), "more than 1000 chunks"),
        (b"RIFF\0\0\0\0WAVEdata\4\0\0\0abcd", "come before its format"),
        (b"RIFF\0\0\0\0WAVE", "ends in its header"),
    ],
)
def test_a_wav_header_that_does_not_fit_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "sound.wav"
    path.write_bytes(content)
    with pytest.raises(AudioError, match=rf"sound\.wav: .*{message}"):
        open_audio(path)


@pytest.mark.parametrize(
    ("bad", "message"), [(np.nan, "nan"), (np.inf, "inf"), (3000.0, "divide them by 32768")]
)
def test_a_bad_sample_in_a_float_file_ends_it_there(tmp_path: Path, bad: float, message: str) -> None:
    path = tmp_path / "sound.wav"
    pcm = sound(2.0, 16_000, 1)
    pcm[20_000] = bad
    soundfile.write(path, pcm, 16_000, "FLOAT")
    got, said = until_it_breaks(path)
    assert np.array_equal(got, pcm[:20_000, 0])
    assert "breaks off at 1.25 s of 2.00 s" in said and message in said


# ---- bounds ------------------------------------------------------------------------------------------


def test_a_long_file_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(AudioError, match=r"holds 3 s of sound, the limit is 2 s.*max_seconds"):
        open_audio(make(tmp_path / "a.flac", "flac"), max_seconds=2)
    with pytest.raises(ValueError, match="max_seconds"):
        open_audio(tmp_path / "a.flac", max_seconds=float("nan"))


def test_a_file_that_hides_its_length_is_stopped_at_the_limit(tmp_path: Path) -> None:
    path = make(tmp_path / "a.wav", "wav")
    whole, data = decoded(path), path.read_bytes()
    at = data.index(b"data")
    path.write_bytes(data[: at + 4] + b"\xff\xff\xff\xff" + data[at + 8 :])
    got, message = until_it_breaks(path, max_seconds=2.0)
    assert len(got) == 32_000 and "breaks off at 2.00 s: holds more sound than the limit of 2 s" in message
    assert np.array_equal(got[:-200], whole[: 32_000 - 200])  # where it was cut the filter rings


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    """A block stands for what is held: none is longer than a second, however long the file is."""
    silence = np.zeros(600 * 8_000, dtype=np.int16)
    soundfile.write(tmp_path / "a.flac", silence, 8_000)
    lengths = [len(block) for block in read(tmp_path / "a.flac")]
    assert sum(lengths) == 600 * 16_000 and max(lengths) <= 16_000
