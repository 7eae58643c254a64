"""mel, paged_attention, decide and sample in CUDA C++, from Python through the C ABI and the launch.

The driver is a fake one (cuda_driver.py), the kernels run on the CPU. What they compute is tested by op
(test_cuda_mel.py and the others); here are the host's checks and plans.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from fastloop.engine import Engine
from fastloop.ops import REGISTRY, cuda, use_backend
from fastloop.ops.dispatch import BACKENDS_OF
from fastloop.ops.native import native, reason
from fastloop.options import EngineConfig, SessionConfig
from fastloop.testing.assertions import seeded
from fastloop.testing.cases import random_model, random_sound
from fastloop.testing.drive import Script, lively_policy, run_engine
from fastloop.testing.implementations import Implementation
from fastloop.testing.op_cases import (
    Case,
    decide_case,
    mel_case,
    paged_attention_case,
    sample_case,
)
from fastloop.testing.selfcheck import compare
from fastloop.testing.steps import MODEL

pytestmark = [
    pytest.mark.skipif(native is None, reason=reason),
    pytest.mark.skipif(torch.cuda.is_available(), reason="a real driver serves this process"),
]
OPS = ("mel", "paged_attention", "decide", "sample")
BF16 = torch.bfloat16
COUNTERS = 4 * 16_384  # bytes at the front of a workspace of paged_attention
every_gpu = pytest.mark.parametrize("major", [8, 9], ids=["sm_80", "sm_90"])


@pytest.fixture
def driver(emulation: ModuleType, load: Callable[[str], ModuleType]) -> Iterator[Any]:
    made = load("cuda_driver").driver(emulation.compiler())
    made.device(9, processors=12)
    made.seed(0)
    made.events()
    yield made
    made.seed(0)


@pytest.fixture
def gpu(
    driver: Any,
    emulation: ModuleType,
    load: Callable[[str], ModuleType],
    monkeypatch: pytest.MonkeyPatch,
) -> Any:
    """The kernels over the fake driver; ops on CPU tensors run there."""
    made = load("cuda_driver").emulated(emulation, *OPS)
    monkeypatch.setattr(cuda, "gpu_of", lambda op, **tensors: made)
    return made


@pytest.fixture
def check_launch(gpu: Any, driver: Any) -> Callable[[str, Case], dict[str, Any]]:
    """`check_launch(op, case)`: right, with poison around every argument, in one launch; which one."""

    def run(op: str, case: Case) -> dict[str, Any]:
        driver.events()
        found = compare(Implementation(op, "cuda", "cpu"), case)
        assert found.ok, found.problem
        (launch,) = driver.launches()
        return launch

    return run


def attention(seed: int = 1, **sizes: Any) -> Case:
    shape = {"rows": (13, 1), "lens": (300, 70), "gaps": ((6, 10), (6, 8)), "heads": 16, "dtype": BF16}
    return paged_attention_case(seeded(seed), **shape | sizes)


@every_gpu
def test_mel(check_launch: Callable[..., dict[str, Any]], driver: Any, major: int) -> None:
    driver.device(major)
    launch = check_launch("mel", mel_case(seeded(1), streams=3, samples=960))
    assert (launch["launch"], launch["grid"], launch["block"]) == ("mel", [3, 1, 1], [448, 1, 1])


@every_gpu
def test_paged_attention(
    check_launch: Callable[..., dict[str, Any]], driver: Any, gpu: Any, major: int
) -> None:
    """A block of each KV head for every processor; counters are zeros again for the next call."""
    driver.device(major, processors=11)
    for seed in range(2):
        driver.seed(seed)
        launch = check_launch("paged_attention", attention(seed))
        assert launch["launch"] == "paged_attention_bf16_bf16_64"
        assert launch["grid"] == [11 // 2, 2, 1] and launch["cluster"] == 1
    (workspace,) = gpu.kept.values()
    assert not workspace[:COUNTERS].any()
    assert gpu.asked == [COUNTERS + 2 * 5 * 2 * 128 * (2 + 16) * 4] * 2


@pytest.mark.parametrize(
    ("dtype", "pages"),
    [(torch.float32, BF16), (BF16, torch.float8_e4m3fn), (torch.float16, torch.float16)],
)
def test_paged_attention_of_other_dtypes(
    check_launch: Callable[..., dict[str, Any]], dtype: torch.dtype, pages: torch.dtype
) -> None:
    launch = check_launch("paged_attention", attention(dtype=dtype, page_dtype=pages, head_width=128))
    assert launch["launch"].endswith("_128")


def listeners(sequences: int = 8, rows: int = 13, **sizes: Any) -> Case:
    """A batch as the kernels by wgmma are made for: `rows` new rows of 8 query heads for each KV head."""
    shape = {"heads": 8, "kv_heads": 1, "head_width": 64, "page": 64, "gaps": [(0, 0)] * sequences}
    lens = [rows + 9 * b for b in range(sequences)]
    return attention(rows=[rows] * sequences, lens=lens, **shape | sizes)


@pytest.mark.parametrize(
    ("sizes", "wgmma"),
    [
        ({}, True),
        ({"dtype": torch.float16, "page": 16}, True),
        ({"heads": 16, "kv_heads": 2, "head_width": 128, "page": 128}, True),
        ({"rows": 8}, True),
        ({"rows": 7}, False),  # 56 packed rows: bytes bind
        ({"sequences": 7}, False),  # few sequences: latency binds
        ({"heads": 4}, False),
        ({"page": 24}, False),  # and what it is not compiled for
        ({"page": 4}, False),
        ({"head_width": 32}, False),
        ({"page_dtype": torch.float8_e4m3fn}, False),
    ],
)
def test_batches_of_listeners_have_kernels_of_their_own(
    check_launch: Callable[..., dict[str, Any]], driver: Any, gpu: Any, sizes: dict[str, Any], wgmma: bool
) -> None:
    """By the shape alone, and on sm_90."""
    for major in (9, 8):
        gpu.modules.clear()
        driver.device(major, processors=3)
        launch = check_launch("paged_attention", listeners(**sizes))
        assert launch["launch"].startswith("paged_attention_wgmma_") == (wgmma and major == 9)
        assert launch["block"] == [384 if wgmma and major == 9 else 256, 1, 1]
        assert launch["grid"] == [3 // sizes.get("kv_heads", 1), sizes.get("kv_heads", 1), 1]


@pytest.mark.parametrize("kernel", ["mma", "wgmma"])
@pytest.mark.parametrize("sequences", [2, 9])
def test_a_call_may_say_which_kernel(gpu: Any, driver: Any, kernel: str, sequences: int) -> None:
    found = compare(Attention(kernel), listeners(sequences))
    assert found.ok, found.problem
    (launch,) = driver.launches()
    assert ("wgmma" in launch["launch"]) == (kernel == "wgmma")


@dataclass
class Attention:
    """paged_attention by one kernel, as fastloop.testing calls implementations."""

    kernel: str
    op: str = "paged_attention"

    def __call__(self, **arguments: Any) -> Tensor:
        return cuda.paged_attention_cuda(**arguments, kernel=self.kernel)


def test_which_kernel_must_be_one_that_takes_the_call(gpu: Any, driver: Any) -> None:
    def call(kernel: str, **sizes: Any) -> Callable[[], Tensor]:
        return lambda: cuda.paged_attention_cuda(**listeners(**sizes).arguments, kernel=kernel)

    refused(call("cutlass"), "must be one of by shape, mma, wgmma, got 'cutlass'")
    for sizes in ({"page": 24}, {"head_width": 32}, {"dtype": torch.float32}):
        refused(call("wgmma", **sizes), "by wgmma are for sm_90")
    gpu.modules.clear()
    driver.device(8)
    refused(call("wgmma"), r"this GPU is sm_80")
    assert not driver.launches()


def test_calls_of_all_sizes_share_a_workspace(
    check_launch: Callable[..., dict[str, Any]], driver: Any, gpu: Any
) -> None:
    """The counters of a call are where no call writes sums."""
    for kv_heads, head_width in ((2, 64), (8, 16), (1, 128), (2, 64)):
        driver.seed(kv_heads)
        sizes = {"heads": 8, "kv_heads": kv_heads, "head_width": head_width}
        check_launch("paged_attention", attention(**sizes))
        assert not gpu.kept["paged_attention"][:COUNTERS].any()


def test_one_launch_serves_every_context(gpu: Any, driver: Any) -> None:
    """As a captured one must: what is launched does not depend on lengths, only on shapes."""
    case = attention(lens=(300, 70))
    launches = []
    for length in (300, 150, 13):
        case.arguments["kv_lens"][0] = length
        case.arguments["gaps"][:] = 0
        cuda.paged_attention_cuda(**case.arguments)
        launches += driver.launches()
    # all but the result's address, and everything else is equal
    first, *others = [{**launch, "parameters": launch["parameters"][0][:112]} for launch in launches]
    assert others == [first, first]


@every_gpu
@pytest.mark.parametrize(("rows", "blocks"), [(3, 1), (40, 3), (300, 8)])
def test_decide(
    check_launch: Callable[..., dict[str, Any]], driver: Any, major: int, rows: int, blocks: int
) -> None:
    driver.device(major)
    launch = check_launch("decide", decide_case(seeded(rows), rows=rows, sessions=7))
    team = blocks if major == 9 else 1
    assert (launch["launch"], launch["grid"], launch["cluster"]) == ("decide_f32", [team, 1, 1], team)


@every_gpu
@pytest.mark.parametrize(("vocab", "blocks"), [(70, 1), (9000, 4), (40_000, 8)])
def test_sample(
    check_launch: Callable[..., dict[str, Any]], driver: Any, major: int, vocab: int, blocks: int
) -> None:
    driver.device(major, shared=163_840 if major == 8 else 232_448)
    launch = check_launch("sample", sample_case(seeded(vocab), rows=5, vocab=vocab, dtype=BF16))
    team = blocks if major == 9 else 1
    assert (launch["launch"], launch["grid"], launch["cluster"]) == ("sample_bf16", [5 * team, 1, 1], team)
    held = major == 9 or vocab < 30_000  # a processor of sm_80 has no room for 40,000
    assert launch["shared"] == 34 * 1024 + held * (-(-vocab // team) + 7) // 8 * 32


def test_arguments_that_are_not_contiguous(check_launch: Callable[..., dict[str, Any]]) -> None:
    """Rows apart are read where they are."""
    case = decide_case(seeded(1), rows=9, dtype=torch.float32)
    x = case.arguments["x"]
    case.arguments["x"] = torch.cat((x, torch.full_like(x, torch.nan)), dim=1)[:, : x.shape[1]]
    check_launch("decide", case)


def test_no_rows(gpu: Any, driver: Any) -> None:
    a = decide_case(seeded(1), rows=3).arguments
    p, decision = cuda.decide_cuda(**a | {"x": a["x"][:0], "slots": a["slots"][:0]})
    assert p.shape == decision.shape == (0,)
    b = sample_case(seeded(1), rows=3).arguments
    assert cuda.sample_cuda(**{n: v if n == "banned" else v[:0] for n, v in b.items()}).shape == (0,)
    c = attention(rows=(0, 0), lens=(0, 0), gaps=((0, 0),) * 2).arguments
    assert cuda.paged_attention_cuda(**c).shape == c["q"].shape
    assert not driver.launches()


def refused(call: Callable[[], Any], message: str, kind: type[Exception] = ValueError) -> None:
    with pytest.raises(kind, match=message):
        call()


def test_what_is_refused(gpu: Any, driver: Any) -> None:
    """Each with a message that says what is served instead."""
    ops = cuda
    refused(
        lambda: ops.paged_attention_cuda(**attention(head_width=20).arguments), "multiples of 8 up to 128"
    )
    refused(
        lambda: ops.paged_attention_cuda(**attention(head_width=136).arguments), "multiples of 8 up to 128"
    )
    wide = attention(page_dtype=torch.float32).arguments
    refused(lambda: ops.paged_attention_cuda(**wide), "queries of bf16 and pages of f32")
    refused(lambda: ops.paged_attention_cuda(**attention().arguments, blocks=257), "at most 256")
    doubles = decide_case(seeded(1), dtype=torch.float64).arguments
    refused(lambda: ops.decide_cuda(**doubles), "takes x in torch.float32", TypeError)
    eighths = sample_case(seeded(1)).arguments
    eighths["logits"] = eighths["logits"].to(torch.float8_e4m3fn)
    refused(lambda: ops.sample_cuda(**eighths), "no kernel for e4m3")
    filters = torch.zeros(257, 201)
    mel = mel_case(seeded(1)).arguments | {"filters": filters, "bands": torch.zeros(257, 2).int()}
    refused(lambda: ops.mel_cuda(**mel), "257 bins; at most 256")
    gpu.modules.clear()
    driver.device(8, shared=101_376)  # as sm_86 has it
    refused(lambda: ops.paged_attention_cuda(**attention().arguments), "131072 bytes of shared memory")
    refused(lambda: ops.mel_cuda(**mel_case(seeded(1)).arguments), "102400 bytes of shared memory")
    many = decide_case(seeded(1), rows=9000).arguments
    refused(lambda: ops.decide_cuda(**many), "9000 rows, this GPU takes 8362 in one call")
    assert not driver.launches()


def test_too_little_workspace(gpu: Any) -> None:
    assert native is not None
    a = attention().arguments
    call = native.cuda.PagedAttention(
        module=gpu.module("paged_attention"), dtype=1, page_dtype=1, rows=14, sequences=2, heads=16,
        kv_heads=2, head_width=16, page_tokens=8, table_width=a["block_table"].shape[1],
        table_stride=a["block_table"].shape[1], out=a["q"].data_ptr(), **addresses(a),
    )  # fmt: skip
    for size, message in ((0, "workspace is NULL"), (256, "workspace of 256 bytes")):
        workspace = torch.zeros(512, dtype=torch.uint8)
        at = (workspace.data_ptr() + 255) // 256 * 256 if size else 0
        with pytest.raises(ValueError, match=message):
            call.launch(workspace=at, workspace_bytes=size, dependent=False, stream=0)


def addresses(arguments: dict[str, Tensor]) -> dict[str, int]:
    return {name: tensor.data_ptr() for name, tensor in arguments.items()}


@pytest.mark.parametrize("dtype", cuda.DTYPES[:3])
@pytest.mark.parametrize("page_dtype", cuda.DTYPES)
@pytest.mark.parametrize("width", [8, 12, 16, 24, 128, 136])
def test_what_paged_attention_refuses_is_known_before(
    gpu: Any, dtype: torch.dtype, page_dtype: torch.dtype, width: int
) -> None:
    """By the op, so that a default would leave such calls to another backend, and tests know."""
    shape = {"rows": (2,), "lens": (9,), "gaps": ((0, 0),), "heads": 2, "kv_heads": 1, "head_width": width}
    a = attention(dtype=dtype, page_dtype=page_dtype, **shape).arguments
    if REGISTRY["paged_attention"].refusal("cuda", (), a):
        with pytest.raises(ValueError, match=r"no kernel for queries|heads are \d+ wide"):
            cuda.paged_attention_cuda(**a)
    else:
        assert cuda.paged_attention_cuda(**a).isfinite().all()


@every_gpu
def test_dependent_launches(gpu: Any, driver: Any, major: int) -> None:
    """Where the device has them."""
    assert native is not None
    driver.device(major)
    a = decide_case(seeded(1), rows=2, width=64).arguments
    p, decision = torch.zeros(2), torch.zeros(2, dtype=torch.int32)
    shape = {"dtype": 0, "rows": 2, "width": 64, "x_stride": 64, "slot_count": len(a["state"])}
    eps = a.pop("eps")
    results = {"p_respond": p.data_ptr(), "decision": decision.data_ptr()}
    native.cuda.decide(
        module=gpu.module("decide"),
        eps=eps,
        dependent=True,
        stream=0xBEEF,
        **shape,
        **results,
        **addresses(a),
    )
    (launch,) = driver.launches()
    assert launch["dependent"] == (major == 9) and launch["stream"] == 0xBEEF
    assert ((p > 0) & (p < 1)).all()


def test_the_kernels_of_a_step_overlap_where_that_is_asked_for(
    gpu: Any, driver: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FASTLOOP_DEPENDENT: every launch of a step and of its perception, and none of what is no graph's work,
    here the prefix. What is said is equal to the bit. (Op by op, as a graph's work is run.)
    """
    monkeypatch.setenv("FASTLOOP_CAPTURE", "0")
    monkeypatch.setitem(BACKENDS_OF, "cpu", (*BACKENDS_OF["cpu"], "cuda"))
    model = random_model(MODEL, seed=3)
    options = SessionConfig(policy=lively_policy(model), max_response_tokens=4, seed=1)
    heard, dependent = [], []
    for flag in ("0", "1"):
        monkeypatch.setenv("FASTLOOP_DEPENDENT", flag)
        driver.events()
        with use_backend("mel=cuda,paged_attention=cuda,decide=cuda,sample=cuda"):
            engine = Engine(model, EngineConfig(max_sessions=1, page_tokens=16, runner="captured"))
            heard.append(run_engine(engine, [Script(options, random_sound(1.2))]))
        launches = driver.launches()
        assert {launch["launch"].split("_")[0] for launch in launches} == {"mel", "paged", "decide", "sample"}
        dependent.append([launch["dependent"] for launch in launches])
    assert heard[0] == heard[1] and len(heard[0][0]) > 2
    prefix = model.config.decoder.layers
    assert dependent[0] == [False] * len(dependent[1])
    assert dependent[1] == [False] * prefix + [True] * (len(dependent[1]) - prefix)


def test_which_ops_have_it_as_their_default() -> None:
    """Those that tests/ops/test_defaults.py asks a results file for, in front of Triton's."""
    registry = sys.modules["fastloop.ops"].REGISTRY
    for op in OPS:
        assert "cuda" in registry[op].implementations
        assert (registry[op].defaults["cuda"][0] == "cuda") == (op in cuda.DEFAULTS)
