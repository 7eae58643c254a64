"""The state machine of one stream: the token protocol, from queued chunks to decisions and text.

    LISTENING --KEEP_SILENCE--> LISTENING
    LISTENING --TEXT_BEGIN----> RESPONDING --TEXT_END | length | cancel--> LISTENING
    CLIP      --flush---------> RESPONDING --TEXT_END | length | cancel--> DONE      (offline mode)

`pending` are the control tokens whose keys are not in the cache yet; they ride in front of the next
step's rows. Sound that arrives during a response is perceived at once and queued; nothing is dropped.

A stream plans an item for a step, and commits or undoes it. All of it happens under the engine's step
lock; what other threads do (push, cancel, poll) goes through the inbox and the outbox.

Where steps are submitted ahead of their results, a response is planned one token ahead: the next item takes
the token that the item before it is about to draw (`feeds`). Where that one ended the response, the item is
void: its result is dropped and its key and value are overwritten by what comes next, in the order of steps.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from ..config import SAMPLE_RATE
from ..decision import NONFINITE, RESPOND, VOID
from ..errors import CapacityError
from ..events import Failed, Stalled
from ..options import SessionConfig
from ..text import FIRST, LATER, TextStream, listening_ids, offline_ids
from ..window import units_to_drop, window_slack
from .admission import Waiting, chunk_due, token_due
from .inbox import LOOKAHEAD_SAMPLES, Inbox
from .kv_cache import KVSequence
from .outbox import Outbox

if TYPE_CHECKING:
    from ..checkpoint import Model

LISTENING, RESPONDING, CLIP, DONE = "listening", "responding", "clip", "done"


@dataclass(frozen=True)
class Chunk:
    """One perceived chunk waiting for its decision."""

    index: int
    tokens: Tensor  # [A, D]
    arrived: float  # monotonic seconds at which its last sample was pushed


@dataclass
class Item:
    """What one stream puts into one step, and what is needed to commit or undo it."""

    stream: Stream
    epoch: int
    ids: list[int] = field(default_factory=list)
    audio: list[tuple[int, Tensor]] = field(default_factory=list)  # (first row, tokens [A, D])
    chunks: list[Chunk] = field(default_factory=list)
    chunk_rows: list[int] = field(default_factory=list)
    decide_rows: list[int] = field(default_factory=list)
    draws: bool = False  # the last row draws a token
    phase: int = FIRST  # of the token it draws
    feeds: bool = False  # its one row is the token that the session's item before it draws
    void: bool = False  # submitted in vain
    reserve: int = 0  # KV slots taken behind its rows: those of a reply's further tokens
    planned: float = 0.0  # monotonic seconds
    position: int = 0  # RoPE position of the first row
    before: int = 0  # the sequence's end before this item
    slots: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.int64))  # of each row


class Stream:
    """One stream's state. `on_failure` is called when it cannot go on (non-finite logits)."""

    def __init__(
        self,
        model: Model,
        number: int,
        slot: int,
        config: SessionConfig,
        kv: KVSequence,
        on_failure: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.model = model
        self.id = number
        self.slot = slot  # row of the engine's mel and decision state
        self.config = config
        self.kv = kv
        self.on_failure = on_failure
        self.clock = clock
        lead = LOOKAHEAD_SAMPLES if config.edge == "wait" else 0
        self.inbox = Inbox(model.config.chunk_samples, lead, config.max_queued_s, clock)
        self.outbox = Outbox()
        self.window = config.window_tokens(model.config)
        self.slack = window_slack(model.config)
        self.phase = CLIP if config.mode == "offline" else LISTENING
        self.pending: list[int] = []
        self.perceived: deque[Chunk] = deque()
        self.primed = False  # edge="wait": the mel state holds its lookahead
        self.taken = 0  # chunks taken out of the inbox
        self.heard = 0  # chunks perceived
        self.decided = 0  # chunks decided
        self.units: deque[int] = deque()  # positions of each kept unit (fastloop.window)
        self.epoch = 0  # the outbox's epoch the state machine has seen
        self.text: TextStream | None = None
        self.spoken = 0  # tokens of the response so far
        self.ahead: list[Item] = []  # submitted, their results not there yet; oldest first
        self.token_at = 0.0  # monotonic seconds at which the response began or got its last token
        self.freed = 0.0  # monotonic seconds at which the last response ended
        self.clip_complete = False  # offline: flush was called
        self.clip: Tensor | None = None  # offline: the clip's tokens [n, D] until they are in the cache
        self.stalled = False
        self.failure: str | None = None

    @property
    def t(self) -> float:
        """Stream time decided so far, seconds."""
        return self.decided * self.model.config.chunk_seconds

    @property
    def backlog_seconds(self) -> float:
        """Sound out of the inbox and not yet decided, also while a step perceives it."""
        return (self.taken - self.decided) * self.model.config.chunk_seconds

    @property
    def idle(self) -> bool:
        """No response is open, no whole chunk and no clip is left."""
        chunk = self.inbox.waiting >= self.model.config.chunk_samples + self._lead_due
        clip = self.phase == CLIP and self.clip_complete
        return self.outbox.speaking is None and not (chunk or clip or self.backlog_seconds)

    @property
    def blocked(self) -> bool:
        """Back-pressure: too many events wait to be polled."""
        return len(self.outbox.events) >= self.config.max_events

    @property
    def chunk_since(self) -> float | None:
        """Since when a whole chunk waits to be perceived (monotonic seconds), or None."""
        if self.phase in (CLIP, DONE) or self.outbox.closed:
            return None
        return self.inbox.due(self.model.config.chunk_samples + self._lead_due)

    @property
    def _lead_due(self) -> int:
        """edge="wait": the samples that still have to fill the lookahead."""
        return 0 if self.primed or self.config.edge != "wait" else LOOKAHEAD_SAMPLES

    def take_chunk(self) -> tuple[np.ndarray, float] | None:
        """PCM [S] of the next chunk and when it was complete, or None."""
        if self.phase in (CLIP, DONE) or self.outbox.closed:
            return None
        chunk = self.inbox.take(self.model.config.chunk_samples)
        self.taken += chunk is not None
        return chunk

    def hear(self, tokens: Tensor, arrived: float) -> None:
        """One more chunk was perceived: tokens [A, D]."""
        self.perceived.append(Chunk(self.heard, tokens, arrived))
        self.heard += 1

    @property
    def waiting(self) -> Waiting | None:
        """Since when there is work that can be done now, and when it is due; None: there is none."""
        if self.outbox.closed or self.blocked:
            return None
        self.follow_cancel()
        if self.ahead and not self._goes_on:
            return None
        since = self.perceived[0].arrived if self.perceived else 0.0
        if self.phase == RESPONDING:
            last = self.ahead[-1].planned if self.ahead else self.token_at  # the earliest its token can come
            return Waiting(self.id, since, last, token_due(last), speaks=True)
        if not self.perceived:
            return None
        due = chunk_due(since, self.freed, self.model.config.chunk_seconds)
        chunks = min(len(self.perceived), self.config.speculative_chunks)
        rows = chunks * self.model.config.chunk_rows
        return Waiting(self.id, since, max(since, self.freed), due, rows=rows)

    @property
    def unheard(self) -> Waiting | None:
        """Since when a chunk waits to be perceived, and when its decision is due; None: there is none.

        Behind a response nothing is due yet, whose end nobody knows.
        """
        since = self.chunk_since
        if since is None:
            return None
        due = chunk_due(since, self.freed, self.model.config.chunk_seconds)
        due = math.inf if self.phase == RESPONDING else due
        return Waiting(self.id, since, since, due, rows=self.model.config.chunk_rows)

    @property
    def _goes_on(self) -> bool:
        """The token after those on their way can be planned, unless one of them turns out to be the last."""
        more = self.spoken + len(self.ahead) < self.config.max_response_tokens
        return self.phase == RESPONDING and more

    def follow_cancel(self) -> None:
        """A cancel happened between steps: close the response in the token protocol."""
        if self.phase == RESPONDING and self.epoch != self.outbox.epoch:
            self.pending.append(self.model.config.tokens.text_end)
            self._finish_response()

    def plan(self, row_budget: int) -> Item | None:
        """The rows of the next step, their KV slots taken; None when pages are missing (stalled)."""
        try:
            item = self._plan_text() if self.phase == RESPONDING else self._plan_listening(row_budget)
        except CapacityError as error:
            if self.ahead:  # its tokens on their way may be the last ones, and need no page more
                return None
            if not self.stalled:
                self.outbox.emit(Stalled, message=f"{error} The session waits for free pages.")
            self.stalled = True
            return None
        self.stalled = False
        return item

    def _plan_text(self) -> Item:
        """RESPONDING: the last drawn token (or a whole clip's prompt) in, the next token out."""
        if self.ahead:
            item = Item(self, self.epoch, ids=[0], draws=True, phase=LATER, feeds=True)
        else:
            audio = [] if self.clip is None else [(1, self.clip)]  # behind AUDIO_BEGIN
            phase = FIRST if self.spoken == 0 else LATER
            item = Item(self, self.epoch, ids=list(self.pending), audio=audio, draws=True, phase=phase)
        return self._place(item)

    def _plan_listening(self, row_budget: int) -> Item:
        """As many queued chunks as fit, silence assumed between them."""
        item = Item(self, self.epoch)
        pending, block = self.pending, listening_ids(self.model.config)
        room = math.inf if self.window is None else self.window + self.slack
        total = self.kv.tokens
        for chunk in islice(self.perceived, self.config.speculative_chunks):
            count = len(pending) + len(block)
            overdue = total + count > room
            if item.chunks and (overdue or len(item.ids) + count > row_budget):
                break
            if overdue:
                self._drop_units(units_to_drop(self.units, count, self.window, self.slack))
                total = self.kv.tokens
            item.ids += [*pending, *block]
            item.decide_rows.append(len(item.ids) - 1)
            item.audio.append((len(item.ids) - 1 - self.model.config.chunk_tokens, chunk.tokens))
            item.chunk_rows.append(count)
            item.chunks.append(chunk)
            total += count
            pending = [self.model.config.tokens.keep_silence]
        return self._place(item)

    def plan_reply(self, most: int) -> Item | None:
        """A response as far as it may go, at most `most` tokens: its next row, and the slots of further ones.

        None where the next step is not one row, or pages or room for events are missing; then it goes step by
        step.
        """
        room = self.config.max_events - len(self.outbox.events)
        left = min(self.config.max_response_tokens - self.spoken, most, room)
        if self.phase != RESPONDING or self.ahead or len(self.pending) != 1 or left < 2:
            return None
        phase = FIRST if self.spoken == 0 else LATER
        item = Item(self, self.epoch, ids=list(self.pending), draws=True, phase=phase, reserve=left - 1)
        try:
            self._place(item)
        except CapacityError:
            return None
        return item

    def commit_reply(self, item: Item, token: int) -> None:
        """Take over one more token of a reply; the row that drew it is in the cache."""
        item.before += 1
        self.commit_text(item, token)

    def end_reply(self, item: Item) -> None:
        """The loop has ended and the response goes on: what it did not use goes back."""
        self.ahead.remove(item)
        self.kv.truncate(item.before)

    def _place(self, item: Item) -> Item:
        """Take the KV slots of an item's rows; CapacityError leaves the sequence as it was."""
        item.position, item.before, item.planned = self.kv.position, self.kv.end, self.clock()
        item.slots = self.kv.extend(len(item.ids) + item.reserve)[: len(item.ids)]
        return item

    def plan_clip(self, tokens: Tensor) -> None:
        """Offline: tokens [n, D] of the whole clip become the rows of the first text step."""
        ids = offline_ids(self.model.config, self.model.tokenizer, len(tokens), self.config.user_text)
        self.pending, self.clip = ids, tokens
        self._begin_response()
        self.outbox.open_response(self.inbox.received / SAMPLE_RATE)

    def _drop_units(self, count: int) -> None:
        gone = sum(self.units.popleft() for _ in range(count))
        self.kv.drop(gone, self.model.decoder.inv_freq)

    def undo(self, item: Item) -> None:
        """The step did not happen."""
        self.kv.truncate(item.before)

    def retract(self) -> None:
        """Nobody waits for what is on its way any more. The device still runs it, before anything later."""
        if self.ahead:
            for item in self.ahead:
                item.void = True
            self.kv.truncate(self.ahead[0].before)
            self.ahead.clear()

    def commit_listening(self, item: Item, decisions: list[int], chances: list[float]) -> list[Chunk]:
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
            self.perceived.popleft()
            decided.append(chunk)
            end += rows
            self.units.append(rows)
            respond = decision == RESPOND
            tokens = self.model.config.tokens
            self.pending = [tokens.text_begin if respond else tokens.keep_silence]
            if respond:
                self._begin_response()
            t = (chunk.index + 1) * self.model.config.chunk_seconds
            self.outbox.decide(chunk.index, t, respond, p)
            self.decided = chunk.index + 1  # last: who sees it finds the event too
        self.kv.truncate(end)
        return decided

    def _begin_response(self) -> None:
        self.phase = RESPONDING
        self.epoch = self.outbox.epoch
        self.text = TextStream(self.model.tokenizer)
        self.spoken = 0
        self.token_at = self.clock()

    def _finish_response(self) -> None:
        self.retract()
        self.phase = DONE if self.config.mode == "offline" else LISTENING
        self.epoch = self.outbox.epoch
        self.text = None
        self.freed = self.clock()

    def commit_text(self, item: Item, token: int) -> None:
        """Take over one drawn token."""
        if self.units:
            self.units[-1] += len(item.ids)
        else:
            self.units.append(len(item.ids))
        self.clip = None
        if token < 0:
            self._fail("the logits of a text token are not finite (NaN or Inf in weights or state)")
            return
        text_end = self.model.config.tokens.text_end
        self.pending = [token]
        self.spoken += 1
        self.token_at = self.clock()
        alive = self._deliver(item.epoch, token)
        if alive and token != text_end and self.spoken >= self.config.max_response_tokens:
            assert self.text is not None
            alive = self.outbox.say(item.epoch, self.text.finish())
            alive = self.outbox.end(item.epoch, "length") and alive
            self.pending = [token, text_end] if alive else [text_end]
            self._finish_response()
        elif not alive or token == text_end:  # not alive: a cancel came during the step
            self.pending = [text_end]
            self._finish_response()

    def _deliver(self, epoch: int, token: int) -> bool:
        """Emit what one token says; False when the response was cancelled meanwhile."""
        assert self.text is not None
        tokens, outbox = self.model.config.tokens, self.outbox
        first = self.spoken == 1
        emotion = {i: name for name, i in tokens.emotions.items()}.get(token) if first else None
        if first and not outbox.start(epoch, emotion):
            return False
        if emotion is not None:
            return True
        if token == tokens.text_end:
            return outbox.say(epoch, self.text.finish()) and outbox.end(epoch, "end")
        return outbox.say(epoch, self.text.push(token))

    def _fail(self, message: str) -> None:
        self.failure = message
        self.outbox.emit(Failed, message=f"session {self.id}: {message}; it was closed, others go on")
        self.on_failure()
