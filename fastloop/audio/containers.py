"""What a file really is, by its bytes and never by its name, checked before a decoder sees it.

libsndfile reads some thirty formats, and its decoders of rare ones have been broken by crafted files more
than once, some while the file is opened (CVE-2026-37555: IMA ADPCM in WAV). So only four containers pass
here, a WAV header is parsed here, strictly, and libsndfile is then given the bare samples.
"""

from __future__ import annotations

import io
import os
import struct
from dataclasses import dataclass
from typing import BinaryIO

from .pcm import MAX_CHANNELS, AudioError
from .resample import check_rate

CONVERT = "convert it first, for example with `ffmpeg -i FILE out.flac`"

_FOREIGN = (  # (offset, magic, what it is): for messages that help
    (0, b"PK\x03\x04", "a zip archive"),
    (0, b"\x1f\x8b", "a gzip archive"),
    (0, b"%PDF", "a PDF document"),
    (0, b"FORM", "an AIFF file"),
    (0, b".snd", "an AU file"),
    (0, b"RIFX", "a big-endian WAV file"),
    (0, b"\x1aE\xdf\xa3", "a Matroska or WebM file"),
    (4, b"ftyp", "an MP4 or M4A file"),
)
_WAV_CODECS = {
    (1, 8): "PCM_U8",
    (1, 16): "PCM_16",
    (1, 24): "PCM_24",
    (1, 32): "PCM_32",
    (3, 32): "FLOAT",
    (3, 64): "DOUBLE",
    (6, 8): "ALAW",
    (7, 8): "ULAW",
}
_WAV_REFUSED = {2: "Microsoft ADPCM", 0x11: "IMA ADPCM", 0x31: "GSM 6.10", 0x55: "MP3", 0x161: "WMA"}
_EXTENSIBLE = 0xFFFE
_GUID_TAIL = bytes.fromhex("000000001000800000aa00389b71")
_UNKNOWN_SIZE = (
    0x7FFFF000  # from here on: what programs write that stream into a pipe and do not know the length
)
_MAX_CHUNKS = 1000
_OGG_PAGE_BYTES = 65_307  # the longest page there is


@dataclass(frozen=True)
class WavLayout:
    """Where the samples of a WAV file are, and what they are. `problem` says how the file is cut short."""

    sample_rate: int
    channels: int
    codec: str  # libsndfile's name of the subtype
    start: int  # byte
    frames: int  # that are there
    declared: int | None  # that the header promises; None where it does not know
    frame_bytes: int
    problem: str | None


def identify(file: BinaryIO, path: str) -> str:
    """ "WAV", "FLAC", "OGG" or "MP3"; AudioError for anything else."""
    offset = 0
    while True:
        file.seek(offset)
        head = file.read(16)
        if not head and not offset:
            raise AudioError(f"{path}: is empty (0 bytes); nothing was recorded, or the copy failed")
        if head[:3] != b"ID3" or len(head) < 10:
            break
        size = 0
        for byte in head[6:10]:
            size = size << 7 | byte & 0x7F
        offset += 10 + size
    if head[:4] in (b"RIFF", b"RF64") and head[8:12] == b"WAVE" and not offset:
        return "WAV"
    if head[:4] == b"fLaC":
        return "FLAC"
    if head[:4] == b"OggS" and not offset:
        return "OGG"
    # An MPEG audio frame: 11 set bits, a version and a layer that exist.
    if len(head) > 2 and head[0] == 0xFF and head[1] & 0xE0 == 0xE0 and head[1] & 0x18 != 8 and head[1] & 6:
        return "MP3"
    kind = next((what for at, magic, what in _FOREIGN if head[at : at + len(magic)] == magic), None)
    found = f"is {kind}" if kind else f"begins with {head[:8]!r}"
    raise AudioError(
        f"{path}: is no wav, flac, ogg or mp3 file: it {found}, whatever its name says; {CONVERT}"
    )


