"""The op `layer_norm`: every implementation against the definition, the definition against numpy."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given
from torch import Tensor

from fastloop.testing.assertions import assert_defined, assert_near, assert_right, bits, seeded
from fastloop.testing.implementations import Implementation
from fastloop.testing.op_cases import Case, layer_norm_case

seeds = st.integers(0, 2**32 - 1)
rows = st.sampled_from([1, 2, 13, 20, 64])
widths = st.one_of(st.integers(1, 130), st.sampled_from([384, 1280]))
scales = st.sampled_from([1e-3, 1.0, 1e3])  # where eps is all of the variance, little, and nothing
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


@every_dtype
@given(seed=seeds, rows=rows, width=widths, offset=st.sampled_from([0.0, 3.0, 1000.0]), scale=scales)
def test_errs_at_most_twice_as_much_as_torch(
    implementation: Implementation,
    dtype: torch.dtype,
    seed: int,
    rows: int,
    width: int,
    offset: float,
    scale: float,
) -> None:
    """Rows far from zero too: a variance as E[x^2] - E[x]^2 would lose all its digits there."""

    def draw(generator: torch.Generator) -> Case:
        return layer_norm_case(generator, rows=rows, width=width, offset=offset, scale=scale, dtype=dtype)

    assert_right(implementation, draw(seeded(seed)), draw)


@given(seed=seeds, rows=rows, width=widths)
def test_definition(seed: int, rows: int, width: int) -> None:
    def in_numpy(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> np.ndarray:
        a = x.numpy()
        centred = a - a.mean(-1, keepdims=True)
        return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + eps) * weight.numpy() + bias.numpy()

    assert_defined("layer_norm", layer_norm_case(seeded(seed), rows=rows, width=width), in_numpy)


@given(seed=seeds, width=st.integers(2, 200), power=st.integers(-20, 20))
def test_a_scale_of_the_rows_does_not_matter(
    implementation: Implementation, seed: int, width: int, power: int
) -> None:
    """norm(2^p x, 4^p eps) = norm(x, eps)."""
    a = layer_norm_case(seeded(seed), rows=3, width=width).arguments
    scaled = implementation(**a | {"x": a["x"] * 2.0**power, "eps": a["eps"] * 4.0**power})
    assert_near(scaled, "layer_norm", a)


@given(seed=seeds, rows=rows, width=st.integers(1, 200))
def test_equal_values_give_the_bias(implementation: Implementation, seed: int, rows: int, width: int) -> None:
    """A row of zeros has no direction: what is left is the bias, not NaN."""
    a = layer_norm_case(seeded(seed), rows=rows, width=width).arguments
    assert torch.equal(implementation(**a | {"x": torch.zeros(rows, width)}), a["bias"].expand(rows, width))


@every_dtype
@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_stays_in_its_row(
    implementation: Implementation, dtype: torch.dtype, poison: float
) -> None:
    a = layer_norm_case(seeded(1), rows=13, width=77, dtype=dtype).arguments
    clean = implementation(**a)
    a["x"][5, 70] = poison
    spoilt, others = implementation(**a), torch.arange(13) != 5
    assert torch.equal(bits(spoilt[others]), bits(clean[others]))
    assert spoilt[5].isnan().all()
