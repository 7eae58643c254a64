"""Speech: text -> sound, by espeak-ng and, where it is installed, in the recorded speakers' voices of Flite.

The voices of `val` are never heard in `train`; Flite (Black and Lenzo, "Flite: a small fast run-time
synthesis engine", 2001) speaks in `train` alone.
"""

from __future__ import annotations

import functools
import io
import math
import shutil
import signal
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import soxr

from ..config import SAMPLE_RATE
from .clips import DataError
from .synth import Rng, Sound

ESPEAK, FLITE = "espeak-ng", "flite"
ENGLISH = {
    "train": ("en-us", "en-us", "en-gb", "en-us-nyc", "en-029", "en-gb-scotland", "en-gb-x-gbcwmd"),
    "val": ("en-gb-x-rp", "en-gb-x-gbclan"),
}
# All that espeak-ng 1.51 has but whispers, robots, croaks and those of `val`.
TRAIN_VARIANTS = """
m1 m2 m3 m4 m5 m8 f1 f2 f3 Alex Alicia Andrea Andy Annie Denis Diogo Gene Henrique Hugo Jacky Lee Marco Mario
Michael Mike adam anika antonio aunty belinda benjamin boris caleb david ed edward grandma grandpa gustave
iven john linda marcelo max michel miguel norbert pablo paul pedro quincy rob robert sandro shelby steph
travis victor zac
"""
VARIANTS = {"train": tuple(TRAIN_VARIANTS.split()), "val": ("m6", "m7", "f4", "f5")}
FLITE_VOICES = ("kal16", "awb", "rms", "slt")
FLITE_SHARE = 0.35  # of what is said in English in `train`, where Flite is installed
RATES = {"train": (105, 235), "val": (120, 190)}  # words per minute
PITCHES = {"train": (10, 90), "val": (25, 75)}
MISSING = (
    "espeak-ng is not installed, and synthetic speech is made with it: install it (apt-get install espeak-ng)"
)


@dataclass(frozen=True)
class Voice:
    """A voice of an engine; rate in words per minute, pitch 0..99."""

    name: str
    rate: int
    pitch: int
    engine: str = ESPEAK

    def __str__(self) -> str:
        return f"{self.engine}/{self.name}/{self.rate}/{self.pitch}"


def is_voice(source: str) -> bool:
    """Whether a source names a voice, not a clip."""
    return source.startswith((f"{ESPEAK}/", f"{FLITE}/"))


def parse_voice(name: str) -> Voice:
    """The inverse of str(voice)."""
    parts = name.split("/")
    if len(parts) != 4 or not is_voice(name) or not (parts[2].isdigit() and parts[3].isdigit()):
        raise DataError(f"{name!r} is no voice; one looks like espeak-ng/en-us+m1/160/50")
    return Voice(parts[1], int(parts[2]), int(parts[3]), parts[0])


def available(engine: str = ESPEAK) -> bool:
    return shutil.which(engine) is not None


@functools.cache
def version() -> str:
    """What the engines that are there say of themselves: the same versions speak the same bytes."""
    said = []
    for engine in (ESPEAK, FLITE):
        if available(engine):
            done = subprocess.run(
                [engine, "--version"], capture_output=True, text=True, timeout=60, check=False
            )
            said.append(done.stdout.partition("Data at")[0].strip())
    return "\n".join(said)


def draw(rng: Rng, split: str, language: str = "en") -> Voice:
    """A random voice of the split; any split but `train` has the voices of `val`."""
    kind = "train" if split == "train" else "val"
    engine = ESPEAK
    if kind == "train" and language == "en" and available(FLITE) and rng.random() < FLITE_SHARE:
        engine, name = FLITE, str(rng.choice(FLITE_VOICES))
    else:
        accent = rng.choice(ENGLISH[kind]) if language == "en" else language
        name = f"{accent}+{rng.choice(VARIANTS[kind])}"
    return Voice(name, int(rng.integers(*RATES[kind])), int(rng.integers(*PITCHES[kind])), engine)


