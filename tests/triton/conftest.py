"""The Triton kernels: on the GPU where there is one, else interpreted on the CPU.

The interpreter is chosen when triton is imported and when a kernel is decorated, and asked for again when one
runs; so the environment says TRITON_INTERPRET=1 during those three and at no other time of this process.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch

from fastloop.ops import REGISTRY
from fastloop.testing.implementations import Implementation
from fastloop.testing.op_cases import Case
from fastloop.testing.selfcheck import compare

INTERPRET = not torch.cuda.is_available()


def _import_kernels() -> None:
    with pytest.MonkeyPatch.context() as patch:
        if INTERPRET:
            patch.setenv("TRITON_INTERPRET", "1")
        fresh = "triton" not in sys.modules
        language = importlib.import_module("triton.language")
        if INTERPRET and not fresh and type(language.sum).__name__ != "InterpretedFunction":
            raise pytest.UsageError(
                "triton was imported before tests/triton, to compile; its interpreter needs a fresh process: "
                "run pytest tests/triton on its own, or with TRITON_INTERPRET=1 in the environment"
            )
        for op in REGISTRY:
            importlib.import_module(f"fastloop.triton_kernels.{op}")


if importlib.util.find_spec("triton"):
    _import_kernels()


@pytest.fixture(autouse=True)
def interpreter(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every test here runs with triton installed, and interpreted where there is no GPU; there numpy warns of
    infinities and NaN, which a GPU computes with in silence.
    """
    pytest.importorskip("triton", reason="triton is not installed")
    if INTERPRET:
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    with np.errstate(all="ignore"):
        yield


@pytest.fixture
def device() -> str:
    return "cpu" if INTERPRET else "cuda"


@pytest.fixture
def check(device: str) -> Callable[[str, Case], None]:
    """`check(op, case)`: the Triton kernel of an op against its definition in float64 (selfcheck.compare)."""

    def run(op: str, case: Case) -> None:
        found = compare(Implementation(op, "triton", device), case)
        assert found.ok, found.problem

    return run
