"""A Hugging Face Qwen2.5-Omni directory: `config.json` of the whole model or of its thinker alone."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from ..config import MEL_BINS, DecoderConfig, EncoderConfig
from ..files import CheckpointError, parse_json, quote, read_bounded
from .fields import Fields

CONFIG = "config.json"
MAX_CONFIG_BYTES = 4 << 20
# Parts of the checkpoint that this project has no use for: sight, speech synthesis, an unused embedding.
UNUSED = ("visual.", "audio_tower.audio_bos_eos_token.")
UNUSED_BESIDE_THINKER = ("talker.", "token2wav.")

# transformers leaves a field out of config.json where it has the default of the 7B model.
AUDIO_DEFAULTS: dict[str, Any] = {
    "num_mel_bins": 128,
    "encoder_layers": 32,
    "encoder_attention_heads": 20,
    "encoder_ffn_dim": 5120,
    "d_model": 1280,
    "activation_function": "gelu",
    "scale_embedding": False,
    "max_source_positions": 1500,
    "n_window": 100,
    "output_dim": 3584,
}
TEXT_DEFAULTS: dict[str, Any] = {
    "vocab_size": 152064,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "use_sliding_window": False,
    "rope_theta": 1e6,
}


def read_config(path: Path) -> tuple[Any, Any, bool]:
    """(audio_config, text_config, untied) of a `config.json`, nested under thinker_config or not.

    untied: it says, and nowhere denies, that the head has rows of its own. (Versions of transformers
    disagree on what it means to leave this out, and on which of two places counts.)
    """
    values = parse_json(read_bounded(path, MAX_CONFIG_BYTES), str(path))
    thinker = values.get("thinker_config", values)
    if not isinstance(thinker, dict) or "audio_config" not in thinker:
        raise CheckpointError(f"{path}: no audio_config, so not a Qwen2.5-Omni model or thinker")
    audio, text = thinker["audio_config"], thinker.get("text_config", {})
    said = [part.get("tie_word_embeddings") for part in (thinker, text) if isinstance(part, dict)]
    return audio, text, False in said and True not in said


def encoder_config(audio: Any, where: str, output_width: int) -> EncoderConfig:
    """transformers' audio_config -> ours; it must project to the decoder's width."""
    fields = Fields(audio, f"{where}: audio_config", AUDIO_DEFAULTS)
    fields.require(
        {
            "num_mel_bins": MEL_BINS,
            "activation_function": "gelu",
            "scale_embedding": False,
            "output_dim": output_width,
        }
    )
    window = fields.integer("n_window")  # positions of a native block: half its mel frames
    if window > fields.integer("max_source_positions"):
        raise CheckpointError(f"{fields.where}: n_window {window} is more than max_source_positions")
    return EncoderConfig(
        layers=fields.integer("encoder_layers"),
        width=fields.integer("d_model"),
        heads=fields.integer("encoder_attention_heads"),
        ffn=fields.integer("encoder_ffn_dim"),
        block_frames=2 * window,
    )


def decoder_config(text: Any, where: str, tokenizer_vocab: int, tied: bool) -> DecoderConfig:
    """transformers' text_config -> ours. Ids exist where the tokenizer names them; the rest is padding."""
    fields = Fields(text, f"{where}: text_config", TEXT_DEFAULTS)
    fields.require({"hidden_act": "silu", "use_sliding_window": False})
    width, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    return DecoderConfig(
        layers=fields.integer("num_hidden_layers"),
        width=width,
        heads=heads,
        kv_heads=fields.integer("num_key_value_heads"),
        head_width=fields.integer("head_dim", width // heads),
        ffn=fields.integer("intermediate_size"),
        vocab=tokenizer_vocab,
        vocab_padded=fields.integer("vocab_size"),
        rope_base=_rope_base(fields),
        norm_eps=fields.number("rms_norm_eps"),
        tied=tied,
    )


def _rope_base(fields: Fields) -> float:
    """The base of plain RoPE, written in the manner of transformers 4 or 5.

    M-RoPE with equal positions on its three axes is plain RoPE, and here all positions are 1-D.
    """
    merged: dict[str, Any] = {}
    for name in ("rope_scaling", "rope_parameters"):
        value = fields.get(name)
        if value is not None and not isinstance(value, dict):
            raise CheckpointError(f"{fields.where}: {name} must be a table, is {quote(value)}")
        merged |= value or {}
    kind = merged.get("rope_type", merged.get("type", "default"))
    unknown = set(merged) - {"rope_type", "type", "rope_theta", "mrope_section"}
    if kind not in ("default", "mrope") or unknown:
        raise CheckpointError(f"{fields.where}: rope_scaling {quote(merged)}: only plain RoPE is supported")
    theta = {"rope_theta": merged.get("rope_theta", fields.get("rope_theta"))}
    return Fields(theta, fields.where, {}).number("rope_theta")


def prefix_of(names: Collection[str], where: Path) -> str:
    """What stands before `audio_tower.` and `model.` in this checkpoint: "thinker." or nothing."""
    for prefix in ("thinker.", ""):
        if any(name.startswith(f"{prefix}audio_tower.") for name in names):
            return prefix
    raise CheckpointError(f"{where}: no tensor is named audio_tower.* or thinker.audio_tower.*")


def is_unused(name: str, prefix: str) -> bool:
    """A tensor that is left out on purpose; any other that finds no place is an error."""
    return name.startswith(tuple(prefix + part for part in UNUSED)) or (
        prefix == "thinker." and name.startswith(UNUSED_BESIDE_THINKER)
    )
