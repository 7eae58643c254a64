"""linear in CUDA C++, run on the CPU: from Python through the C ABI, the plan and the launch to the threads.

The driver is a fake one (cuda_driver.py), the kernels are the sources that a GPU runs, compiled by g++
(cuda_emulation): TMA with its swizzle, wgmma through its descriptors, clusters and split depth included.
"""

from __future__ import annotations

import importlib.util
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from fastloop.ops import cuda
from fastloop.ops.cuda import linear_cuda, linear_quantised_cuda
from fastloop.ops.dependent import dependent_launches
from fastloop.ops.linear import EPILOGUES, linear_ref
from fastloop.ops.native import native, reason
from fastloop.quantise import Quantised, quantise_int4
from fastloop.testing.assertions import bits, seeded
from fastloop.testing.implementations import Implementation
from fastloop.testing.op_cases import Case, linear_case
from fastloop.testing.selfcheck import compare, self_check
from fastloop.testing.tolerance import error_bound, relative_error

pytestmark = [
    pytest.mark.skipif(native is None, reason=reason),
    pytest.mark.skipif(torch.cuda.is_available(), reason="a real driver serves this process"),
]
BF16 = torch.bfloat16
every_epilogue = pytest.mark.parametrize("epilogue", EPILOGUES)
# The kernels of linear.cu: wgmma on sm_90 where rows are aligned, mma elsewhere.
every_gpu = pytest.mark.parametrize("major", [8, 9], ids=["sm_80", "sm_90"])


def load(name: str) -> ModuleType:
    """A module of this folder, which is no package."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
        assert spec is not None and spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


@pytest.fixture
def driver(emulation: ModuleType) -> Iterator[Any]:
    made = load("cuda_driver").driver(emulation.compiler())
    made.device(9)
    made.seed(0)
    made.events()
    yield made
    made.seed(0)


@pytest.fixture
def gpu(driver: Any, emulation: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Any:
    """linear's kernels over the fake driver; ops on CPU tensors run there."""
    made = load("cuda_driver").emulated(emulation, "linear")
    monkeypatch.setattr(cuda, "gpu_of", lambda op, **tensors: made)
    return made


@pytest.fixture
def check(gpu: Any) -> Callable[[Case], None]:
    """`check(case)`: against the definition in float64, with poison around every argument."""

    def run(case: Case) -> None:
        found = compare(Implementation("linear", "cuda", "cpu"), case)
        assert found.ok, found.problem

    return run


def case_of(seed: int = 1, **sizes: Any) -> Case:
    return linear_case(seeded(seed), **{"bias": True, "residual": True, "dtype": BF16} | sizes)


@every_gpu
@every_epilogue
@pytest.mark.parametrize("extras", [False, True])
def test_equals_the_definition(
    check: Callable[[Case], None], driver: Any, major: int, epilogue: str, extras: bool
) -> None:
    """200 inputs: three stages and a rest; 300 and 150 channels: three blocks, the last one half empty."""
    driver.device(major, processors=1)
    sizes = {"rows": 13, "width_in": 200, "width_out": 300, "epilogue": epilogue}
    check(case_of(**sizes, bias=extras, residual=extras))
    kernel = "linear_wgmma_16" if major == 9 else "linear_mma_16"
    assert [launch["launch"] for launch in driver.launches()] == [kernel]


@every_gpu
@pytest.mark.parametrize("rows", [1, 8, 9, 16, 17, 32, 33, 64, 65, 130])
def test_any_number_of_rows(check: Callable[[Case], None], driver: Any, major: int, rows: int) -> None:
    driver.device(major)
    check(case_of(rows, rows=rows, width_in=136, width_out=72, epilogue="gelu"))


@every_gpu
@pytest.mark.parametrize("rows", [8, 16, 32, 64])
def test_rings_turn_over(check: Callable[[Case], None], driver: Any, major: int, rows: int) -> None:
    """Sixteen stages through rings of three to six, in another order of threads."""
    driver.device(major, processors=1)
    driver.seed(rows)
    check(case_of(rows=rows, width_in=64 * 15 + 8, width_out=136))


@every_gpu
@every_epilogue
@pytest.mark.parametrize("splits", [2, 4, 8])
def test_split_depth(
    check: Callable[[Case], None], driver: Any, gpu: Any, major: int, epilogue: str, splits: int
) -> None:
    """On many processors the depth is split: over the blocks of a cluster, or through memory."""
    driver.device(major, processors=2 * splits)
    check(case_of(rows=5, width_in=64 * 17 + 8, width_out=256, epilogue=epilogue))
    (launch,) = driver.launches()
    assert (launch["cluster"], launch["grid"][2]) == ((splits, 1) if major == 9 else (1, splits))
    assert bool(gpu.asked) == (major == 8)


