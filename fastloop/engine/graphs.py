"""Graphs of a runner: work captured once on padding, then replayed on what its fixed buffers hold.

On a GPU a graph is a torch.cuda.CUDAGraph; on the CPU it is the recorder's tape, which refuses what a graph
could not do (fastloop.engine.recorder). The graphs of one stream share one memory pool, for they run one
after another and none keeps anything there; streams overlap, so each has a pool of its own.
FASTLOOP_CAPTURE=0 runs the same work op by op. No global state of torch is changed.

One graph of the process is captured at a time, whichever engine and thread wants it: a capture begins and
ends with a wait for its whole device, which CUDA refuses while another one is on its way there. For as long
it also refuses torch.cuda.synchronize() of the program around it; events and streams may be awaited. Python's
garbage collector waits until the capture has ended (`uncollected`).

Kernels of a graph may start before the one in front of them has ended, and ask for their weights meanwhile
(fastloop.ops.dependent; sm_90 and newer; FASTLOOP_DEPENDENT=0 forbids it). No work that is captured writes a
weight: they are its `constants`, and the recorder refuses work that writes one. Between graphs nothing
overlaps, and a loop's body is captured without it.
"""

from __future__ import annotations

import contextlib
import gc
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ..config import ConfigError
from ..ops.dependent import dependent_launches
from . import streams as schedule
from .conditional import capture_loop
from .recorder import CaptureError, Span, record
from .streams import STREAMS, Streams

_CAPTURING = threading.Lock()
WARM_UPS = 2  # of work before it is captured: libraries allocate and kernels compile in the first calls


class Graph(Protocol):
    def replay(self) -> None: ...


@dataclass
class _Eager:
    """What takes the place of a graph when capturing is switched off."""

    replay: Callable[[], None]


def capture_enabled() -> bool:
    """FASTLOOP_CAPTURE: "1" (default) captures, "0" runs every step op by op."""
    return _switch("FASTLOOP_CAPTURE", "1")


def dependent_enabled() -> bool:
    """FASTLOOP_DEPENDENT: "1" (default) lets kernels of a graph overlap, "0" does not."""
    return _switch("FASTLOOP_DEPENDENT", "1")


def _switch(name: str, default: str) -> bool:
    value = os.environ.get(name, default)
    if value not in ("0", "1"):
        raise ConfigError(f"{name}: must be 0 or 1, got {value!r}")
    return value == "1"


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Inside, no garbage of the process is collected by itself: that of an engine holds graphs and events,
    and if the thread that captures destroys one, CUDA ends the capture with an error. What other threads drop
    meanwhile, they destroy themselves, which is allowed.
    """
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


class Graphs:
    """What captures for the streams of one runner."""

    def __init__(self, device: torch.device, streams: Streams) -> None:
        self.enabled, self._dependent = capture_enabled(), dependent_enabled()
        self._streams, self._device = streams, device
        self._on_gpu = device.type == "cuda"
        with_pools = self._on_gpu and self.enabled
        self._pools = {name: torch.cuda.graph_pool_handle() if with_pools else None for name in STREAMS}

    def make(
        self, stream: str, work: Callable[[], None], static: Mapping[str, Tensor], constants: Iterable[Tensor]
    ) -> Graph:
        """The graph of `work`, which runs now, once or more, on what the buffers hold: padding.

        static: buffers of fixed address that the work may read and write; constants: those it may only read.
        CaptureError on the CPU where no graph could capture it.
        """
        self._await_buffers()
        work = self._overlapping(work)
        if not self.enabled:
            return _Eager(work)
        graphs: list[Graph] = []

        def capture() -> None:
            if self._on_gpu:
                graphs.append(capture_cuda(work, self._pools[stream]))
            else:
                graphs.append(capture_tape(work, static, constants))

        with _CAPTURING, uncollected():
            schedule.capture(self._streams, stream, capture)
        return graphs[0]

    def make_loop(
        self,
        stream: str,
        body: Callable[[], None],
        condition: Tensor,
        static: Mapping[str, Tensor],
        constants: Iterable[Tensor],
    ) -> Graph:
        """The graph that runs `body` once and then as long as it leaves `condition` (int32 [1]) not zero.

        The body runs now as in `make`; CaptureError on the CPU also where it does not write the condition.
        """
        self._await_buffers()
        if not self.enabled:
            return Loop(_Eager(body), condition)
        graphs: list[Graph] = []

        def capture() -> None:
            if self._on_gpu:
                for _ in range(WARM_UPS):
                    body()
                graphs.append(capture_loop(body, condition, torch.cuda.MemPool()))
            else:
                graphs.append(loop_tape(body, condition, static, constants))

        with _CAPTURING, uncollected():
            schedule.capture(self._streams, stream, capture)
        return graphs[0]

    def _overlapping(self, work: Callable[[], None]) -> Callable[[], None]:
        """The work with dependent launches, if they are wanted: a graph keeps how kernels were launched."""

        def inside() -> None:
            with dependent_launches(True):
                work()

        return inside if self._dependent else work

    def _await_buffers(self) -> None:
        """What the caller has queued on its own stream, the filling of new buffers, comes before their graph.

        Once per graph, as capturing waits for the device anyway.
        """
        if self._on_gpu:
            torch.cuda.current_stream(self._device).synchronize()


@dataclass(frozen=True)
class Loop:
    """A loop without a GPU: what a WHILE node does. Nobody but it reads the condition."""

    body: Graph
    condition: Tensor  # int32 [1]

    def replay(self) -> None:
        self.body.replay()
        while int(self.condition):
            self.body.replay()


def loop_tape(
    body: Callable[[], None], condition: Tensor, static: Mapping[str, Tensor], constants: Iterable[Tensor]
) -> Loop:
    """The recorder's tape of a loop's body; CaptureError where it leaves the condition as it was."""
    with record(static, constants) as recorder:
        body()
    if not any(Span.of(condition) in launch.writes for launch in recorder.tape.launches):
        raise CaptureError("the body of a loop does not write its condition: it would never end")
    return Loop(recorder.tape, condition)


def capture_tape(
    work: Callable[[], None], static: Mapping[str, Tensor], constants: Iterable[Tensor]
) -> Graph:
    """The recorder's tape of some work on the CPU; CaptureError where no graph could capture it."""
    with record(static, constants) as recorder:
        work()
    return recorder.tape


def capture_cuda(work: Callable[[], None], pool: Any) -> Graph:
    """The CUDA graph of some work, captured on the current stream (not the default one).

    Other threads of the process may go on using the GPU while it is captured.
    """
    for _ in range(WARM_UPS):
        work()
    graph, here = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    with torch.cuda.graph(graph, pool=pool, stream=here, capture_error_mode="thread_local"):
        work()
    return graph
