"""Token sequences with labels: what the model reads during a stream, and what it should have said.

    prefix, then per chunk: AUDIO_BEGIN, PAD x A, ASSISTANT, and
        KEEP_SILENCE                                  where it stays silent
        TEXT_BEGIN [emotion] text TEXT_END            where it responds

Labels stand at the token they name (a trainer compares them with the logits one position earlier):
decisions, emotion, text and TEXT_END carry a label, everything else IGNORED. What was said and what
should have been said may differ: a sequence can hold a late or early response, labelled with what is
right given that history, so that a model learns to go on sensibly after its own mistakes (as in DAgger,
Ross et al. 2011, arXiv 1011.0686). Protocol: Audio Interaction Model, arXiv 2606.05121.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..config import ModelConfig
from ..text import Tokenizer, listening_ids, prefix_ids
from .shards import Stream, Turn

IGNORED = -100  # label of what is not learned
EARLY, LATE = 0.1, 0.15  # chances that the history of a training sequence answers a chunk too soon, too late


@dataclass(frozen=True)
class Reply:
    """One response; emotion is a name of TokenIds.emotions or None."""

    text: str
    emotion: str | None = None


@dataclass(frozen=True)
class Step:
    """One chunk: what the history says and what would have been right (None: silence)."""

    said: Reply | None = None
    wanted: Reply | None = None


@dataclass(frozen=True)
class TokenSequence:
    """ids, labels int64 [T]; audio bool [T]: the slots the audio tokens fill, A a chunk, in order."""

    ids: Tensor
    labels: Tensor
    audio: Tensor


def plan(answers: Mapping[int, Reply], chunks: int, rng: np.random.Generator | None = None) -> list[Step]:
    """Chunk -> the reply due there, for `chunks` chunks -> one step a chunk.

    With `rng`, some histories answer one chunk too soon (then silence is right where it was due) or one
    chunk too late (then the answer is still wanted in the chunk after).
    """
    steps = [Step() for _ in range(chunks)]
    for chunk, reply in sorted(answers.items()):
        roll = rng.random() if rng is not None else 1.0
        if roll < EARLY and chunk > 0 and steps[chunk - 1] == Step():
            steps[chunk - 1] = Step(said=reply, wanted=None)
        elif EARLY <= roll < EARLY + LATE and chunk + 1 < chunks and chunk + 1 not in answers:
            steps[chunk] = Step(said=None, wanted=reply)
            steps[chunk + 1] = Step(said=reply, wanted=reply)
        else:
            steps[chunk] = Step(said=reply, wanted=reply)
    return steps


def reply_ids(config: ModelConfig, tokenizer: Tokenizer, reply: Reply) -> list[int]:
    """[emotion] text TEXT_END: what follows TEXT_BEGIN."""
    t = config.tokens
    emotion = [] if reply.emotion is None else [t.emotions[reply.emotion]]
    return [*emotion, *tokenizer.encode(reply.text), t.text_end]


def build(
    config: ModelConfig, tokenizer: Tokenizer, steps: Sequence[Step], system_prompt: str | None = None
) -> TokenSequence:
    """One online stream of len(steps) chunks -> its tokens and labels."""
    t = config.tokens
    ids = prefix_ids(config, tokenizer, "online", system_prompt)
    labels = [IGNORED] * len(ids)
    listen = listening_ids(config)
    for step in steps:
        ids += listen
        labels += [IGNORED] * len(listen)
        ids.append(t.keep_silence if step.said is None else t.text_begin)
        labels.append(t.keep_silence if step.wanted is None else t.text_begin)
        if step.said is not None:
            spoken = reply_ids(config, tokenizer, step.said)
            ids += spoken
            labels += spoken if step.said == step.wanted else [IGNORED] * len(spoken)
    tokens = torch.tensor(ids)
    return TokenSequence(tokens, torch.tensor(labels), tokens == t.audio_pad)


def due_chunk(answer_s: float, chunk_s: float) -> int:
    """The first chunk at whose end an answer due from `answer_s` on can be given."""
    return max(0, math.ceil(answer_s / chunk_s - 1e-9) - 1)


def written(text: str) -> bool:
    """Digits and nothing else: the transcript of spoken digits."""
    return text.replace(" ", "").isdigit()


def due_replies(turns: Iterable[Turn], chunks: int, chunk_s: float) -> dict[int, Reply]:
    """Chunk -> the reply due there. Digits that fall due in one chunk are written together, any other reply
    waits for the next free chunk; what falls behind the last chunk is dropped.
    """
    replies: dict[int, Reply] = {}
    due = [
        (turn.answer_s, Reply(turn.reply, turn.emotion))
        for turn in turns
        if turn.answer_s is not None and turn.reply
    ]
    for answer_s, reply in sorted(due, key=lambda pair: pair[0]):
        chunk = due_chunk(answer_s, chunk_s)
        while chunk in replies and not (written(replies[chunk].text) and written(reply.text)):
            chunk += 1
        if chunk in replies:
            reply = Reply(f"{replies[chunk].text} {reply.text}", reply.emotion)
        if chunk < chunks:
            replies[chunk] = reply
    return replies


def token_sequence(
    config: ModelConfig,
    tokenizer: Tokenizer,
    stream: Stream,
    system_prompt: str | None = None,
    rng: np.random.Generator | None = None,
) -> TokenSequence:
    """A stream -> its ids and labels, whole chunks (the last one filled up with silence).

    rng: some histories answer too soon or too late, as `plan` has it.
    """
    chunk_s = config.chunk_seconds
    chunks = math.ceil(stream.seconds / chunk_s - 1e-9)
    steps = plan(due_replies(stream.turns, chunks, chunk_s), chunks, rng)
    return build(config, tokenizer, steps, system_prompt)
