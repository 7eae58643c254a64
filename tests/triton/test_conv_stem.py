"""conv_stem in Triton against its definition: odd lengths, ends, blocks that do not see each other."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from fastloop.testing.implementations import Implementation
from fastloop.testing.op_cases import Case, conv_stem_case

Check = Callable[[str, Case], None]


def generator(seed: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_equals_the_definition(check: Check, dtype: torch.dtype) -> None:
    check("conv_stem", conv_stem_case(generator(), dtype=dtype))


@pytest.mark.parametrize(("frames", "bins", "width"), [(1, 1, 1), (2, 5, 7), (9, 128, 30), (39, 80, 66)])
def test_any_size(check: Check, frames: int, bins: int, width: int) -> None:
    check("conv_stem", conv_stem_case(generator(frames), frames=frames, bins=bins, width=width, spare=0))


def test_blocks_do_not_see_each_other(device: str) -> None:
    run = Implementation("conv_stem", "triton", device)
    case = conv_stem_case(generator(2), blocks=3, frames=8)
    clean = run(**case.arguments)
    case.arguments["frames"][1] = torch.nan
    spoilt = run(**case.arguments)
    assert spoilt[1].isnan().all()
    assert torch.equal(spoilt[[0, 2]], clean[[0, 2]])


def test_too_few_positions(device: str) -> None:
    case = conv_stem_case(generator(3), frames=8, spare=0)
    case.arguments["positions"] = case.arguments["positions"][:3]
    with pytest.raises(ValueError, match="the 8 frames need 4"):
        Implementation("conv_stem", "triton", device)(**case.arguments)
