"""`clock` checks a case, then times it; the lines of all ops are printed together at the end.

pytest bench/ops --benchmark-only [--size 3b] [--threads N]
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from fastloop.testing.implementations import Implementation
from fastloop.testing.op_cases import Case
from fastloop.testing.plugin import pytest_generate_tests
from fastloop.testing.selfcheck import compare
from fastloop.testing.timing import Timing, read_bandwidth, rotation, rounds_for

__all__ = ["pytest_generate_tests"]


@dataclass(frozen=True)
class Line:
    """One timed case: `moved` bytes; `roof` bytes a second that memory gives, None where the cache is hot."""

    name: str
    timing: Timing
    moved: int
    roof: float | None

    def row(self) -> str:
        t, rate = self.timing, self.timing.gb_per_s(self.moved)
        share = f"{100 * rate * 1e9 / self.roof:6.0f} %" if self.roof else "     hot"
        times = "".join(f"{1e6 * s:12.1f}" for s in (t.median, t.minimum, t.p99))
        return f"{self.name:58}{times}{self.moved / 1e6:10.3f}{rate:9.2f}{share}"


LINES: list[Line] = []
TABLES: dict[str, dict[str, Timing]] = {}
Clock = Callable[..., None]


@pytest.fixture(scope="session")
def roof(threads: int) -> Callable[[str], float]:
    """Bytes a second from a device's memory, measured once."""
    measured: dict[str, float] = {}

    def of(device: str) -> float:
        measured[device] = measured.get(device) or read_bandwidth(device)
        return measured[device]

    return of


@pytest.fixture
def table() -> Callable[[str, dict[str, Timing]], None]:
    """table(title, timings): what ran side by side; the first is what the others are compared with."""
    return TABLES.__setitem__


@pytest.fixture
def clock(benchmark: BenchmarkFixture, request: pytest.FixtureRequest, roof: Callable[[str], float]) -> Clock:
    """clock(implementation, case, bytes moved, cold=names of what a step reads from memory)."""

    def measure(implementation: Implementation, case: Case, moved: int, cold: Sequence[str] = ()) -> None:
        if refusal := implementation.refusal(case.arguments):
            pytest.skip(refusal)
        found = compare(implementation, case)
        assert found.ok, found.problem
        placed = {name: implementation.place(value) for name, value in case.arguments.items()}
        sets, is_cold = rotation(placed, cold)
        turn = itertools.cycle(sets)

        def call(**arguments: object) -> None:
            implementation.function(**arguments)
            if implementation.device == "cuda":
                torch.cuda.synchronize()

        with torch.inference_mode():
            rounds = max(rounds_for(lambda: call(**next(turn))), len(sets))
            benchmark.pedantic(call, setup=lambda: ((), next(turn)), rounds=rounds, warmup_rounds=len(sets))
        if benchmark.disabled:
            return
        timing = Timing(tuple(benchmark.stats.stats.data))
        memory = roof(implementation.device) if is_cold else None
        LINES.append(Line(request.node.name.removeprefix("test_"), timing, moved, memory))
        benchmark.extra_info |= {"bytes": moved, "p99_s": timing.p99, "gb_per_s": timing.gb_per_s(moved)}

    return measure


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    write = terminalreporter.write_line
    for title, timings in TABLES.items():
        ours = next(iter(timings.values()))
        write(f"\n{title:58}{'median us':>12}{'min us':>12}{'p99 us':>12}{'x median':>10}{'x min':>9}")
        for name, t in timings.items():
            times = "".join(f"{1e6 * s:12.1f}" for s in (t.median, t.minimum, t.p99))
            write(f"{name:58}{times}{t.median / ours.median:10.2f}{t.minimum / ours.minimum:9.2f}")
    if not LINES:
        return
    write("")
    write(f"{'op [case]':58}{'median us':>12}{'min us':>12}{'p99 us':>12}{'MB':>10}{'GB/s':>9}{'roof':>8}")
    for line in LINES:
        write(line.row())
    write("roof: share of what x . x reads from memory on this device; hot: the arguments stay in the cache")
