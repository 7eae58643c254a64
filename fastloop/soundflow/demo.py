"""The sound of `fastloop listen --demo`: generated from beginning to end, no recording is in it.

    python -m fastloop.soundflow.demo SOUND.flac [--seed N]

Rain all through; typing; a voice (espeak-ng) that says four digits; a tune; breaking glass; and, at the end,
a smoke alarm. The voice is one that training never heard (a voice of the split `val`).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import soundfile

from ..config import SAMPLE_RATE
from . import voices
from .scenes import audible_rms
from .sounds import GENERATORS
from .synth import Rng, Sound

SECONDS = 30.0
RAIN_DB = -46.0  # level of the bed, root mean square re full scale
VOICE = voices.Voice("en-gb-x-rp+m7", 150, 45)
# (start s, generator of sounds.py or words to say, seconds, dB)
SCRIPT = (
    (2.0, "clicks", 4.0, -36.0),
    (8.0, "say:one", 0.0, -24.0),
    (9.6, "say:six", 0.0, -24.0),
    (11.2, "say:eight", 0.0, -24.0),
    (12.8, "say:four", 0.0, -24.0),
    (15.6, "melody", 3.0, -34.0),
    (20.4, "glass_breaking", 1.2, -20.0),
    (24.4, "smoke_alarm", 4.8, -20.0),
)


def at_level(x: np.ndarray, level_db: float) -> np.ndarray:
    """x with its louder parts at level_db re full scale."""
    return x * (10 ** (level_db / 20) / audible_rms(x))


def demo_sound(seed: int = 0) -> Sound:
    """float32 [S] at 16 kHz, SECONDS long; DataError where espeak-ng is missing."""
    rng = np.random.default_rng(seed)
    mix = at_level(GENERATORS["rain"](rng, SECONDS), RAIN_DB)
    for start_s, what, seconds, level_db in SCRIPT:
        x = at_level(_sound(rng, what, seconds), level_db)
        first = round(start_s * SAMPLE_RATE)
        mix[first : first + len(x)] += x[: len(mix) - first]
    return mix.astype(np.float32)


def _sound(rng: Rng, what: str, seconds: float) -> np.ndarray:
    if what.startswith("say:"):
        return np.asarray(voices.speak(VOICE, what.removeprefix("say:")), dtype=np.float64)
    return GENERATORS[what](rng, seconds).astype(np.float64)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m fastloop.soundflow.demo", description=__doc__)
    parser.add_argument("sound", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    soundfile.write(given.sound, demo_sound(given.seed), SAMPLE_RATE, subtype="PCM_16")


if __name__ == "__main__":
    main()
