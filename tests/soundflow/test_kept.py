"""Evaluations that are cut off: killed, half a line, another run, another sound; the same files at last."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from fastloop.audio import write_wav
from fastloop.checkpoint import Model, save
from fastloop.cli import app
from fastloop.soundflow.benchmark_files import BenchmarkError
from fastloop.soundflow.hear import Answer, Hearing, hear
from fastloop.soundflow.kept import hear_kept, kept
from fastloop.soundflow.lock import alone
from fastloop.testing.cases import random_model, random_sound
from fastloop.testing.streams import two_streams

FILES = {
    "streams": ("streams.json", "streams.jsonl", "streams.png"),
    "proactive": ("predictions.jsonl", "proactive.json", "proactive.png"),
}
# The command, killed by the system as soon as its first stream is in the file.
KILLED = """
import os, signal, sys
from fastloop.cli import app
from fastloop.soundflow import kept

hear = kept.hear

def killed(*arguments):
    *most, keep = arguments
    def last(index, answers):
        keep(index, answers)
        os.kill(os.getpid(), signal.SIGKILL)
    return hear(*most, last)

kept.hear = killed
app(sys.argv[1:])
"""


@pytest.fixture(scope="module")
def model() -> Model:
    return random_model(seed=3)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, model: Model) -> str:
    place = tmp_path_factory.mktemp("m") / "m"
    return str(save(place, model.config, model.weights, model.tokenizer.to_json()))


def benchmark(folder: Path) -> Path:
    """Six items of Proactive-Sound-Bench: two streams of tier multi."""
    rows = []
    for i in range(6):
        decision = "RESPOND" if i % 2 else "IGNORE"
        path = f"./bench/Traffic/Vehicle/{decision}/{i}.wav"
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        write_wav(folder / path, random_sound(1.0 + 0.1 * i, i))
        rows.append({"id": str(i), "path": path, "description": "noise", "decision": decision})
    file = folder / "bench.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def command(name: str, folder: Path, checkpoint: str) -> list[str]:
    """An evaluation of two streams, one after the other; without --out."""
    if name == "streams":
        own = [two_streams(folder), "--split", "train"]
    else:
        own = [benchmark(folder), "--audio", folder, "--tier", "multi"]
    return ["eval", name, *map(str, own), "--model", checkpoint, "--sessions", "1", "--threads", "1"]


def run(*arguments: object) -> tuple[int, str, str]:
    done = CliRunner().invoke(app, list(map(str, arguments)))
    return done.exit_code, done.stdout, done.stderr


@pytest.mark.parametrize("name", FILES)
def test_an_evaluation_that_was_killed_goes_on_to_the_same_files(
    tmp_path: Path, checkpoint: str, name: str
) -> None:
    base, whole, cut = command(name, tmp_path / "set", checkpoint), tmp_path / "whole", tmp_path / "cut"
    code, _, said = run(*base, "--out", whole)
    assert code == 0, said
    lines = (whole / f"{name}.answers.jsonl").read_bytes().splitlines(keepends=True)
    assert len(lines) == 2
    assert any(json.loads(line)["answers"] for line in lines), "nothing is answered: a comparison of nothing"

    done = subprocess.run(
        [sys.executable, "-c", KILLED, *base, "--out", str(cut)], capture_output=True, text=True, check=False
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    answers = cut / f"{name}.answers.jsonl"
    assert answers.read_bytes() == lines[0]
    assert not any((cut / file).exists() for file in FILES[name])
    with answers.open("ab") as file:
        file.write(lines[1][:30])  # as a kill in the middle of a write leaves it

    code, shown, said = run(*base, "--out", cut)
    assert code == 0, said
    assert answers.read_bytes() == b"".join(lines)  # the first was not heard again
    assert name == "proactive" or "2 streams, 0.00 h, 1 of them answered before" in " ".join(shown.split())
    for file_name in FILES[name]:
        assert (cut / file_name).read_bytes() == (whole / file_name).read_bytes(), file_name

    (cut / FILES[name][0]).unlink()
    assert run(*base, "--out", cut)[0] == 0  # all is there: it is scored again
    assert (cut / FILES[name][0]).read_bytes() == (whole / FILES[name][0]).read_bytes()
    assert answers.read_bytes() == b"".join(lines)


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("streams", ("--threshold", "0.6"), "threshold was 0.5, is 0.6"),
        ("streams", ("--dtype", "bfloat16"), "dtype was 'torch.float32', is 'torch.bfloat16'"),
        ("streams", ("--model", None), "fingerprint was"),
        ("proactive", ("--tier", "single"), "tier was 'multi', is 'single'"),
        ("proactive", ("--prompt", "Listen."), "system_prompt was None, is 'Listen.'"),
    ],
)
def test_another_model_or_setting_is_refused(
    tmp_path: Path, checkpoint: str, name: str, change: tuple[str, str | None], words: str
) -> None:
    base = [*command(name, tmp_path / "set", checkpoint), "--out", str(tmp_path / "o")]
    assert run(*base)[0] == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "o").iterdir()}
    option, value = change
    if value is None:
        other = random_model(seed=4)
        value = str(save(tmp_path / "m", other.config, other.weights, other.tokenizer.to_json()))
    code, _, said = run(*base, option, value)
    assert code == 2, said
    assert "of another run (" in said
    assert words in said
    assert "name another --out, or remove that file" in said
    assert {path.name: path.read_bytes() for path in (tmp_path / "o").iterdir()} == before
    assert run(*base, "--sessions", 2)[0] == 0  # which gives the same answers


def test_streams_that_share_a_name_are_told_apart_by_their_sound(tmp_path: Path, model: Model) -> None:
    sounds = [random_sound(seconds, seed) for seed, seconds in enumerate((2.0, 1.2, 1.6))]
    how, file = Hearing(sessions=1), tmp_path / "o.answers.jsonl"
    wanted = hear(model, sounds, how)
    assert len({tuple(answers) for answers in wanted}) == 3, "the answers are alike: a comparison of little"

    hear_kept(model, ["a"], sounds[:1], how, file)
    seen: list[int] = []
    heard = hear_kept(model, ["a", "a", "b"], sounds, how, file, seen.append)
    assert (heard.answers, heard.before, seen) == (wanted, frozenset({0}), [1, 2, 3])
    with pytest.raises(BenchmarkError, match=r":1: 'a' had another sound; name another --out, or remove"):
        hear_kept(model, ["a", "b"], sounds[1:], how, file)
    assert hear_kept(model, ["c"], [np.zeros(0, np.float32)], how, file).before == frozenset()


def test_answers_come_back_as_they_were(
    tmp_path: Path, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = [Answer(0.1 + 0.2, 'a "bell"\u2028\n鐘', "urgent"), Answer(3.0, "")]
    file, sound = tmp_path / "o.answers.jsonl", np.ones(160, np.float32)

    def answering(model: object, sounds: object, how: object, progress: object, before: object, keep: object):  # type: ignore[no-untyped-def]
        keep(0, said)  # type: ignore[operator]
        return [said]

    with monkeypatch.context() as patched:
        patched.setattr("fastloop.soundflow.kept.hear", answering)
        assert hear_kept(model, ["a"], [sound], Hearing(), file).answers == [said]
    assert hear_kept(model, ["a"], [sound], Hearing(), file).answers == [said]


@pytest.mark.parametrize(
    ("answers", "words"),
    [
        ("null", "is not a list of answers"),
        ('[{"t_s": 1.0}]', "is not a list of answers"),
        ('[{"t_s": "1", "text": "x", "emotion": null}]', "which is no answer"),
        ('[{"t_s": 1.0, "text": 5}]', "which is no answer"),
    ],
)
def test_a_wrong_answer_is_named_with_its_line(
    tmp_path: Path, model: Model, answers: str, words: str
) -> None:
    file, sound = tmp_path / "o.answers.jsonl", random_sound(0.5)
    hear_kept(model, ["a"], [sound], Hearing(), file)
    with file.open("a") as out:
        out.write(f'{{"id": "b", "sound": "0", "answers": {answers}}}\n')
    with pytest.raises(BenchmarkError, match=rf"o\.answers\.jsonl:2: field 'answers' .*{words}"):
        hear_kept(model, ["a"], [sound], Hearing(), file)


def test_two_runs_do_not_write_one_file(tmp_path: Path) -> None:
    file = tmp_path / "o.answers.jsonl"
    with kept(file, {"dtype": "x"}) as add:
        add({"id": "a"})
        with pytest.raises(BenchmarkError, match="another run is writing it; wait for it"), kept(file, {}):
            pass
        add({"id": "b"})
    with file.open("a") as out:
        assert alone(out)  # what is closed is free
    assert file.read_text() == '{"id": "a"}\n{"id": "b"}\n'
