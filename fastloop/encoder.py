"""The audio tower: mel frames of one chunk -> audio tokens for the decoder. It holds no state.

    frames [B, F, C] -> conv stem [B, F/2, E] -> layers of full attention inside the block
                     -> average-pool by 2 -> LayerNorm -> projection [B, F/4, D]

Source: Qwen2.5-Omni's audio tower (arXiv 2503.20215), run chunk-wise as in arXiv 2606.05121: positions
start at 0 in every chunk and attention never leaves it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from . import ops
from .config import MEL_BINS, ModelConfig
from .ops.linear_quantised import linear_kept
from .quantise import Quantised


def encoder_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every weight of the encoder, in our checkpoint format."""
    e, ffn, out = config.encoder.width, config.encoder.ffn, config.decoder.width
    shapes: dict[str, tuple[int, ...]] = {
        "encoder.conv1.weight": (e, MEL_BINS, 3),
        "encoder.conv1.bias": (e,),
        "encoder.conv2.weight": (e, e, 3),
        "encoder.conv2.bias": (e,),
    }
    for i in range(config.encoder.layers):
        layer = f"encoder.layers.{i}."
        shapes |= {
            layer + "norm1.weight": (e,),
            layer + "norm1.bias": (e,),
            layer + "qkv.weight": (3 * e, e),
            layer + "qkv.bias": (3 * e,),  # the k part is zero: k_proj has no bias
            layer + "out.weight": (e, e),
            layer + "out.bias": (e,),
            layer + "norm2.weight": (e,),
            layer + "norm2.bias": (e,),
            layer + "fc1.weight": (ffn, e),
            layer + "fc1.bias": (ffn,),
            layer + "fc2.weight": (e, ffn),
            layer + "fc2.bias": (e,),
        }
    return shapes | {
        "encoder.norm.weight": (e,),
        "encoder.norm.bias": (e,),
        "encoder.proj.weight": (out, e),
        "encoder.proj.bias": (out,),
    }


def sinusoids(length: int, width: int) -> Tensor:
    """Whisper's positions [length, width] float32: sines then cosines, timescales 1..10,000."""
    step = math.log(10_000) / (width // 2 - 1)
    inv_timescale = torch.exp(-step * torch.arange(width // 2).float())
    angle = torch.arange(length)[:, None] * inv_timescale[None]
    return torch.cat((angle.sin(), angle.cos()), dim=1)


class Encoder:
    """The audio tower over weights named as in `encoder_shapes`; some matrices of the layers may be kept
    quantised instead.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: Mapping[str, Tensor],
        quantised: Mapping[str, Quantised] | None = None,
    ) -> None:
        self.config = config
        self.weights = weights
        self.quantised = quantised or {}
        first = weights["encoder.conv1.weight"]
        longest = max(config.chunk_frames, config.encoder.block_frames) // 2
        table = sinusoids(longest, config.encoder.width)
        self.positions = table.to(first.device, first.dtype)

    def encode(self, frames: Tensor) -> Tensor:
        """Independent chunks: frames [B, F, C] float32, F a multiple of 4 -> audio tokens [B, F/4, D]."""
        return self._head(self._blocks(frames))

    def encode_offline(self, frames: Tensor) -> Tensor:
        """A finished clip: frames [F, C] -> tokens [((F + 1) // 2) // 2, D].

        Blocks of `block_frames` (the last one shorter), pooled over their concatenation.
        """
        block = self.config.encoder.block_frames
        whole = frames.shape[0] // block * block
        parts = []
        if whole:
            parts.append(self._blocks(frames[:whole].unflatten(0, (-1, block))).flatten(0, 1))
        if whole < frames.shape[0]:
            parts.append(self._blocks(frames[None, whole:])[0])
        return self._head(torch.cat(parts)[None])[0]

    def _blocks(self, frames: Tensor) -> Tensor:
        """frames [B, F, C] -> hidden [B, (F + 1) / 2, E]."""
        w = self.weights
        x = ops.conv_stem(
            frames,
            w["encoder.conv1.weight"],
            w["encoder.conv1.bias"],
            w["encoder.conv2.weight"],
            w["encoder.conv2.bias"],
            self.positions,
        )
        batch, length, width = x.shape
        x = x.reshape(batch * length, width)
        for i in range(self.config.encoder.layers):
            x = self._layer(x, f"encoder.layers.{i}.", batch)
        return x.view(batch, length, width)

    def _layer(self, x: Tensor, name: str, batch: int) -> Tensor:
        """One pre-LayerNorm layer on rows [B T, E]."""
        w, eps = self.weights, self.config.encoder.norm_eps
        y = ops.layer_norm(x, w[name + "norm1.weight"], w[name + "norm1.bias"], eps)
        qkv = self._linear(y, name + "qkv")
        y = self._attention(qkv.view(batch, -1, qkv.shape[-1]))
        x = self._linear(y.flatten(0, 1), name + "out", residual=x)
        y = ops.layer_norm(x, w[name + "norm2.weight"], w[name + "norm2.bias"], eps)
        y = self._linear(y, name + "fc1", "gelu")
        return self._linear(y, name + "fc2", residual=x)

    def _attention(self, qkv: Tensor) -> Tensor:
        """qkv [B, T, 3 E] -> [B, T, E], each of the B blocks by itself."""
        return ops.block_attention(qkv, self.config.encoder.heads)

    def _linear(self, x: Tensor, name: str, epilogue: str = "none", residual: Tensor | None = None) -> Tensor:
        """x [N, E] times a matrix of a layer, as it is kept, with its bias."""
        matrix = name + ".weight"
        weight = self.quantised[matrix] if matrix in self.quantised else self.weights[matrix]
        return linear_kept(x, weight, self.weights[name + ".bias"], epilogue, residual)

    def _head(self, hidden: Tensor) -> Tensor:
        """hidden [B, T, E] -> audio tokens [B, T // 2, D]; an odd last position is dropped."""
        w = self.weights
        pooled = F.avg_pool1d(hidden.mT, 2).mT
        batch, length, width = pooled.shape
        x = ops.layer_norm(
            pooled.reshape(batch * length, width),
            w["encoder.norm.weight"],
            w["encoder.norm.bias"],
            self.config.encoder.norm_eps,
        )
        return ops.linear(x, w["encoder.proj.weight"], w["encoder.proj.bias"]).view(batch, length, -1)
