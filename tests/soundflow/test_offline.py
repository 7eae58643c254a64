"""Clips through the engine against the plain loop; runs that were cut off; the command on every set."""

from __future__ import annotations

import dataclasses
import json
import resource
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from fastloop.checkpoint import Model, save
from fastloop.cli import app
from fastloop.config import SAMPLE_RATE
from fastloop.engine import Engine
from fastloop.events import ResponseEnd
from fastloop.loop import PlainLoop
from fastloop.options import EngineConfig
from fastloop.soundflow import voices
from fastloop.soundflow.benchmark_files import BenchmarkError, samples
from fastloop.soundflow.benchmarks import BENCHMARKS, Folders, Item, read_items
from fastloop.soundflow.hear import Answer, Hearing, Told, converse, hear
from fastloop.soundflow.offline import PAUSE_S, How, answer, play, read_answers, reply, session
from fastloop.soundflow.proactive import GRACE_S, LEAD_S
from fastloop.testing import benchmark_sets as sets
from fastloop.testing.cases import random_model

SHORT = Hearing(sessions=2, most_tokens=12)


@pytest.fixture(scope="module")
def model() -> Model:
    return random_model(seed=8)


def nothing(reason: str) -> None:
    raise AssertionError(f"skipped: {reason}")


# ---- what is played, and what is asked


def test_streaming_has_silence_around_the_clip_and_the_question_behind_it(tmp_path: Path) -> None:
    sounds = [sets.sound_file(tmp_path / f"{i}.wav", i, seconds=0.5 + i) for i in range(2)]
    item = Item("a", sounds[0], "?", spoken=sounds[1])
    clip, question = (samples(sound) for sound in sounds)

    whole = play(item, "streaming")
    begin, end = round((LEAD_S + 0.5 + PAUSE_S) * SAMPLE_RATE), round(GRACE_S * SAMPLE_RATE)
    assert whole.from_s == LEAD_S + 0.5 + PAUSE_S
    assert np.array_equal(whole.pcm[round(LEAD_S * SAMPLE_RATE) :][: len(clip)], clip)
    assert np.array_equal(whole.pcm[begin:-end], question)
    assert not whole.pcm[: round(LEAD_S * SAMPLE_RATE)].any()
    assert not whole.pcm[-end:].any()

    assert np.array_equal(play(Item("a", sounds[0], "?"), "offline").pcm, clip)
    assert np.array_equal(play(item, "offline").pcm[-len(question) :], question)


@pytest.mark.skipif(not voices.available(), reason="espeak-ng is not installed")
def test_an_instruction_is_spoken_by_the_voice_that_its_item_draws(tmp_path: Path) -> None:
    sound = sets.sound_file(tmp_path / "a.wav")
    lengths = [
        len(play(Item(name, sound, "?", spoken="Choose: a man; a dog."), "offline").pcm) for name in "aab"
    ]
    assert lengths[0] == lengths[1] != lengths[2]
    assert lengths[0] > len(samples(sound)) + (PAUSE_S + 0.5) * SAMPLE_RATE


def test_the_instruction_is_the_users_text_or_stands_in_the_system_prompt(model: Model) -> None:
    own, plain = Item("a", Path("x"), "?", instruction="Which?"), Item("b", Path("x"), "?")
    how = How("offline", SHORT, "Write.")
    assert session(model, own, how, 1.0).user_text == "Which?"
    assert session(model, plain, how, 1.0).user_text == "Write."
    assert session(model, Item("c", Path("x"), "?", spoken=Path("y")), how, 1.0).user_text is None
    streaming = How("streaming", Hearing(system_prompt="Listen."), "Write.")
    assert session(model, plain, streaming, 1.0).system_prompt == "Listen. Write."
    told = session(model, own, How("streaming", SHORT), 1.0).system_prompt
    assert told == f"{model.config.system_prompt} Which?".strip()


def test_only_what_is_said_after_the_question_began_counts() -> None:
    said = [Answer(2.0, "a bell"), Answer(3.2, "A man"), Answer(4.0, ""), Answer(5.0, "indeed")]
    assert reply(said, 2.0) == "A man indeed"
    assert reply(said, 0.0) == "a bell A man indeed"
    assert reply([], 0.0) == ""


# ---- through the engine


