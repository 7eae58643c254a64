"""Plan -> stream: the sound, mixed at known levels, and the record of what is heard when.

Times are exact to the sample. A stream is a function of the plan and the library's clips.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..config import SAMPLE_RATE
from . import voices
from .grammar import Rule
from .grounding import Layer, Part, Plan
from .questions import ask
from .render import SETTLE_S, WEAKEST, Rendered, Span, audible, clip_sound, render
from .scenes import GAP_SAME_S, audible_rms, tilt
from .sequence import Reply
from .shards import QUESTION, SILENCE
from .sounds import GENERATORS, SYNTHETIC, Library, sound_of
from .synth import Rng, samples
from .tfjp import HALF_CHUNK_S, join

QUESTION_ROOM_S = 4.5  # kept free at the end of a stream that ends in a question
ASKED_BETWEEN = 0.6  # chance of a question after an event in the middle of such a stream
TAIL_S = 0.8  # kept free at the end of every stream, for the last answer
LOOP_LAP_S = 0.25  # over which a bed joins its own beginning
TELEPHONE_HZ = 3600.0

Turn = dict[str, Any]
Record = dict[str, Any]


@dataclass(frozen=True)
class Composed:
    """pcm float32 [S] at 16 kHz, multiples of 2^-15 (what 16-bit FLAC holds); its record (shards.py)."""

    pcm: np.ndarray
    record: Record


def compose(plan: Plan, library: Library) -> Composed:
    """Render and mix a plan; events that no longer fit the stream are left out.

    DataError where a source is unknown; Unreadable (a DataError) where a clip cannot be read.
    """
    mix, background = _background(plan, library)
    turns: list[Turn] = []
    at, room_end = 0.0, plan.seconds - TAIL_S - (QUESTION_ROOM_S if plan.question else 0.0)
    asks = np.random.default_rng([plan.seed, 1])
    for part in plan.parts:
        begin = at + _gap(part, turns)
        if plan.tfjp and not part.generated:
            begin = math.ceil(begin / HALF_CHUNK_S - 1e-9) * HALF_CHUNK_S
        if room_end - begin < 1.0:
            break
        made = render(library, part, room_end - begin, plan.tfjp)
        if begin + made.end_s <= room_end + 0.5:
            at = _place(plan, part, made, mix, begin, turns)
            if plan.question and at + QUESTION_ROOM_S < room_end and asks.random() < ASKED_BETWEEN:
                at = _ask(asks, plan, library, mix, turns, at + asks.uniform(1.0, 2.5))
    if plan.question:
        _ask(asks, plan, library, mix, turns, at + 1.0, last=True)
    return _finish(plan, mix, background, turns)


# ---- what goes on


def _looped(rng: Rng, x: np.ndarray, count: int, tfjp: bool) -> np.ndarray:
    """x from a random place on, repeated without a seam until it is `count` samples long."""
    lap = min(samples(LOOP_LAP_S), len(x) // 4)
    if lap == 0:
        return np.resize(x, count)
    if tfjp:
        lapped = join(x, x, lap)[len(x) - lap : len(x)]
    else:
        ramp = (np.arange(lap) + 0.5) / lap
        lapped = x[-lap:] * (1 - ramp) + x[:lap] * ramp
    period = np.concatenate((x[lap : len(x) - lap], lapped))
    return np.resize(np.roll(period, -int(rng.integers(len(period)))), count)


def _layer(library: Library, layer: Layer, tfjp: bool) -> np.ndarray:
    rng = np.random.default_rng(layer.seed)
    count, whole = samples(layer.seconds), layer.start_s == 0
    if layer.source.startswith(SYNTHETIC):
        x = GENERATORS[layer.source.removeprefix(SYNTHETIC)](rng, layer.seconds)[:count]
    else:  # a bed keeps its own noise: it is one
        x = clip_sound(library, library.clip(layer.source), tfjp and not whole)
        x = _looped(rng, x, count, tfjp) if whole else x[:count]
    x = tilt(rng, x) if rng.random() < 0.7 else x.astype(np.float64)
    if not whole:  # it comes and goes
        n = min(len(x) // 4, int(rng.integers(80, 8000)))
        x[:n] *= np.linspace(0, 1, n)
        x[len(x) - n :] *= np.linspace(1, 0, n)
    return at_level(x, layer.level_db)


def _background(plan: Plan, library: Library) -> tuple[np.ndarray, list[Turn]]:
    mix, turns = np.zeros(samples(plan.seconds)), []
    for layer in plan.layers:
        x = _layer(library, layer, plan.tfjp)
        first = round(layer.start_s * SAMPLE_RATE)
        x = x[: len(mix) - first]
        mix[first : first + len(x)] += x
        if layer.label != "silence":
            begin, end = first / SAMPLE_RATE, (first + len(x)) / SAMPLE_RATE
            span = Span(sound_of(layer.label).words, layer.source, 0.0, end - begin, None, 0.0)
            turns.append(_turn(plan, layer.label, span, begin, None))
    return mix, turns


# ---- what happens


def at_level(x: np.ndarray, level_db: float) -> np.ndarray:
    """x with this RMS, dB full scale, over its audible blocks; silence stays silence."""
    rms = audible_rms(x)
    return x * (10 ** (level_db / 20) / rms) if rms > 0 else x


def _gap(part: Part, turns: Sequence[Turn]) -> float:
    """The planned pause, or more where the same sound would only seem to go on."""
    same = bool(turns) and turns[-1]["label"] == part.label and not part.text
    if same and part.reply is not None:
        return max(part.gap_s, GAP_SAME_S + part.gap_s / 4)
    return part.gap_s


def _reply_now(
    part: Part, reply: Reply | None, start_s: float, before: Sequence[Turn], rules: Sequence[Rule]
) -> Reply | None:
    """What calls for an answer given what came before: rules first; the same sound going on needs none."""
    if part.own:
        return reply
    for rule in rules:
        since = [start_s - turn["end_s"] for turn in before if turn["label"] == rule.after]
        if rule.event == part.label and any(0 <= s <= rule.within_s for s in since):
            return rule.reply
    again = any(turn["label"] == part.label and start_s - turn["end_s"] < GAP_SAME_S for turn in before)
    return None if again else reply


def _turn(plan: Plan, label: str, span: Span, begin_s: float, reply: Reply | None) -> Turn:
    """A span of something that begins at begin_s of the stream."""
    return {
        "user": span.user,
        "assistant": SILENCE if reply is None else reply.text,
        "emotion": None if reply is None else reply.emotion,
        "scene_type": plan.scene,
        "audio_path": span.source,
        "label": label,
        "start_s": round(begin_s + span.start_s, 4),
        "end_s": round(min(begin_s + span.end_s, plan.seconds), 4),
        "answer_s": None if reply is None else round(begin_s + span.due_s, 4),
    }


def _place(
    plan: Plan, part: Part, made: Rendered, mix: np.ndarray, begin_s: float, turns: list[Turn]
) -> float:
    """Add one rendered event to the mix -> the time at which it ends, s."""
    first, before = round(begin_s * SAMPLE_RATE), list(turns)
    x = at_level(made.pcm, part.level_db)[: len(mix) - first]
    heard = slice(samples(made.spans[0].start_s) - 1, samples(made.end_s))
    levels = _levels(x[heard], mix[first : first + len(x)][heard])
    mix[first : first + len(x)] += x
    begin_s = first / SAMPLE_RATE
    for span in made.spans:
        reply = span.reply
        if sound_of(part.label).family != "digits":
            reply = _reply_now(part, reply, begin_s + span.start_s, before, plan.rules)
        turns.append(_turn(plan, part.label, span, begin_s, reply) | levels)
    return begin_s + made.end_s


def _levels(event: np.ndarray, rest: np.ndarray) -> dict[str, float]:
    """Level of an event in dB full scale, and over all else while it is heard (at most 99 dB)."""
    loud, other = (float(np.mean(np.square(x))) if len(x) else 0.0 for x in (event, rest))
    level = 10 * math.log10(loud + 1e-12)
    return {
        "level_db": round(level, 1),
        "snr_db": round(min(99.0, level - 10 * math.log10(other + 1e-12)), 1),
    }


def _ask(
    rng: Rng,
    plan: Plan,
    library: Library,
    mix: np.ndarray,
    turns: list[Turn],
    at: float,
    last: bool = False,
) -> float:
    """A voice asks about what was heard so far; the answer is due when it has ended -> that time, s.

    It begins `at`; the last one as late as the stream allows, if that is later.
    """
    question = ask(rng, [turn["label"] for turn in turns], {layer.label for layer in plan.layers})
    voice = voices.draw(rng, library.split)
    x = np.asarray(voices.speak(voice, question.text), dtype=np.float64)
    latest = plan.seconds - TAIL_S - len(x) / SAMPLE_RATE
    begin = min(latest, max(at, latest - rng.uniform(0, 1.5)) if last else at)
    levels = [part.level_db for part in plan.parts] + [layer.level_db + 8 for layer in plan.layers]
    start, end = audible(x, WEAKEST)
    span = Span(question.text, str(voice), start, end, question.answer, end + SETTLE_S)
    part = Part(
        QUESTION, (str(voice),), 0, 0.0, min(max([*levels, -45.0]), -12.0), 0.0, question.answer, own=True
    )
    return _place(plan, part, Rendered(x, (span,)), mix, begin, turns)


def _finish(plan: Plan, mix: np.ndarray, background: list[Turn], turns: list[Turn]) -> Composed:
    if plan.narrow:
        shape = 1 / np.sqrt(1 + (np.fft.rfftfreq(len(mix), 1 / SAMPLE_RATE) / TELEPHONE_HZ) ** 24)
        mix = np.fft.irfft(np.fft.rfft(mix) * shape, len(mix))
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
