"""What an engine reports of itself, while it goes on."""

from __future__ import annotations

import gc
import threading

from fastloop.engine.stats import Counters, Recent, percentile


def test_the_last_values_alone_are_kept() -> None:
    recent = Recent(3)
    assert recent.summary() == {"p50": 0.0, "p99": 0.0, "max": 0.0}
    recent.add(5.0)
    recent.add(1.0, 2.0, 3.0)
    assert recent.values() == [1.0, 2.0, 3.0]
    assert recent.summary() == {"p50": 2.0, "p99": 3.0, "max": 3.0}
    assert percentile([4.0, 1.0], 1) == 1.0


def test_a_step_in_another_thread_adds_while_counters_are_read() -> None:
    """A collection of garbage in the middle of the copy lets the other thread run: it adds or waits."""
    counters = Counters(steps=3)
    counters.step_seconds.add(*[0.5] * 100)
    steps: list[threading.Thread] = []
    kept: list[list[int]] = []

    def collecting(phase: str, info: dict[str, int]) -> None:
        step = threading.Thread(target=counters.step_seconds.add, args=(1.5,))
        step.start()
        step.join(0.05)
        steps.append(step)
        kept.extend([] for _ in range(9))  # so many objects more, and the next is a reason to collect again

    thresholds = gc.get_threshold()
    gc.callbacks.append(collecting)
    gc.set_threshold(1)
    try:
        told = counters.summary()
    finally:
        gc.set_threshold(*thresholds)
        gc.callbacks.remove(collecting)
        for step in steps:
            step.join()
    assert told["steps"] == 3 and told["step_seconds"]["p50"] == 0.5
    assert counters.step_seconds.values() == [0.5] * 100 + [1.5] * len(steps)
