"""The schedule of a step over three streams and their events, written once for every kind of stream.

    host      fill pcm        fill batch                                             read ring (one step late)
    copy          \\- upload pcm    \\- upload batch, tokens                             /
    perceive            \\- mel, encoder -/     \\                                      /
    decode                                      \\- step n - download to the ring ----/

Each buffer exists twice and is used in turn, so the host fills for step n + 1 while step n runs. Streams meet
at events alone, never at a synchronisation of the device. The rule that saves two more events: the result of
step n is collected before step n + 2 is submitted, so whoever fills a set knows that its last reader is done.

CudaStreams runs it on a GPU, HostStreams at once, SimulatedStreams (fastloop.engine.stream_simulation) with
random delays.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch

COPY, PERCEIVE, DECODE = "copy", "perceive", "decode"
STREAMS = (COPY, PERCEIVE, DECODE)
STATE = ("pages", "decision state", "last tokens")  # what steps leave for steps; mel state is perceive's own

Work = Callable[[], None]


class Streams(Protocol):
    """Three queues of work. Buffers are named for whoever checks the order; names cost nothing."""

    def launch(
        self, stream: str, name: str, work: Work, reads: Sequence[str] = (), writes: Sequence[str] = ()
    ) -> None:
        """Queue work on a stream."""

    def record(self, stream: str, event: str) -> None:
        """The event is what the stream has been given so far; it replaces the last one of this name."""

    def wait(self, stream: str, event: str) -> None:
        """What the stream is given from now on waits for the event; one never recorded is over."""

    def synchronize(self, event: str) -> None:
        """The host waits for the event."""

    def done(self, event: str) -> bool:
        """Whether the event is over; nothing is awaited."""

    def host(self, name: str, work: Work, reads: Sequence[str] = (), writes: Sequence[str] = ()) -> None:
        """The host's own work on buffers, now."""


class HostStreams:
    """No streams: whatever is launched has run when the call returns."""

    def launch(
        self, stream: str, name: str, work: Work, reads: Sequence[str] = (), writes: Sequence[str] = ()
    ) -> None:
        work()

    def record(self, stream: str, event: str) -> None: ...

    def wait(self, stream: str, event: str) -> None: ...

    def synchronize(self, event: str) -> None: ...

    def done(self, event: str) -> bool:
        return True

    def host(self, name: str, work: Work, reads: Sequence[str] = (), writes: Sequence[str] = ()) -> None:
        work()


class CudaStreams:
    """Streams of a GPU, all three our own, so a server's streams are neither waited for nor held up.

    What was queued on the caller's current stream before (weights, pages, states) comes before everything.
    """

    def __init__(self, device: torch.device) -> None:
        self._own = {name: torch.cuda.Stream(device) for name in STREAMS}
        self._events: dict[str, torch.cuda.Event] = {}
        for stream in self._own.values():
            stream.wait_stream(torch.cuda.current_stream(device))

    def launch(
        self, stream: str, name: str, work: Work, reads: Sequence[str] = (), writes: Sequence[str] = ()
    ) -> None:
        with torch.cuda.stream(self._own[stream]):
            work()

    def record(self, stream: str, event: str) -> None:
        self._events.setdefault(event, torch.cuda.Event()).record(self._own[stream])

    def wait(self, stream: str, event: str) -> None:
        if event in self._events:
            self._own[stream].wait_event(self._events[event])

    def synchronize(self, event: str) -> None:
        if event in self._events:
            self._events[event].synchronize()

    def done(self, event: str) -> bool:
        return event not in self._events or self._events[event].query()

    def host(self, name: str, work: Work, reads: Sequence[str] = (), writes: Sequence[str] = ()) -> None:
        work()


def hear(streams: Streams, turn: int, fill: Work, upload: Work, perceive: Work) -> None:
    """PCM of one round of chunks: into the staging buffer of this turn, up, through `perceive` (mel)."""
    staging, pcm = f"pcm staging {turn}", f"pcm {turn}"
    copied, heard = f"pcm copied {turn}", f"pcm heard {turn}"
    streams.synchronize(copied)  # the round before last has left the staging buffer
    streams.host("fill pcm", fill, writes=[staging])
    streams.wait(COPY, heard)  # and was heard
    streams.launch(COPY, "upload pcm", upload, reads=[staging], writes=[pcm])
    streams.record(COPY, copied)
    streams.wait(PERCEIVE, copied)
    streams.launch(PERCEIVE, "mel", perceive, reads=[pcm, "mel state"], writes=["mel state", "frames"])
    streams.record(PERCEIVE, heard)


