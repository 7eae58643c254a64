"""Every implementation of an op against its definition, on small random inputs: `fastloop doctor` and tests.

The truth is the op's reference in float64. An implementation may err twice as much as the reference does at
the precision of the arguments (fastloop.testing.tolerance), and what is not a float (decisions, token ids,
counters) must be equal. Arguments that an op changes in place are compared like its results; all others, and
the memory around all of them, must be as they were.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..ops.dispatch import REGISTRY
from .implementations import Implementation, copied, fence_broken
from .op_cases import CASES, Arguments, Case
from .tolerance import error_bound, relative_error

SEED = 20_260_605
GUARD = 64  # elements around every argument
POOLED = 2048  # numbers: both errors are known to some 2 %


@dataclass(frozen=True)
class Finding:
    """The worst of an implementation's cases. error: relative to the truth, None where it does not compare
    (it raised, or differs in what is not a float); bound: what it may be; problem: "" if all is well.
    """

    error: float | None
    bound: float | None
    problem: str = ""

    @property
    def ok(self) -> bool:
        return not self.problem


def self_check(op: str, backend: str, device: str = "cpu") -> Finding:
    """Run all cases of an op through one implementation on a device. What it raises is its problem."""
    if op not in CASES:
        return Finding(None, None, "has no self-check; add one to fastloop.testing.op_cases")
    found, checked = Finding(0.0, 0.0), False
    for drawn in CASES[op](torch.Generator().manual_seed(SEED)):
        case = taken(Implementation(op, backend, device), drawn)
        if case is None:
            continue
        checked = True
        try:
            found = _worse(found, compare(Implementation(op, backend, device), case))
        except Exception as error:  # whatever an implementation raises is what is reported of it
            return Finding(None, None, f"raised {type(error).__name__}: {error}")
        if not found.ok:
            break
    return found if checked else Finding(None, None, "takes none of the self-check's cases")


def taken(implementation: Implementation, case: Case) -> Case | None:
    """The case, or the same in bfloat16 if its dtype is not taken; None if that is not, either."""
    if not implementation.refusal(case.arguments):
        return case
    rows = ("x", "weight", "bias", "residual", "q", "k_pages", "v_pages")  # of one dtype where an op has them
    narrowed = {n: v.bfloat16() for n, v in case.arguments.items() if n in rows and isinstance(v, Tensor)}
    case = replace(case, arguments={**case.arguments, **narrowed})
    return None if implementation.refusal(case.arguments) else case


def compare(implementation: Implementation, case: Case) -> Finding:
    """One call: the result that errs most, or what is wrong."""
    plains, truths = expected(implementation.op, case)
    arguments = copied(case.arguments, GUARD)
    outs = _call(implementation, arguments, case.mutates)
    touched = _touched(case, arguments)
    if touched:
        return Finding(None, None, touched)
    found = Finding(0.0, 0.0)
    for number, (out, plain, truth) in enumerate(zip(outs, plains, truths, strict=True)):
        measure = torch.Tensor.double if number else case.measure
        found = _worse(found, judge(f"result {number}", out, plain, truth, measure))
    return found


def compare_pooled(implementation: Implementation, draws: Iterable[Case], numbers: int) -> Finding:
    """The same call on other and other arguments, until so many numbers have come out; all of them are judged
    as one result. Where few come out of a call, its error beside PyTorch's is chance: of one number each, the
    one is more than twice the other in three cases of ten, though both round alike.
    """
    pools: dict[int, list[tuple[Tensor, Tensor, Tensor]]] = {}
    count = 0
    for case in draws:
        plains, truths = expected(implementation.op, case)
        outs = _call(implementation, copied(case.arguments), case.mutates)
        for number, trio in enumerate(zip(outs, plains, truths, strict=True)):
            measure = torch.Tensor.double if number else case.measure
            if not (found := judge(f"result {number}", *trio, measure)).ok and found.error is None:
                return found
            if trio[0].is_floating_point():
                known = ~trio[2].isnan()
                out, plain, truth = (t[known].flatten() for t in trio)
                pools.setdefault(number, []).append((measure(out), measure(plain), measure(truth)))
        count += outs[0].numel()
        if count >= numbers:
            break
    found = Finding(0.0, 0.0)
    for number, pool in pools.items():
        out, plain, truth = (torch.cat(part) for part in zip(*pool, strict=True))
        error, bound = relative_error(out, truth), error_bound(plain, truth, outs[number].dtype)
        told = f"result {number} of {len(pool)} calls is off by {error:.2g}, at most {bound:.2g} is right"
        found = _worse(found, Finding(error, bound, "" if error <= bound else told))
    return found


def compare_redrawn(implementation: Implementation, case: Case, redraw: Callable[[int], Case]) -> Finding:
    """`compare`, but a call that errs too much is wrong if it does so over many draws. redraw: it by seed."""
    found = compare(implementation, case)
    if found.ok or found.error is None:
        return found
    return compare_pooled(implementation, (redraw(seed) for seed in range(POOLED)), POOLED)


def expected(op: str, case: Case) -> tuple[list[Tensor], list[Tensor]]:
    """What plain PyTorch makes of a call, and the truth: results, then changed arguments."""
    reference = REGISTRY[op].reference
    plains = results(reference, case.arguments, case.mutates)
    if case.truth:
        return plains, case.truth(case.arguments)
    return plains, results(reference, widened(case.arguments), case.mutates)


def judge(
    name: str,
    out: Tensor,
    plain: Tensor,
    truth: Tensor,
    measure: Callable[[Tensor], Tensor] = torch.Tensor.double,
) -> Finding:
    """One result, against what plain PyTorch makes of the same and the truth; floats compare in `measure`."""
    if out.shape != plain.shape or out.dtype != plain.dtype:
        made, must = f"{out.dtype} {list(out.shape)}", f"{plain.dtype} {list(plain.shape)}"
        return Finding(None, None, f"{name} is {made}, must be {must}")
    if not out.is_floating_point():
        equal = torch.equal(out, plain)
        return Finding(0.0, 0.0) if equal else Finding(None, None, f"{name} differs where it must be equal")
    unknown = truth.isnan()  # memory that was poison before the call and is not written
    if not torch.equal(out.isnan(), unknown):
        return Finding(None, None, f"{name} is off by inf: NaN in the wrong place")
    dtype = plain.dtype
    wide = (t.float() if t.element_size() == 1 else t for t in (out, plain, truth))  # float8 cannot be masked
    out, plain, truth = (measure(t.masked_fill(unknown, 0)) for t in wide)
    error, bound = relative_error(out, truth), error_bound(plain, truth, dtype)
    if error <= bound:
        return Finding(error, bound)
    told = f"{name} is off by {error:.2g}, at most {bound:.2g} is right"
    return Finding(error if math.isfinite(error) else None, bound, told)


def _worse(a: Finding, b: Finding) -> Finding:
    if not a.ok or not b.ok:
        return b if a.ok else a
    assert a.error is not None and a.bound is not None and b.error is not None and b.bound is not None
    return max(a, b, key=lambda found: (found.error or 0.0, found.bound or 0.0))


def widened(arguments: Arguments) -> Arguments:
    """The arguments in float64."""
    return {
        name: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v
        for name, v in arguments.items()
    }


def results(
    function: Callable[..., Any], arguments: Mapping[str, Any], mutates: Collection[str]
) -> list[Tensor]:
    """Results, then changed arguments, of a call on copies of these, so that calls do not see each other."""
    own = copied({name: arguments[name] for name in mutates})
    return _call(function, {**arguments, **own}, mutates)


def _call(function: Callable[..., Any], arguments: Arguments, mutates: Iterable[str]) -> list[Tensor]:
    with torch.inference_mode():
        result = function(**arguments)
    made = list(result) if isinstance(result, tuple) else [result]
    return [*made, *(arguments[name] for name in mutates)]


def _touched(case: Case, after: Arguments) -> str:
    """What a call changed that it must not, or ""."""
    for name, before in case.arguments.items():
        if not isinstance(before, Tensor):
            continue
        if name not in case.mutates and not torch.allclose(after[name], before, 0, 0, equal_nan=True):
            return f"{name} was changed"
        if fence_broken(after[name], GUARD):
            return f"memory around {name} was changed"
    return ""
