"""The op `decide`: p(respond) against float64 and numpy, the policy against a state machine written here."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given
from scipy.special import expit
from torch import Tensor

from fastloop.ops import decide_ref
from fastloop.ops.decide import NONFINITE, RESPOND, SILENT, VOID
from fastloop.testing.assertions import assert_near, assert_right, seeded
from fastloop.testing.implementations import Implementation, copied
from fastloop.testing.op_cases import Arguments, Case, decide_case
from fastloop.testing.selfcheck import results, widened
from fastloop.testing.tolerance import FORMULA_BOUND, relative_error

seeds = st.integers(0, 2**32 - 1)
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


@given(
    seed=seeds,
    rows=st.sampled_from([0, 1, 2, 13, 64]),
    width=st.integers(1, 130),
    sessions=st.integers(1, 9),
)
def test_is_the_definition(
    implementation: Implementation, seed: int, rows: int, width: int, sessions: int
) -> None:
    def draw(generator: torch.Generator) -> Case:
        return decide_case(generator, rows=rows, width=width, sessions=sessions)

    assert_right(implementation, draw(seeded(seed)), draw)


@every_dtype
@given(seed=seeds, rows=st.sampled_from([1, 13, 64]), width=st.integers(1, 130))
def test_p_respond_errs_at_most_twice_as_much_as_torch(
    implementation: Implementation, dtype: torch.dtype, seed: int, rows: int, width: int
) -> None:
    """Under a policy by which no rounding decides: none responds, all are armed."""

    def draw(generator: torch.Generator) -> Case:
        case = decide_case(generator, rows=rows, width=width, dtype=dtype)
        case.arguments["policy"][:] = torch.tensor([1.0, 1.0, 0.0])
        return case

    assert_right(implementation, draw(seeded(seed)), draw)


@given(seed=seeds, rows=st.sampled_from([1, 13, 64]), width=st.integers(1, 130))
def test_definition_of_p_respond(seed: int, rows: int, width: int) -> None:
    """The softmax over two logits of the normed rows; p is float32, so both sides are rounded to it."""
    case = decide_case(seeded(seed), rows=rows, width=width)
    wide = widened(case.arguments)
    x, weight, head = (wide[name].numpy() for name in ("x", "norm_weight", "head"))
    y = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * weight
    silent, respond = y @ head.T[:, 0], y @ head.T[:, 1]
    theirs = torch.from_numpy(np.exp(respond - np.logaddexp(silent, respond)))
    ours = results(decide_ref, wide, case.mutates)[0]
    assert relative_error(ours, theirs) <= FORMULA_BOUND + torch.finfo(torch.float32).eps
    assert relative_error(theirs, torch.from_numpy(expit(respond - silent))) <= FORMULA_BOUND


def saying(chances: list[float]) -> Arguments:
    """The arguments that make p(respond) what is asked for, but for rounding: margins on a circle."""
    margin = np.log(chances) - np.log1p(-np.array(chances))
    cosine = margin / (4 * np.sqrt(2))
    x = torch.tensor(np.stack((cosine, np.sqrt(1 - cosine**2)), axis=1), dtype=torch.float32)
    head = torch.tensor([[0.0, 0.0], [4.0, 0.0]])
    return {"x": x, "norm_weight": torch.ones(2), "eps": 0.0, "head": head}


class Trigger:
    """One session's policy: a Schmitt trigger with a pause after every response."""

    def __init__(self, policy: list[float], state: list[int]) -> None:
        self.threshold, self.rearm, self.pause = policy
        self.since, self.armed = state[0], state[1] == 1

    def hear(self, p: float) -> int:
        if p <= self.rearm:
            self.armed = True
        if self.armed and p > self.threshold and self.since >= self.pause:
            self.since, self.armed = 0, self.rearm >= 1
            return RESPOND
        self.since += 1
        return SILENT