@pytest.mark.parametrize(("width_in", "width_out"), [(1, 1), (67, 33), (130, 131)])
@every_epilogue
def test_rows_that_are_not_aligned(
    check: Callable[[Case], None], driver: Any, width_in: int, width_out: int, epilogue: str
) -> None:
    """No bulk copy can read them, so sm_90 takes the other kernel, element by element."""
    width_out *= 2 if epilogue == "silu_gate" else 1
    check(case_of(rows=3, width_in=width_in, width_out=width_out, epilogue=epilogue))
    assert driver.launches()[0]["launch"] == "linear_mma_8"


@every_gpu
def test_more_ranges_than_steps(gpu: Any, driver: Any, major: int) -> None:
    """Ranges without a step add zeros."""
    driver.device(major)
    a = case_of(rows=4, width_in=72, width_out=64).arguments
    assert torch.equal(bits(linear_cuda(**a, splits=8)), bits(linear_cuda(**a, splits=4)))


@every_gpu
@pytest.mark.parametrize("splits", [1, 4])
def test_threads_in_any_order_give_the_same_bits(gpu: Any, driver: Any, major: int, splits: int) -> None:
    driver.device(major)
    a = case_of(rows=13, width_in=520, width_out=200, epilogue="silu_gate").arguments
    first = linear_cuda(**a, splits=splits)
    for seed in range(1, 5):
        driver.seed(seed)
        assert torch.equal(bits(linear_cuda(**a, splits=splits)), bits(first))


@every_gpu
def test_a_row_is_the_same_beside_any_others(gpu: Any, driver: Any, major: int) -> None:
    driver.device(major)
    a = case_of(rows=13, width_in=520, width_out=64).arguments
    clean = linear_cuda(**a)
    fewer = linear_cuda(**a | {"x": a["x"][:5], "residual": a["residual"][:5]})
    assert torch.equal(bits(fewer), bits(clean[:5]))
    a["x"][4, 100] = torch.nan
    spoilt, others = linear_cuda(**a), torch.arange(13) != 4
    assert spoilt[4].isnan().all()
    assert torch.equal(bits(spoilt[others]), bits(clean[others]))


@every_gpu
def test_strided_rows(gpu: Any, driver: Any, major: int) -> None:
    """Rows out of a wider buffer, and results into the residual's place."""
    driver.device(major)
    a = case_of(rows=7, width_in=64, width_out=40).arguments
    wide = torch.full((7, 160), torch.nan, dtype=BF16)
    wide[:, 80:144] = a["x"]
    assert torch.equal(linear_cuda(**a | {"x": wide[:, 80:144]}), linear_cuda(**a))


@pytest.mark.parametrize("op", ["linear", "linear_quantised"])
def test_the_self_check_takes_them_in_bfloat16(gpu: Any, driver: Any, op: str) -> None:
    """Its cases are in float32, and of quantised weights some are int8, which has no kernel here."""
    found = self_check(op, "cuda", "cpu")
    assert found.ok and found.bound is not None and found.bound >= torch.finfo(BF16).eps
    assert len(driver.launches()) == {"linear": 3, "linear_quantised": 1}[op]


def test_no_rows(gpu: Any, driver: Any) -> None:
    a = case_of(rows=0, width_in=64, width_out=40).arguments
    assert linear_cuda(**a).shape == (0, 40)
    assert not driver.launches()


def quantised(weight: Tensor, kind: str) -> Quantised:
    if kind == "float8":
        scale = weight.float().abs().amax(1) / torch.finfo(torch.float8_e4m3fn).max
        return Quantised((weight / scale[:, None]).to(torch.float8_e4m3fn), scale)
    group = int(kind.removeprefix("int4 in "))
    return Quantised(*quantise_int4(weight, group), group)


def meant(weight: Quantised) -> Tensor:
    """The weights that they stand for, in bfloat16: int4 times its scale is rounded to that in the kernel."""
    return weight.dequantised().to(BF16)


every_kind = pytest.mark.parametrize("kind", ["float8", "int4 in 32", "int4 in 64"])


