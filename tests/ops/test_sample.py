"""The op `sample`: every implementation against the definition, the definition against transformers."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from scipy import stats
from torch import Tensor
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from fastloop.ops.sample import NONFINITE, sample_ref, uniform
from fastloop.testing.assertions import assert_right, seeded
from fastloop.testing.implementations import Implementation, copied
from fastloop.testing.op_cases import sample_case

seeds = st.integers(0, 2**32 - 1)
rows = st.sampled_from([1, 2, 13, 64])
vocabularies = st.one_of(st.integers(1, 130), st.sampled_from([512]))
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
P_VALUE = 1e-3  # of a fixed draw: it does not change from run to run


def draw(implementation: Any, logits: Tensor, **options: Any) -> Tensor:
    """A call with the same options for all rows, a number or one per row; plain sampling unless said."""
    count = len(logits)
    a = {"phase": 0, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "seed": 1, "counter": torch.arange(count)}
    banned = options.pop("banned", torch.zeros(1, logits.shape[1], dtype=torch.bool))
    whole = {name: torch.as_tensor(value).expand(count).contiguous() for name, value in (a | options).items()}
    for name in ("temperature", "top_p"):
        whole[name] = whole[name].float()
    return implementation(logits=logits, banned=banned, **whole)


@every_dtype
@given(seed=seeds, rows=rows, vocab=vocabularies, phases=st.integers(1, 3))
def test_is_the_definition(
    implementation: Implementation, dtype: torch.dtype, seed: int, rows: int, vocab: int, phases: int
) -> None:
    assert_right(
        implementation, sample_case(seeded(seed), rows=rows, vocab=vocab, phases=phases, dtype=dtype)
    )


@every_dtype
@given(seed=seeds, rows=rows, vocab=vocabularies)
def test_greedy_takes_the_first_of_equals(
    implementation: Implementation, dtype: torch.dtype, seed: int, rows: int, vocab: int
) -> None:
    """Among the tokens that are not banned."""
    g = seeded(seed)
    logits = torch.randint(4, (rows, vocab), generator=g).to(dtype)
    banned = torch.rand(1, vocab, generator=g) < 0.3
    banned[0, vocab // 2] = False
    ids = draw(implementation, logits, banned=banned, temperature=0)
    legal = np.where(banned.numpy(), -np.inf, logits.float().numpy())
    assert ids.tolist() == legal.argmax(1).tolist()


def mix(state: int) -> int:
    """SplitMix64's first output from a state (Vigna's splitmix64.c), in numpy."""
    with np.errstate(over="ignore"):
        z = np.uint64(state) + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return int(z ^ (z >> np.uint64(31)))


def test_the_generator_is_splitmix64() -> None:
    assert mix(1234567) == 6457827717110365317  # its published first output for that seed


@given(seed=st.integers(-(2**63), 2**63 - 1), counter=st.integers(0, 2**63 - 1))
def test_a_number_is_a_function_of_seed_and_counter(seed: int, counter: int) -> None:
    state = (seed * 0x9E3779B97F4A7C15 + counter) % 2**64
    assert uniform(seed, counter) == (mix(mix(state)) >> 11) / 2**53


@pytest.mark.parametrize("vary", ["counter", "seed", "both"])
def test_numbers_are_uniform_and_independent(vary: str) -> None:
    """Along the counter, along the seed, and along both: one number alone and with its successor."""
    u = np.array([uniform(i if vary != "counter" else 7, i if vary != "seed" else 7) for i in range(4096)])
    assert stats.kstest(u, "uniform").pvalue > P_VALUE
    pairs = np.histogram2d(u[:-1:2], u[1::2], bins=8, range=[[0, 1]] * 2)[0]
    assert stats.chisquare(pairs.ravel()).pvalue > P_VALUE


@settings(max_examples=10)
@given(
    seed=seeds,
    vocab=st.sampled_from([1000, 20_011]),
    kind=st.sampled_from(["flat", "peaked", "tied"]),
    top_k=st.sampled_from([0, 1, 40, 1000]),
    top_p=st.sampled_from([1.0, 0.9, 0.1]),
)
def test_large_vocabularies(
    implementation: Implementation, seed: int, vocab: int, kind: str, top_k: int, top_p: float
) -> None:
    """A cut finds its tokens without sorting all; what it keeps must be the same."""
    logits = torch.randn(6, vocab, generator=seeded(seed))
    logits = {"flat": logits, "peaked": 6 * logits, "tied": (3 * logits).round()}[kind]
    banned = torch.rand(1, vocab, generator=seeded(seed + 1)) < 0.1
    options = {"banned": banned, "top_k": top_k, "top_p": top_p, "seed": seed}
    assert torch.equal(draw(implementation, logits, **options), draw(sample_ref, logits, **options))


@given(
    seed=seeds,
    vocab=st.integers(2, 80),
    temperature=st.sampled_from([0.3, 0.7, 1.0, 3.0]),
    top_k=st.sampled_from([0, 1, 2, 5, 20, 1000]),
    top_p=st.sampled_from([1.0, 0.95, 0.5, 0.1]),
)
def test_definition(seed: int, vocab: int, temperature: float, top_k: int, top_p: float) -> None:
    """The tokens that transformers' warpers keep, and the inverse of their CDF at the row's number."""
    logits = 3 * torch.randn(9, vocab, generator=seeded(seed))
    warpers: list[Any] = [TemperatureLogitsWarper(temperature)]
    warpers += [TopKLogitsWarper(top_k)] if top_k else []
    warpers += [TopPLogitsWarper(top_p)] if top_p < 1 else []
    probs = LogitsProcessorList(warpers)(None, logits.double()).softmax(-1).numpy()
    ids = draw(sample_ref, logits, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    for i, token in enumerate(ids.tolist()):
        u, cdf = uniform(seed, i), np.concatenate(([0.0], np.cumsum(probs[i])))
        assert probs[i, token] > 0
        slack = 1e-6  # temperature and top_p are float32 in the op
        assert cdf[token] - slack <= u <= cdf[token + 1] + slack


def test_draws_follow_the_distribution(implementation: Implementation) -> None:
    """Chi-square of 4,000 draws: plain, hot, and cut to a nucleus."""
    logits = torch.tensor([2.0, 0.5, -1.0, 1.5, 0.0, -0.5, 1.0, -4.0])
    for options, kept in (
        ({}, range(8)),
        ({"temperature": 2.0}, range(8)),
        ({"top_k": 4}, (0, 1, 3, 6)),
        ({"top_p": 0.7}, (0, 3, 6)),  # 0.43 + 0.26 < 0.7 <= 0.43 + 0.26 + 0.16
    ):
        probs = torch.zeros(8).index_fill(0, torch.tensor(list(kept)), 1.0)
        probs *= (logits / options.get("temperature", 1.0)).softmax(0)
        ids = draw(implementation, logits.expand(4000, 8), **options)
        counts = torch.bincount(ids, minlength=8)
        assert not counts[probs == 0].any()
        expected = (probs / probs.sum() * 4000)[probs > 0].double().numpy()
        expected *= 4000 / expected.sum()
        assert stats.chisquare(counts[probs > 0].numpy(), expected).pvalue > P_VALUE


@given(seed=seeds, rows=rows)
def test_a_row_draws_the_same_alone_and_in_any_batch(
    implementation: Implementation, seed: int, rows: int
) -> None:
    g = seeded(seed)
    a = sample_case(g, rows=rows, vocab=50).arguments
    together = implementation(**a)
    order = torch.randperm(rows, generator=g)
    per_row = [name for name in a if name != "banned"]
    shuffled = implementation(**a | {name: a[name][order] for name in per_row})
    assert torch.equal(shuffled, together[order])
    alone = [implementation(**a | {name: a[name][i : i + 1] for name in per_row}) for i in range(rows)]
    assert torch.equal(torch.cat(alone), together)


@given(seed=seeds, rows=rows, vocab=st.integers(2, 130), data=st.data())
def test_banned_tokens_are_never_drawn(
    implementation: Implementation, seed: int, rows: int, vocab: int, data: st.DataObject
) -> None:
    """Each row's own phase says which; what a banned token's logit is does not matter."""
    a = sample_case(seeded(seed), rows=rows, vocab=vocab, phases=3).arguments
    a["banned"] = torch.rand(3, vocab, generator=seeded(seed)) < 0.8
    a["banned"][:, data.draw(st.integers(0, vocab - 1))] = False
    ids = implementation(**a)
    banned = a["banned"][a["phase"]]
    assert not banned.gather(1, ids[:, None]).any()
    for poison in (torch.nan, torch.inf, -torch.inf, 1e30):
        assert torch.equal(implementation(**a | {"logits": a["logits"].masked_fill(banned, poison)}), ids)


@given(seed=seeds, rows=rows, vocab=st.integers(2, 130))
def test_narrow_choices_are_greedy(implementation: Implementation, seed: int, rows: int, vocab: int) -> None:
    """Top 1, a nucleus of nearly nothing, and a temperature near zero all leave the likeliest token."""
    logits = torch.randn(rows, vocab, generator=seeded(seed))
    greedy = draw(implementation, logits, temperature=0)
    for options in ({"top_k": 1}, {"top_p": 1e-6}, {"top_p": 0.0}, {"temperature": 1e-30}):
        assert torch.equal(draw(implementation, logits, **options), greedy)


@given(seed=seeds, rows=rows, vocab=st.integers(1, 130))
def test_wide_choices_are_plain(implementation: Implementation, seed: int, rows: int, vocab: int) -> None:
    """A top k of the whole vocabulary or more, or a top p of 1, cut nothing."""
    logits = torch.randn(rows, vocab, generator=seeded(seed))
    plain = draw(implementation, logits)
    for options in ({"top_k": vocab}, {"top_k": 2**40}, {"top_k": vocab, "top_p": 1.0}):
        assert torch.equal(draw(implementation, logits, **options), plain)


@given(seed=seeds, vocab=st.integers(2, 60), count=st.integers(1, 60))
def test_top_k_keeps_k_of_equals(implementation: Implementation, seed: int, vocab: int, count: int) -> None:
    """The first ones: a draw among equal logits stays below k."""
    ids = draw(implementation, torch.zeros(40, vocab), top_k=count, seed=seed)
    assert int(ids.max()) < min(count, vocab)


@every_dtype
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_what_is_not_finite_is_no_token(
    implementation: Implementation, dtype: torch.dtype, temperature: float, poison: float
) -> None:
    """...in its own row."""
    logits = torch.randn(13, 40, generator=seeded(1)).to(dtype)
    clean = draw(implementation, logits, temperature=temperature)
    logits[5, 17] = poison
    dirty = draw(implementation, logits, temperature=temperature)
    assert dirty[5] == NONFINITE
    assert torch.equal(dirty[torch.arange(13) != 5], clean[torch.arange(13) != 5])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_minus_infinity_is_a_token_without_a_chance(
    implementation: Implementation, temperature: float
) -> None:
    logits = torch.full((50, 5), -torch.inf)
    assert (draw(implementation, logits, temperature=temperature) == NONFINITE).all()  # none has one
    logits[:, 3] = -1e30
    assert (draw(implementation, logits, temperature=temperature) == 3).all()
    logits[:, 1] = -1e30
    assert set(draw(implementation, logits, temperature=temperature).tolist()) == (
        {1, 3} if temperature else {1}
    )


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_where_all_is_banned_there_is_no_token(implementation: Implementation, temperature: float) -> None:
    banned = torch.tensor([[True] * 9, [False] * 9])
    ids = draw(
        implementation, torch.zeros(2, 9), banned=banned, phase=torch.tensor([0, 1]), temperature=temperature
    )
    assert ids[0] == NONFINITE and 0 <= int(ids[1]) < 9


@given(seed=seeds, rows=rows)
def test_repeats_are_equal(implementation: Implementation, seed: int, rows: int) -> None:
    a = sample_case(seeded(seed), rows=rows, vocab=99).arguments
    assert torch.equal(implementation(**copied(a)), implementation(**copied(a)))
