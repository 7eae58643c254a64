"""Any file, device or array -> samples, float32 mono [S] at 16 kHz.

pcm.py         arrays: what is accepted, and the mix to mono
resample.py    any rate -> 16 kHz, push by push, without seams
containers.py  what a file really is, checked before a decoder sees it
files.py       wav, flac, ogg and mp3, block by block
live.py        raw PCM from a pipe, and the microphone

What opens files needs libsndfile and is imported at its first use: an engine that is given samples does
without it, and without soxr at 16 kHz.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .live import Microphone, read_pcm_stream
from .pcm import AudioError, to_mono_float32
from .resample import Resampler

if TYPE_CHECKING:
    from .files import AudioFile, open_audio, read, write_wav

__all__ = [
    "AudioError",
    "AudioFile",
    "Microphone",
    "Resampler",
    "open_audio",
    "read",
    "read_pcm_stream",
    "to_mono_float32",
    "write_wav",
]

_LAZY = ("AudioFile", "open_audio", "read", "write_wav")


def __getattr__(name: str) -> Any:
    """The names of files.py (PEP 562); AttributeError for any other."""
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; its public names are {__all__}")
    value = getattr(importlib.import_module(".files", __name__), name)
    globals()[name] = value
    return value
