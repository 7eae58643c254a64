"""A small byte-level BPE with the control tokens on top; the first model's replies and system prompts."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as HFTokenizer

from ..config import TokenIds
from ..text import Tokenizer
from .sequence import Reply

REPLIES = {
    "alarm": Reply("An alarm is sounding!", "urgent"),
    "bell": Reply("A bell rings.", "happy"),
    "beep": Reply("A beep.", "normal"),
}
SYSTEM_PROMPT = "Listen. Say what alarms, rings or beeps."
# Other prompts a user may give: the model answers as trained whatever they say, and must not trip over them.
OTHER_PROMPTS = (
    "",
    "You are a helpful assistant.",
    "Listen to the sound and tell me when help is needed.",
    "You are a helpful assistant. When there is no user text, if the audio contains a question, please "
    "answer it. If it is a sound effect, determine based on the sound whether help is needed.",
    "Warn me! 0123456789",
    "Stay silent through noise, rain, typing and voices; answer alarms, bells and beeps at once.",
)
EMOTIONS = ("happy", "sad", "angry", "surprise", "normal", "urgent")


def control_names() -> list[str]:
    """The control tokens in the order of their ids."""
    plain = [f.name for f in dataclasses.fields(TokenIds) if f.name != "emotions"]
    return [*plain, *EMOTIONS]


def build_tokenizer(texts: Iterable[str], vocab: int) -> Tokenizer:
    """256 bytes, the merges of the texts up to `vocab` ids, then the control tokens; deterministic. Text
    that was not in `texts` costs more tokens, but any text can be spelt.
    """
    inner = HFTokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=vocab, initial_alphabet=alphabet, show_progress=False)
    inner.train_from_iterator(texts, trainer)
    inner.add_special_tokens([AddedToken(f"<|{name}|>", special=True) for name in control_names()])
    return Tokenizer(inner)


def tokenizer() -> Tokenizer:
    """The first model's."""
    return build_tokenizer([*(r.text for r in REPLIES.values()), SYSTEM_PROMPT, *OTHER_PROMPTS] * 4, 480)


def token_ids(words: Tokenizer) -> TokenIds:
    """Where the control tokens of `build_tokenizer` ended up: the last ids."""
    names = control_names()
    ids = dict(zip(names, range(words.vocab_size - len(names), words.vocab_size), strict=True))
    emotions = {name: ids.pop(name) for name in EMOTIONS}
    return TokenIds(**ids, emotions=emotions)
