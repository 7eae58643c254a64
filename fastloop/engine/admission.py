"""Who goes first: the order in which waiting sessions enter a step. Pure functions on plain data.

fifo       whoever has waited longest
deadline   earliest deadline first: listening rows first, responses fill up what is left, and a response whose
           next token is due before another step could bring it goes before everything (its floor rate)

A chunk is due one chunk (0.4 s) after it arrived, or after the response ended that it had to wait for.
Source: earliest deadline first is optimal for one machine while all deadlines can be met (Liu and Layland
1973, J. ACM 20).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

FLOOR_TOKENS_PER_S = 10.0  # what a response keeps under any load: faster than anyone reads or speaks
COHORT_ROWS = (
    208  # 16 listeners: from here on a step's time grows with its rows, and nothing is won by waiting
)
COHORT_S = 0.002  # about what a step of one listener takes


class Waiting(NamedTuple):
    """One session that could enter the next step. Times in monotonic seconds."""

    key: int  # the session; breaks ties
    since: float  # the arrival of its oldest chunk, 0 for a response without one: what FIFO goes by
    ready: float  # since when it could enter a step
    due: float  # when its decision must be there, or its next token to keep the floor rate
    speaks: bool = False  # a response: one row, one token
    rows: int = 1


Order = Callable[[Sequence[Waiting], float, float], list[Waiting]]


def chunk_due(arrived: float, freed: float, chunk_seconds: float) -> float:
    """When the decision of a chunk is due; `freed`: when the session's last response ended."""
    return max(arrived, freed) + chunk_seconds


def token_due(last: float) -> float:
    """When the next token of a response is due; `last`: when it got its last one, or began."""
    return last + 1 / FLOOR_TOKENS_PER_S


def fifo(waiting: Sequence[Waiting], now: float, step_seconds: float) -> list[Waiting]:
    """Longest wait first."""
    return sorted(waiting, key=lambda w: (w.since, w.key))


def deadline(waiting: Sequence[Waiting], now: float, step_seconds: float) -> list[Waiting]:
    """Responses that are about to fall below their floor rate, then listeners, then other responses.

    now: when the step begins; step_seconds: what a step takes about, or more where others are on their way
    before it. A token left out of this step comes with the next one, after two of them.
    """
    last_call = now + 2 * step_seconds

    def rank(w: Waiting) -> tuple[int, float, int]:
        group = 1 if not w.speaks else 0 if w.due <= last_call else 2
        return group, w.due, w.key

    return sorted(waiting, key=rank)


ORDERS: dict[str, Order] = {"fifo": fifo, "deadline": deadline}


def take(ordered: Sequence[Waiting], max_rows: int) -> list[Waiting]:
    """The first ones whose rows fit; a single larger one goes alone."""
    taken: list[Waiting] = []
    budget = max_rows
    for w in ordered:
        if budget <= 0 or (taken and w.rows > budget):
            break
        taken.append(w)
        budget -= w.rows
    return taken


def start_at(
    waiting: Sequence[Waiting], now: float, cohort_s: float = COHORT_S, others: bool = True
) -> float:
    """When the next step should begin: at once, or a moment later so that a cohort can form.

    Never later than `cohort_s` after the first of those that wait became ready; at once where there are rows
    enough, a response, whose next token nothing is to delay, or no others who could come.
    """
    if not others or any(w.speaks for w in waiting) or sum(w.rows for w in waiting) >= COHORT_ROWS:
        return now
    return max(now, min(w.ready for w in waiting) + cohort_s)
