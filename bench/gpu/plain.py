"""The decoder as one writes it in plain PyTorch (SDPA over a static cache), and transformers' own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastloop.config import ModelConfig
from fastloop.decoder import Decoder

from .record import Context


class PlainDecoder:
    """One stream: new rows behind `history` positions of a static cache [L, 1, G, T, K].

    compiled: each layer goes through torch.compile (without its own graphs; the caller captures).
    """

    def __init__(self, decoder: Decoder, history: int, compiled: bool) -> None:
        self.decoder, c = decoder, decoder.config.decoder
        rows = decoder.config.chunk_rows
        device, dtype = decoder.embedding.device, decoder.embedding.dtype
        shape = (c.layers, 1, c.kv_heads, history + rows, c.head_width)
        self.keys, self.values = (torch.empty(shape, dtype=dtype, device=device).normal_() for _ in range(2))
        self.positions = torch.arange(history, history + rows, device=device)
        slot = torch.arange(history + rows, device=device)
        self.mask = slot[None] <= self.positions[:, None]  # [rows, T]
        self.x = torch.empty(rows, c.width, dtype=dtype, device=device).normal_()
        angle = self.positions.double()[:, None] * decoder.inv_freq
        self.cos, self.sin = angle.cos().float(), angle.sin().float()
        self._layer = self._forward_layer
        if compiled:  # without a GPU (dry runs) the C++ compiler's half a minute would show nothing
            kind = "inductor" if device.type == "cuda" else "eager"
            self._layer = torch.compile(self._forward_layer, dynamic=False, backend=kind)

    def step(self, x: Tensor) -> Tensor:
        """x [rows, D] -> hidden [rows, D]."""
        w = self.decoder.weights
        names = ("norm1.weight", "qkv.weight", "qkv.bias", "out.weight", "norm2.weight", "gate_up.weight",
                 "down.weight")  # fmt: skip
        for i in range(self.decoder.config.decoder.layers):
            weights = [w[f"decoder.layers.{i}.{name}"] for name in names]
            x = self._layer(x, self.keys[i], self.values[i], *weights)
        return x

    def _forward_layer(
        self, x: Tensor, keys: Tensor, values: Tensor, norm1: Tensor, qkv: Tensor, bias: Tensor, out: Tensor,
        norm2: Tensor, gate_up: Tensor, down: Tensor,
    ) -> Tensor:  # fmt: skip
        c = self.decoder.config.decoder
        y = F.linear(F.rms_norm(x, (c.width,), norm1, c.norm_eps), qkv, bias).unflatten(
            -1, (-1, c.head_width)
        )
        q, k, v = y.split((c.heads, c.kv_heads, c.kv_heads), dim=1)
        keys[0].index_copy_(1, self.positions, self._rotated(k).transpose(0, 1))
        values[0].index_copy_(1, self.positions, v.transpose(0, 1))
        y = F.scaled_dot_product_attention(
            self._rotated(q).transpose(0, 1)[None], keys, values, attn_mask=self.mask, enable_gqa=True
        )
        x = x + F.linear(y[0].transpose(0, 1).flatten(1), out)
        gate, up = F.linear(F.rms_norm(x, (c.width,), norm2, c.norm_eps), gate_up).chunk(2, dim=-1)
        return x + F.linear(F.silu(gate) * up, down)

    def _rotated(self, x: Tensor) -> Tensor:
        """x [rows, heads, K]"""
        low, high = x.float().chunk(2, dim=-1)
        cos, sin = self.cos[:, None], self.sin[:, None]
        return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1).to(x.dtype)

    def two_logits(self, hidden: Tensor) -> Tensor:
        c, weight = self.decoder.config.decoder, self.decoder.weights["decoder.norm.weight"]
        return F.linear(F.rms_norm(hidden[-1:], (c.width,), weight, c.norm_eps), self.decoder.control_head)


_THINKERS: list[Any] = []


def thinker(context: Context) -> Any:
    """transformers' Qwen2.5-Omni thinker text model of our dims, random weights, SDPA."""
    from transformers.models.qwen2_5_omni import configuration_qwen2_5_omni as configuration
    from transformers.models.qwen2_5_omni import modeling_qwen2_5_omni as modeling

    if _THINKERS:
        return _THINKERS[0]
    c = context.config.decoder
    side = c.head_width // 2 * 3 // 8  # sections of the multimodal rotary embedding: 2 : 3 : 3, as published
    text = configuration.Qwen2_5OmniTextConfig(
        vocab_size=1024, hidden_size=c.width, intermediate_size=c.ffn, num_hidden_layers=c.layers,
        num_attention_heads=c.heads, num_key_value_heads=c.kv_heads, rms_norm_eps=c.norm_eps,
        max_position_embeddings=32_768, use_sliding_window=False,
        rope_scaling={"type": "default", "rope_type": "default", "mrope_section": [
            c.head_width // 2 - 2 * side, side, side]},
    )  # fmt: skip
    text._attn_implementation = "sdpa"
    old = torch.get_default_dtype()
    torch.set_default_dtype(context.dtype)
    try:
        with torch.device(context.device):
            _THINKERS.append(modeling.Qwen2_5OmniThinkerTextModel(text).eval())
    finally:
        torch.set_default_dtype(old)
    return _THINKERS[0]


def thinker_step(model: Any, config: ModelConfig, history: int) -> Callable[[], Tensor]:
    """13 embeddings behind `history` cached positions, the two logits; the cache is cut back each time."""
    from transformers import DynamicCache

    weight = next(model.parameters())
    embeddings = torch.empty(
        1, config.chunk_rows, config.decoder.width, dtype=weight.dtype, device=weight.device
    )
    embeddings.normal_()
    head = torch.empty(2, config.decoder.width, dtype=weight.dtype, device=weight.device).normal_()
    cache = DynamicCache()
    with torch.inference_mode():
        for _ in range(0, history, config.chunk_rows):
            model(inputs_embeds=embeddings, past_key_values=cache, use_cache=True)

    def step() -> Tensor:
        hidden = model(inputs_embeds=embeddings, past_key_values=cache, use_cache=True).last_hidden_state
        cache.crop(-config.chunk_rows)  # what to take off; transformers 5 refuses what to keep
        return F.linear(hidden[0, -1:], head)

    return step
