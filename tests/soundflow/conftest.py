"""A small manifest of made-up clips, in the layout of a real one."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Iterator
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


class Endpoint:
    """A server on this machine that answers from a list and keeps what it was asked."""

    def __init__(self) -> None:
        self.answers: list[str] = []
        self.asked: list[dict[str, object]] = []
        self.keys: list[str | None] = []
        self.status = 200
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                outer.asked.append({"path": self.path, **json.loads(body)})
                outer.keys.append(self.headers.get("Authorization"))
                text = outer.answers.pop(0) if outer.answers else ""
                reply = (
                    json.dumps({"choices": [{"message": {"content": text}}]}) if text != "garbage" else "?"
                )
                self.send_response(outer.status)
                self.end_headers()
                self.wfile.write(reply.encode())

            def log_message(self, *arguments: object) -> None:
                pass

        self.server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    made = Endpoint()
    yield made
    made.close()
