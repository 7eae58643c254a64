"""What a session says: typed events with a sequence number, an epoch and the stream time.

seq    counts the events of a session from 0, without holes in what is delivered after a cancel
epoch  counts the cancels; events of an older epoch are never delivered after a newer one
t      seconds of the stream at the end of the chunk the event belongs to
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar


@dataclass(frozen=True, slots=True)
class Event:
    type: ClassVar[str] = "event"
    seq: int
    epoch: int
    t: float

    def to_dict(self) -> dict[str, Any]:
        """Plain data, `type` first."""
        return {"type": self.type, **dataclasses.asdict(self)}


@dataclass(frozen=True, slots=True)
class Decision(Event):
    """One chunk was judged. chunk counts from 0; decision is "silent" or "respond"."""

    type: ClassVar[str] = "decision"
    chunk: int
    decision: str
    p_respond: float


@dataclass(frozen=True, slots=True)
class ResponseStart(Event):
    """A response begins; emotion is a name of the checkpoint's emotion tokens, or None."""

    type: ClassVar[str] = "response.start"
    emotion: str | None


@dataclass(frozen=True, slots=True)
class ResponseText(Event):
    """A piece of the response, whole characters."""

    type: ClassVar[str] = "response.text"
    text: str


@dataclass(frozen=True, slots=True)
class ResponseEnd(Event):
    """The whole text, and why it ended: "end" (TEXT_END), "length" or "interrupt"."""

    type: ClassVar[str] = "response.end"
    text: str
    reason: str


@dataclass(frozen=True, slots=True)
class Stalled(Event):
    """The session waits for KV pages that others hold; its queue is kept, it goes on when pages are freed."""

    type: ClassVar[str] = "stalled"
    message: str


@dataclass(frozen=True, slots=True)
class Rejected(Event):
    """`step_batch` refused this item's input; nothing of it was taken and the sequence goes on. seq is -1."""

    type: ClassVar[str] = "rejected"
    message: str


@dataclass(frozen=True, slots=True)
class Failed(Event):
    """The session ended by an error of its own (for example NaN in its logits). Its pages are freed."""

    type: ClassVar[str] = "failed"
    message: str


@dataclass(frozen=True, slots=True)
class Closed(Event):
    """The last event of a session."""

    type: ClassVar[str] = "closed"


TYPES: dict[str, type[Event]] = {
    cls.type: cls
    for cls in (Decision, ResponseStart, ResponseText, ResponseEnd, Stalled, Rejected, Failed, Closed)
}


def from_dict(values: dict[str, Any]) -> Event:
    """The inverse of `Event.to_dict`."""
    values = dict(values)
    return TYPES[values.pop("type")](**values)
