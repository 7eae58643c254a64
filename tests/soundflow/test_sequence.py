"""Token sequences: the runtime's own protocol, with labels where something is to be learned."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastloop.checkpoint import Model
from fastloop.config import ModelConfig
from fastloop.engine import Engine
from fastloop.engine.runner import StepBatch, StepResult
from fastloop.options import DecisionPolicy, EngineConfig, SessionConfig
from fastloop.soundflow.sequence import IGNORED, Reply, Step, build, plan
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


@given(chunks=st.integers(1, 30), due=st.sets(st.integers(0, 29), max_size=8), seed=st.integers(0, 999))
def test_a_plan_wants_every_answer_once_whatever_was_said(chunks: int, due: set[int], seed: int) -> None:
    answers = {chunk: ALARM for chunk in due if chunk < chunks}
    exact = plan(answers, chunks)
    assert [step.wanted is not None for step in exact] == [i in answers for i in range(chunks)]
    assert all(step.said == step.wanted for step in exact)
    steps = plan(answers, chunks, np.random.default_rng(seed))
    assert len(steps) == chunks
    for chunk in answers:
        early = chunk > 0 and steps[chunk - 1].said is not None and steps[chunk - 1].wanted is None
        assert steps[chunk].wanted is not None or early
