"""The schedule of a step: right under any delays, proven in order, none of its events superfluous."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastloop.engine import streams as schedule
from fastloop.engine.stream_simulation import Entry, SimulatedStreams, hazards
from fastloop.engine.streams import COPY, DECODE, PERCEIVE, STATE, CudaStreams, HostStreams, Streams

INITIAL = {*STATE, "mel state", schedule.tokens(0)}
seeds = st.integers(0, 2**32 - 1)


class Pipeline:
    """A toy of the runner: numbers for buffers, and a state in which any wrong order would show."""

    def __init__(self, streams: Streams) -> None:
        self.streams = streams
        self.memory: dict[str, int] = defaultdict(int, mel=1, pages=1)  # 0: nobody has written it
        self.results: list[int] = []
        self.rounds, self.steps = 0, 0
        self.waiting: deque[int] = deque()

    def hear(self, pcm: int) -> None:
        m, turn = self.memory, self.rounds % 2

        def fill() -> None:
            m[f"pcm staging {turn}"] = pcm

        def upload() -> None:
            m[f"pcm {turn}"] = m[f"pcm staging {turn}"]

        def mel() -> None:
            m["mel"] = hash((m["mel"], m[f"pcm {turn}"]))
            m["frames"] = m["mel"]

        self.rounds += 1
        number = self.rounds
        schedule.hear(self.streams, turn, fill, upload, mel)
        schedule.encode(self.streams, number, lambda: m.update({f"tokens {number}": m["frames"]}))

    def prefix(self, value: int) -> None:
        m = self.memory
        schedule.prepare(self.streams, "prefill", lambda: m.update(pages=hash((m["pages"], value))))

    def submit(self, batch: int) -> None:
        m, turn, group = self.memory, self.steps % 2, self.rounds

        def fill() -> None:
            m[f"staging {turn}"] = batch

        def upload() -> None:
            m[f"inputs {turn}"] = hash((m[f"staging {turn}"], m[f"tokens {group}"]))

        def step() -> None:
            m["pages"] = m[f"results {turn}"] = hash((m["pages"], m[f"inputs {turn}"]))

        def download() -> None:
            m[f"ring {turn}"] = m[f"results {turn}"]

        self.steps += 1
        self.waiting.append(turn)
        schedule.submit(self.streams, turn, group, fill, upload, step, download)

    def collect(self) -> None:
        turn = self.waiting.popleft()
        schedule.collect(self.streams, turn, lambda: self.results.append(self.memory[f"ring {turn}"]))


def play(streams: Streams, script: Sequence[tuple[int, bool]]) -> list[int]:
    """A script of steps: (rounds of chunks before it, a new prefix before it); the host is one step ahead."""
    pipeline = Pipeline(streams)
    for number, (rounds, prefix) in enumerate(script):
        for i in range(rounds):
            pipeline.hear(100 * number + i)
        if prefix:
            pipeline.prefix(number)
        if len(pipeline.waiting) == 2:
            pipeline.collect()
        pipeline.submit(number)
    while pipeline.waiting:
        pipeline.collect()
    return pipeline.results


scripts = st.lists(st.tuples(st.integers(0, 3), st.booleans()), min_size=1, max_size=12)
SCRIPT = [(1, False), (3, True), (0, False), (2, False), (1, True), (1, False), (2, True), (3, False)]


@given(seed=seeds, script=scripts)
def test_any_delays_give_what_no_delays_give(seed: int, script: list[tuple[int, bool]]) -> None:
    streams = SimulatedStreams(seed)
    assert play(streams, script) == play(HostStreams(), script)
    assert hazards(streams.log, INITIAL) == []


def test_a_seed_is_a_run() -> None:
    logs = []
    for _ in range(2):
        streams = SimulatedStreams(7)
        play(streams, SCRIPT)
        logs.append((streams.log, streams._now))
    assert logs[0] == logs[1]


def test_steps_overlap() -> None:
    """While step n runs, mel of step n + 1 does: the schedule does not put the streams in one row."""
    log = SimulatedStreams(0)
    play(log, SCRIPT)
    order = [(e.call, e.name) for e in log.log]
    first_read = order.index(("host", "read ring"))
    assert order[:first_read].count(("launch", "step")) == 2
    unordered = hazards(_with_probe(log.log), INITIAL)
    assert any("probe" in found for found in unordered)


def _with_probe(log: list[Entry]) -> list[Entry]:
    """Let `mel` and `step` write one buffer: a hazard shows that they are free to overlap."""
    return [
        Entry(e.call, e.agent, e.name, e.reads, (*e.writes, "probe")) if e.name in ("mel", "step") else e
        for e in log
    ]


class Forgetful(SimulatedStreams):
    """Leaves out every wait (of a stream or the host) for one kind of event."""

    def __init__(self, seed: int, agent: str, event: str) -> None:
        super().__init__(seed)
        self._forgets = agent, event

    def wait(self, stream: str, event: str) -> None:
        if (stream, event.rstrip(" 01")) != self._forgets:
            super().wait(stream, event)

    def synchronize(self, event: str) -> None:
        if ("host", event.rstrip(" 01")) != self._forgets:
            super().synchronize(event)


WAITS = [
    ("host", "pcm copied"),
    ("host", "decoded"),
    (COPY, "pcm heard"),
    (COPY, "perceived"),
    (PERCEIVE, "pcm copied"),
    (DECODE, "copied"),
]


def test_all_waits_are_known() -> None:
    streams = SimulatedStreams(0)
    play(streams, SCRIPT)
    waits = {(e.agent, e.name.rstrip(" 01")) for e in streams.log if e.call in ("wait", "synchronize")}
    assert waits == set(WAITS)


@pytest.mark.parametrize(("agent", "event"), WAITS)
def test_a_missing_event_is_caught(agent: str, event: str) -> None:
    """Each wait is needed: without it the proof names a hazard, and some delays give another result."""
    streams = Forgetful(0, agent, event)
    play(streams, SCRIPT)
    assert hazards(streams.log, INITIAL)
    right = play(HostStreams(), SCRIPT)
    assert any(play(Forgetful(seed, agent, event), SCRIPT) != right for seed in range(300))


def test_a_step_that_is_submitted_before_its_ring_was_read_is_caught() -> None:
    streams = SimulatedStreams(0)
    pipeline = Pipeline(streams)
    for number in range(3):
        pipeline.submit(number)
    found = hazards(streams.log, INITIAL)
    assert any("fill batch on host overwrites staging 0, which upload batch on copy" in f for f in found)
    pipeline.collect()
    assert hazards(streams.log, INITIAL)


@pytest.mark.parametrize(
    ("calls", "told"),
    [
        ([("launch", COPY, "a", ["x"], [])], "a on copy reads x, which nobody has written"),
        (
            [("launch", COPY, "a", [], ["x"]), ("launch", DECODE, "b", ["x"], [])],
            "b on decode reads x, which a on copy may still be writing",
        ),
        (
            [
                ("launch", COPY, "a", [], ["x"]),
                ("launch", COPY, "b", ["x"], []),
                ("host", "host", "c", [], ["x"]),
            ],
            "c on host overwrites x, which b on copy may still use",
        ),
    ],
)
def test_hazards_name_buffer_and_both_works(
    calls: list[tuple[str, str, str, list[str], list[str]]], told: str
) -> None:
    log = [Entry(call, agent, name, tuple(r), tuple(w)) for call, agent, name, r, w in calls]
    assert told in hazards(log)


def test_an_event_orders_what_it_stands_behind_and_nothing_later() -> None:
    early, late = Entry("launch", COPY, "early", (), ("x",)), Entry("launch", COPY, "late", (), ("y",))
    record, wait = Entry("record", COPY, "e"), Entry("wait", DECODE, "e")
    reads = [Entry("launch", DECODE, f"reads {b}", (b,)) for b in "xy"]
    assert hazards([early, record, late, wait, *reads]) == [
        "reads y on decode reads y, which late on copy may still be writing"
    ]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_streams_run_the_schedule() -> None:
    streams = CudaStreams(torch.device("cuda"))
    assert play(streams, SCRIPT) == play(HostStreams(), SCRIPT)