@pytest.mark.parametrize("name", ["librispeech", "mmau"])
def test_offline_answers_are_those_of_the_plain_loop(tmp_path: Path, model: Model, name: str) -> None:
    items = read_items(name, Folders(sets.SETS[name](tmp_path)))
    how = How("offline", SHORT, BENCHMARKS[name].instruction)
    found = answer(model, items, how, tmp_path / "o.answers.jsonl", nothing)
    assert list(found) == [item.id for item in items]
    for item in items:
        pcm = samples(item.sound)
        loop = PlainLoop(model, session(model, item, how, len(pcm) / SAMPLE_RATE))
        padded = np.pad(pcm, (0, -len(pcm) % 640))
        ends = [e for e in loop.describe(torch.from_numpy(padded)) if isinstance(e, ResponseEnd)]
        assert found[item.id] == ends[0].text.strip()
    assert len(set(found.values())) > 1, "all answers are the same: the comparison would be of little"


def test_streamed_answers_are_those_of_streams_alone(tmp_path: Path, model: Model) -> None:
    items = read_items("librispeech", Folders(sets.librispeech(tmp_path)))
    how = How("streaming", SHORT)
    found = answer(model, items, how, tmp_path / "o.answers.jsonl", nothing)
    for item in items:
        (said,) = hear(model, [play(item, "streaming").pcm], SHORT)
        assert found[item.id] == reply(said, 0.0)
    assert any(found.values()), "the random model never answers: the comparison would be of nothing"


def test_streams_wait_for_a_session_and_their_sounds_are_not_kept(model: Model) -> None:
    drawn: list[int] = []

    def told() -> Any:
        for i in range(5):
            drawn.append(i)
            yield Told(i, np.zeros(8000, dtype=np.float32), SHORT.session(1.0))

    with Engine(model, EngineConfig(max_sessions=2)) as engine:
        ended = []
        for index, _ in converse(engine, told()):
            ended.append(index)
            assert len(drawn) <= len(ended) + 2 + 1  # two run, one waits for a session
        engine.check()
    assert sorted(ended) == [0, 1, 2, 3, 4]


def test_a_clip_that_needs_more_than_the_engine_has_is_an_error(model: Model) -> None:
    with Engine(model, EngineConfig(max_sessions=1, kv_pages=4)) as engine:
        long = Told(0, np.zeros(16_000, dtype=np.float32), SHORT.session(1.0))
        with pytest.raises(Exception, match="1 s of sound need more than all 1 sessions"):
            list(converse(engine, [long]))


# ---- runs that are cut off


def test_a_run_goes_on_behind_its_last_whole_line(tmp_path: Path, model: Model) -> None:
    items = read_items("librispeech", Folders(sets.librispeech(tmp_path / "set")))
    how = How("offline", Hearing(sessions=1, most_tokens=8))
    whole, cut = tmp_path / "whole.answers.jsonl", tmp_path / "cut.answers.jsonl"
    wanted = answer(model, items, how, whole, nothing)
    answer(model, items[:2], how, cut, nothing)
    lines = whole.read_bytes().splitlines(keepends=True)
    first = lines[0].replace(json.dumps(wanted[items[0].id], ensure_ascii=False).encode(), b'"as it was"')
    cut.write_bytes(first + lines[1][:-7])

    done: list[int] = []
    found = answer(model, items, how, cut, nothing, done.append)
    assert found == wanted | {items[0].id: "as it was"}  # not asked again
    assert cut.read_bytes() == first + b"".join(lines[1:])
    assert done == [1, 2, 3]
    assert answer(model, items, how, cut, nothing, done.append) == found
    assert cut.read_bytes() == first + b"".join(lines[1:])


def test_answers_are_in_the_file_before_the_run_ends(tmp_path: Path, model: Model) -> None:
    items = read_items("librispeech", Folders(sets.librispeech(tmp_path / "set")))
    file, seen = tmp_path / "o.answers.jsonl", list[int]()

    def interrupted(done: int) -> None:
        seen.append(len(read_answers(file)))
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        answer(model, items, How("offline", Hearing(sessions=1, most_tokens=8)), file, nothing, interrupted)
    assert seen == [0, 1, 2]


def test_a_full_disk_costs_the_line_it_cut_off(tmp_path: Path, model: Model) -> None:
    items = read_items("librispeech", Folders(sets.librispeech(tmp_path / "set")))
    how, file = How("offline", Hearing(sessions=1, most_tokens=8)), tmp_path / "o.answers.jsonl"
    answer(model, items[:1], how, file, nothing)
    first = file.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(first) + 20, limits[1]))  # then a write ends in the middle
    try:
        with pytest.raises(BenchmarkError, match=r"cannot be written: .*; what is in it is kept"):
            answer(model, items, how, file, nothing)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert len(file.read_bytes()) == len(first) + 20
    assert list(answer(model, items, how, file, nothing)) == [item.id for item in items]
    assert file.read_bytes().startswith(first)
    assert len(read_answers(file)) == file.read_bytes().count(b"\n") == 3


