"""Any file, device or array -> samples, float32 mono [S] at 16 kHz.

pcm.py         arrays: what is accepted, and the mix to mono
resample.py    any rate -> 16 kHz, push by push, without seams
containers.py  what a file really is, checked before a decoder sees it
files.py       wav, flac, ogg and mp3, block by block
live.py        raw PCM from a pipe, and the microphone
"""

from .files import AudioFile, open_audio, read, write_wav
from .live import Microphone, read_pcm_stream
from .pcm import AudioError, to_mono_float32
from .resample import Resampler

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
