"""Log-mel of whole streams, as the listening loop sees it chunk by chunk, for training.

`fastloop.mel` is the runtime; this computes all chunks of a finished stream at once and leaves the clamp
to `clamp`, so that cached streams can be amplified and joined before it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..config import FFT_SAMPLES, HOP_SAMPLES
from ..ops.mel import mel_filters


def raw_log_mel(pcm: Tensor, chunk_samples: int) -> Tensor:
    """pcm float32 [S], whole chunks -> log10 mel power [chunks, F, C], every chunk edge reflected."""
    chunks = pcm.view(-1, chunk_samples)
    half, tail = FFT_SAMPLES // 2, FFT_SAMPLES // 2 - HOP_SAMPLES
    before = torch.cat((pcm[1 : half + 1].flip(0)[None], chunks[:-1, -half:]))
    after = chunks[:, -tail - 1 : -1].flip(1)
    windows = torch.cat((before, chunks, after), dim=1).unfold(1, FFT_SAMPLES, HOP_SAMPLES)
    spectrum = torch.fft.rfft(windows * torch.hann_window(FFT_SAMPLES))
    power = spectrum.real.square() + spectrum.imag.square()
    return (power @ mel_filters()[0].T).clamp(min=1e-10).log10()


def clamp(raw: Tensor) -> Tensor:
    """log10 power [..., chunks, F, C] -> the model's frames: clamp 8 below the running maximum, scale."""
    loudest = raw.amax(dim=(-2, -1), keepdim=True).cummax(dim=-3).values
    return (torch.maximum(raw, loudest - 8.0) + 4.0) / 4.0
