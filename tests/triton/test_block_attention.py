"""block_attention in Triton against its definition, and that nothing crosses a block."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from fastloop.testing.implementations import Implementation
from fastloop.testing.op_cases import Case, block_attention_case

Check = Callable[[str, Case], None]


def generator(seed: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("positions", [1, 20, 33, 100])
def test_equals_the_definition(check: Check, positions: int, dtype: torch.dtype) -> None:
    check("block_attention", block_attention_case(generator(positions), positions=positions, dtype=dtype))


@pytest.mark.parametrize(("heads", "head_width"), [(1, 1), (3, 24), (20, 64)])
def test_any_heads(check: Check, heads: int, head_width: int) -> None:
    check("block_attention", block_attention_case(generator(), blocks=1, heads=heads, head_width=head_width))


def test_large_scores(check: Check) -> None:
    """Scores of several hundred: the running maximum keeps the exponentials finite."""
    case = block_attention_case(generator(2), positions=70)
    case.arguments["qkv"] *= 12
    check("block_attention", case)


def test_blocks_do_not_see_each_other(device: str) -> None:
    run = Implementation("block_attention", "triton", device)
    case = block_attention_case(generator(3), blocks=3)
    clean = run(**case.arguments)
    case.arguments["qkv"][1, 7] = torch.nan
    spoilt = run(**case.arguments)
    assert spoilt[1].isnan().all()
    assert torch.equal(spoilt[[0, 2]], clean[[0, 2]])