def test_answers_of_another_run_are_not_mixed(tmp_path: Path, model: Model) -> None:
    items = read_items("llama-questions", Folders(sets.llama_questions(tmp_path)))
    file = tmp_path / "o.answers.jsonl"
    answer(model, items, How("offline", SHORT), file, nothing)
    alone = How("offline", Hearing(sessions=1, most_tokens=12))  # gives the same answers
    answer(model, items, alone, file, nothing)
    with pytest.raises(BenchmarkError, match=r"of another run \(most_tokens was 12, is 13\)"):
        answer(model, items, How("offline", Hearing(most_tokens=13)), file, nothing)
    with pytest.raises(BenchmarkError, match="fingerprint was"):
        answer(random_model(seed=4), items, How("offline", SHORT), file, nothing)
    other = [dataclasses.replace(items[0], prompt="Asked anew?"), items[1]]
    with pytest.raises(BenchmarkError, match=r"of another set: '0\.mp3' was .*, is 'Asked anew\?'"):
        answer(model, other, How("offline", SHORT), file, nothing)
    file.with_suffix(".run.json").unlink()
    with pytest.raises(BenchmarkError, match="of an unknown run"):
        answer(model, items, How("offline", SHORT), file, nothing)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", ":2: not valid JSON"),
        ('{"id": 1, "response": ""}', ":2: field 'id'"),
        ('{"id": "a"}', ":2: field 'response'"),
        ("[]", ":2: field 'id'"),
    ],
)
def test_a_wrong_line_of_the_answers_is_named(tmp_path: Path, line: str, words: str) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"id": "a", "response": "x"}\n' + line + "\n")
    with pytest.raises(BenchmarkError) as error:
        read_answers(file)
    assert words in str(error.value)


def test_clips_that_cannot_be_read_are_listed_and_tried_again(tmp_path: Path, model: Model) -> None:
    items = read_items("llama-questions", Folders(sets.llama_questions(tmp_path)))
    assert isinstance(items[0].sound, Path)
    sound = items[0].sound.read_bytes()
    items[0].sound.write_bytes(b"ID3")
    skipped: list[str] = []
    file = tmp_path / "o.answers.jsonl"
    assert list(answer(model, items, How("offline", SHORT), file, skipped.append)) == ["1.mp3"]
    assert [line.split(":")[0] for line in skipped] == ["0.mp3"]
    items[0].sound.write_bytes(sound)
    assert list(answer(model, items, How("offline", SHORT), file, nothing)) == ["0.mp3", "1.mp3"]


# ---- the command


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, model: Model) -> str:
    place = tmp_path_factory.mktemp("m") / "m"
    return str(save(place, model.config, model.weights, model.tokenizer.to_json()))


def run(*arguments: object) -> tuple[int, str, str]:
    done = CliRunner().invoke(app, ["eval", "offline", *map(str, arguments), "--threads", "1"])
    return done.exit_code, done.stdout, done.stderr


def options(root: Path, checkpoint: str, name: str, mode: str) -> list[object]:
    chosen = [name, root / "set", "--model", checkpoint, "--mode", mode, "--out", root / "o", "--tokens", 12]
    if name == "mmau-spoken":
        for i in range(3):
            sets.sound_file(root / f"spoken/id-{i}.wav", i, seconds=0.4)
        chosen += ["--spoken", root / "spoken"]
    return chosen


@pytest.mark.parametrize("mode", ["offline", "streaming"])
@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_set_is_answered_and_scored(tmp_path: Path, checkpoint: str, name: str, mode: str) -> None:
    sets.SETS[name](tmp_path / "set")
    code, shown, said = run(*options(tmp_path, checkpoint, name, mode))
    assert code == 0, said
    stem = tmp_path / "o" / f"{name}-{mode}"
    found = json.loads(stem.with_suffix(".json").read_text())
    items = read_items(name, Folders(tmp_path / "set"))
    assert found["clips"] == len(items) == len(stem.with_suffix(".answers.jsonl").read_text().splitlines())
    assert found["skipped"] == []
    assert found["scores"]["answered"]["all"]["n"] == len(items)
    assert found["published"] in " ".join(shown.split())
    assert stem.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


FIGURES = {
    "mmau": ("accuracy", 1.0),
    "llama-questions": ("contains", 1.0),
    "web-questions": ("contains", 1.0),
    "sd-qa": ("contains", 1.0),
    "librispeech": ("word_error_rate", 0.0),
    "covost2-en-zh": ("bleu", 100.0),
    "covost2-zh-en": ("bleu", 100.0),
}


