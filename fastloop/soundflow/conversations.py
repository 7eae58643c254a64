"""Conversations of the released code's online JSONL -> streams -> shards, so that both train alike."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ..audio.files import read as read_audio
from ..audio.pcm import AudioError
from ..config import SAMPLE_RATE
from .clips import DataError, Unreadable
from .compose import Composed, Record, Turn, at_level
from .released import OnlineTurn, read_online
from .render import audible
from .shards import SILENCE, write_shard
from .sounds import GENERATORS
from .synth import samples

FRAME_S = 0.04  # an encoder frame of the released code
LEAD_S = (20 * FRAME_S, 60 * FRAME_S)  # noise before each turn and after the last, as that code draws it
CHUNK_S = 0.4
NOISE_DB = (-60.0, -40.0)
SHARD_STREAMS = 200


def load(path: Path) -> np.ndarray:
    """Any sound file, float32 [S] at 16 kHz mono; Unreadable where it cannot be read."""
    try:
        return np.concatenate(list(read_audio(path)))
    except AudioError as error:
        raise Unreadable(str(error)) from error


def compose_online(turns: Sequence[OnlineTurn], name: str, seed: int, split: str = "train") -> Composed:
    """A conversation as a stream: noise of 0.8 to 2.4 s, a clip, noise, ...; whole chunks of 0.4 s.

    The answer to a clip is due when it has ended. Unreadable where a clip cannot be read.
    """
    rng = np.random.default_rng(seed)
    pieces: list[np.ndarray] = []
    rows: list[Turn] = []
    at = 0
    for turn in turns:
        x = load(turn.audio)
        lead = samples(rng.uniform(*LEAD_S))
        pieces += [np.zeros(lead), x]
        start, end = audible(x)
        begin = (at + lead) / SAMPLE_RATE
        rows.append(
            {
                "user": turn.user or turn.audio.stem,
                "assistant": SILENCE if turn.reply is None else turn.reply.text,
                "emotion": None if turn.reply is None else turn.reply.emotion,
                "scene_type": "conversation",
                "audio_path": turn.audio.name,
                "label": "speech" if turn.user else "clip",
                "start_s": round(begin + start, 4),
                "end_s": round(begin + end, 4),
                "answer_s": None if turn.reply is None else round(begin + end, 4),
            }
        )
        at += lead + len(x)
    chunk = samples(CHUNK_S)
    count = -(-(at + samples(rng.uniform(*LEAD_S))) // chunk) * chunk
    mix = np.concatenate([*pieces, np.zeros(count - at)])
    mix += at_level(GENERATORS["noise"](rng, count / SAMPLE_RATE), rng.uniform(*NOISE_DB))
    mix *= 0.99 / max(0.99, float(np.abs(mix).max()))
    record: Record = {
        "id": name,
        "stream_scene_type": "conversation",
        "num_turns": len(rows),
        "ability": "voice_chat",
        "sub_task": "released_online",
        "split": split,
        "seed": seed,
        "duration_s": count / SAMPLE_RATE,
        "audio_path": f"{name}.flac",
        "turns": rows,
    }
    return Composed((np.round(mix * 32768) / 32768).astype(np.float32), record)


@dataclass
class Imported:
    """Streams written, and conversations left out with the reason."""

    streams: int = 0
    skipped: list[str] = field(default_factory=list)


def import_online(source: Path, out: Path, split: str = "train", seed: int = 0) -> Imported:
    """An online JSONL file as shards `<split>-<file>-<number>.tar` in `out`.

    Conversations with a clip that cannot be read are left out and listed; DataError where a line of the
    file is wrong, or a shard cannot be written. The same file gives the same bytes.
    """
    done = Imported()

    def streams() -> Iterator[Composed]:
        for number, turns in enumerate(read_online(source)):
            try:
                made = compose_online(turns, f"{split}-{source.stem}-{number:07d}", seed + number, split)
            except Unreadable as error:
                done.skipped.append(f"{source}: conversation {number}: {error}")
                continue
            done.streams += 1
            yield made

    rest = streams()
    for shard in itertools.count():
        first = next(rest, None)
        if first is None:
            return done
        try:
            out.mkdir(parents=True, exist_ok=True)
            together = itertools.chain((first,), itertools.islice(rest, SHARD_STREAMS - 1))
            write_shard(out / f"{split}-{source.stem}-{shard:05d}.tar", together)
        except OSError as error:
            raise DataError(f"{out}: shard {shard} could not be written: {error}") from error
    raise AssertionError
