"""The steps of an engine that are on their way: planned, submitted, collected when their results are there.

    plan n + 1 | submit n + 1 | collect n         where the runner takes steps ahead (EngineConfig.ahead)
    plan n | submit n | collect n                 elsewhere

Whoever is in a step is planned again when its results are there, but for a response, whose next token is
planned behind the one that is being drawn (fastloop.engine.protocol). While one session alone is open, its
response may be left to the device as a whole (EngineConfig.single_stream).
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from ..config import ConfigError
from . import scheduler
from .admission import ORDERS
from .protocol import Item
from .reply import REPLY_TOKENS, Replies

if TYPE_CHECKING:
    from .engine import Engine


def require_replies(replies: Replies | None) -> None:
    """ConfigError where a runner has no replies without the host, or none on its device."""
    why = "only the captured runner replays a reply as one graph" if replies is None else replies.refusal
    if why:
        raise ConfigError(f"EngineConfig.single_stream: {why}; leave it False")


class Steps:
    """All of it happens under the engine's step lock."""

    def __init__(self, engine: Engine) -> None:
        if engine.config.single_stream:
            require_replies(engine.runner.replies)
        self._engine = engine
        # Each step on its way, the oldest first: its items, and when the call began that submitted it.
        self._ahead: deque[tuple[list[Item], float]] = deque()
        self._reply: Item | None = None  # a response that the device goes through by itself
        self._collected = 0.0  # when a step had its results last
        self._seconds = 0.0  # what a step takes about

    @property
    def busy(self) -> bool:
        """Something is on its way."""
        return bool(self._ahead) or self._reply is not None

    def advance(self, begun: float) -> int:
        """Submit the next step; collect the oldest one where there is no next, or no place for more.

        begun: when the engine's call began. Returns the number of sequences begun or ended.
        """
        if self._reply is not None:
            return self._follow_reply(self._reply)
        if self._engine.config.single_stream and self._begin_reply():
            return 1
        count = self._submit(begun)
        if self._ahead and (not count or len(self._ahead) >= self._depth):
            return count + self._collect()
        return count

    def collect_all(self) -> None:
        """Take the results of everything on its way."""
        while self._ahead:
            self._collect()
        while self._reply is not None:
            self._stop_reply()
            self._follow_reply(self._reply)

    def drop(self) -> None:
        """The engine cannot go on: what is on its way has no results, and the sessions' pages are theirs."""
        self._ahead.clear()
        self._reply = None
        for stream in self._engine._streams():
            stream.retract()

    @property
    def _depth(self) -> int:
        return self._engine.runner.depth if self._engine.config.ahead else 1

    def _submit(self, begun: float) -> int:
        """Plan and submit one step; returns the number of its sequences."""
        engine = self._engine
        config, order = engine.config, ORDERS[engine.config.admission]
        seconds = self._seconds * (1 + self._depth) / 2  # those on their way come first
        items = scheduler.plan(engine._streams(), config.max_step_rows, order, engine.clock(), seconds)
        if not items:
            return 0
        try:
            engine.runner.submit(scheduler.build(items))
        except BaseException:
            for item in items:
                item.stream.undo(item)
            raise
        for item in items:
            item.stream.ahead.append(item)
        self._ahead.append((items, begun))
        engine.counters.rows += sum(len(item.ids) for item in items)
        engine.counters.steps += 1
        return len(items)

    def _collect(self) -> int:
        """Take the results of the oldest step on its way; returns the number of its sequences."""
        counters, result = self._engine.counters, self._engine.runner.collect()
        items, begun = self._ahead.popleft()
        decided, tokens = scheduler.commit(items, result)
        now = self._engine.clock()
        self._seconds, self._collected = now - max(begun, self._collected), now
        counters.latency_seconds.add(*(now - chunk.arrived for chunk in decided))
        counters.chunks += len(decided)
        counters.text_tokens += tokens
        return len(items)

    # ---- a response as one program of the device --------------------------------------------------------

    def _begin_reply(self) -> bool:
        """Let the device go through the response of the only session there is, if it has come to one."""
        engine, replies = self._engine, self._engine.runner.replies
        if replies is None or self._ahead or len(engine._sessions) != 1:
            return False
        [stream] = engine._streams()
        if stream.waiting is None or (item := stream.plan_reply(REPLY_TOKENS)) is None:
            return False
        try:
            replies.submit(scheduler.build([item]), 1 + item.reserve)
        except BaseException:
            stream.undo(item)
            raise
        stream.ahead.append(item)
        self._reply = item
        engine.counters.steps += 1
        return True

    def _stop_reply(self) -> None:
        if self._engine.runner.replies is not None:
            self._engine.runner.replies.stop()

    def _follow_reply(self, item: Item) -> int:
        """Take the tokens that have come; whoever needs the device, or ends the response, ends the loop."""
        counters, replies = self._engine.counters, self._engine.runner.replies
        assert replies is not None, "a reply is on its way"
        item.stream.follow_cancel()
        if item.void or len(self._engine._sessions) != 1:
            replies.stop()
        tokens, over = replies.read()
        for token in tokens:
            if not item.void:
                item.stream.commit_reply(item, token)
                counters.text_tokens += 1
                counters.rows += 1
        if over:
            self._reply = None
            if not item.void:
                item.stream.end_reply(item)
        return 1
