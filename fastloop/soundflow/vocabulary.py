"""A small byte-level BPE, made for what a model is to say, with the control tokens on top."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as HFTokenizer

from ..config import TokenIds
from ..text import Tokenizer

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


def token_ids(words: Tokenizer) -> TokenIds:
    """Where the control tokens of `build_tokenizer` ended up: the last ids."""
    names = control_names()
    ids = dict(zip(names, range(words.vocab_size - len(names), words.vocab_size), strict=True))
    emotions = {name: ids.pop(name) for name in EMOTIONS}
    return TokenIds(**ids, emotions=emotions)
