"""Calls of mel that a kernel gets wrong before all others, and what must come out of them: for the tests of
its kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from ..mel import MelState
from ..ops.mel import LOOKAHEAD_SAMPLES, mel_filters, mel_ref
from .mel_oracle import clamped, log_power, whisper_frames
from .tolerance import error_bound, relative_error

Run = Callable[..., Tensor]  # an implementation of mel


@dataclass
class Streams:
    """B streams in slots of a larger state, and the kernel that serves them."""

    run: Run
    state: MelState
    slots: Tensor
    bins: int

    def call(self, pcm: Tensor, edge: str = "reflect", clamp: str = "running") -> Tensor:
        filters, bands = mel_filters(bins=self.bins)
        state = {"tail": self.state.tail, "peak": self.state.peak, "seen": self.state.seen}
        return self.run(
            pcm=pcm, slots=self.slots, **state, filters=filters, bands=bands, edge=edge, clamp=clamp
        )


def streams(run: Run, slots: Sequence[int], capacity: int = 0, bins: int = 128) -> Streams:
    return Streams(run, MelState.empty(capacity or max(slots) + 1), torch.tensor(slots), bins)


def sound(seed: int, count: int, samples: int) -> Tensor:
    """Noise with a tone in it: both the loud and the faint end of the range are there."""
    rng = np.random.default_rng(seed)
    t = np.arange(samples) / 16_000
    noise = rng.normal(size=(count, samples)) * 10.0 ** rng.uniform(-4, 0, (count, 1))
    tone = np.sin(2 * np.pi * rng.uniform(60, 7900, (count, 1)) * t)
    return torch.from_numpy((0.1 * (noise + tone)).astype(np.float32))


def check_hops(run: Run, seed: int, edge: str, hops: Sequence[int]) -> None:
    """Calls of any number of hops, one after the other, are inside the oracle's interval."""
    pcm = sound(seed, 2, 160 * sum(hops) + LOOKAHEAD_SAMPLES)
    group, rest = streams(run, [3, 1], 5), pcm
    if edge == "wait":
        for slot, row in zip([3, 1], pcm, strict=True):
            group.state.prime(slot, row[:LOOKAHEAD_SAMPLES])
        rest = pcm[:, LOOKAHEAD_SAMPLES:]
    done = 0
    for count in hops:
        frames = group.call(rest[:, 160 * done : 160 * (done + count)], edge)
        before, done = done, done + count
        for row, stream in zip(frames, pcm, strict=True):
            # "wait" has the true frames, "reflect" those of a stream that ends here
            y = log_power(stream if edge == "wait" else stream[: 160 * done])[:done]
            wanted = clamped(y[before:], y) if edge == "wait" else clamped(y, y)[before:]
            assert not wanted.misses(row), wanted.misses(row)


def check_error(run: Run) -> None:
    """Typical error, not worst case: noise, tones and both, against float64."""
    pcm = sound(7, 4, 2400)
    state = MelState.empty(4)
    plain = mel_ref(pcm, torch.arange(4), state.tail, state.peak, state.seen, *mel_filters())
    window = torch.hann_window(400, dtype=torch.float64)
    power = torch.stft(pcm.double(), 400, 160, window=window, return_complex=True)[..., :-1].abs() ** 2
    y = (mel_filters()[0].double() @ power).clamp(min=1e-10).log10()
    truth = ((torch.maximum(y, y.amax((1, 2), keepdim=True) - 8) + 4) / 4).mT
    error = relative_error(streams(run, range(4)).call(pcm), truth)
    assert 0 < error <= error_bound(plain, truth, torch.float32)


def check_batch(run: Run, count: int) -> None:
    """A stream's frames and state are equal to the bit alone and in a batch."""
    pcm = sound(2, count, 640)
    alone, beside = streams(run, [0]), streams(run, range(count))
    for begin in (0, 320):
        together = beside.call(pcm[:, begin : begin + 320])
        assert torch.equal(together[4], alone.call(pcm[4:5, begin : begin + 320])[0])
    for name, value in alone.state.export(0).items():
        assert torch.equal(beside.state.export(4)[name], value), name


def _bins(run: Run, bins: int) -> None:
    pcm = sound(1, 2, 800)
    frames = streams(run, [1, 0], bins=bins).call(pcm)
    assert frames.shape == (2, 5, bins)
    for row, stream in zip(frames, pcm, strict=True):
        assert not whisper_frames(stream, bins).misses(row)


