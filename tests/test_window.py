"""When the KV window drops which units. Engine and plain loop share this, so it is tested on its own."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from fastloop.config import small
from fastloop.window import SLACK_CHUNKS, units_to_drop, window_slack

UNITS = st.lists(st.integers(1, 300), max_size=40)


@given(units=UNITS, rows=st.integers(1, 40), window=st.integers(13, 2000), slack=st.integers(0, 200))
def test_so_many_go_that_the_rest_fits_and_not_one_more(
    units: list[int], rows: int, window: int, slack: int
) -> None:
    count = units_to_drop(units, rows, window, slack)
    kept = sum(units[count:]) + rows
    if sum(units) + rows <= window + slack:
        assert count == 0, "nothing goes while all fit window and slack"
    else:
        assert kept <= window or count == len(units), "what is kept fits the window, or nothing is kept"
        assert count == 0 or kept + units[count - 1] > window, "the last one need not have gone"
    assert 0 <= count <= len(units)


@given(units=UNITS, rows=st.integers(1, 40), slack=st.integers(0, 200))
def test_without_a_window_nothing_goes(units: list[int], rows: int, slack: int) -> None:
    assert units_to_drop(units, rows, None, slack) == 0


def test_slack_is_so_many_listening_steps() -> None:
    assert window_slack(small()) == SLACK_CHUNKS * 13
