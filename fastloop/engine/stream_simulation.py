"""Streams without a GPU: simulated ones with random delays, and the proof that a schedule is in order.

    SimulatedStreams(seed)   runs the work of a schedule as badly timed as streams and events allow
    hazards(log)             happens-before over streams, events and host: each access that is not in order

The simulation shows what goes wrong in one run; the proof holds for every run. A work takes effect at one
random instant between its start and its end.
"""

from __future__ import annotations

import heapq
import random
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from .streams import PERCEIVE, STREAMS, Work

HOST = "host"
Clock = dict[str, int]  # agent -> how much of its work is known to be done


@dataclass(frozen=True)
class Entry:
    """One call of a schedule, in the order in which the host made them."""

    call: str  # "launch", "record", "wait", "synchronize" or "host"
    agent: str  # a stream, or HOST
    name: str  # of the work or of the event
    reads: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()


class SimulatedStreams:
    """Streams in simulated time. Delays are drawn from `seed`; the same seed gives the same run."""

    def __init__(self, seed: int) -> None:
        self.log: list[Entry] = []
        self._random = random.Random(seed)
        self._now = 0.0  # the host's clock
        self._free = dict.fromkeys(STREAMS, 0.0)  # when each stream has done what it was given
        self._events: dict[str, float] = {}
        self._pending: list[tuple[float, int, Work]] = []  # by the instant of their effect

    def launch(
        self, stream: str, name: str, work: Work, reads: Sequence[str] = (), writes: Sequence[str] = ()
    ) -> None:
        self.log.append(Entry("launch", stream, name, tuple(reads), tuple(writes)))
        start = max(self._free[stream], self._now)
        end = self._free[stream] = start + self._random.expovariate(1.0)
        heapq.heappush(self._pending, (self._random.uniform(start, end), len(self.log), work))

    def record(self, stream: str, event: str) -> None:
        self.log.append(Entry("record", stream, event))
        self._events[event] = self._free[stream]

    def wait(self, stream: str, event: str) -> None:
        self.log.append(Entry("wait", stream, event))
        self._free[stream] = max(self._free[stream], self._events.get(event, 0.0))

    def synchronize(self, event: str) -> None:
        self.log.append(Entry("synchronize", HOST, event))
        self._advance(self._events.get(event, 0.0))

    def done(self, event: str) -> bool:
        self._advance(self._now + self._random.expovariate(2.0))
        over = self._events.get(event, 0.0) <= self._now
        if over:  # who has seen that it is over knows what it knows
            self.log.append(Entry("synchronize", HOST, event))
        return over

    def host(self, name: str, work: Work, reads: Sequence[str] = (), writes: Sequence[str] = ()) -> None:
        self.log.append(Entry("host", HOST, name, tuple(reads), tuple(writes)))
        self._advance(self._now + self._random.expovariate(2.0))
        work()

    def _advance(self, until: float) -> None:
        """The host's clock moves on; what takes effect until then does so, in the order of time."""
        self._now = max(self._now, until)
        while self._pending and self._pending[0][0] <= self._now:
            heapq.heappop(self._pending)[2]()


class BlockingStreams(SimulatedStreams):
    """Simulated, but work on `perceive` is done when the call returns: its results go to the caller at once.

    On a GPU a tensor can be handed on before it is computed; in the simulation it cannot.
    """

    def launch(
        self, stream: str, name: str, work: Work, reads: Sequence[str] = (), writes: Sequence[str] = ()
    ) -> None:
        super().launch(stream, name, work, reads, writes)
        if stream == PERCEIVE:
            self._advance(self._free[PERCEIVE])


@dataclass(frozen=True)
class _Access:
    """One work's use of a buffer: the `count`-th work of its agent."""

    agent: str
    count: int
    name: str

    def before(self, clock: Clock) -> bool:
        return clock.get(self.agent, 0) >= self.count

    def __str__(self) -> str:
        return f"{self.name} on {self.agent}"


def hazards(log: Iterable[Entry], initial: Collection[str] = ()) -> list[str]:
    """Every access of a buffer that no chain of streams, events and host orders behind what it must follow.

    A read must follow the last write (buffers of `initial` hold something from the start), a write the last
    write and all reads since. Vector clocks: Fidge 1988, Mattern 1989.
    """
    clocks: dict[str, Clock] = defaultdict(dict)
    events: dict[str, Clock] = {}
    writes: dict[str, _Access] = {}
    reads: dict[str, list[_Access]] = defaultdict(list)
    found = []
    for entry in log:
        clock = clocks[entry.agent]
        _merge(clock, clocks[HOST])  # the host has made this call after all it did and knows
        if entry.call == "record":
            events[entry.name] = dict(clock)
        elif entry.call in ("wait", "synchronize"):
            _merge(clock, events.get(entry.name, {}))
        else:
            access = _Access(entry.agent, clock.get(entry.agent, 0) + 1, entry.name)
            for buffer in entry.reads:
                found += _check_read(buffer, access, clock, writes, initial)
            for buffer in entry.writes:
                known = [*reads[buffer], *filter(None, [writes.get(buffer)])]
                late = [other for other in known if not other.before(clock)]
                found += [f"{access} overwrites {buffer}, which {other} may still use" for other in late]
            clock[entry.agent] = access.count
            for buffer in entry.reads:
                reads[buffer].append(access)
            for buffer in entry.writes:
                writes[buffer], reads[buffer] = access, []
    return found


def _check_read(
    buffer: str, access: _Access, clock: Clock, writes: dict[str, _Access], initial: Collection[str]
) -> list[str]:
    writer = writes.get(buffer)
    if writer is None:
        return [] if buffer in initial else [f"{access} reads {buffer}, which nobody has written"]
    if writer.before(clock):
        return []
    return [f"{access} reads {buffer}, which {writer} may still be writing"]


def _merge(clock: Clock, other: Clock) -> None:
    for agent, count in other.items():
        clock[agent] = max(clock.get(agent, 0), count)
