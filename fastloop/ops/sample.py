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
from .native import FLOAT32, address, check_native, register_native, require_native, rows_of

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


def _check(
    logits: Tensor,
    banned: Tensor,
    phase: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    seed: Tensor,
    counter: Tensor,
) -> None:
    """Check the contract."""
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


def _legal(logits: Tensor, banned: Tensor, phase: Tensor) -> Tensor:
    """logits float64 [R, V], -inf where a token is banned."""
    return logits.double().masked_fill(banned[phase], float("-inf"))


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
    _check(logits, banned, phase, temperature, top_k, top_p, seed, counter)
    legal = _legal(logits, banned, phase)
    ids = legal.argmax(-1)
    peak = legal.amax(-1)  # NaN wins a maximum
    for row in ((temperature > 0) & peak.isfinite()).nonzero().flatten().tolist():
        u = uniform(int(seed[row]), int(counter[row]))
        ids[row] = _draw(legal[row], float(temperature[row]), int(top_k[row]), float(top_p[row]), u)
    return torch.where(peak.isfinite(), ids, NONFINITE)


def _signed(word: int) -> int:
    """A 64-bit word as the int64 of the same bits."""
    return word - (1 << 64) if word >> 63 else word


def _shifted(z: Tensor, bits: int) -> Tensor:
    """Logical shift right of int64 by `bits`: the sign does not come along."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _uniforms(seed: Tensor, counter: Tensor) -> Tensor:
    """`uniform` of int64 [R] each -> float64 [R]; int64 wraps as 64-bit words do."""
    z = seed * _signed(0x9E3779B97F4A7C15) + counter
    for _ in range(2):
        z = z + _signed(0x9E3779B97F4A7C15)
        z = (z ^ _shifted(z, 30)) * _signed(0xBF58476D1CE4E5B9)
        z = (z ^ _shifted(z, 27)) * _signed(0x94D049BB133111EB)
        z = z ^ _shifted(z, 31)
    return _shifted(z, 11).double() * 2.0**-53


def sample_graph(
    logits: Tensor,
    banned: Tensor,
    phase: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    seed: Tensor,
    counter: Tensor,
) -> Tensor:
    """The same for all rows at once; a greedy row draws too, and its draw is dropped."""
    _check(logits, banned, phase, temperature, top_k, top_p, seed, counter)
    legal = _legal(logits, banned, phase)
    vocab = legal.shape[1]
    if not len(legal):
        return phase.clone()
    greedy, peak = legal.argmax(-1), legal.amax(-1)
    drawn = temperature > 0
    scale = torch.where(drawn, temperature, 1).double()[:, None]
    order = legal.argsort(dim=-1, descending=True, stable=True)
    probs = ((legal - peak[:, None]) / scale).exp()
    ranked = probs.gather(1, order)
    rank = torch.arange(vocab, device=logits.device)
    ranked = ranked.masked_fill((rank >= top_k[:, None]) & (top_k > 0)[:, None], 0)
    share = top_p.double()[:, None]
    inside = (ranked.cumsum(-1) - ranked < share * ranked.sum(-1, keepdim=True)) | (rank == 0) | (share >= 1)
    chosen = torch.zeros_like(probs).scatter(1, order, ranked.masked_fill(~inside, 0))
    cdf = chosen.cumsum(-1)
    point = _uniforms(seed, counter)[:, None] * cdf[:, -1:]
    index = torch.searchsorted(cdf, point, right=True)[:, 0]
    last = torch.where(chosen > 0, rank, -1).amax(-1)
    ids = torch.where(drawn, torch.minimum(index, last), greedy)
    return torch.where(peak.isfinite(), ids, NONFINITE)


def _fake(logits: Tensor, *_: object) -> Tensor:
    return logits.new_empty(logits.shape[0], dtype=torch.int64)


sample = define(sample_ref, _fake)
sample.register("graph", sample_graph)


def sample_cpu(
    logits: Tensor,
    banned: Tensor,
    phase: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    seed: Tensor,
    counter: Tensor,
    isa: str | None = None,
) -> Tensor:
    """`sample_ref` in C++ (csrc/cpu/sample.cpp), float32 logits."""
    _check(logits, banned, phase, temperature, top_k, top_p, seed, counter)
    check_native("sample", logits=logits, banned=banned, temperature=temperature, top_p=top_p)
    logits, banned = rows_of(logits), banned.contiguous()
    options = [t.contiguous() for t in (phase, temperature, top_k, top_p, seed, counter)]
    names = ("phase", "temperature", "top_k", "top_p", "seed", "counter")
    tokens = torch.empty(len(logits), dtype=torch.int64)
    require_native().sample(
        rows=logits.shape[0],
        vocab=logits.shape[1],
        logits=address(logits),
        logits_stride=logits.stride(0),
        phases=len(banned),
        banned=address(banned),
        tokens=address(tokens),
        isa=isa,
        **{name: address(option) for name, option in zip(names, options, strict=True)},
    )
    return tokens


register_native(sample, sample_cpu, takes={"logits": FLOAT32, "temperature": FLOAT32})


def sample_bytes(rows: int, vocab: int, itemsize: int = 4) -> int:
    """Bytes moved: the logits once."""
    return rows * vocab * itemsize
