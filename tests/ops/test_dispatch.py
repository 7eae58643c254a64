"""How an op finds its implementation: a table, what is forced, and an error where that cannot run."""

from __future__ import annotations

import asyncio
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from fastloop.ops import REGISTRY, BackendError, use_backend
from fastloop.ops.contract import check_dims, check_dtype, check_floats, check_range
from fastloop.ops.dispatch import (
    BACKENDS,
    BACKENDS_OF,
    Op,
    capturable,
    define,
    forced_backends,
    launching_through,
)
from fastloop.ops.native import reason
from fastloop.testing.assertions import bits, seeded
from fastloop.testing.op_cases import CASES
from fastloop.testing.selfcheck import results, widened

X = torch.zeros(2)


def twice_ref(x: Tensor, scale: float = 2.0) -> Tensor:
    """x of any shape -> a copy, scaled."""
    return x * scale


def twice_marked(mark: float) -> Callable[..., Tensor]:
    """An implementation that says which one it is."""
    return lambda x, scale=2.0: torch.full_like(x, mark)


@pytest.fixture(autouse=True)
def nothing_is_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FASTLOOP_BACKEND", raising=False)


@pytest.fixture
def twice() -> Iterator[Op[..., Tensor]]:
    """An op with a reference (x 2), "torch" (marks 10), and a "cuda" that could not be loaded."""
    op = define(twice_ref, lambda x, scale=2.0: torch.empty_like(x))
    op.register("torch", twice_marked(10))
    op.unavailable["cuda"] = "the driver is too old"
    yield op
    del REGISTRY["twice"]


def ran(op: Op[..., Tensor]) -> float:
    return float(op(X + 1)[0])


def test_default_is_the_table(twice: Op[..., Tensor]) -> None:
    assert ran(twice) == 2 and twice.backend("cpu") == "reference"
    twice.register("cpu", twice_marked(20), default_on="cpu")
    assert ran(twice) == 20 and twice.backend("cpu") == "cpu"
    assert twice.backend("cuda") == "reference"  # a default for one device is none for another


def test_device_is_that_of_the_first_tensor(twice: Op[..., Tensor]) -> None:
    assert twice(X + 1, 3.0)[0] == 3
    assert twice(scale=3.0, x=X + 1)[0] == 3
    assert twice(torch.zeros(2, device="meta")).device.type == "meta"


def test_torch_op_dispatches_too(twice: Op[..., Tensor]) -> None:
    assert torch.ops.fastloop.twice(X + 1)[0] == 2
    with use_backend("twice=torch"):
        assert torch.ops.fastloop.twice(X + 1)[0] == 10


