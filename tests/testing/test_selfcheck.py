"""The self-check finds what an implementation does beyond its results. (Wrong results: test_doctor.py.)"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Generator, Tensor

from fastloop.ops.dispatch import REGISTRY
from fastloop.testing.assertions import seeded
from fastloop.testing.implementations import Implementation, copied, fence_broken, fenced, implementations
from fastloop.testing.op_cases import Case, linear_case
from fastloop.testing.selfcheck import GUARD, compare, compare_pooled, self_check


def beyond(tensor: Tensor, offset: int) -> Tensor:
    """One element of the memory that a tensor is a view of, counted from the tensor's first."""
    return tensor.as_strided((1,), (1,), tensor.storage_offset() + offset)


SPOILS: dict[str, tuple[Callable[[Tensor], object], str]] = {
    "an argument": (lambda x: x.view(-1)[-1:].add_(1), "x was changed"),
    "one element before it": (lambda x: beyond(x, -1).fill_(0), "memory around x was changed"),
    "one element behind it": (lambda x: beyond(x, x.numel()).fill_(0), "memory around x was changed"),
    "far behind it": (lambda x: beyond(x, x.numel() + GUARD - 1).fill_(0), "memory around x was changed"),
}


@pytest.mark.parametrize(("spoil", "told"), SPOILS.values(), ids=SPOILS)
def test_what_is_written_astray_is_found(
    spoil: Callable[[Tensor], object], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def implementation(x: Tensor, **others: Tensor) -> Tensor:
        result = REGISTRY["linear"].reference(x, **others)
        spoil(x)
        return result

    monkeypatch.setitem(REGISTRY["linear"].implementations, "torch", implementation)
    assert self_check("linear", "torch").problem == told


def test_what_is_read_astray_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The memory around arguments is NaN: a sum over one element too many shows."""

    def implementation(x: Tensor, **others: Tensor) -> Tensor:
        stray = beyond(x, x.numel())
        return REGISTRY["linear"].reference(x, **others) + 0 * stray

    monkeypatch.setitem(REGISTRY["linear"].implementations, "torch", implementation)
    assert "NaN in the wrong place" in self_check("linear", "torch").problem


@pytest.mark.parametrize(("factor", "right"), [(0.0, True), (1.9, True), (2.2, False)])
def test_the_errors_of_many_draws_are_no_chance(
    factor: float, right: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One number a call: an implementation that errs `factor` times as much as PyTorch, in its own way."""
    others = seeded(1)

    def implementation(x: Tensor, weight: Tensor, **rest: object) -> Tensor:
        truth = x.double() @ weight.double().T
        noise = torch.randn(1, generator=others, dtype=torch.float64)
        return (truth + factor * deviation * noise).float()

    def draw(generator: Generator) -> Case:
        return linear_case(generator, rows=1, width_in=300, width_out=1)

    pairs = [(c.arguments["x"], c.arguments["weight"]) for c in map(draw, map(seeded, range(3000)))]
    errors = torch.cat([(x @ w.T).double() - x.double() @ w.double().T for x, w in pairs])
    deviation = float(errors.square().mean().sqrt())
    monkeypatch.setitem(REGISTRY["linear"].implementations, "cpu", implementation)
    ours = Implementation("linear", "cpu", "cpu")
    found = compare_pooled(ours, (draw(seeded(seed)) for seed in range(3000)), 3000)
    assert found.ok is right and found.bound == pytest.approx(
        2 * deviation / float(torch.cat([x.double() @ w.double().T for x, w in pairs]).square().mean().sqrt())
    )
    if right and factor:  # calls that one by one err too much
        assert sum(not compare(ours, draw(seeded(seed))).ok for seed in range(100)) > 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int32, torch.int64, torch.bool])
@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 5)])
def test_fences(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = torch.ones(shape, dtype=dtype)
    inner = fenced(tensor, 7)
    assert torch.equal(inner, tensor) and inner.is_contiguous() and not fence_broken(inner, 7)
    inner.zero_()
    assert not fence_broken(inner, 7) and bool(tensor.all())
    for offset in (-7, -1, inner.numel(), inner.numel() + 6):
        broken = fenced(tensor, 7)
        beyond(broken, offset).fill_(0)
        assert fence_broken(broken, 7)


def test_copies_share_nothing() -> None:
    arguments = {"x": torch.ones(3), "eps": 1e-5, "bias": None}
    own = copied(arguments)
    own["x"].zero_()
    assert arguments["x"].tolist() == [1, 1, 1] and own["eps"] == 1e-5 and own["bias"] is None


def test_implementations_are_those_of_the_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """One for each device that a backend serves; what could not be loaded is there with its reason."""
    op = REGISTRY["linear"]
    monkeypatch.setattr(op, "implementations", {"reference": op.reference, "cuda": op.reference})
    monkeypatch.setattr(op, "unavailable", {"cpu": "no compiler"})
    found = {str(i): i for i in implementations("linear")}
    assert set(found) == {"reference", "cpu", "reference-cuda", "cuda-cuda"}
    assert found["reference"].missing == "" and found["cpu"].missing == "no compiler"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert found["cuda-cuda"].missing == found["reference-cuda"].missing == "no CUDA device"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert found["cuda-cuda"].missing == ""


def test_arguments_travel_with_their_surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    """To another device and back: strides, memory around, and what was changed there. (Here: a copy.)"""
    seen = {}

    def implementation(x: Tensor, eps: float) -> Tensor:
        seen["strides"], seen["around"] = x.stride(), beyond(x, -1).item()
        x[0, 0] = 5
        return x * eps

    monkeypatch.setitem(REGISTRY["linear"].implementations, "cuda", implementation)
    here = Implementation("linear", "cuda", "cpu:0")  # a device of another name
    wide = torch.arange(20.0).view(4, 5)
    result = here(x=wide[1:3, 1:4], eps=2.0)
    assert seen == {"strides": (5, 1), "around": 5.0}
    assert wide[1, 1] == 5 and result[0].tolist() == [10, 14, 16]
    assert wide.flatten()[[0, 5, 7, 19]].tolist() == [0, 5, 7, 19]
