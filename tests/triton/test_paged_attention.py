"""paged_attention in Triton against its definition: ragged rows, gaps, split contexts, poison around them."""

from __future__ import annotations

from collections.abc import Callable

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings

from fastloop.testing.implementations import Implementation
from fastloop.testing.op_cases import Case, paged_attention_case
from fastloop.testing.ragged import ragged

Check = Callable[[str, Case], None]


def generator(seed: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_equals_the_definition(check: Check, dtype: torch.dtype) -> None:
    check("paged_attention", paged_attention_case(generator(), dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_split_contexts(check: Check, dtype: torch.dtype) -> None:
    """A listener and a speaker far into their streams: several ranges each, some of them empty of keys."""
    case = paged_attention_case(
        generator(2), rows=(13, 1), lens=(400, 333), gaps=((5, 170), (0, 300)), dtype=dtype
    )
    check("paged_attention", case)


def test_padding_takes_no_program(check: Check) -> None:
    """As in a captured step: a sequence for every row, most of them of one slot or of no rows."""
    rows, lens = [13] + [1] * 3 + [0] * 12, [300] + [1] * 3 + [0] * 12
    check("paged_attention", paged_attention_case(generator(9), rows=rows, lens=lens, gaps=[(0, 0)] * 16))


def test_more_work_than_programs(check: Check) -> None:
    """Each program takes several units in turn."""
    rows = [1, 13] * 10
    lens = [20 + 3 * b for b in range(20)]
    check("paged_attention", paged_attention_case(generator(10), rows=rows, lens=lens, gaps=[(0, 0)] * 20))


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_width"), [(1, 1, 1), (7, 1, 24), (6, 3, 96), (16, 2, 128)]
)
def test_any_heads(check: Check, heads: int, kv_heads: int, head_width: int) -> None:
    sizes = {"heads": heads, "kv_heads": kv_heads, "head_width": head_width}
    check(
        "paged_attention",
        paged_attention_case(generator(3), rows=(5, 1), lens=(40, 12), gaps=((3, 9),) * 2, **sizes),
    )


@pytest.mark.parametrize("page", [1, 7, 64])
def test_any_page(check: Check, page: int) -> None:
    check("paged_attention", paged_attention_case(generator(4), page=page))


def test_a_table_of_any_strides(device: str) -> None:
    run = Implementation("paged_attention", "triton", device)
    arguments = paged_attention_case(generator(15), rows=(5, 1), lens=(40, 33)).arguments
    table = arguments["block_table"]
    turned = table.T.contiguous().T
    assert turned.stride() != table.stride()
    assert torch.equal(run(**arguments | {"block_table": turned}), run(**arguments))


@pytest.mark.parametrize("name", ["k_pages", "v_pages"])
def test_pools_are_not_copied(device: str, name: str) -> None:
    arguments = paged_attention_case(generator(16)).arguments
    spread = arguments[name].transpose(1, 2).contiguous().transpose(1, 2)
    with pytest.raises(ValueError, match=f"{name} must be contiguous; the pool is not copied"):
        Implementation("paged_attention", "triton", device)(**arguments | {name: spread})


def test_pages_of_another_dtype(check: Check) -> None:
    case = paged_attention_case(generator(5), dtype=torch.float16, page_dtype=torch.float32)
    check("paged_attention", case)


def test_text_alone(check: Check) -> None:
    """One row of each of many sequences: tiles of 16 packed rows."""
    lens = [3, 50, 1, 120, 17, 64, 65]
    case = paged_attention_case(
        generator(6), rows=[1] * 7, lens=lens, gaps=[(0, 0)] * 7, heads=16, kv_heads=2
    )
    check("paged_attention", case)


@settings(max_examples=6, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_ragged_batches(check: Check, data: st.DataObject) -> None:
    rows, lens, gaps = ragged(data, most_rows=20, most_context=150)
    seed = data.draw(st.integers(0, 2**20), label="seed")
    check("paged_attention", paged_attention_case(generator(seed), rows=rows, lens=lens, gaps=gaps))


def test_what_is_not_finite_stays_in_its_sequence(device: str) -> None:
    run = Implementation("paged_attention", "triton", device)
    case = paged_attention_case(generator(7), rows=(13, 1, 13), lens=(30, 40, 25), gaps=((2, 5),) * 3)
    clean = run(**case.arguments)
    page = int(case.arguments["block_table"][1, 1])  # its slots 8..15
    case.arguments["k_pages"][page, 3] = torch.inf
    spoilt = run(**case.arguments)
    others = torch.arange(27) != 13
    assert not spoilt[13].isfinite().all()
    assert torch.equal(spoilt[others], clean[others])


def test_repeats_are_bit_equal(device: str) -> None:
    run = Implementation("paged_attention", "triton", device)
    case = paged_attention_case(generator(8), rows=(9, 1), lens=(150, 77), gaps=((0, 0),) * 2)
    assert torch.equal(run(**case.arguments), run(**case.arguments))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_scaled_pages(check: Check, dtype: torch.dtype) -> None:
    check("paged_attention", paged_attention_case(generator(11), dtype=dtype, scaled=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gaps", [((5, 170), (0, 300)), ((31, 33), (0, 0)), ((64, 65), (10, 42))])
def test_scaled_pages_of_split_contexts(
    check: Check, dtype: torch.dtype, gaps: tuple[tuple[int, int], ...]
) -> None:
    """Gaps that begin and end within a step of slots, at its edges, and behind many of them."""
    case = paged_attention_case(
        generator(12), rows=(13, 1), lens=(400, 333), gaps=gaps, dtype=dtype, scaled=True
    )
    check("paged_attention", case)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_width", "page"),
    [(1, 1, 2, 1), (7, 1, 24, 7), (6, 3, 96, 64), (16, 2, 128, 64)],
)
def test_scaled_pages_of_any_heads(
    check: Check, heads: int, kv_heads: int, head_width: int, page: int
) -> None:
    sizes = {"heads": heads, "kv_heads": kv_heads, "head_width": head_width, "page": page}
    gaps = ((3, 9), (0, 0))
    check(
        "paged_attention",
        paged_attention_case(generator(13), rows=(5, 1), lens=(40, 12), gaps=gaps, scaled=True, **sizes),
    )


@settings(max_examples=6, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_scaled_pages_of_ragged_batches(check: Check, data: st.DataObject) -> None:
    rows, lens, gaps = ragged(data, most_rows=20, most_context=150)
    seed = data.draw(st.integers(0, 2**20), label="seed")
    check(
        "paged_attention", paged_attention_case(generator(seed), rows=rows, lens=lens, gaps=gaps, scaled=True)
    )


def test_what_is_not_finite_in_scaled_pages_stays_in_its_sequence(device: str) -> None:
    run = Implementation("paged_attention", "triton", device)
    case = paged_attention_case(
        generator(14), rows=(13, 1, 13), lens=(30, 40, 25), gaps=((2, 5),) * 3, scaled=True
    )
    clean = run(**case.arguments)
    page = int(case.arguments["block_table"][1, 1])
    case.arguments["k_pages"].view(torch.uint8)[page, 3] = 0x7F  # NaN
    spoilt = run(**case.arguments)
    others = torch.arange(27) != 13
    assert spoilt[13].isnan().all() and torch.equal(spoilt[others], clean[others])
