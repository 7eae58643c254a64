"""The first model's data: scenes whose event times are exact, sequences that are the runtime's own protocol,
training that resumes to the bit.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastloop.checkpoint import Model
from fastloop.config import SAMPLE_RATE, ConfigError, ModelConfig
from fastloop.engine import Engine
from fastloop.engine.runner import StepBatch, StepResult
from fastloop.options import DecisionPolicy, EngineConfig, SessionConfig
from fastloop.soundflow import scenes
from fastloop.soundflow.first_model import first_config
from fastloop.soundflow.first_scores import Answer, match, scores
from fastloop.soundflow.pool import Batches, Pool
from fastloop.soundflow.scenes import GAP_OTHER_S, GAP_SAME_S, LONGEST_S, Event, joined, scene
from fastloop.soundflow.sequence import HEARD_S, IGNORED, Reply, Step, answer_chunk, build, plan
from fastloop.soundflow.train import TrainConfig, Trainer, initial_weights
from fastloop.soundflow.vocabulary import OTHER_PROMPTS, REPLIES, tokenizer
from fastloop.testing.cases import random_sound, random_weights
from fastloop.text import Tokenizer

ALARM = REPLIES["alarm"]


@pytest.fixture(scope="module")
def words() -> Tokenizer:
    return tokenizer()


@pytest.fixture(scope="module")
def config(words: Tokenizer) -> ModelConfig:
    return first_config(words)


# ---- scenes


def test_a_scene_is_a_function_of_seed_and_index() -> None:
    made = {i: scene(7, i, 6.4) for i in (3, 0, 2)}
    for i, first in made.items():
        again = scene(7, i, 6.4)
        assert first.pcm.tobytes() == again.pcm.tobytes() and first.events == again.events
    assert made[0].pcm.tobytes() != made[2].pcm.tobytes() != scene(8, 2, 6.4).pcm.tobytes()


def test_event_times_are_exact_to_the_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over a silent bed, with sounds that are loud throughout: what is not zero is what the events say."""
    real = scenes.event_sound

    def block(rng: np.random.Generator, label: str, longest_s: float) -> np.ndarray:
        return np.ones(len(real(rng, label, longest_s)))

    def silent(rng: np.random.Generator, seconds: float) -> tuple[np.ndarray, list[str], float]:
        return np.zeros(round(seconds * SAMPLE_RATE)), ["nothing"], -60.0

    monkeypatch.setattr(scenes, "event_sound", block)
    monkeypatch.setattr(scenes, "_background", silent)
    count = 0
    for index in range(12):
        made = scene(1, index)
        heard = np.zeros(len(made.pcm), dtype=bool)
        for event in made.events:
            first, end = (round(t * SAMPLE_RATE) for t in (event.start_s, event.end_s))
            assert (event.start_s, event.end_s) == (first / SAMPLE_RATE, end / SAMPLE_RATE)
            heard[first:end] = True
            count += 1
        assert np.array_equal(made.pcm != 0, heard)
    assert count > 20


def test_events_keep_their_distance_and_their_length() -> None:
    for index in range(12):
        made = scene(2, index)
        assert made.pcm.dtype == np.float32 and np.abs(made.pcm).max() <= 0.99 + 1e-6
        assert np.isfinite(made.pcm).all()
        for event in made.events:
            assert 0 <= event.start_s < event.end_s <= 25.6
            assert event.end_s - event.start_s <= LONGEST_S[event.label] + 0.7  # the room's tail
        for before, after in zip(made.events, made.events[1:], strict=False):
            gap = GAP_SAME_S if before.label == after.label else GAP_OTHER_S
            assert after.start_s - before.end_s >= gap - 1 / SAMPLE_RATE


