"""`implementation`: a test that takes it runs once for every implementation of the op that its file names.

In a file that names no op it runs for every implementation of every op.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from fastloop.ops import REGISTRY
from fastloop.testing.implementations import Implementation, implementations


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "implementation" not in metafunc.fixturenames:
        return
    op = Path(metafunc.module.__file__ or "").stem.removeprefix("test_")
    params = [
        as_param(i, i.op == op)
        for name in ([op] if op in REGISTRY else REGISTRY)
        for i in implementations(name)
    ]
    metafunc.parametrize("implementation", params)


def as_param(implementation: Implementation, named: bool) -> object:
    marks = [pytest.mark.skipif(bool(implementation.missing), reason=implementation.missing)]
    if implementation.device == "cuda":
        marks.append(pytest.mark.gpu)
    name = str(implementation)
    return pytest.param(implementation, marks=marks, id=name if named else f"{implementation.op}-{name}")
