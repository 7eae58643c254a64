"""paged_attention's kernels for batches of listeners, run on the CPU: TMA boxes of pages, wgmma through its
descriptors, mbarriers and named barriers, warps that load beside warps that multiply.
"""

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

examples = settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
every_seed = pytest.mark.parametrize("seed", [0, 1, 2])
every_width = pytest.mark.parametrize("head_width", [64, 128])
DTYPES = (torch.bfloat16, torch.float16)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
PAGES = (8, 16, 32, 64, 128, 192)
BF16 = torch.bfloat16


@pytest.fixture
def kernels(kernels: Any) -> Any:
    kernels.wgmma = True
    return kernels


@every_dtype
@every_width
@every_seed
@pytest.mark.parametrize("blocks", [1, 4, 40])
def test_of_split_contexts(
    check: Callable[..., None], dtype: torch.dtype, head_width: int, seed: int, blocks: int
) -> None:
    """A listener, a speaker (whose tile has rows for one group), a padded sequence and speculation (two
    tiles); gaps that are larger than a piece; rings that turn over in the middle of a piece.
    """
    case = paged_attention_case(
        seeded(seed), rows=(13, 1, 0, 26), lens=(700, 333, 0, 90), heads=16, kv_heads=2,
        head_width=head_width, gaps=((5, 170), (0, 300), (0, 0), (3, 60)), dtype=dtype, page=16,
    )  # fmt: skip
    check("paged_attention", case, seed=seed, blocks=blocks)


@every_width
@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (14, 2), (6, 3), (40, 1)])
def test_of_any_heads(check: Callable[..., None], head_width: int, heads: int, kv_heads: int) -> None:
    """Tiles of packed rows that begin in the middle of a row's heads; columns of another KV head beside."""
    case = paged_attention_case(
        seeded(3), rows=(5, 1, 13), lens=(150, 12, 77), gaps=((3, 9), (0, 0), (64, 64)), page=8,
        heads=heads, kv_heads=kv_heads, head_width=head_width, dtype=BF16,
    )  # fmt: skip
    check("paged_attention", case, blocks=5)


@every_dtype
@pytest.mark.parametrize("page", PAGES)
def test_of_any_page(check: Callable[..., None], dtype: torch.dtype, page: int) -> None:
    """More boxes than lanes, pages that steps share, gaps that hold whole boxes and end inside one."""
    case = paged_attention_case(
        seeded(4), rows=(13, 9), lens=(530, 257), gaps=((6, 143), (64, 192)), page=page, dtype=dtype, heads=8,
        kv_heads=1, head_width=64,
    )  # fmt: skip
    check("paged_attention", case, blocks=2, seed=page)


@pytest.mark.parametrize("length", [13, 63, 64, 65, 75, 76, 77, 127, 128, 129, 449, 897])
def test_of_any_length(check: Callable[..., None], length: int) -> None:
    """The end of the keys, and the first row's own slot, at every place of a step."""
    case = paged_attention_case(
        seeded(length), rows=(13,), lens=(length,), gaps=((0, 0),), page=64, dtype=BF16, heads=8, kv_heads=1,
        head_width=128,
    )  # fmt: skip
    check("paged_attention", case, blocks=1, seed=length)


@pytest.mark.parametrize("blocks", [1, 7])
def test_of_many_sequences(check: Callable[..., None], blocks: int) -> None:
    """More than there are threads that count; pieces of all sorts of rows behind each other."""
    rows = [(1, 0, 13)[b % 3] if b % 50 == 0 else int(b % 7 == 0) for b in range(300)]
    lens = [count + 3 * b % 70 if count else 0 for b, count in enumerate(rows)]
    case = paged_attention_case(
        seeded(5), rows=rows, lens=lens, gaps=[(0, 0)] * 300, dtype=BF16, heads=8, kv_heads=1, head_width=64
    )
    check("paged_attention", case, blocks=blocks)


@pytest.mark.parametrize("seed", [2, 6, 10])
@pytest.mark.parametrize("blocks", [4, 40])
def test_the_last_block_finds_all_parts(check: Callable[..., None], seed: int, blocks: int) -> None:
    """Several blocks of a tile at the same time, some threads far behind: no part is missing."""
    case = paged_attention_case(
        seeded(blocks), rows=(13, 1, 0, 26), lens=(700, 333, 0, 90), heads=16, kv_heads=2, head_width=64,
        gaps=((5, 170), (0, 300), (0, 0), (3, 60)), dtype=BF16, page=64,
    )  # fmt: skip
    check("paged_attention", case, seed=seed, blocks=blocks, resident=6)


