"""Sounds through the real engine, many sessions side by side -> what was answered, and when.

Greedy text, decisions by the session's policy. An answer has the stream time of the end of the chunk whose
decision it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from ..checkpoint import Model
from ..config import SAMPLE_RATE
from ..engine import Engine, Session
from ..errors import CapacityError, FastloopError
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
    """How sounds are listened to. window_s None: all is remembered; threshold None: the checkpoint's own;
    most_tokens: of one response.
    """

    sessions: int = 16
    window_s: float | None = 60.0
    threshold: float | None = None
    system_prompt: str | None = None
    most_tokens: int = 64

    def session(self, seconds: float) -> SessionConfig:
        """The options of a session for a sound of that length, all of which is pushed at once."""
        return SessionConfig(
            system_prompt=self.system_prompt,
            policy=DecisionPolicy(threshold=self.threshold),
            window_s=self.window_s if self.window_s is not None else seconds + 1.0,
            max_queued_s=seconds + 1.0,
            max_events=1 << 20,
            max_response_tokens=self.most_tokens,
        )


def hear(
    model: Model,
    sounds: Sequence[np.ndarray],
    how: Hearing,
    progress: Callable[[int], None] = lambda done: None,
    before: Mapping[int, list[Answer]] = MappingProxyType({}),
    keep: Callable[[int, list[Answer]], None] = lambda index, answers: None,
) -> list[list[Answer]]:
    """Each sound, float32 [S] at 16 kHz, as a stream of its own -> its answers, in the order of `sounds`.

    progress is told how many sounds are done; keep, as each ends, its place in `sounds` and its answers.
    before: answers that are there already; those sounds are not heard. FastloopError where a session failed.
    """
    found = [before.get(i, []) for i in range(len(sounds))]
    missing = (i for i in range(len(sounds)) if i not in before)
    order = sorted(missing, key=lambda i: len(sounds[i]))  # those side by side end together
    streams = (Told(i, sounds[i], how.session(len(sounds[i]) / SAMPLE_RATE)) for i in order)
    progress(len(before))
    if not order:
        return found
    # As many sessions as for all of them: the room that the last ones left have is what the whole run gave.
    with Engine(model, EngineConfig(max_sessions=min(how.sessions, len(sounds)))) as engine:
        for done, (index, answers) in enumerate(converse(engine, streams), start=len(before) + 1):
            found[index] = answers
            keep(index, answers)
            progress(done)
    return found


@dataclass(frozen=True)
class Told:
    """A sound, float32 [S] at 16 kHz, that a session is told at once, and which one of the caller's it is."""

    index: int
    pcm: np.ndarray
    options: SessionConfig


def converse(engine: Engine, streams: Iterable[Told]) -> Iterator[tuple[int, list[Answer]]]:
    """As many streams side by side as the engine takes; (index, answers) of each as it ends.

    The next one is drawn from `streams` when a session is free, so their sounds need not fit in memory.
    FastloopError where a session failed, or where a stream alone needs more than the whole engine.
    """
    waiting, running = iter(streams), dict[int, Session]()
    coming = next(waiting, None)
    while coming is not None or running:
        while coming is not None:
            try:
                session = engine.open(coming.options)
            except CapacityError as error:
                if not running:
                    seconds = len(coming.pcm) / SAMPLE_RATE
                    raise FastloopError(
                        f"{seconds:.0f} s of sound need more than all {engine.config.max_sessions} "
                        f"sessions: allow more of them ({error})"
                    ) from error
                break
            session.push(coming.pcm)
            session.flush()
            running[coming.index] = session
            coming = next(waiting, None)
        worked = engine.step()
        ended = [i for i, session in running.items() if session.idle or session.closed]
        if not (worked or ended):
            raise FastloopError(f"{len(running)} sessions are not done, and none of them can go on")
        for index in ended:
            session = running.pop(index)
            session.close()
            yield index, _answers(session.poll())


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
