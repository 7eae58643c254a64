"""paged_attention in CUDA C++, run on the CPU: ragged rows, gaps, any number of blocks, poison."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings

from fastloop.testing.assertions import seeded
from fastloop.testing.op_cases import paged_attention_case
from fastloop.testing.ragged import ragged

every_seed = pytest.mark.parametrize("seed", [0, 1, 2])
examples = settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
DTYPES = [
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float8_e4m3fn),
    (torch.float16, torch.float16),
]
every_dtype = pytest.mark.parametrize(("dtype", "pages"), DTYPES, ids=lambda d: str(d)[6:])


@every_dtype
@every_seed
@pytest.mark.parametrize("blocks", [1, 4, 40])
def test_of_split_contexts(
    check: Callable[..., None], dtype: torch.dtype, pages: torch.dtype, seed: int, blocks: int
) -> None:
    """A listener, a speaker, a padded sequence and speculation; gaps that are larger than a piece."""
    case = paged_attention_case(
        seeded(seed), rows=(13, 1, 0, 26), lens=(400, 333, 0, 90), heads=16, kv_heads=2, head_width=64,
        gaps=((5, 170), (0, 300), (0, 0), (3, 60)), dtype=dtype, page_dtype=pages,
    )  # fmt: skip
    check("paged_attention", case, seed=seed, blocks=blocks)


@every_dtype
@pytest.mark.parametrize("head_width", [8, 40, 128])
@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (14, 2), (6, 3), (40, 1)])
def test_of_any_heads(
    check: Callable[..., None],
    dtype: torch.dtype,
    pages: torch.dtype,
    head_width: int,
    heads: int,
    kv_heads: int,
) -> None:
    """Tiles of packed rows that begin in the middle of a row's heads."""
    width = -(-head_width // 16) * 16 if pages == torch.float8_e4m3fn else head_width
    case = paged_attention_case(
        seeded(3), rows=(5, 1, 13), lens=(150, 12, 77), gaps=((3, 9), (0, 0), (64, 64)), page=7,
        heads=heads, kv_heads=kv_heads, head_width=width, dtype=dtype, page_dtype=pages,
    )  # fmt: skip
    check("paged_attention", case, blocks=5)


@every_dtype
@pytest.mark.parametrize("page", [1, 16, 64, 256])
def test_of_any_page(check: Callable[..., None], dtype: torch.dtype, pages: torch.dtype, page: int) -> None:
    case = paged_attention_case(
        seeded(4), rows=(13, 1), lens=(130, 65), gaps=((6, 10), (6, 8)), page=page, dtype=dtype,
        page_dtype=pages,
    )  # fmt: skip
    check("paged_attention", case, blocks=2, seed=page)


@pytest.mark.parametrize("blocks", [1, 7])
def test_of_many_sequences(check: Callable[..., None], blocks: int) -> None:
    """More than there are threads: each thread counts the steps of several."""
    rows = [(1, 0, 13)[b % 3] if b % 50 == 0 else int(b % 7 == 0) for b in range(300)]
    lens = [count + 3 * b % 70 if count else 0 for b, count in enumerate(rows)]
    case = paged_attention_case(
        seeded(5), rows=rows, lens=lens, gaps=[(0, 0)] * 300, dtype=torch.bfloat16, heads=2, kv_heads=1
    )
    check("paged_attention", case, blocks=blocks)


@pytest.mark.parametrize("seed", [2, 6, 10])
@pytest.mark.parametrize("blocks", [4, 40])
def test_the_last_block_finds_all_parts(check: Callable[..., None], seed: int, blocks: int) -> None:
    """Several blocks of a tile at the same time, some threads far behind: no part is missing."""
    case = paged_attention_case(
        seeded(blocks), rows=(13, 1, 0, 26), lens=(400, 333, 0, 90), heads=16, kv_heads=2, head_width=64,
        gaps=((5, 170), (0, 300), (0, 0), (3, 60)), dtype=torch.bfloat16,
    )  # fmt: skip
    check("paged_attention", case, seed=seed, blocks=blocks, resident=6)


@examples
@given(data=st.data())
def test_of_ragged_batches(check: Callable[..., None], data: st.DataObject) -> None:
    rows, lens, gaps = ragged(data, most_rows=40, most_context=300)
    options = {name: data.draw(st.integers(1, 9), label=name) for name in ("seed", "blocks", "resident")}
    dtype, pages = data.draw(st.sampled_from(DTYPES), label="dtypes")
    case = paged_attention_case(
        seeded(options["seed"]), rows=rows, lens=lens, gaps=gaps, dtype=dtype, page_dtype=pages,
        heads=8, kv_heads=1,
    )  # fmt: skip
    check("paged_attention", case, **options)


@every_dtype
def test_repeats_to_the_bit(kernels: Any, dtype: torch.dtype, pages: torch.dtype) -> None:
    """Whichever block is the last one of a tile."""
    case = paged_attention_case(
        seeded(8), rows=(13, 1), lens=(500, 177), gaps=((0, 0),) * 2, heads=8, kv_heads=1, dtype=dtype,
        page_dtype=pages,
    )  # fmt: skip
    kernels.blocks, outs = 5, []
    for seed in range(4):
        kernels.seed, kernels.resident = seed, seed + 1
        outs.append(kernels.paged_attention(**case.arguments))
    assert all(torch.equal(out, outs[0]) for out in outs)


@every_dtype
@pytest.mark.parametrize("place", ["q", "k_pages", "v_pages"])
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_keeps_what_is_not_finite_in_its_sequence(
    kernels: Any, dtype: torch.dtype, pages: torch.dtype, place: str, poison: float
) -> None:
    case = paged_attention_case(
        seeded(7), rows=(13, 1, 13), lens=(30, 140, 25), gaps=((2, 5),) * 3, dtype=dtype, page_dtype=pages
    )
    a = case.arguments
    clean = kernels.paged_attention(**a)
    if place == "q":
        a["q"][13] = poison
    else:
        page, offset = divmod(139, a["k_pages"].shape[1])
        a[place][int(a["block_table"][1, page]), offset] = poison
    dirty = kernels.paged_attention(**a)
    others = torch.arange(27) != 13
    assert torch.equal(dirty[others], clean[others])
    infinite = poison == poison and place != "q" and pages == torch.float8_e4m3fn  # which has no infinity
    if not infinite and (poison != poison or place != "k_pages"):  # a key of +-Inf may score -Inf: weight 0
        assert not dirty[13].isfinite().any()
