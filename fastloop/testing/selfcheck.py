"""Every implementation of an op against its definition, on small random inputs: `fastloop doctor` and tests.

The truth is the op's reference in float64. An implementation may err twice as much as the reference does in
float32 (fastloop.testing.tolerance), and what is not a float (decisions, token ids, counters) must be equal.
Arguments that an op changes in place are compared like its results.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import FFT_SAMPLES, HOP_SAMPLES, MEL_BINS
from ..ops.dispatch import REGISTRY
from ..ops.mel import POWER_FLOOR, RANGE_LOG10, TAIL_SAMPLES, mel_filters
from .tolerance import error_bound, relative_error

SEED = 20_260_605
Arguments = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One call of an op: its arguments (on the CPU), which of them it changes, and the truth where the
    reference does not run in float64.
    """

    arguments: Arguments
    mutates: tuple[str, ...] = ()
    truth: Callable[[Arguments], list[Tensor]] | None = None


@dataclass(frozen=True)
class Finding:
    """The worst of an implementation's cases. error: relative to the truth, None where it does not compare
    (it raised, or differs in what is not a float); bound: what it may be; problem: "" if all is well.
    """

    error: float | None
    bound: float | None
    problem: str = ""

    @property
    def ok(self) -> bool:
        return not self.problem


def self_check(op: str, backend: str, device: str = "cpu") -> Finding:
    """Run all cases of an op through one implementation on a device. What it raises is its problem."""
    if op not in CASES:
        return Finding(None, None, "has no self-check; add one to fastloop.testing.selfcheck")
    worst = (0.0, 0.0)
    for case in CASES[op](torch.Generator().manual_seed(SEED)):
        try:
            finding = _compare(op, backend, device, case)
        except Exception as error:  # whatever an implementation raises is what is reported of it
            return Finding(None, None, f"raised {type(error).__name__}: {error}")
        if isinstance(finding, Finding):
            return finding
        worst = max(worst, finding)
    return Finding(*worst)


def _compare(op: str, backend: str, device: str, case: Case) -> Finding | tuple[float, float]:
    """(error, bound) of the result that errs most, or what is wrong."""
    reference = REGISTRY[op].reference
    wide = _map(case.arguments, lambda t: t.double() if t.is_floating_point() else t)
    truths = case.truth(case.arguments) if case.truth else _call(reference, wide, case.mutates)
    plains = _call(reference, _map(case.arguments, lambda t: t.to(device)), case.mutates)
    arguments = _map(case.arguments, lambda t: t.to(device))
    outs = _call(REGISTRY[op].implementations[backend], arguments, case.mutates)
    worst = (0.0, 0.0)
    for number, (out, plain, truth) in enumerate(zip(outs, plains, truths, strict=True)):
        if out.shape != plain.shape or out.dtype != plain.dtype:
            made, must = f"{out.dtype} {list(out.shape)}", f"{plain.dtype} {list(plain.shape)}"
            return Finding(None, None, f"result {number} is {made}, must be {must}")
        if not out.is_floating_point():
            if not torch.equal(out, plain):
                return Finding(None, None, f"result {number} differs where it must be equal")
            continue
        error, bound = relative_error(out.cpu(), truth), error_bound(plain.cpu(), truth, plain.dtype)
        if not error <= bound:
            told = f"result {number} is off by {error:.2g}, at most {bound:.2g} is right"
            return Finding(error if math.isfinite(error) else None, bound, told)
        worst = max(worst, (error, bound))
    return worst


def _call(function: Callable[..., Any], arguments: Arguments, mutates: tuple[str, ...]) -> list[Tensor]:
    """Results and changed arguments of a call on copies, so that calls do not see each other."""
    copies = _map(arguments, lambda t: t.clone())
    with torch.inference_mode():
        result = function(**copies)
    results = list(result) if isinstance(result, tuple) else [result]
    return [*results, *(copies[name] for name in mutates)]


def _map(arguments: Mapping[str, Any], change: Callable[[Tensor], Tensor]) -> Arguments:
    return {name: change(v) if isinstance(v, Tensor) else v for name, v in arguments.items()}


