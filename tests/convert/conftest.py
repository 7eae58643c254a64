"""Tiny checkpoints in each foreign layout, made by the libraries they come from.

The published ids lie above 151,600, so the vocabulary has its real size; everything else is tiny.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers
import yaml
from torch import Tensor, nn
from transformers.models.qwen2_5_omni.configuration_qwen2_5_omni import (
    Qwen2_5OmniAudioEncoderConfig,
    Qwen2_5OmniThinkerConfig,
)
from transformers.models.qwen2_5_omni.modeling_qwen2_5_omni import (
    Qwen2_5OmniAudioEncoder,
    Qwen2_5OmniThinkerForConditionalGeneration,
)

from fastloop.checkpoint import CheckpointError
from fastloop.convert import convert
from fastloop.testing.cases import byte_tokenizer

VOCAB, ROWS = 151_921, 151_936  # ids that the tokenizer names, rows of the embedding
WIDTH, HEADS, GROUPS, HEAD, FFN, LAYERS = 16, 4, 2, 4, 24, 2
AUDIO = {
    "encoder_layers": 2,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "d_model": 16,
    "n_window": 40,
}
ROPE_BASE = 5e5

MODEL_CONFIG = {
    "name": "tiny",
    "n_layer": LAYERS,
    "n_embd": WIDTH,
    "n_head": HEADS,
    "n_query_groups": GROUPS,
    "head_size": HEAD,
    "intermediate_size": FFN,
    "vocab_size": 151_643,
    "padded_vocab_size": ROWS,
    "rope_base": 500_000,
    "norm_eps": 1e-06,
    "norm_class_name": "RMSNorm",
    "mlp_class_name": "LLaMAMLP",
    "rotary_percentage": 1.0,
    "bias": False,
    "attn_bias": True,
    "parallel_residual": False,
}


@torch.no_grad()
def randomise(module: nn.Module, seed: int) -> None:
    """Weights of unit gain, norms away from 1 and biases away from 0, so that none can be forgotten."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        matrix = parameter.dim() > 1
        parameter.copy_(noise / parameter[0].numel() ** 0.5 if matrix else 0.3 * noise)
        if not matrix and "norm" in name and name.endswith("weight"):
            parameter += 1


def tokenizer_json(vocab: int = VOCAB) -> str:
    """Bytes, and one name for the last id, so that the vocabulary has its size."""
    values = json.loads(byte_tokenizer(256).to_json())
    values["model"]["vocab"]["<|last|>"] = vocab - 1
    return json.dumps(values)


def litgpt_weights(older: bool) -> dict[str, Tensor]:
    """The decoder under LitGPT's names; `older` keeps q, k and v of a KV group together, as `attn.attn`."""
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=generator) * scale

    weights = {
        "transformer.wte.weight": random(ROWS, WIDTH),
        "lm_head.weight": random(ROWS, WIDTH, scale=0.25),
    }
    weights["transformer.ln_f.weight"] = 1 + random(WIDTH, scale=0.3)
    for layer in range(LAYERS):
        at = f"transformer.h.{layer}."
        qkv = f"{at}attn.{'attn' if older else 'qkv'}"
        rows = (HEADS + 2 * GROUPS) * HEAD
        weights |= {
            f"{at}norm_1.weight": 1 + random(WIDTH, scale=0.3),
            f"{qkv}.weight": random(rows, WIDTH, scale=0.25),
            f"{qkv}.bias": random(rows, scale=0.3),
            f"{at}attn.proj.weight": random(WIDTH, HEADS * HEAD, scale=0.25),
            f"{at}norm_2.weight": 1 + random(WIDTH, scale=0.3),
            f"{at}mlp.fc_1.weight": random(FFN, WIDTH, scale=0.25),
            f"{at}mlp.fc_2.weight": random(FFN, WIDTH, scale=0.25),
            f"{at}mlp.proj.weight": random(WIDTH, FFN, scale=0.2),
        }
    return weights


