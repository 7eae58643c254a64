"""Backend "flash_attn" of paged_attention on the CPU: what it makes of a call for flash-attn, in whose place
stands what its documentation says. On a GPU with the real one, test_paged_attention.py runs over that.
"""

from __future__ import annotations

import contextlib
import random
import sys
from types import ModuleType
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor

from fastloop.ops import REGISTRY, BackendError
from fastloop.ops.dispatch import Op
from fastloop.ops.flash_attn import MISSING, paged_attention_flash_attn, register_flash_attn
from fastloop.testing.assertions import assert_near, seeded
from fastloop.testing.implementations import copied
from fastloop.testing.op_cases import Arguments, paged_attention_case
from fastloop.testing.selfcheck import self_check

CALLS: list[dict[str, Any]] = []


def documented(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    cache_seqlens: Tensor,
    block_table: Tensor | None = None,
    causal: bool = False,
) -> Tensor:
    """flash_attn_with_kvcache 2.8 as its documentation has it, for the arguments that are used here."""
    CALLS.append({"q": q, "block_table": block_table, "k_cache": k_cache})
    assert q.dtype in (torch.float16, torch.bfloat16) and k_cache.dtype == v_cache.dtype == q.dtype
    assert cache_seqlens.dtype == torch.int32 and cache_seqlens.shape == (len(q),)
    assert q.stride(-1) == k_cache.stride(-1) == v_cache.stride(-1) == 1
    if block_table is not None:
        assert block_table.dtype == torch.int32 and len(block_table) == len(q)
        assert k_cache.shape[1] % 256 == 0, "Paged KV cache block size must be divisible by 256"
        assert int(cache_seqlens.max()) <= block_table.shape[1] * k_cache.shape[1]
        k_cache, v_cache = (pool[block_table.long()].flatten(1, 2) for pool in (k_cache, v_cache))
    assert len(k_cache) == len(q)
    out = torch.zeros_like(q)
    repeat, rows = q.shape[2] // k_cache.shape[2], q.shape[1]
    for b, length in enumerate(cache_seqlens.tolist()):
        k, v = (cache[b, :length].double().repeat_interleave(repeat, dim=1) for cache in (k_cache, v_cache))
        scores = torch.einsum("nhk,shk->hns", q[b].double(), k) * q.shape[-1] ** -0.5
        if causal:  # aligned to the bottom right
            late = torch.arange(length) > torch.arange(rows)[:, None] + length - rows
            scores = scores.masked_fill(late, -torch.inf)
        weights = scores.softmax(-1).nan_to_num(0.0)  # a row that sees nothing is zero
        out[b] = torch.einsum("hns,shk->nhk", weights, v).to(q.dtype)
    return out


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("flash_attn")
    module.flash_attn_with_kvcache = documented  # type: ignore[attr-defined]
    module.__spec__ = torch.__spec__  # find_spec asks the module for it
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    CALLS.clear()


@pytest.fixture
def op(stand_in: None, monkeypatch: pytest.MonkeyPatch) -> Op[..., Any]:
    """paged_attention as it is registered where flash-attn is installed, for the time of a test."""
    paged_attention = REGISTRY["paged_attention"]
    for table in ("implementations", "unavailable", "limits", "refuses"):
        monkeypatch.setattr(paged_attention, table, dict(getattr(paged_attention, table)))
    register_flash_attn(paged_attention)
    return paged_attention


def arguments(
    rows: list[int], lens: list[int], gaps: list[tuple[int, int]], seed: int = 1, **dims: Any
) -> Arguments:
    dims = {"dtype": torch.bfloat16} | dims
    return paged_attention_case(seeded(seed), rows=rows, lens=lens, gaps=gaps, **dims).arguments


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("page", [1, 3, 64, 256])
@given(seed=st.integers(0, 2**32 - 1))
def test_it_is_the_definition(dtype: torch.dtype, page: int, seed: int) -> None:
    """Ragged rows, sequences without any, gaps; slots of nobody are NaN, spare table entries no page."""
    draw = random.Random(seed)
    rows = draw.choices([0, 1, 1, 2, 13, 26], k=draw.randint(1, 5))
    before = [draw.randint(0, 70) for _ in rows]
    gaps = [(begin := draw.randint(0, n), draw.choice([begin, draw.randint(begin, n)])) for n in before]
    lens = [a + b for a, b in zip(rows, before, strict=True)]
    a = arguments(rows, lens, gaps, seed, page=page, dtype=dtype, heads=6)
    given_ones = copied(a)
    assert_near(paged_attention_flash_attn(**a), "paged_attention", a)
    for name, before in given_ones.items():
        assert torch.equal(a[name].nan_to_num(7), before.nan_to_num(7)), name


