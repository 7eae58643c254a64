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
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum

import numpy as np
import torch
from torch import Tensor

from ..config import ModelConfig
from ..text import Tokenizer, listening_ids, prefix_ids
from .shards import QUESTION, Stream, Turn

IGNORED = -100  # label of what is not learned
EARLY, LATE = 0.1, 0.2  # chances that the history of a training sequence gives an answer too soon, too late
LATE_CHUNKS = (0.6, 0.25, 0.15)  # by one chunk, two, three
UNKNOWN_CHUNKS = 4  # in which an answer that nobody knows may be given
SOON_S = 0.3  # so long before its answer is due a sound that goes on may be answered


@dataclass(frozen=True)
class Reply:
    """One response; emotion is a name of TokenIds.emotions or None; asked: it answers a question about what
    was heard.
    """

    text: str
    emotion: str | None = None
    asked: bool = False


@dataclass(frozen=True)
class Step:
    """One chunk: what the history says and what would have been right (None: silence); `free`: to answer
    and to wait are both right.
    """

    said: Reply | None = None
    wanted: Reply | None = None
    free: bool = False


class Due(IntEnum):
    """What is to be said at a decision: nothing, the answer to a question, digits, or anything else."""

    NOTHING, ANSWER, DIGITS, ALERT = range(4)


@dataclass(frozen=True)
class TokenSequence:
    """ids, labels int64 [T]; audio bool [T]: the slots the audio tokens fill, A a chunk, in order; due uint8
    [T]: what is Due at each decision, NOTHING elsewhere.
    """

    ids: Tensor
    labels: Tensor
    audio: Tensor
    due: Tensor


def plan(
    answers: Mapping[int, Reply],
    chunks: int,
    rng: np.random.Generator | None = None,
    free: Collection[int] = (),
) -> list[Step]:
    """Chunk -> the reply due there, for `chunks` chunks -> one step a chunk.

    With `rng`, some histories answer one chunk too soon (then silence is right where it was due) or up to
    three too late (then the answer is wanted until it is given). Digits move one by one: the first of a
    chunk may be written in the chunk before, and those that are late join the next.
    free: chunks in which the answer that is due in a later one may be given already.
    """
    steps, left = [Step() for _ in range(chunks)], dict(answers)
    for chunk in range(chunks):
        reply = left.get(chunk)
        if reply is None:
            continue
        roll = rng.random() if rng is not None else 1.0
        steps[chunk] = Step(said=reply, wanted=reply)
        if roll < EARLY and chunk > 0:
            _answer_sooner(steps, chunk, chunk - 1 in free)
        elif rng is not None and EARLY <= roll < EARLY + LATE:
            if written(reply.text):
                _write_later(steps, left, chunk, rng)
            else:
                _answer_later(steps, left, chunk, rng)
    for chunk in free:
        if chunk not in left:
            steps[chunk] = replace(steps[chunk], free=True)
    return steps


def _answer_sooner(steps: list[Step], chunk: int, right: bool) -> None:
    """Give the answer of a chunk, of digits the first, in the chunk before, if there is room; right: it may
    be given there.
    """
    reply, before = steps[chunk].wanted, steps[chunk - 1]
    assert reply is not None
    first, *rest = reply.text.split() if written(reply.text) else [reply.text]
    if before == Step():
        text = first
    elif before.said is not None and before.said == before.wanted and written(before.said.text + first):
        text = f"{before.said.text} {first}"
    else:
        return
    early = replace(reply, text=text)
    steps[chunk - 1] = Step(said=early, wanted=early if right else before.wanted)
    now = replace(reply, text=" ".join(rest)) if rest else None
    steps[chunk] = Step(said=now, wanted=now)


def _answer_later(steps: list[Step], left: Mapping[int, Reply], chunk: int, rng: np.random.Generator) -> None:
    """Move the answer of a chunk behind silence, if the chunks up to there are free."""
    reply, then = steps[chunk].wanted, chunk + 1 + int(rng.choice(len(LATE_CHUNKS), p=LATE_CHUNKS))
    if then < len(steps) and not any(between in left for between in range(chunk + 1, then + 1)):
        steps[chunk:then] = [Step(said=None, wanted=reply)] * (then - chunk)
        steps[then] = Step(said=reply, wanted=reply)