# Chances lie between the thresholds, so that no rounding decides.
chances = st.integers(0, 9).map(lambda n: 0.05 + n / 10)
thresholds = st.integers(0, 10).map(lambda n: n / 10)
policies = st.tuples(thresholds, thresholds, st.integers(0, 4).map(float))
states = st.tuples(st.integers(0, 6), st.integers(0, 1))


@given(data=st.data(), sessions=st.integers(1, 4), calls=st.integers(1, 4))
def test_policy_is_the_state_machine(
    implementation: Implementation, data: st.DataObject, sessions: int, calls: int
) -> None:
    """Many sessions, call after call, several rows each: with the first response the later rows are void."""
    policy = data.draw(st.lists(policies, min_size=sessions, max_size=sessions))
    start = data.draw(st.lists(states, min_size=sessions, max_size=sessions))
    triggers = [Trigger(list(p), list(s)) for p, s in zip(policy, start, strict=True)]
    state = torch.tensor(start, dtype=torch.int32)
    for _ in range(calls):
        heard = data.draw(st.lists(st.tuples(st.integers(0, sessions - 1), chances), min_size=1, max_size=12))
        expected, ended = [], set()
        for z, p in heard:
            expected.append(VOID if z in ended else triggers[z].hear(p))
            if expected[-1] == RESPOND:
                ended.add(z)
        said = saying([p for _, p in heard])
        slots = torch.tensor([z for z, _ in heard])
        p, decision = implementation(**said, slots=slots, policy=torch.tensor(policy), state=state)
        assert decision.tolist() == expected
        asked = torch.tensor([p for _, p in heard])
        assert (p - asked).abs().max() < 0.05  # nearer to it than any threshold is
    assert state.tolist() == [[t.since, int(t.armed)] for t in triggers]


@given(data=st.data(), policy=policies, start=states, count=st.integers(1, 12))
def test_speculation_is_row_by_row(
    implementation: Implementation,
    data: st.DataObject,
    policy: tuple[float, ...],
    start: tuple[int, int],
    count: int,
) -> None:
    """k rows at once decide as k calls do, up to the first response; the rest waits for its turn."""
    said = saying(data.draw(st.lists(chances, min_size=count, max_size=count)))
    shared = {"policy": torch.tensor([policy])}
    at_once, step = (torch.tensor([start], dtype=torch.int32) for _ in range(2))
    together = implementation(**said, **shared, slots=torch.zeros(count).long(), state=at_once)[1].tolist()
    done = count if RESPOND not in together else together.index(RESPOND) + 1
    for i in range(done):
        row = said | {"x": said["x"][i : i + 1]}
        assert int(implementation(**row, **shared, slots=torch.zeros(1).long(), state=step)[1]) == together[i]
    assert torch.equal(step, at_once)
    assert together[done:] == [VOID] * (count - done)


@given(seed=seeds, sessions=st.integers(2, 6))
def test_sessions_may_stand_in_any_order(implementation: Implementation, seed: int, sessions: int) -> None:
    """Only the order of a session's own rows counts."""
    a = decide_case(seeded(seed), rows=24, sessions=sessions).arguments
    grouped = a["slots"].argsort(stable=True)
    mixed, sorted_ = copied(a), copied(a) | {"x": a["x"][grouped], "slots": a["slots"][grouped]}
    p, decision = implementation(**mixed)
    q, sorted_decision = implementation(**sorted_)
    assert torch.equal(decision[grouped], sorted_decision)
    assert torch.equal(mixed["state"], sorted_["state"])
    assert_near(q[grouped.argsort()], "decide", a)
    assert_near(p, "decide", a)


def test_argmax_and_ties(implementation: Implementation) -> None:
    """Threshold 0.5, rearm 1, no pause is argmax, silent in a tie; p = rearm arms again."""
    even = {"x": torch.ones(3, 2), "norm_weight": torch.ones(2), "eps": 0.0, "head": torch.ones(2, 2)}
    state = torch.tensor([[5, 1], [5, 0], [5, 0]], dtype=torch.int32)
    policy = torch.tensor([[0.5, 1.0, 0.0], [0.25, 0.5, 0.0], [0.25, 0.25, 0.0]])
    p, decision = implementation(**even, slots=torch.arange(3), policy=policy, state=state)
    assert p.tolist() == [0.5] * 3
    assert decision.tolist() == [SILENT, RESPOND, SILENT]
    assert state.tolist() == [[6, 1], [0, 0], [6, 0]]


