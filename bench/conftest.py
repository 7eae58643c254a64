"""Options shared by the benchmarks: pytest bench --benchmark-only [--size 3b] [--dtype D] [--threads N]."""

from __future__ import annotations

import pytest
import torch

from fastloop.config import ModelConfig, published_3b, small


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--size", choices=("small", "3b"), default="small", help="dims of the benchmarked model")
    parser.addoption(
        "--dtype", choices=("float32", "bfloat16"), help="as models of that size run unless given"
    )
    parser.addoption("--threads", type=int, default=1, help="torch threads")


@pytest.fixture(scope="session", autouse=True)
def threads(request: pytest.FixtureRequest) -> int:
    count = int(request.config.getoption("--threads"))
    torch.set_num_threads(count)
    return count


@pytest.fixture(scope="session")
def config(request: pytest.FixtureRequest) -> ModelConfig:
    """The dims chosen by --size."""
    return published_3b() if request.config.getoption("--size") == "3b" else small()


@pytest.fixture(scope="session")
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    """--dtype, or the one in which models of that size run."""
    usual = "bfloat16" if request.config.getoption("--size") == "3b" else "float32"
    return getattr(torch, request.config.getoption("--dtype") or usual)
