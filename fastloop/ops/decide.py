"""decide: the decision head: final norm, two logits, policy, next state; never the whole vocabulary.

At ASSISTANT two tokens are legal: KEEP_SILENCE and TEXT_BEGIN. p(respond) is the softmax over those two
logits. The policy of a session is (threshold, rearm, min_gap):

    armed   <- armed or p <= rearm
    respond <- p > threshold and armed and chunks since the last response >= min_gap
    after a response: armed <- rearm >= 1, the count restarts

Plain argmax is threshold 0.5, rearm 1, min_gap 0. Source: the two-way decision of arXiv 2606.05121;
hysteresis as in a Schmitt trigger.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .contract import check_dims, check_dtype, check_floats, check_range
from .dispatch import define
from .native import (
    FLOAT32,
    address,
    check_in_place,
    check_native,
    register_native,
    require_native,
    rows_of,
)
from .rms_norm import rms_norm_ref

SILENT, RESPOND, NONFINITE, VOID = 0, 1, -1, -2


def _advance(p: float, policy: list[float], state: list[int]) -> int:
    """One step of the policy: the decision; `state` = [chunks since the last response, armed] moves on."""
    threshold, rearm, min_gap = policy
    armed = bool(state[1]) or p <= rearm
    if p > threshold and armed and state[0] >= min_gap:
        state[:] = [0, int(rearm >= 1)]
        return RESPOND
    state[:] = [min(state[0] + 1, 2**30), int(armed)]
    return SILENT


def _check(
    x: Tensor, norm_weight: Tensor, head: Tensor, slots: Tensor, policy: Tensor, state: Tensor
) -> None:
    """Check the contract."""
    check_dims("decide", x=(x, "R D"), norm_weight=(norm_weight, "D"), head=(head, "2 D"), slots=(slots, "R"))
    sizes = check_dims("decide", policy=(policy, "Z 3"), state=(state, "Z 2"))
    check_floats("decide", x=x, norm_weight=norm_weight, head=head)
    check_floats("decide", policy=policy)
    check_dtype("decide", torch.int64, slots=slots)
    check_dtype("decide", torch.int32, state=state)
    check_range("decide", "slots", slots, 0, sizes["Z"])


def _chances(x: Tensor, norm_weight: Tensor, eps: float, head: Tensor) -> tuple[Tensor, Tensor]:
    """p(respond) float64 [R], and whether both logits are finite, bool [R]."""
    logits = rms_norm_ref(x, norm_weight, eps) @ head.T
    margin = (logits[:, 1] - logits[:, 0]).double()
    return margin.sigmoid(), logits.isfinite().all(-1)


def decide_ref(
    x: Tensor,
    norm_weight: Tensor,
    eps: float,
    head: Tensor,
    slots: Tensor,
    policy: Tensor,
    state: Tensor,
) -> tuple[Tensor, Tensor]:
    """x [R, D], norm_weight [D], head [2, D] = rows (KEEP_SILENCE, TEXT_BEGIN), slots int64 [R],
    policy float32 [Z, 3] = (threshold, rearm, min_gap chunks), state int32 [Z, 2] (changed in place)
    -> p(respond) float32 [R], decision int32 [R].

    Rows of one slot follow each other in time order. Once a slot has responded in this call, its later
    rows are VOID: they were computed under the assumption of silence. A row whose logits are not finite
    is NONFINITE (never silence), and so void for what follows. Neither changes the state.
    """
    _check(x, norm_weight, head, slots, policy, state)
    p, whole = _chances(x, norm_weight, eps, head)
    finite, chances, owners = whole.tolist(), p.tolist(), slots.tolist()
    used = sorted(set(owners))
    policies, states = (dict(zip(used, t[used].tolist(), strict=True)) for t in (policy, state))
    ended: set[int] = set()
    decisions = []
    for row, owner in enumerate(owners):
        decision = VOID
        if owner not in ended:
            decision = _advance(chances[row], policies[owner], states[owner]) if finite[row] else NONFINITE
            if decision != SILENT:
                ended.add(owner)
        decisions.append(decision)
    if used:
        state[used] = torch.tensor([states[z] for z in used], dtype=state.dtype, device=state.device)
    return p.float(), torch.tensor(decisions, dtype=torch.int32, device=x.device)


def decide_graph(
    x: Tensor,
    norm_weight: Tensor,
    eps: float,
    head: Tensor,
    slots: Tensor,
    policy: Tensor,
    state: Tensor,
) -> tuple[Tensor, Tensor]:
    """The same with the policy in closed form: what a row's slot has heard before it, as [R, R] tables."""
    _check(x, norm_weight, head, slots, policy, state)
    p, finite = _chances(x, norm_weight, eps, head)
    rows = len(slots)
    if not rows:
        return p.float(), p.int()
    threshold, rearm, min_gap = policy[slots].double().unbind(1)
    row = torch.arange(rows, device=x.device)
    same = slots[:, None] == slots  # [R, R]
    earlier = same & (row < row[:, None])
    since = (state[slots, 0].long() + earlier.sum(1)).clamp(max=2**30)  # chunks, had all before been silent
    heard = earlier | (same & (row == row[:, None]))
    armed = (state[slots, 1] != 0) | (heard & (p <= rearm[:, None])).any(1)
    respond = (p > threshold) & armed & (since >= min_gap) & finite
    void = (earlier & (respond | ~finite)).any(1)
    decision = torch.where(respond, RESPOND, torch.where(finite, SILENT, NONFINITE))
    decision = torch.where(void, VOID, decision)
    # The last row of a slot that is silent or responds leaves its state; each row stores that row's.
    after = torch.where(
        respond[:, None],
        torch.stack((torch.zeros_like(since), (rearm >= 1).long()), 1),
        torch.stack(((since + 1).clamp(max=2**30), armed.long()), 1),
    )
    counts = same & (decision >= SILENT)
    last = torch.where(counts, row, -1).amax(1)
    moved = torch.where((last >= 0)[:, None], after[last.clamp(min=0)].int(), state[slots])
    state[slots] = moved
    return p.float(), decision.int()


