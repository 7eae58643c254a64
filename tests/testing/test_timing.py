"""The timer, without a look at the clock."""

from __future__ import annotations

import pytest
import torch

from fastloop.testing.timing import COLD_BYTES, Timing, read_bandwidth, rotation, rounds_for, side_by_side


def test_a_timing_tells_its_middle_and_its_tail() -> None:
    timing = Timing(tuple(float(s) for s in range(1, 101)))
    assert (timing.median, timing.minimum) == (50.5, 1.0)
    assert 99 <= timing.p99 <= 100
    assert timing.gb_per_s(101_000_000_000) == pytest.approx(2.0)


def test_rivals_run_in_blocks_whose_order_turns() -> None:
    """As many timed calls for each; the first of a block is not timed."""
    heard = ""

    def say(letter: str) -> None:
        nonlocal heard
        heard += letter

    timings = side_by_side({"a": lambda: say("a"), "b": lambda: say("b")}, rounds=3, block=2)
    assert heard == "aaabbb" + "bbbaaa" + "aaabbb"
    assert {name: len(t.seconds) for name, t in timings.items()} == {"a": 6, "b": 6}


def test_rounds_are_bounded() -> None:
    calls = []
    assert rounds_for(lambda: calls.append(0), budget_s=0.0, least=7) == 7
    assert rounds_for(lambda: calls.append(0), budget_s=1e9, most=50) == 50
    assert len(calls) == 4


def test_cold_arguments_exceed_the_cache() -> None:
    """Copies of what is cold only, with the same values; what is tiny is hot, what is huge is cold alone."""
    weight, x = torch.randn(COLD_BYTES // 12 + 1), torch.randn(3)
    sets, cold = rotation({"x": x, "weight": weight}, ["weight"])
    assert cold and len(sets) == 3
    assert len({s["weight"].data_ptr() for s in sets}) == 3 and all(s["x"] is x for s in sets)
    assert all(torch.equal(s["weight"], weight) for s in sets)
    assert rotation({"x": x}, ["x"]) == ([{"x": x}], False)
    assert rotation({"x": x}, []) == ([{"x": x}], False)
    sets, cold = rotation({"weight": torch.empty(COLD_BYTES // 4)}, ["weight"])
    assert cold and len(sets) == 1


def test_memory_gives_bytes() -> None:
    assert read_bandwidth(repeats=1) > 0
