"""The op `conv_stem`: every implementation against the definition, the definition against sums in numpy."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from scipy.special import erf
from torch import Tensor

from fastloop.ops.conv_stem import _conv_by_taps
from fastloop.testing.assertions import assert_defined, assert_near, assert_right, bits, seeded
from fastloop.testing.implementations import Implementation, copied
from fastloop.testing.op_cases import Case, conv_stem_case
from fastloop.testing.selfcheck import widened
from fastloop.testing.tolerance import FORMULA_BOUND, relative_error

seeds = st.integers(0, 2**32 - 1)
blocks = st.sampled_from([1, 2, 3, 13])
frames = st.one_of(st.sampled_from([40, 200]), st.integers(1, 45))
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


@every_dtype
@given(seed=seeds, blocks=blocks, frames=frames, bins=st.sampled_from([1, 80, 128]), width=st.integers(1, 70))
def test_errs_at_most_twice_as_much_as_torch(
    implementation: Implementation,
    dtype: torch.dtype,
    seed: int,
    blocks: int,
    frames: int,
    bins: int,
    width: int,
) -> None:
    """Spare rows of the position table are NaN."""

    def draw(generator: torch.Generator) -> Case:
        return conv_stem_case(
            generator, blocks=blocks, frames=frames, bins=bins, width=width, spare=5, dtype=dtype
        )

    assert_right(implementation, draw(seeded(seed)), draw)


def in_numpy(
    frames: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor, positions: Tensor
) -> np.ndarray:
    """Each output from the three columns it spans, zeros beyond both ends."""

    def conv(x: np.ndarray, weight: Tensor, bias: Tensor, stride: int) -> np.ndarray:
        padded = np.pad(x, ((0, 0), (1, 1), (0, 0)))
        columns = [
            np.einsum("bkc,eck->be", padded[:, i : i + 3], weight.numpy()) + bias.numpy()
            for i in range(0, x.shape[1], stride)
        ]
        y = np.stack(columns, axis=1)
        return y * (1 + erf(y / np.sqrt(2))) / 2

    y = conv(conv(frames.numpy(), weight1, bias1, 1), weight2, bias2, 2)
    return y + positions.numpy()[: y.shape[1]]


@given(seed=seeds, blocks=blocks, frames=st.integers(1, 45), width=st.integers(1, 40))
def test_definition(seed: int, blocks: int, frames: int, width: int) -> None:
    case = conv_stem_case(seeded(seed), blocks=blocks, frames=frames, bins=9, width=width)
    assert_defined("conv_stem", case, in_numpy)


@given(seed=seeds, frame=st.integers(0, 39), poison=st.sampled_from([1e3, torch.nan, torch.inf]))
def test_a_frame_reaches_three_positions_of_its_block(
    implementation: Implementation, seed: int, frame: int, poison: float
) -> None:
    """Position t spans frames 2 t - 2 .. 2 t + 2; nothing else changes, to the bit."""
    a = conv_stem_case(seeded(seed), blocks=3, bins=16, width=24).arguments
    changed = copied(a)
    changed["frames"][1, frame] = poison
    before, after = implementation(**a), implementation(**changed)
    reached = torch.zeros(3, 20, dtype=torch.bool)
    reached[1] = (2 * torch.arange(20) - frame).abs() <= 2
    assert torch.equal(bits(after[~reached]), bits(before[~reached]))
    assert (after[reached] != before[reached]).any(-1).all()


@every_dtype
@given(seed=seeds, count=st.integers(2, 13))
def test_a_block_alone_and_in_a_batch(
    implementation: Implementation, dtype: torch.dtype, seed: int, count: int
) -> None:
    a = conv_stem_case(seeded(seed), blocks=count, width=40, dtype=dtype).arguments
    alone = [implementation(**a | {"frames": a["frames"][b : b + 1]}) for b in range(count)]
    assert_near(torch.cat(alone), "conv_stem", a)


@given(seed=seeds, frames=frames)
def test_positions_are_added_last(implementation: Implementation, seed: int, frames: int) -> None:
    """Silent frames under weights of zero leave gelu(bias) = 0 at bias 0, and the table."""
    a = conv_stem_case(seeded(seed), frames=frames, width=24).arguments
    zeros = {name: torch.zeros_like(a[name]) for name in ("weight2", "bias2")}
    length = (frames + 1) // 2
    assert torch.equal(implementation(**a | zeros), a["positions"][:length].expand(2, length, 24))


@given(seed=seeds, stride=st.sampled_from([1, 2]), frames=st.integers(1, 41))
def test_products_of_taps_are_the_convolution(seed: int, stride: int, frames: int) -> None:
    """What the definition does in float32 on a GPU."""
    a = widened(conv_stem_case(seeded(seed), frames=frames).arguments)
    x, weight, bias = a["frames"], a["weight1"], a["bias1"]
    theirs = F.conv1d(x.mT, weight, bias, stride=stride, padding=1).mT
    ours = _conv_by_taps(x, weight, bias, stride)
    assert ours.shape == theirs.shape and relative_error(ours, theirs) <= FORMULA_BOUND
