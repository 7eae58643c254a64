"""CUDA kernels on a real GPU, where no emulation goes: linear's captures, dependent launches, threads;
paged_attention's kernels for batches of listeners beside those that take every call.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastloop.ops.cuda import linear_cuda, linear_quantised_cuda, paged_attention_cuda
from fastloop.ops.dependent import dependent_launches
from fastloop.ops.native import native, reason
from fastloop.ops.paged_attention import paged_attention_ref
from fastloop.quantise import quantise_int4
from fastloop.testing.assertions import bits, seeded
from fastloop.testing.op_cases import linear_case, paged_attention_case
from fastloop.testing.tolerance import error_bound, relative_error

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


hopper = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability()[0] != 9, reason="no sm_90"
)


def listeners(seed: int, dtype: torch.dtype, head_width: int, page: int) -> dict[str, Tensor]:
    """Arguments on the GPU: 17 streams, every fourth a speaker, ends and gaps at all places."""
    rows = [13 if b % 4 else 1 for b in range(17)]
    lens = [rows[b] + 149 * b for b in range(17)]
    gaps = [(min(5, 7 * b), 8 * b) for b in range(17)]
    case = paged_attention_case(
        seeded(seed), rows=rows, lens=lens, gaps=gaps, page=page, dtype=dtype, heads=16, kv_heads=2,
        head_width=head_width,
    )  # fmt: skip
    return {name: value.cuda() for name, value in case.arguments.items()}


by_wgmma = functools.partial(paged_attention_cuda, kernel="wgmma")


@hopper
@pytest.mark.parametrize("dtype", [BF16, torch.float16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("head_width", [64, 128])
@pytest.mark.parametrize("page", [8, 32, 64, 128])
@pytest.mark.parametrize("blocks", [0, 1, 7])
def test_batches_of_listeners(dtype: torch.dtype, head_width: int, page: int, blocks: int) -> None:
    """Within the bound of the definition; the same bits every time; kernels of both kinds agree."""
    a = listeners(page, dtype, head_width, page)
    own = {name: value.cpu() for name, value in a.items()}
    exact = paged_attention_ref(**{n: v.double() if v.is_floating_point() else v for n, v in own.items()})
    bound = error_bound(paged_attention_ref(**own), exact, dtype)
    found = by_wgmma(**a, blocks=blocks)
    assert relative_error(found.cpu(), exact) <= bound
    assert relative_error(paged_attention_cuda(**a, kernel="mma").cpu(), exact) <= bound
    for _ in range(20):
        assert torch.equal(bits(by_wgmma(**a, blocks=blocks)), bits(found))


@hopper
def test_a_captured_batch_follows_its_lengths() -> None:
    """A graph made with one set of lengths, replayed with others."""
    made, other = (listeners(seed, BF16, 128, 64) for seed in (1, 2))
    other["kv_lens"] -= 5
    other["gaps"].zero_()
    other["k_pages"].nan_to_num_()
    other["v_pages"].nan_to_num_()
    other["kv_lens"] = other["kv_lens"].maximum(other["row_starts"].diff())
    expected = [by_wgmma(**a) for a in (made, other)]
    held = {name: value.clone() for name, value in made.items()}
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = by_wgmma(**held)
    for a, wanted in ((other, expected[1]), (made, expected[0])):
        for name, value in held.items():
            value.copy_(a[name])
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(bits(result), bits(wanted))


@hopper
def test_dependent_launches_of_attention_wait_for_their_rows() -> None:
    """A chain in which each call's queries are what the one in front of it wrote."""
    a = listeners(3, BF16, 128, 64)

    def chain() -> Tensor:
        q = a["q"]
        for _ in range(20):
            q = by_wgmma(**a | {"q": q})
        return q

    expected = chain()
    with dependent_launches(True):
        assert torch.equal(bits(chain()), bits(expected))
