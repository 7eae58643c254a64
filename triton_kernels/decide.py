"""decide: final norm, two logits, p(respond), policy and next state of each session, all on the device.

    p = sigmoid(h1 . n - h0 . n),  n = x / sqrt(mean(x^2) + eps) weight

Who owns what: a program per row starts; the one at the first row of a slot owns the slot and works through
the slot's rows in their order, for the policy is a sequence: each row's norm and logits, then its step of the
policy. The others exit. Bytes moved: each row once; the norm's weight and two rows of the head from L2.
Why this version: without speculation every slot has one row, so all rows run side by side; k queued chunks of
a session cost k times one row's microsecond, and no second kernel, no atomic and no host is needed.
The policy compares p in float64, as the definition does: argmax is p > 1/2, and float32 has no p near 1/2.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops.decide import NONFINITE, RESPOND, SILENT, VOID
from ..ops.decide import _check as check_decide
from .device import begin, narrow, rsqrt
from .launch import accept, launch, rows_apart
from .tuning import choose

_SILENT, _RESPOND = tl.constexpr(SILENT), tl.constexpr(RESPOND)
_NONFINITE, _VOID = tl.constexpr(NONFINITE), tl.constexpr(VOID)
MOST_CHUNKS = tl.constexpr(2**30)  # the count of chunks since a response stays there


@triton.jit
def _next_row(slots, slot, after, rows, BLOCK_ROWS: tl.constexpr):
    """The first row behind `after` that belongs to `slot`, or `rows`."""
    row = tl.arange(0, BLOCK_ROWS)
    owner = tl.load(slots + row, mask=row < rows, other=-1)
    return tl.min(tl.where((owner == slot) & (row > after), row, rows), 0)


@triton.jit(do_not_specialize=["rows"])
def _decide(
    x, weight, head, slots, policy, state, p_respond, decision, rows, width, x_stride, eps,
    BLOCK: tl.constexpr, BLOCK_ROWS: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    begin(DEPENDENT)
    row = tl.program_id(0)
    slot = tl.load(slots + row)
    if _next_row(slots, slot, -1, rows, BLOCK_ROWS) == row:
        column = tl.arange(0, BLOCK)
        inside = column < width
        gain = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
        silent = tl.load(head + column, mask=inside, other=0.0).to(tl.float32)
        respond = tl.load(head + width + column, mask=inside, other=0.0).to(tl.float32)
        threshold = tl.load(policy + 3 * slot).to(tl.float64)
        rearm = tl.load(policy + 3 * slot + 1).to(tl.float64)
        min_gap = tl.load(policy + 3 * slot + 2).to(tl.float64)
        since, armed = tl.load(state + 2 * slot), tl.load(state + 2 * slot + 1)
        open_ = row == row  # until the slot responds or a row is not finite
        while row < rows:
            value = tl.load(x + row.to(tl.int64) * x_stride + column, mask=inside, other=0.0).to(tl.float32)
            scale = rsqrt(tl.sum(value * value, 0) / width + eps)
            normed = narrow(value * scale, x.dtype.element_ty).to(tl.float32) * gain
            normed = narrow(normed, x.dtype.element_ty).to(tl.float32)
            logit0, logit1 = tl.sum(normed * silent, 0), tl.sum(normed * respond, 0)
            finite = (tl.abs(logit0) < float("inf")) & (tl.abs(logit1) < float("inf"))
            p = 1.0 / (1.0 + tl.exp((logit0 - logit1).to(tl.float64)))
            now = ((armed != 0) | (p <= rearm)).to(tl.int32)
            fires = open_ & finite & (p > threshold) & (now != 0) & (since.to(tl.float64) >= min_gap)
            keeps = open_ & finite & ~fires
            choice = tl.where(finite, _SILENT, _NONFINITE)
            choice = tl.where(open_, tl.where(fires, _RESPOND, choice), _VOID)
            tl.store(p_respond + row, p.to(tl.float32))
            tl.store(decision + row, choice)
            armed = tl.where(fires, (rearm >= 1.0).to(tl.int32), tl.where(keeps, now, armed))
            since = tl.where(fires, 0, tl.where(keeps, tl.minimum(since + 1, MOST_CHUNKS), since))
            open_ = keeps
            row = _next_row(slots, slot, row, rows, BLOCK_ROWS)
        tl.store(state + 2 * slot, since)
        tl.store(state + 2 * slot + 1, armed)


def decide_triton(
    x: Tensor,
    norm_weight: Tensor,
    eps: float,
    head: Tensor,
    slots: Tensor,
    policy: Tensor,
    state: Tensor,
) -> tuple[Tensor, Tensor]:
    """`decide_ref` on a GPU: x [R, D], norm_weight [D], head [2, D], slots int64 [R], policy float32 [Z, 3],
    state int32 [Z, 2] (changed in place) -> p(respond) float32 [R], decision int32 [R].

    Logits are in float32 and not rounded to x's dtype.
    """
    check_decide(x, norm_weight, head, slots, policy, state)
    accept("decide", x=x, norm_weight=norm_weight, head=head, slots=slots, policy=policy, state=state)
    if not state.is_contiguous():
        raise ValueError(f"decide: state is changed in place and must be contiguous, got {state.stride()}")
    rows, width = x.shape
    x, norm_weight, head = rows_apart(x), norm_weight.contiguous(), head.contiguous()
    slots, policy = slots.contiguous(), policy.contiguous()
    p_respond = torch.empty(rows, dtype=torch.float32, device=x.device)
    decision = torch.empty(rows, dtype=torch.int32, device=x.device)
    config = choose("decide", x.device, rows=rows, width=width)
    launch(
        _decide, (rows,), x, norm_weight, head, slots, policy, state, p_respond, decision, rows, width,
        x.stride(0), eps, BLOCK=triton.next_power_of_2(width),
        BLOCK_ROWS=triton.next_power_of_2(max(rows, 1)), **config,
    )  # fmt: skip
    return p_respond, decision
