"""Speech by espeak-ng: text -> sound, in many voices; the voices of `val` are never heard in `train`."""

from __future__ import annotations

import functools
import io
import shutil
import subprocess
from dataclasses import dataclass

import numpy as np
import soundfile
import soxr

from ..config import SAMPLE_RATE
from .clips import DataError
from .synth import Rng, Sound

ENGLISH = {"train": ("en-us", "en-gb", "en-029", "en-gb-scotland"), "val": ("en-gb-x-rp", "en-gb-x-gbclan")}
VARIANTS = {"train": ("m1", "m2", "m3", "m4", "m5", "f1", "f2", "f3"), "val": ("m6", "m7", "f4", "f5")}
MISSING = (
    "espeak-ng is not installed, and synthetic speech is made with it: install it (apt-get install espeak-ng)"
)


@dataclass(frozen=True)
class Voice:
    """An espeak-ng voice; rate in words per minute, pitch 0..99."""

    name: str
    rate: int
    pitch: int

    def __str__(self) -> str:
        return f"espeak-ng/{self.name}/{self.rate}/{self.pitch}"


def parse_voice(name: str) -> Voice:
    """The inverse of str(voice)."""
    parts = name.split("/")
    if len(parts) != 4 or parts[0] != "espeak-ng" or not (parts[2].isdigit() and parts[3].isdigit()):
        raise DataError(f"{name!r} is no voice; one looks like espeak-ng/en-us+m1/160/50")
    return Voice(parts[1], int(parts[2]), int(parts[3]))


def available() -> bool:
    return shutil.which("espeak-ng") is not None


@functools.cache
def version() -> str:
    """What espeak-ng says of itself, or "" where it is missing: the same version speaks the same bytes."""
    if not available():
        return ""
    done = subprocess.run(["espeak-ng", "--version"], capture_output=True, text=True, timeout=60, check=False)
    return done.stdout.partition("Data at")[0].strip()


def draw(rng: Rng, split: str, language: str = "en") -> Voice:
    """A random voice of the split; any split but `train` has the voices of `val`."""
    kind = "train" if split == "train" else "val"
    accent = rng.choice(ENGLISH[kind]) if language == "en" else language
    name = f"{accent}+{rng.choice(VARIANTS[kind])}"
    return Voice(name, int(rng.integers(120, 190)), int(rng.integers(25, 75)))


@functools.cache
def _languages() -> frozenset[str]:
    """What espeak-ng can speak: asked for anything else, it takes its default voice without a word."""
    done = subprocess.run(["espeak-ng", "--voices"], capture_output=True, text=True, timeout=60, check=False)
    return frozenset(line.split()[1] for line in done.stdout.splitlines()[1:] if len(line.split()) > 1)


@functools.lru_cache(maxsize=4096)
def speak(voice: Voice, text: str) -> Sound:
    """float32 [S] at 16 kHz without the silence around it, not to be written to; DataError where
    espeak-ng is missing or fails.
    """
    if not available():
        raise DataError(MISSING)
    language = voice.name.partition("+")[0]
    if not any(name == language or name.startswith(f"{language}-") for name in _languages()):
        raise DataError(f"espeak-ng has no voice {voice.name!r}; `espeak-ng --voices` lists its languages")
    command = [
        "espeak-ng",
        "-v",
        voice.name,
        "-s",
        str(voice.rate),
        "-p",
        str(voice.pitch),
        "--stdout",
        "--stdin",
    ]
    done = subprocess.run(command, input=text.encode(), capture_output=True, timeout=60, check=False)
    if done.returncode != 0 or not done.stdout:
        why = done.stderr.decode(errors="replace").strip()
        raise DataError(f"espeak-ng with voice {voice.name!r} failed ({done.returncode}): {why}")
    raw, rate = soundfile.read(io.BytesIO(_sized(done.stdout)), dtype="float32")
    pcm = soxr.resample(raw, rate, SAMPLE_RATE)
    heard = np.flatnonzero(np.abs(pcm) > 0.01 * np.abs(pcm).max(initial=0.0))
    if len(heard) == 0:
        raise DataError(f"espeak-ng says nothing for {text!r}")
    pcm = np.ascontiguousarray(pcm[heard[0] : heard[-1] + 1], dtype=np.float32)
    pcm.setflags(write=False)
    return pcm


def _sized(wav: bytes) -> bytes:
    """espeak-ng writes to a pipe and cannot say how long it will be: put the true sizes into the header."""
    at = wav.index(b"data")
    size = (len(wav) - 8).to_bytes(4, "little"), (len(wav) - at - 8).to_bytes(4, "little")
    return wav[:4] + size[0] + wav[8 : at + 4] + size[1] + wav[at + 8 :]
