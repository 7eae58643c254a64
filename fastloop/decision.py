"""The decision: hidden state at ASSISTANT -> silent | respond, p(respond), under each session's policy.

    hidden [R, D] -> op `decide` (final norm, two logits, policy) -> p(respond) [R], decision [R]

Only KEEP_SILENCE and TEXT_BEGIN are legal at ASSISTANT, so the head computes those two logits alone. A
decision is the policy applied to p(respond); it is never sampled. The published programs take the argmax
over the whole vocabulary in one and sample in the other, and raise or warn on any third token; here a
third token cannot occur.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import ops
from .config import ModelConfig
from .decoder import Decoder
from .ops.decide import NONFINITE, RESPOND, SILENT, VOID
from .options import DecisionPolicy

__all__ = ["NONFINITE", "RESPOND", "SILENT", "VOID", "DecisionState", "decide"]


class DecisionState:
    """Policies and their state for Z sessions, changed in place.

    policy: float32 [Z, 3] = (threshold, rearm, min_gap chunks)
    state: int32 [Z, 2] = (chunks since the last response, armed)
    """

    def __init__(self, slots: int, device: torch.device | str = "cpu") -> None:
        self.policy = torch.zeros(slots, 3, dtype=torch.float32, device=device)
        self.state = torch.zeros(slots, 2, dtype=torch.int32, device=device)

    def reset(self, slot: int, policy: DecisionPolicy, model: ModelConfig) -> None:
        """A fresh session in `slot`: armed, and as if no response had ever been given."""
        self.policy[slot] = torch.tensor(policy.row(model))
        self.state[slot] = torch.tensor([2**30, 1], dtype=torch.int32)


def decide(
    decoder: Decoder, hidden: Tensor, slots: Tensor, decisions: DecisionState
) -> tuple[Tensor, Tensor]:
    """hidden [R, D] at ASSISTANT rows, slots int64 [R] -> p(respond) float32 [R], decision int32 [R]."""
    p, decision = ops.decide(
        hidden,
        decoder.weights["decoder.norm.weight"],
        decoder.config.decoder.norm_eps,
        decoder.control_head,
        slots,
        decisions.policy,
        decisions.state,
    )
    return p, decision
