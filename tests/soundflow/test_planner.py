"""Grammars, outlines and plans: what may follow what, and what a language model may not say."""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastloop.soundflow import voices
from fastloop.soundflow.abilities import sub_task, sub_tasks
from fastloop.soundflow.clips import DataError
from fastloop.soundflow.grammar import parse_scenario, read_scenarios, shipped_scenarios
from fastloop.soundflow.grounding import ground
from fastloop.soundflow.llm import KEY_VARIABLE, LlmPlanner, parse_beats
from fastloop.soundflow.planner import GrammarPlanner, Outline, RandomPlanner
from fastloop.soundflow.scripts import Beat
from fastloop.soundflow.sounds import SYNTHETIC, Library, known_sounds, sound_of

BENCH = Path(__file__).parents[2] / "bench"
TINY = """
scene: test
beds: {rain: 1}
passing: {dog: 1}
events: {siren: 1, dog: 1, coughing: 1}
follows: {siren: {dog: 1000, coughing: 0.001, siren: 0.001}}
rules: [{event: dog, after: siren, within_s: 9, reply: "Calm the dog.", emotion: urgent}]
"""


def tiny(library: Library) -> GrammarPlanner:
    return GrammarPlanner((parse_scenario(TINY, "tiny"),), library)


# ---- files


def test_the_shipped_grammars_name_known_sounds_only() -> None:
    scenarios = shipped_scenarios()
    assert len(scenarios) >= 5 and len({s.scene for s in scenarios}) == len(scenarios)
    yard = read_scenarios([BENCH / "yard.yaml"])
    assert {label for s in yard for label in s.events if sound_of(label).reply} >= {
        "chainsaw",
        "crackling_fire",
    }
    for scenario in (*scenarios, *yard):
        for label in (*scenario.beds, *scenario.passing, *scenario.events):
            assert label in known_sounds(), f"{scenario.scene}: {label}"
        assert not any(sound_of(label).reply for label in (*scenario.beds, *scenario.passing))
        assert any(sound_of(label).reply for label in scenario.events)
        assert scenario in yard or (scenario.follows and scenario.rules)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("scene: [", "not valid YAML"),
        ("scene: x", "beds"),
        ("{scene: x, beds: {a: 1}, events: {a: 1}, colour: red}", "colour"),
        ("{scene: x, beds: [a], events: {a: 1}}", "beds: must be a mapping"),
        ("{scene: x, beds: {a: 1}, events: {a: -1}}", "events: 'a': -1"),
        ("{scene: x, beds: {a: 1}, events: {a: 1}, follows: {b: {a: 2}}}", "'b'"),
        ("{scene: x, beds: {a: 1}, events: {a: 1}, rules: [{event: a}]}", "rules[0]"),
        ("{scene: x, beds: {a: 1}, events: {a: 1}, rules: [{event: a, after: a, within_s: no}]}", "within_s"),
        ("{scene: x, beds: {a: 1}, events: {a: 1}, rules: 7}", "rules a list"),
    ],
)
def test_a_grammar_that_is_wrong_is_refused_by_field(text: str, named: str) -> None:
    with pytest.raises(DataError, match=r"^file\.yaml: ") as error:
        parse_scenario(text, "file.yaml")
    assert named in str(error.value)


def test_a_grammar_that_is_missing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.yaml"):
        read_scenarios([tmp_path / "none.yaml"])


def test_the_table_has_seven_abilities_and_28_sub_tasks_of_which_each_ability_makes_two() -> None:
    table = sub_tasks()
    made = Counter(task.ability for task in table.values() if task.generated)
    assert len(table) == 28 and len(made) == 7 and min(made.values()) >= 2
    for task in table.values():
        assert task.how and (task.generated or task.weight == 0), task.name
    with pytest.raises(DataError, match=r"needs .*dialogues"):
        sub_task("multi_turn_dialogue")
    with pytest.raises(DataError, match="known: small_talk"):
        sub_task("mind_reading")


# ---- the grammar's planner


def test_the_same_generator_state_gives_the_same_outline(library: Library) -> None:
    planner, task = GrammarPlanner(shipped_scenarios(), library), sub_task("sound_alert")
    first, again, other = (planner.outline(np.random.default_rng(s), task) for s in (5, 5, 6))
    assert first == again != other


def test_what_follows_is_what_the_grammar_makes_likely(library: Library) -> None:
    planner, task = tiny(library), sub_task("sound_alert")
    after = Counter[str]()
    for seed in range(60):
        beats = planner.outline(np.random.default_rng(seed), task, 60.0).beats
        after.update(b.label for a, b in itertools.pairwise(beats) if a.label == "siren")
    assert set(after) == {"dog"} and after["dog"] > 30


def test_only_what_can_be_made_and_is_not_excluded_comes(library: Library) -> None:
    exclude = frozenset({"siren", "hum"})
    planner, task = GrammarPlanner(shipped_scenarios(), library, exclude), sub_task("household")
    used = set[str]()
    for seed in range(80):
        outline = planner.outline(np.random.default_rng(seed), task)
        used |= {beat.label for beat in outline.beats} | set(outline.passing) | {outline.beds[0]}
    assert all(library.has(label) for label in used)
    assert used.isdisjoint({"siren", "screaming", "toilet_flush"})  # excluded, no clip, no clip
    assert {"spoken_digits", "smoke_alarm", "doorbell"} <= used


def test_rules_come_with_sub_tasks_that_have_context(library: Library) -> None:
    rng = np.random.default_rng(0)
    assert tiny(library).outline(rng, sub_task("sound_alert")).rules == ()
    (rule,) = tiny(library).outline(rng, sub_task("chain_of_events")).rules
    assert (rule.event, rule.after, rule.within_s) == ("dog", "siren", 9.0)


