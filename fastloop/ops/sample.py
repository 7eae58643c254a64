"""sample: the next text token of each row: greedy, or temperature, top-k and top-p with a per-row seed.

The random number of a draw is a function of (seed, counter) alone, so a session draws the same tokens
alone, in any batch, and after a snapshot. Tokens that are not legal at this place of the protocol are
banned before the choice; the published programs sample them and then raise or warn.

Source: nucleus sampling (Holtzman et al. 2019, arXiv 1904.09751); SplitMix64 (Steele et al. 2014).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .contract import check_dims, check_dtype, check_floats, check_range
from .dispatch import define

NONFINITE = -1
_MASK = (1 << 64) - 1


def uniform(seed: int, counter: int) -> float:
    """A uniform number in [0, 1) from (seed, counter): two rounds of SplitMix64's finaliser."""
    z = (seed * 0x9E3779B97F4A7C15 + counter) & _MASK
    for _ in range(2):
        z = (z + 0x9E3779B97F4A7C15) & _MASK
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
        z ^= z >> 31
    return (z >> 11) * 2.0**-53


def _draw(logits: Tensor, temperature: float, top_k: int, top_p: float, u: float) -> int:
    """One token of float64 logits [V]: keep the top k, then the nucleus, then invert the CDF in id order."""
    order = torch.argsort(logits, descending=True, stable=True)
    probs = ((logits - logits[order[0]]) / temperature).exp()
    ranked = probs[order]
    keep = torch.ones_like(ranked, dtype=torch.bool)
    if top_k > 0:
        keep[top_k:] = False
    if top_p < 1:
        ranked = ranked * keep
        keep &= ranked.cumsum(0) - ranked < top_p * ranked.sum()
        keep[0] = True
    chosen = torch.zeros_like(probs).scatter(0, order[keep], probs[order[keep]])
    cdf = chosen.cumsum(0)
    index = int(torch.searchsorted(cdf, u * cdf[-1], right=True))
    return min(index, int(chosen.nonzero()[-1]))  # u * total may round up to total


def sample_ref(
    logits: Tensor,
    banned: Tensor,
    phase: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    seed: Tensor,
    counter: Tensor,
) -> Tensor:
    """logits [R, V], banned bool [phases, V], phase int64 [R] (which row of `banned` holds), temperature
    float32 [R] (0: greedy, first of equals), top_k int64 [R] (0: off), top_p float32 [R] (1: off), seed and
    counter int64 [R] -> ids int64 [R]; NONFINITE (-1) where a logit that is not banned is NaN or +Inf.
    """
    sizes = check_dims(
        "sample",
        logits=(logits, "R V"),
        banned=(banned, "phases V"),
        phase=(phase, "R"),
        temperature=(temperature, "R"),
        top_k=(top_k, "R"),
        top_p=(top_p, "R"),
        seed=(seed, "R"),
        counter=(counter, "R"),
    )
    check_floats("sample", logits=logits)
    check_floats("sample", temperature=temperature, top_p=top_p)
    check_dtype("sample", torch.bool, banned=banned)
    check_dtype("sample", torch.int64, phase=phase, top_k=top_k, seed=seed, counter=counter)
    check_range("sample", "phase", phase, 0, sizes["phases"])
    legal = logits.double().masked_fill(banned[phase], float("-inf"))
    ids = legal.argmax(-1)
    peak = legal.amax(-1)  # NaN wins a maximum
    for row in ((temperature > 0) & peak.isfinite()).nonzero().flatten().tolist():
        u = uniform(int(seed[row]), int(counter[row]))
        ids[row] = _draw(legal[row], float(temperature[row]), int(top_k[row]), float(top_p[row]), u)
    return torch.where(peak.isfinite(), ids, NONFINITE)


def _fake(
    logits: Tensor,
    banned: Tensor,
    phase: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    seed: Tensor,
    counter: Tensor,
) -> Tensor:
    return logits.new_empty(logits.shape[0], dtype=torch.int64)


sample = define(sample_ref, _fake)


def sample_bytes(rows: int, vocab: int, itemsize: int = 4) -> int:
    """Bytes moved: the logits once."""
    return rows * vocab * itemsize