def _write_later(steps: list[Step], left: dict[int, Reply], chunk: int, rng: np.random.Generator) -> None:
    """Write some or none of the digits of a chunk in time, and the others with those of the next."""
    wanted, then = left[chunk], left.get(chunk + 1)
    if chunk + 1 == len(steps) or (then is not None and not written(then.text)):
        return
    digits = wanted.text.split()
    kept = int(rng.integers(len(digits)))
    said = replace(wanted, text=" ".join(digits[:kept])) if kept else None
    steps[chunk] = Step(said=said, wanted=wanted)
    rest = [*digits[kept:], *(then.text.split() if then else ())]
    left[chunk + 1] = replace(wanted, text=" ".join(rest))


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
    labels, due = [IGNORED] * len(ids), [Due.NOTHING] * len(ids)
    listen = listening_ids(config)
    for step in steps:
        ids += listen
        labels += [IGNORED] * len(listen)
        ids.append(t.keep_silence if step.said is None else t.text_begin)
        right = t.keep_silence if step.wanted is None else t.text_begin
        labels.append(IGNORED if step.free else right)
        due += [Due.NOTHING] * len(listen) + [_due(step.wanted)]
        if step.said is not None:
            spoken = reply_ids(config, tokenizer, step.said)
            ids += spoken
            labels += spoken if step.said == step.wanted else [IGNORED] * len(spoken)
            due += [Due.NOTHING] * len(spoken)
    tokens = torch.tensor(ids)
    kinds = torch.tensor(due, dtype=torch.uint8)
    return TokenSequence(tokens, torch.tensor(labels), tokens == t.audio_pad, kinds)


def _due(wanted: Reply | None) -> Due:
    if wanted is None:
        return Due.NOTHING
    return Due.DIGITS if written(wanted.text) else Due.ANSWER if wanted.asked else Due.ALERT


def due_chunk(answer_s: float, chunk_s: float) -> int:
    """The first chunk at whose end an answer due from `answer_s` on can be given."""
    return max(0, math.ceil(answer_s / chunk_s - 1e-9) - 1)


def free_chunks(turns: Iterable[Turn], chunks: int, chunk_s: float) -> set[int]:
    """The chunks before the one in which an answer is due, in which it may be given already: once a word
    has ended, or SOON_S before where a sound goes on. Where nobody knows the answer that is due, these and
    UNKNOWN_CHUNKS from then on.
    """
    found: set[int] = set()
    for turn in turns:
        if turn.answer_s is not None:
            soon_s = turn.end_s if turn.end_s < turn.answer_s else turn.answer_s - SOON_S
            due = due_chunk(turn.answer_s, chunk_s) + (0 if turn.reply else UNKNOWN_CHUNKS)
            found.update(range(due_chunk(soon_s, chunk_s), min(chunks, due)))
    return found


def written(text: str) -> bool:
    """Digits and nothing else: the transcript of spoken digits."""
    return text.replace(" ", "").isdigit()


def due_replies(turns: Iterable[Turn], chunks: int, chunk_s: float) -> dict[int, Reply]:
    """Chunk -> the reply due there. Digits that fall due in one chunk are written together, any other reply
    waits for the next free chunk; what falls behind the last chunk is dropped.
    """
    replies: dict[int, Reply] = {}
    due = [
        (turn.answer_s, Reply(turn.reply, turn.emotion, turn.label == QUESTION))
        for turn in turns
        if turn.answer_s is not None and turn.reply
    ]
    for answer_s, reply in sorted(due, key=lambda pair: pair[0]):
        chunk = due_chunk(answer_s, chunk_s)
        while chunk in replies and not (written(replies[chunk].text) and written(reply.text)):
            chunk += 1
        if chunk in replies:
            reply = replace(reply, text=f"{replies[chunk].text} {reply.text}")
        if chunk < chunks:
            replies[chunk] = reply
    return replies


def steps_of(
    turns: Sequence[Turn], chunks: int, chunk_s: float, rng: np.random.Generator | None = None
) -> list[Step]:
    """What is said and wanted in each of `chunks` chunks, given what is heard; `rng` as in `plan`."""
    return plan(due_replies(turns, chunks, chunk_s), chunks, rng, free_chunks(turns, chunks, chunk_s))


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
    return build(config, tokenizer, steps_of(stream.turns, chunks, chunk_s, rng), system_prompt)
