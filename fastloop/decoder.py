"""The decoder (Qwen2.5): rows of many sequences + paged KV -> hidden states of those rows.

    x [N, D] -> L x (RMSNorm, qkv, RoPE + append, paged attention, out, RMSNorm, SwiGLU) -> [N, D]

Source: Qwen2.5 technical report (arXiv 2412.15115). RMSNorm, grouped-query attention with qkv bias,
rotate-half RoPE on plain 1-D positions, SwiGLU.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from . import ops
from .config import ModelConfig
from .ops.linear_quantised import linear_kept
from .ops.rope_append import rotate
from .quantise import Quantised


def decoder_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every weight of the decoder, in our checkpoint format."""
    c = config.decoder
    shapes: dict[str, tuple[int, ...]] = {"decoder.embed.weight": (c.vocab_padded, c.width)}
    for i in range(c.layers):
        layer = f"decoder.layers.{i}."
        shapes |= {
            layer + "norm1.weight": (c.width,),
            layer + "qkv.weight": (c.qkv_rows, c.width),  # row blocks [Q | K | V]
            layer + "qkv.bias": (c.qkv_rows,),
            layer + "out.weight": (c.width, c.heads * c.head_width),
            layer + "norm2.weight": (c.width,),
            layer + "gate_up.weight": (2 * c.ffn, c.width),  # row blocks [gate; up]
            layer + "down.weight": (c.width, c.ffn),
        }
    shapes["decoder.norm.weight"] = (c.width,)
    if not c.tied:
        shapes["decoder.head.weight"] = (c.vocab_padded, c.width)
    return shapes


@dataclass(frozen=True)
class StepRows:
    """Where the rows of one ragged step sit: what every attention layer of the step reads."""

    positions: Tensor  # int64 [N], RoPE position of each row
    slots: Tensor  # int64 [N], page * Q + offset of each row's key and value
    row_starts: Tensor  # int32 [B + 1], rows of sequence b are row_starts[b]..row_starts[b + 1]
    block_table: Tensor  # int32 [B, M], pages of each sequence in order; unused entries 0
    kv_lens: Tensor  # int32 [B], slots in use, the new rows and the gap included
    gaps: Tensor  # int32 [B, 2], slots [start, end) that hold nothing


