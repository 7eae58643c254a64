"""`fastloop listen` on files: what it prints is what the model says, in the documented shapes."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from typer.testing import Result

from fastloop.audio.live import SAMPLE_FORMATS
from fastloop.checkpoint import Model
from fastloop.cli import listen
from fastloop.events import Decision, ResponseEnd, ResponseStart
from fastloop.options import DecisionPolicy, Sampling, SessionConfig
from fastloop.testing.cases import random_sound
from fastloop.testing.drive import Script, expected, lively_policy
from fastloop.testing.records import parse, responses

Run = Callable[..., Result]


@pytest.fixture(scope="session")
def policy(model: Model) -> DecisionPolicy:
    return lively_policy(model)


def untimed(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in r.items() if k not in ("wall_s", "latency_ms")} for r in records]


def test_json_lines_say_what_the_plain_loop_says(
    run: Run, model: Model, model_dir: Path, sounds: dict[str, Path], policy: DecisionPolicy
) -> None:
    sampling = ("--temperature", 0.7, "--top-k", 50, "--top-p", 0.95, "--seed", 5)
    options = ("--model", model_dir, "--threshold", policy.threshold, *sampling)
    result = run("listen", sounds["whole"], "--json", *options)
    assert result.exit_code == 0 and result.stderr == ""
    records = parse(result.stdout)

    config = SessionConfig(policy=policy, sampling=Sampling(0.7, 50, 0.95), seed=5)
    events = expected(model, Script(config, random_sound(4.8, seed=1)))
    decisions = [e for e in events if isinstance(e, Decision)]
    assert {e.decision for e in decisions} == {"silent", "respond"}
    heard = [r for r in records if r["type"] == "decision"]
    assert [(r["chunk"], r["t"], r["decision"]) for r in heard] == [
        (e.chunk, round(e.t, 3), e.decision) for e in decisions
    ]
    # p_respond: within 1e-5 in any batch, and rounded to 1e-6
    assert np.allclose([r["p_respond"] for r in heard], [e.p_respond for e in decisions], rtol=0, atol=1.1e-5)
    starts = [e for e in events if isinstance(e, ResponseStart)]
    ends = [e for e in events if isinstance(e, ResponseEnd)]
    assert responses(records) == [
        {"t": round(s.t, 3), "emotion": s.emotion, "text": e.text, "reason": e.reason}
        for s, e in zip(starts, ends, strict=True)
    ]
    summary = records[-1]
    assert summary["type"] == "summary" and summary["file"] == str(sounds["whole"])
    assert (summary["audio_s"], summary["chunks"], summary["responses"]) == (4.8, 12, len(starts))
    assert summary["wall_s"] > 0 and summary["latency_ms"]["p50"] > 0


def test_a_last_partial_chunk_is_decided(run: Run, model_dir: Path, sounds: dict[str, Path]) -> None:
    result = run("listen", sounds["part"], "--model", model_dir, "--json", "--threshold", 1)
    records = parse(result.stdout)
    assert [r["t"] for r in records if r["type"] == "decision"] == [0.4, 0.8, 1.2, 1.6]
    assert (records[-1]["audio_s"], records[-1]["chunks"], records[-1]["responses"]) == (1.32, 4, 0)


@pytest.mark.parametrize(
    ("name", "form", "codec"),
    [
        ("sound.wav", "WAV", "PCM_24"),
        ("sound.flac", "FLAC", "PCM_16"),
        ("sound.ogg", "OGG", "VORBIS"),
        ("sound.opus", "OGG", "OPUS"),
        ("sound.mp3", "MP3", "MPEG_LAYER_III"),
        ("mp3 called.wav", "MP3", "MPEG_LAYER_III"),
    ],
)
@pytest.mark.parametrize(("rate", "channels"), [(48_000, 2), (16_000, 1)])
def test_every_kind_of_file_is_heard(
    run: Run, model_dir: Path, tmp_path: Path, name: str, form: str, codec: str, rate: int, channels: int
) -> None:
    at = np.arange(2 * rate) / rate
    tone = np.tile((0.3 * np.sin(2 * np.pi * 440 * at))[:, None], (1, channels))
    soundfile.write(tmp_path / name, tone, rate, format=form, subtype=codec)
    result = run("listen", tmp_path / name, "--model", model_dir, "--json", "--threshold", 1)
    assert (result.exit_code, result.stderr) == (0, "")
    records = parse(result.stdout)
    assert 2.0 <= records[-1]["audio_s"] < 2.1 and 5 <= records[-1]["chunks"] <= 6  # mp3 pads its ends
    assert [r["chunk"] for r in records[:-1]] == list(range(records[-1]["chunks"]))


def test_seeds(run: Run, model_dir: Path, sounds: dict[str, Path]) -> None:
    def text(seed: int) -> list[dict[str, Any]]:
        options = ("--threshold", 0, "--temperature", 1.5, "--seed", seed, "--min-gap", 3)
        result = run("listen", sounds["whole"], "--model", model_dir, "--json", *options)
        return responses(parse(result.stdout))

    assert text(1) == text(1) != text(2)


def test_policy_options_reach_the_session(run: Run, model_dir: Path, sounds: dict[str, Path]) -> None:
    def starts(*options: object) -> list[float]:
        result = run("listen", sounds["whole"], "--model", model_dir, "--json", *options)
        return [r["t"] for r in parse(result.stdout) if r["type"] == "response.start"]

    assert len(starts("--threshold", 0)) == 12
    spaced = starts("--threshold", 0, "--min-gap", 2)
    assert len(spaced) > 1 and all(2 <= round(b - a, 3) < 3 for a, b in pairwise(spaced))
    assert starts("--threshold", 0, "--rearm", 0) == [0.4]
    assert starts("--threshold", 1) == []


def test_window_and_edge_change_what_is_heard(run: Run, model_dir: Path, sounds: dict[str, Path]) -> None:
    def chances(*options: object) -> list[float]:
        result = run("listen", sounds["whole"], "--model", model_dir, "--json", "--threshold", 1, *options)
        return [r["p_respond"] for r in parse(result.stdout) if r["type"] == "decision"]

    plain = chances()
    assert len(plain) == len(chances("--window", 0.4)) == len(chances("--edge", "wait")) == 12
    assert plain != chances("--window", 0.4) and plain != chances("--edge", "wait")
    assert plain == chances("--window", 200)  # beyond the default pool: it is sized for the window


def test_plain_output_is_a_line_per_response_and_file(
    run: Run, model_dir: Path, sounds: dict[str, Path]
) -> None:
    options = ("--model", model_dir, "--threshold", 0, "--min-gap", 3.5, "--temperature", 2)
    result = run("listen", sounds["whole"], *options)
    lines = result.stdout.splitlines()
    assert result.exit_code == 0 and result.stderr == ""
    assert all(line.isprintable() for line in lines)
    assert [line.split()[0] for line in lines[:-1]] == ["0:00.4", "0:04.4"]
    assert lines[-1].startswith(f"{sounds['whole']}: heard 4.8 s in ")
    assert "12 chunks, 2 responses" in lines[-1]


def test_several_files_are_several_streams(run: Run, model_dir: Path, sounds: dict[str, Path]) -> None:
    options = ("--model", model_dir, "--threshold", 0, "--min-gap", 3)
    both = run("listen", sounds["whole"], sounds["part"], *options, "--json")
    alone = [run("listen", sounds[name], *options, "--json") for name in ("whole", "part")]
    assert untimed(parse(both.stdout)) == untimed([r for one in alone for r in parse(one.stdout)])

    plain = run("listen", sounds["whole"], sounds["part"], *options).stdout.splitlines()
    assert [line.split(": ")[0] for line in plain] == [str(sounds["whole"])] * 3 + [str(sounds["part"])] * 2


def test_offline_answers_the_whole_clip(run: Run, model_dir: Path, sounds: dict[str, Path]) -> None:
    def answer(*options: object) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        result = run("listen", sounds["part"], "--model", model_dir, "--offline", "--json", *options)
        assert result.exit_code == 0 and result.stderr == ""
        records = parse(result.stdout)
        return responses(records), records[-1]

    plain, summary = answer()
    assert len(plain) == 1 and plain[0]["t"] == 1.32
    assert (summary["chunks"], summary["responses"], summary["audio_s"]) == (0, 1, 1.32)
    assert summary["latency_ms"]["p50"] > 0
    assert answer("--text", "What is ringing?")[0] != plain


def test_an_offline_clip_has_a_limit(
    run: Run, model_dir: Path, sounds: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listen, "OFFLINE_SECONDS", 2.0)
    result = run("listen", sounds["whole"], sounds["part"], "--model", model_dir, "--offline", "--json")
    assert result.exit_code == 2 and "longer than 2 s" in result.stderr and "whole.wav" in result.stderr
    assert [r["file"] for r in parse(result.stdout) if r["type"] == "summary"] == [str(sounds["part"])]


def test_the_demo_sound(
    run: Run, model_dir: Path, sounds: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastloop.checkpoint.MODELS", tmp_path)
    missing = run("listen", "--demo", "--model", model_dir)
    assert missing.exit_code == 2 and "no demo sound" in missing.stderr
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "street.flac").write_bytes(sounds["part"].read_bytes())
    result = run("listen", "--demo", "--model", model_dir, "--json")
    assert result.exit_code == 0 and parse(result.stdout)[-1]["file"] == "street.flac"


def as_int16(pcm: np.ndarray) -> np.ndarray:
    return np.round(pcm * 32767).astype("<i2")


def test_raw_pcm_is_heard_like_a_file(run: Run, model_dir: Path, tmp_path: Path) -> None:
    """Every format and channel count that says the same thing is heard the same."""
    pcm = as_int16(random_sound(1.2, seed=4))
    soundfile.write(tmp_path / "sound.wav", pcm, 16_000)

    def chances(*arguments: object, stdin: bytes = b"") -> list[float]:
        result = run("listen", *arguments, "--model", model_dir, "--json", "--threshold", 1, input=stdin)
        assert (result.exit_code, result.stderr) == (0, "")
        return [r["p_respond"] for r in parse(result.stdout) if r["type"] == "decision"]

    truth = chances(tmp_path / "sound.wav")
    floats = (pcm / np.float32(32768)).astype("<f4")
    for heard in (
        chances("-", stdin=pcm.tobytes()),
        chances("-", "--channels", 2, stdin=np.repeat(pcm, 2).tobytes()),
        chances("-", "--format", "f32le", stdin=floats.tobytes()),
    ):  # the chunks go through the decoder in other batches: within 1e-5, and rounded to 1e-6
        assert len(heard) == len(truth) == 3 and np.allclose(heard, truth, rtol=0, atol=1.1e-5)
    assert len(chances("-", "--rate", 8000, stdin=pcm.tobytes())) == 6


def test_the_formats_are_those_of_the_reader() -> None:
    assert {f.value for f in listen.SampleFormat} == set(SAMPLE_FORMATS)
