"""Small shards of streams for tests, written by what the contract says and by no code that reads them."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import soundfile

from ..config import SAMPLE_RATE, ModelConfig
from ..soundflow.shards import SILENCE
from ..soundflow.stage import read_stage
from ..text import Tokenizer
from .cases import random_sound


def record(name: str = "a", seconds: float = 4.0, **changes: Any) -> dict[str, Any]:
    """A stream with a siren to answer in its second second, and rain all through."""
    turns = [
        {"user": "rain", "assistant": SILENCE, "emotion": None, "scene_type": "street", "audio_path": "x",
         "label": "rain", "start_s": 0.0, "end_s": seconds, "answer_s": None},
        {"user": "a siren", "assistant": "A siren!", "emotion": "urgent", "scene_type": "street",
         "audio_path": "y", "label": "siren", "start_s": 1.0, "end_s": 2.0, "answer_s": 1.5},
    ]  # fmt: skip
    values = {
        "id": name, "stream_scene_type": "street", "num_turns": 2, "ability": "proactive_response",
        "sub_task": "sound_alert", "split": "train", "seed": 1, "duration_s": seconds,
        "audio_path": f"{name}.flac", "turns": turns,
    }  # fmt: skip
    return values | changes


def write_shard(path: Path, samples: list[tuple[dict[str, Any], bytes]]) -> Path:
    """A tar by hand: what the contract says, and nothing of the code that is tested."""
    with tarfile.open(path, "w") as tar:
        for values, sound in samples:
            for ending, data in (("flac", sound), ("json", json.dumps(values).encode())):
                info = tarfile.TarInfo(f"{values['id']}.{ending}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return path


def flac(seconds: float, seed: int = 0, rate: int = SAMPLE_RATE) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, 0.3 * random_sound(seconds, seed), rate, format="FLAC")
    return buffer.getvalue()


def two_streams(directory: Path, split: str = "train", seconds: float = 5.3) -> Path:
    """A shard of two streams, of 4 and of `seconds`."""
    directory.mkdir(parents=True, exist_ok=True)
    lengths = {"a": 4.0, "b": seconds}
    samples = [
        (record(name, length, split=split), flac(length, seed))
        for seed, (name, length) in enumerate(lengths.items())
    ]
    return write_shard(directory / f"{split}-0.tar", samples)


def nano() -> tuple[ModelConfig, Tokenizer]:
    """The packaged model's dims, and a tokenizer for a few replies."""
    model = read_stage("nano").model
    assert model is not None
    return model.build(["An alarm is sounding!", "A siren!", "Yes.", "0 1 2 3 4 5 6 7 8 9"])