def test_pages_of_256_are_read_where_they_lie() -> None:
    a = arguments([13, 1, 0, 2], [300, 513, 20, 2], [(0, 0), (513, 520), (5, 5), (9, 11)], page=256)
    paged_attention_flash_attn(**a)
    (call,) = CALLS
    assert call["k_cache"] is a["k_pages"] and call["block_table"].shape == a["block_table"].shape
    assert call["q"].shape == (4, 13, 4, 16)


@pytest.mark.parametrize(("page", "gap"), [(256, (6, 256)), (64, (0, 0))])
def test_other_pages_and_gaps_are_copied(page: int, gap: tuple[int, int]) -> None:
    paged_attention_flash_attn(**arguments([13], [300], [gap], page=page))
    assert CALLS[0]["block_table"] is None
    assert CALLS[0]["k_cache"].shape == (1, 300 - gap[1] + gap[0], 2, 16)


def test_no_rows_are_no_call() -> None:
    a = arguments([0, 0], [5, 0], [(0, 0), (0, 0)])
    assert paged_attention_flash_attn(**a).shape == (0, 4, 16) and not CALLS


def test_it_is_registered_for_gpus_and_never_the_default(op: Op[..., Any]) -> None:
    assert op.implementations["flash_attn"] is paged_attention_flash_attn
    assert not any("flash_attn" in found for o in REGISTRY.values() for found in o.defaults.values())


@pytest.mark.parametrize(
    ("dims", "told"),
    [
        ({"dtype": torch.float32}, "it takes q in torch.float16 or torch.bfloat16, got torch.float32"),
        ({"page_dtype": torch.float16}, "it takes pages in q's dtype, got torch.float16"),
        ({"page_dtype": torch.float8_e4m3fn}, "it takes k_pages in torch.float16 or torch.bfloat16"),
        ({"head_width": 12}, "a multiple of 8 up to 256, got 12"),
        ({"head_width": 264}, "a multiple of 8 up to 256, got 264"),
        ({}, ""),
    ],
)
def test_what_it_does_not_take(op: Op[..., Any], dims: dict[str, Any], told: str) -> None:
    a = paged_attention_case(seeded(1), **({"dtype": torch.bfloat16} | dims)).arguments
    refusal = op.refusal("flash_attn", (), a)
    assert (told in refusal) if told else refusal == ""


def test_without_flash_attn(op: Op[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Not installed at all, or a package of that name that has no such function."""
    a = arguments([2], [4], [(0, 0)])
    monkeypatch.setitem(sys.modules, "flash_attn", ModuleType("flash_attn"))
    with pytest.raises(BackendError, match=r"'flash_attn' does not load .*flash_attn_with_kvcache"):
        paged_attention_flash_attn(**a)
    monkeypatch.delitem(sys.modules, "flash_attn")
    monkeypatch.setattr("fastloop.ops.flash_attn.importlib.util.find_spec", lambda name: None)
    del op.implementations["flash_attn"]
    register_flash_attn(op)
    assert op.unavailable["flash_attn"] == MISSING and "flash_attn" not in op.implementations


def test_a_capture_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(Tensor, "is_cuda", True)
    with pytest.raises(BackendError, match="reads lengths on the host"):
        paged_attention_flash_attn(**arguments([2], [4], [(0, 0)]))


def test_the_self_check_takes_it(op: Op[..., Any]) -> None:
    """Its cases are in float32: this backend gets them in bfloat16."""
    found = self_check("paged_attention", "flash_attn")
    assert found.ok and found.error is not None, found.problem


def test_the_stand_in_is_not_the_definition() -> None:
    """Without the causal mask, the same call does not pass."""
    a = arguments([3], [7], [(0, 0)], page=256)
    table = a["block_table"].clamp(max=len(a["k_pages"]) - 1)
    for causal in (True, False):
        out = documented(
            a["q"][None], a["k_pages"], a["v_pages"], cache_seqlens=a["kv_lens"], block_table=table,
            causal=causal,
        )  # fmt: skip
        with contextlib.nullcontext() if causal else pytest.raises(AssertionError):
            assert_near(out[0], "paged_attention", a)
