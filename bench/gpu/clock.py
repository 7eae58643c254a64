"""Times on a GPU: calls in one captured graph, replayed between events; on the CPU (dry runs) plain calls."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch

from fastloop.testing.timing import Timing

Call = Callable[[], object]
MOST_CALLS = 64  # of one graph
SHORT_S = 5e-5  # a graph of less than this is over before the host has launched the next one


def capture(calls: Sequence[Call]) -> Callable[[], None]:
    """A graph of the calls, one after the other; the returned function replays it."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side), torch.inference_mode():
        for call in calls:  # kernels are compiled, tables made
            call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.inference_mode(), torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph.replay


def replays(replay: Callable[[], None], count: int, calls: int) -> Timing:
    """Seconds a call over `count` replays, each between two events."""
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    replay()
    marks[0].record()
    for mark in marks[1:]:
        replay()
        mark.record()
    torch.cuda.synchronize()
    return Timing(tuple(a.elapsed_time(b) / 1e3 / calls for a, b in itertools.pairwise(marks)))


def measure(calls: Sequence[Call], device: str, budget_s: float = 0.25, graph: bool = True) -> Timing:
    """Seconds of one call, over calls that take turns (so that their weights are cold).

    graph=False: launched one by one, as a program without graphs would; the host's time counts. On the CPU
    (dry runs) one call, once.
    """
    calls = list(calls)[:MOST_CALLS]
    if device != "cuda":
        return _plain(calls[:1], lambda: None, 0)
    if not graph:
        return _plain(calls, torch.cuda.synchronize, budget_s)
    replay = capture(calls)
    first = replays(replay, 3, len(calls)).median * len(calls)
    if first < SHORT_S:
        calls = list(itertools.islice(itertools.cycle(calls), MOST_CALLS))
        replay = capture(calls)
        first = replays(replay, 3, len(calls)).median * len(calls)
    return replays(replay, int(np.clip(budget_s / max(first, 1e-6), 10, 1000)), len(calls))


def _plain(calls: Sequence[Call], finish: Call, budget_s: float) -> Timing:
    """One call at a time, finished before the next."""
    seconds: list[float] = []
    with torch.inference_mode():
        for call in calls[:2] if budget_s else []:
            call()
        finish()
        ends = time.perf_counter() + budget_s
        for call in itertools.cycle(calls):
            begin = time.perf_counter()
            call()
            finish()
            seconds.append(time.perf_counter() - begin)
            if time.perf_counter() > ends or len(seconds) >= 1000:
                return Timing(tuple(seconds))
    raise AssertionError("there are calls")
