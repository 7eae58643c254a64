"""`fastloop doctor`: the hardware, which kernel runs where and why, whether each is right, memory."""

from __future__ import annotations

import json as jsonlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .terminal import UsageProblem, complain

if TYPE_CHECKING:
    from ..ops.dispatch import Op
    from ..testing.selfcheck import Finding

NOT_WRITTEN = "not written for this op"
CANNOT_RUN = "raised BackendError: "  # how a self-check begins to say so

ModelName = Annotated[str, typer.Option(metavar="NAME|DIR", help="The model of the memory plan.")]
Sessions = Annotated[int, typer.Option(min=1, max=100_000, help="Sessions of the memory plan.")]
Json = Annotated[bool, typer.Option("--json", help="The report as one JSON object.")]


@dataclass(frozen=True)
class OpLine:
    """One implementation of one op on one device.

    state: "used", "available" or "unavailable"; error and bound: of its self-check, relative to the truth in
    float64, None where nothing ran or it failed; detail: why it is unavailable, or what is wrong with it.
    """

    op: str
    device: str
    backend: str
    state: str
    error: float | None
    bound: float | None
    detail: str
    ok: bool


def doctor_command(model: ModelName = "demo", sessions: Sessions = 1, json: Json = False) -> None:
    """Tell what this machine has, and check that every kernel computes what it should.

    Exit code 1 where an implementation of an op is off or fails, or is forced
    but cannot run.

    \b
    Examples:
      fastloop doctor
      fastloop doctor --model ./my-model --sessions 64
      FASTLOOP_BACKEND=reference fastloop doctor --json
    """
    from ..checkpoint import known_models
    from .doctor_page import page
    from .machine import machine, versions

    hardware = machine()
    lines, problems = op_lines(hardware["no_gpu"])
    failed = bool(problems)
    memory: dict[str, Any] | None = None
    try:
        memory = memory_report(model, sessions, hardware["available_bytes"])
    except UsageProblem as error:
        problems.append(str(error))
    report = {
        "ok": not problems,
        "problems": problems,
        "machine": hardware,
        "versions": versions(),
        "models": known_models(),
        "ops": [asdict(line) for line in lines],
        "memory": memory,
    }
    if json:
        typer.echo(jsonlib.dumps(report, allow_nan=False))
    else:
        for text in page(report, lines):
            typer.echo(text)
    for problem in problems:
        complain("doctor", problem)
    if problems:
        raise typer.Exit(1 if failed else 2)


def op_lines(no_gpu: str | None) -> tuple[list[OpLine], list[str]]:
    """Every op, device and backend, checked; and what is wrong, a line each. no_gpu: why there is none."""
    from .. import ops  # noqa: F401  (registers the ops)
    from ..ops.dispatch import BACKENDS_OF, REGISTRY, BackendError
    from ..testing.op_cases import CASES
    from ..testing.selfcheck import self_check

    order = [name for name in CASES if name in REGISTRY]
    names = [*order, *(name for name in REGISTRY if name not in order)]
    lines, problems = [], []
    for device in BACKENDS_OF:
        if device == "cuda" and no_gpu is not None:
            lines += [
                OpLine(name, device, backend, "unavailable", None, None, no_gpu, True)
                for name in names
                for backend in ("triton", "cuda")
            ]
            continue
        for name in names:
            op = REGISTRY[name]
            checks = {b: self_check(name, b, device) for b in BACKENDS_OF[device] if b in op.implementations}
            try:
                used = _used(op, device, checks)
            except BackendError as error:
                used = ""
                problems.append(str(error))
            lines += [_line(op, device, backend, used, checks) for backend in BACKENDS_OF[device]]
    problems += [f"op {x.op}, backend {x.backend} on {x.device}: {x.detail}" for x in lines if not x.ok]
    return lines, list(dict.fromkeys(problems))


def _used(op: Op[..., Any], device: str, checks: Mapping[str, Finding]) -> str:
    """What serves an op on a device: what is forced, or the first of its defaults that runs there."""
    from ..ops.dispatch import forced_backends

    first, forced = op.backend(device), forced_backends()
    if op.name in forced or "*" in forced:
        return first
    runs = (name for name in op.defaults[device] if not checks[name].problem.startswith(CANNOT_RUN))
    return next(runs, first)


def _line(op: Op[..., Any], device: str, backend: str, used: str, checks: Mapping[str, Finding]) -> OpLine:
    if backend not in op.implementations:
        why = op.unavailable.get(backend, NOT_WRITTEN)
        return OpLine(op.name, device, backend, "unavailable", None, None, why, True)
    found = checks[backend]
    if backend != used and found.problem.startswith(CANNOT_RUN):
        why = found.problem.removeprefix(CANNOT_RUN)
        return OpLine(op.name, device, backend, "unavailable", None, None, why, True)
    state = "used" if backend == used else "available"
    return OpLine(op.name, device, backend, state, found.error, found.bound, found.problem, found.ok)


def memory_report(name: str, sessions: int, available: int | None) -> dict[str, Any]:
    """The memory plan of a model for a number of sessions. UsageProblem where the model cannot be loaded."""
    from ..checkpoint import CheckpointError, load
    from ..engine.memory import memory_plan
    from ..text import prefix_ids

    try:
        model = load(name)
    except CheckpointError as error:
        raise UsageProblem(error) from error
    prompt = len(prefix_ids(model.config, model.tokenizer, "online", None))
    plan = memory_plan(model.config, model.weight_bytes, model.dtype, sessions, prompt_tokens=(prompt, 0))
    return {
        "model": model.config.name,
        "dtype": str(model.dtype).removeprefix("torch."),
        **asdict(plan),
        "total_bytes": plan.total_bytes,
        "available_bytes": available,
        "fits": None if available is None else plan.total_bytes <= available,
        "text": str(plan),
    }