def test_an_hour_of_silence_counts_on(implementation: Implementation) -> None:
    """The count ends at 2^30 chunks, where it starts: no overflow, whatever the stream's length."""
    state = torch.tensor([[2**30, 1], [2**30 - 1, 1]], dtype=torch.int32)
    said = saying([0.05] * 4)
    slots, policy = torch.tensor([0, 1, 0, 1]), torch.tensor([[0.5, 1.0, 0.0]] * 2)
    implementation(**said, slots=slots, policy=policy, state=state)
    assert state.tolist() == [[2**30, 1], [2**30, 1]]


@given(seed=seeds, used=st.lists(st.integers(0, 9), min_size=1, max_size=5))
def test_sessions_without_a_row_are_neither_read_nor_changed(
    implementation: Implementation, seed: int, used: list[int]
) -> None:
    a = decide_case(seeded(seed), rows=len(used), sessions=10).arguments | {"slots": torch.tensor(used)}
    idle = [z for z in range(10) if z not in used]
    dirty = copied(a)
    dirty["policy"][idle], dirty["state"][idle] = torch.nan, -77
    clean, poisoned = implementation(**a), implementation(**dirty)
    assert all(torch.equal(x, y) for x, y in zip(clean, poisoned, strict=True))
    assert (dirty["state"][idle] == -77).all() and torch.equal(dirty["state"][used], a["state"][used])


@every_dtype
@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_is_no_silence(
    implementation: Implementation, dtype: torch.dtype, poison: float
) -> None:
    """Row 1 of session 0 is spoilt: it says so, its later rows are void, session 1 hears nothing of it."""
    said = saying([0.05, 0.05, 0.95, 0.05, 0.95])
    said = {n: v.to(dtype) if isinstance(v, Tensor) else v for n, v in said.items()}
    said["x"][1, 0] = poison
    state = torch.tensor([[3, 1], [3, 1]], dtype=torch.int32)
    slots, policy = torch.tensor([0, 0, 0, 1, 1]), torch.tensor([[0.5, 1.0, 0.0]] * 2)
    _, decision = implementation(**said, slots=slots, policy=policy, state=state)
    assert decision.tolist() == [SILENT, NONFINITE, VOID, SILENT, RESPOND]
    assert state.tolist() == [[4, 1], [0, 1]]


@pytest.mark.parametrize("row", [0, 1])
@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
def test_a_head_that_is_not_finite_is_found(implementation: Implementation, row: int, poison: float) -> None:
    """...though p would be 0 or 1 with one logit of +-Inf."""
    said = saying([0.35])
    said["head"][row, 0] = poison
    state = torch.tensor([[3, 1]], dtype=torch.int32)
    policy = torch.tensor([[0.5, 1.0, 0.0]])
    _, decision = implementation(**said, slots=torch.zeros(1).long(), policy=policy, state=state)
    assert decision.tolist() == [NONFINITE] and state.tolist() == [[3, 1]]


@pytest.mark.parametrize(("sign", "p", "decision"), [(1, 1.0, RESPOND), (-1, 0.0, SILENT)])
def test_logits_far_apart_are_finite(
    implementation: Implementation, sign: int, p: float, decision: int
) -> None:
    """Their difference overflows float32; the decision is as sure as it can be."""
    head = torch.tensor([[-2e38, 0.0], [2e38, 0.0]]) * sign
    said = saying([0.5]) | {"x": torch.tensor([[1.0, 0.0]]), "head": head}
    state, policy = torch.tensor([[3, 1]], dtype=torch.int32), torch.tensor([[0.5, 1.0, 0.0]])
    chance, made = implementation(**said, slots=torch.zeros(1).long(), policy=policy, state=state)
    assert (chance.tolist(), made.tolist()) == ([p], [decision])