@pytest.mark.parametrize(
    ("text", "forced"),
    [
        ("", {}),
        (" , ,", {}),
        ("reference", {"*": "reference"}),
        ("=reference", {"*": "reference"}),
        (" reference ", {"*": "reference"}),
        ("linear=torch", {"linear": "torch"}),
        ("linear=torch,mel=cpu", {"linear": "torch", "mel": "cpu"}),
        ("reference,mel=cpu", {"*": "reference", "mel": "cpu"}),
        ("mel=cpu,,reference,", {"*": "reference", "mel": "cpu"}),
        ("mel=cpu,mel=reference", {"mel": "reference"}),
    ],
)
def test_what_the_environment_may_say(
    text: str, forced: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTLOOP_BACKEND", text)
    assert forced_backends() == forced
    monkeypatch.delenv("FASTLOOP_BACKEND")
    with use_backend(text):
        assert forced_backends() == forced


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("gpu", "unknown backend 'gpu'"),
        ("linear=gpu", "unknown backend 'gpu'"),
        ("linear=", "unknown backend ''"),
        ("Reference", "unknown backend 'Reference'"),
        ("linear:torch", "unknown backend 'linear:torch'"),
        ("linaer=torch", "unknown ops ['linaer']"),
        ("linear=torch,mle=cpu,reference", "unknown ops ['mle']"),
        ("a=b=torch", "unknown ops ['a=b']"),
    ],
)
def test_what_it_may_not_say(text: str, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Named with what there is to choose from, at every call, and before anything runs."""
    told = "FASTLOOP_BACKEND: " + re.escape(told)
    with pytest.raises(BackendError, match=told) as caught, use_backend(text):
        raise AssertionError("the block must not run")
    choices = BACKENDS if "backend" in told.split(": ")[1] else REGISTRY
    assert all(choice in str(caught.value) for choice in choices)
    monkeypatch.setenv("FASTLOOP_BACKEND", text)
    for _ in range(2):
        with pytest.raises(BackendError, match=told):
            REGISTRY["linear"](torch.zeros(1, 1), torch.zeros(1, 1))


def test_one_op_is_stronger_than_all(twice: Op[..., Tensor]) -> None:
    with use_backend("reference,twice=torch"):
        assert ran(twice) == 10 and REGISTRY["linear"].backend("cpu") == "reference"
    with use_backend("torch,twice=reference"):
        assert ran(twice) == 2


def test_the_environment_is_read_at_every_call(
    twice: Op[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert ran(twice) == 2
    monkeypatch.setenv("FASTLOOP_BACKEND", "twice=torch")
    assert ran(twice) == 10
    monkeypatch.setenv("FASTLOOP_BACKEND", "")
    assert ran(twice) == 2


def test_what_cannot_run_is_an_error_with_its_reason(twice: Op[..., Tensor]) -> None:
    """Never another implementation in its place."""
    for text, why in (
        ("twice=cpu", "not implemented"),
        ("cpu", "not implemented"),
        ("twice=cuda", "it serves no cpu tensors"),
    ):
        with use_backend(text), pytest.raises(BackendError, match=f"op twice on cpu: .*{why}") as caught:
            twice(X)
        assert "['reference', 'torch']" in str(caught.value) and "fastloop doctor" in str(caught.value)
    with use_backend("twice=cuda"), pytest.raises(BackendError, match="the driver is too old"):
        twice.backend("cuda")


def test_a_backend_of_another_device_does_not_run(twice: Op[..., Tensor]) -> None:
    """A kernel would take the pointers for its own."""
    for backend in ("graph", "flash_attn", "triton", "cuda"):
        twice.register(backend, twice_marked(30))
    twice.register("cpu", twice_marked(20))
    for device, backends in BACKENDS_OF.items():
        for backend in BACKENDS:
            with use_backend(backend):
                if backend in backends:
                    assert twice.backend(device) == backend
                else:
                    with pytest.raises(BackendError, match=f"it serves no {device} tensors"):
                        twice.backend(device)


def test_an_unknown_device_has_the_reference_or_nothing(twice: Op[..., Tensor]) -> None:
    assert twice.backend("meta") == "reference"
    with pytest.raises(BackendError, match="op twice on xpu"):
        twice.backend("xpu")


def test_an_unknown_backend_cannot_be_registered(twice: Op[..., Tensor]) -> None:
    with pytest.raises(BackendError, match="twice: unknown backend 'rocm'"):
        twice.register("rocm", twice_marked(1))
    assert "rocm" not in twice.implementations


def test_blocks_nest_and_hide_the_environment(
    twice: Op[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTLOOP_BACKEND", "twice=torch")
    with use_backend("twice=reference"):
        assert ran(twice) == 2
        with use_backend("torch"):
            assert ran(twice) == 10
        assert ran(twice) == 2
        with use_backend(""):  # nothing forced, by the environment neither
            assert forced_backends() == {}
    assert ran(twice) == 10


def test_a_block_ends_with_its_exception(twice: Op[..., Tensor]) -> None:
    with pytest.raises(KeyError), use_backend("twice=torch"):
        raise KeyError
    assert ran(twice) == 2


def test_a_block_is_of_its_thread(twice: Op[..., Tensor]) -> None:
    """Two threads inside blocks at the same time; a third without one."""
    inside, heard = threading.Barrier(3), {}

    def work(name: str, text: str | None) -> None:
        if text is None:
            inside.wait()
            heard[name] = ran(twice)
            inside.wait()
            return
        with use_backend(text):
            inside.wait()
            heard[name] = ran(twice)
            inside.wait()

    threads = [
        threading.Thread(target=work, args=args)
        for args in (("torch", "twice=torch"), ("reference", "reference"), ("none", None))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert heard == {"torch": 10, "reference": 2, "none": 2}


def test_a_block_is_of_its_task(twice: Op[..., Tensor]) -> None:
    """Tasks of one event loop take turns inside their blocks."""

    async def work(text: str) -> list[float]:
        heard = []
        with use_backend(text):
            for _ in range(3):
                await asyncio.sleep(0)
                heard.append(ran(twice))
        return heard

    async def both() -> list[list[float]]:
        return await asyncio.gather(work("twice=torch"), work("twice=reference"))

    assert asyncio.run(both()) == [[10] * 3, [2] * 3]


def test_every_default_can_run() -> None:
    """What the tables say is registered, or says why it is not; nothing else is the default."""
    for op in REGISTRY.values():
        assert op.backend("cpu") in BACKENDS_OF["cpu"]
        assert op.backend("cuda") in BACKENDS_OF["cuda"]
        assert set(op.implementations) | set(op.unavailable) <= set(BACKENDS)
        assert op.implementations["reference"] is op.reference


LIMITED = {"x": (torch.float32,)}


def test_a_limited_default_leaves_the_rest_to_the_one_before(twice: Op[..., Tensor]) -> None:
    """What it does not take: another dtype, and a gradient that is wanted."""
    twice.defaults["cpu"] = ("torch",)
    twice.register("cpu", twice_marked(20), default_on="cpu", takes=LIMITED)
    assert twice.backend("cpu") == "cpu" and ran(twice) == 20
    assert twice(X.double())[0] == 10 and twice(scale=3.0, x=X.bfloat16())[0] == 10
    wanted = (X + 1).requires_grad_()
    assert twice(wanted)[0] == 10
    with torch.no_grad():
        assert twice(wanted)[0] == 20
    with torch.inference_mode():
        assert twice(wanted)[0] == 20


def test_a_limited_one_that_is_forced_refuses_the_rest(twice: Op[..., Tensor]) -> None:
    twice.register("cpu", twice_marked(20), takes={"x": (torch.float32, torch.float16)})
    with use_backend("twice=cpu"):
        assert ran(twice) == 20 and twice(X.half())[0] == 20
        told = "it takes x in torch.float32 or torch.float16, got torch.float64"
        with pytest.raises(BackendError, match=f"op twice on cpu: backend 'cpu' cannot run .*{told}"):
            twice(X.double())
        with pytest.raises(BackendError, match="it computes no gradient, and x requires one"):
            twice((X + 1).requires_grad_())
    assert twice(X.double() + 1)[0] == 2


def test_one_limited_in_another_way_says_how(twice: Op[..., Tensor]) -> None:
    """Its own reason, for calls whose dtypes are taken; as a default it leaves those to the one before."""

    def negative(arguments: Mapping[str, Any]) -> str:
        return "it takes no negative scale" if arguments.get("scale", 1) < 0 else ""

    twice.register("cpu", twice_marked(20), default_on="cpu", takes=LIMITED, refuses=negative)
    assert ran(twice) == 20 and twice(X + 1, -1.0)[0] == -1 and twice(X + 1, scale=-1.0)[0] == -1
    with use_backend("twice=cpu"):
        with pytest.raises(BackendError, match=r"cannot run this call .it takes no negative scale"):
            twice(X, -1.0)
        with pytest.raises(BackendError, match=r"it takes x in torch.float32"):
            twice(X.double(), -1.0)
    twice.register("torch", twice_marked(10), refuses=negative)
    with use_backend("twice=torch"), pytest.raises(BackendError, match="no negative scale"):
        twice(X.double(), -1.0)


def test_a_default_may_leave_calls_to_the_one_behind_it(twice: Op[..., Tensor]) -> None:
    """Those that another one is faster for; forced, it takes them."""
    twice.register("torch", twice_marked(10), default_on="cpu", takes=LIMITED)
    twice.register(
        "cpu", twice_marked(20), default_on="cpu", leaves=lambda a: "" if a.get("scale", 1) < 0 else "slower"
    )
    assert twice(X, -1.0)[0] == 20 and ran(twice) == 10 and twice(X.double() + 1)[0] == 2
    with use_backend("twice=cpu"):
        assert ran(twice) == 20


def test_what_is_captured_runs_a_default_that_can_be(twice: Op[..., Tensor]) -> None:
    with capturable():
        assert ran(twice) == 2  # no other one is there
    twice.register("graph", twice_marked(10))
    twice.register("cpu", twice_marked(20), default_on="cpu", takes=LIMITED)
    assert ran(twice) == 20
    with capturable():
        assert ran(twice) == 10 and twice(X.double())[0] == 10
        with use_backend("twice=reference"):
            assert ran(twice) == 2, "what is forced is kept"


def test_a_recorder_sees_what_really_runs(twice: Op[..., Tensor]) -> None:
    twice.register("cpu", twice_marked(20), default_on="cpu", takes=LIMITED)
    seen = []
    with launching_through(lambda op, backend, args, kwargs: seen.append((op.name, backend))):
        twice(X)
        twice(X.double())
    assert seen == [("twice", "cpu"), ("twice", "reference")]


NATIVE = [name for name, op in REGISTRY.items() if op.defaults["cpu"][0] == "cpu" and name != "mel"]


@pytest.mark.parametrize("op", NATIVE)
def test_native_defaults_leave_other_dtypes_as_they_were(op: str) -> None:
    """mel knows float32 alone."""
    for case in CASES[op](seeded(1)):
        wide = widened(case.arguments)
        before = REGISTRY[op].implementations[REGISTRY[op].defaults["cpu"][1]]
        ours, theirs = (results(run, wide, case.mutates) for run in (REGISTRY[op], before))
        assert all(torch.equal(bits(a), bits(b)) for a, b in zip(ours, theirs, strict=True))
        narrow = results(REGISTRY[op], case.arguments, case.mutates)
        forced = results(REGISTRY[op].implementations["cpu"], case.arguments, case.mutates)
        assert all(torch.equal(bits(a), bits(b)) for a, b in zip(narrow, forced, strict=True))


@pytest.mark.skipif(not NATIVE, reason=reason)
def test_gradients_flow_through_the_defaults() -> None:
    a = CASES["rms_norm"](seeded(1))[0].arguments
    weight = a["weight"].clone().requires_grad_()
    REGISTRY["rms_norm"](**a | {"weight": weight}).sum().backward()
    assert weight.grad is not None and weight.grad.isfinite().all() and weight.grad.any()


@pytest.mark.parametrize("op", REGISTRY)
def test_native_ops_refuse_what_they_would_misread(op: str) -> None:
    """Called as functions, too: another dtype or a gradient is named, not read as float32."""
    run = REGISTRY[op].implementations.get("cpu") or pytest.skip(REGISTRY[op].unavailable["cpu"])
    for case in CASES[op](seeded(1)):
        with pytest.raises(TypeError, match=f"^{op}: .*torch.float64"):
            run(**widened(case.arguments))
        if op != "mel":
            name = next(
                n for n, v in case.arguments.items() if isinstance(v, Tensor) and v.is_floating_point()
            )
            wanting = case.arguments | {name: case.arguments[name].clone().requires_grad_()}
            with pytest.raises(ValueError, match=f"^{op}: .*no gradient, and {name} requires one"):
                run(**wanting)


def test_dimensions_are_unified() -> None:
    x, y = torch.zeros(3, 4), torch.zeros(4, 5)
    assert check_dims("op", x=(x, "N D"), y=(y, "D O")) == {"N": 3, "D": 4, "O": 5}
    assert check_dims("op", x=(x, "3 D")) == {"D": 4}
    for shapes, told in (
        ({"x": (x, "N D"), "y": (y, "O D")}, r"op: dimension D of y is 5, elsewhere 4 \(y is \(4, 5\)"),
        ({"x": (x, "N N")}, "op: dimension N of x is 4, elsewhere 3"),
        ({"x": (x, "N 7")}, "op: dimension 7 of x is 4, elsewhere 7"),
        ({"x": (x, "B N D")}, r"op: x must have 3 dimensions \[B N D\], got \(3, 4\)"),
    ):
        with pytest.raises(ValueError, match=told):
            check_dims("op", **shapes)


def test_dtypes_are_named() -> None:
    half, long = X.half(), X.long()
    check_floats("op", x=X, bias=None, y=X)
    check_dtype("op", torch.int64, slots=long)
    with pytest.raises(TypeError, match=r"op: y is torch.float16, x is torch.float32"):
        check_floats("op", x=X, bias=None, y=half)
    with pytest.raises(TypeError, match=r"op: x must be of a floating-point dtype, got torch.int64"):
        check_floats("op", x=long, y=long)
    with pytest.raises(TypeError, match=r"op: slots must be torch.int64, got torch.float32; convert it"):
        check_dtype("op", torch.int64, slots=X)


def test_ranges_are_half_open() -> None:
    check_range("op", "slots", torch.tensor([0, 4]), 0, 5)
    check_range("op", "slots", torch.zeros(0), 0, 5)
    check_range("op", "slots", torch.tensor([9], device="meta"), 0, 5)  # nothing to read
    for bad in (-1, 5):
        with pytest.raises(ValueError, match=rf"op: slots holds {bad}, must be in \[0, 5\)"):
            check_range("op", "slots", torch.tensor([2, bad, 0]), 0, 5)
