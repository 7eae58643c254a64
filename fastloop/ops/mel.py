"""mel: samples -> log-mel frames of many streams in one call; each stream's state lives in its slot.

Frame k of a stream is centred on sample 160 k and spans 200 samples to each side:

    power[j]  = |DFT400(hann400 * x[160 k - 200 : 160 k + 200])[j]|^2                    j = 0 .. 200
    y[c]      = log10(max(sum_j filters[c, j] * power[j], 1e-10))
    frame[c]  = (max(y[c], top - 8) + 4) / 4          top = the loudest y of the stream so far

Where the stream has no sample, it is mirrored: x[-j] = x[j], and x[n + j] = x[n - 2 - j] behind the last
of n samples (as often as needed, if n is small).

edge="reflect": a call of S samples gives the S // 160 frames that begin a new hop in it. The last one lacks
    its last 40 samples, so the mirror stands in for them. The frames equal the last columns of Whisper's
    log-mel of all sound so far: for that, `top` must count the *true* value of the previous call's last
    frame, which is known by now; it is computed again (41 frames for 40), and `peak` holds true ones only.
edge="wait": the stream is 40 samples ahead (MelState.prime), so every frame is true when it is emitted.

Source: openai-whisper `log_mel_spectrogram`; the filterbank is Slaney's (Auditory Toolbox, 1998).
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from ..config import FFT_SAMPLES, HOP_SAMPLES, MEL_BINS, SAMPLE_RATE
from .contract import check_dims, readable
from .dispatch import define
from .native import FLOAT32, check_in_place, register_native, require_native

EDGES = ("reflect", "wait")
CLAMPS = ("running", "global")
LOOKAHEAD_SAMPLES = FFT_SAMPLES // 2 - HOP_SAMPLES  # 40: the last frame of a call reaches so far ahead
TAIL_SAMPLES = HOP_SAMPLES + FFT_SAMPLES // 2  # 360: where the previous call's last frame begins
COLUMNS = FFT_SAMPLES // 2 + 1  # 201 bins of the power spectrum
POWER_FLOOR = 1e-10
RANGE_LOG10 = 8.0  # frames are clamped at 80 dB below the loudest


def _mel_from_hz(hz: float) -> float:
    """Slaney's scale: linear (3 mel = 200 Hz) up to 1 kHz, then 27 mel for every factor of 6.4."""
    return hz * 3 / 200 if hz < 1000 else 15 + 27 * math.log(hz / 1000) / math.log(6.4)


def _hz_from_mel(mel: Tensor) -> Tensor:
    return torch.where(mel < 15, mel * 200 / 3, 1000 * torch.exp((mel - 15) * math.log(6.4) / 27))


@functools.cache
def mel_filters(device: torch.device | str = "cpu", bins: int = MEL_BINS) -> tuple[Tensor, Tensor]:
    """The filterbank: filters float32 [C, 201] and bands int32 [C, 2], 0 to 8 kHz, each of unit area.

    filters[c, j] is zero outside bands[c, 0] <= j < bands[c, 1]. Computed in float64; the triangles are
    rounded to float32 before and after their scaling, as the tables that Whisper ships were.
    """
    with torch.inference_mode(False):
        nyquist = SAMPLE_RATE / 2
        corners = _hz_from_mel(torch.linspace(0, _mel_from_hz(nyquist), bins + 2, dtype=torch.float64))
        columns = torch.linspace(0, nyquist, COLUMNS, dtype=torch.float64)
        ramps = corners[:, None] - columns  # [C + 2, 201]
        width = corners.diff()[:, None]
        triangles = torch.minimum(-ramps[:-2] / width[:-1], ramps[2:] / width[1:]).clamp(min=0).float()
        filters = (triangles * (2 / (corners[2:] - corners[:-2]))[:, None]).float()
        touched = (filters > 0).int()
        first = touched.argmax(1)
        bands = torch.stack((first, first + touched.sum(1)), dim=1).int()
        return filters.to(device), bands.to(device)


