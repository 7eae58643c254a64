"""Corpora on disk: the same bytes however they are made, whole or absent, and read back as made."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from fastloop.config import ModelConfig
from fastloop.soundflow import shards, voices
from fastloop.soundflow.builder import build
from fastloop.soundflow.clips import DataError
from fastloop.soundflow.sequence import IGNORED, token_sequence
from fastloop.soundflow.shards import ShardError, find_shards, parse_stream, read_streams, write_shard
from fastloop.soundflow.sounds import Library
from fastloop.soundflow.streams import default_mix, stream
from fastloop.soundflow.workshop import STRIDE, BuildConfig, Workshop
from fastloop.testing.streams import nano
from fastloop.text import Tokenizer


@pytest.fixture
def config(manifest: Path) -> BuildConfig:
    """Three shards of two streams of 16 s, the last with one."""
    return BuildConfig(str(manifest), hours=80 / 3600, shard_s=32.0, seconds=16.0, tasks=("sound_alert",))


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("*.tar"))}


def fail(reason: str) -> None:
    raise AssertionError(reason)


# ---- shards


def test_a_shard_holds_what_stream_gives_to_the_bit(
    config: BuildConfig, library: Library, tmp_path: Path
) -> None:
    build(config, tmp_path)
    mix = default_mix(library, config.tasks)
    indices = [0, 1, STRIDE, STRIDE + 1, 2 * STRIDE]
    found = list(read_streams(find_shards([tmp_path]), "train", fail))
    assert [each.id for each, _ in found] == [f"train-0-{index:07d}" for index in indices]
    for (_, pcm), index in zip(found, indices, strict=True):
        assert np.array_equal(pcm, stream(0, index, mix, 16.0).pcm)


def test_flac_keeps_every_16_bit_sample() -> None:
    x = (np.arange(-32768, 32768) / 32768).astype(np.float32)
    back, rate = soundfile.read(io.BytesIO(shards.encode_flac(x)), dtype="float32")
    assert rate == 16000 and np.array_equal(back, x)


def test_a_shard_that_cannot_be_written_leaves_nothing(
    config: BuildConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    build(replace(config, hours=32 / 3600), tmp_path / "reference")
    with (
        monkeypatch.context() as patched,
        pytest.raises(DataError, match=r"No space left.*finished shards are kept"),
    ):
        patched.setattr(shards.os, "fsync", full)
        build(config, tmp_path / "full")
    assert sorted(p.name for p in (tmp_path / "full").iterdir()) == ["train.build.json", "train.build.lock"]
    build(config, tmp_path / "full")
    name = "train-00000.tar"
    assert hashes(tmp_path / "full")[name] == hashes(tmp_path / "reference")[name]


def test_a_record_that_could_not_be_read_is_not_written(library: Library, tmp_path: Path) -> None:
    made = stream(0, 0, default_mix(library, ["lookalikes"]), 16.0)
    made.record["split"] = "holiday"
    with pytest.raises(ShardError, match="split"):
        write_shard(tmp_path / "x.tar", [made])
    assert not list(tmp_path.iterdir())


# ---- builds


def test_the_bytes_depend_on_nothing_but_settings_and_clips(
    config: BuildConfig, manifest: Path, tmp_path: Path
) -> None:
    """Not on workers, not on the place of the clips, not on what was made before."""
    build(config, tmp_path / "here")
    moved = tmp_path / "moved"
    moved.mkdir()
    for file in manifest.parent.iterdir():
        (moved / file.name).write_bytes(file.read_bytes())
    counted = build(replace(config, manifest=str(moved / manifest.name)), tmp_path / "workers", workers=2)
    assert counted.made == 3 and counted.streams == 5 and counted.seconds == pytest.approx(80)
    Workshop(config).make(2, tmp_path)
    expected = hashes(tmp_path / "here")
    assert len(expected) == 3 and hashes(tmp_path / "workers") == expected
    assert hashes(tmp_path) == {"train-00002.tar": expected["train-00002.tar"]}
    build(replace(config, seed=1), tmp_path / "other")
    assert set(hashes(tmp_path / "other").values()).isdisjoint(expected.values())


def test_a_build_goes_on_after_what_is_there(config: BuildConfig, tmp_path: Path) -> None:
    build(config, tmp_path)
    expected = hashes(tmp_path)
    kept = (tmp_path / "train-00000.tar").stat().st_mtime_ns
    (tmp_path / "train-00001.tar").unlink()
    (tmp_path / ".train-00001.tar.4711.partial").write_bytes(b"half of it")
    seen: list[tuple[int, int, int]] = []
    done = build(config, tmp_path, progress=lambda b, n: seen.append((b.made, b.found, n)))
    assert (done.made, done.found, seen) == (1, 2, [(1, 2, 3)])
    assert hashes(tmp_path) == expected and not list(tmp_path.glob(".*"))
    assert (tmp_path / "train-00000.tar").stat().st_mtime_ns == kept


def test_a_build_that_was_killed_goes_on_to_the_same_bytes(config: BuildConfig, tmp_path: Path) -> None:
    build(config, tmp_path / "whole")
    code = (
        "import sys; from pathlib import Path; from fastloop.soundflow.builder import *\n"
        f"build({config!r}, Path(sys.argv[1]))"
    )
    killed = tmp_path / "killed"
    process = subprocess.Popen([sys.executable, "-c", code, str(killed)])
    while process.poll() is None and not hashes(killed):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert hashes(killed)
    build(config, killed)
    assert hashes(killed) == hashes(tmp_path / "whole")


def test_workers_end_with_a_build_that_was_killed(config: BuildConfig, tmp_path: Path) -> None:
    code = (
        "import multiprocessing, sys, threading, time\n"
        "from pathlib import Path\n"
        "from fastloop.soundflow.builder import *\n"
        "def tell():\n"
        "    while not (found := multiprocessing.active_children()): time.sleep(0.01)\n"
        "    print(*(p.pid for p in found), flush=True)\n"
        "if __name__ == '__main__':\n"
        "    threading.Thread(target=tell, daemon=True).start()\n"
        f"    build({replace(config, hours=2)!r}, Path(sys.argv[1]), workers=1)\n"
    )
    script = tmp_path / "build.py"
    script.write_text(code)
    process = subprocess.Popen(
        [sys.executable, str(script), str(tmp_path / "c")], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    workers = [int(pid) for pid in process.stdout.readline().split()]
    while not hashes(tmp_path / "c"):
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    process.stdout.read()  # ends when the last process that could write to it is gone
    assert workers
    for worker in workers:
        state = Path(f"/proc/{worker}/stat")
        assert not state.exists() or state.read_text().rpartition(")")[2].split()[0] in "ZX"


def test_a_second_build_in_the_same_folder_is_refused_while_one_is_at_work(
    config: BuildConfig, tmp_path: Path
) -> None:
    half = tmp_path / ".train-00002.tar.4711.partial"
    tried: list[int] = []

    def second(so_far: object, shards: int) -> None:
        half.write_bytes(b"of the first")
        with pytest.raises(DataError, match="another build of its train corpus is at work; wait for it"):
            build(config, tmp_path)
        assert half.exists()
        tried.append(shards)

    build(config, tmp_path, progress=second)
    assert tried == [3, 3, 3]
    assert build(config, tmp_path).found == 3  # what has ended is no hindrance
    assert not half.exists()


def test_a_note_that_a_full_disk_cut_off_does_not_stop_the_next_build(
    config: BuildConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, text: str, encoding: str) -> None:
        path.write_bytes(text.encode()[:40])
        raise OSError(errno.ENOSPC, "No space left on device")

    short = replace(config, hours=16 / 3600)
    with monkeypatch.context() as patched, pytest.raises(DataError, match=r"cannot be used: .*No space"):
        patched.setattr(Path, "write_text", full)
        build(short, tmp_path)
    assert build(short, tmp_path).made == 1


def test_another_corpus_in_the_same_folder_is_refused(
    config: BuildConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(replace(config, hours=16 / 3600), tmp_path)
    with pytest.raises(DataError, match=r"another train corpus \(different: seed\)"):
        build(replace(config, hours=16 / 3600, seed=3), tmp_path)
    with monkeypatch.context() as patched, pytest.raises(DataError, match="versions of fastloop"):
        patched.setattr(voices, "version", lambda: "espeak-ng 9.9")
        build(replace(config, hours=16 / 3600), tmp_path)
    build(replace(config, hours=16 / 3600, split="val"), tmp_path)  # another split may share it
    assert len(hashes(tmp_path)) == 2


def test_clips_that_cannot_be_read_are_reported(config: BuildConfig, manifest: Path, tmp_path: Path) -> None:
    for file in manifest.parent.iterdir():
        damaged = file.name.startswith(("train-coughing", "train-crying_baby", "train-dog"))
        (tmp_path / file.name).write_bytes(b"" if damaged else file.read_bytes())
    broken = replace(config, manifest=str(tmp_path / manifest.name), shard_s=80.0)
    done = build(broken, tmp_path / "out")
    assert done.streams == 5 and done.unreadable
    for name, reason in done.unreadable.items():
        assert name in ("train-coughing", "train-crying_baby", "train-dog") and f"{name}.flac" in reason


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"hours": 0}, "hours"),
        ({"shard_s": 0.1}, "shard"),
        ({"seconds": 1.0}, "stream must be 8 s"),
        ({"seed": -1}, "seed"),
        ({"planner": "oracle"}, "'oracle' is none of grammar, random, llm"),
        ({"planner": "llm"}, "address of an endpoint"),
        ({"tasks": ("nonsense",)}, "no sub-task 'nonsense'"),
        ({"scenarios": ("/nowhere.yaml",)}, "nowhere.yaml"),
        ({"split": "holiday"}, "no clip of split 'holiday'"),
    ],
)
def test_settings_that_make_no_sense_are_refused_before_anything_is_made(
    config: BuildConfig, tmp_path: Path, change: dict[str, Any], named: str
) -> None:
    with pytest.raises(DataError) as error:
        build(replace(config, **change), tmp_path / "out", workers=2)
    assert named in str(error.value) and not (tmp_path / "out").exists()


def test_speech_is_refused_at_once_where_there_is_no_voice(
    config: BuildConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(voices, "available", lambda: False)
    with pytest.raises(DataError, match=r"apt-get install espeak-ng.*history_review"):
        build(replace(config, tasks=("history_review",)), tmp_path / "out")


@pytest.mark.parametrize("planner", ["random", "grammar"])
def test_both_planners_build_with_and_without_tfjp(config: BuildConfig, tmp_path: Path, planner: str) -> None:
    small = replace(config, hours=16 / 3600, planner=planner, tfjp=False)
    assert build(small, tmp_path).streams == 1


def test_a_language_models_corpus_is_made_again_from_what_was_kept(
    config: BuildConfig, endpoint: Any, tmp_path: Path
) -> None:
    scene = tmp_path / "scene.yaml"
    scene.write_text("{scene: test, beds: {rain: 1}, events: {siren: 1, coughing: 1}}")
    plan = {"events": [{"label": "siren", "gap_s": 1.0}, {"label": "coughing", "gap_s": 2.0}]}
    endpoint.answers = [json.dumps(plan)] * 20
    asks = replace(
        config, planner="llm", llm_url=endpoint.url, llm_model="m", llm_kept=str(tmp_path / "kept")
    )
    asks = replace(asks, scenarios=(str(scene),), hours=16 / 3600)
    build(asks, tmp_path / "first")
    ((stream, _),) = read_streams(find_shards([tmp_path / "first"]), "train", fail)
    assert [turn.label for turn in stream.turns if turn.reply is not None] == ["siren", "coughing"]
    build(replace(asks, llm_url="http://127.0.0.1:1/v1"), tmp_path / "second")  # nobody there
    assert hashes(tmp_path / "first") == hashes(tmp_path / "second")


@pytest.mark.slow  # a cluster starts
def test_ray_makes_the_same_bytes(config: BuildConfig, tmp_path: Path) -> None:
    pytest.importorskip("ray.data", reason="Ray is not installed: pip install 'ray[data]'")
    build(config, tmp_path / "here")
    done = build(config, tmp_path / "ray", workers=2, ray=True)
    assert (done.made, done.streams) == (3, 5)
    assert hashes(tmp_path / "ray") == hashes(tmp_path / "here")
    assert build(config, tmp_path / "ray", ray=True).made == 0


# ---- what a model reads


@pytest.fixture(scope="module")
def words() -> Tokenizer:
    return nano()[1]


@pytest.fixture(scope="module")
def model() -> ModelConfig:
    return nano()[0]


def test_a_record_becomes_the_protocol(words: Tokenizer, model: ModelConfig) -> None:
    """ONLINE ... TEXT_END, then AUDIO_BEGIN PAD x A ASSISTANT and silence or a reply, labelled there only."""

    def turn(start: float, end: float, said: str, emotion: str | None, due: float | None) -> dict[str, Any]:
        named = {"user": "x", "scene_type": "lab", "audio_path": "a", "label": "x"}
        times = {"start_s": start, "end_s": end, "answer_s": due}
        return {"assistant": said, "emotion": emotion, **named, **times}

    turns = [
        turn(0.0, 2.0, "<no need to response>", None, None),
        turn(0.1, 0.8, "A beep.", "urgent", 0.8),  # due exactly at the end of the second chunk
        turn(0.9, 1.0, "4", None, 1.0),
        turn(1.0, 1.15, "2", None, 1.15),  # in the same chunk: one reply
    ]
    record = {"id": "x", "stream_scene_type": "lab", "num_turns": 4, "ability": "a", "sub_task": "b"}
    record |= {"split": "train", "seed": 0, "duration_s": 1.5, "audio_path": "x.flac", "turns": turns}
    made = token_sequence(model, words, parse_stream(record), "Listen.")
    t = model.tokens
    prefix = [t.online, t.language, t.system, t.text_begin, *words.encode("Listen."), t.text_end]
    hear = [t.audio_begin, *[t.audio_pad] * model.chunk_tokens, t.assistant]
    beep = [t.text_begin, t.emotions["urgent"], *words.encode("A beep."), t.text_end]
    digits = [t.text_begin, *words.encode("4 2"), t.text_end]
    said = [[t.keep_silence], beep, digits, [t.keep_silence]]
    assert made.ids.tolist() == prefix + [i for each in said for i in hear + each]
    blank = [IGNORED] * len(hear)
    assert made.labels.tolist() == [IGNORED] * len(prefix) + [i for each in said for i in blank + each]
    assert int(made.audio.sum()) == 4 * model.chunk_tokens


def test_streams_become_sequences_with_a_decision_for_every_chunk(
    library: Library, words: Tokenizer, model: ModelConfig
) -> None:
    t = model.tokens
    for index in range(3):
        record = stream(5, index, default_mix(library, ["household"]), 25.6).record
        made = token_sequence(model, words, parse_stream(record))
        decisions = made.labels[1:][made.ids[:-1] == t.assistant]
        assert len(decisions) == 64 and set(decisions.tolist()) <= {t.keep_silence, t.text_begin, IGNORED}
        due = {turn["answer_s"] for turn in record["turns"] if turn["answer_s"] is not None}
        assert int((decisions == t.text_begin).sum()) == len({int(np.ceil(s / 0.4 - 1e-9)) for s in due})
