"""The released code's JSONL: read as that code reads it, checked, turned into streams and sequences."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from fastloop.config import PUBLISHED_TOKENS, ModelConfig
from fastloop.soundflow.clips import DataError
from fastloop.soundflow.conversations import compose_online, import_online
from fastloop.soundflow.released import (
    OfflineSample,
    OnlineTurn,
    offline_sequence,
    read_offline,
    read_online,
    read_tokens,
)
from fastloop.soundflow.sequence import IGNORED, Reply
from fastloop.soundflow.shards import find_shards, parse_stream, read_streams
from fastloop.testing.streams import nano
from fastloop.text import Tokenizer


def lines(tmp_path: Path, *rows: Any) -> Path:
    file = tmp_path / "data.jsonl"
    file.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return file


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    """Tones of 0.5 s and 1.3 s, 24 kHz and 16 kHz."""
    for name, seconds, rate in (("one.wav", 0.5, 24000), ("two.flac", 1.3, 16000)):
        t = np.arange(round(seconds * rate)) / rate
        soundfile.write(tmp_path / name, 0.5 * np.sin(2 * np.pi * 700 * t), rate)
    return tmp_path


# ---- online


def test_online_conversations_in_all_their_forms(tmp_path: Path) -> None:
    first = {"audio_path": "a.wav", "assistant": "first reply", "emotion": "happy"}
    second = {"audio_path": "/b.wav", "assistant": "<no need to response>", "emotion": "normal"}
    step = {"turns": [first | {"leading_silence_frames": 10}], "tail_silence_frames": 10, "idx": 0}
    flat = {"merge_path": "c.wav", "assistant": "Also works.", "emotion": "SURPRISE"}
    plain = {
        "conversation": [
            {"audio_path": "d.wav", "assistant": "No need to response"},
            first | {"emotion": None},
        ]
    }
    found = list(read_online(lines(tmp_path, {"conversation": [first, second]}, "", step, flat, plain)))
    a = OnlineTurn(tmp_path / "a.wav", Reply("first reply", "happy"))
    assert found[0] == (a, OnlineTurn(Path("/b.wav"), None))
    assert found[1] == (a,)
    assert found[2] == (OnlineTurn(tmp_path / "c.wav", Reply("Also works.", "surprise")),)
    assert found[3][0].reply is None and found[3][1].reply == Reply("first reply", "normal")


@pytest.mark.parametrize(
    ("row", "named"),
    [
        ("{", "not valid JSON"),
        ([1], "must be a JSON object"),
        ({"assistant": "x"}, "'merge_path' is missing"),
        (
            {"conversation": [{"audio_path": "a", "assistant": "x"}, {"audio_path": "a"}]},
            "turn 1: field 'assistant'",
        ),
        ({"conversation": ["a"]}, "list of objects"),
        ({"audio_path": 3, "assistant": "x"}, "'audio_path' is 3"),
    ],
)
def test_an_online_line_that_is_wrong_is_named(tmp_path: Path, row: Any, named: str) -> None:
    good = {"audio_path": "a", "assistant": "x"}
    with pytest.raises(DataError, match=r"data\.jsonl:2: ") as error:
        list(read_online(lines(tmp_path, good, row)))
    assert named in str(error.value)


def test_a_conversation_becomes_a_stream(clips: Path) -> None:
    turns = (
        OnlineTurn(clips / "one.wav", Reply("Hello.", "happy"), "hi"),
        OnlineTurn(clips / "two.flac", None),
    )
    made = compose_online(turns, "x", 7)
    stream = parse_stream(made.record)
    assert len(made.pcm) % 6400 == 0 and np.abs(made.pcm).max() < 1
    one, two = stream.turns
    assert one.end_s - one.start_s == pytest.approx(0.5, abs=0.01)
    assert two.end_s - two.start_s == pytest.approx(1.3, abs=0.01)
    assert (one.reply, one.emotion, one.answer_s) == ("Hello.", "happy", one.end_s)
    assert (two.reply, two.answer_s) == (None, None)
    assert 0.8 <= one.start_s <= 2.41 and 0.8 <= two.start_s - one.end_s <= 2.41
    assert 0.8 - 1e-3 <= stream.seconds - two.end_s <= 2.4 + 0.41
    loud = np.abs(made.pcm[round(one.start_s * 16000) : round(one.end_s * 16000)]).max()
    assert loud > 10 * np.abs(made.pcm[: round(one.start_s * 16000) - 200]).max()


def test_import_writes_shards_and_lists_what_it_left_out(clips: Path) -> None:
    good = {"conversation": [{"audio_path": "one.wav", "assistant": "Hello."}]}
    bad = {"conversation": [{"audio_path": "none.wav", "assistant": "Hello."}]}
    source = lines(clips, good, bad, good)
    done = import_online(source, clips / "out")
    assert done.streams == 2 and len(done.skipped) == 1
    assert "conversation 1" in done.skipped[0] and "none.wav" in done.skipped[0]
    found = [stream.id for stream, _ in read_streams(find_shards([clips / "out"]), "train", print)]
    assert found == ["train-data-0000000", "train-data-0000002"]
    import_online(source, clips / "again")
    (first,), (second,) = (sorted((clips / name).glob("*.tar")) for name in ("out", "again"))
    assert hashlib.sha256(first.read_bytes()).digest() == hashlib.sha256(second.read_bytes()).digest()


# ---- offline


def test_offline_questions_in_all_their_forms(tmp_path: Path) -> None:
    both = {"user": "hello", "assistant": "hi", "audio_path": "a.wav"}
    rows = [both, both | {"user": None}, both | {"audio_path": "None"}, {"conversation": [both, {}]}]
    a = tmp_path / "a.wav"
    assert list(read_offline(lines(tmp_path, *rows))) == [
        OfflineSample("hi", "hello", a),
        OfflineSample("hi", "", a),
        OfflineSample("hi", "hello"),
        OfflineSample("hi", "hello", a),
    ]


def test_an_offline_line_needs_a_question_and_an_answer(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.jsonl:1: has neither"):
        list(read_offline(lines(tmp_path, {"assistant": "x"})))
    with pytest.raises(DataError, match="'assistant' is missing"):
        list(read_offline(lines(tmp_path, {"user": "x", "assistant": "None"})))


@pytest.fixture(scope="module")
def words() -> Tokenizer:
    return nano()[1]


@pytest.fixture(scope="module")
def model() -> ModelConfig:
    return nano()[0]


@pytest.mark.parametrize("audio", [True, False])
@pytest.mark.parametrize("user", ["why?", ""])
def test_an_offline_question_becomes_the_protocol(
    words: Tokenizer, model: ModelConfig, audio: bool, user: str
) -> None:
    if not audio and not user:
        return
    sample = OfflineSample("So.", user, Path("a.wav") if audio else None)
    made = offline_sequence(model, words, sample, 7, "Be good.")
    t = model.tokens
    given = [t.offline, t.language, t.system, t.text_begin, *words.encode("Be good."), t.text_end]
    if audio:
        given += [t.audio_begin, *[t.audio_pad] * 7, t.audio_end]
    if user:
        given += [t.user, t.text_begin, *words.encode(user), t.text_end]
    said = [t.assistant, t.text_begin, *words.encode("So."), t.text_end]
    assert made.ids.tolist() == given + said
    assert made.labels.tolist() == [IGNORED] * len(given) + said
    assert int(made.audio.sum()) == 7 * audio


# ---- ready to train on


def ready(**change: Any) -> dict[str, Any]:
    """A silent chunk in the layout of the released code."""
    t = PUBLISHED_TOKENS
    ids = [t.online, t.language, t.system, t.text_begin, 9707, t.text_end]
    ids += [t.audio_begin, *[t.audio_pad] * 10, t.assistant, t.keep_silence]
    labels = [IGNORED] * (len(ids) - 1) + [t.keep_silence]
    row = {"tasks": "online", "idx": 0, "input_ids": ids, "labels": labels, "audio_pos": [[7, 17]]}
    return row | {"pt_path_dir": "/features/0"} | change


def test_sequences_that_are_ready_are_read(tmp_path: Path) -> None:
    text_only = ready(input_ids=[1, 2], labels=[IGNORED, 2], audio_pos=None)
    first, second = read_tokens(lines(tmp_path, ready(), text_only), PUBLISHED_TOKENS.audio_pad)
    assert first.ids.tolist() == ready()["input_ids"] and first.labels[-1] == PUBLISHED_TOKENS.keep_silence
    assert first.audio.nonzero().flatten().tolist() == list(range(7, 17))
    assert second.labels.tolist() == [IGNORED, 2] and not second.audio.any()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"input_ids": "1 2"}, "'input_ids' must be a list"),
        ({"labels": [True]}, "'labels' must be a list"),
        ({"labels": [1]}, "but 1 labels"),
        ({"input_ids": [1, 2], "labels": [IGNORED, 3]}, "labels[1] is 3"),
        ({"audio_pos": [[7, 99]]}, "audio_pos has [7, 99]"),
        ({"audio_pos": [7]}, "audio_pos has 7"),
        ({"audio_pos": [[6, 16]]}, "covers ids other than"),
    ],
)
def test_a_sequence_that_is_wrong_is_named(tmp_path: Path, change: dict[str, Any], named: str) -> None:
    with pytest.raises(DataError, match=r"data\.jsonl:1: ") as error:
        list(read_tokens(lines(tmp_path, ready(**change)), PUBLISHED_TOKENS.audio_pad))
    assert named in str(error.value)