@functools.cache
def _window(device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.hann_window(FFT_SAMPLES, device=device)


def mel_constants(device: torch.device) -> tuple[Tensor, ...]:
    """The tensors that a call reads besides its arguments' and keeps for the next one: for graphs."""
    return *mel_filters(device), _window(device)


_ARGUMENTS = {  # name: (dimensions, dtype)
    "pcm": ("B S", torch.float32),
    "slots": ("B", torch.int64),
    "tail": (f"Z {TAIL_SAMPLES}", torch.float32),
    "peak": ("Z", torch.float32),
    "seen": ("Z", torch.int64),
    "filters": (f"C {COLUMNS}", torch.float32),
    "bands": ("C 2", torch.int32),
}


@functools.lru_cache(maxsize=1024)
def _check_kinds(
    kinds: tuple[tuple[torch.Size, torch.dtype, torch.device], ...], edge: str, clamp: str
) -> None:
    """The checks that need no values, once per combination: they take as long as the kernel."""
    named = dict(zip(_ARGUMENTS, kinds, strict=True))
    ghosts = {name: torch.empty(shape, device="meta") for name, (shape, _, _) in named.items()}
    check_dims("mel", **{name: (ghost, _ARGUMENTS[name][0]) for name, ghost in ghosts.items()})
    home = named["pcm"][2]
    for name, (_, dtype, device) in named.items():
        wanted = _ARGUMENTS[name][1]
        if dtype != wanted:
            raise TypeError(f"mel: {name} must be {wanted}, got {dtype}; convert it with .to({wanted})")
        if device != home:
            raise ValueError(f"mel: {name} is on {device}, pcm on {home}; move one of them")
    streams, samples = ghosts["pcm"].shape
    if streams < 1 or samples < HOP_SAMPLES:
        raise ValueError(
            f"mel: pcm is [{streams}, {samples}]; a call needs at least 1 stream and {HOP_SAMPLES} samples"
        )
    if edge not in EDGES:
        raise ValueError(f"mel: edge must be one of {EDGES}, got {edge!r}")
    if clamp not in CLAMPS:
        raise ValueError(f"mel: clamp must be one of {CLAMPS}, got {clamp!r}")


def check_mel(tensors: tuple[Tensor, ...], edge: str, clamp: str) -> None:
    """Shapes, dtypes, devices of `_ARGUMENTS`, and the names; ValueError or TypeError says what is wrong."""
    _check_kinds(tuple((tensor.shape, tensor.dtype, tensor.device) for tensor in tensors), edge, clamp)


def _check_slots(slots: Tensor, seen: Tensor, edge: str) -> None:
    """What the values of the state must satisfy; checked where reading them costs no synchronisation."""
    rows, ahead = slots.tolist(), LOOKAHEAD_SAMPLES if edge == "wait" else 0
    if len(set(rows)) < len(rows):
        raise ValueError(f"mel: slots must be distinct, got {rows}")
    for row in rows:
        if not 0 <= row < len(seen):
            raise ValueError(f"mel: slot {row} is outside the {len(seen)} slots of the state")
        if int(seen[row]) < 0 or int(seen[row]) % HOP_SAMPLES != ahead:
            raise ValueError(
                f"mel: slot {row} has seen {int(seen[row])} samples; edge={edge!r} continues at a multiple "
                f"of {HOP_SAMPLES} plus {ahead}. Prime a stream before its first call with edge='wait', keep "
                "to one edge, and reset the slot after a call whose length was no multiple of the hop."
            )


def _padded(pcm: Tensor, tail: Tensor, start: Tensor, edge: str) -> Tensor:
    """pcm [B, S] behind sample `start` [B], tail [B, 360] -> the samples all frames of the call span."""
    known = torch.cat((tail, pcm), dim=1)  # sample i of a stream is column i - start + 360
    total = start[:, None] + pcm.shape[1]

    def mirrored(offset: int, count: int) -> Tensor:
        """Samples start + offset and on; only the slots' true samples are ever read."""
        i = start[:, None] + torch.arange(offset, offset + count, device=pcm.device)
        period = 2 * (total - 1)
        i = i % period
        return known.gather(1, torch.minimum(i, period - i) - start[:, None] + TAIL_SAMPLES)

    if edge == "wait":
        span = TAIL_SAMPLES - HOP_SAMPLES + LOOKAHEAD_SAMPLES  # the first new frame begins 240 samples back
        return torch.cat((mirrored(-span, span), pcm), dim=1)
    right = mirrored(pcm.shape[1], LOOKAHEAD_SAMPLES)
    return torch.cat((mirrored(-TAIL_SAMPLES, TAIL_SAMPLES), pcm, right), dim=1)


def mel_ref(
    pcm: Tensor,
    slots: Tensor,
    tail: Tensor,
    peak: Tensor,
    seen: Tensor,
    filters: Tensor,
    bands: Tensor,
    edge: str = "reflect",
    clamp: str = "running",
) -> Tensor:
    """pcm float32 [B, S], slots int64 [B] (distinct rows of the state), filters float32 [C, 201], bands int32
    [C, 2] (where each filter is not zero) -> frames float32 [B, S // 160, C].

    State, changed in place at `slots` only: tail float32 [Z, 360], the last samples; peak float32 [Z], the
    loudest log10 mel power of all frames that are final (-inf at the start); seen int64 [Z], samples so far.
    S is a multiple of 160, but for the last call of a stream, which may have any S >= 160.

    clamp="running": `top` is the loudest so far. "global": `top` is `peak` as given, and stays.
    Sound that is not finite (or overflows) gives frames that are not finite, in its own stream alone, until
    its slot is reset.

    Raises ValueError or TypeError; nothing is changed then. On a GPU the values of `slots` and `seen` are
    not checked (that would synchronise).
    """
    check_mel((pcm, slots, tail, peak, seen, filters, bands), edge, clamp)
    if readable(seen):
        _check_slots(slots, seen, edge)
    old, start, top = tail[slots], seen[slots], peak[slots]
    padded = _padded(pcm, old, start, edge)
    spectrum = torch.stft(
        padded, FFT_SAMPLES, HOP_SAMPLES, window=_window(pcm.device), center=False, return_complex=True
    )
    y = (filters @ spectrum.abs() ** 2).clamp(min=POWER_FLOOR).log10()  # [B, C, columns]
    if clamp == "running":
        loud = y.amax(1)
        if edge == "reflect":  # the first column is the previous call's last frame, the last is provisional
            loud[:, 0] = torch.where(start > 0, loud[:, 0], -torch.inf)
        final = loud[:, :-1] if edge == "reflect" else loud
        peak[slots] = torch.maximum(top, final.amax(1))
        top = torch.maximum(peak[slots], loud[:, -1])
    new = y[..., -(pcm.shape[1] // HOP_SAMPLES) :]
    frames = (torch.maximum(new, top[:, None, None] - RANGE_LOG10) + 4) / 4
    tail[slots] = torch.cat((old, pcm), dim=1)[:, -TAIL_SAMPLES:]
    seen[slots] = start + pcm.shape[1]
    return frames.transpose(1, 2).contiguous()


def _fake(
    pcm: Tensor, slots: Tensor, tail: Tensor, peak: Tensor, seen: Tensor, filters: Tensor, *_: object
) -> Tensor:
    return pcm.new_empty(pcm.shape[0], pcm.shape[1] // HOP_SAMPLES, filters.shape[0])


mel = define(mel_ref, _fake, mutates=("tail", "peak", "seen"))


def mel_cpu(
    pcm: Tensor,
    slots: Tensor,
    tail: Tensor,
    peak: Tensor,
    seen: Tensor,
    filters: Tensor,
    bands: Tensor,
    edge: str = "reflect",
    clamp: str = "running",
    isa: str | None = None,
) -> Tensor:
    """`mel_ref` in C++ (csrc/cpu/mel.cpp). Streams are bit-equal alone and in any batch; one thread, no GIL.

    pcm is copied where its samples are not next to each other; the state must be contiguous. isa: one of
    `native.isas()` (None: the best), for tests and measurements.
    """
    check_mel((pcm, slots, tail, peak, seen, filters, bands), edge, clamp)
    if pcm.device.type != "cpu":
        raise ValueError(
            f"mel: backend 'cpu' got tensors on {pcm.device}; move them or change FASTLOOP_BACKEND"
        )
    for name, state in (("tail", tail), ("peak", peak), ("seen", seen)):
        check_in_place("mel", name, state)
    batch, samples = pcm.shape
    if pcm.stride(1) != 1 or (batch > 1 and pcm.stride(0) < samples):
        pcm = pcm.contiguous()
    slots, filters, bands = slots.contiguous(), filters.contiguous(), bands.contiguous()
    frames = pcm.new_empty(batch, samples // HOP_SAMPLES, filters.shape[0])
    require_native().mel(
        batch=batch,
        samples=samples,
        pcm=pcm.data_ptr(),
        pcm_stride=pcm.stride(0),
        slots=slots.data_ptr(),
        slot_count=len(peak),
        tail=tail.data_ptr(),
        peak=peak.data_ptr(),
        seen=seen.data_ptr(),
        bins=filters.shape[0],
        filters=filters.data_ptr(),
        bands=bands.data_ptr(),
        edge=EDGES.index(edge),
        clamp=CLAMPS.index(clamp),
        frames=frames.data_ptr(),
        isa=isa,
    )
    return frames


register_native(mel, mel_cpu, takes={"pcm": FLOAT32})


def mel_bytes(batch: int, samples: int, bins: int = MEL_BINS) -> int:
    """Bytes moved: samples in, the tail in and out, frames out, the non-zero filter weights once."""
    per_stream = samples + 2 * TAIL_SAMPLES + samples // HOP_SAMPLES * bins
    return 4 * (batch * per_stream + 2 * COLUMNS)
