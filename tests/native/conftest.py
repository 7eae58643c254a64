"""`emulation`: CUDA kernels on the CPU (tests/native/cuda_emulation); a skip where there is no compiler."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

PATH = Path(__file__).parent / "cuda_emulation" / "emulation.py"


@pytest.fixture(scope="session")
def emulation() -> ModuleType:
    name = "cuda_emulation"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, PATH)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    module = sys.modules[name]
    if module.compiler() is None:
        pytest.skip("no C++ compiler")
    return module
