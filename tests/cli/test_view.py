"""Text for a terminal: one harmless line each, and a live view that fits whatever the terminal is."""

from __future__ import annotations

import io
from collections import deque

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console

from fastloop.cli.hearing import Summary
from fastloop.cli.output import clock
from fastloop.cli.terminal import one_line
from fastloop.cli.view import QUIET_DB, LiveView, level_db, meter, sparkline
from fastloop.events import Decision, ResponseEnd, ResponseStart, ResponseText

SUMMARY = Summary("a.wav", 4.0, 1.0, 10, 1, 1.0, 2.0, 3.0)


@given(st.text())
def test_one_line_is_printable_and_one(text: str) -> None:
    assert one_line(text).isprintable()


def test_one_line_spells_out_what_does_not_print() -> None:
    assert one_line(" a\n\tb\x1b[31m\udcff é") == "a b\\x1b[31m\\udcff é"
    assert one_line("x" * 50, longest=10) == "xxxxxxxx …"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00.0"), (4.2, "0:04.2"), (59.96, "1:00.0"), (3599.99, "1:00:00.0"), (7323.45, "2:02:03.4")],
)
def test_clock(seconds: float, text: str) -> None:
    assert clock(seconds) == text


def test_level() -> None:
    assert level_db(np.ones(100, np.float32)) == 0
    tenth = np.full(100, 0.1, np.float32)  # rounded by 1.5e-9
    assert level_db(tenth) == pytest.approx(-20, abs=1e-6)
    assert level_db(np.zeros(100, np.float32)) == level_db(np.empty(0, np.float32)) == -float("inf")


@given(st.floats(allow_nan=False), st.integers(0, 200))
def test_the_meter_fits(db: float, width: int) -> None:
    assert cell_len(meter(db, width).plain) <= width
    assert cell_len(meter(0, width).plain) == width and meter(QUIET_DB, width).plain == ""


@given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), max_size=40), st.integers(1, 30))
def test_the_sparkline_has_a_cell_for_each_of_the_last_chunks(
    decisions: list[tuple[float, bool]], width: int
) -> None:
    assert len(sparkline(deque(decisions), width).plain) == min(width, len(decisions))
    assert sparkline(deque([(0.0, False), (1.0, True)]), 9).plain == "▁█"


@pytest.mark.parametrize("width", [20, 42, 80, 200])
@pytest.mark.parametrize("seconds", [None, 8.0])
def test_the_view_fits_every_terminal(width: int, seconds: float | None) -> None:
    screen = io.StringIO()
    console = Console(file=screen, width=width, height=24, force_terminal=True, color_system=None)
    view = LiveView(console)
    view.begin("/a/folder/with a rather long name of a file.wav", seconds)
    view.sound(np.full(6400, 0.25, np.float32))
    view.event(Decision(seq=0, epoch=0, t=0.4, chunk=0, decision="respond", p_respond=0.9))
    view.event(ResponseStart(seq=1, epoch=0, t=0.4, emotion="urgent"))
    view.event(ResponseText(seq=2, epoch=0, t=0.4, text="Somebody is\x1b[2J at the"))
    view.tick(queued_s=0.0, latency_ms=2.5)
    during = screen.getvalue()
    text = "Somebody is\x1b[2J at the door. " * 3
    view.event(ResponseEnd(seq=3, epoch=0, t=0.4, text=text, reason="length"))
    view.end(SUMMARY)
    after = screen.getvalue()[len(during) :]
    assert "\x1b[2J" not in during + after
    words = " ".join(during.split())
    assert "level" in words and "[urgent]" in words and "0:00.4" in words
    if width >= 42:
        assert "-12 dB" in words and "0.900" in words and ("0:08.0" in words) == (seconds is not None)
    assert "door." in after and "heard 4.0 s" in after
    if width >= 80:
        rows = [row for row in during.replace("\r", "\n").split("\n") if "\x1b" not in row]
        assert rows and all(cell_len(row) <= width for row in rows)
