"""The arrays of a ragged batch."""

from __future__ import annotations

import numpy as np
import pytest

from fastloop.engine.scheduler import runs


@pytest.mark.parametrize(
    "firsts, counts",
    [([], []), ([7], [1]), ([3], [0]), ([40, 0, 2**40], [13, 1, 10]), ([5, 9, 2], [2, 0, 3])],
)
def test_runs_follow_one_another(firsts: list[int], counts: list[int]) -> None:
    found = runs(firsts, counts)
    assert found.dtype == np.int64 and found.ndim == 1  # an empty step indexes with it, too
    expected = [first + i for first, count in zip(firsts, counts, strict=True) for i in range(count)]
    assert found.tolist() == expected
