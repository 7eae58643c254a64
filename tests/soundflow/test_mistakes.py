"""Histories with mistakes: what is said goes astray, what is right stays."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastloop.config import small
from fastloop.soundflow.augment import Augment
from fastloop.soundflow.batches import Batches, BatchPlan
from fastloop.soundflow.features import FeatureSet
from fastloop.soundflow.mistakes import MISSED_CHUNKS, Mistakes, tempting_chunks
from fastloop.soundflow.questions import QUESTION
from fastloop.soundflow.sequence import Reply, Step, plan, written
from fastloop.soundflow.shards import Stream, Turn
from fastloop.testing.cases import byte_tokenizer

ALERTS = ("An alarm!", "Someone coughs.", "A dog!")
NAMES = ("A dog.", "A siren.", "Coughing.")
COUNTS = ("1.", "2.", "3.")
WHETHER = ("A dog? Yes.", "A dog? No.")
DIGITS = ("3", "4 4", "1 2 3")


def answered(reply: str, label: str) -> Turn:
    return Turn("", reply, "normal", label, "", 0.0, 1.0, 1.0)


TURNS = [answered(reply, "siren") for reply in (*ALERTS, *DIGITS)]
TURNS += [answered(reply, QUESTION) for reply in (*NAMES, *COUNTS, *WHETHER)]


def test_a_mistake_is_of_the_same_kind_as_what_was_right() -> None:
    mistakes, rng = Mistakes(TURNS, 0.5), np.random.default_rng(0)
    for group in (ALERTS, NAMES, COUNTS, WHETHER):
        for text in group:
            found = {mistakes.other(Reply(text, "normal"), rng) for _ in range(60)}
            assert found == {Reply(other, "normal") for other in group if other != text}
    for text in DIGITS:
        for _ in range(60):
            other = mistakes.other(Reply(text), rng).text
            pairs = list(zip(text.split(), other.split(), strict=True))
            assert written(other) and sum(a != b for a, b in pairs) == 1
    assert mistakes.other(Reply("Never said."), rng) == Reply("Never said.")


@given(
    due=st.dictionaries(
        st.integers(0, 29), st.sampled_from((*ALERTS, *NAMES, *COUNTS, *WHETHER, *DIGITS)), max_size=10
    ),
    tempting=st.sets(st.integers(0, 29)),
    chance=st.sampled_from([0.1, 0.5]),
    seed=st.integers(0, 999),
)
def test_mistakes_change_what_is_said_and_not_what_is_right(
    due: dict[int, str], tempting: set[int], chance: float, seed: int
) -> None:
    answers = {chunk: Reply(text, "normal") for chunk, text in due.items()}
    exact = plan(answers, 30)
    made = Mistakes(TURNS, chance).make(exact, tempting, np.random.default_rng(seed))
    assert len(made) == 30
    missed: Reply | None = None  # what is still wanted
    since = 0
    for chunk, (step, right) in enumerate(zip(made, exact, strict=True)):
        if right.wanted is not None:
            assert step.wanted == right.wanted
            missed, since = (step.wanted, chunk) if step.said is None else (None, 0)
            assert step.said is not None or not written(right.wanted.text)
        elif step.said is not None:
            assert step.wanted is None and chunk in tempting and step.said.text in ALERTS
            missed = None
        elif missed is not None and chunk < since + MISSED_CHUNKS:
            assert step == Step(wanted=missed)
        else:
            assert step == Step()


def test_each_mistake_comes_as_often_as_it_is_asked_for() -> None:
    mistakes, rng, chance, n = Mistakes(TURNS, 0.2), np.random.default_rng(0), 0.2, 2_000
    alert = Reply(ALERTS[0], "normal")
    exact = [Step(), *[Step()] * 4, Step(alert, alert), *[Step()] * 4]
    runs = [mistakes.make(exact, {1}, rng) for _ in range(n)]
    missed = sum(run[5].said is None for run in runs)
    other = sum(run[5].said not in (None, alert) for run in runs)
    unwanted = sum(run[1].said is not None for run in runs)
    spread = 5 * (n * chance * (1 - chance)) ** 0.5
    for count in (missed, other, unwanted):
        assert abs(count - n * chance) < spread
    assert mistakes.make([Step()] * 9, (), rng) == [Step()] * 9
    assert Mistakes(TURNS, 0.0).make(exact, {1}, rng) == exact


def test_what_tempts_is_what_is_to_be_ignored() -> None:
    def turn(label: str, start_s: float, end_s: float, **more: bool) -> Turn:
        return Turn("", None, None, label, "", start_s, end_s, None, **more)

    turns = [turn("dog", 0.5, 5.0), turn("typing", 8.0, 8.3), turn("rain", 0.0, 20.0, background=True)]
    turns += [turn(QUESTION, 12.0, 14.0), answered("An alarm!", "siren"), turn("dog", 19.5, 20.0)]
    assert tempting_chunks(turns, 48, 0.4) == {3, 20}  # 1.5 s and 8.3 s; 20 s is behind the 48 chunks


@pytest.mark.parametrize("chance", [0.0, 0.4])
def test_rows_hold_mistakes_where_they_are_asked_for(chance: float) -> None:
    siren = Turn("", "x y", None, "siren", "", 1.0, 3.0, 1.5)
    ignored = tuple(Turn("", None, None, "dog", "", at_s, at_s + 0.7, None) for at_s in (3.0, 6.0, 9.0))
    streams = tuple(Stream("s", "street", "a", "b", "train", 12.0, turns) for turns in ((siren,), ignored))
    features = FeatureSet(streams, ((0, 30), (30, 60)), np.zeros((60, 40, 128), np.float16))
    config = small()
    plan = BatchPlan(120, (12.0,), mistakes=chance, other_prompt=0.0)
    tokenizer = byte_tokenizer(config.decoder.vocab)
    batches = Batches(config, tokenizer, features, {"dog": 0}, seed=1, plan=plan, augment=Augment())
    t, unwanted, rows = config.tokens, 0, 0
    for number in range(8):
        batch = batches[number]
        for ids, active in zip(batch.ids, batch.active.split(30), strict=True):
            if bool(active.any()):  # dogs, and nothing to answer
                rows += 1
                unwanted += int(((ids[:-1] == t.assistant) & (ids[1:] == t.text_begin)).sum())
    assert rows > 0 and (unwanted > 0) == (chance > 0)
