"""The response: sampled ids -> emotion and text; tokenizer, legal tokens, streaming detokenisation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer as HFTokenizer
from torch import Tensor

from .config import ConfigError, ModelConfig

FIRST, LATER = 0, 1  # phases of a response: an emotion token is legal only as its first token
REPLACEMENT = "\ufffd"  # what a decoder prints for bytes that are not yet a whole character


class Tokenizer:
    """A `tokenizer.json` (Hugging Face tokenizers), text <-> ids; text never becomes a control token."""

    def __init__(self, inner: HFTokenizer) -> None:
        self._inner = inner
        self._inner.encode_special_tokens = True  # text that spells a control token stays text

    @classmethod
    def from_file(cls, path: str | Path) -> Tokenizer:
        """Read `tokenizer.json`; ConfigError where it is missing or not one."""
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"tokenizer {path}: cannot be read: {error}") from error
        return cls.from_json(text, str(path))

    @classmethod
    def from_json(cls, text: str, where: str = "tokenizer.json") -> Tokenizer:
        try:
            return cls(HFTokenizer.from_str(text))
        except Exception as error:  # the library raises bare Exception for malformed files
            raise ConfigError(f"tokenizer {where}: not a tokenizers JSON file: {error}") from error

    def to_json(self) -> str:
        return self._inner.to_str()

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return max(self._inner.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    def encode(self, text: str) -> list[int]:
        return list(self._inner.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int]) -> str:
        return self._inner.decode(list(ids), skip_special_tokens=True)


class TextStream:
    """Turns ids into text piece by piece; a character split over tokens is held back until it is whole.

    Only the last few ids are decoded again, so a long response costs O(1) a token, whatever its bytes.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []  # from the last safe cut on
        self._said = 0  # characters of decode(_ids) already out
        self.text = ""  # the whole text so far

    def push(self, token: int) -> str:
        """The new text after one more token; "" while a character is incomplete."""
        self._ids.append(token)
        whole = self._tokenizer.decode(self._ids)
        held = whole.endswith(REPLACEMENT)  # one character that the next bytes may still complete
        return self._emit(whole[:-1] if held else whole, held)

    def finish(self) -> str:
        """What is still held back (an incomplete character prints as U+FFFD)."""
        return self._emit(self._tokenizer.decode(self._ids), held=False)

    def export(self) -> dict[str, object]:
        """Plain data for snapshots; `TextStream.restore` continues from it."""
        return {"ids": self._ids, "said": self._said, "text": self.text}

    @classmethod
    def restore(cls, tokenizer: Tokenizer, values: dict[str, Any]) -> TextStream:
        stream = cls(tokenizer)
        stream._ids, stream._said, stream.text = list(values["ids"]), values["said"], values["text"]
        return stream

    def _emit(self, settled: str, held: bool) -> str:
        piece = settled[self._said :]
        self.text += piece
        # Keep one token as context, for decoders join words by what stands before; and the held character,
        # of which at most three bytes have come.
        self._ids = self._ids[-4:] if held else self._ids[-1:]
        self._said = len(self._tokenizer.decode(self._ids)) - held if self._ids else 0
        return piece


def banned_tokens(config: ModelConfig, device: torch.device | str = "cpu") -> Tensor:
    """bool [2, V]: ids that may not be drawn as the FIRST and as a LATER token of a response.

    Legal is text, TEXT_END, and an emotion as the first token. Control tokens and the padding rows of the
    vocabulary are banned.
    """
    banned = torch.zeros(2, config.decoder.vocab_padded, dtype=torch.bool, device=device)
    tokens = config.tokens
    control = set(tokens.named().values()) - {tokens.text_end}
    banned[:, sorted(control)] = True
    banned[FIRST, sorted(tokens.emotions.values())] = False
    banned[:, config.decoder.vocab :] = True
    return banned


def prefix_ids(config: ModelConfig, tokenizer: Tokenizer, mode: str, system_prompt: str | None) -> list[int]:
    """ONLINE|OFFLINE, language, SYSTEM, TEXT_BEGIN, prompt, TEXT_END: the pinned start of every stream."""
    t = config.tokens
    prompt = config.system_prompt if system_prompt is None else system_prompt
    start = t.online if mode == "online" else t.offline
    return [start, t.language, t.system, t.text_begin, *tokenizer.encode(prompt), t.text_end]


def listening_ids(config: ModelConfig) -> list[int]:
    """AUDIO_BEGIN, the audio slots of a chunk, ASSISTANT."""
    t = config.tokens
    return [t.audio_begin, *[t.audio_pad] * config.chunk_tokens, t.assistant]


def offline_ids(
    config: ModelConfig, tokenizer: Tokenizer, audio_tokens: int, user_text: str | None
) -> list[int]:
    """AUDIO_BEGIN, n audio slots, AUDIO_END, [USER TEXT_BEGIN text TEXT_END,] ASSISTANT, TEXT_BEGIN."""
    t = config.tokens
    question = [] if user_text is None else [t.user, t.text_begin, *tokenizer.encode(user_text), t.text_end]
    return [
        t.audio_begin,
        *[t.audio_pad] * audio_tokens,
        t.audio_end,
        *question,
        t.assistant,
        t.text_begin,
    ]
