"""The perceive half of a step: queued sound of all sessions -> audio tokens waiting in each session.

Rounds of one chunk a session through `mel` (it carries state from chunk to chunk), then one encoder pass
over everything (it carries none).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from .inbox import LOOKAHEAD_SAMPLES
from .session import CLIP, Session

if TYPE_CHECKING:
    from .engine import Engine


def perceive(engine: Engine) -> int:
    """Encode what is queued, at most `max_perceive_chunks` chunks; returns how many (clips count one)."""
    frames: list[Tensor] = []
    owners: list[tuple[Session, float]] = []
    sessions, limit = list(engine._sessions.values()), engine.config.max_perceive_chunks
    while sessions and len(owners) < limit:
        taken = _round(engine, sessions[: limit - len(owners)])
        for edge in sorted({session.config.edge for session, _, _ in taken}):
            group = [entry for entry in taken if entry[0].config.edge == edge]
            pcm = np.stack([samples for _, samples, _ in group])
            frames.append(engine.runner.hear(pcm, [session._slot for session, _, _ in group], edge))
            owners += [(session, arrived) for session, _, arrived in group]
        sessions = [session for session, _, _ in taken]
    if owners:
        tokens = engine.runner.encode(torch.cat(frames))
        for (session, arrived), chunk_tokens in zip(owners, tokens, strict=True):
            session._hear(chunk_tokens, arrived)
    return len(owners) + _perceive_clips(engine)


def _round(engine: Engine, sessions: list[Session]) -> list[tuple[Session, np.ndarray, float]]:
    """The next chunk of each session that has one: (session, PCM [S], when it was complete)."""
    taken = []
    for session in sessions:
        if session.config.edge == "wait":
            _prime(engine, session)
        chunk = session._take_chunk()
        if chunk is not None:
            taken.append((session, *chunk))
    return taken


def _prime(engine: Engine, session: Session) -> None:
    """edge="wait": the first 2.5 ms of a stream only fill the lookahead of its mel state."""
    if not session._primed and session.config.mode == "online":
        lead = session._inbox.take(LOOKAHEAD_SAMPLES)
        if lead is not None:
            engine.runner.prime(lead[0], session._slot)
            session._primed = True


def _perceive_clips(engine: Engine) -> int:
    """Offline sessions whose clip is complete."""
    ready = [s for s in engine._sessions.values() if s._phase == CLIP and s._flushed_clip and not s.closed]
    for session in ready:
        session._plan_clip(engine.runner.encode_clip(session._inbox.take_all()))
    return len(ready)
