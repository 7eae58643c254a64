"""linear's CUDA kernels on a real GPU, where no emulation goes: captures, dependent launches, threads."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastloop.ops.cuda import dependent_launches, linear_cuda, linear_quantised_cuda
from fastloop.ops.native import native, reason
from fastloop.quantise import quantise_int4
from fastloop.testing.assertions import bits, seeded
from fastloop.testing.op_cases import linear_case

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(native is None, reason=reason),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
BF16 = torch.bfloat16
Call = Callable[[Tensor], Tensor]


def plain(width_in: int, splits: int) -> Call:
    a = _arguments(width_in)
    return lambda x: linear_cuda(x, **a, splits=splits)


def int4(width_in: int, splits: int) -> Call:
    a = _arguments(width_in)
    values, scale = quantise_int4(a.pop("weight").cpu())
    values, scale = values.cuda(), scale.cuda()
    return lambda x: linear_quantised_cuda(x, values, scale, **a, splits=splits)


def _arguments(width_in: int) -> dict[str, Any]:
    case = linear_case(
        seeded(1), rows=13, width_in=width_in, width_out=600, bias=True, residual=True, dtype=BF16
    )
    return {n: v.cuda() if isinstance(v, Tensor) else v for n, v in case.arguments.items() if n != "x"}


every_call = pytest.mark.parametrize(
    ("make", "width_in", "splits"),
    [(plain, 1096, 1), (plain, 1096, 8), (plain, 1095, 4), (int4, 1024, 1), (int4, 1024, 4)],
    ids=["one block", "cluster", "through memory", "int4", "int4 through memory"],
)


def rows(width_in: int, seed: int) -> Tensor:
    return torch.randn(13, width_in, generator=seeded(seed)).to(BF16).cuda()


@every_call
def test_a_captured_call_follows_its_inputs(make: Callable[..., Call], width_in: int, splits: int) -> None:
    """Two graphs of one call, replayed at the same time on two streams, each on its own memory."""
    call = make(width_in, splits)
    expected = [call(rows(width_in, seed)) for seed in range(4)]
    graphs = []
    for _ in range(2):
        x, graph = torch.zeros(13, width_in, dtype=BF16, device="cuda"), torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = call(x)
        graphs.append((graph, x, y, torch.cuda.Stream()))
    for turn in range(2):
        for number, (graph, x, _, stream) in enumerate(graphs):
            x.copy_(rows(width_in, 2 * turn + number))
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                graph.replay()
        torch.cuda.synchronize()
        for number, (_, _, y, _) in enumerate(graphs):
            assert torch.equal(bits(y), bits(expected[2 * turn + number]))


@every_call
def test_every_run_gives_the_same_bits(make: Callable[..., Call], width_in: int, splits: int) -> None:
    call, x = make(width_in, splits), rows(width_in, 5)
    first = call(x)
    for _ in range(50):
        assert torch.equal(bits(call(x)), bits(first))


@every_call
def test_dependent_launches_wait_for_their_rows(
    make: Callable[..., Call], width_in: int, splits: int
) -> None:
    """A chain in which each call reads what the one in front of it wrote, with and without overlap."""
    call = make(width_in, splits)
    fold = torch.nn.functional.pad

    def chain() -> Tensor:
        x = rows(width_in, 6)
        for _ in range(20):
            y = call(x)
            x = fold(y, (0, width_in - y.shape[1])) / y.float().std().to(BF16)
        return x

    expected = chain()
    with dependent_launches(True):
        assert torch.equal(bits(chain()), bits(expected))


@every_call
def test_a_new_thread_needs_no_preparation(make: Callable[..., Call], width_in: int, splits: int) -> None:
    """It has no current context of its own until something makes one."""
    call, x = make(width_in, splits), rows(width_in, 7)
    expected, found = call(x), []
    torch.cuda.synchronize()
    thread = threading.Thread(target=lambda: found.append(call(x)))
    thread.start()
    thread.join()
    torch.cuda.synchronize()
    assert torch.equal(bits(found[0]), bits(expected))
