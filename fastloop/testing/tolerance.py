"""Error measures and derived bounds: no hand-picked tolerance stands in a test."""

from __future__ import annotations

import torch
from torch import Tensor


def relative_error(out: Tensor, reference: Tensor) -> float:
    """||out - reference|| / ||reference|| in float64; 0 for two zeros, inf where `out` is not finite."""
    difference = (out.double() - reference.double()).norm()
    if not bool(difference.isfinite()):
        return float("inf")
    scale = reference.double().norm()
    return float(difference / scale) if scale > 0 else float(difference)


def error_bound(plain: Tensor, reference: Tensor, dtype: torch.dtype, factor: float = 2.0) -> float:
    """What a kernel may err: `factor` times the error of plain PyTorch at the same precision, both against
    float64; at least one rounding of the result (where plain PyTorch happens to be exact).
    """
    return factor * max(relative_error(plain, reference), torch.finfo(dtype).eps)


# Two float64 formulas of one thing: sums of at most 2^16 terms in different orders.
FORMULA_BOUND = 2.0**16 * torch.finfo(torch.float64).eps
