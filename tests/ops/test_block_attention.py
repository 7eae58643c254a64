"""The op `block_attention`: every implementation against the definition, the definition against numpy."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given
from scipy.special import softmax
from torch import Tensor

from fastloop.testing.assertions import assert_defined, assert_near, assert_right, bits, seeded
from fastloop.testing.implementations import Implementation, copied
from fastloop.testing.op_cases import Case, block_attention_case

seeds = st.integers(0, 2**32 - 1)
blocks = st.sampled_from([1, 2, 13])
positions = st.one_of(st.sampled_from([20, 64, 100]), st.integers(1, 40))
head_widths = st.one_of(st.sampled_from([32, 64]), st.integers(1, 40))
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


@every_dtype
@given(seed=seeds, blocks=blocks, positions=positions, heads=st.integers(1, 5), head_width=head_widths)
def test_errs_at_most_twice_as_much_as_torch(
    implementation: Implementation,
    dtype: torch.dtype,
    seed: int,
    blocks: int,
    positions: int,
    heads: int,
    head_width: int,
) -> None:
    sizes = {"blocks": blocks, "positions": positions, "heads": heads, "head_width": head_width}

    def draw(generator: torch.Generator) -> Case:
        return block_attention_case(generator, **sizes, dtype=dtype)

    assert_right(implementation, draw(seeded(seed)), draw)


def in_numpy(qkv: Tensor, heads: int) -> np.ndarray:
    """Head by head: softmax(q k^T / sqrt(K)) v."""
    q, k, v = np.split(qkv.numpy(), 3, axis=-1)
    width = q.shape[-1] // heads
    parts = []
    for h in range(heads):
        mine = slice(h * width, (h + 1) * width)
        weights = softmax(q[..., mine] @ k[..., mine].swapaxes(1, 2) / np.sqrt(width), axis=-1)
        parts.append(weights @ v[..., mine])
    return np.concatenate(parts, axis=-1)


@given(seed=seeds, blocks=blocks, positions=positions, heads=st.integers(1, 5), head_width=head_widths)
def test_definition(seed: int, blocks: int, positions: int, heads: int, head_width: int) -> None:
    case = block_attention_case(
        seeded(seed), blocks=blocks, positions=positions, heads=heads, head_width=head_width
    )
    assert_defined("block_attention", case, in_numpy)


@every_dtype
@given(seed=seeds, positions=positions)
def test_order_does_not_matter(
    implementation: Implementation, dtype: torch.dtype, seed: int, positions: int
) -> None:
    """Nothing is causal: shuffled positions give shuffled results."""
    g = seeded(seed)
    a = block_attention_case(g, positions=positions, dtype=dtype).arguments
    order = torch.randperm(positions, generator=g)
    shuffled = implementation(**a | {"qkv": a["qkv"][:, order]})
    assert_near(shuffled[:, order.argsort()], "block_attention", a)


@every_dtype
@given(seed=seeds, count=st.integers(2, 13))
def test_a_block_alone_and_in_a_batch(
    implementation: Implementation, dtype: torch.dtype, seed: int, count: int
) -> None:
    a = block_attention_case(seeded(seed), blocks=count, dtype=dtype).arguments
    alone = [implementation(**a | {"qkv": a["qkv"][b : b + 1]}) for b in range(count)]
    assert_near(torch.cat(alone), "block_attention", a)


@given(seed=seeds, positions=positions)
def test_equal_keys_give_the_mean(implementation: Implementation, seed: int, positions: int) -> None:
    qkv = block_attention_case(seeded(seed), positions=positions).arguments["qkv"]
    qkv[..., 32:64] = qkv[:, :1, 32:64]
    mean = qkv[..., 64:].double().mean(1, keepdim=True).expand(2, positions, 32)
    assert_near(mean.float(), "block_attention", {"qkv": qkv, "heads": 2})
    assert_near(implementation(qkv=qkv, heads=2), "block_attention", {"qkv": qkv, "heads": 2})


@given(seed=seeds, positions=st.integers(2, 40))
def test_large_scores_pick_one_value(implementation: Implementation, seed: int, positions: int) -> None:
    """Scores of +-1e6 do not overflow: each query finds its own key, exactly."""
    value = torch.randn(1, positions, 64, generator=seeded(seed))
    one_hot = torch.eye(positions, 64)[None] * 3e3
    out = implementation(qkv=torch.cat((one_hot, one_hot, value), dim=-1), heads=1)
    assert torch.equal(out, value)


@every_dtype
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_in_its_block(
    implementation: Implementation, dtype: torch.dtype, poison: float
) -> None:
    a = block_attention_case(seeded(1), blocks=5, dtype=dtype).arguments
    dirty, others = copied(a), torch.arange(5) != 2
    dirty["qkv"][2, 11, 70] = poison  # a value of head 0: all rows of its block see it
    clean, spoilt = implementation(**a), implementation(**dirty)
    assert torch.equal(bits(spoilt[others]), bits(clean[others]))
    assert not spoilt[2, :, 6].isfinite().any() and spoilt[2, :, 16:].isfinite().all()
