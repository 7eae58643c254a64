"""The op `linear`: every implementation against the definition, the definition against numpy and scipy."""

from __future__ import annotations

import functools

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given
from scipy.special import erf, expit
from torch import Tensor

from fastloop.ops.linear import EPILOGUES
from fastloop.testing.assertions import assert_defined, assert_near, assert_right, bits, seeded
from fastloop.testing.implementations import Implementation, copied
from fastloop.testing.op_cases import linear_case

seeds = st.integers(0, 2**32 - 1)
rows = st.sampled_from([1, 2, 13, 16, 33, 64])
widths = st.one_of(st.integers(1, 130), st.sampled_from([256, 384]))
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
every_epilogue = pytest.mark.parametrize("epilogue", EPILOGUES)


@every_dtype
@every_epilogue
@given(seed=seeds, rows=rows, width_in=widths, width_out=widths, bias=st.booleans(), residual=st.booleans())
def test_errs_at_most_twice_as_much_as_torch(
    implementation: Implementation,
    dtype: torch.dtype,
    epilogue: str,
    seed: int,
    rows: int,
    width_in: int,
    width_out: int,
    bias: bool,
    residual: bool,
) -> None:
    draw = functools.partial(
        linear_case,
        rows=rows,
        width_in=width_in,
        width_out=2 * width_out if epilogue == "silu_gate" else width_out,
        bias=bias,
        epilogue=epilogue,
        residual=residual,
        dtype=dtype,
    )
    assert_right(implementation, draw(seeded(seed)), draw)


def in_numpy(
    x: Tensor, weight: Tensor, epilogue: str, bias: Tensor | None = None, residual: Tensor | None = None
) -> np.ndarray:
    """The op as a sum of products, with scipy's erf and logistic function."""
    y = np.einsum("nd,od->no", x.numpy(), weight.numpy()) + (0 if bias is None else bias.numpy())
    if epilogue == "gelu":
        y = y * (1 + erf(y / np.sqrt(2))) / 2
    if epilogue == "silu_gate":
        gate, up = np.split(y, 2, axis=1)
        y = gate * expit(gate) * up
    return y if residual is None else y + residual.numpy()


@every_epilogue
@given(seed=seeds, rows=rows, width=widths, bias=st.booleans(), residual=st.booleans())
def test_definition(epilogue: str, seed: int, rows: int, width: int, bias: bool, residual: bool) -> None:
    case = linear_case(
        seeded(seed),
        rows=rows,
        width_in=width,
        width_out=34,
        bias=bias,
        epilogue=epilogue,
        residual=residual,
    )
    assert_defined("linear", case, in_numpy)


@every_dtype
@given(seed=seeds, rows=rows, width=widths)
def test_the_identity_gives_its_rows_back(
    implementation: Implementation, dtype: torch.dtype, seed: int, rows: int, width: int
) -> None:
    """To the bit: every other product is zero."""
    x = torch.randn(rows, width, generator=seeded(seed)).to(dtype)
    assert torch.equal(implementation(x=x, weight=torch.eye(width, dtype=dtype)), x)


@every_dtype
@given(seed=seeds, rows=rows, width_in=widths, width_out=widths, power=st.integers(-10, 10))
def test_a_power_of_two_goes_through(
    implementation: Implementation,
    dtype: torch.dtype,
    seed: int,
    rows: int,
    width_in: int,
    width_out: int,
    power: int,
) -> None:
    """linear(2^p x) = 2^p linear(x) to the bit: every rounding scales along."""
    a = linear_case(seeded(seed), rows=rows, width_in=width_in, width_out=width_out, dtype=dtype).arguments
    scaled = implementation(**a | {"x": a["x"] * 2.0**power})
    assert torch.equal(scaled, implementation(**a) * 2.0**power)


@given(seed=seeds, rows=rows, width=widths)
def test_weights_of_zero_leave_bias_and_residual(
    implementation: Implementation, seed: int, rows: int, width: int
) -> None:
    a = linear_case(seeded(seed), rows=rows, width_in=7, width_out=width, bias=True, residual=True).arguments
    y = implementation(**a | {"weight": torch.zeros(width, 7)})
    assert torch.equal(y, a["bias"] + a["residual"])


@given(seed=seeds, count=rows)
def test_epilogues_far_from_zero(implementation: Implementation, seed: int, count: int) -> None:
    """gelu and silu of +-1000: the line and zero, without overflow or NaN."""
    sign = torch.randint(2, (count, 1), generator=seeded(seed)) * 2.0 - 1
    weight = torch.tensor([[1.0], [1.0]])
    gelu = implementation(x=1000 * sign, weight=weight, epilogue="gelu")
    assert torch.equal(gelu, (1000 * sign).clamp(min=0).expand(count, 2))
    gated = implementation(x=1000 * sign, weight=weight, epilogue="silu_gate")
    assert torch.equal(gated, (1000 * sign).clamp(min=0) * 1000 * sign)


@every_dtype
@every_epilogue
@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_stays_in_its_row_and_column(
    implementation: Implementation, dtype: torch.dtype, epilogue: str, poison: float
) -> None:
    case = linear_case(
        seeded(1), rows=13, width_in=77, width_out=90, bias=True, epilogue=epilogue, dtype=dtype
    )
    clean, dirty = implementation(**case.arguments), copied(case.arguments)
    dirty["x"][5, 70] = poison
    spoilt, others = implementation(**dirty), torch.arange(13) != 5
    assert torch.equal(bits(spoilt[others]), bits(clean[others]))
    assert not (spoilt[5].isfinite() & (spoilt[5] != 0)).any()  # gelu(-Inf) may be 0

    dirty = copied(case.arguments)
    dirty["weight"][7, 3] = poison
    spoilt, others = implementation(**dirty), torch.arange(clean.shape[1]) != 7
    assert torch.equal(bits(spoilt[:, others]), bits(clean[:, others]))
    assert not (spoilt[:, 7].isfinite() & (spoilt[:, 7] != 0)).any()


@given(seed=seeds, rows=rows)
def test_rows_may_be_few_or_many(implementation: Implementation, seed: int, rows: int) -> None:
    """A row's result does not depend on how many others there are, but for its rounding."""
    a = linear_case(seeded(seed), rows=64, width_in=77, width_out=50, bias=True, epilogue="gelu").arguments
    part = implementation(**a | {"x": a["x"][:rows]})
    assert_near(part, "linear", a | {"x": a["x"][:rows]})
    assert_near(torch.cat((part, implementation(**a)[rows:])), "linear", a)