@every_kind
@every_epilogue
@pytest.mark.parametrize("rows", [1, 13, 20, 64])
@pytest.mark.parametrize(("width_in", "width_out"), [(64, 40), (64 * 13, 300), (1024, 130)])
def test_quantised_weights(
    gpu: Any, driver: Any, kind: str, epilogue: str, rows: int, width_in: int, width_out: int
) -> None:
    """To the definition as near as bfloat16 allows, on the weights that the quantised ones stand for."""
    driver.device(8, processors=4)
    sizes = {"rows": rows, "width_in": width_in, "width_out": width_out, "epilogue": epilogue}
    a = case_of(**sizes).arguments
    weight = quantised(a.pop("weight"), kind)
    out = linear_quantised_cuda(values=weight.values, scale=weight.scale, **a)
    truth = weight.dequantised().double()
    wide = {name: v.double() if isinstance(v, Tensor) else v for name, v in a.items()}
    expected = linear_ref(**wide | {"weight": truth})
    plain = linear_ref(**a | {"weight": meant(weight)})
    assert relative_error(out, expected) <= error_bound(plain, expected, BF16)
    name = "linear_e4m3_" if kind == "float8" else "linear_int4_"
    assert driver.launches()[0]["launch"] == name + str(next(n for n in (8, 16, 32, 64) if rows <= n))


def test_every_float8_is_widened_exactly(gpu: Any, driver: Any) -> None:
    """All 254 numbers, subnormal ones and both zeros, out of a row of weights times the identity."""
    bytes_ = torch.tensor([b for b in range(256) if b & 0x7F != 0x7F] + [0, 0], dtype=torch.uint8)
    values = torch.stack((bytes_, bytes_.flip(0))).view(torch.float8_e4m3fn)
    y = linear_quantised_cuda(torch.eye(256, dtype=BF16), values, torch.ones(2))
    assert torch.equal(y, values.float().T.to(BF16))


def test_every_int4_is_widened_exactly(gpu: Any, driver: Any) -> None:
    """All sixteen, at every place of a group, with scales of two groups."""
    nibbles = (torch.arange(64)[None, :] * 5 + torch.arange(16)[:, None]) % 16
    packed = (nibbles[:, 0::2] | nibbles[:, 1::2] << 4).to(torch.uint8)
    scale = torch.tensor([[1.0, 0.5]]).expand(16, 2).to(BF16).contiguous()
    y = linear_quantised_cuda(torch.eye(64, dtype=BF16), packed, scale)
    expected = (nibbles - 8.0) * torch.tensor([1.0] * 32 + [0.5] * 32)
    assert torch.equal(y, expected.T.to(BF16))


@every_kind
def test_quantised_split_depth_in_any_order(gpu: Any, driver: Any, kind: str) -> None:
    driver.device(9)
    a = case_of(rows=9, width_in=64 * 13, width_out=200, epilogue="silu_gate").arguments
    weight = quantised(a.pop("weight"), kind)
    first = linear_quantised_cuda(values=weight.values, scale=weight.scale, **a, splits=1)
    results = []
    for seed in range(3):
        driver.seed(seed)
        results.append(linear_quantised_cuda(values=weight.values, scale=weight.scale, **a, splits=3))
    assert relative_error(results[0], first) <= torch.finfo(BF16).eps
    assert all(torch.equal(bits(result), bits(results[0])) for result in results)


FLOAT8 = torch.float8_e4m3fn


@pytest.mark.parametrize(
    ("values", "scale", "message"),
    [
        (torch.zeros(8, 64, dtype=torch.int8), torch.ones(8), "two int4 in torch.uint8, got torch.int8"),
        (torch.zeros(8, 64, dtype=FLOAT8), torch.ones(9), r"scale \[9\] does not fit"),
        (
            torch.zeros(8, 32, dtype=torch.uint8),
            torch.ones(8, 2),
            "must be torch.bfloat16, got torch.float32",
        ),
        (torch.zeros(8, 32, dtype=torch.uint8), torch.ones(8, dtype=BF16), r"scale \[8\] does not fit"),
        (torch.zeros(8, 32, dtype=torch.uint8), torch.ones(8, 4, dtype=BF16), r"scale \[8, 4\] does not fit"),
        (torch.zeros(8, 24, dtype=FLOAT8), torch.ones(8), "24 inputs are no multiple of 16"),
    ],
)
def test_bad_quantised_weights(gpu: Any, values: Tensor, scale: Tensor, message: str) -> None:
    inputs = values.shape[1] * (2 if values.dtype == torch.uint8 else 1)
    with pytest.raises((TypeError, ValueError), match=message):
        linear_quantised_cuda(torch.zeros(2, inputs, dtype=BF16), values, scale)


