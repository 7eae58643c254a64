"""decide in Triton against its definition: decisions and state must be equal, p(respond) within its bound."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from fastloop.ops.decide import NONFINITE, RESPOND, SILENT, VOID, _advance
from fastloop.testing.implementations import Implementation
from fastloop.testing.op_cases import Case, decide_case

Check = Callable[[str, Case], None]


def generator(seed: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("seed", range(6))
def test_equals_the_definition(check: Check, seed: int) -> None:
    """Rows of several sessions in any order, policies of every kind."""
    check("decide", decide_case(generator(seed), rows=1 + 7 * seed, width=50 + seed, sessions=1 + seed))


@pytest.mark.parametrize("rearm", [0.2, 1.0])
@pytest.mark.parametrize("min_gap", [0, 3])
def test_many_rows_of_one_session(check: Check, rearm: float, min_gap: int) -> None:
    """Speculation, and the spare slot of padded rows: up to 70 rows of a slot in one call."""
    for seed in range(4):
        case = decide_case(generator(seed), rows=70, sessions=2)
        case.arguments["policy"][:] = torch.tensor([0.97, rearm, float(min_gap)])
        case.arguments["state"][:] = torch.tensor([[seed, seed % 2]], dtype=torch.int32)
        check("decide", case)


def test_model_width(check: Check) -> None:
    check("decide", decide_case(generator(7), rows=3, width=2048))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_dtypes_follow_their_own_p(device: str, dtype: torch.dtype) -> None:
    """Logits are not rounded here, so near a threshold the definition in bfloat16 may decide otherwise: the
    decisions must be what the policy makes of the p that is returned.
    """
    case = decide_case(generator(8), rows=20, dtype=dtype)
    state = case.arguments["state"].clone()
    p, decisions = Implementation("decide", "triton", device)(**case.arguments)
    ended: set[int] = set()
    for row, slot in enumerate(case.arguments["slots"].tolist()):
        policy, own = case.arguments["policy"][slot].tolist(), state[slot].tolist()
        expected = VOID if slot in ended else _advance(float(p[row]), policy, own)
        assert int(decisions[row]) == expected
        state[slot] = torch.tensor(own, dtype=torch.int32)
        ended |= set() if expected == SILENT else {slot}
    assert torch.equal(state, case.arguments["state"])
    assert {SILENT, RESPOND} <= set(decisions.tolist())


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_not_finite(check: Check, device: str, poison: float) -> None:
    """Never silence: the row is NONFINITE, its slot's later rows are void, its state stays, others go on."""
    case = decide_case(generator(9), rows=6, sessions=2)
    case.arguments["slots"] = torch.tensor([0, 1, 0, 1, 0, 1])
    case.arguments["policy"][:] = torch.tensor([1.0, 1.0, 0.0])  # never responds
    case.arguments["x"][2, 5] = poison
    check("decide", case)
    _, decisions = Implementation("decide", "triton", device)(**case.arguments)
    assert decisions.tolist() == [SILENT, SILENT, NONFINITE, SILENT, VOID, SILENT]
    assert case.arguments["state"][0, 0] == 2**30  # counts one row, and stays at its limit


def test_argmax_near_one_half(device: str) -> None:
    """A margin of 1e-10 is above 1/2 in float64 and exactly 1/2 in float32: argmax responds."""
    arguments = {
        "x": torch.tensor([[1.0, 0.0], [1.0, -1.0]]),
        "norm_weight": torch.ones(2),
        "eps": 0.0,
        "head": torch.tensor([[0.0, 0.0], [1e-10, 1e-10]]),
        "slots": torch.tensor([0, 1]),
        "policy": torch.tensor([[0.5, 1.0, 0.0]] * 2),
        "state": torch.tensor([[2**30, 1]] * 2, dtype=torch.int32),
    }
    p, decisions = Implementation("decide", "triton", device)(**arguments)
    assert float(p[0]) == 0.5 and decisions.tolist() == [RESPOND, SILENT]


def test_no_rows(device: str) -> None:
    case = decide_case(generator(10), rows=1)
    none = {name: case.arguments[name][:0] for name in ("x", "slots")}
    p, decisions = Implementation("decide", "triton", device)(**case.arguments | none)
    assert p.shape == decisions.shape == (0,)