class Decoder:
    """The language model over weights named as in `decoder_shapes`; some matrices of the layers may be kept
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
        self.embedding = weights["decoder.embed.weight"]  # [V, D]
        self.head = self.embedding if config.decoder.tied else weights["decoder.head.weight"]  # [V, D]
        tokens = config.tokens
        self.control_head = self.head[[tokens.keep_silence, tokens.text_begin]].contiguous()  # [2, D]
        half = config.decoder.head_width // 2
        exponent = torch.arange(half, dtype=torch.float64, device=self.embedding.device) / half
        self.inv_freq = config.decoder.rope_base**-exponent  # float64 [K/2]

    def embed(self, ids: Tensor) -> Tensor:
        """ids int64 [N] -> rows [N, D]."""
        return F.embedding(ids, self.embedding)

    def forward(
        self, x: Tensor, rows: StepRows, k_pages: Tensor, v_pages: Tensor, kv_scale: Tensor | None = None
    ) -> Tensor:
        """x [N, D], pages [L, P, Q, G, K] (the rows' keys and values are written) -> hidden [N, D],
        before the final norm. kv_scale float32 [L, 2, G]: of float8 pages (rope_append).
        """
        for i in range(self.config.decoder.layers):
            scale = None if kv_scale is None else kv_scale[i]
            x = self._layer(x, f"decoder.layers.{i}.", rows, k_pages[i], v_pages[i], scale)
        return x

    def _layer(
        self,
        x: Tensor,
        name: str,
        rows: StepRows,
        k_pages: Tensor,
        v_pages: Tensor,
        kv_scale: Tensor | None,
    ) -> Tensor:
        w, eps = self.weights, self.config.decoder.norm_eps
        bias = w[name + "qkv.bias"]
        y = ops.rms_norm(x, w[name + "norm1.weight"], eps)
        qkv = self._linear(y, name + "qkv.weight")
        q = ops.rope_append(qkv, bias, rows.positions, rows.slots, self.inv_freq, k_pages, v_pages, kv_scale)
        scaled = () if kv_scale is None else (kv_scale, bias, rows.positions, self.inv_freq)
        y = ops.paged_attention(
            q, k_pages, v_pages, rows.block_table, rows.row_starts, rows.kv_lens, rows.gaps, *scaled
        )
        x = self._linear(y.flatten(1), name + "out.weight", residual=x)
        y = ops.rms_norm(x, w[name + "norm2.weight"], eps)
        y = self._linear(y, name + "gate_up.weight", "silu_gate")
        return self._linear(y, name + "down.weight", residual=x)

    def _linear(self, x: Tensor, name: str, epilogue: str = "none", residual: Tensor | None = None) -> Tensor:
        """x [N, D] times a matrix of a layer, as it is kept."""
        weight = self.quantised[name] if name in self.quantised else self.weights[name]
        return linear_kept(x, weight, None, epilogue, residual)

    def key_bias(self) -> Tensor:
        """The K part of every layer's qkv bias, float32 [L, G, K]: what float8 pages leave out of keys."""
        c = self.config.decoder
        own = slice(c.heads * c.head_width, (c.heads + c.kv_heads) * c.head_width)
        biases = [self.weights[f"decoder.layers.{i}.qkv.bias"][own].float() for i in range(c.layers)]
        return torch.stack(biases).view(c.layers, c.kv_heads, c.head_width)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [R, D] -> logits [R, V] over the whole vocabulary (text only)."""
        y = ops.rms_norm(hidden, self.weights["decoder.norm.weight"], self.config.decoder.norm_eps)
        return ops.linear(y, self.head)

    def sequence(self, x: Tensor) -> Tensor:
        """Whole sequences at once, without a cache and differentiable: x [B, T, D] -> hidden [B, T, D].

        For training and for checking the streaming path; positions are 0..T-1, attention is causal.
        ValueError with quantised weights, which have no gradient.
        """
        if self.quantised:
            raise ValueError("Decoder.sequence: takes float weights; load the checkpoint with a dtype")
        positions = torch.arange(x.shape[1], device=x.device)
        for i in range(self.config.decoder.layers):
            x = self._sequence_layer(x, f"decoder.layers.{i}.", positions)
        return x

    def _sequence_layer(self, x: Tensor, name: str, positions: Tensor) -> Tensor:
        """One layer on x [B, T, D], positions [T]."""
        c, w = self.config.decoder, self.weights
        y = F.rms_norm(x, (c.width,), w[name + "norm1.weight"], c.norm_eps)
        qkv = F.linear(y, w[name + "qkv.weight"], w[name + "qkv.bias"]).unflatten(-1, (-1, c.head_width))
        q, k, v = qkv.split((c.heads, c.kv_heads, c.kv_heads), dim=2)
        q, k = (self._rotate_sequence(t, positions) for t in (q, k))
        y = self._sequence_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        x = x + F.linear(y.transpose(1, 2).flatten(2), w[name + "out.weight"])
        y = F.rms_norm(x, (c.width,), w[name + "norm2.weight"], c.norm_eps)
        gate, up = F.linear(y, w[name + "gate_up.weight"]).chunk(2, dim=-1)
        return x + F.linear(F.silu(gate) * up, w[name + "down.weight"])

    def _sequence_attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [B, H, T, K], k, v [B, G, T, K] -> [B, H, T, K], causal."""
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    def _rotate_sequence(self, x: Tensor, positions: Tensor) -> Tensor:
        """x [B, T, heads, K] -> rotated by positions [T]."""
        flat = x.transpose(0, 1).flatten(1, 2)  # [T, B heads, K]
        return rotate(flat, positions, self.inv_freq).unflatten(1, (x.shape[0], x.shape[2])).transpose(0, 1)
