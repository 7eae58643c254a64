"""Checkpoints of our own format that are wrong: refused before memory is taken, everything named at once."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from fastloop import checkpoint
from fastloop.checkpoint import CheckpointError, Model, load, resolve, save
from fastloop.config import small
from fastloop.engine import Engine
from fastloop.options import EngineConfig
from fastloop.testing.cases import byte_tokenizer, random_model, random_sound

WEIGHTS, CONFIG, TOKENIZER = "model.safetensors", "config.json", "tokenizer.json"


@pytest.fixture(scope="module")
def model() -> Model:
    return random_model(small(layers=1), seed=5)


@pytest.fixture
def saved(model: Model, tmp_path: Path) -> Path:
    return save(tmp_path / "saved", model.config, model.weights, model.tokenizer.to_json())


def edit_weights(directory: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """By the format's own library, which shares no code with ours."""
    weights = safetensors.torch.load_file(directory / WEIGHTS)
    change(weights)
    safetensors.torch.save_file(weights, directory / WEIGHTS)


def edit_config(directory: Path, change: Callable[[dict[str, Any]], object]) -> None:
    values = json.loads((directory / CONFIG).read_text())
    change(values)
    (directory / CONFIG).write_text(json.dumps(values))


def refused(directory: Path) -> str:
    with pytest.raises(CheckpointError) as error:
        load(directory)
    return str(error.value)


def test_everything_that_is_wrong_is_named_at_once(saved: Path) -> None:
    def damage(weights: dict[str, Tensor]) -> None:
        del weights["encoder.conv1.bias"], weights["decoder.head.weight"]
        weights["encoder.new\n\x1b[31m"] = torch.zeros(1)
        weights["decoder.norm.weight"] = torch.zeros(3, 1)
        weights["encoder.norm.bias"] = weights["encoder.norm.bias"].half()

    edit_weights(saved, damage)
    (saved / TOKENIZER).write_text(byte_tokenizer(600).to_json())
    message = refused(saved)
    for part in (
        f"{saved} cannot be used:",
        "missing (2): encoder.conv1.bias, decoder.head.weight",
        "left over (1): 'encoder.new\\n\\x1b[31m'",
        "wrong shape (1): decoder.norm.weight is [3, 1], must be [64]",
        "wrong dtype, must be torch.float32 (1): encoder.norm.bias is torch.float16",
        "largest id is 599, the model's vocabulary is 512: it belongs to another model",
    ):
        assert part in message


@pytest.mark.parametrize("dtype", [torch.int32, torch.float64, torch.float8_e4m3fn])
def test_weights_of_another_kind(saved: Path, dtype: torch.dtype) -> None:
    edit_weights(saved, lambda weights: weights.update({n: t.to(dtype) for n, t in weights.items()}))
    assert f"is {dtype}" in refused(saved)


@pytest.mark.parametrize("name", [WEIGHTS, CONFIG, TOKENIZER])
def test_a_file_that_is_missing_empty_or_a_directory(saved: Path, name: str) -> None:
    (saved / name).write_bytes(b"")
    assert name in refused(saved)
    (saved / name).unlink()
    assert f"no {name}" in refused(saved) and "fastloop convert" in refused(saved)
    (saved / name).mkdir()
    assert f"no {name}" in refused(saved)


def test_truncated_weights(saved: Path) -> None:
    whole = (saved / WEIGHTS).read_bytes()
    for size in (len(whole) - 1, len(whole) // 2, 100, 7):
        (saved / WEIGHTS).write_bytes(whole[:size])
        assert WEIGHTS in refused(saved)


def test_a_pickle_in_place_of_the_weights_is_never_opened(saved: Path, tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "executed"),)

    (saved / WEIGHTS).write_bytes(pickle.dumps(Bomb()))
    assert WEIGHTS in refused(saved)
    torch.save({"x": Bomb()}, saved / WEIGHTS)
    assert WEIGHTS in refused(saved)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("name", ["keep_silence", "text_end", "emotions"])
