"""The launch layer over a fake driver: what is missing is said, contexts stay as they were, nothing leaks."""

from __future__ import annotations

import importlib
import importlib.util
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from fastloop.ops.native import native, reason

pytestmark = [
    pytest.mark.skipif(native is None, reason=reason),
    pytest.mark.skipif(torch.cuda.is_available(), reason="a real driver serves this process"),
]
ROOT = Path(__file__).resolve().parents[2]
NOTED = b"\x7fELFfake".ljust(16, b"\0")  # an image whose kernels are noted, not run


@pytest.fixture
def driver(emulation: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    made = importlib.import_module("cuda_driver").driver(emulation.compiler())
    made.device(9)
    made.events()
    yield made
    made.device(9)


def linear(module: Any, **changes: Any) -> Any:
    """A small call; nothing is read where kernels are only noted."""
    fields: dict[str, Any] = {
        "rows": 2, "in_": 64, "out_rows": 8, "x": 4096, "x_stride": 64, "weight": 4096, "weight_stride": 64,
        "bias": 0, "epilogue": 0, "gated": False, "residual": 0, "residual_stride": 0, "out": 4096,
        "out_stride": 8,
    }  # fmt: skip
    assert native is not None
    return native.cuda.Linear(module, **fields | changes)


LAYOUT = r"""
#include <cuda.h>
#include <cstddef>
#include "driver.h"
namespace ours = fastloop::cuda;
static_assert(sizeof(ours::LaunchConfig) == sizeof(CUlaunchConfig));
static_assert(offsetof(ours::LaunchConfig, block) == offsetof(CUlaunchConfig, blockDimX));
static_assert(offsetof(ours::LaunchConfig, shared_bytes) == offsetof(CUlaunchConfig, sharedMemBytes));
static_assert(offsetof(ours::LaunchConfig, stream) == offsetof(CUlaunchConfig, hStream));
static_assert(offsetof(ours::LaunchConfig, attributes) == offsetof(CUlaunchConfig, attrs));
static_assert(offsetof(ours::LaunchConfig, attribute_count) == offsetof(CUlaunchConfig, numAttrs));
static_assert(sizeof(ours::LaunchAttribute) == sizeof(CUlaunchAttribute));
static_assert(offsetof(ours::LaunchAttribute, bytes) == offsetof(CUlaunchAttribute, value));
static_assert(sizeof(ours::TensorMap) == sizeof(CUtensorMap));
static_assert(alignof(ours::TensorMap) >= alignof(CUtensorMap));
#define SAME(a, b) static_assert(static_cast<int>(a) == static_cast<int>(b))
SAME(ours::DeviceAttribute::PROCESSORS, CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT);
SAME(ours::DeviceAttribute::MAJOR, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR);
SAME(ours::DeviceAttribute::MINOR, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR);
SAME(ours::DeviceAttribute::SHARED_OPTIN, CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN);
SAME(ours::KernelAttribute::REGISTERS, CU_FUNC_ATTRIBUTE_NUM_REGS);
SAME(ours::KernelAttribute::MAX_DYNAMIC_SHARED, CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES);
SAME(ours::KernelAttribute::NON_PORTABLE_CLUSTER, CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED);
SAME(ours::LaunchAttributeId::CLUSTER_DIMENSION, CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION);
using Id = ours::LaunchAttributeId;
SAME(Id::PROGRAMMATIC_SERIALIZATION, CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION);
SAME(ours::TensorType::UINT8, CU_TENSOR_MAP_DATA_TYPE_UINT8);
SAME(ours::TensorType::UINT16, CU_TENSOR_MAP_DATA_TYPE_UINT16);
SAME(ours::TensorType::FLOAT16, CU_TENSOR_MAP_DATA_TYPE_FLOAT16);
SAME(ours::TensorType::FLOAT32, CU_TENSOR_MAP_DATA_TYPE_FLOAT32);
SAME(ours::TensorType::BFLOAT16, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16);
SAME(ours::Swizzle::BYTES_128, CU_TENSOR_MAP_SWIZZLE_128B);
SAME(ours::Promotion::BYTES_256, CU_TENSOR_MAP_L2_PROMOTION_L2_256B);
SAME(ours::NO_DEVICE, CUDA_ERROR_NO_DEVICE);
SAME(ours::INVALID_IMAGE, CUDA_ERROR_INVALID_IMAGE);
SAME(ours::NO_BINARY_FOR_GPU, CUDA_ERROR_NO_BINARY_FOR_GPU);
SAME(ours::UNSUPPORTED_PTX, CUDA_ERROR_UNSUPPORTED_PTX_VERSION);
SAME(ours::NOT_FOUND, CUDA_ERROR_NOT_FOUND);
"""


def test_the_driver_is_described_as_cuda_h_does(emulation: ModuleType, tmp_path: Path) -> None:
    """Sizes, offsets and numbers; the header is the one that triton brings."""
    found = importlib.util.find_spec("triton")
    if found is None or found.origin is None:
        pytest.skip("no cuda.h: triton is not installed")
    include = Path(found.origin).parent / "backends" / "nvidia" / "include"
    if not (include / "cuda.h").is_file():
        pytest.skip(f"no cuda.h in {include}")
    (tmp_path / "layout.cpp").write_text(LAYOUT)
    folders = [include, *(ROOT / "csrc" / name for name in ("cuda", "common", "include"))]
    command = [emulation.compiler(), "-std=c++20", "-fsyntax-only", *(f"-I{folder}" for folder in folders)]
    done = subprocess.run([*command, str(tmp_path / "layout.cpp")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


ASK = """
import ctypes, sys
if len(sys.argv) > 1: ctypes.CDLL(sys.argv[1]).fake_cuda_fail(b"cuInit", 100)
from fastloop.ops.native import native
try: print(native.cuda.device_count())
except ValueError as error: print(error)
"""


def ask(library: str, *arguments: str) -> str:
    """What a process with this driver says of its GPUs."""
    done = subprocess.run(
        [sys.executable, "-c", ASK, *arguments], env=os.environ | {"FASTLOOP_LIBCUDA": library},
        capture_output=True, text=True,
    )  # fmt: skip
    return done.stdout.strip() or done.stderr


def test_no_driver_is_said_to_be_missing(driver: Any) -> None:
    assert "no CUDA driver: libnot_there.so.1" in ask("libnot_there.so.1")


def test_an_old_driver_is_said_to_be_old(driver: Any) -> None:
    found = ask("libm.so.6")
    assert "the CUDA driver libm.so.6 is older than 12.0, it lacks cuInit, cuGetErrorName" in found


def test_a_driver_that_does_not_start_says_why(driver: Any) -> None:
    path = os.environ["FASTLOOP_LIBCUDA"]
    assert ask(path) == "2"
    assert "the CUDA driver does not start: CUDA_ERROR_NO_DEVICE (100)" in ask(path, path)


def test_devices(driver: Any) -> None:
    assert native is not None
    driver.device(8, 6, processors=84, shared=101_376)
    assert native.cuda.device_count() == 2
    assert native.cuda.describe(1) == {
        "name": "fake GPU 1", "major": 8, "minor": 6, "processors": 84, "shared_bytes": 101_376,
    }  # fmt: skip
    with pytest.raises(ValueError, match="CUDA device 2: there are 2 here"):
        native.cuda.describe(2)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (b"", "an image of 0 bytes"),
        (b"not an image of a kernel", "neither a cubin nor a fat binary"),
        (b"\x7fELF of something else", "CUDA_ERROR_UNKNOWN .200.*; the image holds no code for this GPU"),
    ],
)
def test_bad_images(driver: Any, image: bytes, message: str) -> None:
    assert native is not None
    before = driver.counts()
    with pytest.raises(ValueError, match=message):
        native.cuda.Module(0, image)
    assert driver.counts() == before


def test_an_image_for_another_gpu(driver: Any) -> None:
    """Refused, and the context that was taken for it is given back."""
    assert native is not None
    before = driver.counts()
    driver.fail("cuLibraryLoadData", 209)
    with pytest.raises(ValueError, match=r"CUDA_ERROR_NO_BINARY_FOR_GPU \(209\).*; the image holds no code"):
        native.cuda.Module(0, NOTED)
    assert driver.counts() == before


def test_a_module_gives_back_what_it_took(driver: Any) -> None:
    assert native is not None
    retained, loaded, current = driver.counts()
    module = native.cuda.Module(0, NOTED)
    call = linear(module)
    assert driver.counts() == (retained + 1, loaded + 1, current)
    del module
    call.launch(0, 0, dependent=False, stream=0)  # a call keeps its module
    assert driver.counts() == (retained + 1, loaded + 1, current)
    del call
    assert driver.counts() == (retained, loaded, current)


def test_code_is_loaded_with_the_module(driver: Any) -> None:
    """In a context of its device: a launch might be captured, and must not load. What fails is undone."""
    assert native is not None
    module = native.cuda.Module(1, NOTED)
    assert driver.events() == [{"load": 1}, {"code": 1}, {"code": 1}]
    before = driver.counts()
    for call in ("cuLibraryGetKernelCount", "cuLibraryEnumerateKernels", "cuFuncLoad"):
        driver.fail(call, 2)
        with pytest.raises(RuntimeError, match=call):
            native.cuda.Module(1, NOTED)
    assert driver.counts() == before
    del module


def test_kernels_are_found_and_prepared_once(driver: Any) -> None:
    """Threads that start one kernel at the same time look it up once; so it is with its shared memory."""
    assert native is not None
    module = native.cuda.Module(0, NOTED)
    driver.events()

    def run() -> None:
        for _ in range(20):
            linear(module, rows=13).launch(0, 0, dependent=True, stream=7)

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    linear(module, rows=40).launch(0, 0, dependent=False, stream=7)
    kinds = [next(iter(event)) for event in driver.events()]
    assert kinds.count("launch") == 81
    assert kinds.count("kernel") == kinds.count("attribute") == 2


def test_the_current_context_is_used_if_it_is_the_devices(driver: Any) -> None:
    """Else the primary one is current for the call, and then what was."""
    assert native is not None
    push, pop = driver.contexts()
    module = native.cuda.Module(1, NOTED)
    for current in (None, 0, 1):
        if current is not None:
            push(current)
        depth = driver.counts()[2]
        linear(module).launch(0, 0, dependent=False, stream=0)
        assert driver.counts()[2] == depth
        assert [launch["device"] for launch in driver.launches()] == [1]
        if current is not None:
            pop()


@pytest.mark.parametrize(
    ("call", "result", "error", "message"),
    [
        (
            "cuLaunchKernelEx",
            719,
            RuntimeError,
            r"linear_wgmma_8: cuLaunchKernelEx: CUDA_ERROR_UNKNOWN \(719\)",
        ),
        ("cuLaunchKernelEx", 209, ValueError, "the image holds no code for this GPU and driver"),
        (
            "cuLibraryGetKernel",
            500,
            ValueError,
            "the image has no kernel linear_wgmma_8: it is of other sources",
        ),
        ("cuKernelSetAttribute", 1, RuntimeError, r"cuKernelSetAttribute \(shared memory\)"),
        ("cuTensorMapEncodeTiled", 1, RuntimeError, "cuda_linear: weight: cuTensorMapEncodeTiled"),
    ],
)
def test_what_the_driver_refuses(
    driver: Any, call: str, result: int, error: type[Exception], message: str
) -> None:
    """The message names the call; the next launch works."""
    assert native is not None
    module = native.cuda.Module(0, NOTED)
    driver.fail(call, result)
    with pytest.raises(error, match=message):
        linear(module).launch(0, 0, dependent=False, stream=0)
    assert driver.counts()[2] == 0
    assert not driver.launches()
    linear(module).launch(0, 0, dependent=False, stream=0)
    assert len(driver.launches()) == 1


def test_more_shared_memory_than_there_is(driver: Any) -> None:
    assert native is not None
    driver.device(9, shared=100_000)
    with pytest.raises(ValueError, match=r"linear_wgmma_8: needs .* of shared memory, this GPU has 100000"):
        linear(native.cuda.Module(0, NOTED)).launch(0, 0, dependent=False, stream=0)


def test_dependent_launches_are_ignored_where_there_are_none(driver: Any) -> None:
    assert native is not None
    driver.device(8)
    linear(native.cuda.Module(0, NOTED)).launch(0, 0, dependent=True, stream=0)
    assert [launch["dependent"] for launch in driver.launches()] == [False]
