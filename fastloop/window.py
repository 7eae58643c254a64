"""The KV window: an endless stream at constant memory.

The cache of a stream is the pinned prefix (the attention sink) and the most recent *units*. A unit is a
listening chunk with the response that followed it; units are dropped whole, oldest first.

Attention sees only differences of RoPE positions. So after n positions were dropped, moving the kept
keys back by n and moving the prefix's keys forward by n are the same; the prefix is some forty keys, the
window thousands, so the prefix is moved. It is always rotated from its pristine copy by the total n, so
no rounding accumulates over an endless stream.

Source: attention sinks (Xiao et al. 2023, arXiv 2309.17453), with RoPE positions re-rotated.
"""

from __future__ import annotations

from collections.abc import Sequence

from .config import ModelConfig

SLACK_CHUNKS = 8  # dropping in groups spreads the re-rotation over 3.2 s of sound


def window_slack(model: ModelConfig) -> int:
    """Positions a stream may hold above its window before units are dropped."""
    return SLACK_CHUNKS * model.chunk_rows


def units_to_drop(units: Sequence[int], rows: int, window_tokens: int | None, slack: int) -> int:
    """How many of the oldest units go before `rows` new positions are appended.

    units: positions of each kept unit, oldest first. None while units + rows fit window + slack; then so
    many that the rest fits the window itself.
    """
    total = sum(units) + rows
    if window_tokens is None or total <= window_tokens + slack:
        return 0
    count = 0
    while count < len(units) and total > window_tokens:
        total -= units[count]
        count += 1
    return count
