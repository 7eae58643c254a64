"""decide: final norm, two logits, p(respond), policy and next state of each session, all on the device.

    _chances   p = sigmoid(h1 . n - h0 . n),  n = x / sqrt(mean(x^2) + eps) weight      a program a row
    _policy    the decisions of a slot's rows and its next state                        a program a slot

Who owns what: of the programs that start for every row, the one at the first row of a slot owns the slot; the
others exit. Bytes moved: each row once; the norm's weight and two rows of the head from L2.
Why this version: the policy is a sequence, but an open one: until a row ends it, all rows before were silent.
So every row's count and arming are running sums, the first row that responds or is not finite ends the slot,
and no loop runs over rows: 63 padded rows in one spare slot take no longer than one. p is float64, as in the
definition: argmax is p > 1/2, and float32 has no p near 1/2.
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
def _chances(
    x, weight, head, chances, p_respond, width, x_stride, eps, BLOCK: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """chances float64 [R]: p, or NaN where a logit is not finite."""
    begin(DEPENDENT)
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    inside = column < width
    value = tl.load(x + row.to(tl.int64) * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    gain = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    silent = tl.load(head + column, mask=inside, other=0.0).to(tl.float32)
    respond = tl.load(head + width + column, mask=inside, other=0.0).to(tl.float32)
    scale = rsqrt(tl.sum(value * value, 0) / width + eps)
    normed = narrow(value * scale, x.dtype.element_ty).to(tl.float32) * gain
    normed = narrow(normed, x.dtype.element_ty).to(tl.float32)
    logit0, logit1 = tl.sum(normed * silent, 0), tl.sum(normed * respond, 0)
    finite = (tl.abs(logit0) < float("inf")) & (tl.abs(logit1) < float("inf"))
    p = 1.0 / (1.0 + tl.exp((logit0 - logit1).to(tl.float64)))
    tl.store(p_respond + row, p.to(tl.float32))
    tl.store(chances + row, tl.where(finite, p, float("nan")))


@triton.jit(do_not_specialize=["rows"])
def _policy(
    chances, slots, policy, state, decision, rows, BLOCK_ROWS: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    begin(DEPENDENT)
    slot = tl.load(slots + tl.program_id(0))
    row = tl.arange(0, BLOCK_ROWS)
    owner = tl.load(slots + row, mask=row < rows, other=-1)
    mine = (owner == slot) & (row < rows)
    if tl.min(tl.where(mine, row, rows), 0) == tl.program_id(0):
        threshold = tl.load(policy + 3 * slot).to(tl.float64)
        rearm = tl.load(policy + 3 * slot + 1).to(tl.float64)
        min_gap = tl.load(policy + 3 * slot + 2).to(tl.float64)
        since, armed = tl.load(state + 2 * slot), tl.load(state + 2 * slot + 1)
        p = tl.load(chances + row, mask=mine, other=2.0)
        low = (mine & (p <= rearm)).to(tl.int32)
        earlier = tl.cumsum(mine.to(tl.int32), 0) - 1  # rows of the slot before this one
        ready = ((tl.cumsum(low, 0) + armed) != 0) & (tl.minimum(since + earlier, MOST_CHUNKS) >= min_gap)
        fires = mine & (p > threshold) & ready  # not where p is NaN
        end = tl.min(tl.where(fires | (mine & (p != p)), row, rows), 0)
        ending = tl.where(fires, _RESPOND, _NONFINITE)
        choice = tl.where(row < end, _SILENT, tl.where(row == end, ending, _VOID))
        tl.store(decision + row, choice, mask=mine)

        before = mine & (row < end)  # silent ones: they alone have moved the state
        since = tl.minimum(since + tl.sum(before.to(tl.int32), 0), MOST_CHUNKS)
        armed = ((tl.sum(tl.where(before, low, 0), 0) + armed) != 0).to(tl.int32)
        fired = tl.max((fires & (row == end)).to(tl.int32), 0) != 0
        tl.store(state + 2 * slot, tl.where(fired, 0, since))
        tl.store(state + 2 * slot + 1, tl.where(fired, (rearm >= 1.0).to(tl.int32), armed))


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
    chances = torch.empty(rows, dtype=torch.float64, device=x.device)
    config = choose("decide", x.device, rows=rows, width=width)
    launch(
        _chances, (rows,), x, norm_weight, head, chances, p_respond, width, x.stride(0), eps,
        BLOCK=triton.next_power_of_2(width), **config,
    )  # fmt: skip
    block = triton.next_power_of_2(max(rows, 1))
    launch(_policy, (rows,), chances, slots, policy, state, decision, rows, BLOCK_ROWS=block)
    return p_respond, decision
