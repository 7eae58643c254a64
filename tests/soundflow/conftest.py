"""A small manifest of made-up clips, in the layout of a real one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from fastloop.config import SAMPLE_RATE
from fastloop.soundflow import ambience, synth
from fastloop.soundflow.sounds import Library

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def burst(rng: np.random.Generator, seconds: float) -> np.ndarray:
    """A voiced-like sound with sharp ends."""
    return ambience.babble(rng, seconds)


class Folder:
    """Clips and the lines of their manifest."""

    def __init__(self, path: Path) -> None:
        self.path, self.rows = path, []

    def add(self, name: str, label: str, pcm: np.ndarray, split: str = "train", **fields: Any) -> None:
        soundfile.write(self.path / f"{name}.flac", pcm, SAMPLE_RATE, format="FLAC", subtype="PCM_16")
        row = {"id": name, "path": f"{name}.flac", "split": split, "label": label, "licence": "CC0-1.0"}
        row |= {"source": "made up", "duration_s": len(pcm) / SAMPLE_RATE, **fields}
        self.rows.append(row)

    def write(self) -> Path:
        file = self.path / "manifest.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in self.rows), encoding="utf-8")
        return file


def framed(sound: np.ndarray, before_s: float, after_s: float, floor: float, seed: int) -> np.ndarray:
    """The sound within quiet noise."""
    before, after = round(before_s * SAMPLE_RATE), round(after_s * SAMPLE_RATE)
    x = np.concatenate((np.zeros(before), 0.5 * sound, np.zeros(after)))
    return x + floor * np.random.default_rng(seed).standard_normal(len(x))


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    made = Folder(tmp_path_factory.mktemp("clips"))
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for digit, word in enumerate(DIGITS):
            pcm = 0.5 * burst(rng, 0.4)
            made.add(f"{split}-d{digit}", "spoken_digit", pcm, split, text=word, speaker=f"{split}-a")
        words = [["four", 0.2, 0.5], ["two", 0.5, 0.8]]
        made.add(f"{split}-s", "speech_digits", 0.5 * burst(rng, 1.0), split, text="four two", words=words)
        words = [["enter", 0.1, 0.4], ["six", 0.4, 0.7]]
        made.add(f"{split}-m", "speech_command", 0.5 * burst(rng, 1.0), split, text="enter six", words=words)
        made.add(f"{split}-t", "speech_spelling", 0.5 * burst(rng, 1.5), split, text="h i n")
        made.add(f"{split}-rain", "rain", 0.3 * ambience.rain(rng, 3.0), split, expected="silent")
        for label in ("dog", "coughing", "crying_baby"):
            sound = burst(rng, 0.8)
            made.add(f"{split}-{label}", label, framed(sound, 0.7, 0.9, 1e-3, 1), split, active=[[0.7, 1.5]])
        made.add(f"{split}-siren", "siren", 0.5 * synth.siren(rng, 3.0), split)
    made.write()
    return made


@pytest.fixture(scope="session")
def manifest(folder: Folder) -> Path:
    return folder.path / "manifest.jsonl"


@pytest.fixture(scope="session")
def library(manifest: Path) -> Library:
    return Library.open(manifest, "train")
