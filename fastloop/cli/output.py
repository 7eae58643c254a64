"""What `fastloop listen` prints where nobody watches: JSON lines, or lines without control characters."""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np

from ..events import Decision, Event, ResponseEnd, ResponseStart, ResponseText
from .hearing import Summary
from .terminal import one_line

ENDINGS = {"end": "", "length": " (cut at the length limit)", "interrupt": " (interrupted)"}


def record(event: Event) -> dict[str, Any] | None:
    """The line of `--json` for an event, or None for those that are not part of it."""
    head = {"type": event.type, "t": round(event.t, 3)}
    match event:
        case Decision():
            p = round(event.p_respond, 6)
            rest: dict[str, Any] = {"decision": event.decision, "p_respond": p}
            return {"type": event.type, "chunk": event.chunk, "t": head["t"], **rest}
        case ResponseStart():
            return head | {"emotion": event.emotion}
        case ResponseText():
            return head | {"text": event.text}
        case ResponseEnd():
            return head | {"text": event.text, "reason": event.reason}
    return None


class JsonOutput:
    """One object a line, flushed at once; ASCII, so that every terminal and every locale carries it."""

    def begin(self, name: str, seconds: float | None) -> None: ...

    def sound(self, block: np.ndarray) -> None: ...

    def tick(self, queued_s: float, latency_ms: float | None) -> None: ...

    def event(self, event: Event) -> None:
        values = record(event)
        if values is not None:
            self._print(values)

    def end(self, summary: Summary) -> None:
        self._print(summary.to_dict())

    def _print(self, values: dict[str, Any]) -> None:
        sys.stdout.write(json.dumps(values, allow_nan=False, separators=(",", ":")) + "\n")
        sys.stdout.flush()


class PlainOutput:
    """One line per response and one per stream; `named` puts the stream's name in front of every response."""

    def __init__(self, named: bool) -> None:
        self.named = named
        self._name = ""
        self._start: ResponseStart | None = None

    def begin(self, name: str, seconds: float | None) -> None:
        self._name, self._start = name, None

    def sound(self, block: np.ndarray) -> None: ...

    def tick(self, queued_s: float, latency_ms: float | None) -> None: ...

    def event(self, event: Event) -> None:
        if isinstance(event, ResponseStart):
            self._start = event
        elif isinstance(event, ResponseEnd):
            start, self._start = self._start, None
            line = response_line(event, start.emotion if start else None)
            self._print(f"{one_line(self._name)}: {line}" if self.named else line)

    def end(self, summary: Summary) -> None:
        self._print(summary_line(summary))

    def _print(self, line: str) -> None:
        sys.stdout.write(line + "\n")
        sys.stdout.flush()


def clock(seconds: float) -> str:
    """Stream time: 4.2 s is 0:04.2, an hour and a bit is 1:00:03.6."""
    tenths = round(seconds * 10)
    minutes, rest = divmod(tenths, 600)
    hours, minutes = divmod(minutes, 60)
    front = f"{hours}:{minutes:02}" if hours else f"{minutes}"
    return f"{front}:{rest // 10:02}.{rest % 10}"


def response_line(event: ResponseEnd, emotion: str | None) -> str:
    """When, in which mood, what."""
    mood = f"[{emotion}] " if emotion else ""
    return f"{clock(event.t):>7}  {mood}{one_line(event.text)}{ENDINGS[event.reason]}"


def summary_line(summary: Summary) -> str:
    """The stream in one line."""
    s, counts = summary, f"{_count(summary.chunks, 'chunk')}, {_count(summary.responses, 'response')}"
    latency = ""
    if s.p50_ms is not None and s.p99_ms is not None and s.max_ms is not None:
        latency = f", latency ms p50 {s.p50_ms:.1f} p99 {s.p99_ms:.1f} max {s.max_ms:.1f}"
    return f"{one_line(s.file)}: heard {s.audio_s:.1f} s in {s.wall_s:.1f} s, {counts}{latency}"


def _count(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"
