"""Foreign checkpoints that do not fit: an error names everything that is wrong, nothing is left behind."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import yaml
from torch import Tensor

from fastloop.checkpoint import CheckpointError, load
from fastloop.convert import convert

PICKLE = "audiointeraction_ChunkwisedEncoder.pth"
INDEX = "model.safetensors.index.json"
Refused = Callable[..., str]
Writers = dict[str, Callable[..., Any]]


def edit_shards(directory: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Change the decoder's tensors; the index follows."""
    held = [safetensors.torch.load_file(path) for path in sorted(directory.glob("*.safetensors"))]
    weights = {name: tensor for shard in held for name, tensor in shard.items()}
    for path in directory.glob("*.safetensors"):
        path.unlink()
    change(weights)
    safetensors.torch.save_file(weights, directory / "all.safetensors")
    (directory / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(weights, "all.safetensors")}))


def edit_yaml(directory: Path, change: dict[str, Any]) -> None:
    path = directory / "model_config.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | change))


# ---- tensors


def test_everything_that_is_wrong_is_named_at_once(refused: Refused, published: Path) -> None:
    def damage(weights: dict[str, Tensor]) -> None:
        del weights["transformer.h.1.norm_2.weight"], weights["lm_head.weight"]
        weights["transformer.h.2.norm_1.weight"] = torch.ones(16)
        weights["transformer.ln_f.weight"] = torch.ones(15)
        weights["transformer.h.0.attn.proj.weight"] = torch.ones(16, 16, dtype=torch.int8)

    edit_shards(published, damage)
    message = refused(published)
    for part in (
        "missing (2): transformer.h.1.norm_2.weight, lm_head.weight",
        "left over (1): 'transformer.h.2.norm_1.weight'",
        "wrong shape (1): transformer.ln_f.weight is [15], must be [16]",
        "wrong dtype, must be floating point (1): transformer.h.0.attn.proj.weight is torch.int8",
    ):
        assert part in message
    assert str(published) in message


def test_tensors_of_the_tower_are_checked_too(refused: Refused, published: Path) -> None:
    tower = torch.load(published / PICKLE, weights_only=True)
    tower["proj.weight"] = tower["proj.weight"][:-1].clone()
    tower["audio_tower.extra"] = torch.zeros(1)
    del tower["conv1.bias"]
    torch.save(tower, published / PICKLE)
    message = refused(published)
    for part in ("conv1.bias", "audio_tower.extra", "proj.weight is [15, 16], must be [16, 16]"):
        assert part in message


def test_many_names_are_counted_and_only_the_first_are_told(refused: Refused, published: Path) -> None:
    extra = {f"transformer.h.0.lora.{i}": torch.zeros(1) for i in range(500)}
    edit_shards(published, lambda weights: weights.update(extra))
    message = refused(published)
    assert "left over (500)" in message and "and 492 more" in message and len(message) < 2000


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["lm_head.weight", "conv1.bias"])
def test_weights_that_are_no_numbers(refused: Refused, published: Path, name: str, value: float) -> None:
    if name == "conv1.bias":
        tower = torch.load(published / PICKLE, weights_only=True)
        tower[name][3] = value
        torch.save(tower, published / PICKLE)
    else:
        edit_shards(published, lambda weights: weights[name].view(-1)[-1].fill_(value))
    message = refused(published)
    assert {"lm_head.weight": "decoder.head.weight", "conv1.bias": "encoder.conv1.bias"}[name] in message
    assert "not finite" in message


@pytest.mark.parametrize(("value", "stored"), [(7e4, torch.float32), (1e300, torch.float64)])
def test_a_weight_too_large_for_the_dtype(
    refused: Refused, published: Path, value: float, stored: torch.dtype
) -> None:
    name = "transformer.ln_f.weight"
    edit_shards(published, lambda weights: weights.update({name: torch.full((16,), value, dtype=stored)}))
    dtype = "float16" if stored == torch.float32 else "float32"
    message = refused(published, dtype=dtype)
    assert f"'decoder.norm.weight': not finite in torch.{dtype}; choose" in message


@pytest.mark.parametrize("dtype", ["int3", "float64", "half", "", torch.int8])
def test_a_dtype_that_is_none(published_master: Path, tmp_path: Path, dtype: Any) -> None:
    with pytest.raises(CheckpointError, match="float32, bfloat16, float16"):
        convert(published_master, tmp_path / "x", trust_pickle=True, dtype=dtype)
    assert list(tmp_path.iterdir()) == []


# ---- the vocabulary


@pytest.mark.parametrize("largest", [300, 151_647])
def test_a_vocabulary_smaller_than_the_special_ids(
    refused: Refused, published: Path, write: Writers, largest: int
) -> None:
    (published / "tokenizer.json").write_text(write["tokenizer"](largest + 1))
    edit_yaml(published, {"vocab_size": 300})
    assert re.search(rf"tokens\.\w+: id 15\d+ is outside the vocabulary of {largest + 1}", refused(published))


