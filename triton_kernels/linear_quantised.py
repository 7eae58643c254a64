"""linear_quantised: the kernels of `linear` over weights in 8 or 4 bits, widened as they are read.

int8 and float8_e4m3fn have a scale for each channel, which the epilogue applies. int4 has one for each
channel and group of inputs; the low and the high bits of its bytes are two products, with the even and
the odd inputs, so no weight changes its place. Bytes moved: the stored weights once. Who owns what:
triton_kernels/linear.py.
"""

from __future__ import annotations

from torch import Tensor

from ..ops.linear_quantised import check_quantised
from .launch import accept, accept_float8
from .linear import run_linear


def linear_quantised_triton(
    x: Tensor,
    values: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    epilogue: str = "none",
    residual: Tensor | None = None,
) -> Tensor:
    """`linear_quantised_ref` on a GPU; sums, scales and epilogue are in float32 and rounded once."""
    group, _ = check_quantised(x, values, scale, bias, epilogue, residual)
    stored = accept_float8("linear_quantised", "values", values)
    accept("linear_quantised", x=x, values=stored, scale=scale, bias=bias, residual=residual)
    return run_linear(
        x, values, scale, bias, epilogue, residual, "int4" if group else "scaled", max(group, 1)
    )
