"""Any sequence of calls: the books balance after each, and every session says what the plain loop says."""

from __future__ import annotations

import contextlib
import functools
from dataclasses import dataclass, field, replace

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from fastloop.checkpoint import Model
from fastloop.config import small
from fastloop.engine import Engine, Session
from fastloop.engine.kv_cache import pages_for
from fastloop.errors import CapacityError, QueueFullError, SessionClosedError
from fastloop.events import Event, ResponseEnd
from fastloop.options import DecisionPolicy, EngineConfig, Sampling, SessionConfig
from fastloop.testing.cases import random_model, random_sound
from fastloop.testing.drive import Script, chances, comparable, expected, lively_policy

SLOTS, PAGES = 3, 48
LONGEST_S = 6.0  # of sound in one session
SOUND = random_sound(20.0, seed=12)


@functools.cache
def model() -> Model:
    return random_model(small(layers=1), seed=3)


@functools.cache
def policy() -> DecisionPolicy:
    return lively_policy(model())


@dataclass
class Heard:
    """A session, what it was given, and what it has said."""

    session: Session
    pcm: list[np.ndarray] = field(default_factory=list)
    cancels: dict[int, int] = field(default_factory=dict)  # response -> tokens it had when it was cancelled
    events: list[Event] = field(default_factory=list)
    promised: bool = True  # it can never lack pages

    @property
    def samples(self) -> int:
        return sum(map(len, self.pcm))

    def poll(self) -> None:
        self.events += self.session.poll()

    def copy(self, session: Session) -> Heard:
        return replace(
            self, session=session, pcm=[*self.pcm], cancels={**self.cancels}, events=[*self.events]
        )