def test_a_joined_stream_is_its_scenes_one_after_another() -> None:
    whole, parts = joined(3, 4, 3, 6.4), [scene(3, i, 6.4) for i in (4, 5, 6)]
    assert whole.pcm.tobytes() == b"".join(part.pcm.tobytes() for part in parts)
    moved = [(e.label, e.start_s + 6.4 * i) for i, part in enumerate(parts) for e in part.events]
    assert [e.label for e in whole.events] == [label for label, _ in moved]
    assert [e.start_s for e in whole.events] == pytest.approx([start for _, start in moved])


# ---- sequences


@given(start=st.integers(0, 200_000), length=st.integers(1, 50_000))
def test_an_answer_is_due_in_the_first_chunk_that_heard_enough(start: int, length: int) -> None:
    start_s, end_s = start / SAMPLE_RATE, (start + length) / SAMPLE_RATE
    chunk = answer_chunk(start_s, end_s, 0.4)
    needed = min(HEARD_S, length / SAMPLE_RATE)
    assert (chunk + 1) * 0.4 - start_s >= needed - 1e-6
    assert chunk == 0 or chunk * 0.4 - start_s < needed


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


# ---- batches and training


def test_batches_depend_on_seed_and_number_alone(config: ModelConfig, words: Tokenizer) -> None:
    def batches() -> Batches:
        return Batches(config, words, Pool(config, 5, 8, seconds=3.2), REPLIES, OTHER_PROMPTS)

    forward, backward = batches(), batches()
    made = [forward[n] for n in (0, 1)]
    again = [backward[n] for n in (1, 0)][::-1]
    for one, other in zip(made, again, strict=True):
        for name in ("frames", "ids", "labels", "audio", "active"):
            assert torch.equal(getattr(one, name), getattr(other, name))
    assert made[0].frames.isfinite().all() and int(made[0].audio[0].sum()) == made[0].frames.shape[1] * 10


def test_training_resumes_to_the_bit(config: ModelConfig, words: Tokenizer, tmp_path: Path) -> None:
    drawn = Batches(config, words, Pool(config, 6, 6, seconds=3.2), REPLIES, OTHER_PROMPTS)

    def trainer(steps: int = 4) -> Trainer:
        return Trainer(config, TrainConfig(steps, warmup=1), initial_weights(config, 0, len(REPLIES)))

    whole, halves = trainer(), [trainer(), trainer()]
    for number in range(4):
        whole.advance(drawn[number])
    for number in range(2):
        halves[0].advance(drawn[number])
    halves[0].save(tmp_path / "state")
    halves[1].load(tmp_path / "state")
    assert [path.name for path in tmp_path.iterdir()] == ["state"]
    for number in range(halves[1].step, 4):
        losses = halves[1].advance(drawn[number])
    assert math.isfinite(losses.decision)
    for name, weight in whole.weights.items():
        assert torch.equal(weight, halves[1].weights[name]), name
    with pytest.raises(ConfigError, match="was trained for 4 steps, this run for 9"):
        trainer(9).load(tmp_path / "state")


def test_scores_are_what_a_hand_counts() -> None:
    events = [Event("alarm", 1.0, 3.0), Event("bell", 5.0, 6.0), Event("beep", 9.0, 9.5)]
    answers = [Answer(1.6, ALARM), Answer(2.0, ALARM), Answer(6.8, Reply("No.", None)), Answer(11.2, ALARM)]
    outcome = match(events, answers, 36.0)
    assert [hit and hit.t_s for _, hit in outcome.answered] == [1.6, 6.8, None]
    assert [a.t_s for a in outcome.false] == [2.0, 11.2]
    found = scores([outcome], REPLIES)
    assert (found.events, found.answers, found.precision, found.recall) == (3, 4, 0.5, pytest.approx(2 / 3))
    assert (found.false_per_hour, found.right_text) == (pytest.approx(200), 0.5)
    assert found.recall_by_class == {"alarm": 1.0, "bell": 1.0, "beep": 0.0}
    assert (found.latency_median_s, found.latency_p95_s) == (pytest.approx(1.2), pytest.approx(1.8))