def write_shards(directory: Path, weights: dict[str, Tensor], shards: int = 2) -> None:
    """`weights` over several files and the index that names them."""
    home = {name: f"model-{1 + i % shards:05}-of-{shards:05}.safetensors" for i, name in enumerate(weights)}
    for shard in set(home.values()):
        held = {name: weights[name] for name in weights if home[name] == shard}
        safetensors.torch.save_file(held, directory / shard)
    index = {"metadata": {"total_size": sum(t.nbytes for t in weights.values())}, "weight_map": home}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def audio_tower() -> Qwen2_5OmniAudioEncoder:
    """The encoder of the published layout, by its own library."""
    tower = Qwen2_5OmniAudioEncoder._from_config(Qwen2_5OmniAudioEncoderConfig(**AUDIO, output_dim=WIDTH))
    randomise(tower, seed=2)
    return tower.eval()


def write_published(directory: Path, tower: nn.Module, older: bool = False) -> dict[str, Tensor]:
    """The published layout; returns the decoder's weights."""
    directory.mkdir(parents=True)
    weights = litgpt_weights(older)
    write_shards(directory, weights)
    (directory / "model_config.yaml").write_text(yaml.safe_dump(MODEL_CONFIG))
    (directory / "tokenizer.json").write_text(tokenizer_json())
    torch.save(tower.state_dict(), directory / "audiointeraction_ChunkwisedEncoder.pth")
    (directory / "qwen25OmniConfig").mkdir()
    audio = {"thinker_config": {"audio_config": tower.config.to_dict()}}
    (directory / "qwen25OmniConfig" / "config.json").write_text(json.dumps(audio))
    return weights


def thinker_model(**text: Any) -> Qwen2_5OmniThinkerForConditionalGeneration:
    """A Qwen2.5-Omni thinker of random weights, by transformers 4.57 or 5."""
    rope = {"rope_type": "default", "mrope_section": [1, 0, 1]}
    five = int(transformers.__version__.split(".")[0]) >= 5
    values: dict[str, Any] = {
        "vocab_size": ROWS,
        "hidden_size": WIDTH,
        "intermediate_size": FFN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": GROUPS,
        **({"rope_parameters": {**rope, "rope_theta": ROPE_BASE}} if five else {}),
        **({} if five else {"rope_scaling": rope, "rope_theta": ROPE_BASE}),
        **text,
    }
    vision = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": WIDTH,
    }
    config = Qwen2_5OmniThinkerConfig(
        audio_config={**AUDIO, "output_dim": WIDTH},
        text_config=values,
        vision_config={**vision, "fullatt_block_indexes": [0]},
    )
    model = Qwen2_5OmniThinkerForConditionalGeneration(config)
    randomise(model, seed=3)
    return model.eval()


@pytest.fixture(scope="session")
def tower() -> Qwen2_5OmniAudioEncoder:
    return audio_tower()


@pytest.fixture(scope="session")
def published_master(tmp_path_factory: pytest.TempPathFactory, tower: Qwen2_5OmniAudioEncoder) -> Path:
    """A published checkpoint that nobody may change."""
    directory = tmp_path_factory.mktemp("foreign") / "published"
    write_published(directory, tower)
    return directory


@pytest.fixture
def published(published_master: Path, tmp_path: Path) -> Path:
    """A published checkpoint to damage."""
    return Path(shutil.copytree(published_master, tmp_path / "published"))


@pytest.fixture(scope="session")
def write() -> dict[str, Callable[..., Any]]:
    """The writers above, for tests that need a layout of their own."""
    return {
        "published": write_published,
        "shards": write_shards,
        "tokenizer": tokenizer_json,
        "thinker": thinker_model,
    }


@pytest.fixture
def refused() -> Callable[..., str]:
    """Convert beside the source, which must fail and leave nothing; the message."""

    def run(source: Path, **options: Any) -> str:
        before = sorted(path.name for path in source.parent.iterdir())
        with pytest.raises(CheckpointError) as error:
            convert(source, source.parent / "ours", **{"trust_pickle": True, **options})
        assert sorted(path.name for path in source.parent.iterdir()) == before
        return str(error.value)

    return run
