"""Token sequences: the runtime's own protocol, with labels where something is to be learned."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastloop.checkpoint import Model
from fastloop.config import ModelConfig
from fastloop.engine import Engine
from fastloop.engine.runner import StepBatch, StepResult
from fastloop.options import DecisionPolicy, EngineConfig, SessionConfig
from fastloop.soundflow.sequence import IGNORED, Due, Reply, Step, build, free_chunks, plan, steps_of, written
from fastloop.soundflow.shards import Turn
from fastloop.testing.cases import random_sound, random_weights
from fastloop.testing.streams import nano
from fastloop.text import Tokenizer

ALARM = Reply("An alarm is sounding!", "urgent")


@pytest.fixture(scope="module")
def config() -> ModelConfig:
    return nano()[0]


@pytest.fixture(scope="module")
def words() -> Tokenizer:
    return nano()[1]


def test_a_sequence_is_the_protocol_word_for_word(config: ModelConfig, words: Tokenizer) -> None:
    t = config.tokens
    steps = [Step(), Step(ALARM, ALARM), Step(), Step(ALARM, None), Step(None, ALARM)]
    made = build(config, words, steps, "Hello.")
    listen = [t.audio_begin, *[t.audio_pad] * 10, t.assistant]
    spoken = [t.emotions["urgent"], *words.encode(ALARM.text), t.text_end]
    no = IGNORED
    want: list[tuple[list[int], list[int]]] = [
        ([t.online, t.language, t.system, t.text_begin, *words.encode("Hello."), t.text_end], []),
        ([*listen, t.keep_silence], [*[no] * 12, t.keep_silence]),
        ([*listen, t.text_begin, *spoken], [*[no] * 12, t.text_begin, *spoken]),
        ([*listen, t.keep_silence], [*[no] * 12, t.keep_silence]),
        ([*listen, t.text_begin, *spoken], [*[no] * 12, t.keep_silence, *[no] * len(spoken)]),
        ([*listen, t.keep_silence], [*[no] * 12, t.text_begin]),
    ]
    assert made.ids.tolist() == [i for ids, _ in want for i in ids]
    assert made.labels.tolist() == [no] * len(want[0][0]) + [label for _, labels in want for label in labels]
    assert made.audio.tolist() == [i == t.audio_pad for i in made.ids.tolist()]


def test_a_silent_sequence_is_what_the_engine_feeds_its_decoder(
    config: ModelConfig, words: Tokenizer
) -> None:

    engine = Engine(Model(config, random_weights(config), words), EngineConfig(max_sessions=1))
    inner, fed = engine.runner.step, []

    def step(batch: StepBatch) -> StepResult:
        fed.extend(batch.ids.tolist())
        return inner(batch)

    engine.runner.step = step  # type: ignore[method-assign]
    session = engine.open(SessionConfig(policy=DecisionPolicy(1.0)))
    session.push(random_sound(2.0))
    engine.run_until_idle()
    made = build(config, words, [Step()] * 5).ids.tolist()
    assert made[-len(fed) - 1 : -1] == fed and made[-1] == config.tokens.keep_silence


def test_a_decision_is_about_digits_an_alert_or_an_answer(config: ModelConfig, words: Tokenizer) -> None:
    def turn(label: str, reply: str, at_s: float) -> Turn:
        return Turn("", reply, None, label, "", at_s - 0.3, at_s, at_s)

    turns = [
        turn("siren", "A siren!", 0.7),
        turn("question", "Waves.", 1.5),
        turn("question", "2.", 2.3),
        turn("spoken_digits", "2", 3.1),
    ]
    made = build(config, words, steps_of(turns, 9, 0.4))
    at = (made.ids[:-1] == config.tokens.assistant).nonzero().flatten() + 1  # of the decisions
    assert {i: Due(kind) for i, kind in enumerate(made.due[at].tolist()) if kind} == {
        1: Due.ALERT, 3: Due.ANSWER, 5: Due.ANSWER, 7: Due.DIGITS,
    }  # fmt: skip
    assert (made.labels[at] == config.tokens.text_begin).nonzero().flatten().tolist() == [1, 3, 5, 7]
    assert int((made.due != Due.NOTHING).sum()) == 4


REPLIES = st.one_of(st.just("An alarm is sounding!"), st.sampled_from(["3", "4 4", "1 2 3"]))


@given(
    due=st.dictionaries(st.integers(0, 29), REPLIES, max_size=12),
    chunks=st.integers(1, 30),
    seed=st.integers(0, 999),
)
def test_a_plan_says_everything_once_and_wants_it_until_it_is_said(
    due: dict[int, str], chunks: int, seed: int
) -> None:
    answers = {chunk: Reply(text) for chunk, text in due.items() if chunk < chunks}
    exact = plan(answers, chunks)
    assert [step.wanted is not None for step in exact] == [i in answers for i in range(chunks)]
    assert all(step.said == step.wanted for step in exact)
    steps = plan(answers, chunks, np.random.default_rng(seed))
    assert len(steps) == chunks
    said = [step.said.text for step in steps if step.said is not None]
    for kind in (written, lambda text: not written(text)):  # digits may move between chunks, in their order
        parts = " ".join(text for text in said if kind(text)).split()
        wanted = " ".join(reply.text for _, reply in sorted(answers.items()) if kind(reply.text)).split()
        assert parts == wanted
    for step, then in itertools.pairwise([*steps, Step()]):
        wanted, given = (reply.text.split() if reply else [] for reply in (step.wanted, step.said))
        if len(given) < len(wanted):  # late: what is left is wanted next
            assert then.wanted is not None
            left = wanted[len(given) :] if written(" ".join(wanted)) else wanted
            assert then.wanted.text.split()[: len(left)] == left


def test_where_an_answer_is_free_to_come_its_decision_is_not_learned(
    config: ModelConfig, words: Tokenizer
) -> None:
    def turn(label: str, end_s: float, answer_s: float) -> Turn:
        return Turn("", "3", None, label, "", 0.1, end_s, answer_s)

    digit, late, siren = (
        turn("spoken_digits", 0.75, 0.87),
        turn("spoken_digits", 0.85, 0.97),
        turn("siren", 5, 1.0),
    )
    assert free_chunks([digit], 9, 0.4) == {1}  # it ends before the chunk in which it settles
    assert free_chunks([late], 9, 0.4) == set()
    assert free_chunks([siren], 9, 0.4) == {1} and free_chunks([siren], 1, 0.4) == set()
    steps = plan({2: Reply("3")}, 4, free={1})
    assert [step.free for step in steps] == [False, True, False, False]
    made = build(config, words, steps)
    t = config.tokens
    decisions = made.labels[1:][made.ids[:-1] == t.assistant].tolist()
    assert decisions == [t.keep_silence, IGNORED, t.text_begin, t.keep_silence]
    answers, early = {1: Reply("2"), 2: Reply("3")}, set()
    for seed in range(300):
        found = plan(answers, 4, np.random.default_rng(seed), {1} if seed % 2 else ())
        early.add(tuple((step.said.text if step.said else "", step.said == step.wanted) for step in found))
    assert (("", True), ("2 3", True), ("", True), ("", True)) in early
    assert (("", True), ("2 3", False), ("", True), ("", True)) in early


def test_answers_come_early_in_time_and_up_to_three_chunks_late() -> None:
    delays = Counter()
    for seed in range(400):
        steps = plan({5: ALARM}, 12, np.random.default_rng(seed))
        delays[next(i for i, step in enumerate(steps) if step.said) - 5] += 1
    assert set(delays) == {-1, 0, 1, 2, 3} and delays[0] > 200


def test_digits_that_were_not_written_in_time_join_the_next() -> None:
    answers = {2: Reply("1 2"), 3: Reply("3")}
    found = {
        tuple(step.said.text if step.said else "" for step in plan(answers, 5, np.random.default_rng(seed)))
        for seed in range(400)
    }
    assert {("", "", "", "1 2 3", ""), ("", "", "1", "2 3", ""), ("", "", "1", "", "2 3")} <= found
