"""`fastloop data`: what people type, what they get, what they are told."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from fastloop.cli import app

Run = Callable[..., Result]


@pytest.fixture
def run() -> Run:
    return lambda *arguments: CliRunner().invoke(app, ["data", *map(str, arguments)])


@pytest.fixture(scope="session")
def built(manifest: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from fastloop.soundflow.builder import build
    from fastloop.soundflow.workshop import BuildConfig

    out = tmp_path_factory.mktemp("corpus")
    build(BuildConfig(str(manifest), hours=32 / 3600, seconds=16.0, tasks=("sound_alert",)), out)
    return out


@pytest.mark.parametrize("command", ["build", "inspect", "show", "import"])
def test_every_help_has_an_example(run: Run, command: str) -> None:
    result = run(command, "--help")
    assert (
        result.exit_code == 0 and "Example" in result.stdout and f"fastloop data {command}" in result.stdout
    )


def test_build_says_what_it_made(run: Run, manifest: Path, tmp_path: Path) -> None:
    arguments = ["--clips", manifest, "--out", tmp_path / "c", "--hours", 0.004, "--seconds", 14.4]
    arguments += ["--workers", 1, "--tasks", "lookalikes", "--exclude", "kettle,melody"]
    result = run("build", *arguments)
    assert result.exit_code == 0, result.stderr
    assert "1 shards made, 0 were there; 1 streams, 0.00 h" in result.stdout
    note = json.loads((tmp_path / "c" / "train.build.json").read_text())
    assert note["exclude"] == ["kettle", "melody"] and note["tasks"] == ["lookalikes"] and note["tfjp"]
    assert "0 shards made, 1 were there" in run("build", *arguments).stdout


def test_errors_of_build_are_one_line(run: Run, tmp_path: Path) -> None:
    (tmp_path / "m.jsonl").write_text('{"id": "a"}\n')
    result = run("build", "--clips", tmp_path / "m.jsonl", "--out", tmp_path / "c")
    assert result.exit_code == 2 and result.stdout == ""
    assert result.stderr.startswith("fastloop data build: ") and result.stderr.count("\n") == 1
    assert "m.jsonl:1: field 'duration_s' is missing" in result.stderr


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--split", "demo"), "a corpus is of split train or val, not 'demo'"),
        (("--workers", "-1"), "workers must be 0 or more, got -1"),
        (("--exclude", "kettle,sirne"), "there is no label 'sirne' to leave out; known: "),
    ],
)
def test_wrong_settings_are_refused_before_anything_is_written(
    run: Run, manifest: Path, tmp_path: Path, more: tuple[str, ...], words: str
) -> None:
    rows = [json.loads(line) | {"split": "demo"} for line in manifest.read_text().splitlines()]
    clips = tmp_path / "clips" / "demo.jsonl"
    clips.parent.mkdir()
    clips.write_text("".join(json.dumps(row) + "\n" for row in rows))
    chosen = clips if "--split" in more else manifest
    result = run("build", "--clips", chosen, "--out", tmp_path / "c", "--workers", 1, *more)
    assert result.exit_code == 2 and words in result.stderr and result.stderr.count("\n") == 1
    assert not (tmp_path / "c").exists()


def test_clips_that_serve_nowhere_are_counted(run: Run, manifest: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    for row in rows:
        row["path"] = str(manifest.parent / row["path"])
        if row["id"] in ("train-dog", "val-dog"):
            row["label"] = "doge"
    clips = tmp_path / "m.jsonl"
    clips.write_text("".join(json.dumps(row) + "\n" for row in rows))
    length = ("--hours", 0.004, "--seconds", 14.4, "--workers", 1, "--tasks", "sound_alert")
    for planner, told in (("grammar", "1 doge"), ("random", "")):
        result = run("build", "--clips", clips, "--out", tmp_path / planner, "--planner", planner, *length)
        assert result.exit_code == 0, result.stderr
        assert ("serve nowhere" in result.stdout) == bool(told) and told in result.stdout
    scenario = tmp_path / "park.yaml"
    scenario.write_text("{scene: park, beds: {rain: 1}, events: {doge: 1, siren: 1, coughing: 1}}")
    result = run("build", "--clips", clips, "--out", tmp_path / "own", "--scenarios", scenario, *length)
    assert result.exit_code == 0 and "doge" not in result.stdout, result.stderr
    scenario.write_text("{scene: park, beds: {rain: 1}, events: {dogge: 1, siren: 1}}")
    result = run("build", "--clips", clips, "--out", tmp_path / "no", "--scenarios", scenario, *length)
    assert result.exit_code == 2 and "park.yaml: 'dogge' is neither a packaged sound" in result.stderr


def test_show_counts_what_is_there(run: Run, built: Path) -> None:
    result = run("show", built)
    assert result.exit_code == 0, result.stderr
    assert "0.01 hours" in result.stdout and "proactive_response / sound_alert" in result.stdout
    assert "turns answered" in result.stdout and "turns ignored" in result.stdout
    missing = run("show", built / "nothing")
    assert missing.exit_code == 2 and "nothing" in missing.stderr


def test_inspect_draws_clips_and_streams_and_names_what_it_cannot_read(
    run: Run, built: Path, manifest: Path, tmp_path: Path
) -> None:
    (tmp_path / "broken.wav").write_bytes(b"RIFF")
    clip, shard = manifest.parent / "train-dog.flac", built / "train-00000.tar"
    namesake = tmp_path / clip.name  # of another folder: it must not take the other's figure
    namesake.write_bytes((manifest.parent / "train-rain.flac").read_bytes())
    result = run(
        "inspect", clip, namesake, tmp_path / "broken.wav", shard, "--out", tmp_path / "f", "--streams", 1
    )
    assert result.exit_code == 1 and "broken.wav" in result.stderr
    assert "train-dog.png: 2.40 -> " in result.stdout and "train-dog-2.png: 3.00 -> " in result.stdout
    figures = sorted((tmp_path / "f").iterdir())
    assert [f.name for f in figures] == ["train-0-0000000.png", "train-dog-2.png", "train-dog.png"]
    assert all(f.read_bytes().startswith(b"\x89PNG") and f.stat().st_size > 10_000 for f in figures)


def test_tasks_lists_all_slots(run: Run) -> None:
    lines = run("tasks").stdout.splitlines()
    named = [line for line in lines if line.startswith("  ") and not line.startswith("   ")]
    assert len(named) == 28 and sum("needs data" in line for line in named) == len(lines) - 28 - 7


def test_import_reports_what_it_left_out(run: Run, manifest: Path, tmp_path: Path) -> None:
    clip = str(manifest.parent / "train-dog.flac")
    rows = [{"audio_path": path, "assistant": "A dog."} for path in (clip, "nothing.wav")]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = run("import", tmp_path / "x.jsonl", "--out", tmp_path / "c")
    assert result.exit_code == 0 and "1 streams" in result.stdout
    assert "1 conversations were left out" in result.stdout and "nothing.wav" in result.stdout
    assert run("import", tmp_path / "none.jsonl", "--out", tmp_path / "c").exit_code == 2