def encode(streams: Streams, number: int, work: Work) -> None:
    """All frames heard so far -> the `number`-th group of audio tokens, in memory of its own."""
    streams.launch(PERCEIVE, "encoder", work, reads=["frames"], writes=["encoded", tokens(number)])


def clip(streams: Streams, number: int, work: Work) -> None:
    """A finished clip -> the `number`-th group of audio tokens."""
    streams.launch(PERCEIVE, "clip", work, writes=[tokens(number)])


def begin(streams: Streams, name: str, work: Work) -> None:
    """Work on the mel state outside a round of chunks."""
    streams.launch(PERCEIVE, name, work, reads=["mel state"], writes=["mel state"])


def tokens(number: int) -> str:
    """The name of the `number`-th group of audio tokens; group 0 is empty."""
    return f"tokens {number}"


def prepare(streams: Streams, name: str, work: Work) -> None:
    """Work on what steps leave for steps (a prefix, a window), behind all steps so far, before the next one.

    It is decode's own, so that it never holds perceive up.
    """
    streams.launch(DECODE, name, work, reads=STATE, writes=STATE)


def settle(streams: Streams, name: str, work: Work) -> None:
    """Work on any state, behind everything so far and before anything later; the host waits for it."""
    everything = (*STATE, "mel state")
    streams.record(PERCEIVE, "perceived")
    streams.wait(DECODE, "perceived")
    streams.launch(DECODE, name, work, reads=everything, writes=everything)
    streams.record(DECODE, "settled")
    streams.synchronize("settled")


def capture(streams: Streams, stream: str, work: Work) -> None:
    """Run and capture a graph on padding, on the stream it is for; the host waits, once per graph."""
    own = STATE if stream == DECODE else ("mel state", "frames", "encoded")
    streams.launch(stream, "capture", work, writes=own)
    streams.record(stream, "captured")
    streams.synchronize("captured")


def submit(
    streams: Streams, turn: int, group: int, fill: Work, upload: Work, step: Work, download: Work
) -> None:
    """One step of the decoder, whose audio tokens are in groups up to `group`.

    The result of the step before last must have been collected.
    """
    staging, inputs, results, ring = (f"{name} {turn}" for name in ("staging", "inputs", "results", "ring"))
    streams.host("fill batch", fill, writes=[staging])
    streams.record(PERCEIVE, "perceived")
    streams.wait(COPY, "perceived")
    streams.launch(COPY, "upload batch", upload, reads=[staging, tokens(group)], writes=[inputs])
    streams.record(COPY, f"copied {turn}")
    streams.wait(DECODE, f"copied {turn}")
    streams.launch(DECODE, "step", step, reads=[inputs, *STATE], writes=[*STATE, results])
    streams.launch(DECODE, "download", download, reads=[results], writes=[ring])
    streams.record(DECODE, f"decoded {turn}")


def collect(streams: Streams, turn: int, read: Work) -> None:
    """Wait for the step submitted in this turn and read its result."""
    streams.synchronize(f"decoded {turn}")
    streams.host("read ring", read, reads=[f"ring {turn}"])


def reply(streams: Streams, fill: Work, upload: Work, run: Work) -> None:
    """A whole response as one launch: it hands over its tokens as it draws them. One at a time."""
    streams.host("fill reply", fill, writes=["reply staging"])
    streams.launch(COPY, "upload reply", upload, reads=["reply staging"], writes=["reply inputs"])
    streams.record(COPY, "reply copied")
    streams.wait(DECODE, "reply copied")
    streams.launch(
        DECODE, "reply", run, reads=["reply inputs", *STATE], writes=["reply inputs", *STATE, "reply ring"]
    )
    streams.record(DECODE, "replied")
