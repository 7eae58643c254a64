"""Plan -> stream: the sound, mixed at known levels, and the record of what is heard when.

Times are exact to the sample. A stream is a function of the plan and the library; `stream` is one of
(seed, index, library, ...).
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..config import SAMPLE_RATE
from . import voices
from .abilities import SubTask, sub_task, sub_tasks
from .clips import DataError
from .grounding import Layer, Part, Plan, ground
from .planner import GrammarPlanner, Planner, Rule, shipped_scenarios
from .questions import ask
from .render import Rendered, Unreadable, audible, clip_pcm, heard_part, render
from .scenes import GAP_SAME_S, audible_rms, tilt
from .sequence import Reply
from .shards import SILENCE
from .sounds import GENERATORS, SYNTHETIC, Library, sound_of
from .synth import Rng, samples

QUESTION_ROOM_S = 4.5  # kept free at the end of a stream that ends in a question
TAIL_S = 0.8  # kept free at the end of every stream, for the last answer
ATTEMPTS = 20  # plans drawn for one index before giving up

Turn = dict[str, Any]
Record = dict[str, Any]


@dataclass(frozen=True)
class Composed:
    """pcm float32 [S] at 16 kHz, multiples of 2^-15 (what 16-bit FLAC holds); its record (corpus.py)."""

    pcm: np.ndarray
    record: Record


def _turn(
    plan: Plan,
    label: str,
    user: str,
    source: str,
    start_s: float,
    end_s: float,
    due_s: float,
    reply: Reply | None,
) -> Turn:
    return {
        "user": user,
        "assistant": SILENCE if reply is None else reply.text,
        "emotion": None if reply is None else reply.emotion,
        "scene_type": plan.scene,
        "audio_path": source,
        "label": label,
        "start_s": round(start_s, 4),
        "end_s": round(end_s, 4),
        "answer_s": None if reply is None else round(due_s, 4),
    }


def _at_level(x: np.ndarray, level_db: float) -> np.ndarray:
    rms = audible_rms(x)
    return x * (10 ** (level_db / 20) / rms) if rms > 0 else x


def _looped(rng: Rng, x: np.ndarray, count: int) -> np.ndarray:
    """x from a random place on, repeated with cross-fades of 0.25 s until it is `count` samples long."""
    lap = min(samples(0.25), len(x) // 4)
    if lap == 0:
        return np.resize(x, count)
    ramp = np.sin(0.5 * np.pi * (np.arange(lap) + 0.5) / lap)  # equal power
    body = x[lap:].copy()
    body[-lap:] = body[-lap:] * ramp[::-1] + x[:lap] * ramp
    return np.resize(np.roll(body, -int(rng.integers(len(body)))), count)


def _layer(library: Library, layer: Layer) -> np.ndarray:
    rng = np.random.default_rng(layer.seed)
    count = samples(layer.seconds)
    if layer.source.startswith(SYNTHETIC):
        x = GENERATORS[layer.source.removeprefix(SYNTHETIC)](rng, layer.seconds)[:count]
    else:
        clip = library.clip(layer.source)
        x = heard_part(clip, clip_pcm(library, clip), clip.duration_s)[0]
        x = _looped(rng, x, count) if layer.start_s == 0 else x[:count]
    x = tilt(rng, x) if rng.random() < 0.7 else x.astype(np.float64)
    if layer.start_s > 0:  # it comes and goes
        n = min(len(x) // 4, int(rng.integers(80, 8000)))
        x[:n] *= np.linspace(0, 1, n)
        x[len(x) - n :] *= np.linspace(1, 0, n)
    return _at_level(x, layer.level_db)


def _background(plan: Plan, library: Library) -> tuple[np.ndarray, list[Turn]]:
    mix, turns = np.zeros(samples(plan.seconds)), []
    for layer in plan.layers:
        x = _layer(library, layer)
        first = round(layer.start_s * SAMPLE_RATE)
        x = x[: len(mix) - first]
        mix[first : first + len(x)] += x
        sound = sound_of(layer.label)
        if sound.label != "silence":
            end = first + len(x)
            turns.append(
                _turn(
                    plan,
                    layer.label,
                    sound.words,
                    layer.source,
                    first / SAMPLE_RATE,
                    end / SAMPLE_RATE,
                    0,
                    None,
                )
            )
    return mix, turns


def _reply_now(
    label: str, reply: Reply | None, start_s: float, before: Sequence[Turn], rules: Sequence[Rule]
) -> Reply | None:
    """What calls for an answer given what came before: rules first; the same sound going on needs none."""
    for rule in rules:
        if rule.event == label and any(
            turn["label"] == rule.after and 0 <= start_s - turn["end_s"] <= rule.within_s for turn in before
        ):
            return rule.reply
    again = any(turn["label"] == label and start_s - turn["end_s"] < GAP_SAME_S for turn in before)
    return None if again else reply


def _place(plan: Plan, part: Part, made: Rendered, mix: np.ndarray, first: int, turns: list[Turn]) -> float:
    """Add one rendered event to the mix at sample `first` -> the time at which it ends, s."""
    x = _at_level(made.pcm, part.level_db)[: len(mix) - first]
    mix[first : first + len(x)] += x
    begin, before = first / SAMPLE_RATE, list(turns)
    for span in made.spans:
        start, reply = begin + span.start_s, span.reply
        if sound_of(part.label).family != "digits":
            reply = _reply_now(part.label, reply, start, before, plan.rules)
        end = min(begin + span.end_s, plan.seconds)
        turns.append(_turn(plan, part.label, span.user, span.source, start, end, begin + span.due_s, reply))
    return begin + max(span.end_s for span in made.spans)


def compose(plan: Plan, library: Library) -> Composed:
    """Render and mix a plan. Events that no longer fit the stream are left out.

    DataError where a source is unknown; Unreadable (a DataError) where a clip cannot be read.
    """
    mix, background = _background(plan, library)
    turns: list[Turn] = []
    at, room_end = 0.0, plan.seconds - TAIL_S - (QUESTION_ROOM_S if plan.question else 0.0)
    for part in plan.parts:
        last = turns[-1]["label"] if turns else None
        at += (
            max(part.gap_s, GAP_SAME_S + part.gap_s / 4) if part.label == last and part.reply else part.gap_s
        )
        if room_end - at < 1.0:
            break
        made = render(library, part, room_end - at)
        if at + max(span.end_s for span in made.spans) > room_end + 0.5:
            continue
        at = _place(plan, part, made, mix, round(at * SAMPLE_RATE), turns)
    if plan.question:
        _ask(plan, library, mix, turns, at)
    return _finish(plan, mix, background, turns)


def _ask(plan: Plan, library: Library, mix: np.ndarray, turns: list[Turn], at: float) -> None:
    """A voice asks about what was heard; the answer is due when it has ended."""
    rng = np.random.default_rng([plan.seed, 1])
    question = ask(rng, turns, {layer.label for layer in plan.layers})
    voice = voices.draw(rng, library.split)
    x = np.asarray(voices.speak(voice, question.text), dtype=np.float64)
    latest = plan.seconds - TAIL_S - len(x) / SAMPLE_RATE
    first = round(min(latest, max(at + 1.0, latest - rng.uniform(0, 1.5))) * SAMPLE_RATE)
    loud = max(
        [part.level_db for part in plan.parts] + [layer.level_db + 8 for layer in plan.layers] + [-45.0]
    )
    x = _at_level(x, min(loud, -12.0))
    mix[first : first + len(x)] += x
    start, end = audible(x)
    begin = first / SAMPLE_RATE
    turns.append(
        _turn(
            plan,
            "question",
            question.text,
            str(voice),
            begin + start,
            begin + end,
            begin + end,
            question.answer,
        )
    )


def _finish(plan: Plan, mix: np.ndarray, background: list[Turn], turns: list[Turn]) -> Composed:
    if plan.narrow:
        spectrum = np.fft.rfft(mix)
        freq = np.fft.rfftfreq(len(mix), 1 / SAMPLE_RATE)
        mix = np.fft.irfft(spectrum / np.sqrt(1 + (freq / 3600) ** 24), len(mix))
    peak = float(np.abs(mix).max(initial=0.0))
    mix *= 0.99 / peak if peak > 0.99 else 1.0
    pcm = (np.round(mix * 32768) / 32768).astype(np.float32)
    ordered = sorted([*background, *turns], key=lambda turn: (turn["start_s"], turn["end_s"]))
    record = {
        "id": plan.id,
        "stream_scene_type": plan.scene,
        "num_turns": len(ordered),
        "ability": plan.ability,
        "sub_task": plan.sub_task,
        "split": plan.split,
        "seed": plan.seed,
        "duration_s": len(pcm) / SAMPLE_RATE,
        "audio_path": f"{plan.id}.flac",
        "turns": ordered,
    }
    return Composed(pcm, record)


# ---- streams by number


@dataclass(frozen=True)
class Mix:
    """What streams are drawn from: sub-tasks with weights, and a planner."""

    tasks: tuple[SubTask, ...]
    planner: Planner

    def draw(self, rng: Rng) -> SubTask:
        weights = np.array([task.weight for task in self.tasks])
        if not weights.sum() > 0:
            weights = np.ones(len(self.tasks))
        return self.tasks[int(rng.choice(len(self.tasks), p=weights / weights.sum()))]


def default_mix(library: Library, names: Sequence[str] = (), exclude: Sequence[str] = ()) -> Mix:
    """The shipped scenarios, with the sub-tasks named (none: all that have a weight); `exclude`: labels."""
    tasks = tuple(sub_task(n) for n in names) or tuple(t for t in sub_tasks().values() if t.weight > 0)
    return Mix(tasks, GrammarPlanner(shipped_scenarios(), library, frozenset(exclude)))


def stream(
    seed: int, index: int, library: Library, mix: Mix | None = None, seconds: float | None = None
) -> Composed:
    """Stream `index` of the endless collection `seed`: the same arguments and clips give the same bytes.

    seconds: length of the stream; None: drawn. Where a clip cannot be read, another plan is drawn and the
    clip is named in library.cache.unreadable.
    """
    mix = mix or default_mix(library)
    for attempt in range(ATTEMPTS):
        rng = np.random.default_rng([seed, zlib.crc32(library.split.encode()), index, attempt])
        task = mix.draw(rng)
        outline = mix.planner.outline(rng, task, seconds)
        plan = ground(rng, outline, task, library, f"{library.split}-{seed}-{index:07d}")
        try:
            return compose(plan, library)
        except Unreadable:
            continue
    lost = "; ".join(list(library.cache.unreadable.values())[:3])
    raise DataError(f"stream {index} of seed {seed}: {ATTEMPTS} plans in a row failed, such as: {lost}")