def fields_of(launch: dict[str, Any], parameter: int, layout: str) -> tuple[Any, ...]:
    return struct.unpack_from(layout, bytes.fromhex(launch["parameters"][parameter]))


MAP = "<QQQQQIIII"  # cuda_emulation/tensor_map.h
COUNTERS = 16_384  # bytes in front of a workspace's sums
PARAMS = "<QQQQQQQQqqqqiiiiiiiiii"  # csrc/cuda/linear.h


def test_what_is_launched_on_sm_90(gpu: Any, driver: Any) -> None:
    """Gate and up of the 3B model in miniature: grid, cluster, shared memory, maps, parameters."""
    a = case_of(
        rows=13, width_in=512, width_out=512, bias=False, residual=False, epilogue="silu_gate"
    ).arguments
    with dependent_launches(True):
        y = linear_cuda(**a)
    events = driver.events()
    assert [next(iter(event)) for event in events] == ["load", "kernel", "attribute", "launch"]
    launch = events[-1]
    shared = 6 * ((128 + 16) * 128 + 16)
    assert events[2] == {"attribute": 8, "value": shared}
    assert launch["launch"] == "linear_wgmma_16" and launch["device"] == 0 and launch["stream"] == 0x5EED
    # 4 tiles of 64 channels, 8 steps: 4 ranges of 2 steps
    assert launch["grid"] == [16, 1, 1] and launch["cluster"] == 4
    assert launch["block"] == [160, 1, 1] and launch["shared"] == shared and launch["dependent"]
    weight, x = (fields_of(launch, i, MAP) for i in (0, 1))
    assert weight[1:] == (a["weight"].data_ptr(), 512, 512, 1024, 64, 64, 2, 3)
    assert x[1:] == (a["x"].data_ptr(), 512, 13, 1024, 64, 16, 2, 3)
    found = fields_of(launch, 2, PARAMS)
    assert found[:6] == (a["x"].data_ptr(), a["weight"].data_ptr(), 0, 0, 0, y.data_ptr())
    assert found[8:] == (512, 512, 0, 256, 13, 512, 256, 0, 0, 2, 4, 1, 0, 1)


def test_what_is_launched_on_sm_80(gpu: Any, driver: Any) -> None:
    driver.device(8, processors=108, shared=166_912)
    a = case_of(rows=13, width_in=512, width_out=512).arguments
    linear_cuda(**a)
    (launch,) = driver.launches()
    assert not launch["dependent"]
    # 4 tiles of 128 channels, 8 steps: 4 ranges
    assert launch["launch"] == "linear_mma_16" and launch["grid"] == [4, 1, 4] and launch["cluster"] == 1
    assert launch["shared"] == 4 * (128 + 16) * 128
    assert gpu.asked == [COUNTERS + 4 * 4 * 16 * 128 * 4]
    found = fields_of(launch, 0, PARAMS)
    assert found[6] == found[7] + COUNTERS == gpu.kept["linear"].data_ptr() + COUNTERS
    assert not gpu.kept["linear"][:COUNTERS].any()  # left as they were


def test_calls_of_all_sizes_share_a_workspace(check: Callable[[Case], None], gpu: Any, driver: Any) -> None:
    """Each finds its counters at zero, however many the one before had."""
    driver.device(8, processors=10_000)
    gpu.workspace("linear", 1 << 23)
    for rows, width_out in ((13, 128), (70, 40 * 128), (1, 256), (13, 80 * 128)):
        check(case_of(rows=rows, width_in=256, width_out=width_out))
        assert driver.launches()[0]["grid"][2] > 1


@pytest.mark.parametrize(
    ("rows", "width_in", "width_out", "epilogue", "expected"),
    [
        (13, 2048, 22016, "silu_gate", (172, 1)),
        (13, 2048, 2560, "none", (20, 8)),
        (13, 2048, 2048, "none", (16, 8)),
        (13, 11008, 2048, "none", (16, 8)),
        (20, 1280, 3840, "none", (30, 8)),
        (1, 2048, 151936, "none", (1187, 1)),
    ],
)
def test_splits_of_the_3b_model(
    driver: Any, rows: int, width_in: int, width_out: int, epilogue: str, expected: tuple[int, int]
) -> None:
    """On 132 processors; nothing is read, so there is no memory behind the addresses."""
    assert native is not None
    module = native.cuda.Module(1, b"\x7fELFfake".ljust(16, b"\0"))
    width = width_out // 2 if epilogue == "silu_gate" else width_out
    call = native.cuda.Linear(
        module, rows, width_in, width_out, 4096, width_in, 4096, width_in, 0, 0, epilogue == "silu_gate",
        0, 0, 4096, width,
    )  # fmt: skip
    assert call.workspace_bytes == 0
    call.launch(0, 0, dependent=True, stream=0)
    (launch,) = driver.launches()
    assert launch["device"] == 1 and launch["dependent"]
    assert launch["grid"] == [expected[0] * expected[1], 1, 1] and launch["cluster"] == expected[1]


