"""A Hugging Face Qwen2.5-Omni -> ours: the numbers of transformers' own modules, however it was saved."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn
from transformers.models.qwen2_5_omni.modeling_qwen2_5_omni import (
    Qwen2_5OmniAudioEncoder,
    Qwen2_5OmniThinkerForConditionalGeneration,
    Qwen2_5OmniThinkerTextModel,
)

from fastloop.checkpoint import Model, load
from fastloop.config import MEL_BINS
from fastloop.convert import Report, convert
from fastloop.testing.tolerance import relative_error

BOUND = 1e-5
Writers = dict[str, Callable[..., Any]]
Thinker = Qwen2_5OmniThinkerForConditionalGeneration


@pytest.fixture(scope="module")
def thinker(write: Writers) -> Thinker:
    return write["thinker"]()


def saved(thinker: Thinker, directory: Path, write: Writers, **options: Any) -> Path:
    thinker.save_pretrained(directory, **options)
    (directory / "tokenizer.json").write_text(write["tokenizer"]())
    return directory


def converted(source: Path) -> tuple[Report, Model]:
    report = convert(source, source.parent / "ours")
    return report, load(report.destination)


def part(thinker: Thinker, kind: type[nn.Module]) -> nn.Module:
    """A module of the thinker by its class: transformers 5 moved them."""
    return next(module for module in thinker.modules() if isinstance(module, kind))


@torch.no_grad()
def check_numbers(thinker: Thinker, model: Model) -> None:
    """Text hidden states, logits, and audio tokens of both."""
    ids = torch.randint(151_936, (2, 29), generator=torch.Generator().manual_seed(0))
    ours = model.decoder.sequence(model.decoder.embed(ids))
    theirs = part(thinker, Qwen2_5OmniThinkerTextModel)(
        inputs_embeds=thinker.get_input_embeddings()(ids), use_cache=False
    )
    logits = thinker.lm_head(theirs.last_hidden_state)
    assert relative_error(model.decoder.logits(ours.flatten(0, 1)), logits.flatten(0, 1)) < BOUND
    frames = torch.randn(3, 40, MEL_BINS, generator=torch.Generator().manual_seed(1))
    lengths = torch.tensor([40, 40, 40])
    tokens = part(thinker, Qwen2_5OmniAudioEncoder)(
        frames.flatten(0, 1).T.contiguous(), feature_lens=lengths, aftercnn_lens=(lengths - 1) // 2 + 1
    )
    assert relative_error(model.encoder.encode(frames).flatten(0, 1), tokens.last_hidden_state) < BOUND


@pytest.mark.parametrize("shard", ["10GB", "6MB"])
def test_a_thinker_alone(thinker: Thinker, write: Writers, tmp_path: Path, shard: str) -> None:
    source = saved(thinker, tmp_path / "thinker", write, max_shard_size=shard)
    assert (source / "model.safetensors.index.json").is_file() == (shard == "6MB")
    report, model = converted(source)
    check_numbers(thinker, model)
    assert report.source_format == "hugging-face" and not model.config.decoder.tied
    assert model.config.decoder.rope_base == 5e5 and model.config.encoder.block_frames == 80
    assert all(n.startswith(("visual.", "audio_tower.audio_bos_eos_token")) for n in report.unused)


def test_the_whole_model(thinker: Thinker, write: Writers, tmp_path: Path) -> None:
    """Nested under thinker_config, names behind `thinker.`, beside a talker that is left out."""
    source = saved(thinker, tmp_path / "omni", write)
    weights = {
        f"thinker.{n}": t for n, t in safetensors.torch.load_file(source / "model.safetensors").items()
    }
    weights |= {"talker.model.norm.weight": torch.ones(3), "token2wav.x": torch.ones(2)}
    safetensors.torch.save_file(weights, source / "model.safetensors")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({"thinker_config": config, "talker_config": {}}))
    report, model = converted(source)
    check_numbers(thinker, model)
    assert {"talker.model.norm.weight", "token2wav.x"} < set(report.unused)


def test_a_head_that_shares_the_embeddings_rows(thinker: Thinker, write: Writers, tmp_path: Path) -> None:
    source = saved(thinker, tmp_path / "tied", write)
    weights = safetensors.torch.load_file(source / "model.safetensors")
    del weights["lm_head.weight"]
    safetensors.torch.save_file(weights, source / "model.safetensors")
    config = json.loads((source / "config.json").read_text())
    config.pop("tie_word_embeddings", None)
    config["text_config"]["tie_word_embeddings"] = True
    (source / "config.json").write_text(json.dumps(config))
    _, model = converted(source)
    assert model.config.decoder.tied and "decoder.head.weight" not in model.weights
    assert torch.equal(model.decoder.head, thinker.get_input_embeddings().weight)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "only plain RoPE"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"hidden_size": 0}, "hidden_size must be a positive integer"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"num_key_value_heads": 3}, "kv_heads"),
        ({"vocab_size": 151_900}, "vocab_padded"),
    ],
)
def test_another_architecture_is_refused(
    thinker: Thinker, write: Writers, tmp_path: Path, change: dict[str, Any], told: str
) -> None:
    source = saved(thinker, tmp_path / "other", write)
    config = json.loads((source / "config.json").read_text())
    config["text_config"] |= change
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=told):
        converted(source)
    assert [path.name for path in tmp_path.iterdir()] == ["other"]
