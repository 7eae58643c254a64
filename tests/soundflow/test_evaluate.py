"""Scores against cases counted by hand; the benchmark's files; both commands on a small random model."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from fastloop.audio import write_wav
from fastloop.checkpoint import save
from fastloop.cli import app
from fastloop.soundflow.benchmark_files import BenchmarkError
from fastloop.soundflow.evaluate import Outcome, match, score
from fastloop.soundflow.hear import Answer, Hearing, hear
from fastloop.soundflow.proactive import (
    GRACE_S,
    LEAD_S,
    Item,
    Verdict,
    read_benchmark,
    read_sounds,
    run_benchmark,
    table,
)
from fastloop.soundflow.shards import ShardError, Stream, Turn
from fastloop.soundflow.statistics import bootstrap, share
from fastloop.soundflow.truth import read_truth
from fastloop.testing.cases import random_model, random_sound
from fastloop.testing.streams import record, two_streams


def turn(label: str, start_s: float, end_s: float, reply: str | None, answer_s: float | None = None) -> Turn:
    due = None if reply is None else (end_s if answer_s is None else answer_s)
    return Turn("", reply, None, label, "", start_s, end_s, due)


def stream(*turns: Turn, seconds: float = 36.0, name: str = "s") -> Stream:
    return Stream(name, "street", "proactive_response", "sound_alert", "val", seconds, turns)


# ---- intervals


def test_wilson_gives_the_textbook_interval() -> None:
    figure = share(8, 10)  # Agresti and Coull 1998: (0.490, 0.943)
    assert (round(figure.low, 3), round(figure.high, 3)) == (0.490, 0.943)
    assert share(0, 20).low == 0
    assert share(20, 20).high == 1
    assert share(0, 0).n == 0
    assert math.isnan(share(0, 0).value)


def test_the_bootstrap_of_a_mean_is_as_wide_as_its_standard_error() -> None:
    values = np.random.default_rng(0).normal(5.0, 2.0, 400).tolist()
    figure = bootstrap(values, lambda items: float(np.mean(items)))
    error = np.std(values) / 400**0.5
    assert figure.low < np.mean(values) < figure.high
    assert 0.85 < (figure.high - figure.low) / (2 * 1.96 * error) < 1.15  # 1000 draws: ends are off by some %
    assert figure == bootstrap(values, lambda items: float(np.mean(items)))


# ---- matching


def test_a_written_number_is_a_unit_for_every_digit() -> None:
    said = [turn("spoken_digits", 1.0, 1.4, "3"), turn("spoken_digits", 1.5, 1.9, "5")]
    outcome = match(stream(*said), [Answer(2.0, "3 5")])
    assert [unit.text for _, unit in outcome.answered if unit] == ["3", "5"]
    assert outcome.false == []


def test_the_right_words_are_matched_before_what_merely_comes_in_time() -> None:
    turns = [turn("siren", 1.0, 3.0, "A siren!", 1.5), turn("spoken_digits", 1.2, 1.6, "7")]
    outcome = match(stream(*turns), [Answer(1.6, "7"), Answer(2.0, "A siren!")])
    assert [(t.label, unit.text) for t, unit in outcome.answered if unit] == [
        ("siren", "A siren!"),
        ("spoken_digits", "7"),
    ]


@pytest.mark.parametrize(("t_s", "hit"), [(0.9, False), (1.0, True), (3.5, True), (3.6, False)])
def test_an_answer_counts_from_the_onset_to_two_seconds_after_it_is_due(t_s: float, hit: bool) -> None:
    outcome = match(stream(turn("siren", 1.0, 9.0, "A siren!", 1.5)), [Answer(t_s, "A siren!")])
    assert (outcome.answered[0][1] is not None) == hit
    assert len(outcome.false) == (not hit)


def counted() -> list[Outcome]:
    """Two streams of 0.01 h, counted by hand below."""
    first = stream(
        turn("rain", 0.0, 36.0, None),
        turn("siren", 2.0, 5.0, "A siren!", 2.5),
        turn("spoken_digits", 8.0, 8.5, "1"),
        turn("spoken_digits", 9.0, 9.5, "2"),
        turn("dog", 20.0, 21.0, None),
    )
    answers = [Answer(3.0, "A bell."), Answer(8.8, "1"), Answer(10.0, "4"), Answer(30.0, "9")]
    second = stream(turn("rain", 0.0, 36.0, None), name="quiet")
    return [match(first, answers), match(second, [])]


def test_the_figures_are_what_a_hand_counts() -> None:
    scores = score(counted())
    values = {name: figure.value for name, figure in scores.figures.items()}
    assert scores.hours == pytest.approx(0.02)
    assert values["precision"] == 3 / 4  # the 9 is false
    assert values["recall"] == 1.0
    assert values["f1"] == 6 / 7
    assert values["false_triggers_per_hour"] == pytest.approx(1 / 0.02)
    assert values["false_triggers_per_ambient_hour"] == 0
    assert values["sound_right"] == 0
    assert values["digits_right"] == 1 / 2
    assert values["sound_latency_from_onset_median_s"] == 1.0
    assert values["digits_latency_from_end_median_s"] == pytest.approx((0.3 + 0.5) / 2)
    assert values["word_error_rate"] == 2 / 2  # 1 2 -> 1 4 9: one substituted, one inserted, of two
    assert values["silent_clips_right"] == 2 / 3  # the 9 came over the first stream's rain
    assert {label: figure.value for label, figure in scores.silence.items()} == {"dog": 1.0, "rain": 0.5}


def test_nothing_to_count_is_said_and_not_zero() -> None:
    figures = score([match(stream(), [])]).figures
    assert all(math.isnan(figures[name].value) for name in ("precision", "recall", "f1", "word_error_rate"))
    assert figures["false_triggers_per_hour"].value == 0


# ---- through the engine


def test_side_by_side_a_stream_is_answered_as_alone() -> None:
    model = random_model(seed=3)
    sounds = [random_sound(seconds, seed) for seed, seconds in enumerate((3.0, 1.1, 2.4))]
    together = hear(model, sounds, Hearing(sessions=3))
    alone = [hear(model, [sound], Hearing(sessions=1))[0] for sound in sounds]
    assert together == alone
    assert any(together), "the random model never answers: the comparison would be of nothing"


def manifest(directory: Path, count: int = 5) -> Path:
    """A benchmark in the public layout, of noise."""
    rows = []
    for i in range(count):
        decision = "RESPOND" if i % 2 else "IGNORE"
        path = f"./proactive-sound-effect/Traffic/Vehicle/{decision}/{i}.wav"
        place = directory / path
        place.parent.mkdir(parents=True, exist_ok=True)
        write_wav(place, random_sound(1.0 + 0.1 * i, i))
        rows.append({"id": str(i), "path": path, "description": "noise", "decision": decision})
    file = directory / "bench.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.mark.parametrize("tier", ["single", "multi"])
def test_every_item_gets_a_verdict(tmp_path: Path, tier: str) -> None:
    items = read_benchmark(manifest(tmp_path))
    sounds, problems = read_sounds(items, tmp_path)
    assert problems == []
    verdicts = run_benchmark(random_model(seed=3), items, sounds, Hearing(sessions=4), tier)
    assert [verdict.item for verdict in verdicts] == items
    found = table(verdicts)
    assert found["overall"]["all"].n == 5
    assert found["decision"]["RESPOND"].n == 2
    assert set(found["folder"]) == {"Traffic / Vehicle"}


def test_an_item_of_a_longer_stream_is_judged_by_its_own_time() -> None:
    """Each item alone and all in one stream of silence: a model that answers at once is heard at once."""
    items = [Item(str(i), f"./p/D/F/RESPOND/{i}.wav", "x", "RESPOND") for i in range(3)]
    sounds = [random_sound(1.0, i) for i in range(3)]
    said: list[list[Answer]] = []

    def answering(
        model: object, streams: list[np.ndarray], how: object, progress: object
    ) -> list[list[Answer]]:
        for pcm in streams:
            block_s = LEAD_S + 1.0 + GRACE_S
            assert len(pcm) == round(3 * block_s * 16_000)
            said.append([Answer(block_s + LEAD_S + 0.4, "second"), Answer(3 * block_s - 0.1, "late third")])
        return said

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastloop.soundflow.kept.hear", answering)
        verdicts = run_benchmark(random_model(), items, sounds, Hearing(), "multi")
    order = np.random.default_rng(0).permutation(3)
    assert [verdicts[i].reply for i in order] == [None, "second", "late third"]


def test_predictions_are_what_the_public_evaluator_reads() -> None:
    item = Item("ab12", "./p/D/F/RESPOND/ab12.wav", "x", "RESPOND")
    for reply, decision in ((None, "IGNORE"), ("Careful!", "RESPOND")):
        row = Verdict(item, reply).prediction()
        assert row["id"] == "ab12"
        found = re.fullmatch(r"<Decision>(\w+)</Decision><Reply>(.*)</Reply>", row["_raw_reply"])
        assert found is not None
        assert found.groups() == (decision, reply or "")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", r":2: not valid JSON"),
        ('{"id": "x", "path": "a/b/c/d.wav", "description": "x", "decision": "MAYBE"}', r":2: .*decision"),
        ('{"id": "x", "path": "d.wav", "description": "x", "decision": "IGNORE"}', r":2: .*path"),
        ('{"id": 7, "path": "a/b/c/d.wav", "description": "x", "decision": "IGNORE"}', r":2: .*id"),
        ('{"id": "0", "path": "a/b/c/d.wav", "description": "x", "decision": "IGNORE"}', r"'0' comes twice"),
    ],
)
def test_a_wrong_line_of_the_manifest_is_named(tmp_path: Path, line: str, words: str) -> None:
    file = manifest(tmp_path, 1)
    file.write_text(file.read_text() + line + "\n")
    with pytest.raises(BenchmarkError, match=words):
        read_benchmark(file)


def test_sounds_that_are_missing_are_listed(tmp_path: Path) -> None:
    items = read_benchmark(manifest(tmp_path, 3))
    (tmp_path / items[1].path).unlink()
    (tmp_path / items[2].path).write_bytes(b"RIFF")
    sounds, problems = read_sounds(items, tmp_path)
    assert [len(sound) > 0 for sound in sounds] == [True, False, False]
    assert [problem.split(":")[0] for problem in problems] == ["1", "2"]


# ---- the commands


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    model = random_model(seed=3)
    return str(
        save(tmp_path_factory.mktemp("m") / "m", model.config, model.weights, model.tokenizer.to_json())
    )


def run(*arguments: object) -> tuple[int, str, str]:
    done = CliRunner().invoke(app, ["eval", *map(str, arguments), "--threads", "1"])
    return done.exit_code, done.stdout, done.stderr


def test_eval_streams_writes_json_lines_and_plot(tmp_path: Path, checkpoint: str) -> None:
    shard = two_streams(tmp_path)
    code, shown, said = run(
        "streams", shard, "--split", "train", "--model", checkpoint, "--out", tmp_path / "o"
    )
    assert code == 0, said
    assert "word error rate" in shown
    found = json.loads((tmp_path / "o" / "streams.json").read_text())
    assert found["scores"]["streams"] == 2
    assert found["scores"]["figures"]["recall"]["n"] == 2
    assert len((tmp_path / "o" / "streams.jsonl").read_text().splitlines()) == 2
    assert (tmp_path / "o" / "streams.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("listed", [False, True])
def test_eval_streams_reads_json_beside_sounds(tmp_path: Path, listed: bool) -> None:
    write_wav(tmp_path / "a.wav", random_sound(4.0))
    write_wav(tmp_path / "short.wav", random_sound(3.0))
    made = [record(name, audio_path=f"{name}.wav") for name in ("a", "gone", "short")]
    rows = [*map(json.dumps, made), json.dumps(record("b", duration_s="long"))]
    file = tmp_path / "truth.json"
    file.write_text("[" + ",\n".join(rows) + "]" if listed else "\n".join(rows))
    skipped: list[str] = []
    pairs = read_truth([file], "train", skipped.append)
    assert [(stream.id, len(pcm)) for stream, pcm in pairs] == [("a", 64_000)]
    for line, number, words in zip(skipped, (2, 3, 4), ("gone.wav", "lasts 3 s", "duration_s"), strict=True):
        assert line.startswith(f"{file}:{number}: ")
        assert words in line
    file.write_text("\n".join(rows[1:]))
    with pytest.raises(
        ShardError, match=r"no usable stream of split 'train' in .*: 3 could not be used, the"
    ):
        read_truth([file], "train", skipped.append)


def test_eval_proactive_writes_predictions(tmp_path: Path, checkpoint: str) -> None:
    file = manifest(tmp_path)
    code, _, said = run(
        "proactive", file, "--audio", tmp_path, "--model", checkpoint, "--out", tmp_path / "o"
    )
    assert code == 0, said
    rows = [json.loads(line) for line in (tmp_path / "o" / "predictions.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == ["0", "1", "2", "3", "4"]
    assert json.loads((tmp_path / "o" / "proactive.json").read_text())["accuracy"]["overall"]["all"]["n"] == 5
    assert (tmp_path / "o" / "proactive.png").exists()


def test_bad_input_is_one_line(tmp_path: Path, checkpoint: str) -> None:
    (tmp_path / "empty").mkdir()
    file = tmp_path / "a file"
    file.touch()
    for arguments, words in (
        (("streams", tmp_path / "empty", "--model", checkpoint), "no *.tar"),
        (("streams", two_streams(tmp_path), "--model", checkpoint), "data build --split val` makes some"),
        (("proactive", tmp_path / "none.jsonl", "--audio", tmp_path), "cannot be read"),
        (
            ("proactive", manifest(tmp_path), "--audio", tmp_path / "x", "--model", checkpoint),
            "none of the 5",
        ),
        (("proactive", manifest(tmp_path), "--audio", tmp_path, "--tier", "x"), "--tier"),
        (("proactive", manifest(tmp_path), "--audio", tmp_path, "--out", file), "--out"),
        (
            ("streams", two_streams(tmp_path), "--split", "train", "--model", checkpoint, "--out", file),
            "--out",
        ),
    ):
        code, _, said = run(*arguments)
        assert code == 2, said
        assert words in said
        assert "Traceback" not in said


def test_right_words_are_told_by_how_far_a_sound_is_above_the_rest() -> None:
    turns = [
        dataclasses.replace(turn("spoken_digits", at, at + 0.4, str(i)), snr_db=snr)
        for i, (at, snr) in enumerate(
            ((1.0, 2.0), (3.0, 5.0), (5.0, 12.0), (7.0, 19.9), (9.0, 20.0), (11.0, None))
        )
    ]
    answers = [
        Answer(at, text, None) for at, text in ((1.8, "0"), (3.8, "7"), (5.8, "2"), (9.8, "4"), (11.8, "5"))
    ]
    noise = score([match(stream(*turns), answers)]).noise
    assert {name: (figure.value, figure.n) for name, figure in noise.items()} == {
        "digits, below 5 dB": (1.0, 1),
        "digits, 5 to 20 dB": (pytest.approx(1 / 3), 3),
        "digits, from 20 dB": (1.0, 1),
    }


def test_questions_are_told_by_their_form_and_by_what_was_answered_before() -> None:
    def asked(text: str, at_s: float, reply: str) -> Turn:
        return dataclasses.replace(turn("question", at_s, at_s + 2, reply), user=text)

    first = [
        turn("siren", 1.0, 4.0, "A siren!", 2.0),
        asked("what did you hear last?", 6.0, "A siren."),
        turn("dog", 9.0, 10.0, None),
        asked("did you hear a dog?", 12.0, "A dog? Yes."),
        asked("did you hear a cat?", 16.0, "A cat? No."),
    ]
    heard = [Answer(2.4, "A siren!", None), Answer(8.4, "A siren.", None), Answer(9.6, "A siren!", None)]
    heard += [Answer(14.4, "A dog? No.", None), Answer(18.4, "A cat? No.", None)]
    second = [turn("siren", 1.0, 4.0, "A siren!", 2.0), asked("what did you hear last?", 6.0, "A siren.")]
    missed = [Answer(8.4, "A siren.", None)]
    found = score([match(stream(*first), heard), match(stream(*second, name="t"), missed)]).questions
    assert {name: (figure.value, figure.n) for name, figure in found.items()} == {
        "after a mistake": (pytest.approx(2 / 3), 3),
        "after none": (1.0, 1),
        "did you hear {}?": (0.5, 2),
        "what did you hear last?": (1.0, 2),
    }
    assert score([match(stream(turn("siren", 1.0, 4.0, "A siren!")), [])]).questions == {}