def test_a_vocabulary_smaller_than_the_special_ids(saved: Path, name: str) -> None:
    def shrink(values: dict[str, Any]) -> None:
        tokens = values["model"]["tokens"]
        if name == "emotions":
            tokens["emotions"]["urgent"] = 512
        else:
            tokens[name] = 10**9

    edit_config(saved, shrink)
    told = "emotions.urgent: id 512" if name == "emotions" else f"{name}: id 1000000000"
    assert f"tokens.{told} is outside the vocabulary of 512" in refused(saved)


@pytest.mark.parametrize(
    ("path", "value", "told"),
    [
        ("decoder.layers", 10**7, "at most 1000 are plausible"),
        ("encoder.layers", 0, "EncoderConfig.layers: must be a positive integer, got 0"),
        ("decoder.width", True, "DecoderConfig.width: must be a positive integer, got True"),
        ("decoder.width", 2**40, "wrong shape"),
        ("decoder.heads", 3, "DecoderConfig.heads: must be a multiple of kv_heads"),
        ("decoder.heads", "4", "DecoderConfig.heads: must be a positive integer"),
        ("decoder.rope_base", 0, "DecoderConfig.rope_base: must be a positive number, got 0"),
        ("decoder.rope_base", None, "DecoderConfig.rope_base: must be a positive number"),
        ("encoder.norm_eps", float("nan"), "EncoderConfig.norm_eps: must be a positive number"),
        ("decoder.tied", "no", "DecoderConfig.tied: must be true or false"),
        ("decoder.new", 1, "unknown keys ['new']"),
        ("decoder", 5, "must be a mapping"),
        ("tokens.assistant", -1, "TokenIds.assistant: must be a non-negative integer"),
        ("tokens.emotions", [1], "TokenIds.emotions: must be a table of names to ids"),
        ("system_prompt", 7, "ModelConfig.system_prompt: must be text, got 7"),
        ("name", None, "ModelConfig.name: must be text, got None"),
        ("chunk_frames", 6, "chunk_frames: 6 must be a multiple of 4"),
    ],
)
def test_a_config_that_makes_no_sense(saved: Path, path: str, value: Any, told: str) -> None:
    def damage(values: dict[str, Any]) -> None:
        *tables, last = path.split(".")
        table = values["model"]
        for name in tables:
            table = table[name]
        table[last] = value

    edit_config(saved, damage)
    assert told in refused(saved)


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff", b'{"format": "fastloop-1"}', b'{"a": 1, "a": 2}'])
def test_a_config_that_is_none(saved: Path, content: bytes) -> None:
    (saved / CONFIG).write_bytes(content)
    assert str(saved / CONFIG) in refused(saved)


def test_a_newer_format_is_told(saved: Path) -> None:
    edit_config(saved, lambda values: values.update(format="fastloop-9"))
    assert 'is not {"format": "fastloop-1"' in refused(saved)


def test_a_config_too_large_to_be_one(saved: Path) -> None:
    (saved / CONFIG).write_bytes(b" " * (checkpoint.MAX_CONFIG_BYTES + 1))
    assert "at most 1048576 are plausible" in refused(saved)


@pytest.mark.parametrize("content", [b"{}", b"null", b"\xff", b'{"model": {"type": "BPE"}}'])
def test_a_tokenizer_that_is_none(saved: Path, content: bytes) -> None:
    (saved / TOKENIZER).write_bytes(content)
    assert TOKENIZER in refused(saved)


def test_models_that_are_unknown(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for name in ("no-such-model", "../models", str(tmp_path / "none"), str(tmp_path / "file")):
        with pytest.raises(CheckpointError, match="known models are") as error:
            resolve(name)
        assert repr(name) in str(error.value) and "fastloop convert" in str(error.value)


def test_weights_that_are_no_numbers_fail_their_session_and_say_so(saved: Path) -> None:
    """A mapped file is not read through when it is loaded: what is wrong comes out at the decision."""
    edit_weights(saved, lambda weights: weights["decoder.norm.weight"].fill_(float("nan")))
    engine = Engine(load(saved), EngineConfig(max_sessions=1))
    session = engine.open()
    session.push(random_sound(0.4))
    engine.run_until_idle()
    assert [e.type for e in session.poll()] == ["failed", "closed"]
    assert engine.health()["status"] == "ok" and engine.stats()["failures"] == 1
    engine.check()
