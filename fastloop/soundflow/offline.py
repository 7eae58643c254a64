"""Clips of a benchmark through the real engine, many sessions side by side -> answers, kept as they come.

Mode offline: the clip is taken at once, what is asked about it is a text behind it (DESIGN: the offline
protocol). Mode streaming: the clip is heard chunk by chunk with a little silence before and after it, what is
asked stands in the system prompt, and all that is said counts; where the question is spoken behind the
clip, what is said from its beginning on. An instruction that is heard follows its clip after a pause.

The answers file has a line for each clip, `id`, `prompt`, `reference`, `response` (what VoiceBench's own
judge reads), written as they come (kept.py): a run that was cut off goes on behind its last whole line.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..audio import AudioError
from ..checkpoint import Model
from ..config import SAMPLE_RATE, ConfigError
from ..engine import Engine
from ..options import EngineConfig, SessionConfig
from . import voices
from .benchmark_files import BenchmarkError, samples
from .benchmarks import Item
from .clips import DataError
from .hear import Answer, Hearing, Told, converse
from .kept import kept, read_lines, run_of
from .proactive import GRACE_S, LEAD_S

MODES = ("offline", "streaming")
PAUSE_S = 0.6  # between a clip and the question that is spoken about it


@dataclass(frozen=True)
class How:
    """hearing: sessions, threshold, window and prompt; instruction: for items that bring none; spoken: who
    speaks the instructions that are heard, for the record.
    """

    mode: str = "offline"
    hearing: Hearing = field(default_factory=lambda: Hearing(most_tokens=256))
    instruction: str | None = None
    spoken: str | None = None

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ConfigError(f"mode: choose from {', '.join(MODES)}, got {self.mode!r}")


@dataclass(frozen=True)
class Played:
    """What is played of an item: samples, float32 [S] at 16 kHz; answers count after from_s."""

    pcm: np.ndarray
    from_s: float


def play(item: Item, mode: str) -> Played:
    """An item as sound. AudioError or DataError where it cannot be had."""
    parts, from_s = [samples(item.sound)], 0.0
    if mode == "streaming":
        parts.insert(0, _silence(LEAD_S))
    if item.spoken is not None:
        parts.append(_silence(PAUSE_S))
        from_s = sum(map(len, parts)) / SAMPLE_RATE
        parts.append(samples(item.spoken) if isinstance(item.spoken, Path) else _speak(item.id, item.spoken))
    if mode == "streaming":
        parts.append(_silence(GRACE_S))
    return Played(np.concatenate(parts), from_s)


def _silence(seconds: float) -> np.ndarray:
    return np.zeros(round(seconds * SAMPLE_RATE), dtype=np.float32)


def _speak(name: str, text: str) -> np.ndarray:
    """By a voice that the item's id draws; not kept: thousands of them would fill the memory."""
    voice = voices.draw(np.random.default_rng(zlib.crc32(name.encode())), "val")
    return voices.speak.__wrapped__(voice, text)


def session(model: Model, item: Item, how: How, seconds: float) -> SessionConfig:
    """The options of the session that hears an item of that length."""
    asked = how.instruction if item.instruction is None else item.instruction
    if item.spoken is not None:
        asked = None
    if how.mode == "offline":
        return SessionConfig(
            mode="offline",
            system_prompt=how.hearing.system_prompt,
            user_text=asked,
            max_queued_s=seconds + 1.0,
            max_events=1 << 20,
            max_response_tokens=how.hearing.most_tokens,
        )
    prompt = how.hearing.system_prompt
    if asked is not None:
        base = model.config.system_prompt if prompt is None else prompt
        prompt = f"{base} {asked}".strip()
    return replace(how.hearing, system_prompt=prompt).session(seconds)


def answer(
    model: Model,
    items: Sequence[Item],
    how: How,
    file: Path,
    skipped: Callable[[str], None],
    progress: Callable[[int], None] = lambda done: None,
) -> dict[str, str]:
    """id -> what the model said, "" for nothing; those that `file` has are not asked again.

    `skipped` is told of each clip that cannot be read, and why; such clips are tried again next time.
    `progress` is told how many items are done. BenchmarkError where the file is not what `answer` wrote or
    belongs to another run; FastloopError where a session failed.
    """
    with kept(file, described(model, how)) as add:
        lines = read_answers(file)
        _same_set(file, items, lines)
        found = {name: str(line["response"]) for name, line in lines.items()}
        todo = [item for item in items if item.id not in found]
        if any(isinstance(item.spoken, str) for item in todo) and not voices.available():
            raise BenchmarkError(voices.MISSING)
        done = len(items) - len(todo)
        progress(done)
        played_from: dict[int, float] = {}

        def told() -> Iterator[Told]:
            nonlocal done
            for index, item in enumerate(todo):
                try:
                    played = play(item, how.mode)
                except (AudioError, DataError, OSError) as error:
                    skipped(f"{item.id}: {error}")
                    done += 1
                    continue
                played_from[index] = played.from_s
                yield Told(index, played.pcm, session(model, item, how, len(played.pcm) / SAMPLE_RATE))

        if not todo:
            return {item.id: found[item.id] for item in items}
        with Engine(model, EngineConfig(max_sessions=min(how.hearing.sessions, len(items)))) as engine:
            for index, said in converse(engine, told()):
                item = todo[index]
                found[item.id] = reply(said, played_from.pop(index) if how.mode == "streaming" else 0.0)
                add(_line(item, found[item.id]))
                done += 1
                progress(done)
    return {item.id: found[item.id] for item in items if item.id in found}


def reply(said: Sequence[Answer], from_s: float) -> str:
    """All that was said after a time; an offline answer has the time of its clip's end."""
    return " ".join(a.text for a in said if a.t_s > from_s and a.text)


def _line(item: Item, response: str) -> dict[str, Any]:
    reference = {"reference": "; ".join(item.references)} if item.references else {}
    return {"id": item.id, "prompt": item.prompt, **reference, "response": response}


def read_answers(file: Path) -> dict[str, dict[str, Any]]:
    """id -> line. A last line that was cut off is dropped, from the file too."""
    return {values["id"]: values for _, values in read_lines(file, ("id", "response"))}


def _same_set(file: Path, items: Sequence[Item], lines: Mapping[str, Mapping[str, Any]]) -> None:
    """Sets come in versions that share their ids."""
    for item in items:
        asked = lines.get(item.id, {}).get("prompt", item.prompt)
        if asked != item.prompt:
            raise BenchmarkError(
                f"{file}: of another set: {item.id!r} was {asked!r}, is {item.prompt!r}; name another "
                "--out, or remove that file"
            )


def described(model: Model, how: How) -> dict[str, Any]:
    """What the answers depend on; sessions side by side do not change them."""
    idle = () if how.mode == "streaming" else ("threshold", "window_s")
    own = {"mode": how.mode, "instruction": how.instruction, "spoken": how.spoken}
    return run_of(model, how.hearing, idle) | own
