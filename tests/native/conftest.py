"""`emulation`: CUDA kernels on the CPU (tests/native/cuda_emulation); a skip where there is no compiler.

`kernels`, `check`: those of mel, paged_attention, decide and sample as functions (cuda_kernels.py).
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from fastloop.testing.op_cases import Case
from fastloop.testing.selfcheck import compare

HERE = Path(__file__).parent


def load_module(name: str, folder: Path = HERE) -> ModuleType:
    """A module of this folder, which is no package."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, folder / f"{name}.py")
        assert spec is not None and spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


@pytest.fixture(scope="session")
def load() -> Callable[[str], ModuleType]:
    """`load(name)`: a module of this folder."""
    return load_module


@pytest.fixture(scope="session")
def emulation() -> ModuleType:
    module = load_module("emulation", HERE / "cuda_emulation")
    if module.compiler() is None:
        pytest.skip("no C++ compiler")
    return module


@pytest.fixture(scope="session")
def libraries() -> dict[str, Any]:
    """op -> its kernels, compiled with the first launch."""
    return {}


@pytest.fixture
def kernels(emulation: ModuleType, libraries: dict[str, Any]) -> Any:
    return load_module("cuda_kernels").Kernels(emulation, libraries=libraries)


@pytest.fixture
def check(kernels: Any) -> Callable[..., None]:
    """`check(op, case, seed=..., blocks=...)`: within the bound of the definition, nothing else touched."""

    def run(op: str, case: Case, **options: int) -> None:
        for name, value in options.items():
            setattr(kernels, name, value)
        found = compare(load_module("cuda_kernels").Emulated(op, kernels), case)
        assert found.ok, found.problem

    return run
