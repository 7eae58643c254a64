"""The op `linear_quantised`: implementations against the definition, that against numpy; refusals."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given
from torch import Tensor

from fastloop.ops.linear import EPILOGUES, linear_ref
from fastloop.ops.linear_quantised import (
    group_of,
    linear_quantised,
    linear_quantised_bytes,
    linear_quantised_ref,
)
from fastloop.quantise import FP8_MOST, quantise_fp8, quantise_int4, quantise_int8
from fastloop.testing.assertions import assert_right, seeded
from fastloop.testing.implementations import Implementation
from fastloop.testing.op_cases import linear_quantised_case

seeds = st.integers(0, 2**32 - 1)
KINDS = ("int8", "fp8", "int4", "int4-64")
every_kind = pytest.mark.parametrize("kind", KINDS)


@every_kind
@pytest.mark.parametrize("epilogue", EPILOGUES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@given(seed=seeds, rows=st.sampled_from([1, 13, 33]), groups=st.integers(1, 3), width_out=st.integers(1, 60))
def test_errs_at_most_twice_as_much_as_torch(
    implementation: Implementation,
    kind: str,
    epilogue: str,
    dtype: torch.dtype,
    seed: int,
    rows: int,
    groups: int,
    width_out: int,
) -> None:
    sizes = {"rows": rows, "width_in": 64 * groups, "width_out": 2 * width_out, "bias": bool(seed % 2)}
    case = linear_quantised_case(seeded(seed), kind=kind, epilogue=epilogue, dtype=dtype, **sizes)
    assert_right(
        implementation,
        case,
        lambda g: linear_quantised_case(g, kind=kind, epilogue=epilogue, dtype=dtype, **sizes),
    )


def numpy_weight(values: Tensor, scale: Tensor) -> np.ndarray:
    """float64 [O, D] by the formulas of the op's docstring."""
    factor = scale.double().numpy()
    if values.dtype != torch.uint8:
        return values.double().numpy() * factor[:, None]
    stored = values.numpy()
    nibbles = np.empty((len(stored), 2 * stored.shape[1]))
    nibbles[:, 0::2], nibbles[:, 1::2] = stored & 15, stored >> 4
    return (nibbles - 8) * np.repeat(factor, nibbles.shape[1] // factor.shape[1], axis=1)


@every_kind
@given(seed=seeds, rows=st.integers(0, 5))
def test_the_definition_is_a_sum_of_products(kind: str, seed: int, rows: int) -> None:
    a = linear_quantised_case(seeded(seed), kind=kind, rows=rows, width_in=128, width_out=7).arguments
    out = linear_quantised_ref(**a).double().numpy()
    truth = a["x"].double().numpy() @ numpy_weight(a["values"], a["scale"]).T
    assert out.shape == (rows, 7) and np.allclose(out, truth, rtol=1e-5, atol=1e-5)


@given(seed=seeds, outputs=st.integers(1, 9), inputs=st.integers(1, 90))
def test_fp8_weights_are_within_half_a_step(seed: int, outputs: int, inputs: int) -> None:
    """E4M3: 3 bits of mantissa, so 1/16 of a weight, or half of the least step of its channel."""
    g = seeded(seed)
    magnitude = 10 ** torch.empty(outputs, 1).uniform_(-6, 3, generator=g)
    weight = magnitude * torch.randn(outputs, inputs, generator=g)
    values, scale = quantise_fp8(weight)
    error = (values.float() * scale[:, None] - weight).abs()
    assert (error <= weight.abs() / 16 * 1.001 + scale[:, None] * 2.0**-10).all()
    assert values.float().abs().amax(1).eq(FP8_MOST).all()


def test_fp8_of_zeros_and_of_an_exact_channel() -> None:
    weight = torch.stack((torch.zeros(4), torch.tensor([448.0, -1.0, 0.5, 0.0])))
    values, scale = quantise_fp8(weight)
    assert torch.equal(scale, torch.tensor([0.0, 1.0])) and torch.equal(values.float(), weight)


@every_kind
def test_groups(kind: str) -> None:
    a = linear_quantised_case(seeded(0), kind=kind, width_in=128).arguments
    assert group_of(a["values"], a["scale"]) == {"int8": 0, "fp8": 0, "int4": 32, "int4-64": 64}[kind]


def test_it_equals_linear_where_the_weights_are_exact() -> None:
    weight = torch.randint(-127, 128, (6, 64), generator=seeded(0)).float()
    weight[:, 0] = 127
    x = torch.randint(-3, 4, (5, 64), generator=seeded(1)).float()
    assert torch.equal(linear_quantised(x, *quantise_int8(weight)), linear_ref(x, weight))
    eights = torch.full((6, 64), -8.0)
    assert torch.equal(linear_quantised(x, *quantise_int4(eights)), linear_ref(x, eights))


INT8, SCALE = torch.zeros(8, 64, dtype=torch.int8), torch.ones(8)
INT4 = torch.zeros(8, 32, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("values", "scale", "message"),
    [
        (INT8[:, :60], SCALE, "dimension D of x is 64, elsewhere 60"),
        (INT8, torch.ones(9), r"scale \[9\] does not fit torch.int8 values \[8, 64\]"),
        (INT8, SCALE[:, None], r"scale \[8, 1\] does not fit"),
        (INT8, SCALE.bfloat16(), "scale of torch.int8 values must be torch.float32"),
        (INT8.short(), SCALE, "values must be torch.int8, torch.float8_e4m3fn"),
        (INT4, torch.ones(8, 3).bfloat16(), r"scale \[8, 3\] does not fit"),
        (INT4, torch.ones(8, 4).bfloat16(), r"one for each group of it"),
        (INT4, torch.ones(8, 2), "scale of torch.uint8 values must be torch.bfloat16"),
        (INT4, torch.ones(8, 0).bfloat16(), r"scale \[8, 0\] does not fit"),
    ],
)
def test_what_does_not_fit_is_named(values: Tensor, scale: Tensor, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        linear_quantised(torch.zeros(2, 64), values, scale)


def test_bytes() -> None:
    assert linear_quantised_bytes(1, 64, 10) == 640 + 40 + 2 * 74
    assert linear_quantised_bytes(1, 64, 10, weight_bits=4, group=32) == 320 + 40 + 2 * 74