def linear(module: Any, **changes: Any) -> Any:
    assert native is not None
    fields: dict[str, Any] = {
        "rows": 2, "in_": 64, "out_rows": 8, "x": 4096, "x_stride": 64, "weight": 4096, "weight_stride": 64,
        "bias": 0, "epilogue": 0, "gated": False, "residual": 0, "residual_stride": 0, "out": 4096,
        "out_stride": 8,
    }  # fmt: skip
    return native.cuda.Linear(module, **fields | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": 0}, "x is NULL"),
        ({"weight": 4097}, "weight is not aligned to 2 bytes"),
        ({"x_stride": 63}, "rows of x are 63 apart and 64 wide"),
        ({"out_stride": 7}, "rows of out are 7 apart and 8 wide"),
        ({"weight_stride": 1}, "rows of weight are 1 apart"),
        ({"out_rows": 7, "gated": True}, r"7 rows of \[gate; up\]"),
        ({"epilogue": 2}, "epilogue 2"),
        ({"epilogue": 1, "gated": True}, "epilogue 1 of gated weights"),
        ({"in_": 0}, r"weights of \[8, 0\]"),
        ({"rows": 1 << 40, "x_stride": 1 << 40}, "a size of"),
        ({"splits": 9}, "splits is 9, at most 8 are"),
        ({"splits": -1}, "splits is -1"),
    ],
)
def test_bad_calls(driver: Any, changes: dict[str, Any], message: str) -> None:
    assert native is not None
    call = linear(native.cuda.Module(0, b"\x7fELFfake".ljust(16, b"\0")), **changes)
    with pytest.raises(ValueError, match=f"cuda_linear: .*{message}"):
        call.launch(0, 0, dependent=False, stream=0)
    with pytest.raises(ValueError, match=message):
        assert call.workspace_bytes
    assert not driver.launches()


def test_too_little_workspace(driver: Any) -> None:
    assert native is not None
    driver.device(8)
    call = linear(
        native.cuda.Module(0, b"\x7fELFfake".ljust(16, b"\0")), in_=1024, x_stride=1024, weight_stride=1024
    )
    assert call.workspace_bytes == COUNTERS + 8 * 8 * 128 * 4
    with pytest.raises(ValueError, match="workspace is NULL"):
        call.launch(0, 0, dependent=False, stream=0)
    with pytest.raises(ValueError, match="workspace of 256 bytes, 49152 are needed"):
        call.launch(4096, 256, dependent=False, stream=0)


def test_only_what_the_kernel_takes(gpu: Any) -> None:
    a = case_of(dtype=torch.float32).arguments
    with pytest.raises(TypeError, match=r"takes torch.bfloat16, got torch.float32; convert it with"):
        linear_cuda(**a)
    with pytest.raises(ValueError, match="dimension D of weight"):
        linear_cuda(a["x"].to(BF16), torch.zeros(3, 5, dtype=BF16))


def test_cpu_tensors_are_refused() -> None:
    a = case_of().arguments
    with pytest.raises(cuda.BackendError, match="runs on CUDA tensors, got cpu"):
        linear_cuda(**a)


def test_the_residual_may_be_the_result(gpu: Any, driver: Any) -> None:
    """Every element is read by the thread that writes it."""
    assert native is not None
    a = case_of(rows=6, width_in=128, width_out=48).arguments
    expected = linear_cuda(**a)
    out: Tensor = a["residual"].clone()
    call = linear(
        gpu.module("linear"), rows=6, in_=128, out_rows=48, x=a["x"].data_ptr(), x_stride=128,
        weight=a["weight"].data_ptr(), weight_stride=128, bias=a["bias"].data_ptr(), residual=out.data_ptr(),
        residual_stride=48, out=out.data_ptr(), out_stride=48,
    )  # fmt: skip
    call.launch(0, 0, dependent=True, stream=1)
    assert torch.equal(out, expected)
