"""Rows of training: excerpts and whole streams joined, what is asked in them, what is told of their past."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastloop.config import ConfigError, small
from fastloop.soundflow.augment import Augment
from fastloop.soundflow.batches import Batches, BatchPlan, Place, Places, cut, excerpt, sound_classes
from fastloop.soundflow.features import FeatureSet
from fastloop.soundflow.questions import answer
from fastloop.soundflow.recipe import frames_of, recipe
from fastloop.soundflow.sequence import due_chunk, steps_of
from fastloop.soundflow.shards import Stream, Turn
from fastloop.soundflow.sounds import sound_of
from fastloop.testing.cases import byte_tokenizer


def dense_stream(seed: int) -> Stream:
    """40 s with sounds of all kinds, some of them one over the other."""
    rng = np.random.default_rng(seed)
    turns = []
    for start_s in np.sort(rng.uniform(0, 38, rng.integers(0, 12))):
        end_s = start_s + rng.uniform(0.2, 6)
        label = str(rng.choice(["siren", "rain", "spoken_digits", "question"], p=[0.3, 0.3, 0.35, 0.05]))
        due_s = None if label == "rain" else start_s + 0.8 * (end_s - start_s)
        reply = None if due_s is None else "x"
        turns.append(Turn("", reply, None, label, "", float(start_s), float(min(end_s, 40.0)), due_s))
    return Stream("s", "street", "a", "b", "train", 40.0, tuple(turns))


@given(st.integers(0, 10_000))
def test_an_excerpt_asks_for_nothing_that_cannot_be_known_from_it(seed: int) -> None:
    stream = dense_stream(seed)
    at = int(np.random.default_rng(seed).integers(100))
    first, end = excerpt(stream, 100, 0.4, at - seed % 5, at + 1 + seed % 7)
    assert 0 <= first < end <= 100
    if (first, end) == (0, 100):
        return
    for turn in stream.turns:
        heard = turn.end_s > first * 0.4 and turn.start_s < end * 0.4
        if heard and turn.answer_s is not None:
            assert turn.start_s >= first * 0.4 - 1e-9, "its beginning, and maybe its answer, was before"
    inside = cut(stream.turns, first, end, 0.4)
    length = (end - first) * 0.4
    for turn in inside:
        assert 0 <= turn.start_s <= turn.end_s <= length + 1e-9
        assert turn.answer_s is None or due_chunk(turn.answer_s, 0.4) < end - first
    answered = [t for t in stream.turns if t.answer_s and first <= due_chunk(t.answer_s, 0.4) < end]
    assert sum(turn.reply is not None for turn in inside) == len(answered)


def asking_streams() -> tuple[Stream, ...]:
    """Streams of 12 s: sounds, with rain behind some, and at the end a question."""
    heard = (("siren", "dog"), ("dog",), ("siren", "coughing", "dog"), ("rooster",))
    texts = ("what did you hear first?", "did you hear a siren?", "how many times did you hear a dog?",
             "what did you hear?", "what did you hear last?")  # fmt: skip
    streams = []
    for i, (labels, text) in enumerate(itertools.product(heard, texts)):
        turns = []
        for at, label in zip((0.0, 2.0, 4.0), labels, strict=False):
            reply, due_s = ("Siren!", at + 0.5) if label == "siren" else (None, None)
            turns.append(Turn(label, reply, None, label, "", at, at + 1, due_s))
        if i % 3 == 0:
            turns.insert(0, Turn("rain", None, None, "rain", "", 0.0, 12.0, None, background=True))
        told = answer(text, labels)
        reply = None if told is None else told.text
        if reply is not None:
            turns.append(Turn(text, reply, "normal", "question", "", 8.1, 9.9, 10.02))
        streams.append(Stream(f"s{i}", "street", "a", "b", "train", 12.0, tuple(turns)))
    return tuple(streams)


@pytest.mark.parametrize("excerpts", [0.0, 1.0])
def test_what_is_asked_in_a_row_is_asked_about_the_row(excerpts: float) -> None:
    streams = asking_streams()
    places = tuple((30 * i, 30 * i + 30) for i in range(len(streams)))
    features = FeatureSet(streams, places, np.zeros((30 * len(streams), 40, 128), np.float16))
    config = small()
    plan = BatchPlan(chunks=64, rows_s=(25.6,), excerpts=excerpts, asks=0.5)
    batches = Batches(config, byte_tokenizer(config.decoder.vocab), features, sound_classes(streams, rare=1),
                      seed=0, plan=plan, augment=Augment())  # fmt: skip
    asked, unknown = 0, 0
    for seed in range(40):
        row, turns = batches._row(np.random.default_rng(seed), 64)
        assert sum(piece.frames for piece in row.pieces) >= 64 * 40
        heard: list[str] = []
        behind = {"rain"}
        for turn in turns:
            if turn.label != "question":
                heard += [turn.label] * (not turn.background)
                behind |= {turn.label} if turn.background else set()
                continue
            if turn.answer_s is None:
                continue  # due behind the row
            true = answer(turn.user, heard, behind)
            assert turn.reply == (None if true is None else true.text), (turn.user, heard)
            asked += true is not None
            unknown += true is None
            due = due_chunk(turn.answer_s, 0.4)
            steps = steps_of(turns, 64, 0.4)
            if true is None:
                assert all(step.free or step.said for step in steps[due : due + 4])
    assert asked > 40
    assert excerpts or unknown > 0, "streams that are joined make some questions unanswerable"


def test_what_happened_in_a_row_is_what_its_questions_are_answered_from() -> None:
    streams = asking_streams()
    places = tuple((30 * i, 30 * i + 30) for i in range(len(streams)))
    features = FeatureSet(streams, places, np.zeros((30 * len(streams), 40, 128), np.float16))
    config, plan = small(), BatchPlan(chunks=64, rows_s=(25.6,), excerpts=0.5, asks=0.5)
    batches = Batches(config, byte_tokenizer(config.decoder.vocab), features, sound_classes(streams, rare=1),
                      seed=0, plan=plan, augment=Augment())  # fmt: skip
    seen: Counter[str] = Counter()
    for seed in range(20):
        _, turns = batches._row(np.random.default_rng(seed), 64)
        past = batches._past(turns, 64)
        for turn in turns:
            end = int(turn.end_s / 0.4)
            if turn.label != "question" or turn.reply is None or end >= 64:
                continue
            ever, *told = ({name for name, at in batches.classes.items() if row[at]} for row in past[end])
            for asked, names in zip(("first", "last"), told, strict=True):
                (name,) = names
                if asked in turn.user:
                    assert turn.reply.lower() == f"{sound_of(name).words}.".lower()
            if turn.user == "did you hear a siren?":
                assert turn.reply == f"A siren? {'Yes' if 'siren' in ever else 'No'}."
            seen[turn.user] += 1
    assert len(seen) == 5 and min(seen.values()) > 3


@pytest.mark.parametrize(("balance", "share"), [(0.0, 3 / 33), (1.0, 1 / 2)])
def test_excerpts_are_around_answers_and_balance_makes_their_classes_alike(
    balance: float, share: float
) -> None:
    def lone(label: str, count: int) -> Stream:
        starts = [4.0 * i + 1 for i in range(count)]
        turns = [Turn(label, label, None, label, "", t, t + 0.5, t + 0.3) for t in starts]
        return Stream(label, "street", "a", "b", "train", 4.0 * count, tuple(turns))

    streams = (lone("dog", 30), lone("siren", 3))
    frames = np.zeros((330, 40, 128), np.float16)
    features = FeatureSet(streams, ((0, 300), (300, 330)), frames)
    config, plan = small(), BatchPlan(chunks=12, excerpts=1.0, balance=balance, around=2)
    tokenizer = byte_tokenizer(config.decoder.vocab)
    batches = Batches(config, tokenizer, features, sound_classes(streams, rare=1), seed=0, plan=plan,
                      augment=Augment())  # fmt: skip
    rng = np.random.default_rng(0)
    drawn = [batches._excerpt(rng) for _ in range(600)]
    assert all(0 <= first < end <= features.chunks(index) and end - first <= 5 for index, first, end in drawn)
    due = [[due_chunk(turn.answer_s or 0.0, 0.4) for turn in stream.turns] for stream in streams]
    around = [index for index, first, end in drawn if any(first <= at < end for at in due[index])]
    assert len(around) > 0.8 * len(drawn)
    assert sum(around) / len(around) == pytest.approx(0.9 * share + 0.1 / 2, abs=0.07)


def test_excerpts_are_around_what_is_ignored_too_rare_sounds_as_often_as_frequent_ones() -> None:
    bed = Turn("rain", None, None, "rain", "", 0.0, 40.0, None)
    streams = tuple(
        Stream(str(i), "street", "a", "b", "train", 40.0, (bed, *(
            Turn(label, None, None, label, "", t + 1, t + 1.8, None) for t in range(0, 40, 4))))
        for i, label in enumerate(["dog"] * 8 + ["typing"])
    )  # fmt: skip
    places = tuple((100 * i, 100 * i + 100) for i in range(9))
    features = FeatureSet(streams, places, np.zeros((900, 40, 128), np.float16))
    config, plan = small(), BatchPlan(chunks=12, excerpts=1.0, balance=1.0, around=2)
    batches = Batches(config, byte_tokenizer(config.decoder.vocab), features, {}, seed=0, plan=plan,
                      augment=Augment())  # fmt: skip
    assert not batches.answers.found and len(batches.ignored.found) == 90, "no bed among them"
    rng = np.random.default_rng(0)
    drawn = [batches._excerpt(rng) for _ in range(600)]
    heard = [index for index, first, end in drawn if any(first <= at < end for at in range(4, 100, 10))]
    assert sum(index == 8 for index, *_ in drawn) / len(drawn) == pytest.approx(
        0.25 * 0.5 + 0.75 / 9, abs=0.05
    )
    assert len(heard) > 0.25 * len(drawn)


def test_a_sound_can_be_asked_for_more_often() -> None:
    answers = [Place(i, 0, kind, kind) for i, kind in enumerate(["siren"] * 60 + ["chainsaw"] * 30)]

    def chainsaws(**plan: Any) -> float:
        """Share of what is drawn."""
        places, rng = Places(answers, BatchPlan(**plan)), np.random.default_rng(0)
        return sum(places.draw(rng).label == "chainsaw" for _ in range(2000)) / 2000

    assert chainsaws(balance=0.0) == pytest.approx(1 / 3, abs=0.04)
    assert chainsaws(balance=1.0) == pytest.approx(1 / 2, abs=0.04)
    assert chainsaws(balance=1.0, often={"chainsaw": 3.0}) == pytest.approx(3 / 4, abs=0.04)
    for often in ({"chainsaw": -1.0}, {"chainsaw": "3"}, ["chainsaw"], {"chainsaw": math.nan}):
        with pytest.raises(ConfigError, match=r"BatchPlan\.often"):
            BatchPlan(often=often)  # type: ignore[arg-type]


def test_every_excerpt_of_a_row_has_a_voice_of_its_own() -> None:
    streams = (Stream("s", "street", "a", "b", "train", 40.0, ()),)
    tone = np.full((100, 40, 128), -8.0, np.float16)
    tone[..., 60] = 0.0
    features = FeatureSet(streams, ((0, 100),), tone)
    config = small()
    tokenizer = byte_tokenizer(config.decoder.vocab)

    def heard_at(**plan: float) -> list[int]:
        """The loudest bin of every chunk of a row of 90."""
        batches = Batches(config, tokenizer, features, {}, seed=0, plan=BatchPlan(**plan),
                          augment=Augment(warp=0.15))  # fmt: skip
        row, _ = batches._row(np.random.default_rng(0), 90)
        frames = frames_of(features.kept, recipe([row], 90 * 40), 40)
        loudest = frames.argmax(dim=-1)
        assert frames.shape == (90, 40, 128)
        assert (loudest == loudest[:, :1]).all(), "one voice through a chunk"
        return loudest[:, 0].tolist()

    assert len(set(heard_at(excerpts=0.0))) == 1
    excerpts = heard_at(excerpts=1.0, around=3)
    assert len(set(excerpts)) > 5 and min(excerpts) < 60 < max(excerpts)


def test_rows_of_a_step_have_one_length_and_other_steps_have_others() -> None:
    streams = asking_streams()
    places = tuple((30 * i, 30 * i + 30) for i in range(len(streams)))
    features = FeatureSet(streams, places, np.zeros((30 * len(streams), 40, 128), np.float16))
    config, plan = small(), BatchPlan(chunks=16, rows_s=(1.6, 3.2, 6.4))
    batches = Batches(config, byte_tokenizer(config.decoder.vocab), features, {}, seed=0, plan=plan,
                      augment=Augment(), together=3)  # fmt: skip
    rows = [len(batches[number].ids) for number in range(36)]
    steps = [rows[first : first + 3] for first in range(0, 36, 3)]
    assert all(len(set(step)) == 1 for step in steps)
    assert {step[0] for step in steps} == {4, 2, 1}
