"""`fastloop doctor` finds every kind of error in every op, and says what runs where and why."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import Result

from fastloop.cli.doctor import op_lines
from fastloop.ops.dispatch import BACKENDS, BACKENDS_OF, REGISTRY, BackendError
from fastloop.testing.op_cases import CASES
from fastloop.testing.selfcheck import self_check

Run = Callable[..., Result]


def test_a_default_that_cannot_run_leaves_the_op_to_the_next_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """As CUDA kernels without a compiler leave it to Triton's: nothing is wrong then."""

    def missing(*args: object, **kwargs: object) -> None:
        raise BackendError("no compiler here")

    monkeypatch.setitem(REGISTRY["decide"].implementations, "cpu", missing)
    monkeypatch.setitem(REGISTRY["decide"].defaults, "cpu", ("cpu", "reference"))
    lines, problems = op_lines("no GPU")
    state = {line.backend: line.state for line in lines if (line.op, line.device) == ("decide", "cpu")}
    assert state["cpu"] == "unavailable" and state["reference"] == "used" and not problems


def test_every_op_has_a_self_check() -> None:
    assert set(CASES) == set(REGISTRY)
    assert {b for choices in BACKENDS_OF.values() for b in choices} == set(BACKENDS)


@pytest.mark.parametrize("op", CASES)
def test_every_implementation_passes(op: str) -> None:
    for backend in REGISTRY[op].implementations:
        if backend in BACKENDS_OF["cpu"]:
            found = self_check(op, backend)
            assert found.ok, f"{op}, {backend}: {found.problem}"
            assert found.error is not None and found.bound is not None and found.error <= found.bound


def spoiled(op: str, spoil: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., Any]:
    """The reference with every result spoiled."""

    def implementation(*args: Any, **kwargs: Any) -> Any:
        result = REGISTRY[op].reference(*args, **kwargs)
        return tuple(map(spoil, result)) if isinstance(result, tuple) else spoil(result)

    return implementation


@pytest.mark.parametrize("op", CASES)
def test_a_small_error_is_found(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Relative 1e-6, or one in what is not a float."""
    slightly = spoiled(op, lambda t: t * (1 + 1e-6) if t.is_floating_point() else t + (t == t.max()))
    monkeypatch.setitem(REGISTRY[op].implementations, "torch", slightly)
    found = self_check(op, "torch")
    assert not found.ok and ("off by" in found.problem or "must be equal" in found.problem)


@pytest.mark.parametrize("op", ["mel", "rms_norm", "rope_append", "decide"])
def test_an_argument_left_unchanged_is_found(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def pure(**kwargs: Any) -> Any:
        copies = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()}
        return REGISTRY[op].reference(**copies)

    monkeypatch.setitem(REGISTRY[op].implementations, "torch", pure)
    assert not self_check(op, "torch").ok


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda t: t * float("nan"), "off by inf"),
        (lambda t: t[:1], "must be"),
        (lambda t: t.double(), "must be"),
    ],
)
def test_wrong_kinds_of_results_are_found(
    spoil: Callable[[torch.Tensor], torch.Tensor], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(REGISTRY["linear"].implementations, "torch", spoiled("linear", spoil))
    assert told in self_check("linear", "torch").problem


def test_the_report(run: Run, model_dir: Path) -> None:
    result = run("doctor", "--model", model_dir, "--sessions", 8)
    assert (result.exit_code, result.stderr) == (0, "")
    assert "\x1b" not in result.stdout
    for part in ("processor", "torch", "paged_attention", "8 sessions", "fits"):
        assert part in result.stdout


def test_the_report_as_json(run: Run, model_dir: Path) -> None:
    report = json.loads(run("doctor", "--model", model_dir, "--sessions", 8, "--json").stdout)
    assert report["ok"] is True and report["problems"] == []
    assert report["machine"]["cores"] >= report["machine"]["usable_cores"] >= 1
    assert report["versions"]["torch"] == torch.__version__
    plan = report["memory"]
    shared = plan["weights_bytes"] + plan["prefix_bytes"] + plan["workspace_bytes"]
    assert plan["sessions"] == 8 and plan["total_bytes"] == shared + 8 * plan["kv_bytes_per_session"]
    ops = report["ops"]
    for device in {line["device"] for line in ops}:
        for op in REGISTRY:
            here = [line for line in ops if (line["op"], line["device"]) == (op, device)]
            assert {line["backend"] for line in here} <= set(BACKENDS_OF[device])
            used = sum(line["state"] == "used" for line in here)
            assert used == (device == "cpu" or torch.cuda.is_available())
    for line in ops:
        assert line["ok"] and (line["error"] is None) == (line["state"] == "unavailable")
        assert bool(line["detail"]) == (line["state"] == "unavailable")  # and it says why


def test_an_op_that_is_off_fails(run: Run, model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(REGISTRY["linear"].implementations, "torch", spoiled("linear", lambda t: t + 1))
    result = run("doctor", "--model", model_dir)
    assert result.exit_code == 1 and "OFF" in result.stdout
    assert result.stderr.startswith("fastloop doctor: op linear, backend torch on cpu: result 0 is off by ")
    assert result.stderr.count("\n") == 1


def test_an_op_that_raises_fails(run: Run, model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(**_: Any) -> Any:
        raise RuntimeError("out of luck")

    monkeypatch.setitem(REGISTRY["linear"].implementations, "torch", broken)
    result = run("doctor", "--model", model_dir, "--json")
    report = json.loads(result.stdout)
    assert result.exit_code == 1 and report["ok"] is False
    assert report["problems"] == ["op linear, backend torch on cpu: raised RuntimeError: out of luck"]


def test_why_a_backend_is_not_there(run: Run, model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(REGISTRY["decide"].unavailable, "torch", "the moon is full")
    result = run("doctor", "--model", model_dir)
    assert result.exit_code == 0 and "the moon is full" in result.stdout


def test_a_forced_backend(run: Run, model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTLOOP_BACKEND", "paged_attention=reference")
    result = run("doctor", "--model", model_dir, "--json")
    used = {x["op"]: x["backend"] for x in json.loads(result.stdout)["ops"] if x["state"] == "used"}
    assert result.exit_code == 0 and used["paged_attention"] == "reference"
    assert "paged_attention: reference" in run("doctor", "--model", model_dir).stdout

    monkeypatch.setenv("FASTLOOP_BACKEND", "linear=cuda")
    result = run("doctor", "--model", model_dir)
    assert result.exit_code == 1 and "op linear on cpu" in result.stderr and result.stderr.count("\n") == 1

    monkeypatch.setenv("FASTLOOP_BACKEND", "nonsense")
    result = run("doctor", "--model", model_dir)
    assert result.exit_code == 1 and "nonsense" in result.stderr and result.stderr.count("\n") == 1


def test_an_unknown_model(run: Run) -> None:
    result = run("doctor", "--model", "no-such-model")
    assert result.exit_code == 2 and "no-such-model" in result.stderr and result.stderr.count("\n") == 1
    assert "processor" in result.stdout  # the rest is told all the same


def test_a_plan_that_does_not_fit(run: Run, model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastloop.cli.machine.available_bytes", lambda: 1000)
    assert "does NOT fit" in run("doctor", "--model", model_dir).stdout
