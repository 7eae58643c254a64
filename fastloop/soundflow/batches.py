"""Kept features -> training batches. Batch n is a function of (seed, n) and of nothing else: not of time,
of what was drawn before, or of how many processes train. So a run that resumes draws what it would have.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..config import ConfigError, ModelConfig
from ..text import Tokenizer
from .ahead import Packed
from .augment import Augment, draw_move, draw_settings, draw_tempo, draw_voice
from .features import FeatureSet
from .objective import Batch, collate
from .questions import answer, ask
from .recipe import Piece, Recipe, Row, frames_of, recipe
from .sequence import build, due_chunk, steps_of
from .shards import QUESTION, Stream, Turn
from .sounds import DIGITS, sound_of

LONGEST_EXCERPT = 40  # chunks
IGNORED, ANYWHERE = 0.25, 0.1  # of excerpts are around what is to be ignored, and anywhere
HEARD_S = 0.5  # what a cut leaves less of nobody is asked about
ASKED_S = 0.4  # what is asked can be told apart in the last of a question
ROW = 1  # names the random numbers that tell the length of a row
RARE = 20  # what is heard, or replied, in fewer turns has no class of its own


@dataclass(frozen=True)
class BatchPlan:
    """How a batch is drawn.

    chunks: in a batch. rows_s: lengths of a row in seconds; a batch has one of them.
    balance: 0 draws streams (for excerpts, answers) alike, 1 so that every class of answer comes up alike.
    excerpts: chance that a row is made of excerpts: a few seconds around an answer, of many streams, cut
        and joined at chunks. Answers are rare in whole streams; here they are frequent.
    around: most chunks of an excerpt before the answer, and from it on.
    asks: chance that an excerpt is followed by a question about the row so far, in a recording of the same
        words from any stream.
    often: label of a sound -> how many times as often as `balance` says there are excerpts around it.
    other_prompt: chance that a row has another system prompt than the model's own.
    """

    chunks: int = 384
    rows_s: tuple[float, ...] = (12.8, 25.6)
    balance: float = 0.5
    excerpts: float = 0.0
    around: int = 6
    asks: float = 0.0
    often: Mapping[str, float] = field(default_factory=dict)
    other_prompt: float = 0.3

    def __post_init__(self) -> None:
        if not isinstance(self.rows_s, (list, tuple)) or not self.rows_s:
            raise ConfigError(f"BatchPlan.rows_s: must be a list of seconds, got {self.rows_s!r}")
        object.__setattr__(self, "rows_s", tuple(self.rows_s))  # a list, where it comes from YAML or JSON
        often = self.often.values() if isinstance(self.often, Mapping) else [None]
        if not all(isinstance(times, (int, float)) and 0 <= times < math.inf for times in often):
            raise ConfigError(f"BatchPlan.often: must be label -> number from 0 on, got {self.often!r}")


def heard_as(turn: Turn) -> str:
    """What the probes call a turn, whether it is answered or not: the digit itself, or the label."""
    if turn.label != QUESTION and sound_of(turn.label).family == "digits":
        return DIGITS.get(turn.user, turn.label)
    return turn.label


def happens(stream: Stream) -> list[Turn]:
    """The turns of a stream without its background, what is ignored from its beginning to its end."""
    return [
        turn
        for turn in stream.turns
        if turn.reply is not None or turn.start_s > 0 or turn.end_s < stream.seconds - 0.01
    ]


def asked(turn: Turn) -> str:
    """A question's words, "" for anything else."""
    return turn.user if turn.label == QUESTION else ""


def sound_classes(streams: Iterable[Stream], rare: int = RARE) -> dict[str, int]:
    """What the probes tell apart: everything that is heard in at least `rare` turns (of little data, what is
    heard most); from 0 on.
    """
    events = [turn for stream in streams for turn in happens(stream)]
    counts = Counter(name for turn in events for name in {heard_as(turn), asked(turn), turn.label})
    del counts[""]
    least = min(rare, max(counts.values(), default=rare))
    return {name: i for i, name in enumerate(sorted(n for n in counts if counts[n] >= least))}


def answer_class(turn: Turn) -> str:
    """What `balance` calls an answered turn: its reply; all questions are one class."""
    return QUESTION if turn.label == QUESTION else turn.reply or ""


class Drawn(NamedTuple):
    """A batch whose frames are told and not made; those of `rest` are empty."""

    frames: Recipe
    chunk_frames: int
    rest: Batch

    def packed(self) -> Packed:
        """All tensors in one."""
        return Packed.of([*self.frames, *self.rest])

    @staticmethod
    def unpacked(packed: Packed, chunk_frames: int) -> Drawn:
        """What was packed, where it lies now."""
        tensors = packed.tensors()
        told = len(Recipe._fields)
        return Drawn(Recipe(*tensors[:told]), chunk_frames, Batch(*tensors[told:]))

    def made_of(self, kept: Tensor) -> Batch:
        """The batch, of the kept frames [frames, C], on their device."""
        return self.rest._replace(frames=frames_of(kept, self.frames, self.chunk_frames))


