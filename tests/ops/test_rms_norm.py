"""The op `rms_norm`: every implementation against the definition, the definition against numpy and torch."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from torch import Tensor

from fastloop.testing.assertions import assert_defined, assert_near, assert_right, bits, seeded
from fastloop.testing.implementations import Implementation, copied
from fastloop.testing.op_cases import Case, rms_norm_case

seeds = st.integers(0, 2**32 - 1)
rows = st.sampled_from([1, 2, 13, 20, 64])
widths = st.one_of(st.integers(1, 130), st.sampled_from([384, 2048]))
scales = st.sampled_from([1e-3, 1.0, 1e3])  # where eps is half of the mean square, little, and nothing
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


@every_dtype
@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
@given(seed=seeds, rows=rows, width=widths, scale=scales)
def test_errs_at_most_twice_as_much_as_torch(
    implementation: Implementation,
    dtype: torch.dtype,
    residual: bool,
    seed: int,
    rows: int,
    width: int,
    scale: float,
) -> None:
    def draw(generator: torch.Generator) -> Case:
        return rms_norm_case(generator, rows=rows, width=width, residual=residual, scale=scale, dtype=dtype)

    assert_right(implementation, draw(seeded(seed)), draw)


@given(seed=seeds, rows=rows, width=widths, residual=st.booleans())
def test_definition(seed: int, rows: int, width: int, residual: bool) -> None:
    def in_numpy(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> list[np.ndarray]:
        a = x.numpy() if residual is None else x.numpy() + residual.numpy()
        y = a / np.sqrt((a**2).mean(-1, keepdims=True) + eps) * weight.numpy()
        return [y] if residual is None else [y, a]

    def in_torch(x: Tensor, weight: Tensor, eps: float, residual: None) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), weight, eps)

    case = rms_norm_case(seeded(seed), rows=rows, width=width, residual=residual)
    assert_defined("rms_norm", case, in_numpy)
    assert_defined("rms_norm", rms_norm_case(seeded(seed), rows=rows, width=width), in_torch)


@every_dtype
@given(seed=seeds, rows=rows, width=widths)
def test_the_residual_becomes_the_sum_rounded_once(
    implementation: Implementation, dtype: torch.dtype, seed: int, rows: int, width: int
) -> None:
    """To the bit, and the result is the norm of that sum."""
    a = rms_norm_case(seeded(seed), rows=rows, width=width, residual=True, dtype=dtype).arguments
    after = copied(a)
    y = implementation(**after)
    total = (a["x"].double() + a["residual"].double()).to(dtype)
    assert torch.equal(after["residual"], total)
    assert_near(y, "rms_norm", {"x": total, "weight": a["weight"], "eps": a["eps"]})


@given(seed=seeds, width=st.integers(1, 200), power=st.integers(-20, 20))
def test_a_scale_of_the_rows_does_not_matter(
    implementation: Implementation, seed: int, width: int, power: int
) -> None:
    """norm(-2^p x, 4^p eps) = -norm(x, eps)."""
    a = rms_norm_case(seeded(seed), rows=3, width=width).arguments
    scaled = implementation(**a | {"x": a["x"] * -(2.0**power), "eps": a["eps"] * 4.0**power})
    assert_near(-scaled, "rms_norm", a)


@given(seed=seeds, rows=rows, width=widths)
def test_rows_of_zeros_stay_zeros(implementation: Implementation, seed: int, rows: int, width: int) -> None:
    a = rms_norm_case(seeded(seed), rows=rows, width=width).arguments
    assert torch.equal(implementation(**a | {"x": torch.zeros(rows, width)}), torch.zeros(rows, width))


@every_dtype
@pytest.mark.parametrize("place", ["x", "residual"])
@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_stays_in_its_row(
    implementation: Implementation, dtype: torch.dtype, place: str, poison: float
) -> None:
    a = rms_norm_case(seeded(1), rows=13, width=77, residual=True, dtype=dtype).arguments
    dirty, others = copied(a), torch.arange(13) != 5
    dirty[place][5, 70] = poison
    clean, spoilt = implementation(**a), implementation(**dirty)
    assert torch.equal(bits(spoilt[others]), bits(clean[others]))
    assert torch.equal(dirty["residual"][others], a["residual"][others])
    assert spoilt[5, 70].isnan() and not dirty["residual"][5, 70].isfinite()
