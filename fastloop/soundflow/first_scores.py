"""Scores of streams whose truth is known: what was answered, when, and what was answered for nothing.

Streams run through the engine, many sessions at once, greedy text, decisions by argmax. An event counts
as answered by the first answer that comes at most WITHIN_S after its onset; every other answer is a false
trigger. Times are stream times: an answer has the time of its chunk's end.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ..checkpoint import Model
from ..config import SAMPLE_RATE
from ..engine import Engine
from ..events import ResponseEnd, ResponseStart
from ..options import EngineConfig, SessionConfig
from .scenes import Event
from .sequence import Reply
from .synth import Sound

WITHIN_S = 2.0
SESSIONS = 8  # streams that run side by side


@dataclass(frozen=True)
class Answer:
    """One response at stream time t_s."""

    t_s: float
    reply: Reply


@dataclass(frozen=True)
class Outcome:
    """One stream: (event, its answer or None) for each event, answers that belong to none, its length."""

    answered: list[tuple[Event, Answer | None]]
    false: list[Answer]
    seconds: float


def listen(model: Model, sounds: Sequence[Sound], window_s: float | None = 60.0) -> list[list[Answer]]:
    """Each sound (float32 [S] at 16 kHz, padded with zeros to a whole chunk) as a stream -> its answers."""
    found: list[list[Answer]] = []
    for first in range(0, len(sounds), SESSIONS):
        found += _listen_together(model, sounds[first : first + SESSIONS], window_s)
    return found


def _listen_together(model: Model, sounds: Sequence[Sound], window_s: float | None) -> list[list[Answer]]:
    longest_s = max(len(sound) for sound in sounds) / SAMPLE_RATE + 1.0
    options = SessionConfig(
        window_s=window_s if window_s is not None else longest_s, max_queued_s=longest_s, max_events=1 << 20
    )
    with Engine(model, EngineConfig(max_sessions=len(sounds))) as engine:
        sessions = [engine.open(options) for _ in sounds]
        for session, sound in zip(sessions, sounds, strict=True):
            session.push(sound)
            session.flush()
        engine.run_until_idle()
        return [_answers(session.poll()) for session in sessions]


def _answers(events: Iterable[object]) -> list[Answer]:
    found, emotion = [], None
    for event in events:
        if isinstance(event, ResponseStart):
            emotion = event.emotion
        elif isinstance(event, ResponseEnd):
            found.append(Answer(event.t, Reply(event.text, emotion)))
    return found


def match(events: Sequence[Event], answers: Sequence[Answer], seconds: float) -> Outcome:
    """Give each event, in order, the first free answer in [onset, onset + WITHIN_S]."""
    free = sorted(answers, key=lambda a: a.t_s)
    answered: list[tuple[Event, Answer | None]] = []
    for event in sorted(events, key=lambda e: e.start_s):
        hit = next((a for a in free if event.start_s <= a.t_s <= event.start_s + WITHIN_S), None)
        if hit is not None:
            free.remove(hit)
        answered.append((event, hit))
    return Outcome(answered, free, seconds)


@dataclass(frozen=True)
class Scores:
    """Figures of a set of streams; latencies in seconds from the onset of the event."""

    hours: float
    events: int
    answers: int
    precision: float
    recall: float
    f1: float
    false_per_hour: float
    right_text: float  # share of the answered events whose text and emotion are right
    latency_median_s: float
    latency_p95_s: float
    recall_by_class: dict[str, float]

    def lines(self) -> list[str]:
        """One `name value` line a figure."""
        rows = []
        for name, value in dataclasses.asdict(self).items():
            parts = value.items() if isinstance(value, dict) else [("", value)]
            for part, number in parts:
                shown = f"{number:.3f}" if isinstance(number, float) else str(number)
                rows.append(f"{' '.join(filter(None, (name, part))):<24}{shown}")
        return rows


def scores(outcomes: Sequence[Outcome], replies: Mapping[str, Reply]) -> Scores:
    """Totals over streams; shares of nothing are 0."""
    pairs = [pair for outcome in outcomes for pair in outcome.answered]
    hits = [(event, answer) for event, answer in pairs if answer is not None]
    false = sum(len(outcome.false) for outcome in outcomes)
    hours = sum(outcome.seconds for outcome in outcomes) / 3600
    latencies = sorted(answer.t_s - event.start_s for event, answer in hits) or [0.0]
    precision, recall = len(hits) / max(1, len(hits) + false), len(hits) / max(1, len(pairs))
    all_of, hit_of = Counter(e.label for e, _ in pairs), Counter(e.label for e, _ in hits)
    return Scores(
        hours=hours,
        events=len(pairs),
        answers=len(hits) + false,
        precision=precision,
        recall=recall,
        f1=2 * precision * recall / max(1e-9, precision + recall),
        false_per_hour=false / max(1e-9, hours),
        right_text=sum(a.reply == replies[e.label] for e, a in hits) / max(1, len(hits)),
        latency_median_s=statistics.median(latencies),
        latency_p95_s=latencies[min(len(latencies) - 1, int(0.95 * len(latencies)))],
        recall_by_class={label: hit_of[label] / count for label, count in sorted(all_of.items())},
    )