@pytest.mark.parametrize("name", FIGURES)
def test_right_answers_get_the_best_score(tmp_path: Path, checkpoint: str, name: str) -> None:
    """The model's answers are replaced by the right ones: the second run scores what is in the file."""
    sets.SETS[name](tmp_path / "set")
    assert run(*options(tmp_path, checkpoint, name, "offline"), "--limit", 1)[0] == 0
    items = read_items(name, Folders(tmp_path / "set"))
    stem = tmp_path / "o" / f"{name}-offline"
    lines = [json.dumps({"id": i.id, "response": i.references[0]}) + "\n" for i in items]
    stem.with_suffix(".answers.jsonl").write_text("".join(lines))
    code, _, said = run(*options(tmp_path, checkpoint, name, "offline"))
    assert code == 0, said
    figure, best = FIGURES[name]
    scores = json.loads(stem.with_suffix(".json").read_text())["scores"]
    assert all(group["value"] == pytest.approx(best) for group in scores[figure].values())
    if name == "mmau":
        listed = json.loads((tmp_path / "set/mmau-test-mini.json").read_text())
        rows = json.loads(stem.with_suffix(".predictions.json").read_text())
        assert [row["model_output"] for row in rows] == [row["answer"] for row in listed]
        assert rows[0].items() > listed[0].items()


def test_a_judge_rates_open_answers(tmp_path: Path, checkpoint: str, endpoint: Any) -> None:
    sets.alpaca_eval(tmp_path / "set")
    plain = options(tmp_path, checkpoint, "alpaca-eval", "offline")
    run(*plain)
    stem = tmp_path / "o" / "alpaca-eval-offline"
    assert "judged" not in json.loads(stem.with_suffix(".json").read_text())["scores"]
    lines = [json.dumps({"id": f"test-00000-of-00001/{i}", "response": str(i)}) + "\n" for i in range(3)]
    stem.with_suffix(".answers.jsonl").write_text("".join(lines))
    endpoint.answers = ["4"] * 3
    code, _, said = run(*plain, "--judge", endpoint.url, "--judge-model", "m")
    assert code == 0, said
    found = json.loads(stem.with_suffix(".json").read_text())
    assert found["scores"]["judged"]["all"]["value"] == 4.0
    assert found["judge"] == "m"
    assert len(endpoint.asked) == 3


@pytest.mark.parametrize(
    ("given", "noted"),
    [((), "Write down what is said."), (("--instruction", ""), None), (("--instruction", "Hm"), "Hm")],
)
def test_the_instruction_is_the_sets_own_or_the_callers_or_none(
    tmp_path: Path, checkpoint: str, given: tuple[str, ...], noted: str | None
) -> None:
    sets.librispeech(tmp_path / "set")
    assert run(*options(tmp_path, checkpoint, "librispeech", "offline"), *given)[0] == 0
    assert json.loads((tmp_path / "o/librispeech-offline.json").read_text())["instruction"] == noted


def test_unreadable_clips_are_counted_in_the_report(tmp_path: Path, checkpoint: str) -> None:
    root = sets.librispeech(tmp_path / "set")
    (root / "test-clean/0/12/0-12-0001.flac").unlink()
    code, shown, said = run(*options(tmp_path, checkpoint, "librispeech", "offline"))
    assert code == 0
    assert "1 could not be used" in said
    assert "0-12-0001" in said
    assert "2 clips, 1 unreadable" in shown
    found = json.loads((tmp_path / "o/librispeech-offline.json").read_text())
    assert len(found["skipped"]) == 1


def test_bad_input_is_one_line(tmp_path: Path, checkpoint: str) -> None:
    root, speech = sets.llama_questions(tmp_path / "set"), sets.librispeech(tmp_path / "speech")
    for arguments, words in (
        (("mmlu", root), "is no benchmark"),
        (("mmau", root), "holds none of"),
        (("llama-questions", root, "--mode", "both"), "mode: choose from offline, streaming"),
        (("llama-questions", root, "--judge", "http://x/v1"), "--judge-model"),
        (("librispeech", speech, "--judge", "http://x/v1", "--judge-model", "m"), "scored without one"),
        (("llama-questions", root, "--tokens", 0), "max_response_tokens"),
        (("llama-questions", root, "--device", "gpu"), "--device: choose cpu, cuda"),
        (("llama-questions", root, "--device", "cuda:99"), "--device cuda:99: torch"),
        (("llama-questions", root, "--out", root / "eval_datas/llama_questions/audios/0.mp3"), "written"),
    ):
        code, _, said = run("--out", tmp_path / "o", *arguments, "--model", checkpoint)
        assert code == 2, said
        assert words in " ".join(said.split())
        assert "Traceback" not in said
