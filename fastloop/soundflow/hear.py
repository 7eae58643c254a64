"""Sounds through the real engine, many sessions side by side -> what was answered, and when.

Greedy text, decisions by the session's policy. An answer has the stream time of the end of the chunk whose
decision it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from ..checkpoint import Model
from ..config import SAMPLE_RATE
from ..engine import Engine
from ..errors import FastloopError
from ..events import Event, Failed, ResponseEnd, ResponseStart
from ..options import DecisionPolicy, EngineConfig, SessionConfig


@dataclass(frozen=True)
class Answer:
    """One response at stream time t_s."""

    t_s: float
    text: str
    emotion: str | None = None


@dataclass(frozen=True)
class Hearing:
    """How sounds are listened to. window_s None: the whole stream is remembered."""

    sessions: int = 16
    window_s: float | None = 60.0
    threshold: float = 0.5
    system_prompt: str | None = None

    def session(self, seconds: float) -> SessionConfig:
        """The options of a session for a sound of that length, all of which is pushed at once."""
        return SessionConfig(
            system_prompt=self.system_prompt,
            policy=DecisionPolicy(threshold=self.threshold),
            window_s=self.window_s if self.window_s is not None else seconds + 1.0,
            max_queued_s=seconds + 1.0,
            max_events=1 << 20,
            max_response_tokens=64,
        )


def hear(
    model: Model,
    sounds: Sequence[np.ndarray],
    how: Hearing,
    progress: Callable[[int], None] = lambda done: None,
) -> list[list[Answer]]:
    """Each sound, float32 [S] at 16 kHz, as a stream of its own -> its answers, in the order of `sounds`.

    progress is told how many sounds are done. FastloopError where a session failed.
    """
    found: list[list[Answer]] = [[] for _ in sounds]
    order = sorted(range(len(sounds)), key=lambda i: len(sounds[i]))  # equal lengths end together
    for first in range(0, len(order), how.sessions):
        group = order[first : first + how.sessions]
        longest_s = len(sounds[group[-1]]) / SAMPLE_RATE
        options = how.session(longest_s)
        with Engine(model, EngineConfig(max_sessions=len(group))) as engine:
            sessions = [engine.open(options) for _ in group]
            for session, index in zip(sessions, group, strict=True):
                session.push(sounds[index])
                session.flush()
            engine.run_until_idle()
            for session, index in zip(sessions, group, strict=True):
                found[index] = _answers(session.poll())
        progress(min(first + how.sessions, len(order)))
    return found


def _answers(events: Iterable[Event]) -> list[Answer]:
    answers, emotion = [], None
    for event in events:
        if isinstance(event, Failed):
            raise FastloopError(f"a session failed: {event.message}")
        if isinstance(event, ResponseStart):
            emotion = event.emotion
        elif isinstance(event, ResponseEnd):
            answers.append(Answer(event.t, event.text.strip(), emotion))
    return answers