def _ints(*values: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.tensor(values, dtype=dtype)


def _mel(g: torch.Generator) -> list[Case]:
    filters, bands = mel_filters()
    state = {
        "tail": torch.zeros(2, TAIL_SAMPLES),
        "peak": torch.full((2,), -torch.inf),
        "seen": torch.zeros(2, dtype=torch.int64),
    }
    pcm = 0.3 * torch.randn(2, 6400, generator=g)
    arguments = {"pcm": pcm, "slots": _ints(1, 0), **state, "filters": filters, "bands": bands}
    return [Case(arguments, mutates=("tail", "peak", "seen"), truth=_first_chunk)]


def _first_chunk(arguments: Arguments) -> list[Tensor]:
    """Whisper's log-mel of the first chunk of two streams in float64; slots are (1, 0)."""
    pcm, filters = arguments["pcm"].double(), arguments["filters"].double()
    padded = F.pad(pcm[:, None], (FFT_SAMPLES // 2, FFT_SAMPLES // 2), mode="reflect")[:, 0]
    window = torch.hann_window(FFT_SAMPLES, dtype=torch.float64)
    cut: dict[str, Any] = {"window": window, "center": False, "return_complex": True}
    power = torch.stft(padded, FFT_SAMPLES, HOP_SAMPLES, **cut).abs().square()[..., :-1]
    y = (filters @ power).clamp(min=POWER_FLOOR).log10()  # [B, C, F]
    frames = torch.maximum(y, y.amax((1, 2), keepdim=True) - RANGE_LOG10)
    final = y[..., :-1].amax((1, 2))  # the last frame is provisional
    seen = torch.full((2,), pcm.shape[1])
    return [(frames.mT + 4) / 4, pcm[:, -TAIL_SAMPLES:].flip(0), final.flip(0), seen]


def _conv_stem(g: torch.Generator) -> list[Case]:
    width = 32
    arguments = {
        "frames": torch.randn(2, 40, MEL_BINS, generator=g),
        "weight1": torch.randn(width, MEL_BINS, 3, generator=g) / (3 * MEL_BINS) ** 0.5,
        "bias1": torch.randn(width, generator=g),
        "weight2": torch.randn(width, width, 3, generator=g) / (3 * width) ** 0.5,
        "bias2": torch.randn(width, generator=g),
        "positions": torch.randn(20, width, generator=g),
    }
    return [Case(arguments)]


def _layer_norm(g: torch.Generator) -> list[Case]:
    x, (weight, bias) = torch.randn(5, 64, generator=g), torch.randn(2, 64, generator=g)
    return [Case({"x": x, "weight": weight, "bias": bias, "eps": 1e-5})]


def _rms_norm(g: torch.Generator) -> list[Case]:
    arguments = {"x": torch.randn(5, 64, generator=g), "weight": torch.randn(64, generator=g), "eps": 1e-6}
    residual = torch.randn(5, 64, generator=g)
    return [Case(arguments), Case({**arguments, "residual": residual}, mutates=("residual",))]


def _linear(g: torch.Generator) -> list[Case]:
    x, weight = torch.randn(13, 64, generator=g), torch.randn(96, 64, generator=g) / 8
    bias, residual = torch.randn(96, generator=g), torch.randn(13, 48, generator=g)
    return [
        Case({"x": x, "weight": weight, "bias": bias}),
        Case({"x": x, "weight": weight, "bias": bias, "epilogue": "gelu"}),
        Case({"x": x, "weight": weight, "epilogue": "silu_gate", "residual": residual}),
    ]


def _rope_append(g: torch.Generator) -> list[Case]:
    heads, groups, width = 4, 2, 16
    total = (heads + 2 * groups) * width
    arguments = {
        "qkv": torch.randn(5, total, generator=g),
        "bias": torch.randn(total, generator=g),
        "positions": _ints(0, 1, 2, 1000, 100_000),
        "slots": _ints(3, 4, -1, 17, 31),  # -1 stores nothing
        "inv_freq": 1e4 ** (-torch.arange(width // 2) / (width // 2)),
        "k_pages": torch.randn(4, 8, groups, width, generator=g),
        "v_pages": torch.randn(4, 8, groups, width, generator=g),
    }
    return [Case(arguments, mutates=("k_pages", "v_pages"))]


def _block_attention(g: torch.Generator) -> list[Case]:
    return [Case({"qkv": torch.randn(2, 20, 3 * 32, generator=g), "heads": 2})]


def _paged_attention(g: torch.Generator) -> list[Case]:
    pages = [torch.randn(6, 8, 2, 16, generator=g) for _ in range(2)]
    arguments = {
        "q": torch.randn(14, 4, 16, generator=g),
        "k_pages": pages[0],
        "v_pages": pages[1],
        "block_table": torch.tensor([[5, 0, 3], [5, 2, 0]], dtype=torch.int32),
        "row_starts": _ints(0, 13, 14, dtype=torch.int32),
        "kv_lens": _ints(23, 11, dtype=torch.int32),
        "gaps": torch.tensor([[6, 10], [6, 8]], dtype=torch.int32),
    }
    return [Case(arguments)]


def _decide(g: torch.Generator) -> list[Case]:
    policy = torch.tensor([[0.5, 1.0, 0.0], [0.4, 0.3, 2.0], [0.0, 1.0, 0.0]])
    arguments = {
        "x": torch.randn(12, 64, generator=g),
        "norm_weight": torch.randn(64, generator=g),
        "eps": 1e-6,
        "head": torch.randn(2, 64, generator=g) / 8,
        "slots": _ints(0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 2, 2),
        "policy": policy,
        "state": torch.tensor([[2**30, 1], [0, 0], [7, 1]], dtype=torch.int32),
    }
    return [Case(arguments, mutates=("state",))]


def _sample(g: torch.Generator) -> list[Case]:
    banned = torch.zeros(2, 64, dtype=torch.bool)
    banned[1, :8] = True
    arguments = {
        "logits": 3 * torch.randn(6, 64, generator=g),
        "banned": banned,
        "phase": _ints(0, 1, 0, 1, 0, 1),
        "temperature": torch.tensor([0.0, 0.0, 1.0, 1.0, 0.7, 2.0]),
        "top_k": _ints(0, 0, 0, 5, 0, 20),
        "top_p": torch.tensor([1.0, 1.0, 1.0, 1.0, 0.9, 0.8]),
        "seed": _ints(0, 1, 2, 3, 4, 2**62),
        "counter": _ints(0, 1, 2, 3, 4, 100_000),
    }
    return [Case(arguments)]


CASES: dict[str, Callable[[torch.Generator], list[Case]]] = {
    "mel": _mel,
    "conv_stem": _conv_stem,
    "layer_norm": _layer_norm,
    "rms_norm": _rms_norm,
    "linear": _linear,
    "rope_append": _rope_append,
    "block_attention": _block_attention,
    "paged_attention": _paged_attention,
    "decide": _decide,
    "sample": _sample,
}
