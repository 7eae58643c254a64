"""Random schedules for the engine, and the same stream through the plain loop: what tests compare."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import torch

from ..checkpoint import Model
from ..engine import Engine, Session
from ..events import Decision, Event, ResponseEnd
from ..loop import PlainLoop
from ..options import DecisionPolicy, SessionConfig
from .cases import random_sound


@dataclass
class Script:
    """One stream: its options, its sound, and after how many tokens which of its responses is cancelled."""

    config: SessionConfig
    pcm: np.ndarray  # float32 [S], whole chunks
    cancel_after: dict[int, int] = field(default_factory=dict)  # response number -> tokens
    start_step: int = 0  # the driver's step at which the stream begins
    push_samples: int = 6400  # samples of one push


def lively_policy(model: Model) -> DecisionPolicy:
    """A threshold at the median p(respond) of the model on noise, so that both decisions occur."""
    loop = PlainLoop(model, SessionConfig(policy=DecisionPolicy(threshold=1.0)))
    events = run_loop_chunks(loop, random_sound(12 * model.config.chunk_seconds, seed=99))
    chances = [e.p_respond for e in events if isinstance(e, Decision)]
    return DecisionPolicy(threshold=float(np.median(chances)))


def run_loop_chunks(
    loop: PlainLoop, pcm: np.ndarray, cancel_after: dict[int, int] | None = None
) -> list[Event]:
    """Feed whole chunks to the plain loop; returns all its events."""
    size, responses = loop.model.config.chunk_samples, 0
    for start in range(0, len(pcm) - size + 1, size):
        chunk = torch.from_numpy(pcm[start : start + size])
        events = loop.listen(chunk, (cancel_after or {}).get(responses))
        responses += isinstance(events[-1], ResponseEnd)
    return loop.events


def expected(model: Model, script: Script) -> list[Event]:
    """What the plain loop says of a script."""
    return run_loop_chunks(PlainLoop(model, script.config), script.pcm, script.cancel_after)


def run_engine(engine: Engine, scripts: list[Script]) -> list[list[Event]]:
    """All scripts together: unsynchronised starts and pushes, cancels between steps; events per script."""
    sessions: list[Session | None] = [None] * len(scripts)
    heard: list[list[Event]] = [[] for _ in scripts]
    at = [0] * len(scripts)
    step = 0
    while True:
        busy = 0
        for i, script in enumerate(scripts):
            if step < script.start_step:
                busy += 1
                continue
            session = sessions[i] = sessions[i] or engine.open(script.config)
            if at[i] < len(script.pcm) and session.queued_seconds < script.config.max_queued_s / 2:
                session.push(script.pcm[at[i] : at[i] + script.push_samples])
                at[i] += script.push_samples
                busy += 1
        busy += engine.step()
        for opened, script, events in zip(sessions, scripts, heard, strict=True):
            if opened is not None:
                events += opened.poll()
                _cancel_when_due(opened, script, events)
                events += opened.poll()
        step += 1
        if not busy:
            break
    for opened in sessions:
        assert opened is not None
        opened.close()
    return heard


def _cancel_when_due(session: Session, script: Script, events: list[Event]) -> None:
    response = sum(isinstance(e, ResponseEnd) for e in events)
    if session.responding and session.stream.spoken == script.cancel_after.get(response):
        session.cancel()


def comparable(events: list[Event]) -> list[Event]:
    """Events without what legitimately differs between two runs: seq, epoch, p_respond's last digits."""
    plain = [replace(e, seq=0, epoch=0) for e in events if e.type != "closed"]
    return [replace(e, p_respond=0.0) if isinstance(e, Decision) else e for e in plain]


def chances(events: list[Event]) -> np.ndarray:
    return np.array([e.p_respond for e in events if isinstance(e, Decision)])