@pytest.mark.parametrize("seed", range(4, 16))
def test_of_any_order_of_threads(check: Callable[..., None], seed: int) -> None:
    """Warps that lag behind all others, groups and loads among them, while the ring turns over and over."""
    case = paged_attention_case(
        seeded(seed), rows=(13, 2, 13), lens=(900, 500, 300), heads=8, kv_heads=1, head_width=128,
        gaps=((70, 75), (0, 0), (0, 0)), dtype=BF16, page=64,
    )  # fmt: skip
    check("paged_attention", case, seed=seed, blocks=1)


@examples
@given(data=st.data())
def test_of_ragged_batches(check: Callable[..., None], data: st.DataObject) -> None:
    rows, lens, gaps = ragged(data, most_rows=40, most_context=300)
    options = {name: data.draw(st.integers(1, 9), label=name) for name in ("seed", "blocks", "resident")}
    case = paged_attention_case(
        seeded(options["seed"]), rows=rows, lens=lens, gaps=gaps, heads=8, kv_heads=1,
        dtype=data.draw(st.sampled_from(DTYPES), label="dtype"),
        page=data.draw(st.sampled_from(PAGES), label="page"),
        head_width=data.draw(st.sampled_from((64, 128)), label="head width"),
    )  # fmt: skip
    check("paged_attention", case, **options)


@every_dtype
def test_repeats_to_the_bit(kernels: Any, dtype: torch.dtype) -> None:
    """Whichever block is the last one of a tile, and whichever group is ahead."""
    case = paged_attention_case(
        seeded(8), rows=(13, 1), lens=(500, 177), gaps=((0, 0),) * 2, heads=8, kv_heads=1, dtype=dtype,
        head_width=64,
    )  # fmt: skip
    kernels.blocks, outs = 5, []
    for seed in range(4):
        kernels.seed, kernels.resident = seed, seed + 1
        outs.append(kernels.paged_attention(**case.arguments))
    assert all(torch.equal(out, outs[0]) for out in outs)


@every_width
@pytest.mark.parametrize("place", ["q", "k_pages", "v_pages"])
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_keeps_what_is_not_finite_in_its_sequence(
    kernels: Any, place: str, poison: float, head_width: int
) -> None:
    """Sequence 1 has it in its last slot; those of the others come into the same places of the ring."""
    case = paged_attention_case(
        seeded(7), rows=(13, 1, 13), lens=(30, 140, 905), gaps=((2, 5),) * 3, dtype=BF16,
        head_width=head_width,
    )  # fmt: skip
    a = case.arguments
    kernels.blocks = 1
    clean = kernels.paged_attention(**a)
    if place == "q":
        a["q"][13] = poison
    else:
        page, offset = divmod(139, a["k_pages"].shape[1])
        a[place][int(a["block_table"][1, page]), offset] = poison
    dirty = kernels.paged_attention(**a)
    others = torch.arange(27) != 13
    assert torch.equal(dirty[others], clean[others])
    if poison != poison or place != "k_pages":  # a key of +-Inf may score -Inf: weight 0
        assert not dirty[13].isfinite().any()


@every_dtype
@pytest.mark.parametrize("scale", [1e-3, 30.0])
def test_of_flat_and_of_peaked_weights(check: Callable[..., None], dtype: torch.dtype, scale: float) -> None:
    """The maximum so far moves never, or by far and late."""
    case = paged_attention_case(
        seeded(9), rows=(13,), lens=(401,), gaps=((0, 0),), heads=8, kv_heads=1, dtype=dtype, head_width=64
    )
    case.arguments["q"] *= scale
    check("paged_attention", case, blocks=2)


@pytest.mark.parametrize("rows", [8, 9, 16, 17])
@pytest.mark.parametrize("length", [64, 200])
def test_of_tiles_for_one_group_and_for_two(check: Callable[..., None], rows: int, length: int) -> None:
    """64, 72, 128 and 136 packed rows."""
    case = paged_attention_case(
        seeded(rows), rows=(rows, 1, rows), lens=(length, 100, length), gaps=((0, 0),) * 3, heads=8,
        kv_heads=1, dtype=BF16, head_width=64,
    )  # fmt: skip
    check("paged_attention", case, blocks=1, seed=2 * rows)
