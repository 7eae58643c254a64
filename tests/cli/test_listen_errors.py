"""`fastloop listen` where something is wrong: one line that says what, the rest is heard all the same."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
from typer.testing import Result

from fastloop.checkpoint import Model
from fastloop.testing.cases import random_sound
from fastloop.testing.records import parse, responses

Run = Callable[..., Result]


@pytest.mark.parametrize("seconds", [0.0, 0.9])
def test_half_a_sample_on_standard_input(run: Run, model_dir: Path, seconds: float) -> None:
    """What was heard is told, then the error."""
    pcm = np.zeros(round(16_000 * seconds), "<i2").tobytes() + b"\x01"
    result = run("listen", "-", "--model", model_dir, "--json", "--threshold", 1, input=pcm)
    assert result.exit_code == 2
    assert result.stderr.startswith("fastloop listen: standard input: ") and result.stderr.count("\n") == 1
    assert parse(result.stdout)[-1]["audio_s"] == seconds


def test_empty_standard_input(run: Run, model_dir: Path) -> None:
    result = run("listen", "-", "--model", model_dir, "--json", input=b"")
    assert result.exit_code == 2 and "no sound" in result.stderr


@pytest.mark.parametrize("name", ["whole", "part"])
def test_a_sound_file_on_standard_input_is_told(
    run: Run, model_dir: Path, sounds: dict[str, Path], name: str
) -> None:
    result = run("listen", "-", "--model", model_dir, "--json", input=sounds[name].read_bytes())
    assert result.exit_code == 2 and "not raw PCM" in result.stderr and result.stderr.count("\n") == 1
    assert parse(result.stdout)[-1]["chunks"] == 0


def test_a_truncated_file_is_heard_as_far_as_it_goes(
    run: Run, model_dir: Path, sounds: dict[str, Path], tmp_path: Path
) -> None:
    whole = sounds["whole"].read_bytes()
    (tmp_path / "cut.wav").write_bytes(whole[: len(whole) // 2])
    result = run("listen", tmp_path / "cut.wav", "--model", model_dir, "--json", "--threshold", 0)
    assert result.exit_code == 2 and "cut.wav" in result.stderr and result.stderr.count("\n") == 1
    records = parse(result.stdout)
    responses(records)  # also the last one has an end
    assert records[-1]["type"] == "summary" and 2 < records[-1]["audio_s"] < 4.8


def bad_files(directory: Path) -> dict[str, Path]:
    names = ("missing.wav", "zip.wav", "empty.wav", "text.flac", "folder.wav")
    files = {name: directory / name for name in names}
    with zipfile.ZipFile(files["zip.wav"], "w") as archive:
        archive.writestr("sound.txt", "not a sound" * 100)
    files["empty.wav"].write_bytes(b"")
    files["text.flac"].write_text("not a sound\n" * 100)
    files["folder.wav"].mkdir()
    return files


def test_bad_files_are_named_and_the_others_heard(
    run: Run, model_dir: Path, sounds: dict[str, Path], tmp_path: Path
) -> None:
    bad = list(bad_files(tmp_path).values())
    result = run("listen", bad[0], sounds["part"], *bad[1:], sounds["whole"], "--model", model_dir, "--json")
    assert result.exit_code == 2
    summaries = [r["file"] for r in parse(result.stdout) if r["type"] == "summary"]
    assert summaries == [str(sounds["part"]), str(sounds["whole"])]
    errors = result.stderr.splitlines()
    assert len(errors) == len(bad) + 1
    for line, path in zip(errors, bad, strict=False):
        assert line.startswith("fastloop listen: ") and str(path) in line
    assert errors[-1].startswith("fastloop listen: 5 of 7 not heard to the end: ")
    assert all(str(path) in errors[-1] for path in bad)


def test_sound_that_is_no_number_stops_its_file_alone(
    run: Run, model_dir: Path, sounds: dict[str, Path], tmp_path: Path
) -> None:
    broken = random_sound(2.0)
    broken[20_000] = np.nan
    soundfile.write(tmp_path / "nan.wav", broken, 16_000, subtype="FLOAT")
    files = (tmp_path / "nan.wav", sounds["part"])
    result = run("listen", *files, "--model", model_dir, "--json", "--threshold", 1)
    assert result.exit_code == 2 and "nan.wav" in result.stderr and len(result.stderr.splitlines()) == 2
    records = parse(result.stdout)
    assert [r["file"] for r in records if r["type"] == "summary"] == [str(path) for path in files]


def test_a_model_that_breaks_is_a_failure(
    run: Run, model: Model, sounds: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = dict(model.weights)
    weights["decoder.norm.weight"] = weights["decoder.norm.weight"] * float("nan")
    broken = Model(model.config, weights, model.tokenizer)
    monkeypatch.setattr("fastloop.checkpoint.load", lambda name: broken)
    result = run("listen", sounds["part"], "--json")
    assert result.exit_code == 1 and "not finite" in result.stderr and len(result.stderr.splitlines()) == 1
    assert parse(result.stdout)[-1]["chunks"] == 0


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "give one of"),
        (["--mic", "FILE"], "give one of"),
        (["--demo", "--mic"], "give one of"),
        (["-", "-"], "only once"),
        (["-", "--realtime"], "--realtime"),
        (["--mic", "--offline"], "--offline"),
        (["FILE", "--text", "why?"], "--offline"),
        (["FILE", "--offline", "--text", "\udcff"], "user_text: must be Unicode text"),
        (["FILE", "--threshold", "2"], "--threshold"),
        (["FILE", "--threshold", "nan"], "threshold"),
        (["FILE", "--rearm", "-0.1"], "--rearm"),
        (["FILE", "--min-gap", "-1"], "--min-gap"),
        (["FILE", "--window", "0"], "--window"),
        (["FILE", "--seed", "-1"], "--seed"),
        (["FILE", "--top-p", "0"], "top_p"),
        (["FILE", "--edge", "none"], "--edge"),
        (["FILE", "--format", "mp3"], "--format"),
        (["-", "--rate", "1"], "rate"),
        (["-", "--channels", "1000"], "channels"),
        (["FILE", "--no-such-option"], "--no-such-option"),
        (["FILE", "--model", "no-such-model"], "no-such-model"),
    ],
)
def test_bad_usage_is_one_line_and_exit_code_2(
    run: Run, model_dir: Path, sounds: dict[str, Path], arguments: list[str], told: str
) -> None:
    given = [str(sounds["part"]) if a == "FILE" else a for a in arguments]
    model = [] if "--model" in given else ["--model", str(model_dir)]
    result = run("listen", *given, *model)
    assert result.exit_code == 2 and result.stdout == ""
    assert len(result.stderr.splitlines()) == 1
    assert result.stderr.startswith("fastloop listen: ") and told in result.stderr


def test_a_damaged_model_is_one_line(
    run: Run, model_dir: Path, sounds: dict[str, Path], tmp_path: Path
) -> None:
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_bytes((model_dir / name).read_bytes())
    weights = (model_dir / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    result = run("listen", sounds["part"], "--model", tmp_path)
    assert result.exit_code == 2 and len(result.stderr.splitlines()) == 1
    assert "model.safetensors" in result.stderr


def test_a_backend_that_cannot_run_is_told(
    run: Run, model_dir: Path, sounds: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTLOOP_BACKEND", "linear=cuda")
    result = run("listen", sounds["part"], "--model", model_dir)
    assert result.exit_code == 2 and "linear" in result.stderr and "fastloop doctor" in result.stderr
