"""Model dimensions, token ids and engine limits: frozen, validated, errors name the field.

Dimension letters used in every shape comment of the project:

    S  audio samples at 16 kHz          F  mel frames (10 ms each)      C  mel bins (128)
    A  audio tokens of a chunk (10)     E  encoder width                D  decoder width
    H  query heads    G  KV heads       K  head width                   I  feed-forward width
    L  layers         V  vocabulary rows (padded)
    B  sessions in a batch              N  rows (new positions) in a ragged batch
    P  pages in the KV pool             Q  token slots in a page        R  rows that need a decision
    Z  state slots (one per session)
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

SAMPLE_RATE = 16_000  # Hz; everything behind audio.py runs at this rate
HOP_SAMPLES = 160  # one mel frame every 10 ms
FFT_SAMPLES = 400  # the Hann window: 25 ms
MEL_BINS = 128
FRAMES_PER_TOKEN = 4  # conv stride 2, then average-pool by 2

T = TypeVar("T")


class ConfigError(ValueError):
    """A configuration value is missing, unknown or out of range; the message names the field."""


def _require(condition: bool, where: str, message: str) -> None:
    if not condition:
        raise ConfigError(f"{where}: {message}")


def _positive(instance: Any, *names: str) -> None:
    for name in names:
        value = getattr(instance, name)
        _require(
            isinstance(value, int) and not isinstance(value, bool) and value > 0,
            f"{type(instance).__name__}.{name}",
            f"must be a positive integer, got {value!r}",
        )


def _positive_number(instance: Any, *names: str) -> None:
    for name in names:
        value = getattr(instance, name)
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        _require(
            number and math.isfinite(value) and value > 0,
            f"{type(instance).__name__}.{name}",
            f"must be a positive number, got {value!r}",
        )


def _share(instance: Any, *names: str) -> None:
    for name in names:
        value = getattr(instance, name)
        where = f"{type(instance).__name__}.{name}"
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        _require(number and 0 <= value <= 1, where, f"must be between 0 and 1, got {value!r}")


def _text(instance: Any, *names: str) -> None:
    for name in names:
        value = getattr(instance, name)
        where = f"{type(instance).__name__}.{name}"
        _require(isinstance(value, str), where, f"must be text, got {value!r}")


def from_mapping(cls: type[T], values: Mapping[str, Any], where: str = "") -> T:
    """Build a config dataclass from plain data; unknown and missing keys are errors."""
    where = where or cls.__name__
    _require(isinstance(values, Mapping), where, f"must be a mapping, got {type(values).__name__}")
    known = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    unknown = sorted(set(values) - set(known))
    _require(not unknown, where, f"unknown keys {unknown}; known are {sorted(known)}")
    arguments = {}
    for name, value in values.items():
        nested = known[name].metadata.get("cls")
        arguments[name] = (
            from_mapping(nested, value, f"{where}.{name}")
            if nested and not isinstance(value, nested)
            else value
        )
    missing = [
        name
        for name, f in known.items()
        if name not in arguments
        and f.default is dataclasses.MISSING
        and f.default_factory is dataclasses.MISSING
    ]
    _require(not missing, where, f"missing keys {missing}")
    return cls(**arguments)


@dataclass(frozen=True)
class EncoderConfig:
    """The audio tower: conv stem, pre-LayerNorm blocks over one chunk, pool, projection."""

    layers: int
    width: int  # E
    heads: int
    ffn: int
    block_frames: int = 200  # native block of offline mode: 2 s of mel frames
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        _positive(self, "layers", "width", "heads", "ffn", "block_frames")
        _positive_number(self, "norm_eps")
        _require(
            self.width % (2 * self.heads) == 0,
            "EncoderConfig.width",
            f"{self.width} must be a multiple of 2 x heads ({self.heads})",
        )
        _require(
            self.block_frames % FRAMES_PER_TOKEN == 0,
            "EncoderConfig.block_frames",
            f"{self.block_frames} must be a multiple of {FRAMES_PER_TOKEN}",
        )

    @property
    def head_width(self) -> int:
        return self.width // self.heads


@dataclass(frozen=True)
class DecoderConfig:
    """The language model (Qwen2.5 architecture)."""

    layers: int  # L
    width: int  # D
    heads: int  # H
    kv_heads: int  # G
    head_width: int  # K
    ffn: int  # I
    vocab: int  # ids below this exist
    vocab_padded: int  # V: rows of the embedding and of the head
    rope_base: float = 1e6
    norm_eps: float = 1e-6
    tied: bool = False  # the head shares the embedding's rows

    def __post_init__(self) -> None:
        _positive(self, "layers", "width", "heads", "kv_heads", "head_width", "ffn", "vocab", "vocab_padded")
        _positive_number(self, "rope_base", "norm_eps")
        where = "DecoderConfig"
        _require(isinstance(self.tied, bool), f"{where}.tied", f"must be true or false, got {self.tied!r}")
        _require(self.heads % self.kv_heads == 0, f"{where}.heads", "must be a multiple of kv_heads")
        _require(self.head_width % 2 == 0, f"{where}.head_width", "must be even (rotate-half RoPE)")
        _require(self.vocab <= self.vocab_padded, f"{where}.vocab", "is larger than vocab_padded")

    @property
    def qkv_rows(self) -> int:
        return (self.heads + 2 * self.kv_heads) * self.head_width


@dataclass(frozen=True)
class TokenIds:
    """Control tokens of the protocol. They belong to a checkpoint, never to code."""

    text_begin: int
    text_end: int
    audio_begin: int
    audio_end: int
    audio_pad: int
    user: int
    assistant: int
    keep_silence: int
    online: int
    offline: int
    system: int
    language: int
    emotions: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _require(
            isinstance(self.emotions, dict) and all(isinstance(name, str) for name in self.emotions),
            "TokenIds.emotions",
            f"must be a table of names to ids, got {self.emotions!r}",
        )
        for name, value in self.named().items():
            _require(
                isinstance(value, int) and not isinstance(value, bool) and value >= 0,
                f"TokenIds.{name}",
                f"must be a non-negative integer, got {value!r}",
            )
        _require(
            self.keep_silence != self.text_begin,
            "TokenIds.keep_silence",
            "equals text_begin: the two decisions must be two tokens",
        )

    def named(self) -> dict[str, int]:
        plain = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "emotions"}
        return plain | {f"emotions.{name}": value for name, value in self.emotions.items()}


# The published checkpoint's ids (released code, TOKENS.py); audio_pad is the online PAD slot.
PUBLISHED_TOKENS = TokenIds(
    text_begin=151644,
    text_end=151643,
    audio_begin=151647,
    audio_end=151648,
    audio_pad=151608,
    user=151601,
    assistant=151602,
    keep_silence=151605,
    online=151609,
    offline=151610,
    system=151644,
    language=151611,
    emotions={
        "happy": 151614,
        "sad": 151615,
        "angry": 151616,
        "surprise": 151617,
        "normal": 151618,
        "urgent": 151619,
    },
)

PUBLISHED_SYSTEM_PROMPT = (
    "You are a helpful assistant. When there is no user text, if the audio contains a question, "
    "please answer it. If it is a sound effect, determine based on the sound whether help is needed."
)


@dataclass(frozen=True)
class ModelConfig:
    """Everything about a checkpoint but its weights and its tokenizer."""

    name: str
    encoder: EncoderConfig = field(metadata={"cls": EncoderConfig})
    decoder: DecoderConfig = field(metadata={"cls": DecoderConfig})
    tokens: TokenIds = field(metadata={"cls": TokenIds})
    system_prompt: str = ""
    threshold: float = 0.5  # p(respond) above which it responds where a session names none; 0.5: the argmax
    chunk_frames: int = 40  # mel frames in a listening chunk: 0.4 s

    def __post_init__(self) -> None:
        _text(self, "name", "system_prompt")
        _share(self, "threshold")
        _positive(self, "chunk_frames")
        _require(
            self.chunk_frames % FRAMES_PER_TOKEN == 0,
            "ModelConfig.chunk_frames",
            f"{self.chunk_frames} must be a multiple of {FRAMES_PER_TOKEN}",
        )
        for name, value in self.tokens.named().items():
            _require(
                value < self.decoder.vocab,
                f"ModelConfig.tokens.{name}",
                f"id {value} is outside the vocabulary of {self.decoder.vocab} (the checkpoint "
                "cannot be one for this protocol, or its vocabulary size is wrong)",
            )

    @property
    def chunk_samples(self) -> int:
        return self.chunk_frames * HOP_SAMPLES

    @property
    def chunk_tokens(self) -> int:
        return self.chunk_frames // FRAMES_PER_TOKEN

    @property
    def chunk_seconds(self) -> float:
        return self.chunk_samples / SAMPLE_RATE

    @property
    def chunk_rows(self) -> int:
        """Decoder rows of a listening step: control token, AUDIO_BEGIN, audio tokens, ASSISTANT."""
        return self.chunk_tokens + 3

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2, sort_keys=True)

    @classmethod
    def from_json(cls, text: str, where: str = "ModelConfig") -> ModelConfig:
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise ConfigError(f"{where}: not valid JSON: {error}") from error
        return from_mapping(cls, values, where)


def published_3b() -> ModelConfig:
    """The dims of the published 3B model (paper: Audio Interaction Model, arXiv 2606.05121)."""
    return ModelConfig(
        name="audio-interaction-3b",
        encoder=EncoderConfig(layers=32, width=1280, heads=20, ffn=5120),
        decoder=DecoderConfig(
            layers=36,
            width=2048,
            heads=16,
            kv_heads=2,
            head_width=128,
            ffn=11008,
            vocab=151_936,
            vocab_padded=151_936,
            rope_base=1e6,
        ),
        tokens=PUBLISHED_TOKENS,
        system_prompt=PUBLISHED_SYSTEM_PROMPT,
    )


def small(vocab: int = 512, layers: int = 2, name: str = "small") -> ModelConfig:
    """A few hundred thousand parameters for tests and benchmarks; not a trained model."""
    ids = iter(range(vocab - 32, vocab))
    take = {f.name: next(ids) for f in dataclasses.fields(TokenIds) if f.name != "emotions"}
    emotions = {n: next(ids) for n in ("happy", "sad", "angry", "surprise", "normal", "urgent")}
    return ModelConfig(
        name=name,
        encoder=EncoderConfig(layers=layers, width=64, heads=2, ffn=128),
        decoder=DecoderConfig(
            layers=layers,
            width=64,
            heads=4,
            kv_heads=2,
            head_width=16,
            ffn=96,
            vocab=vocab,
            vocab_padded=vocab,
            rope_base=1e4,
        ),
        tokens=TokenIds(**take, emotions=emotions),
        system_prompt="",
    )
