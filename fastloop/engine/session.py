"""One stream: its public handle, and the state machine of the token protocol.

    LISTEN  --KEEP_SILENCE--> LISTEN
    LISTEN  --TEXT_BEGIN----> RESPOND --TEXT_END | length | cancel--> LISTEN
    CLIP    --flush---------> RESPOND --TEXT_END | length | cancel--> DONE      (offline mode)

`pending` are the control tokens whose keys are not in the cache yet; they ride in front of the next
step's rows. Sound that arrives during a response is perceived at once and queued; nothing is dropped.

The public methods may be called from any thread. Everything with a leading underscore belongs to the
engine's step and is touched only under its step lock.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from ..config import SAMPLE_RATE
from ..decision import NONFINITE, RESPOND, VOID
from ..errors import CapacityError, SessionClosedError
from ..events import Event, Failed, Stalled
from ..options import SessionConfig
from ..text import FIRST, LATER, TextStream, listening_ids, offline_ids
from ..window import units_to_drop, window_slack
from .inbox import LOOKAHEAD_SAMPLES, Inbox
from .kv_cache import KVSequence
from .outbox import Outbox

if TYPE_CHECKING:
    from .engine import Engine

LISTENING, RESPONDING, CLIP, DONE = "listening", "responding", "clip", "done"


@dataclass(frozen=True)
class Chunk:
    """One perceived chunk waiting for its decision."""

    index: int
    tokens: Tensor  # [A, D]
    arrived: float  # monotonic seconds at which its last sample was pushed


@dataclass
class Item:
    """What one session puts into one step, and what is needed to commit or undo it."""

    session: Session
    epoch: int
    ids: list[int] = field(default_factory=list)
    audio: list[tuple[int, Tensor]] = field(default_factory=list)  # (first row, tokens [A, D])
    chunks: list[Chunk] = field(default_factory=list)
    chunk_rows: list[int] = field(default_factory=list)
    decide_rows: list[int] = field(default_factory=list)
    draws: bool = False  # the last row draws a token
    position: int = 0  # RoPE position of the first row
    before: int = 0  # the sequence's end before this item
    slots: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.int64))  # of each row


class Session:
    """A stream opened by `Engine.open`."""

    def __init__(self, engine: Engine, number: int, slot: int, config: SessionConfig, kv: KVSequence) -> None:
        self.id = number  # never reused
        self.config = config
        self._engine = engine
        self._slot = slot  # row of the engine's mel and decision state
        self._kv = kv
        model = engine.model.config
        self._model = model
        lead = LOOKAHEAD_SAMPLES if config.edge == "wait" else 0
        self._inbox = Inbox(model.chunk_samples, lead, config.max_queued_s)
        self._outbox = Outbox()
        self._window = config.window_tokens(model)
        self._slack = window_slack(model)
        self._phase = CLIP if config.mode == "offline" else LISTENING
        self._pending: list[int] = []
        self._perceived: deque[Chunk] = deque()
        self._primed = False  # edge="wait": the mel state holds its lookahead
        self._heard = 0  # chunks perceived
        self._decided = 0  # chunks decided
        self._units: deque[int] = deque()  # positions of each kept unit (fastloop.window)
        self._epoch = 0  # the outbox's epoch the state machine has seen
        self._text: TextStream | None = None
        self._spoken = 0  # tokens of the response so far
        self._flushed_clip = False
        self._clip: Tensor | None = None  # offline: the clip's tokens [n, D] until they are in the cache
        self._stalled = False
        self._failure: str | None = None

    # ---- public: any thread ------------------------------------------------------------------------

    @property
    def closed(self) -> bool:
        return self._outbox.closed

    @property
    def stalled(self) -> bool:
        """Waiting for KV pages that other sessions hold."""
        return self._stalled

    @property
    def responding(self) -> bool:
        return self._outbox.speaking is not None

    @property
    def queued_seconds(self) -> float:
        """Sound pushed and not yet decided."""
        return self._inbox.waiting / SAMPLE_RATE + self._backlog_seconds

    @property
    def t(self) -> float:
        """Stream time decided so far, seconds."""
        return self._decided * self._model.chunk_seconds

    def push(self, pcm: object, sample_rate: int = SAMPLE_RATE) -> float:
        """Queue sound and return the seconds queued. Never waits for the model.

        pcm: float32/float64 in [-1, 1] or int16, [S] or [S, channels], numpy or torch; any length, also 0.
        Raises ValueError or TypeError for what is not sound, QueueFullError beyond max_queued_s,
        SessionClosedError after close; in each case nothing of it was taken.
        """
        self._check_open("push")
        seconds = self._inbox.push(pcm, sample_rate, self._backlog_seconds)
        self._engine._notify()
        return seconds

    def flush(self) -> None:
        """Decide all sound pushed so far: a partial chunk is completed with zeros. Offline: the clip ends."""
        self._check_open("flush")
        if self.config.mode == "offline":
            if self._inbox.received == 0 and not self._flushed_clip:
                raise ValueError("Session.flush: the clip is empty; push its sound before flush()")
            self._flushed_clip = True
        else:
            self._inbox.flush()
        self._engine._notify()

    def poll(self, limit: int | None = None) -> list[Event]:
        """Take the events that wait, oldest first (at most `limit`). Also works after close."""
        events = self._outbox.poll(limit)
        if events:
            self._engine._notify()
        return events

    async def events(self) -> AsyncIterator[Event]:
        """Yield events as they come; ends after `Closed`."""
        async for event in self._outbox.stream():
            self._engine._notify()
            yield event

    def cancel(self) -> bool:
        """End the response now; the session listens on. True if there was one.

        When it returns, no text of the old epoch will be delivered any more. Idempotent, any thread.
        """
        cancelled = self._outbox.cancel()
        if cancelled:
            self._engine._notify()
        return cancelled

    def close(self) -> None:
        """Give everything back. Idempotent, any thread; events can still be polled afterwards."""
        self._engine._close(self)

    def snapshot(self) -> bytes:
        """The whole state as bytes for `Engine.restore`, here or in another process. The session goes on."""
        return self._engine.snapshot(self)

    def fork(self) -> Session:
        """An independent copy of this session, undelivered events included."""
        return self._engine.fork(self)

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check_open(self, call: str) -> None:
        if self._failure is not None:
            raise SessionClosedError(
                f"Session.{call}: session {self.id} failed: {self._failure}; open another"
            )
        if self.closed:
            raise SessionClosedError(f"Session.{call}: session {self.id} is closed; open another")
        if self._phase == DONE or (self._flushed_clip and call == "push"):
            raise SessionClosedError(
                f"Session.{call}: the clip of offline session {self.id} is finished; open another session"
            )

    # ---- the engine's side: under the step lock ------------------------------------------------------

    @property
    def _backlog_seconds(self) -> float:
        return len(self._perceived) * self._model.chunk_seconds

    @property
    def _blocked(self) -> bool:
        """Back-pressure: too many events wait to be polled."""
        return len(self._outbox.events) >= self.config.max_events

    def _take_chunk(self) -> tuple[np.ndarray, float] | None:
        """PCM [S] of the next chunk and when it was complete, or None."""
        if self._phase in (CLIP, DONE) or self.closed:
            return None
        return self._inbox.take(self._model.chunk_samples)

    def _hear(self, tokens: Tensor, arrived: float) -> None:
        """One more chunk was perceived: tokens [A, D]."""
        self._perceived.append(Chunk(self._heard, tokens, arrived))
        self._heard += 1

    @property
    def _ready_since(self) -> float | None:
        """When the work that can be done now became due (monotonic seconds), or None: nothing to do."""
        if self.closed or self._blocked:
            return None
        self._follow_cancel()
        if self._phase == RESPONDING:
            return 0.0 if not self._perceived else self._perceived[0].arrived
        return self._perceived[0].arrived if self._perceived else None

    def _follow_cancel(self) -> None:
        """A cancel happened between steps: close the response in the token protocol."""
        if self._phase == RESPONDING and self._epoch != self._outbox.epoch:
            self._pending.append(self._model.tokens.text_end)
            self._finish_response()

    def _plan(self, row_budget: int) -> Item | None:
        """The rows of the next step, their KV slots taken; None when pages are missing (stalled)."""
        try:
            item = self._plan_text() if self._phase == RESPONDING else self._plan_listening(row_budget)
        except CapacityError as error:
            if not self._stalled:
                self._outbox.emit(Stalled, message=f"{error} The session waits for free pages.")
            self._stalled = True
            return None
        self._stalled = False
        return item

    def _plan_text(self) -> Item:
        """RESPONDING: the last drawn token (or a whole clip's prompt) in, the next token out."""
        audio = [] if self._clip is None else [(1, self._clip)]  # behind AUDIO_BEGIN
        return self._place(Item(self, self._epoch, ids=list(self._pending), audio=audio, draws=True))

    def _plan_listening(self, row_budget: int) -> Item:
        """As many queued chunks as fit, silence assumed between them."""
        item = Item(self, self._epoch)
        pending, block = self._pending, listening_ids(self._model)
        room = math.inf if self._window is None else self._window + self._slack
        total = self._kv.tokens
        for chunk in islice(self._perceived, self.config.speculative_chunks):
            count = len(pending) + len(block)
            overdue = total + count > room
            if item.chunks and (overdue or len(item.ids) + count > row_budget):
                break
            if overdue:
                self._drop_units(units_to_drop(self._units, count, self._window, self._slack))
                total = self._kv.tokens
            item.ids += [*pending, *block]
            item.decide_rows.append(len(item.ids) - 1)
            item.audio.append((len(item.ids) - 1 - self._model.chunk_tokens, chunk.tokens))
            item.chunk_rows.append(count)
            item.chunks.append(chunk)
            total += count
            pending = [self._model.tokens.keep_silence]
        return self._place(item)

    def _place(self, item: Item) -> Item:
        """Take the KV slots of an item's rows; CapacityError leaves the sequence as it was."""
        item.position, item.before = self._kv.position, self._kv.end
        item.slots = self._kv.extend(len(item.ids))
        return item

    def _plan_clip(self, tokens: Tensor) -> None:
        """Offline: tokens [n, D] of the whole clip become the rows of the first text step."""
        ids = offline_ids(self._model, self._engine.model.tokenizer, len(tokens), self.config.user_text)
        self._pending, self._clip = ids, tokens
        self._begin_response()
        self._outbox.open_response(self._inbox.received / SAMPLE_RATE)

    def _drop_units(self, count: int) -> None:
        gone = sum(self._units.popleft() for _ in range(count))
        self._kv.drop(gone, self._engine.model.decoder.inv_freq)

    def _undo(self, item: Item) -> None:
        """The step did not happen."""
        self._kv.truncate(item.before)

    def _commit_listening(self, item: Item, decisions: list[int], chances: list[float]) -> list[Chunk]:
        """Take over the decisions up to the first response; the rest is rolled back. Returns the decided."""
        end, decided = item.before, []
        for chunk, rows, decision, p in zip(item.chunks, item.chunk_rows, decisions, chances, strict=True):
            if decision == VOID:
                break
            if decision == NONFINITE:
                self._fail(
                    f"the logits of chunk {chunk.index} are not finite (NaN or Inf in weights or state)"
                )
                break
            self._perceived.popleft()
            decided.append(chunk)
            self._decided = chunk.index + 1
            end += rows
            self._units.append(rows)
            respond = decision == RESPOND
            tokens = self._model.tokens
            self._pending = [tokens.text_begin if respond else tokens.keep_silence]
            if respond:
                self._begin_response()
            self._outbox.decide(chunk.index, self.t, respond, p)
        self._kv.truncate(end)
        return decided

    def _begin_response(self) -> None:
        self._phase = RESPONDING
        self._epoch = self._outbox.epoch
        self._text = TextStream(self._engine.model.tokenizer)
        self._spoken = 0

    def _finish_response(self) -> None:
        self._phase = DONE if self.config.mode == "offline" else LISTENING
        self._epoch = self._outbox.epoch
        self._text = None

    @property
    def _text_phase(self) -> int:
        return FIRST if self._spoken == 0 else LATER

    def _commit_text(self, item: Item, token: int) -> None:
        """Take over one drawn token."""
        if self._units:
            self._units[-1] += len(item.ids)
        else:
            self._units.append(len(item.ids))
        self._clip = None
        if token < 0:
            self._fail("the logits of a text token are not finite (NaN or Inf in weights or state)")
            return
        text_end = self._model.tokens.text_end
        self._pending = [token]
        self._spoken += 1
        alive = self._deliver(item.epoch, token)
        if alive and token != text_end and self._spoken >= self.config.max_response_tokens:
            assert self._text is not None
            alive = self._outbox.say(item.epoch, self._text.finish())
            alive = self._outbox.end(item.epoch, "length") and alive
            self._pending = [token, text_end] if alive else [text_end]
            self._finish_response()
        elif not alive or token == text_end:  # not alive: a cancel came during the step
            self._pending = [text_end]
            self._finish_response()

    def _deliver(self, epoch: int, token: int) -> bool:
        """Emit what one token says; False when the response was cancelled meanwhile."""
        assert self._text is not None
        tokens, outbox = self._model.tokens, self._outbox
        first = self._spoken == 1
        emotion = {i: name for name, i in tokens.emotions.items()}.get(token) if first else None
        if first and not outbox.start(epoch, emotion):
            return False
        if emotion is not None:
            return True
        if token == tokens.text_end:
            return outbox.say(epoch, self._text.finish()) and outbox.end(epoch, "end")
        return outbox.say(epoch, self._text.push(token))

    def _fail(self, message: str) -> None:
        self._failure = message
        self._outbox.emit(Failed, message=f"session {self.id}: {message}; it was closed, others go on")
        self.close()
