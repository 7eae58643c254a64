"""Which foreign tensors make each of ours: names, shapes they must have, how they are put together."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from ..checkpoint import weight_shapes
from ..config import DecoderConfig, ModelConfig
from ..tensorfile import Shape


def stack(*parts: Tensor) -> Tensor:
    """Row blocks in order."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def with_zero_k(q: Tensor, v: Tensor) -> Tensor:
    """[q | 0 | v]: the audio tower's k_proj has no bias."""
    return torch.cat([q, torch.zeros_like(q), v])


def ungroup(groups: int, head_width: int, grouped: Tensor) -> Tensor:
    """Rows [q.. k v] of each KV group, one group after another -> row blocks [Q | K | V]."""
    by_group = grouped.reshape(groups, -1, *grouped.shape[1:])  # [G, (H/G + 2) K, ...]
    heads = by_group.shape[1] - 2 * head_width
    parts = torch.split(by_group, [heads, head_width, head_width], dim=1)
    return torch.cat([part.flatten(0, 1) for part in parts])


@dataclass(frozen=True)
class Recipe:
    """One of our tensors: foreign name -> shape it must have, and the function that joins them."""

    parts: Mapping[str, Shape]
    build: Callable[..., Tensor] = field(default=stack)


Recipes = dict[str, Recipe]


def blocks(shape: Shape, heights: Mapping[str, int]) -> Recipe:
    """Row blocks of the given heights; the other dimensions are those of `shape`."""
    return Recipe({name: (height, *shape[1:]) for name, height in heights.items()})


def encoder_recipes(config: ModelConfig, prefix: str) -> Recipes:
    """Our encoder from the names of transformers' Qwen2_5OmniAudioEncoder behind `prefix`."""
    width = config.encoder.width
    plain = {"norm1": "self_attn_layer_norm", "norm2": "final_layer_norm", "norm": "ln_post"}
    plain |= {"out": "self_attn.out_proj"}
    recipes = {}
    for ours, shape in weight_shapes(config).items():
        if not ours.startswith("encoder."):
            continue
        path, module, kind = _split(ours, "encoder.")
        attention = f"{prefix}{path}self_attn."
        if module == "qkv" and kind == "bias":
            q, v = f"{attention}q_proj.bias", f"{attention}v_proj.bias"
            recipes[ours] = Recipe({q: (width,), v: (width,)}, with_zero_k)
        elif module == "qkv":
            recipes[ours] = blocks(shape, {f"{attention}{part}_proj.weight": width for part in "qkv"})
        else:
            recipes[ours] = Recipe({f"{prefix}{path}{plain.get(module, module)}.{kind}": shape})
    return recipes


def thinker_recipes(config: ModelConfig, prefix: str) -> Recipes:
    """Our decoder from the names of transformers' Qwen2.5 (`model.*`, `lm_head`) behind `prefix`."""
    plain = {"norm1": "input_layernorm", "norm2": "post_attention_layernorm", "norm": "norm"}
    plain |= {"out": "self_attn.o_proj", "down": "mlp.down_proj", "embed": "embed_tokens"}
    q, kv = _heights(config.decoder)
    recipes = {}
    for ours, shape in weight_shapes(config).items():
        if not ours.startswith("decoder."):
            continue
        path, module, kind = _split(ours, "decoder.")
        at = f"{prefix}model.{path}"
        if module == "qkv":
            heights = {"q": q, "k": kv, "v": kv}
            named = {f"{at}self_attn.{part}_proj.{kind}": height for part, height in heights.items()}
            recipes[ours] = blocks(shape, named)
        elif module == "gate_up":
            named = {f"{at}mlp.{part}_proj.weight": config.decoder.ffn for part in ("gate", "up")}
            recipes[ours] = blocks(shape, named)
        elif module == "head":
            recipes[ours] = Recipe({f"{prefix}lm_head.weight": shape})
        else:
            recipes[ours] = Recipe({f"{at}{plain[module]}.{kind}": shape})
    return recipes


def published_recipes(config: ModelConfig, names: Collection[str]) -> Recipes:
    """Our decoder from LitGPT names. `attn.qkv` is [Q | K | V]; the older `attn.attn` is grouped."""
    c = config.decoder
    plain = {"norm1": "norm_1", "norm2": "norm_2", "norm": "ln_f", "embed": "wte"}
    plain |= {"out": "attn.proj", "down": "mlp.proj"}
    recipes = {}
    for ours, shape in weight_shapes(config).items():
        if not ours.startswith("decoder."):
            continue
        path, module, kind = _split(ours, "decoder.")
        at = f"transformer.{path.replace('layers.', 'h.')}"
        if module == "qkv" and f"{at}attn.attn.{kind}" in names:
            recipes[ours] = Recipe(
                {f"{at}attn.attn.{kind}": shape}, partial(ungroup, c.kv_heads, c.head_width)
            )
        elif module == "qkv":
            recipes[ours] = Recipe({f"{at}attn.qkv.{kind}": shape})
        elif module == "gate_up":
            recipes[ours] = blocks(shape, {f"{at}mlp.fc_{part}.weight": c.ffn for part in (1, 2)})
        elif module == "head":
            recipes[ours] = Recipe({"lm_head.weight": shape})
        else:
            recipes[ours] = Recipe({f"{at}{plain[module]}.{kind}": shape})
    return recipes


def _split(name: str, prefix: str) -> tuple[str, str, str]:
    """decoder.layers.3.out.weight -> ("layers.3.", "out", "weight")."""
    *path, module, kind = name.removeprefix(prefix).split(".")
    return "".join(f"{step}." for step in path), module, kind


def _heights(config: DecoderConfig) -> tuple[int, int]:
    """Rows of the q block, and of the k and the v block."""
    return config.heads * config.head_width, config.kv_heads * config.head_width
