"""Ragged batches as hypothesis draws them, for the kernels of paged_attention."""

from __future__ import annotations

from hypothesis import strategies as st


def ragged(
    data: st.DataObject, most_rows: int, most_context: int
) -> tuple[list[int], list[int], list[tuple[int, int]]]:
    """Any mix of rows per sequence (none, too), any context, any gap that leaves out the new rows: rows,
    lengths and gaps of 1 to 4 sequences.
    """
    rows = data.draw(st.lists(st.integers(0, most_rows), min_size=1, max_size=4), label="rows")
    lens, gaps = [], []
    for count in rows:
        lens.append(count + data.draw(st.integers(0 if count else 1, most_context), label="context"))
        begin = data.draw(st.integers(0, lens[-1] - count), label="gap begin")
        gaps.append((begin, data.draw(st.integers(begin, lens[-1] - count), label="gap end")))
    return rows, lens, gaps
