"""Configurations: the design's figures, round trips, and errors that name the field."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import pytest

from fastloop.config import (
    PUBLISHED_TOKENS,
    ConfigError,
    DecoderConfig,
    EncoderConfig,
    ModelConfig,
    TokenIds,
    published_3b,
    small,
)
from fastloop.options import DecisionPolicy, EngineConfig, Sampling, SessionConfig


def test_the_published_model_is_the_designs() -> None:
    config = published_3b()
    e, d, t = config.encoder, config.decoder, config.tokens
    assert (e.layers, e.width, e.heads, e.head_width, e.ffn, e.block_frames) == (32, 1280, 20, 64, 5120, 200)
    assert (d.layers, d.width, d.heads, d.kv_heads, d.head_width, d.ffn) == (36, 2048, 16, 2, 128, 11008)
    assert (d.vocab_padded, d.rope_base, d.qkv_rows, d.tied) == (151_936, 1e6, 2560, False)
    assert (config.chunk_samples, config.chunk_tokens, config.chunk_rows) == (6400, 10, 13)
    assert config.chunk_seconds == 0.4
    assert (t.text_begin, t.system, t.text_end, t.audio_begin, t.audio_end) == (
        *(151644, 151644, 151643),
        *(151647, 151648),
    )
    assert (t.user, t.assistant, t.keep_silence, t.audio_pad) == (151601, 151602, 151605, 151608)
    assert (t.online, t.offline, t.language) == (151609, 151610, 151611)
    assert list(t.emotions.items()) == [
        (name, 151614 + i) for i, name in enumerate(("happy", "sad", "angry", "surprise", "normal", "urgent"))
    ]


@pytest.mark.parametrize("config", [published_3b(), small(), small(vocab=300, layers=1, name="x")])
def test_round_trip(config: ModelConfig) -> None:
    assert ModelConfig.from_json(config.to_json()) == config


@pytest.mark.parametrize("text", ["", "{", "[]", "5", '"x"'])
def test_json_that_is_no_config(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^here: (not valid JSON|must be a mapping)"):
        ModelConfig.from_json(text, "here")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda v: v.update(speed=1), r"^ModelConfig: unknown keys \['speed'\]; known are \['chunk_frames'"),
        (lambda v: v.pop("tokens"), r"^ModelConfig: missing keys \['tokens'\]"),
        (lambda v: v["encoder"].pop("ffn"), r"^ModelConfig\.encoder: missing keys \['ffn'\]"),
        (lambda v: v["decoder"].update(ff=1), r"^ModelConfig\.decoder: unknown keys \['ff'\]"),
        (lambda v: v.update(encoder=[1]), r"^ModelConfig\.encoder: must be a mapping, got list"),
        (lambda v: v["encoder"].update(width=66, heads=4), r"^EncoderConfig\.width: 66 must be a multiple"),
        (lambda v: v["encoder"].update(block_frames=30), r"^EncoderConfig\.block_frames: 30"),
        (lambda v: v["decoder"].update(head_width=15), r"^DecoderConfig\.head_width: must be even"),
        (lambda v: v["decoder"].update(vocab_padded=100), r"^DecoderConfig\.vocab: is larger"),
        (lambda v: v["decoder"].update(rope_base=float("inf")), r"^DecoderConfig\.rope_base: must be"),
        (lambda v: v["tokens"].update(user=1.5), r"^TokenIds\.user: must be a non-negative integer"),
        (lambda v: v["tokens"].update(user=512), r"^ModelConfig\.tokens\.user: id 512 is outside the"),
        (lambda v: v.update(threshold=1.5), r"^ModelConfig\.threshold: must be between 0 and 1, got 1\.5"),
        (lambda v: v.update(threshold=True), r"^ModelConfig\.threshold: must be between 0 and 1, got True"),
        (lambda v: v["tokens"]["emotions"].update(sad=True), r"^TokenIds\.emotions\.sad: must be"),
        (lambda v: v["tokens"].update(keep_silence=v["tokens"]["text_begin"]), "must be two tokens"),
    ],
)
def test_an_error_names_the_field(change: Callable[[dict[str, Any]], object], told: str) -> None:
    values = json.loads(small().to_json())
    change(values)
    with pytest.raises(ConfigError, match=told):
        ModelConfig.from_json(json.dumps(values))


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [
        (DecisionPolicy, "threshold", -0.1),
        (DecisionPolicy, "threshold", float("nan")),
        (DecisionPolicy, "rearm", 1.1),
        (DecisionPolicy, "rearm", "0.5"),
        (DecisionPolicy, "min_gap_s", -1),
        (Sampling, "temperature", -1),
        (Sampling, "temperature", True),
        (Sampling, "top_k", 1.0),
        (Sampling, "top_k", -1),
        (Sampling, "top_p", 0),
        (Sampling, "top_p", 1.01),
        (SessionConfig, "mode", "both"),
        (SessionConfig, "edge", None),
        (SessionConfig, "policy", {"threshold": 0.5}),
        (SessionConfig, "sampling", None),
        (SessionConfig, "system_prompt", 5),
        (SessionConfig, "system_prompt", "half a surrogate \udc80"),
        (SessionConfig, "user_text", "only offline"),
        (SessionConfig, "seed", -1),
        (SessionConfig, "seed", 2**63),
        (SessionConfig, "max_response_tokens", 0),
        (SessionConfig, "window_s", 0),
        (SessionConfig, "window_s", float("inf")),
        (SessionConfig, "speculative_chunks", 0),
        (SessionConfig, "max_queued_s", 0.0),
        (SessionConfig, "max_events", 1),
        (EngineConfig, "max_sessions", 0),
        (EngineConfig, "kv_pages", -1),
        (EngineConfig, "page_tokens", 0),
        (EngineConfig, "max_step_rows", 2.0),
        (EngineConfig, "max_perceive_chunks", None),
        (EngineConfig, "runner", "fast"),
        (EngineConfig, "precision", "int2"),
        (EngineConfig, "threads", 0),
    ],
)
def test_an_option_out_of_range_is_named(kind: Any, field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"^{kind.__name__}\.{field}: "):
        kind(**{field: value})


@pytest.mark.parametrize("kind", [DecisionPolicy, Sampling, SessionConfig, EngineConfig])
def test_options_cannot_be_changed_afterwards(kind: Any) -> None:
    options = kind()
    name = dataclasses.fields(options)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(options, name, getattr(options, name))


def test_gaps_and_windows_are_whole_chunks() -> None:
    model = small()
    rows = {DecisionPolicy(min_gap_s=gap).row(model)[2] for gap in (0.41, 0.8)}
    assert rows == {2} and DecisionPolicy(min_gap_s=0.4).row(model)[2] == 1
    assert DecisionPolicy().row(model) == (0.5, 1.0, 0)
    own = dataclasses.replace(model, threshold=0.7)
    assert DecisionPolicy().row(own)[0] == 0.7 and DecisionPolicy(0.2).row(own)[0] == 0.2
    tokens = {window: SessionConfig(window_s=window).window_tokens(model) for window in (0.1, 0.4, 0.5, 60.0)}
    assert tokens == {0.1: 13, 0.4: 13, 0.5: 26, 60.0: 1950}
    assert SessionConfig(window_s=None).window_tokens(model) is None


def test_tokens_belong_to_a_checkpoint() -> None:
    with pytest.raises(ConfigError, match=r"tokens\.text_begin: id 151644 is outside the vocabulary of 512"):
        ModelConfig("x", small().encoder, small().decoder, PUBLISHED_TOKENS)
    assert set(PUBLISHED_TOKENS.named()) == {
        *(f.name for f in dataclasses.fields(TokenIds) if f.name != "emotions"),
        *(f"emotions.{name}" for name in PUBLISHED_TOKENS.emotions),
    }
    assert EncoderConfig(1, 4, 1, 1).head_width == 4 and DecoderConfig(1, 4, 2, 1, 2, 1, 9, 9).qkv_rows == 8