def _fake(x: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    rows = x.shape[0]
    return x.new_empty(rows, dtype=torch.float32), x.new_empty(rows, dtype=torch.int32)


decide = define(decide_ref, _fake, mutates=("state",))
decide.register("graph", decide_graph)


def decide_cpu(
    x: Tensor,
    norm_weight: Tensor,
    eps: float,
    head: Tensor,
    slots: Tensor,
    policy: Tensor,
    state: Tensor,
    isa: str | None = None,
) -> tuple[Tensor, Tensor]:
    """`decide_ref` in C++ (csrc/cpu/decide.cpp), float32; the same p to the bit alone and in any batch."""
    _check(x, norm_weight, head, slots, policy, state)
    check_native("decide", x=x, norm_weight=norm_weight, head=head, slots=slots, policy=policy, state=state)
    check_in_place("decide", "state", state)
    x, norm_weight, head = rows_of(x), norm_weight.contiguous(), head.contiguous()
    slots, policy = slots.contiguous(), policy.contiguous()
    p = x.new_empty(len(x))
    decision = torch.empty(len(x), dtype=torch.int32)
    require_native().decide(
        rows=x.shape[0],
        width=x.shape[1],
        x=address(x),
        x_stride=x.stride(0),
        norm_weight=address(norm_weight),
        eps=eps,
        head=address(head),
        slots=address(slots),
        slot_count=len(state),
        policy=address(policy),
        state=address(state),
        p_respond=address(p),
        decision=address(decision),
        isa=isa,
    )
    return p, decision


register_native(decide, decide_cpu, takes={"x": FLOAT32, "policy": FLOAT32})


def decide_bytes(rows: int, width: int, itemsize: int = 4) -> int:
    """Bytes moved: the rows, the norm's weight and two rows of the head."""
    return (rows + 3) * width * itemsize