def test_a_tokenizer_of_another_model(refused: Refused, published: Path, write: Writers) -> None:
    (published / "tokenizer.json").write_text(write["tokenizer"](151_937))
    assert "larger than vocab_padded" in refused(published)


@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b"\xff\xfe", b"{" * 100_000])
def test_a_tokenizer_that_is_none(refused: Refused, published: Path, content: bytes) -> None:
    (published / "tokenizer.json").write_bytes(content)
    assert "tokenizer.json" in refused(published)


def test_no_tokenizer(refused: Refused, published: Path) -> None:
    (published / "tokenizer.json").unlink()
    assert "AutoTokenizer" in refused(published)


# ---- the config


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"norm_class_name": "LayerNorm"}, "norm_class_name is 'LayerNorm', supported is 'RMSNorm'"),
        ({"sliding_window_size": 512}, "sliding_window_size"),
        ({"n_expert": 8, "attn_bias": False}, "attn_bias"),
        ({"quantised": True}, "unknown fields 'quantised'"),
        ({"n_layer": -1}, "n_layer must be a positive integer"),
        ({"n_layer": 10**6}, "at most 1000 are plausible"),
        ({"n_embd": True}, "n_embd must be a positive integer"),
        ({"rope_base": "many"}, "rope_base must be a positive number"),
        ({"n_head": 5}, "heads"),
    ],
)
def test_a_config_that_does_not_fit(
    refused: Refused, published: Path, change: dict[str, Any], told: str
) -> None:
    edit_yaml(published, change)
    message = refused(published)
    assert told in message and (
        "model_config.yaml" in message or str(published) in message or "config" in message
    )


@pytest.mark.parametrize("content", ["", "- a\n- b\n", "a: [", "\x00", "a: &a [*a]\n"])
def test_yaml_that_is_no_config(refused: Refused, published: Path, content: str) -> None:
    (published / "model_config.yaml").write_text(content)
    assert "model_config.yaml" in refused(published)


def test_an_encoder_that_does_not_fit_the_decoder(refused: Refused, published: Path) -> None:
    path = published / "qwen25OmniConfig" / "config.json"
    values = json.loads(path.read_text())
    values["thinker_config"]["audio_config"]["output_dim"] = 99
    path.write_text(json.dumps(values))
    assert "output_dim is 99, supported is 16" in refused(published)


@pytest.mark.parametrize("missing", ["qwen25OmniConfig/config.json", INDEX])
def test_a_part_that_is_missing(refused: Refused, published: Path, missing: str) -> None:
    (published / missing).unlink()
    assert Path(missing).name in refused(published)


def test_what_is_no_checkpoint(refused: Refused, tmp_path: Path) -> None:
    for name, told in (("nothing", "does not exist"), ("file", "is not a directory"), ("empty", "neither")):
        source = tmp_path / name / "x" if name == "nothing" else tmp_path / name
        if name == "file":
            source.write_text("x")
        elif name == "empty":
            source.mkdir()
        else:
            source.parent.mkdir()
        assert told in refused(source)


def test_our_own_format_is_not_foreign(refused: Refused, published: Path, tmp_path: Path) -> None:
    convert(published, tmp_path / "converted", trust_pickle=True)
    message = refused(tmp_path / "converted")
    assert "loads as it is" in message


# ---- the destination


def test_a_destination_that_exists_is_left_alone(refused: Refused, published: Path, tmp_path: Path) -> None:
    target = tmp_path / "ours"
    target.mkdir()
    (target / "note").write_text("mine")
    assert f"{target}: exists already; remove it or choose another name" in refused(published)
    assert [path.name for path in target.iterdir()] == ["note"]
    before = sorted(path.name for path in published.iterdir())
    with pytest.raises(CheckpointError, match="exists already"):
        convert(published, published, trust_pickle=True)
    assert sorted(path.name for path in published.iterdir()) == before


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_an_interrupted_conversion_leaves_nothing(
    published: Path, tmp_path: Path, error: type[BaseException]
) -> None:
    def interrupt(done: int, total: int) -> None:
        if done > total / 2:
            raise error

    with pytest.raises(error):
        convert(published, tmp_path / "new" / "deep" / "ours", trust_pickle=True, progress=interrupt)
    assert [path.name for path in tmp_path.iterdir()] == ["published"]
    convert(published, tmp_path / "ours", trust_pickle=True)
    assert load(tmp_path / "ours").weight_bytes > 0


def test_a_destination_that_cannot_be_written(published: Path) -> None:
    (published.parent / "note").write_text("a file, no directory")
    with pytest.raises(CheckpointError, match="nothing is left of it"):
        convert(published, published.parent / "note" / "ours", trust_pickle=True)