class Batches:
    """Batches of a feature set; `batches[n]` is batch n. Of every `together` batches, the rows have one
    length: those of a step are computed side by side, and none waits for another.
    """

    def __init__(
        self,
        config: ModelConfig,
        tokenizer: Tokenizer,
        features: FeatureSet,
        classes: dict[str, int],
        *,
        seed: int,
        plan: BatchPlan,
        augment: Augment,
        prompts: Sequence[str] = (),
        together: int = 1,
        multiple: int = 1,
    ) -> None:
        """multiple: the tokens of a row are filled up to a multiple of it."""
        self.together, self.multiple = together, multiple
        self.config, self.tokenizer, self.features, self.classes = config, tokenizer, features, classes
        self.seed, self.plan, self.augment, self.prompts = seed, plan, augment, tuple(prompts)
        self.silent = [i for i, stream in enumerate(features.streams) if stream.silent]
        self.weights = self._weights()
        self.answers, self.ignored = self._places()
        self.recorded = self._recorded()

    def _places(self) -> tuple[Places, Places]:
        """The chunk of every answer but those to questions, and one of everything that happens and is not
        answered: what happens is asked about, too.
        """
        answers, ignored = list[Place](), list[Place]()
        for index, stream in enumerate(self.features.streams):
            for turn in happens(stream):
                if turn.label == QUESTION:
                    continue
                if turn.answer_s is not None:
                    answers.append(
                        Place(index, self._chunk(index, turn.answer_s), answer_class(turn), turn.label)
                    )
                elif not turn.background:
                    heard_s = min(turn.start_s + 1.0, turn.end_s)
                    ignored.append(Place(index, self._chunk(index, heard_s), turn.label, turn.label))
        return Places(answers, self.plan), Places(ignored, self.plan)

    def _chunk(self, index: int, at_s: float) -> int:
        """The chunk of a stream at whose end what is due at at_s can be given."""
        return min(self.features.chunks(index) - 1, due_chunk(at_s, self.config.chunk_seconds))

    def _recorded(self) -> dict[str, list[tuple[int, int, int]]]:
        """The words of a question -> stream, first chunk, end of every recording of them, with the chunk in
        which the answer is due.
        """
        chunk_s, found = self.config.chunk_seconds, defaultdict(list)
        for index, stream in enumerate(self.features.streams):
            for turn in stream.turns:
                if turn.label == QUESTION and turn.answer_s is not None:
                    end = self._chunk(index, turn.answer_s) + 1
                    found[turn.user].append((index, int(turn.start_s / chunk_s), end))
        return dict(found)

    def _weights(self) -> np.ndarray:
        """Chance of each stream [streams]: the mean of count^-balance over the classes of its answers."""
        answers = [
            [answer_class(turn) for turn in stream.turns if turn.reply is not None]
            for stream in self.features.streams
        ]
        counts = _shared(Counter(c for found in answers for c in found))
        typical = np.median([counts[c] for c in counts]) if counts else 1.0
        rare = [
            np.mean([(typical / counts[c]) ** self.plan.balance for c in f]) if f else 1.0 for f in answers
        ]
        return np.array(rare) / np.sum(rare)

    def __getitem__(self, number: int) -> Batch:
        return self.draw(number).made_of(self.features.kept)

    def draw(self, number: int) -> Drawn:
        """Batch `number`, its frames told and not made."""
        rng = np.random.default_rng([self.seed, number])
        chunk_s, chunk_frames = self.config.chunk_seconds, self.config.chunk_frames
        length = max(1, round(self._row_s(number) / chunk_s))
        rows, active, past, sequences = [], [], [], []
        for _ in range(max(1, self.plan.chunks // length)):
            row, turns = self._row(rng, length)
            prompt = None
            if self.prompts and rng.random() < self.plan.other_prompt:
                prompt = str(rng.choice(self.prompts))
            steps = steps_of(turns, length, chunk_s, rng)
            rows.append(row)
            active.append(self._active(turns, length))
            past.append(self._past(turns, length))
            sequences.append(build(self.config, self.tokenizer, steps, prompt))
        fill = self.config.tokens.audio_begin
        rest = collate(torch.empty(0), torch.cat(active), torch.cat(past), sequences, fill, self.multiple)
        return Drawn(recipe(rows, length * chunk_frames), chunk_frames, rest)

    def _row_s(self, number: int) -> float:
        """Seconds of a row of a batch."""
        rng = np.random.default_rng([self.seed, number // self.together, ROW])
        return float(rng.choice(self.plan.rows_s))

    def _row(self, rng: np.random.Generator, length: int) -> tuple[Row, list[Turn]]:
        """Streams or excerpts joined to `length` chunks, and the turns in the row's time. What is asked is
        asked about the row.
        """
        settings = draw_settings(self.augment, rng)
        tempo = draw_tempo(settings, rng)
        row = _Joined(self.features, self.config.chunk_seconds)
        wanted = math.ceil(length * tempo)
        short = rng.random() < self.plan.excerpts
        while row.chunks < wanted:
            if not short:
                index = int(rng.choice(len(self.weights), p=self.weights))
                row.add(index, 0, self.features.chunks(index))
                continue
            row.add(*self._excerpt(rng))
            if self.plan.asks and rng.random() < self.plan.asks:
                recordings = self.recorded.get(ask(rng, row.heard, row.behind).text)
                if recordings:
                    row.add(*recordings[int(rng.integers(len(recordings)))])
        pieces = [self._piece(*part, draw_voice(settings, rng)) for part in row.parts]
        end_s = length * self.config.chunk_seconds
        turns = [turn for turn in (played(turn, tempo) for turn in row.turns) if turn.start_s < end_s]
        return Row(pieces, tempo, draw_move(settings, rng), self._noise(rng)), turns

    def _piece(self, index: int, first: int, end: int, voice: float = 1.0) -> Piece:
        """The chunks first..end of a stream."""
        frames, start = self.config.chunk_frames, self.features.places[index][0]
        return Piece((start + first) * frames, (end - first) * frames, voice)

    def _excerpt(self, rng: np.random.Generator) -> tuple[int, int, int]:
        """Stream, first chunk, end: around one of the answers, around what is to be ignored, or anywhere."""
        around = self.plan.around
        before, after = int(rng.integers(1, around + 1)), int(rng.integers(2, max(around, 2) + 1))
        roll = rng.random()
        places = self.ignored if roll < IGNORED and self.ignored.found else self.answers
        if places.found and roll < 1 - ANYWHERE:
            index, at, *_ = places.draw(rng)
        else:
            index = int(rng.integers(len(self.features.streams)))
            at = int(rng.integers(self.features.chunks(index)))
        chunks = self.features.chunks(index)
        stream, chunk_s = self.features.streams[index], self.config.chunk_seconds
        return index, *excerpt(stream, chunks, chunk_s, at - before, at + after)

    def _noise(self, rng: np.random.Generator) -> Piece | None:
        """A silent stream."""
        if not self.silent:
            return None
        index = self.silent[int(rng.integers(len(self.silent)))]
        return self._piece(index, 0, self.features.chunks(index))

    def _active(self, turns: Sequence[Turn], chunks: int) -> Tensor:
        """bool [chunks, A, K]: which of the K classes are heard in the middle of each audio token."""
        count = chunks * self.config.chunk_tokens
        middle_s = (np.arange(count) + 0.5) * self.config.chunk_seconds / self.config.chunk_tokens
        active = np.zeros((count, len(self.classes)), dtype=np.bool_)
        for turn in turns:
            now = (turn.start_s <= middle_s) & (middle_s < turn.end_s)
            told = now & (middle_s >= turn.end_s - ASKED_S)
            for name, when in ((heard_as(turn), now), (turn.label, now), (asked(turn), told)):
                if name in self.classes:
                    active[when, self.classes[name]] = True
        return torch.from_numpy(active).unflatten(0, (chunks, self.config.chunk_tokens))

    def _past(self, turns: Sequence[Turn], chunks: int) -> Tensor:
        """bool [chunks, 3, K]: what has happened until each chunk ends, at all, first and last."""
        past = np.zeros((chunks, 3, len(self.classes)), dtype=np.bool_)
        happened = [turn for turn in turns if turn.label != QUESTION and not turn.background]
        for number, turn in enumerate(sorted(happened, key=lambda turn: turn.start_s)):
            known_s = turn.start_s + min(HEARD_S, turn.end_s - turn.start_s)
            since = due_chunk(known_s, self.config.chunk_seconds)
            past[since:, 2] = False
            if turn.label in self.classes:
                which = self.classes[turn.label]
                past[since:, [0, 2], which] = True
                past[since:, 1, which] |= number == 0
        return torch.from_numpy(past)


class Place(NamedTuple):
    """A chunk to make an excerpt around, the class of what is there, and its label."""

    stream: int
    chunk: int
    kind: str
    label: str


class Places:
    """Places, where the chance of each is count^-balance of its class, times `often` of its label."""

    def __init__(self, found: Sequence[Place], plan: BatchPlan) -> None:
        self.found = found
        counts = _shared(Counter(place.kind for place in found))
        often = [plan.often.get(place.label, 1.0) for place in found]
        rare = [counts[place.kind] ** -plan.balance for place in found]
        self.until = np.cumsum(np.array(often) * np.array(rare))

    def draw(self, rng: np.random.Generator) -> Place:
        """One of them, by chance."""
        at = np.searchsorted(self.until, rng.random() * self.until[-1], side="right")
        return self.found[min(int(at), len(self.found) - 1)]


class _Joined:
    """Pieces of streams, one behind the other: `parts`, stream, first chunk and end of each, and `turns` in
    the row's time. heard: labels of what has happened; behind: of what has lain under it.
    """

    def __init__(self, features: FeatureSet, chunk_s: float) -> None:
        self.features, self.chunk_s = features, chunk_s
        self.parts: list[tuple[int, int, int]] = []
        self.turns: list[Turn] = []
        self.chunks = 0
        self.heard: list[str] = []
        self.behind: set[str] = set()

    def add(self, index: int, first: int, end: int) -> None:
        """Append the chunks first..end of a stream. Its questions get the answers that are true in the row,
        or None where there is none.
        """
        stream = self.features.streams[index]
        pieces = cut(stream.turns, first, end, self.chunk_s)
        self.behind.update(turn.label for turn in pieces if turn.background)
        for turn in cut(happens(stream), first, end, self.chunk_s):
            if turn.label == QUESTION and turn.answer_s is not None:
                reply = answer(turn.user, self.heard, self.behind)
                told = (None, None) if reply is None else (reply.text, reply.emotion)
                turn = dataclasses.replace(turn, reply=told[0], emotion=told[1])
            elif not turn.background:
                self.heard.append(turn.label)
            self.turns.append(shifted(turn, self.chunks * self.chunk_s))
        self.parts.append((index, first, end))
        self.chunks += end - first


def _shared(counts: Counter[str]) -> dict[str, int]:
    """How often each class comes up, where all rare ones count as one."""
    rare = sum(n for n in counts.values() if n < RARE)
    return {name: n if n >= RARE else rare for name, n in counts.items()}


def excerpt(stream: Stream, chunks: int, chunk_s: float, first: int, end: int) -> tuple[int, int]:
    """The chunks first..end of a stream of `chunks`, or more, where a sound that was answered would be cut;
    the whole stream where that is long.

    No sound that was answered before the excerpt is heard in it: there it would look unanswered.
    """
    first, end = max(0, first), min(chunks, end)
    due = [turn for turn in stream.turns if turn.answer_s is not None]
    for turn in sorted(due, key=lambda turn: -turn.start_s):
        if turn.start_s < first * chunk_s < turn.end_s:
            first = int(turn.start_s / chunk_s)
    return (first, end) if 0 < end - first <= LONGEST_EXCERPT else (0, chunks)


def cut(turns: Sequence[Turn], first: int, end: int, chunk_s: float) -> list[Turn]:
    """What is heard in the chunks first..end, in their own time. An answer that is due behind them is not
    due at all.
    """
    start_s, end_s = first * chunk_s, end * chunk_s
    found = []
    for turn in turns:
        if turn.end_s <= start_s or turn.start_s >= end_s:
            continue
        answered = turn.answer_s is not None and first <= due_chunk(turn.answer_s, chunk_s) < end
        begin, stop = max(turn.start_s, start_s), min(turn.end_s, end_s)
        little = stop - begin < min(HEARD_S, turn.end_s - turn.start_s)
        moved = dataclasses.replace(
            turn,
            start_s=begin,
            end_s=stop,
            background=turn.background or (little and not answered),
            reply=turn.reply if answered else None,
            answer_s=turn.answer_s if answered else None,
        )
        found.append(shifted(moved, -start_s))
    return found


def shifted(turn: Turn, seconds: float) -> Turn:
    """The same turn, later."""
    answer_s = None if turn.answer_s is None else turn.answer_s + seconds
    return dataclasses.replace(
        turn, start_s=turn.start_s + seconds, end_s=turn.end_s + seconds, answer_s=answer_s
    )


def played(turn: Turn, tempo: float) -> Turn:
    """The same turn in a row that is played `tempo` times as fast."""
    answer_s = None if turn.answer_s is None else turn.answer_s / tempo
    return dataclasses.replace(
        turn, start_s=turn.start_s / tempo, end_s=turn.end_s / tempo, answer_s=answer_s
    )


def spoken(streams: Iterable[Stream]) -> list[str]:
    """All replies of the streams, as often as they are given: what a tokenizer is built from."""
    return [turn.reply for stream in streams for turn in stream.turns if turn.reply is not None]
