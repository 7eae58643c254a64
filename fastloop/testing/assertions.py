"""What a test of an op asserts: an implementation is right, the definition is what another formula says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Generator, Tensor

from ..ops.dispatch import REGISTRY
from .implementations import Implementation, copied
from .op_cases import Arguments, Case
from .selfcheck import compare, compare_redrawn, judge, results, widened
from .tolerance import FORMULA_BOUND, relative_error


def seeded(seed: int) -> Generator:
    return torch.Generator().manual_seed(seed)


def assert_right(
    implementation: Implementation, case: Case, redraw: Callable[[Generator], Case] | None = None
) -> None:
    """Results and changed arguments are within the bound of the definition, and nothing else has changed.

    redraw: makes the case from another seed. With it, a call that errs too much counts as wrong if it does so
    over many draws: of a few numbers it is chance.
    """
    if redraw is None:
        found = compare(implementation, case)
    else:
        found = compare_redrawn(implementation, case, lambda seed: redraw(seeded(seed)))
    assert found.ok, found.problem


def assert_near(out: Tensor, op: str, arguments: Arguments) -> None:
    """A result may differ from the definition's first one as much as an implementation's may."""
    reference = REGISTRY[op].reference
    plain, truth = (results(reference, copied(a), ())[0] for a in (arguments, widened(arguments)))
    found = judge("result", out, plain, truth)
    assert found.ok, found.problem


def assert_defined(op: str, case: Case, oracle: Callable[..., Any]) -> None:
    """The definition in float64 gives what `oracle` (the same arguments, another formula) gives."""
    wide = widened(case.arguments)
    theirs = oracle(**wide)
    theirs = theirs if isinstance(theirs, (list, tuple)) else [theirs]
    ours = results(REGISTRY[op].reference, wide, case.mutates)
    for number, (our, their) in enumerate(zip(ours, theirs, strict=True)):
        their = torch.as_tensor(their)
        assert our.shape == their.shape, f"result {number}: {our.shape}, {their.shape}"
        assert torch.equal(our.isnan(), their.isnan()), f"result {number}: NaN in the wrong place"
        error = relative_error(our.nan_to_num(0.0), their.nan_to_num(0.0))
        assert error <= FORMULA_BOUND, f"result {number}: off by {error:.2g}"


def bits(tensor: Tensor) -> Tensor:
    """A tensor's bytes: equal where even NaN are."""
    return tensor.contiguous().view(torch.uint8)
