"""The emulation of CUDA that test_cuda_kernels.py rests on: it computes what a GPU does, and finds faults."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

SOURCE = Path(__file__).parent / "cuda_emulation" / "selftest.cu"
seeds = pytest.mark.parametrize("seed", [0, 1, 2])


@pytest.fixture(scope="module")
def library(emulation: ModuleType) -> Any:
    return emulation.build([SOURCE])


def normal(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@seeds
@pytest.mark.parametrize("threads", [1, 33, 256])
def test_shared_memory_and_barriers(library: Any, seed: int, threads: int) -> None:
    x, out = normal(3, threads), torch.full((3, threads), torch.nan)
    library.launch("reverse_block", [3], [threads], x, out, threads, 0, seed=seed)
    assert torch.equal(out, x.flip(1))


def test_a_missing_barrier_shows(library: Any) -> None:
    """Under the first order already, as the poison that shared memory begins with."""
    x, out = normal(3, 64), torch.zeros(3, 64)
    library.launch("reverse_block", [3], [64], x, out, 64, 1)
    assert not torch.equal(out, x.flip(1)) and out.isnan().any()


@seeds
def test_exchange_between_lanes(library: Any, seed: int) -> None:
    x, out = torch.arange(100.0), torch.zeros(32)
    library.launch("warp_sum", [1], [32], x, out, 100, seed=seed)
    assert (out == 4950).all()


@seeds
@pytest.mark.parametrize("resident", [1, 3, 8])
def test_the_last_block(library: Any, seed: int, resident: int) -> None:
    """Ends in a counter of 0, so that the next launch finds it as this one did."""
    x, out, parts = normal(8), torch.zeros(1), torch.full((8,), torch.nan)
    count = torch.zeros(1, dtype=torch.int32)
    for _ in range(2):
        library.launch("last_block", [8], [32], x, out, parts, count, seed=seed, resident=resident)
        assert int(count) == 0
        assert float(out) == pytest.approx(float(x.sum()))


@seeds
@pytest.mark.parametrize("cluster", [1, 2, 4])
def test_clusters(library: Any, seed: int, cluster: int) -> None:
    x, out = torch.arange(256.0).view(8, 32), torch.zeros(8, 32)
    library.launch("cluster_sum", [8], [32], x, out, shared=128, cluster=cluster, seed=seed, resident=2)
    assert torch.equal(out, x.view(-1, cluster, 32).sum(1).repeat_interleave(cluster, 0))


@seeds
def test_asynchronous_copies(library: Any, seed: int) -> None:
    x, out = normal(64, 4), torch.zeros(64, 4)
    library.launch("copy_async", [1], [32], x, out, 1, shared=1024, seed=seed)
    x[0, 2:] = 0  # of the first row only 8 bytes are read
    assert torch.equal(out, x.view(2, 32, 4).flip(1).view(64, 4))
    library.launch("copy_async", [1], [32], x, out, 0, shared=1024, seed=seed)
    assert out[32:].isnan().all()  # nobody has waited for the second group


@seeds
def test_bulk_copies(library: Any, seed: int) -> None:
    x, out = normal(5, 64), torch.zeros(5, 64)
    library.launch("copy_bulk", [1], [64], x, out, 5, shared=256, seed=seed)
    assert torch.equal(out, x.flip(1))


@seeds
def test_matrix_products(library: Any, seed: int) -> None:
    a, b, c = normal(16, 16).bfloat16(), normal(8, 16, seed=2).bfloat16(), normal(16, 8, seed=3)
    d = torch.zeros(16, 8)
    library.launch("multiply", [1], [32], a, b, c, d, shared=768, seed=seed)
    assert torch.equal(d, (a.double() @ b.double().T + c.double()).float())


def added(library: Any, seed: int, early: int) -> tuple[torch.Tensor, torch.Tensor]:
    x, out = normal(6, 32), torch.zeros(32)
    library.launch("copy_and_add", [1], [64], x, out, 6, early, shared=128, seed=seed)
    return out, functools.reduce(torch.add, x, torch.zeros(32)).flip(0)


@pytest.mark.parametrize("seed", range(9))
def test_a_ring_and_a_named_barrier(library: Any, seed: int) -> None:
    out, wanted = added(library, seed, 0)
    assert torch.equal(out, wanted)


def test_what_is_let_go_too_soon_shows(library: Any) -> None:
    """Under some order: the one that lets go must be behind those that wait for it."""
    results = (added(library, seed, 1) for seed in range(2, 40, 2))
    assert any(not torch.equal(out, wanted) for out, wanted in results)


@pytest.mark.parametrize(
    ("kind", "message"),
    [(1, "deadlock"), (2, "behind its end"), (3, "a trap"), (5, "polls what never comes")],
)
def test_faults_are_told(emulation: ModuleType, library: Any, kind: int, message: str) -> None:
    with pytest.raises(emulation.EmulationError, match=message):
        library.launch("faults", [1], [32], torch.zeros(1), kind, shared=128)


def test_what_nobody_wrote_is_poison(library: Any) -> None:
    out = torch.zeros(1)
    library.launch("faults", [1], [1], out, 0, shared=128)
    assert out.isnan().all()


def test_arguments_must_fit(emulation: ModuleType, library: Any) -> None:
    with pytest.raises(TypeError, match="do not fit"):
        library.launch("faults", [1], [1], torch.zeros(1))
    with pytest.raises(TypeError, match="no pointer"):
        library.launch("faults", [1], [1], torch.zeros(1), torch.zeros(1))
    with pytest.raises(emulation.EmulationError, match="no kernel"):
        library.launch("none", [1], [1])


def test_address_sanitizer_finds_what_is_outside(emulation: ModuleType) -> None:
    """In a process of its own: the sanitizer must be there before anything else."""
    runtime = subprocess.run(
        [emulation.compiler(), "-print-file-name=libasan.so"], capture_output=True, text=True
    ).stdout.strip()
    if not Path(runtime).is_absolute():
        pytest.skip("the compiler has no AddressSanitizer")
    path = emulation.build_library([SOURCE], emulation.SANITIZE, "selftest-asan")
    script = f"""if True:
        import importlib.util, sys
        spec = importlib.util.spec_from_file_location("e", {str(emulation.HERE / "emulation.py")!r})
        e = importlib.util.module_from_spec(spec); sys.modules["e"] = e; spec.loader.exec_module(e)
        import torch
        from pathlib import Path
        library = e.Library(Path({str(path)!r}))
        x, out = torch.randn(3, 64), torch.zeros(3, 64)
        library.launch("reverse_block", [3], [64], x, out, 64, 0, seed=5)
        assert torch.equal(out, x.flip(1))
        print("clean", flush=True)
        library.launch("faults", [1], [32], out, 4, shared=128)
    """
    environment = {**os.environ, "LD_PRELOAD": runtime, "ASAN_OPTIONS": "detect_leaks=0"}
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert "clean" in ran.stdout, ran.stderr[-4000:]
    assert ran.returncode != 0 and "AddressSanitizer: heap-buffer-overflow" in ran.stderr, ran.stderr[-4000:]
