"""Arrays in: what is accepted as sound, and the mix to mono."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from ..errors import FastloopError

MAX_CHANNELS = 8
INT16_SCALE = 32768.0
MAX_AMPLITUDE = 8.0  # full scale is 1; far above it a float array holds integers that nobody scaled


class AudioError(FastloopError, ValueError):
    """Sound that cannot be read: the message says what is wrong, where, and what to do."""


def to_mono_float32(pcm: object, *, where: str = "pcm") -> np.ndarray:
    """Samples in any accepted form -> float32 mono [S], full scale 1.0, in memory of its own.

    Args:
        pcm: numpy array or torch tensor, on any device, of float32 or float64 (full scale 1.0) or int16
            (full scale 32768). [S], or 2-D with one dimension of at most 8: those are the channels, and they
            are averaged. Zero samples are a valid push.
        where: what the messages call it.

    Raises:
        TypeError: not an array, or of another dtype.
        ValueError: another number of dimensions; two dimensions of which both or neither can be channels;
            NaN or infinity; floats beyond +-8, which are integers that nobody scaled.
    """
    array = _array(pcm, where)
    bad = first_bad(array)
    if bad is not None:
        raise ValueError(f"{where}: sample {list(bad)} {complaint(array[bad])}")
    return mix(_channels_first(array, where))


def mix(channels: np.ndarray) -> np.ndarray:
    """Checked samples [channels, S] -> float32 mono [S] in memory of its own."""
    scale = np.float32(INT16_SCALE if channels.dtype.kind == "i" else 1.0)
    if len(channels) == 1:
        return np.divide(channels[0], scale, dtype=np.float32)
    # Contiguous rows first: the order of the sum, and so its last bit, must not depend on the layout.
    rows = np.ascontiguousarray(channels, dtype=np.float32)
    return rows.mean(axis=0, dtype=np.float32) / scale


def first_bad(array: np.ndarray) -> tuple[int, ...] | None:
    """Index of the first sample that is no sound: not finite, or a float far beyond full scale."""
    if array.dtype.kind != "f" or array.size == 0 or max(array.max(), -array.min()) <= MAX_AMPLITUDE:
        return None  # NaN makes the comparison false
    bad = ~(np.abs(array) <= MAX_AMPLITUDE)
    return tuple(int(i) for i in np.unravel_index(int(bad.argmax()), bad.shape))


def complaint(value: np.floating[Any]) -> str:
    """What is wrong with a sample that `first_bad` found, and what to do."""
    if not np.isfinite(value):
        return f"is {value}; sound must be finite: look for a division by zero at its source"
    return (
        f"is {value:g}, and full scale is 1.0; it looks like integers that nobody scaled: pass them as "
        f"int16, or divide them by {INT16_SCALE:g}"
    )


def _array(pcm: object, where: str) -> np.ndarray:
    """numpy array or torch tensor of an accepted dtype -> numpy array, not copied where possible."""
    torch = sys.modules.get("torch")  # a tensor cannot exist before torch was imported
    if torch is not None and isinstance(pcm, torch.Tensor):
        if pcm.dtype not in (torch.float32, torch.float64, torch.int16):
            raise TypeError(f"{where}: dtype is {pcm.dtype}; {_ACCEPTED}")
        return np.asarray(pcm.detach().cpu().numpy())
    if isinstance(pcm, np.generic):
        pcm = np.asarray(pcm)  # a scalar: refused for its dtype or for having no dimension
    if not isinstance(pcm, np.ndarray):
        raise TypeError(
            f"{where}: is a {type(pcm).__name__}; pass a numpy array or a torch tensor, for example "
            "numpy.asarray(samples, dtype=numpy.float32)"
        )
    if pcm.dtype.newbyteorder("=") not in (np.float32, np.float64, np.int16):
        raise TypeError(f"{where}: dtype is {pcm.dtype}; {_ACCEPTED}")
    return pcm


_ACCEPTED = (
    "accepted are float32 and float64 (full scale 1.0) and int16 (full scale 32768): convert it first, "
    "for example uint8 by (x - 128.0) / 128, int32 by x / 2147483648.0"
)


def _channels_first(array: np.ndarray, where: str) -> np.ndarray:
    """[S], [S, channels] or [channels, S] -> [channels, S]; the dimension of at most 8 is the channels."""
    if array.ndim == 1:
        return array[None]
    if array.ndim != 2:
        raise ValueError(
            f"{where}: has {array.ndim} dimensions {list(array.shape)}; pass [S] or one of [S, channels] and "
            "[channels, S], one stream at a time"
        )
    first, second = (1 <= size <= MAX_CHANNELS for size in array.shape)
    if array.size == 0 and (first or second):
        return array.reshape(1, 0)
    if first and second and array.shape != (1, 1):
        raise ValueError(
            f"{where}: {list(array.shape)} can be read as samples by channels and as channels by samples; "
            "mix so short a piece to mono first and pass it as [S]"
        )
    if not first and not second:
        raise ValueError(
            f"{where}: {list(array.shape)} has no dimension of 1 to {MAX_CHANNELS} that could be the "
            "channels; pass [S], [S, channels] or [channels, S]"
        )
    return array if first else array.T
