"""Streams: what is heard is where the record says, as loud as it says, and answered as it should be."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastloop.config import SAMPLE_RATE
from fastloop.soundflow import voices
from fastloop.soundflow.abilities import sub_task, sub_tasks
from fastloop.soundflow.clips import DataError, Unreadable
from fastloop.soundflow.compose import compose
from fastloop.soundflow.grammar import Rule
from fastloop.soundflow.grounding import Layer, Part, Plan, ground
from fastloop.soundflow.planner import Outline
from fastloop.soundflow.questions import answer, ask
from fastloop.soundflow.render import SETTLE_S, WEAKEST, audible, clip_sound, render
from fastloop.soundflow.scenes import AUDIBLE
from fastloop.soundflow.scripts import Beat
from fastloop.soundflow.sequence import Reply
from fastloop.soundflow.shards import SILENCE, parse_stream
from fastloop.soundflow.sounds import DIGITS, Library, sound_of
from fastloop.soundflow.streams import default_mix, stream
from fastloop.soundflow.suitability import Limits, problems

SPOKEN = pytest.mark.skipif(not voices.available(), reason="espeak-ng is not installed")


def part(label: str, source: str, gap_s: float = 1.0, **fields: Any) -> Part:
    reply = fields.pop("reply", sound_of(label).reply)
    return Part(label, (source,), 1, gap_s, -20.0, 6.0, reply, pauses_s=(0.0,), **fields)


def plan(*parts: Part, seconds: float = 12.0, layers: tuple[Layer, ...] = (), **fields: Any) -> Plan:
    return Plan("x", "train", 0, "lab", "none", "none", seconds, layers, parts, **fields)


def foreground(made: Any) -> list[dict[str, Any]]:
    return [turn for turn in made.record["turns"] if "level_db" in turn]


# ---- times and levels


@pytest.mark.parametrize("tfjp", [False, True])
@pytest.mark.parametrize("seed", range(8))
def test_an_event_is_heard_exactly_when_the_record_says(library: Library, seed: int, tfjp: bool) -> None:
    """In whatever room, through whatever microphone: an onset within 30 dB of the peak."""
    made = compose(plan(replace(part("siren", "train-siren"), seed=seed), tfjp=tfjp), library)
    (turn,) = foreground(made)
    heard = np.flatnonzero(np.abs(made.pcm) >= AUDIBLE * np.abs(made.pcm).max()) / SAMPLE_RATE
    assert abs(heard[0] - turn["start_s"]) < 0.008
    assert abs(heard[-1] + 1 / SAMPLE_RATE - turn["end_s"]) < 0.008
    assert turn["answer_s"] == pytest.approx(turn["start_s"] + sound_of("siren").heard_s, abs=1e-3)


def test_prepared_clips_begin_at_half_chunks(library: Library) -> None:
    made = compose(plan(part("dog", "train-dog", 0.33), part("coughing", "train-coughing", 0.9)), library)
    first = np.flatnonzero(made.pcm)[0] / SAMPLE_RATE
    assert 0.4 <= first < 0.4 + 0.016  # 0.33 s, rounded up, behind the fade
    core_of_dog = library.prepared(library.clip("train-dog"))[1][0] / SAMPLE_RATE
    assert abs(foreground(made)[0]["start_s"] - 0.4 - core_of_dog) < 0.04


def test_levels_are_those_of_the_record(library: Library) -> None:
    bed = Layer("rain", "train-rain", 3, 0.0, 12.0, -40.0)
    whole = compose(plan(part("dog", "train-dog", 3.0), layers=(bed,)), library)
    alone = compose(plan(layers=(bed,)), library)
    (turn,) = foreground(whole)
    span = slice(round(turn["start_s"] * SAMPLE_RATE), round(turn["end_s"] * SAMPLE_RATE))
    event, rest = (whole.pcm - alone.pcm)[span].astype(float), alone.pcm[span].astype(float)
    level = 10 * np.log10(np.mean(event**2))
    assert turn["level_db"] == pytest.approx(level, abs=0.3)  # rounded to 0.1, ends rounded to samples
    assert turn["snr_db"] == pytest.approx(level - 10 * np.log10(np.mean(rest**2)), abs=0.3)
    assert 10 * np.log10(np.mean(alone.pcm**2)) == pytest.approx(-40, abs=1.5)


def test_a_bed_shorter_than_the_stream_goes_on_without_a_seam(library: Library) -> None:
    bed = Layer("rain", "train-rain", 3, 0.0, 12.0, -30.0)  # a clip of 3 s
    x = compose(plan(layers=(bed,)), library).pcm.astype(float)
    blocks = 10 * np.log10(np.mean(x[: len(x) // 1600 * 1600].reshape(-1, 1600) ** 2, axis=1))
    assert np.abs(blocks - np.median(blocks)).max() < 6


# ---- what is answered


def test_digits_are_answered_one_by_one_and_other_words_are_not(library: Library) -> None:
    made = compose(plan(part("digits_in_speech", "train-m"), part("spoken_digits", "train-s")), library)
    said = [(turn["user"], turn["assistant"], turn["answer_s"]) for turn in foreground(made)]
    assert [row[:2] for row in said] == [("enter", SILENCE), ("six", "6"), ("four", "4"), ("two", "2")]
    assert said[0][2] is None
    for turn in foreground(made)[1:]:
        assert turn["answer_s"] == pytest.approx(turn["end_s"] + SETTLE_S, abs=1e-3)


def test_a_string_of_clips_keeps_their_order_and_pauses(library: Library) -> None:
    names = ("train-d7", "train-d0", "train-d7")
    string = Part("spoken_digits", names, 1, 1.0, -20.0, 30.0, pauses_s=(0.0, 0.3, 0.6), speed=1.1)
    turns = foreground(compose(plan(string), library))
    assert [turn["assistant"] for turn in turns] == ["7", "0", "7"]
    assert [turn["audio_path"] for turn in turns] == list(names)
    gaps = [b["start_s"] - a["end_s"] for a, b in itertools.pairwise(turns)]
    edges = []  # what is not heard of a clip before and after its word
    for name in names:
        pcm = library.pcm(library.clip(name))
        start, end = audible(pcm, WEAKEST)
        edges.append((start / 1.1, (len(pcm) / SAMPLE_RATE - end) / 1.1))
    assert gaps[0] == pytest.approx(edges[0][1] + 0.3 + edges[1][0], abs=0.01)
    assert gaps[1] == pytest.approx(edges[1][1] + 0.6 + edges[2][0], abs=0.01)


def test_digits_cut_out_of_recordings_are_heard_alone_and_only_in_training(
    library: Library, manifest: Path
) -> None:
    assert sorted(library.cuts) == ["train-m#1", "train-s#0", "train-s#1"], "of all that is transcribed"
    assert not Library.open(manifest, "val").cuts
    names = ("train-s#1", "train-m#1")
    string = Part("spoken_digits", names, 1, 1.0, -20.0, 30.0, pauses_s=(0.0, 0.3))
    assert [turn["assistant"] for turn in foreground(compose(plan(string), library))] == ["2", "6"]
    whole, cut = library.clip("train-s"), library.clip("train-s#1")
    assert cut.group == whole.group and cut in library.singles[whole.group]
    heard = clip_sound(library, cut, tfjp=False)
    np.testing.assert_array_equal(heard, library.pcm(whole)[round(0.48 * 16_000) : round(0.82 * 16_000)])


def test_the_same_sound_going_on_is_answered_once(library: Library) -> None:
    sounds = [part("siren", "train-siren"), part("dog", "train-dog", 0.5), part("siren", "train-siren", 0.5)]
    turns = foreground(compose(plan(*sounds, seconds=20.0), library))
    assert [turn["answer_s"] is None for turn in turns] == [False, True, True]


def test_a_sound_that_is_to_be_answered_again_waits(library: Library) -> None:
    turns = foreground(compose(plan(*[part("coughing", "train-coughing", 0.5)] * 2, seconds=20.0), library))
    assert all(turn["answer_s"] is not None for turn in turns)
    assert turns[1]["start_s"] - turns[0]["end_s"] >= 5.0


@pytest.mark.parametrize(("within_s", "changed"), [(9.0, True), (0.2, False)])
def test_a_rule_changes_the_answer_within_its_time(library: Library, within_s: float, changed: bool) -> None:
    rule = Rule("coughing", "siren", within_s, Reply("Smoke?", "urgent"))
    sounds = part("siren", "train-siren"), part("coughing", "train-coughing", 1.0)
    turns = foreground(compose(plan(*sounds, rules=(rule,)), library))
    assert (turns[1]["assistant"] == "Smoke?") == changed
    assert turns[1]["emotion"] == ("urgent" if changed else "normal")


def test_a_rule_without_reply_means_silence_and_an_own_reply_outdoes_rules(library: Library) -> None:
    rules = (Rule("coughing", "siren", 9.0, None),)
    siren, cough = part("siren", "train-siren"), part("coughing", "train-coughing")
    assert foreground(compose(plan(siren, cough, rules=rules), library))[1]["answer_s"] is None
    own = replace(cough, own=True)
    assert foreground(compose(plan(siren, own, rules=rules), library))[1]["answer_s"] is not None


def test_what_does_not_fit_is_left_out(library: Library) -> None:
    made = compose(plan(*[part("dog", "train-dog", 2.0)] * 9, seconds=8.0), library)
    assert len(foreground(made)) < 3 and len(made.pcm) == 8 * SAMPLE_RATE


# ---- sources


def test_unknown_sources_and_unreadable_clips_are_named(library: Library) -> None:
    with pytest.raises(DataError, match="no clip 'nothing'"):
        compose(plan(part("dog", "nothing")), library)
    with pytest.raises(DataError, match="no voice"):
        compose(plan(part("speech", "espeak-ng/en", text="hello")), library)


@pytest.mark.parametrize("known_before", [False, True])
def test_a_stream_goes_round_clips_that_cannot_be_read(
    folder: Any, tmp_path: Path, known_before: bool
) -> None:
    """And its bytes do not depend on what the library had met before."""
    for file in folder.path.iterdir():
        (tmp_path / file.name).write_bytes(b"" if file.name == "train-dog.flac" else file.read_bytes())
    library = Library.open(tmp_path / "manifest.jsonl", "train")
    mix = default_mix(library, ["know_when_to_be_silent"])
    if known_before:
        with pytest.raises(Unreadable):
            library.pcm(library.clip("train-dog"))
    made = [stream(0, index, mix, 20.0) for index in range(5)]
    assert list(library.unreadable) == ["train-dog"]
    assert not any(t["audio_path"] == "train-dog" for m in made for t in m.record["turns"])
    fresh = default_mix(Library.open(tmp_path / "manifest.jsonl", "train"), ["know_when_to_be_silent"])
    for index in (4, 1):  # in another order
        again = stream(0, index, fresh, 20.0)
        assert np.array_equal(again.pcm, made[index].pcm) and again.record == made[index].record


def test_speech_is_never_prepared(library: Library) -> None:
    """Its weakest consonants would be taken for noise."""
    six = library.clip("train-d6")
    assert np.array_equal(clip_sound(library, six, tfjp=True), library.pcm(six))
    dog = library.clip("train-dog")
    assert np.array_equal(clip_sound(library, dog, tfjp=True), library.prepared(dog)[0])


def test_a_sound_is_shortened_in_a_pause(library: Library) -> None:
    long = replace(part("siren", "synthetic:smoke_alarm"), longest_s=3.0)
    assert render(library, long, 3.0).spans[0].end_s < 3.8  # and the room's tail


# ---- all sub-tasks


@SPOKEN
@pytest.mark.parametrize("name", [task.name for task in sub_tasks().values() if task.generated])
@pytest.mark.parametrize("tfjp", [True, False])
def test_streams_of_every_sub_task_are_whole(library: Library, name: str, tfjp: bool) -> None:
    mix = replace(default_mix(library, [name]), tfjp=tfjp)
    for index in range(2):
        made = stream(11, index, mix)
        parsed = parse_stream(made.record)
        assert parsed.sub_task == name and parsed.ability == sub_tasks()[name].ability
        assert made.pcm.dtype == np.float32 and np.isfinite(made.pcm).all() and np.abs(made.pcm).max() < 1
        assert np.array_equal(made.pcm * 32768, np.round(made.pcm * 32768))
        assert len(made.pcm) == round(parsed.seconds * SAMPLE_RATE) and len(made.pcm) % 6400 == 0
        assert not problems(made.pcm, made.record)
        for turn in parsed.turns:
            assert turn.answer_s is None or turn.start_s < turn.answer_s < parsed.seconds
            assert turn.emotion in (None, "happy", "sad", "angry", "surprise", "normal", "urgent")


@SPOKEN
def test_instructions_hold_for_the_rest_of_the_stream(library: Library) -> None:
    seen = Counter[str]()
    for index in range(4):
        for name in ("notify_when", "stay_quiet_about", "count_events"):
            turns = foreground(stream(2, index, default_mix(library, [name]), 28.0))
            told = next(turn for turn in turns if turn["label"] == "instruction")
            about = [turn for turn in turns if sound_of(turn["label"]).words in told["user"]]
            if name == "notify_when":
                assert all(t["assistant"].startswith("I hear") for t in about if t["answer_s"])
                seen[name] += sum(t["answer_s"] is not None for t in about)
            elif name == "stay_quiet_about":
                assert all(t["answer_s"] is None for t in about)
                seen[name] += len(about)
            else:
                assert [t["assistant"] for t in about] == [f"{i}." for i in range(1, len(about) + 1)]
                seen[name] += len(about)
    assert len(seen) == 3 and min(seen.values()) >= 4


@SPOKEN
def test_voices_of_val_are_not_those_of_train(manifest: Path) -> None:
    used: dict[str, set[str]] = {}
    for split in ("train", "val"):
        mix = default_mix(Library.open(manifest, split), ["dictation", "speech_to_english"])
        made = [stream(0, index, mix) for index in range(6)]
        sources = [turn["audio_path"] for m in made for turn in m.record["turns"]]
        used[split] = {s.split("/")[1].partition("+")[2] for s in sources if s.startswith("espeak-ng/")}
    assert used["train"] and used["val"] and used["train"].isdisjoint(used["val"])


@SPOKEN
def test_speech_is_cut_to_what_is_heard_and_an_unknown_voice_is_an_error() -> None:
    x = voices.speak(voices.Voice("en-us+m1", 150, 50), "seven")
    assert 0.2 < len(x) / SAMPLE_RATE < 1.0 and np.abs(x[:400]).max() > 0 and np.abs(x[-1]) > 0
    with pytest.raises(DataError, match="no-such-voice"):
        voices.speak(voices.Voice("no-such-voice", 150, 50), "seven")


def pitch_hz(x: np.ndarray) -> float:
    """Of its first vowel, by autocorrelation."""
    vowel = x[2400:8000] - x[2400:8000].mean()
    similar = np.correlate(vowel, vowel, "full")[len(vowel) - 1 :]
    low, high = SAMPLE_RATE // 350, SAMPLE_RATE // 60
    return SAMPLE_RATE / (low + int(similar[low:high].argmax()))


@pytest.mark.skipif(not voices.available(voices.FLITE), reason="flite is not installed")
def test_flite_speaks_at_the_asked_rate_and_pitch_in_training_alone() -> None:
    def said(rate: int, pitch: int) -> np.ndarray:
        return voices.speak(voices.Voice("slt", rate, pitch, voices.FLITE), "nine three seven")

    assert 1.5 < len(said(120, 50)) / len(said(220, 50)) < 2.2  # 220 / 120 = 1.8
    assert pitch_hz(said(150, 10)) < 130 < 170 < pitch_hz(said(150, 90))
    with pytest.raises(DataError, match="choose from kal16"):
        voices.speak(voices.Voice("nobody", 150, 50, voices.FLITE), "seven")
    drawn = {
        split: {voices.draw(np.random.default_rng(seed), split).engine for seed in range(60)}
        for split in ("train", "val")
    }
    assert drawn == {"train": {voices.ESPEAK, voices.FLITE}, "val": {voices.ESPEAK}}


def test_voices_have_names_that_say_everything() -> None:
    for seed in range(20):
        voice = voices.draw(np.random.default_rng(seed), "train")
        assert voices.is_voice(str(voice)) and voices.parse_voice(str(voice)) == voice
    for name in ("train-siren", "synthetic:rain", "festival/kal/150/50", "flite/slt/fast/50"):
        with pytest.raises(DataError, match="is no voice"):
            voices.parse_voice(name)
    assert set(voices.ENGLISH["train"]).isdisjoint(voices.ENGLISH["val"])
    assert set(voices.VARIANTS["train"]).isdisjoint(voices.VARIANTS["val"])


@pytest.mark.parametrize(
    ("script", "why"),
    [
        ("echo no room for the data >&2; exit 3", "exit status 3: no room for the data"),
        ("kill -XFSZ $$", "File size limit exceeded"),
    ],
)
def test_an_espeak_that_fails_to_list_its_voices_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, why: str
) -> None:
    fake = tmp_path / "espeak-ng"
    fake.write_text(f"#!/bin/sh\n{script}\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    voices._languages.cache_clear()
    with pytest.raises(DataError, match=f"espeak-ng --voices failed: {why}$"):
        voices.speak(voices.Voice("en-us", 150, 50), "not said before")


def test_speech_without_espeak_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(voices.shutil, "which", lambda name: None)
    with pytest.raises(DataError, match="apt-get install espeak-ng"):
        voices.speak(voices.Voice("en-us+m1", 151, 50), "never said before")


# ---- history


@pytest.mark.parametrize("seed", range(40))
def test_answers_about_the_past_are_true(seed: int) -> None:
    rng = np.random.default_rng(seed)
    labels = [
        str(label) for label in rng.choice(["dog", "siren", "coughing", "rooster"], int(rng.integers(0, 6)))
    ]
    asked = labels.copy()
    asked.insert(len(labels) // 2, "question")  # an earlier one is nothing to be asked about
    question = ask(rng, asked, {"rooster"})
    said, answer = question.text, question.answer.text
    words = [sound_of(label).words for label in labels]
    if match := re.fullmatch(r"how many times did you hear (.+)\?", said):
        assert answer == f"{words.count(match[1])}." and match[1] != "a rooster"
    elif match := re.fullmatch(r"did you hear (.+)\?", said):
        told = "Yes" if match[1] in words else "No"
        assert answer == f"{match[1].capitalize()}? {told}." and match[1] != "a rooster"
    else:
        expected = {"first": words[:1], "last": words[-1:]}.get(said.rstrip("?").split()[-1], words[:1])
        assert answer.lower() == f"{(expected or ['nothing special'])[0]}."
        assert said != "what did you hear?" or len(set(words)) < 2


def test_whether_something_was_heard_cannot_be_told_from_the_question() -> None:
    """No sound is asked for only where it was heard, or only where it was not."""
    sounds = [
        "dog",
        "siren",
        "coughing",
        "rooster",
        "keyboard_typing",
        "melody",
        "chainsaw",
        "sea_waves",
        "thunder",
        "cat",
    ]
    rng, told = np.random.default_rng(0), Counter[tuple[str, str]]()
    for _ in range(20_000):
        heard = [str(label) for label in rng.choice(sounds, 4, replace=False)]
        question = ask(rng, heard)
        if question.text.startswith("did you hear"):
            told[question.text, question.answer.text] += 1
    for label in sounds:
        text = f"did you hear {sound_of(label).words}?"
        yes, no = (told[text, f"{sound_of(label).words.capitalize()}? {end}."] for end in ("Yes", "No"))
        assert 0.1 < no / (yes + no) < 0.9, (text, yes, no)


def test_a_string_of_digits_counts_as_one_sound() -> None:
    labels = ["spoken_digits"] * 4 + ["dog"]
    counted = [ask(np.random.default_rng(seed), labels) for seed in range(60)]
    answers = {q.answer.text for q in counted if "times" in q.text and "digits" in q.text}
    assert answers == {"1."}


def test_what_has_no_answer_gets_none() -> None:
    heard = ["pink_noise", "dog"]
    assert answer("what did you hear?", heard) is None
    assert answer("what did you hear first?", []) is None
    assert answer("how many times did you hear a siren?", heard) is None
    assert answer("did you hear a dog?", heard, {"dog"}) is None
    assert answer("did you hear noise?", heard, {"white_noise"}) is None, "another sound of the same words"
    assert answer("what is the time?", heard) is None


@SPOKEN
def test_a_stream_read_back_has_the_answers_it_was_composed_with(library: Library) -> None:
    mix = default_mix(library, ["history_review"])
    asked = 0
    for index in range(12):
        made = parse_stream(stream(5, index, mix, 40.0).record)
        heard: list[str] = []
        behind = {turn.label for turn in made.turns if turn.background}
        for turn in made.turns:
            if turn.label == "question":
                told = answer(turn.user, heard, behind)
                assert told is not None
                assert (told.text, told.emotion) == (turn.reply, turn.emotion)
                asked += 1
            elif not turn.background:
                heard.append(turn.label)
    assert asked > 5


@SPOKEN
def test_questions_in_the_middle_leave_room_for_their_answers(library: Library) -> None:
    mix = default_mix(library, ["history_review"])
    asked = []
    for index in range(12):
        record = stream(5, index, mix, 40.0).record
        events = [turn for turn in record["turns"] if "snr_db" in turn]
        questions = [turn for turn in events if turn["label"] == "question"]
        assert events[-1] is questions[-1]
        for turn in questions:
            assert turn["answer_s"] == pytest.approx(turn["end_s"] + SETTLE_S, abs=1e-3)
            assert turn["end_s"] <= record["duration_s"] - 0.8 + 1e-3
            assert all(
                other["start_s"] >= turn["end_s"] or other["end_s"] <= turn["start_s"]
                for other in events
                if other is not turn
            )
        asked.append(len(questions))
    assert sum(asked) > len(asked)


# ---- suitability


def turn(**fields: Any) -> dict[str, Any]:
    return {
        "label": "siren",
        "start_s": 1.0,
        "end_s": 2.0,
        "answer_s": 1.5,
        "snr_db": 9.0,
        "level_db": -30.0,
    } | fields


@pytest.mark.parametrize(
    ("turns", "kind"),
    [
        ([turn()], None),
        ([turn(), turn(start_s=1.8, end_s=3.0, answer_s=2.2)], None),
        ([turn(), turn(start_s=1.2, end_s=3.0, answer_s=2.2)], "overlap"),
        ([turn(), turn(start_s=1.2, end_s=3.0, answer_s=None)], None),
        ([turn(snr_db=1.0)], "snr"),
        ([turn(snr_db=1.0, answer_s=None)], None),
        (
            [turn(snr_db=1.0, answer_s=None), turn(label="question", start_s=3, end_s=3.5, answer_s=3.5)],
            "snr",
        ),
        ([turn(level_db=-70.0)], "level"),
        ([turn(end_s=1.01)], "duration"),
        ([turn(answer_s=4.5)], "duration"),
    ],
)
def test_what_makes_a_stream_unsuitable(turns: list[dict[str, Any]], kind: str | None) -> None:
    found = problems(np.zeros(4 * SAMPLE_RATE), {"duration_s": 4.0, "turns": turns})
    assert [line.partition(":")[0] for line in found] == ([kind] if kind else [])


def test_clipped_and_mismatched_sound_is_unsuitable() -> None:
    x = np.zeros(4 * SAMPLE_RATE)
    x[:100] = 1.0
    assert problems(x, {"duration_s": 4.0, "turns": []})[0].startswith("clipping")
    assert not problems(x, {"duration_s": 4.0, "turns": []}, Limits(clipped=0.01))
    assert problems(x * np.nan, {"duration_s": 4.0, "turns": []})[0].startswith("clipping")
    assert problems(x * 0, {"duration_s": 5.0, "turns": []})[0].startswith("duration")


@SPOKEN
def test_speech_to_ignore_is_read_aloud_to_train_on_and_recorded_to_evaluate_on(manifest: Path) -> None:
    task = sub_task("know_when_to_be_silent")
    outline = Outline("office", 60.0, ("silence",), (), tuple(Beat("speech", 1.0) for _ in range(60)))
    for split in ("train", "val"):
        library = Library.open(manifest, split)
        made = ground(np.random.default_rng(0), outline, task, library, "s")
        read = [part for part in made.parts if part.text]
        assert len(read) == pytest.approx(30, abs=12) if split == "train" else not read
        for part in read:
            assert voices.is_voice(part.sources[0]) and part.reply is None
            spoken = {word.strip(".,").lower() for word in part.text.split()}
            assert spoken.isdisjoint(DIGITS) and not any(mark in part.text for mark in "{}")
