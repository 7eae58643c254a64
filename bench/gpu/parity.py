"""Every implementation of every op on this device against its definition in float64, on inputs drawn anew; at
the dims of the model, too; and captured graphs against eager calls.
"""

from __future__ import annotations

import functools
import secrets
from collections.abc import Callable

import torch

from fastloop.ops import REGISTRY
from fastloop.testing.implementations import Implementation, implementations
from fastloop.testing.op_cases import CASES, Case
from fastloop.testing.selfcheck import compare_redrawn

from .clock import capture
from .model import APART, OURS, ListeningStep
from .record import Context, Record
from .shapes import model_cases, small_bfloat16, small_quantised, small_scaled


def run(context: Context, record: Record) -> None:
    """Values: the seed, and error and bound of each check."""
    seed = secrets.randbits(32)
    record.put(seed=seed, errors={})
    checks = small_checks(context)
    checks += [
        (op, "model dims", make)
        for op, make in model_cases(context.config, context.dtype).items()
        if not context.dry
    ]
    done = 0
    for op, kind, make in checks:
        for chosen in _serving(op, context):
            for place, case in enumerate(_drawn(make, seed)):
                if not chosen.refusal(case.arguments):
                    redraw = functools.partial(
                        lambda make, place, seed: _drawn(make, seed)[place], make, place
                    )
                    done += _check(chosen, kind, case, redraw, record)
    record.put(checks_text=f"{done} right of {len(record.values['errors'])}")
    for precision in ("", "fp8"):
        if not precision or context.left_s > 5:
            _graph(context, record, precision)  # fp8: weights and pages


def small_checks(context: Context) -> list[tuple[str, str, Callable[[torch.Generator], list[Case]]]]:
    """(op, kind, cases) in sizes that leave a rest of every tile."""
    checks = [(op, "small", CASES[op]) for op in REGISTRY]
    if not context.dry:
        checks.append(("linear", "small, bfloat16", small_bfloat16))
        checks.append(("linear_quantised", "small, bfloat16", small_quantised))
    for op in ("rope_append", "paged_attention"):
        for dtype in (torch.float32,) if context.dry else (torch.float32, torch.bfloat16):
            make = functools.partial(small_scaled, op=op, dtype=dtype)
            checks.append((op, f"fp8 pages, {str(dtype).removeprefix('torch.')}", make))
    if context.dry:  # the slow ones to interpret; tests/triton has them
        checks = [check for check in checks if check[0] not in ("mel", "sample")]
    return checks


def _serving(op: str, context: Context) -> list[Implementation]:
    if context.dry:
        return [Implementation(op, "triton", "cpu")]
    return [i for i in implementations(op) if i.device == "cuda" and not i.missing]


def _drawn(make: Callable[[torch.Generator], list[Case]], seed: int) -> list[Case]:
    return make(torch.Generator().manual_seed(seed))


def _check(
    chosen: Implementation, kind: str, case: Case, redraw: Callable[[int], Case], record: Record
) -> bool:
    name = f"{chosen.op}, {chosen.backend}, {kind}, {len(record.values['errors'])}"
    try:
        found = compare_redrawn(chosen, case, redraw)
    except Exception as error:  # whatever an implementation raises is what is reported of it
        record.problem(f"{name}: raised {type(error).__name__}: {error}"[:400])
        record.values["errors"][name] = None
        return False
    record.values["errors"][name] = [found.error, found.bound]
    record.save()
    if not found.ok:
        record.problem(f"{name}: {found.problem}")
    return found.ok


def _graph(context: Context, record: Record, precision: str) -> None:
    """A captured listening step, replayed on new contents of its buffers, against the same step called.
    precision: of its weights, "" for the model's dtype; with another one its pages are float8.
    """
    step = ListeningStep(context, 2, 40, APART, precision, scaled=bool(precision))
    kind = precision or "plain"
    eager = step.results(seed=1)
    if context.dry:
        record.put(**{f"graph_{kind}_text": "no graphs on the CPU"})
        again: Callable[[], None] = step.run
    else:
        again = capture([step.run])
    results = step.results(seed=1, run=again)
    other = step.results(seed=2, run=again)
    step.backend = OURS  # on sm_90 and newer kernels overlap
    overlapped = step.results(seed=1, run=step.run if context.dry else capture([step.run]))
    same = all(torch.equal(a, b) for a, b in zip(eager * 2, [*results, *overlapped], strict=True))
    differ = not torch.equal(results[0], other[0])
    if not same or not differ:
        record.problem(f"captured step, {kind}: equal to eager: {same}; follows new inputs: {differ}")
    elif not context.dry:
        told = "captured == captured with dependent launches == eager, to the bit"
        record.put(**{f"graph_{kind}_text": told})
