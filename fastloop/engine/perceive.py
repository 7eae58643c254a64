"""The perceive half of a step: queued sound of all streams -> audio tokens waiting in each stream.

Rounds of one chunk a stream through `mel` (it carries state from chunk to chunk), then one encoder pass
over everything (it carries none).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .admission import ORDERS
from .inbox import LOOKAHEAD_SAMPLES
from .protocol import CLIP, Stream
from .runner import Round

if TYPE_CHECKING:
    from .engine import Engine


def perceive(engine: Engine) -> int:
    """Encode what is queued, at most `max_perceive_chunks` chunks, in the order of the admission policy;
    returns how many (clips count one).
    """
    rounds: list[Round] = []
    owners: list[tuple[Stream, float]] = []
    by_id = {stream.id: stream for stream in engine._streams()}
    waiting = [w for stream in by_id.values() if (w := stream.unheard) is not None]
    streams = [by_id[w.key] for w in ORDERS[engine.config.admission](waiting, 0.0, 0.0)]
    limit = engine.config.max_perceive_chunks
    while streams and len(owners) < limit:
        taken = _round(engine, streams[: limit - len(owners)])
        for edge in sorted({stream.config.edge for stream, _, _ in taken}):
            group = [entry for entry in taken if entry[0].config.edge == edge]
            pcm = np.stack([samples for _, samples, _ in group])
            rounds.append(Round(pcm, [stream.slot for stream, _, _ in group], edge))
            owners += [(stream, arrived) for stream, _, arrived in group]
        streams = [stream for stream, _, _ in taken]
    if owners:
        tokens = engine.runner.perceive(rounds)
        for (stream, arrived), chunk_tokens in zip(owners, tokens, strict=True):
            stream.hear(chunk_tokens, arrived)
    return len(owners) + _perceive_clips(engine)


def _round(engine: Engine, streams: list[Stream]) -> list[tuple[Stream, np.ndarray, float]]:
    """The next chunk of each stream that has one: (stream, PCM [S], when it was complete)."""
    taken = []
    for stream in streams:
        if stream.config.edge == "wait":
            _prime(engine, stream)
        chunk = stream.take_chunk()
        if chunk is not None:
            taken.append((stream, *chunk))
    return taken


def _prime(engine: Engine, stream: Stream) -> None:
    """edge="wait": the first 2.5 ms of a stream only fill the lookahead of its mel state."""
    if not stream.primed and stream.config.mode == "online":
        lead = stream.inbox.take(LOOKAHEAD_SAMPLES)
        if lead is not None:
            engine.runner.prime(lead[0], stream.slot)
            stream.primed = True


def _perceive_clips(engine: Engine) -> int:
    """Offline streams whose clip is complete."""
    ready = [s for s in engine._streams() if s.phase == CLIP and s.clip_complete and not s.outbox.closed]
    for stream in ready:
        stream.plan_clip(engine.runner.encode_clip(stream.inbox.take_all()))
    return len(ready)