def wav_layout(file: BinaryIO, path: str) -> WavLayout:
    """Walk the chunks of a RIFF or RF64 file up to its samples. AudioError where one does not fit."""
    total = file.seek(0, os.SEEK_END)
    file.seek(12)
    header: tuple[int, int, str, int] | None = None
    size64: int | None = None
    for _ in range(_MAX_CHUNKS):
        raw = file.read(8)
        if len(raw) < 8:
            raise AudioError(f"{path}: is truncated: ends in its header, at byte {total}, before any sound")
        name, size = struct.unpack("<4sI", raw)
        at = file.tell()
        if name == b"data":
            if header is None:
                raise AudioError(
                    f"{path}: is corrupt: its samples (byte {at}) come before its format; {CONVERT}"
                )
            if size == 0xFFFFFFFF and size64 is not None:
                size = size64
            return _layout(header, at, size, total - at, path)
        if not all(32 <= byte < 127 for byte in name) or at + size > total:
            raise AudioError(f"{path}: is corrupt or truncated: no valid chunk at byte {at - 8} of {total}")
        body = file.read(size) if name in (b"fmt ", b"ds64") and size <= 4096 else b""
        if name == b"fmt ":
            if header is not None:
                raise AudioError(f"{path}: is corrupt: a second format at byte {at}; {CONVERT}")
            header = _wav_format(body, path)
        elif name == b"ds64" and len(body) >= 16:
            size64 = struct.unpack("<Q", body[8:16])[0]
        file.seek(at + size + size % 2)
    raise AudioError(f"{path}: is corrupt: more than {_MAX_CHUNKS} chunks before its samples; {CONVERT}")


def _wav_format(body: bytes, path: str) -> tuple[int, int, str, int]:
    """The `fmt ` chunk -> (rate, channels, codec, bytes of a frame)."""
    if len(body) < 16:
        raise AudioError(f"{path}: is corrupt: its format has {len(body)} bytes, at least 16 are needed")
    tag, channels, rate, _, align, bits = struct.unpack("<HHIIHH", body[:16])
    if tag == _EXTENSIBLE and len(body) >= 40 and body[26:40] == _GUID_TAIL:
        tag = struct.unpack("<H", body[24:26])[0]
    codec = _WAV_CODECS.get((tag, bits))
    if codec is None:
        name = _WAV_REFUSED.get(tag, f"format {tag:#06x}")
        raise AudioError(
            f"{path}: its samples are {name} of {bits} bits, which is not read (accepted are PCM of 8 to 32 "
            f"bits, float, A-law, u-law); {CONVERT}"
        )
    check_shape(rate, channels, path)
    if align != channels * bits // 8:
        raise AudioError(
            f"{path}: is corrupt: {channels} channels of {bits} bits make {channels * bits // 8} bytes, its "
            f"format says {align}"
        )
    return rate, channels, codec, align


def _layout(header: tuple[int, int, str, int], start: int, size: int, there: int, path: str) -> WavLayout:
    rate, channels, codec, align = header
    if size == 0 and there:
        raise AudioError(
            f"{path}: its header promises 0 bytes of sound and {there} follow: the program that wrote it did "
            f"not finish; {CONVERT}"
        )
    problem: str | None = None
    declared: int | None = size // align
    if size > there and size >= _UNKNOWN_SIZE:
        size, declared = there, None
    if size > there:
        problem = f"its header promises {size} bytes of sound, {there} are there"
    elif size % align:
        problem = f"{size} bytes of sound are no whole number of {align}-byte frames"
    return WavLayout(rate, channels, codec, start, min(size, there) // align, declared, align, problem)


def check_shape(rate: int, channels: int, path: str) -> None:
    """AudioError where a header promises no channels, too many, or a rate that is none."""
    if not 1 <= channels <= MAX_CHANNELS:
        raise AudioError(f"{path}: has {channels} channels; 1 to {MAX_CHANNELS} are read; {CONVERT}")
    try:
        check_rate(rate)
    except ValueError as error:
        raise AudioError(f"{path}: {error}; {CONVERT}") from None


def ogg_problem(file: BinaryIO) -> str | None:
    """How an Ogg file is cut short: its last page must be whole and carry the end-of-stream mark."""
    total = file.seek(0, os.SEEK_END)
    file.seek(max(0, total - _OGG_PAGE_BYTES))
    tail = file.read()
    at = tail.rfind(b"OggS")
    page = tail[at:] if at >= 0 else b""
    if len(page) < 27 or len(page) < 27 + page[26] + sum(page[27 : 27 + page[26]]):
        return "its last page is cut"
    return None if page[5] & 4 else "its last page has no end-of-stream mark"


class Window(io.RawIOBase):
    """The bytes [start, start + size) of a file as a file of their own."""

    def __init__(self, file: BinaryIO, start: int, size: int) -> None:
        self._file, self._start, self._size, self._at = file, start, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        self._at = max(0, base + offset)
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        self._file.seek(self._start + self._at)
        data = self._file.read(max(0, min(len(buffer), self._size - self._at)))
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)