class Calls(RuleBasedStateMachine):
    """Sessions of one engine whose pool does not hold all that could be asked for."""

    runner = "auto"

    @initialize(page=st.sampled_from([5, 16]))
    def begin(self, page: int) -> None:
        pages = PAGES * 16 // page
        self.engine = Engine(
            model(),
            EngineConfig(max_sessions=SLOTS, kv_pages=pages, page_tokens=page, runner=self.runner),
        )
        self.live: list[Heard] = []
        self.saved: list[tuple[bytes, Heard]] = []

    def pick(self, which: int) -> Heard:
        return self.live[which % len(self.live)]

    @rule(
        window=st.sampled_from([None, 0.4, 2.0, 10.0]),
        speculative=st.integers(1, 9),
        tokens=st.sampled_from([1, 2, 12, 30]),
        temperature=st.sampled_from([0.0, 1.2]),
        seed=st.integers(0, 99),
        prompt=st.sampled_from(["", "a prompt of another length"]),
    )
    def open(
        self, window: float | None, speculative: int, tokens: int, temperature: float, seed: int, prompt: str
    ) -> None:
        config = SessionConfig(
            policy=policy(),
            window_s=window,
            speculative_chunks=speculative,
            max_response_tokens=tokens,
            sampling=Sampling(temperature),
            seed=seed,
            system_prompt=prompt,
            max_queued_s=3.0,
        )
        try:
            self.live.append(Heard(self.engine.open(config), promised=window is not None))
        except CapacityError:
            prefix = pages_for(self.engine._prompt_tokens(config)[0], self.engine.config.page_tokens)
            short = self.engine.cache.allocator.available < self.engine._quota(config) + prefix
            assert short or len(self.live) == SLOTS

    @precondition(lambda self: self.live)
    @rule(which=st.integers(0, 9), samples=st.integers(0, 40_000), steps=st.integers(0, 3))
    def push(self, which: int, samples: int, steps: int) -> None:
        self.push_to(self.pick(which), samples)
        self.step(steps)

    @precondition(lambda self: self.live)
    @rule(samples=st.integers(3_000, 40_000), steps=st.integers(0, 9), cancel=st.booleans())
    def push_to_all(self, samples: int, steps: int, cancel: bool) -> None:
        for heard in self.live:
            self.push_to(heard, samples)
        self.step(steps)
        if cancel and any(heard.session.responding for heard in self.live):
            self.cancel(0)

    def push_to(self, heard: Heard, samples: int) -> None:
        start = heard.samples
        piece = SOUND[start : start + min(samples, round(LONGEST_S * 16_000) - start)]
        before = heard.session.queued_seconds
        try:
            heard.session.push(piece)
            heard.pcm.append(piece)
        except QueueFullError:
            assert before + len(piece) / 16_000 > 3.0 and heard.session.queued_seconds == before

    @precondition(lambda self: self.live)
    @rule(which=st.integers(0, 9))
    def flush(self, which: int) -> None:
        heard = self.pick(which)
        heard.session.flush()
        heard.pcm.append(np.zeros(-heard.samples % 6400, np.float32))

    @rule(times=st.integers(1, 12))
    def step(self, times: int) -> None:
        for _ in range(times):
            self.engine.step()

    @precondition(lambda self: self.live)
    @rule(which=st.integers(0, 9))
    def poll(self, which: int) -> None:
        self.pick(which).poll()

    @precondition(lambda self: any(heard.session.responding for heard in self.live))
    @rule(which=st.integers(0, 9))
    def cancel(self, which: int) -> None:
        responding = [heard for heard in self.live if heard.session.responding]
        heard = responding[which % len(responding)]
        heard.poll()  # what was said is taken, so nothing is withdrawn
        spoken = heard.session.stream.spoken
        assert heard.session.cancel() and not heard.session.cancel()
        heard.cancels[sum(isinstance(e, ResponseEnd) for e in heard.events)] = spoken

    @precondition(lambda self: self.live)
    @rule(which=st.integers(0, 9))
    def fork(self, which: int) -> None:
        heard = self.pick(which)
        with contextlib.suppress(CapacityError):
            self.live.append(heard.copy(heard.session.fork()))

    @precondition(lambda self: self.live)
    @rule(which=st.integers(0, 9))
    def snapshot(self, which: int) -> None:
        heard = self.pick(which)
        self.saved = [*self.saved[-3:], (heard.session.snapshot(), heard.copy(heard.session))]

    @precondition(lambda self: self.saved)
    @rule(which=st.integers(0, 9))
    def restore(self, which: int) -> None:
        data, heard = self.saved[which % len(self.saved)]
        with contextlib.suppress(CapacityError):
            self.live.append(heard.copy(self.engine.restore(data)))

    @precondition(lambda self: self.live)
    @rule(which=st.integers(0, 9))
    def close(self, which: int) -> None:
        heard = self.live.pop(which % len(self.live))
        heard.session.close()
        heard.session.close()
        heard.poll()
        assert heard.events[-1].type == "closed"
        try:
            heard.session.push(SOUND[:10])
        except SessionClosedError:
            return
        raise AssertionError("a closed session took sound")

    @invariant()
    def balanced(self) -> None:
        if hasattr(self, "engine"):
            self.engine.check()

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        self.engine.run_until_idle()
        for heard in self.live:
            heard.poll()
            self.check_said(heard)
        self.engine.close()
        self.engine.check()
        assert self.engine.cache.allocator.used == 0 and self.engine.cache.allocator.promised == 0
        assert self.engine._free_slots and len(self.engine._free_slots) == SLOTS

    def check_said(self, heard: Heard) -> None:
        pcm = np.concatenate([*heard.pcm, np.empty(0, np.float32)])
        want = expected(model(), Script(heard.session.config, pcm, heard.cancels))
        got = [e for e in heard.events if e.type != "stalled"]
        assert heard.promised <= (len(got) == len(heard.events)), "a session with a window stalled"
        if heard.session.stalled:
            want = want[: len(got)]
        assert comparable(got) == comparable(want)
        assert np.abs(chances(got) - chances(want)).max(initial=0) <= 1e-5
        assert all(a.seq < b.seq for a, b in zip(heard.events, heard.events[1:], strict=False))


TestCalls = Calls.TestCase
TestCalls.settings = settings(max_examples=60, stateful_step_count=50)


class CallsAhead(Calls):
    """The same with steps on their way between any two calls."""

    runner = "captured"


TestCallsAhead = CallsAhead.TestCase
TestCallsAhead.settings = settings(max_examples=20, stateful_step_count=50)
