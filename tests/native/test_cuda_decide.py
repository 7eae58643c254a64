"""decide in CUDA C++, run on the CPU: decisions and state must be equal, p(respond) within its bound."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fastloop.ops.decide import NONFINITE, RESPOND, SILENT, VOID, _advance
from fastloop.testing.assertions import seeded
from fastloop.testing.op_cases import decide_case

every_float = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
every_team = pytest.mark.parametrize("blocks", [1, 2, 8])


@every_team
@pytest.mark.parametrize("seed", range(6))
def test_is_the_definition(check: Callable[..., None], seed: int, blocks: int) -> None:
    """Rows of several sessions in any order, policies of every kind."""
    case = decide_case(seeded(seed), rows=1 + 11 * seed, width=50 + seed, sessions=1 + seed)
    check("decide", case, seed=seed, blocks=blocks)


@pytest.mark.parametrize("rearm", [0.2, 1.0])
@pytest.mark.parametrize("min_gap", [0, 3])
def test_of_many_rows_of_one_session(check: Callable[..., None], rearm: float, min_gap: int) -> None:
    """Speculation, and the spare slot of padded rows: up to 70 rows of a slot in one call."""
    for seed in range(4):
        case = decide_case(seeded(seed), rows=70, sessions=2)
        case.arguments["policy"][:] = torch.tensor([0.97, rearm, float(min_gap)])
        case.arguments["state"][:] = torch.tensor([[seed, seed % 2]], dtype=torch.int32)
        check("decide", case, seed=seed, blocks=1 + seed)


def test_of_a_thousand_rows_at_the_models_width(check: Callable[..., None]) -> None:
    check("decide", decide_case(seeded(7), rows=1000, width=256, sessions=990), blocks=8)
    check("decide", decide_case(seeded(8), rows=3, width=2048), blocks=1)


@every_float
def test_in_narrow_dtypes_follows_its_own_p(kernels: Any, dtype: torch.dtype) -> None:
    """Logits are not rounded, so near a threshold the definition in bfloat16 may decide otherwise."""
    case = decide_case(seeded(8), rows=20, dtype=dtype)
    wide = {n: v.double() if n in ("x", "norm_weight", "head") else v for n, v in case.arguments.items()}
    state = case.arguments["state"].clone()
    p, decisions = kernels.decide(**case.arguments)
    normed = wide["x"] * (wide["x"].square().mean(-1, keepdim=True) + wide["eps"]).rsqrt()
    margin = normed * wide["norm_weight"] @ (wide["head"][1] - wide["head"][0])
    assert (p - margin.sigmoid()).abs().max() < 2**-23
    ended: set[int] = set()
    for row, slot in enumerate(case.arguments["slots"].tolist()):
        policy, own = case.arguments["policy"][slot].tolist(), state[slot].tolist()
        expected = VOID if slot in ended else _advance(float(p[row]), policy, own)
        assert int(decisions[row]) == expected
        state[slot] = torch.tensor(own, dtype=torch.int32)
        ended |= set() if expected == SILENT else {slot}
    assert torch.equal(state, case.arguments["state"])
    assert {SILENT, RESPOND} <= set(decisions.tolist())


@every_float
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_of_what_is_not_finite(kernels: Any, dtype: torch.dtype, poison: float) -> None:
    """Never silence: the row is NONFINITE, its slot's later rows are void, its state stays, others go on."""
    a = decide_case(seeded(9), rows=6, sessions=2, dtype=dtype).arguments
    a["slots"] = torch.tensor([0, 1, 0, 1, 0, 1])
    a["policy"][:] = torch.tensor([1.0, 1.0, 0.0])  # never responds
    a["x"][2, 5] = poison
    _, decisions = kernels.decide(**a)
    assert decisions.tolist() == [SILENT, SILENT, NONFINITE, SILENT, VOID, SILENT]
    assert a["state"][0, 0] == 2**30  # counts one row, and stays at its limit


def test_near_one_half(kernels: Any) -> None:
    """A margin of 1e-10 is above 1/2 in float64 and exactly 1/2 in float32: argmax responds."""
    x = torch.tensor([[1.0, 0.0], [1.0, -1.0]])
    head = torch.tensor([[0.0, 0.0], [1e-10, 1e-10]])
    policy, state = torch.tensor([[0.5, 1.0, 0.0]] * 2), torch.tensor([[2**30, 1]] * 2, dtype=torch.int32)
    p, decisions = kernels.decide(x, torch.ones(2), 0.0, head, torch.tensor([0, 1]), policy, state)
    assert p.tolist() == [0.5, 0.5]
    assert decisions.tolist() == [RESPOND, SILENT]