def test_the_random_planner_knows_no_scenario(library: Library) -> None:
    planner, task = RandomPlanner(library, frozenset({"dog"})), sub_task("sound_alert")
    labels = Counter[str]()
    for seed in range(100):
        labels.update(beat.label for beat in planner.outline(np.random.default_rng(seed), task, 51.2).beats)
    assert set(labels) == set(library.labels()) - {"dog"}


def test_grounding_gives_sources_of_the_split_only(manifest: Path) -> None:
    library = Library.open(manifest, "val")
    planner = GrammarPlanner(shipped_scenarios(), library)
    for seed in range(30):
        rng = np.random.default_rng(seed)
        task = sub_task("household")
        plan = ground(rng, planner.outline(rng, task), task, library, "x")
        sources = [s for part in plan.parts for s in part.sources] + [layer.source for layer in plan.layers]
        for source in sources:
            assert source.startswith(("val-", SYNTHETIC, "espeak-ng/"))
        assert all(part.speed == 1.0 for part in plan.parts)  # to be heard as recorded


# ---- the language model's


def planned(*labels: str) -> str:
    return json.dumps({"events": [{"label": label, "gap_s": 2.5} for label in labels]})


def test_a_models_plan_becomes_an_outline(
    endpoint: Any, library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(KEY_VARIABLE, "secret")
    endpoint.answers = [f"Here it is:\n```json\n{planned('siren', 'dog')}\n```"]
    planner = LlmPlanner(tiny(library), endpoint.url, "some-model")
    outline = planner.outline(np.random.default_rng(0), sub_task("chain_of_events"), 25.6)
    assert [(b.label, b.gap_s) for b in outline.beats] == [("siren", 2.5), ("dog", 2.5)]
    assert outline.scene == "test" and len(outline.rules) == 1
    (asked,) = endpoint.asked
    assert asked["path"] == "/v1/chat/completions" and asked["model"] == "some-model" and "seed" in asked
    prompt = str(asked["messages"])
    assert "siren" in prompt and "coughing" in prompt and "doorbell" not in prompt
    assert endpoint.keys == ["Bearer secret"]


def test_an_answer_against_the_grammar_is_refused_with_its_reason_and_tried_again(
    endpoint: Any, library: Library
) -> None:
    endpoint.answers = [planned("dragon"), "no JSON", planned("dog")]
    planner = LlmPlanner(tiny(library), endpoint.url, "m")
    outline = planner.outline(np.random.default_rng(0), sub_task("sound_alert"), 25.6)
    assert [b.label for b in outline.beats] == ["dog"]
    assert "'dragon' is none of the events" in str(endpoint.asked[1]["messages"])
    endpoint.answers = ["{}", "{}", "{}"]
    with pytest.raises(DataError, match="no usable answer in 3 tries"):
        planner.outline(np.random.default_rng(0), sub_task("sound_alert"), 25.6)


def test_kept_answers_are_not_asked_for_again(endpoint: Any, library: Library, tmp_path: Path) -> None:
    endpoint.answers = [planned("dog", "siren")]
    for url in (endpoint.url, "http://127.0.0.1:1/v1"):  # nobody listens at the second
        planner = LlmPlanner(tiny(library), url, "m", tmp_path / "kept")
        outline = planner.outline(np.random.default_rng(3), sub_task("sound_alert"), 25.6)
        assert [b.label for b in outline.beats] == ["dog", "siren"]
    assert len(endpoint.asked) == 1


def test_an_endpoint_that_fails_is_named(endpoint: Any, library: Library) -> None:
    task = sub_task("sound_alert")

    def outline(url: str) -> None:
        LlmPlanner(tiny(library), url, "m", timeout_s=5).outline(np.random.default_rng(0), task, 25.6)

    with pytest.raises(DataError, match=r"cannot be reached.*is the server running"):
        outline("http://127.0.0.1:1/v1")
    with pytest.raises(DataError, match="no address of an endpoint"):
        outline("file:///etc")
    endpoint.answers = ["garbage"]
    with pytest.raises(DataError, match="no chat completion"):
        outline(endpoint.url)
    endpoint.status = 503
    with pytest.raises(DataError, match="answered 503"):
        outline(endpoint.url)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("[]", "not JSON"),
        ('{"events": 3}', "at most 2"),
        (planned("dog", "dog", "dog"), "at most 2"),
        ('{"events": ["dog"]}', "None is none of"),
        ('{"events": [{"label": "dog"}]}', "gap_s of dog is None"),
        ('{"events": [{"label": "dog", "gap_s": -1}]}', "gap_s of dog is -1"),
        ('{"events": [{"label": "dog", "gap_s": NaN}]}', "gap_s of dog is nan"),
        ('{"events": [{"label": "dog", "gap_s": true}]}', "gap_s of dog is True"),
    ],
)
def test_what_a_plan_may_not_be(content: str, named: str) -> None:
    with pytest.raises(DataError) as error:
        parse_beats(content, {"dog": 1.0}, 2)
    assert named in str(error.value)


def test_speakers_are_heard_as_often_as_there_is_to_hear_of_them(library: Library) -> None:
    outline = Outline("kitchen", 20.0, (), (), (Beat("spoken_digits", 1.0),))
    counts = Counter[str]()
    for seed in range(400):
        plan = ground(np.random.default_rng(seed), outline, sub_task("digits_live"), library, "x")
        source = plan.parts[0].sources[0]
        if not voices.is_voice(source) and not library.clip(source).words:
            counts[library.clip(source).group] += 1
    n, p = counts.total(), 10 / 13  # ten clips of it, and three cuts of recordings
    assert abs(counts["train-a"] - n * p) < 4 * math.sqrt(n * p * (1 - p)), counts
