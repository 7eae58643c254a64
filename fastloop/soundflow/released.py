"""JSONL of the released training code (repository xzf-thu/Audio-Interaction), read and checked.

    online    {"conversation": [{"audio_path", "assistant", "emotion"}, ...]}, or flat with "merge_path";
              later steps of that code write {"turns": [...]} with frames of noise before each turn
    offline   {"user", "assistant", "audio_path"} or the first turn of a "conversation"
    tokens    {"tasks": "online" | "offline", "input_ids", "labels", "audio_pos", ...}, ready to train on

A reply "<no need to response>" (with or without brackets) is silence; an emotion that is not given is
"normal". Problems name file, line and field. conversations.py turns what is read into streams.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import ModelConfig
from ..text import Tokenizer, offline_ids, prefix_ids
from .clips import DataError
from .sequence import IGNORED, Due, Reply, TokenSequence
from .shards import SILENCE


@dataclass(frozen=True)
class OnlineTurn:
    """One clip of a conversation; reply None: silence."""

    audio: Path
    reply: Reply | None
    user: str = ""


@dataclass(frozen=True)
class OfflineSample:
    """One question; audio or user may be missing, not both."""

    assistant: str
    user: str = ""
    audio: Path | None = None


def _rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(file:line, object) of every line."""
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                where = f"{path}:{number}"
                try:
                    row = json.loads(line)
                except ValueError as error:
                    raise DataError(f"{where}: not valid JSON: {error}") from error
                if not isinstance(row, dict):
                    raise DataError(f"{where}: must be a JSON object, is a {type(row).__name__}")
                yield where, row
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error


def _text(row: dict[str, Any], name: str, where: str, required: bool = False) -> str:
    value = row.get(name)
    if value in (None, "", "None"):  # that code writes missing values so
        if required:
            raise DataError(f"{where}: field {name!r} is missing")
        return ""
    if not isinstance(value, str):
        raise DataError(f"{where}: field {name!r} is {value!r}, not text")
    return value


def _turns(row: dict[str, Any], where: str) -> list[dict[str, Any]]:
    turns = row.get("conversation") or row.get("turns") or [row]
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise DataError(f"{where}: field 'conversation' must be a list of objects")
    return turns


def silent(reply: str) -> bool:
    return reply.strip().lower().strip("<>") == SILENCE.strip("<>")


def read_online(path: Path) -> Iterator[tuple[OnlineTurn, ...]]:
    """The conversations of an online file; relative paths are relative to it."""
    for where, row in _rows(path):
        turns = []
        for number, turn in enumerate(_turns(row, where)):
            at = f"{where}: turn {number}"
            name = "audio_path" if turn.get("audio_path") else "merge_path"
            audio, said = path.parent / _text(turn, name, at, True), _text(turn, "assistant", at, True)
            reply = None if silent(said) else Reply(said, (_text(turn, "emotion", at) or "normal").lower())
            turns.append(OnlineTurn(audio, reply, _text(turn, "user", at)))
        yield tuple(turns)


def read_offline(path: Path) -> Iterator[OfflineSample]:
    """The questions of an offline file; of a conversation, the first turn counts."""
    for where, row in _rows(path):
        turn = _turns(row, where)[0]
        audio = _text(turn, "audio_path", where) or _text(turn, "merge_path", where)
        user = _text(turn, "user", where)
        if not audio and not user:
            raise DataError(f"{where}: has neither 'user' nor 'audio_path'")
        said = _text(turn, "assistant", where, True)
        yield OfflineSample(said, user, path.parent / audio if audio else None)


def read_tokens(path: Path, audio_token: int | None = None) -> Iterator[TokenSequence]:
    """Sequences that are ready to train on. audio_token: id that must stand in every audio slot."""
    for where, row in _rows(path):
        ids, labels = row.get("input_ids"), row.get("labels")
        for name, values in (("input_ids", ids), ("labels", labels)):
            if not isinstance(values, list) or not all(type(v) is int for v in values):
                raise DataError(f"{where}: field {name!r} must be a list of whole numbers")
        assert isinstance(ids, list) and isinstance(labels, list)
        if len(ids) != len(labels):
            raise DataError(f"{where}: {len(ids)} input_ids, but {len(labels)} labels")
        wrong = [i for i, (a, b) in enumerate(zip(ids, labels, strict=True)) if b not in (IGNORED, a)]
        if wrong:
            i = wrong[0]
            raise DataError(
                f"{where}: labels[{i}] is {labels[i]}, neither {IGNORED} nor input_ids[{i}] = {ids[i]}"
            )
        audio = torch.zeros(len(ids), dtype=torch.bool)
        for span in row.get("audio_pos") or []:
            if not (isinstance(span, list) and len(span) == 2 and 0 <= span[0] <= span[1] <= len(ids)):
                raise DataError(f"{where}: audio_pos has {span!r}, not [first, end) within {len(ids)} ids")
            audio[span[0] : span[1]] = True
        tokens = torch.tensor(ids)
        if audio_token is not None and bool((tokens[audio] != audio_token).any()):
            raise DataError(f"{where}: audio_pos covers ids other than {audio_token}")
        yield TokenSequence(tokens, torch.tensor(labels), audio, _nothing_due(tokens))


def offline_sequence(
    config: ModelConfig,
    tokenizer: Tokenizer,
    sample: OfflineSample,
    audio_tokens: int,
    prompt: str | None = None,
) -> TokenSequence:
    """prefix, [AUDIO_BEGIN, slots, AUDIO_END], [USER TEXT_BEGIN user TEXT_END], ASSISTANT TEXT_BEGIN
    assistant TEXT_END; the assistant's block is labelled, from ASSISTANT on, as the released code has it.
    """
    t = config.tokens
    ids = prefix_ids(config, tokenizer, "offline", prompt)
    if sample.audio is not None:
        ids += offline_ids(config, tokenizer, audio_tokens, sample.user or None)
    else:
        ids += [t.user, t.text_begin, *tokenizer.encode(sample.user), t.text_end, t.assistant, t.text_begin]
    answer = [*tokenizer.encode(sample.assistant), t.text_end]
    labels = [IGNORED] * (len(ids) - 2) + ids[-2:] + answer
    tokens = torch.tensor(ids + answer)
    return TokenSequence(tokens, torch.tensor(labels), tokens == t.audio_pad, _nothing_due(tokens))


def _nothing_due(tokens: Tensor) -> Tensor:
    return torch.full_like(tokens, Due.NOTHING, dtype=torch.uint8)
