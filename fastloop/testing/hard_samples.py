"""Calls of sample that a kernel gets wrong before all others, and what must come out of them: for the tests
of its kernels. Each check holds an implementation against the definition, token by token.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..ops.sample import NONFINITE, sample_ref
from .assertions import seeded
from .op_cases import Arguments

Run = Callable[..., Tensor]  # an implementation of sample


def sample_arguments(logits: Tensor, **options: Any) -> Arguments:
    """The arguments of one call; options as scalars or a list: temperature, top_k, top_p, seed, counter."""
    rows, vocab = logits.shape
    whole = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "seed": 0, "counter": 0} | options
    kinds = {"temperature": torch.float32, "top_p": torch.float32}
    return {
        "logits": logits,
        "banned": torch.zeros(1, vocab, dtype=torch.bool),
        "phase": torch.zeros(rows, dtype=torch.int64),
    } | {
        name: torch.as_tensor(value, dtype=kinds.get(name, torch.int64)).expand(rows).contiguous()
        for name, value in whole.items()
    }


def same_tokens(run: Run, arguments: Arguments) -> Tensor:
    """The tokens, which are those of the definition."""
    tokens = run(**arguments)
    assert torch.equal(tokens, sample_ref(**arguments))
    return tokens


def check_ties(
    run: Run, vocab: int, *, seed: int, levels: int, temperature: float, top_k: int, top_p: float
) -> None:
    """Few distinct logits: thresholds cut through ties, whose first ids stay."""
    logits = torch.randint(levels, (2, vocab), generator=seeded(seed % 2**40)).half() - levels / 2
    logits[logits == 0] *= -1  # a negative zero is equal to a zero
    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    a = sample_arguments(logits, seed=seed, counter=[1, 2**40], **options)
    a["banned"] = torch.rand(1, vocab, generator=seeded(3)) < 0.3
    a["banned"][0, 5] = False
    same_tokens(run, a)


def _every_token(run: Run, dtype: torch.dtype) -> None:
    """Many draws of one distribution: nothing outside its nucleus, and more than one token of it."""
    draws = torch.arange(32)
    logits = torch.tensor([0.0, 2.0, 1.0, -1.0, 1.5, -9.0], dtype=dtype).expand(len(draws), 6).contiguous()
    a = sample_arguments(logits, top_p=0.95, seed=draws, counter=7 * draws)
    counts = same_tokens(run, a).bincount(minlength=6)
    assert counts[3] == counts[5] == 0 and (counts[[1, 2, 4]] > 0).all()


def _top_k(run: Run, top_k: int) -> None:
    logits = torch.randn(3, 90, generator=seeded(top_k))
    tokens = same_tokens(run, sample_arguments(logits, top_k=top_k, seed=torch.arange(3)))
    assert top_k > 1 or torch.equal(tokens, logits.argmax(1))


def _top_p(run: Run, top_p: float) -> None:
    """0 keeps the most likely token; equal logits are cut exactly in half by 0.5."""
    logits = torch.randn(3, 90, generator=seeded(5))
    logits[:2] = 1.0
    tokens = same_tokens(run, sample_arguments(logits, top_p=top_p, seed=torch.arange(3)))
    assert top_p != 0.5 or (tokens[:2] < 45).all()
    assert top_p > 1e-29 or torch.equal(tokens, logits.argmax(1))


def _far_apart(run: Run, temperature: float) -> None:
    """Masses that underflow to 0, and a temperature that makes them."""
    logits = torch.tensor([[0.0, 800.0, 799.0, -1e30, 797.0], [1.0, 1.0 + 2**-20, 0.5, 0.0, 1.0]])
    for options in ({"top_k": 4}, {"top_k": 3, "top_p": 0.999}, {"top_p": 0.7}):
        same_tokens(run, sample_arguments(logits, temperature=temperature, seed=[11, 12], **options))


def _not_finite(run: Run, dtype: torch.dtype, temperature: float) -> None:
    """NaN and +Inf where they are legal; harmless where banned; -Inf is a token that is never drawn."""
    logits = torch.randn(6, 90, generator=seeded(6)).to(dtype)
    logits[0, 40], logits[1, 41], logits[2, 42], logits[3, 43] = torch.nan, torch.inf, -torch.nan, torch.inf
    logits[4, :80] = -torch.inf
    logits[5] = -torch.inf
    options = {"top_k": [0, 5, 0, 5, 20, 0], "top_p": [1, 1, 0.5, 0.5, 0.9, 1]}
    a = sample_arguments(logits, temperature=temperature, **options)
    a["banned"][0, 42:44] = True
    tokens = same_tokens(run, a)
    assert tokens[[0, 1, 5]].tolist() == [NONFINITE] * 3
    assert (tokens[2:5] >= 0).all() and tokens[4] >= 80


def _phases(run: Run) -> None:
    a = sample_arguments(torch.zeros(4, 90), temperature=[0, 0, 1, 1])
    a["banned"] = torch.zeros(2, 90, dtype=torch.bool)
    a["banned"][1, :70] = True
    a["phase"] = torch.tensor([0, 1, 0, 1])
    tokens = same_tokens(run, a)
    assert tokens[0] == 0 and tokens[1] == 70 and tokens[3] >= 70


_FLOATS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

HARD_CALLS: dict[str, Callable[[Run], None]] = {
    **{f"every token, {name}": partial(_every_token, dtype=dtype) for name, dtype in _FLOATS.items()},
    **{f"top k of {k}": partial(_top_k, top_k=k) for k in (1, 2, 90, 1000)},
    **{f"top p of {p}": partial(_top_p, top_p=p) for p in (0.0, 1e-30, 0.5, 0.99999994)},
    **{f"far apart at {t}": partial(_far_apart, temperature=t) for t in (1.0, 1e-4, 1e-30, 1e30)},
    **{
        f"not finite, {name} at {t}": partial(_not_finite, dtype=dtype, temperature=t)
        for name, dtype in _FLOATS.items()
        for t in (0.0, 1.0)
    },
    "phases": _phases,
}