@functools.cache
def _languages() -> frozenset[str]:
    """What espeak-ng can speak: asked for anything else, it takes its default voice without a word."""
    done = subprocess.run([ESPEAK, "--voices"], capture_output=True, text=True, timeout=60, check=False)
    if done.returncode != 0:
        raise DataError(f"{ESPEAK} --voices failed: {_why(done.returncode, done.stderr)}")
    return frozenset(line.split()[1] for line in done.stdout.splitlines()[1:] if len(line.split()) > 1)


@functools.lru_cache(maxsize=256)
def speak(voice: Voice, text: str) -> Sound:
    """float32 [S] at 16 kHz without the silence around it, not to be written to; DataError where the
    engine is missing or fails.
    """
    if not available(voice.engine):
        missing = f"{voice.engine} is not installed (apt-get install {voice.engine})"
        raise DataError(MISSING if voice.engine == ESPEAK else missing)
    raw, rate = (_espeak if voice.engine == ESPEAK else _flite)(voice, text)
    pcm = soxr.resample(raw, rate, SAMPLE_RATE)
    heard = np.flatnonzero(np.abs(pcm) > 0.01 * np.abs(pcm).max(initial=0.0))
    if len(heard) == 0:
        raise DataError(f"{voice.engine} says nothing for {text!r}")
    pcm = np.ascontiguousarray(pcm[heard[0] : heard[-1] + 1], dtype=np.float32)
    pcm.setflags(write=False)
    return pcm


def _espeak(voice: Voice, text: str) -> tuple[np.ndarray, int]:
    """Sound and its rate."""
    language = voice.name.partition("+")[0]
    if not any(name == language or name.startswith(f"{language}-") for name in _languages()):
        raise DataError(f"espeak-ng has no voice {voice.name!r}; `espeak-ng --voices` lists its languages")
    settings = ["-v", voice.name, "-s", str(voice.rate), "-p", str(voice.pitch)]
    wav = _said([ESPEAK, *settings, "--stdout", "--stdin"], voice, text).stdout
    if not wav:
        raise DataError(f"espeak-ng with voice {voice.name!r} gave no sound for {text!r}")
    return soundfile.read(io.BytesIO(_sized(wav)), dtype="float32")


def _flite(voice: Voice, text: str) -> tuple[np.ndarray, int]:
    """Sound and its rate; pitch 0..99 is 75 to 240 Hz in the mean."""
    if voice.name not in FLITE_VOICES:
        raise DataError(f"flite has no voice {voice.name!r}; choose from {', '.join(FLITE_VOICES)}")
    hertz = 75 * math.exp(voice.pitch / 99 * math.log(240 / 75))
    settings = [
        "--setf",
        f"int_f0_target_mean={hertz:.1f}",
        "--setf",
        f"duration_stretch={160 / voice.rate:.3f}",
    ]
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "said.wav"
        _said([FLITE, "-voice", voice.name, *settings, "-t", text, "-o", str(out)], voice, text)
        return soundfile.read(out, dtype="float32")


def _said(command: list[str], voice: Voice, text: str) -> subprocess.CompletedProcess[bytes]:
    done = subprocess.run(command, input=text.encode(), capture_output=True, timeout=60, check=False)
    if done.returncode != 0:
        why = _why(done.returncode, done.stderr.decode(errors="replace"))
        raise DataError(f"{voice.engine} with voice {voice.name!r} failed: {why}")
    return done


def _why(code: int, stderr: str) -> str:
    """What a failed engine said, or what ended it: one that a signal ends says nothing."""
    ended = f"exit status {code}" if code > 0 else signal.strsignal(-code) or f"signal {-code}"
    return f"{ended}: {stderr.strip()}" if stderr.strip() else ended


def _sized(wav: bytes) -> bytes:
    """espeak-ng writes to a pipe and cannot say how long it will be: put the true sizes into the header."""
    at = wav.index(b"data")
    size = (len(wav) - 8).to_bytes(4, "little"), (len(wav) - at - 8).to_bytes(4, "little")
    return wav[:4] + size[0] + wav[8 : at + 4] + size[1] + wav[at + 8 :]
