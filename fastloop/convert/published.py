"""The published layout: LitGPT config and names, the audio tower as a pickle beside them.

model_config.yaml   model.safetensors.index.json + shards   tokenizer.json
audiointeraction_ChunkwisedEncoder.pth                      qwen25OmniConfig/config.json
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from ..config import DecoderConfig
from ..files import CheckpointError, quote, read_bounded
from .fields import Fields

CONFIG = "model_config.yaml"
ENCODER_WEIGHTS = "audiointeraction_ChunkwisedEncoder.pth"
ENCODER_CONFIG = "qwen25OmniConfig/config.json"
ENCODER_UNUSED = "audio_bos_eos_token.weight"
MAX_YAML_BYTES = 1 << 20

# LitGPT's defaults for what a file leaves out; with None the field has no value.
DEFAULTS: dict[str, Any] = {
    "n_query_groups": None,
    "head_size": None,
    "intermediate_size": None,
    "padded_vocab_size": None,
    "padding_multiple": 512,
    "n_layer": 16,
    "n_embd": 4096,
    "n_head": 32,
    "vocab_size": 50254,
    "rope_base": 10000,
    "norm_eps": 1e-5,
}
# field -> (LitGPT's default, the value that makes it Qwen2.5)
ARCHITECTURE: dict[str, tuple[Any, Any]] = {
    "norm_class_name": ("LayerNorm", "RMSNorm"),
    "mlp_class_name": ("GptNeoxMLP", "LLaMAMLP"),
    "rotary_percentage": (0.25, 1.0),
    "bias": (True, False),
    "attn_bias": (False, True),
    "parallel_residual": (True, False),
    "shared_attention_norm": (False, False),
    "norm_qk": (False, False),
    "post_attention_norm": (False, False),
    "post_mlp_norm": (False, False),
    "scale_embeddings": (False, False),
    "lm_head_bias": (False, False),
    "rope_condense_ratio": (1, 1),
    "n_expert": (0, 0),
    "rope_adjustments": (None, None),
    "sliding_window_size": (None, None),
    "attention_scores_scalar": (None, None),
    "attention_logit_softcapping": (None, None),
    "final_logit_softcapping": (None, None),
}
WITHOUT_MEANING_HERE = {
    "name",
    "hf_config",
    "block_size",
    "gelu_approximate",
    "sliding_window_layer_placing",
    "n_expert_per_token",
}


def read_fields(directory: Path) -> Fields:
    """`model_config.yaml`, refused unless every field is known and the architecture is Qwen2.5's."""
    path = directory / CONFIG
    try:
        values = yaml.safe_load(read_bounded(path, MAX_YAML_BYTES))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid YAML: {error}") from error
    architecture = {name: default for name, (default, _) in ARCHITECTURE.items()}
    fields = Fields(values, str(path), DEFAULTS | architecture)
    unknown = [
        quote(name) for name in values if name not in {*DEFAULTS, *ARCHITECTURE, *WITHOUT_MEANING_HERE}
    ]
    if unknown:
        raise CheckpointError(f"{path}: unknown fields {', '.join(unknown[:8])}")
    fields.require({name: wanted for name, (_, wanted) in ARCHITECTURE.items()})
    return fields


def decoder_config(fields: Fields, tokenizer_vocab: int) -> DecoderConfig:
    """LitGPT's fields -> our config.

    LitGPT's vocab_size counts the text tokens alone; the special tokens above it exist because the
    tokenizer names them. The rows of the embedding are padded_vocab_size.
    """
    width, heads, declared = fields.integer("n_embd"), fields.integer("n_head"), fields.integer("vocab_size")
    multiple = fields.integer("padding_multiple")
    return DecoderConfig(
        layers=fields.integer("n_layer"),
        width=width,
        heads=heads,
        kv_heads=fields.integer("n_query_groups", heads),
        head_width=fields.integer("head_size", width // heads),
        ffn=fields.integer("intermediate_size"),
        vocab=max(declared, tokenizer_vocab),
        vocab_padded=fields.integer("padded_vocab_size", -(-declared // multiple) * multiple),
        rope_base=fields.number("rope_base"),
        norm_eps=fields.number("norm_eps"),
    )
