"""How kernels are found and started: lazily, on one device, with a reason where they cannot run."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import fastloop.triton_kernels
from fastloop.ops import REGISTRY
from fastloop.ops.dispatch import BackendError
from fastloop.ops.triton import DEFAULTS, MISSING, kernel, register_triton
from fastloop.triton_kernels.launch import accept_float8, record_launches
from fastloop.triton_kernels.rms_norm import rms_norm_triton


def run(script: str, **environment: str) -> str:
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, env=inherited | environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_op_has_the_backend_and_on_gpus_alone_by_default() -> None:
    for op in REGISTRY.values():
        assert "triton" in op.implementations and "triton" not in op.defaults["cpu"]
        assert ("triton" in op.defaults["cuda"]) == (op.name in DEFAULTS)
        assert callable(kernel(op.name))


def test_importing_fastloop_does_not_import_triton() -> None:
    script = "import sys, fastloop, fastloop.ops, fastloop.engine; print('triton' in sys.modules)"
    assert run(script).strip() == "False"


def test_cpu_tensors_are_refused_without_the_interpreter() -> None:
    script = """if True:
        import torch
        from fastloop.ops.dispatch import BackendError
        from fastloop.ops.triton import kernel
        try:
            kernel("rms_norm")(torch.ones(1, 4), torch.ones(4), 1e-6)
        except BackendError as error:
            print(error)
    """
    assert "backend 'triton' runs on CUDA tensors, got cpu" in run(script)


def test_without_triton_the_reason_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    op = REGISTRY["linear"]
    monkeypatch.setattr(op, "unavailable", {})
    register_triton([op])
    assert op.unavailable == {"triton": MISSING}


def test_a_kernel_that_does_not_import_says_so() -> None:
    with pytest.raises(BackendError, match="op nonsense: backend 'triton' does not load"):
        kernel("nonsense")


def test_what_no_kernel_reads_is_refused(device: str) -> None:
    x, weight = torch.ones(2, 4, device=device), torch.ones(4, device=device)
    with pytest.raises(TypeError, match=r"takes x in .* got torch\.float64"):
        rms_norm_triton(x.double(), weight.double(), 1e-6)
    with pytest.raises(ValueError, match="weight is on meta"):
        rms_norm_triton(x, weight.to("meta"), 1e-6)


def test_recording_runs_nothing(device: str) -> None:
    x, weight = torch.ones(2, 4, device=device), torch.ones(4, device=device)
    residual = torch.zeros(2, 4, device=device)
    with record_launches() as launches:
        rms_norm_triton(x, weight, 1e-6, residual)
    (launch,) = launches
    assert launch.grid == (2,) and launch.arguments["x"] is x and launch.constants["HAS_RESIDUAL"]
    assert not residual.any()


def test_what_an_op_takes_is_known_before_its_kernel_is_imported() -> None:
    x, weight = torch.ones(2, 4, dtype=torch.float64), torch.ones(4, dtype=torch.float64)
    told = REGISTRY["rms_norm"].refusal("triton", (x, weight, 1e-6), {})
    assert "it takes x in torch.float32 or torch.bfloat16 or torch.float16, got torch.float64" in told
    wanted = torch.ones(2, 4, requires_grad=True)
    assert "no gradient" in REGISTRY["rms_norm"].refusal("triton", (wanted, weight.float(), 1e-6), {})


def test_float8_is_refused_by_old_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their compiler has no conversion; the message says so before it is asked."""
    tensor = SimpleNamespace(dtype=torch.float8_e4m3fn, device=torch.device("cuda", 0))
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (8, 6))
    with pytest.raises(BackendError, match="k_pages in float8_e4m3fn from sm_89 on, cuda:0 is sm_86"):
        accept_float8("paged_attention", "k_pages", tensor)  # type: ignore[arg-type]
    bytes_ = accept_float8("linear_quantised", "values", torch.zeros(2, dtype=torch.float8_e4m3fn))
    assert bytes_.dtype == torch.uint8


def test_no_fma_is_given_a_bare_number() -> None:
    """Triton 3.6 takes one for a float32, also beside float64: angles were off by 4e-8 a quarter turn."""
    found, bare = 0, []
    for source in sorted(Path(fastloop.triton_kernels.__path__[0]).glob("*.py")):
        for node in ast.walk(ast.parse(source.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(".fma"):
                found += 1
                numbers = [a for a in node.args if not any(isinstance(n, ast.Name) for n in ast.walk(a))]
                bare += [f"{source.name}:{node.lineno}: {ast.unparse(a)}" for a in numbers]
    assert found and not bare