def _last_call(run: Run, extra: int) -> None:
    """A stream's last call may have any length; the tail is kept whole over calls shorter than itself."""
    pcm = sound(extra, 1, 480 + extra)
    group = streams(run, [0])
    frames = torch.cat([group.call(pcm[:, a:b]) for a, b in ((0, 160), (160, 320), (320, None))], dim=1)
    assert not whisper_frames(pcm[0])[2:].misses(frames[0, 2:])
    assert torch.equal(group.state.tail, pcm[:, -360:])


def _other_slots(run: Run) -> None:
    """They are not touched; samples need not be contiguous."""
    group = streams(run, [1, 4], capacity=6)
    idle = torch.tensor([0, 2, 3, 5])
    group.state.tail[idle], group.state.peak[idle], group.state.seen[idle] = torch.nan, torch.nan, -77
    pcm = torch.full((2, 2000), torch.nan)
    pcm[:, 300:1260] = sound(4, 2, 960)
    frames = group.call(pcm[:, 300:1260])
    assert torch.equal(frames, streams(run, [0, 1]).call(pcm[:, 300:1260].contiguous()))
    assert frames.isfinite().all()
    assert group.state.tail[idle].isnan().all() and group.state.peak[idle].isnan().all()
    assert (group.state.seen[idle] == -77).all()
    assert group.state.seen[group.slots].tolist() == [960, 960]
    assert torch.equal(group.state.tail[group.slots], pcm[:, 900:1260])


def _not_finite(run: Run, poison: float) -> None:
    """It stays in its stream, and stays visible there until the slot is reset."""
    pcm = sound(5, 3, 3 * 320)
    dirty = pcm.clone()
    dirty[1, 400] = poison
    clean_run, dirty_run = streams(run, [0, 1, 2]), streams(run, [0, 1, 2])
    for begin in (0, 320, 640):
        clean = clean_run.call(pcm[:, begin : begin + 320])
        spoilt = dirty_run.call(dirty[:, begin : begin + 320])
        assert torch.equal(spoilt[[0, 2]], clean[[0, 2]])
        assert spoilt[1].isfinite().all() if begin == 0 else not spoilt[1].isfinite().any()
    dirty_run.state.reset(torch.ones(3, dtype=torch.bool))
    assert dirty_run.call(pcm[:, :320]).isfinite().all()


def _long_stream(run: Run) -> None:
    """It counts on."""
    pcm = sound(6, 1, 960)
    young, old = streams(run, [0]), streams(run, [0])
    young.call(pcm[:, :480])
    old.state.load(0, young.state.export(0))
    old.state.seen[0] += 160 * 10**13
    assert torch.equal(young.call(pcm[:, 480:]), old.call(pcm[:, 480:]))
    assert int(old.state.seen[0]) == 160 * 10**13 + 960


def _global_clamp(run: Run) -> None:
    """It uses the given peak and leaves it."""
    group = streams(run, [0, 1])
    group.state.peak[:] = torch.tensor([9.0, -2.0])
    frames = group.call(sound(8, 2, 800), clamp="global")
    assert group.state.peak.tolist() == [9.0, -2.0]
    assert (frames[0] == 5 / 4).all()  # (9 - 8 + 4) / 4: everything is below the clamp
    assert frames[1].min() >= (-10 + 4) / 4


def _silence(run: Run) -> None:
    """Power 0: the floor of 1e-10 everywhere."""
    frames = streams(run, [0]).call(torch.zeros(1, 480))
    torch.testing.assert_close(frames, torch.full_like(frames, (-10 + 4) / 4), rtol=2**-22, atol=0)


HARD_CALLS: dict[str, Callable[[Run], None]] = {
    **{f"{bins} bins": partial(_bins, bins=bins) for bins in (1, 7, 80, 127, 201)},
    **{f"a last call of 160 + {n}": partial(_last_call, extra=n) for n in (0, 1, 39, 41, 159)},
    **{f"a sample of {x}": partial(_not_finite, poison=x) for x in (torch.nan, torch.inf, 3e38)},
    "other slots": _other_slots,
    "a long stream": _long_stream,
    "a global clamp": _global_clamp,
    "silence": _silence,
}
