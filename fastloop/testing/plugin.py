"""For conftest.py of tests/ops and bench/ops: `implementation` runs over every implementation of an op.

The op is the one that the file names (test_linear.py, bench_linear.py); in a file that names none, every op.
What cannot run here is skipped and says why; a `dtype` that an implementation does not take is left out, and
so is a test without one, which is in float32, for an implementation that has none.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ..ops import REGISTRY
from .implementations import Implementation, implementations


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "implementation" not in metafunc.fixturenames:
        return
    named = Path(metafunc.module.__file__ or "").stem.split("_", 1)[1]
    ops = [named] if named in REGISTRY else list(REGISTRY)
    metafunc.parametrize(
        "implementation", [_param(i, alone=i.op == named) for op in ops for i in implementations(op)]
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items[:] = [item for item in items if _is_taken(item)]


def _is_taken(item: pytest.Item) -> bool:
    params = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
    implementation, dtype = params.get("implementation"), params.get("dtype")
    if not isinstance(implementation, Implementation):
        return True
    return implementation.takes(dtype if isinstance(dtype, torch.dtype) else torch.float32)


def _param(implementation: Implementation, alone: bool) -> object:
    marks = [pytest.mark.skipif(bool(implementation.missing), reason=implementation.missing)]
    if implementation.device == "cuda":
        marks.append(pytest.mark.gpu)
    name = str(implementation) if alone else f"{implementation.op}-{implementation}"
    return pytest.param(implementation, marks=marks, id=name)
