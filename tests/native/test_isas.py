"""Every native op on every instruction set of this machine: right, contained, and equal where it must be."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Generator, Tensor

from fastloop.ops import REGISTRY
from fastloop.ops.mel import mel_cpu
from fastloop.ops.native import native, reason
from fastloop.ops.rms_norm import rms_norm_cpu
from fastloop.testing.assertions import assert_right, bits, seeded
from fastloop.testing.implementations import Implementation
from fastloop.testing.op_cases import (
    CASES,
    Case,
    block_attention_case,
    conv_stem_case,
    decide_case,
    layer_norm_case,
    linear_case,
    mel_case,
    paged_attention_case,
    rms_norm_case,
    rope_append_case,
    sample_case,
)

pytestmark = pytest.mark.skipif(native is None, reason=reason)
ISAS = native.isas().split() if native else []
every_isa = pytest.mark.parametrize("isa", ISAS)
# linear_quantised is for GPUs: the native runner multiplies packed weights in calls of whole layers.
NATIVE = [op for op in REGISTRY if op != "linear_quantised"]
every_op = pytest.mark.parametrize("op", NATIVE)


@dataclass(frozen=True)
class OneIsa(Implementation):
    """The backend "cpu" on one instruction set."""

    isa: str = ""

    @property
    def function(self) -> Callable[..., Any]:
        return functools.partial(REGISTRY[self.op].implementations["cpu"], isa=self.isa)


# Sizes that leave every kind of rest in lanes, blocks, panels and tiles.
AWKWARD: dict[str, Callable[[Generator], list[Case]]] = {
    "mel": lambda g: [mel_case(g, streams=n, samples=s, bins=b) for n, s, b in ((2, 800, 77), (3, 6560, 80))],
    "conv_stem": lambda g: [
        conv_stem_case(g, blocks=b, frames=f, bins=c, width=w)
        for b, f, c, w in ((1, 1, 1, 1), (2, 7, 5, 33), (13, 40, 80, 20))
    ],
    "layer_norm": lambda g: [
        layer_norm_case(g, rows=n, width=w, offset=o)
        for n, w, o in ((1, 1, 0.0), (3, 15, 30.0), (2, 17, 0.0), (1, 1283, 1e3))
    ],
    "rms_norm": lambda g: [
        rms_norm_case(g, rows=n, width=w, residual=r)
        for n, w, r in ((1, 1, False), (3, 15, True), (2, 17, True), (1, 2051, False))
    ],
    "linear": lambda g: [
        linear_case(g, rows=n, width_in=d, width_out=o, bias=b, epilogue=e, residual=r)
        for n, d, o, b, e, r in (
            (1, 1, 1, False, "none", True),
            (2, 3, 31, True, "none", False),
            (14, 65, 33, True, "gelu", True),
            (15, 257, 66, True, "silu_gate", True),
            (29, 130, 2, False, "silu_gate", False),
            (100, 40, 40, True, "none", True),
        )
    ],
    "rope_append": lambda g: [
        rope_append_case(g, rows=n, heads=h, kv_heads=k, head_width=w, page=p, page_dtype=t)
        for n, h, k, w, p, t in (
            (1, 1, 1, 2, 1, None),
            (13, 7, 1, 30, 3, torch.bfloat16),
            (64, 16, 2, 128, 64, None),
        )
    ],
    "block_attention": lambda g: [
        block_attention_case(g, blocks=b, positions=t, heads=h, head_width=w)
        for b, t, h, w in ((1, 1, 1, 1), (2, 33, 3, 31), (1, 100, 1, 64), (1, 65, 2, 40))
    ],
    "paged_attention": lambda g: [
        paged_attention_case(
            g, rows=r, lens=n, gaps=s, heads=h, kv_heads=k, head_width=w, page=p, page_dtype=t
        )
        for r, n, s, h, k, w, p, t in (
            ((1,), (1,), ((0, 0),), 1, 1, 1, 1, None),
            ((13, 0, 64, 1), (77, 5, 64, 1100), ((9, 33), (0, 5), (0, 0), (3, 1050)), 14, 2, 33, 7, None),
            ((13, 1), (2100, 65), ((64, 128), (0, 0)), 8, 1, 40, 64, torch.bfloat16),
        )
    ],
    "decide": lambda g: [decide_case(g, rows=n, width=w) for n, w in ((0, 5), (1, 1), (13, 15), (9, 2049))],
    "sample": lambda g: [sample_case(g, rows=n, vocab=v) for n, v in ((1, 1), (5, 15), (10, 17), (25, 3001))],
}


def test_every_op_has_awkward_sizes() -> None:
    assert set(AWKWARD) == set(NATIVE) == {op for op in REGISTRY if "cpu" in REGISTRY[op].implementations}


@every_isa
@every_op
def test_errs_at_most_twice_as_much_as_torch(op: str, isa: str) -> None:
    """Memory around the arguments, and slots of nobody, hold NaN."""
    for case in [*CASES[op](seeded(1)), *AWKWARD[op](seeded(2))]:
        assert_right(OneIsa(op, "cpu", "cpu", isa), case)


NOTHING: dict[str, Callable[[Generator], Case]] = {
    "conv_stem": lambda g: conv_stem_case(g, blocks=0),
    "layer_norm": lambda g: layer_norm_case(g, rows=0),
    "rms_norm": lambda g: rms_norm_case(g, rows=0, residual=True),
    "linear": lambda g: linear_case(g, rows=0, bias=True, epilogue="silu_gate", residual=True),
    "rope_append": lambda g: rope_append_case(g, rows=0, padded=0),
    "block_attention": lambda g: block_attention_case(g, blocks=0),
    "paged_attention": lambda g: paged_attention_case(g, rows=(0, 0), lens=(5, 0), gaps=((0, 0), (0, 0))),
    "decide": lambda g: decide_case(g, rows=0),
    "sample": lambda g: sample_case(g, rows=0),
}


@pytest.mark.parametrize("op", NOTHING)
def test_no_rows_give_no_rows(op: str) -> None:
    """mel refuses an empty batch, natively as by definition."""
    assert_right(Implementation(op, "cpu", "cpu"), NOTHING[op](seeded(1)))


@every_op
def test_an_unknown_one_is_an_error(op: str) -> None:
    with pytest.raises(
        ValueError, match=rf'^{op}: instruction set "sse9" is not one of this machine\'s: .*base'
    ):
        OneIsa(op, "cpu", "cpu", "sse9")(**CASES[op](seeded(1))[0].arguments)


def first_rms_norm(isa: str | None) -> Tensor:
    a = rms_norm_case(seeded(3), rows=4, width=333).arguments
    return rms_norm_cpu(a["x"], a["weight"], a["eps"], isa=isa)


RUN = """
import sys, torch
from test_isas import first_rms_norm
torch.save(first_rms_norm(None), sys.argv[1])
"""


@pytest.mark.parametrize("forced", ["base", "", "sse9"])
def test_the_environment_forces_one(forced: str, tmp_path: Any) -> None:
    """FASTLOOP_CPU_ISA, read once: what it names; the best where it is empty; an error if it names none."""
    environment = os.environ | {"FASTLOOP_CPU_ISA": forced, "PYTHONPATH": os.pathsep.join(sys.path)}
    environment["PYTHONPATH"] = os.path.dirname(__file__) + os.pathsep + environment["PYTHONPATH"]
    out = tmp_path / "out.pt"
    ran = subprocess.run(
        [sys.executable, "-c", RUN, str(out)], env=environment, capture_output=True, text=True
    )
    if forced == "sse9":
        assert f"FASTLOOP_CPU_ISA is 'sse9'; this machine has {', '.join(ISAS)}" in ran.stderr
        return
    assert ran.returncode == 0, ran.stderr
    assert torch.equal(torch.load(out), first_rms_norm(forced or ISAS[0]))
    if (
        len(ISAS) > 1
    ):  # the sums of 4 lanes and of 16 are rounded differently, so the test can tell them apart
        assert not torch.equal(first_rms_norm("base"), first_rms_norm(ISAS[0]))


def test_mel_agrees_on_what_is_final() -> None:
    """The samples of the state are the same on every one: a stream may move to another machine."""
    states = []
    for isa in ISAS:
        case = mel_case(seeded(5), streams=2)
        mel_cpu(**case.arguments, isa=isa)
        states.append(case.arguments)
    for state in states[1:]:
        assert torch.equal(bits(state["tail"]), bits(states[0]["tail"]))
        assert torch.equal(state["seen"], states[0]["seen"])
