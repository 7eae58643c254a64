"""Sequences under ids of the caller's own, for servers that own the loop: `Engine.step_batch`.

    start=True opens a sequence, end=True ends its sound; in between and with either comes sound of any length

Every call returns what each sequence said. A sequence that has ended is worked off and then closed; until
then, where `max_steps` cut a call short, its events come with the later calls. The last one is `Closed`.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..config import SAMPLE_RATE
from ..errors import FastloopError
from ..events import Event, Rejected
from ..options import SessionConfig
from .session import Session

if TYPE_CHECKING:
    from .engine import Engine


@dataclass(frozen=True)
class StepItem:
    """One sequence's part of `Engine.step_batch`: a caller's id, some sound, and where it starts and ends."""

    id: Hashable
    pcm: Any = None
    start: bool = False
    end: bool = False
    sample_rate: int = SAMPLE_RATE
    config: SessionConfig | None = None


class Sequences:
    """The sequences of one engine. Calls come one at a time, from the thread that owns the loop."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._open: dict[Hashable, Session] = {}
        self._ended: set[Hashable] = set()  # no sound comes any more; closed when they are worked off

    def step(self, items: Sequence[StepItem], max_steps: int | None) -> list[tuple[Hashable, list[Event]]]:
        """See `Engine.step_batch`."""
        refused = [self._take(item) for item in items]
        steps = 0
        while (max_steps is None or steps < max_steps) and self._engine.step():
            steps += 1
        results = [(item.id, no + self._events(item.id)) for item, no in zip(items, refused, strict=True)]
        late = self._ended - {item.id for item in items}
        return results + [(name, said) for name in late if (said := self._events(name))]

    def clear(self) -> None:
        """Forget all sequences; their sessions are closed by the engine."""
        self._open.clear()
        self._ended.clear()

    def _take(self, item: StepItem) -> list[Event]:
        """Open, push and end as the item says; what is wrong with it, as an event, or nothing."""
        problems = []
        for act in (self._start, self._push, self._end):
            try:
                act(item)
            except (FastloopError, ValueError, TypeError) as error:
                problems.append(str(error))
                if act == self._start:
                    break
        session = self._open.get(item.id)
        message, t = f"step_batch: {'; '.join(problems)}", session.t if session else 0.0
        return [Rejected(seq=-1, epoch=0, t=t, message=message)] if problems else []

    def _start(self, item: StepItem) -> None:
        if item.start:
            if item.id in self._open:
                raise FastloopError(f"sequence {item.id!r} was started before and has not been closed")
            self._open[item.id] = self._engine.open(item.config)
        elif item.id not in self._open:
            raise FastloopError(f"sequence {item.id!r} is unknown; its first item needs start=True")
        elif item.id in self._ended and item.pcm is not None:
            raise FastloopError(f"sequence {item.id!r} has ended and takes no more sound; choose another id")

    def _push(self, item: StepItem) -> None:
        if item.pcm is not None:
            self._open[item.id].push(item.pcm, item.sample_rate)

    def _end(self, item: StepItem) -> None:
        if item.end:
            self._ended.add(item.id)
            self._open[item.id].flush()

    def _events(self, name: Hashable) -> list[Event]:
        """What a sequence has to say; one that is worked off or has failed is closed and forgotten."""
        session = self._open.get(name)
        if session is None:
            return []
        events = session.poll()
        if name in self._ended and session.idle:
            session.close()
            events += session.poll()
        if session.closed:
            del self._open[name]
            self._ended.discard(name)
        return events
