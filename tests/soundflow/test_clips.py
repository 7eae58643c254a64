"""Manifests: what is read, and what is said about lines that are wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from fastloop.soundflow.clips import Cache, DataError, Unreadable, read_manifest
from fastloop.soundflow.sounds import (
    DIGITS,
    FAMILIES,
    GENERATORS,
    Library,
    filed_under,
    known_sounds,
    sound_of,
)

GOOD = {
    "id": "a",
    "path": "a.flac",
    "split": "train",
    "label": "dog",
    "duration_s": 1.0,
    "licence": "CC0-1.0",
    "source": "made up",
}


def write(tmp_path: Path, *rows: Any) -> Path:
    file = tmp_path / "manifest.jsonl"
    file.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return file


def test_fields_are_read(tmp_path: Path) -> None:
    row = GOOD | {
        "active": [[0.1, 0.4]],
        "words": [["six", 0, 0.5]],
        "text": "six",
        "speaker": "x",
        "more": 1,
    }
    (clip,) = read_manifest(write(tmp_path, row))
    assert clip.path == tmp_path / "a.flac" and clip.group == "x"
    assert clip.active == ((0.1, 0.4),) and clip.words == (("six", 0.0, 0.5),)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"label": None}, "field 'label' is missing"),
        ({"duration_s": "1"}, "field 'duration_s' is '1'"),
        ({"duration_s": True}, "field 'duration_s' is True"),
        ({"duration_s": -1}, "field 'duration_s' is -1.0"),
        ({"active": [[0.5, 0.1]]}, "field 'active'"),
        ({"active": [0.1, 0.5]}, "field 'active'"),
        ({"words": [["a", 0.1]]}, "field 'words'"),
        ({"expected": "maybe"}, "field 'expected'"),
        ({"speaker": {"name": "x"}}, "field 'speaker' is {'name': 'x'}, a dict"),
        ({"speaker": 7}, "field 'speaker' is 7, a int"),
        ({"source_group": ["x"]}, "field 'source_group' is ['x'], a list"),
    ],
)
def test_a_wrong_field_is_named_with_its_line(tmp_path: Path, change: dict[str, Any], named: str) -> None:
    file = write(tmp_path, GOOD, GOOD | {"id": "b"} | change)
    with pytest.raises(DataError, match=r"manifest\.jsonl:2: ") as error:
        read_manifest(file)
    assert named in str(error.value)


@pytest.mark.parametrize(
    ("fields", "group"),
    [({"speaker": "x", "source_group": "y"}, "x"), ({"speaker": None, "source_group": "y"}, "y"), ({}, "a")],
)
def test_clips_of_one_speaker_or_origin_are_a_group(
    tmp_path: Path, fields: dict[str, Any], group: str
) -> None:
    assert read_manifest(write(tmp_path, GOOD | fields))[0].group == group


@pytest.mark.parametrize("line", ["{", "[1]", "\u00ff"])
def test_a_line_that_is_no_object_is_named(tmp_path: Path, line: str) -> None:
    with pytest.raises(DataError, match=r"manifest\.jsonl:2"):
        read_manifest(write(tmp_path, GOOD, line))


def test_an_id_that_comes_twice_an_empty_split_and_a_missing_file_are_errors(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="'a' is taken by line 1"):
        read_manifest(write(tmp_path, GOOD, GOOD))
    with pytest.raises(DataError, match="no clip of split 'val'"):
        read_manifest(write(tmp_path, GOOD), "val")
    with pytest.raises(DataError, match="cannot be read"):
        read_manifest(tmp_path / "none.jsonl")


@pytest.mark.parametrize("damage", ["missing", "garbage", "stereo", "other rate", "empty"])
def test_an_unreadable_clip_is_remembered_with_its_reason(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "a.flac"
    if damage == "garbage":
        path.write_bytes(b"fLaC" + bytes(200))
    elif damage != "missing":
        shape = {"stereo": (1600, 2), "empty": (0,)}.get(damage, (1600,))
        soundfile.write(path, np.zeros(shape), 8000 if damage == "other rate" else 16000, format="FLAC")
    library = Library.open(write(tmp_path, GOOD), "train")
    for _ in range(2):
        with pytest.raises(Unreadable, match=r"a\.flac"):
            library.pcm(library.clip("a"))
    assert list(library.unreadable) == ["a"]


def test_the_cache_forgets_what_was_not_used_and_stays_within_its_limit() -> None:
    cache, made = Cache(limit=3 * 800), []

    def get(name: str) -> None:
        cache.get(name, lambda: made.append(name) or np.zeros(100))  # type: ignore[func-returns-value]

    for name in "abcabcad":  # d drives out b, the one not used for longest
        get(name)
    assert made == ["a", "b", "c", "d"] and cache.held == 3 * 800
    get("c"), get("a"), get("b")
    assert made == ["a", "b", "c", "d", "b"]


# ---- labels


@pytest.mark.parametrize(
    ("label", "text", "timed", "where"),
    [
        ("spoken_digit", "seven", False, "spoken_digits"),
        ("speech_digits", "four oh two", True, "spoken_digits"),
        ("speech_digits", "four oh two", False, None),
        ("speech_command", "enter six two", True, "digits_in_speech"),
        ("speech_command", "enter fifty two", True, None),
        ("speech_mixed", "o t five", True, None),
        ("speech_spelling", "h i n", False, "speech"),
        ("speech_spelling", "", False, None),
        ("reference_demo", "", False, None),
        ("dog", "", False, "dog"),
    ],
)
def test_speech_is_filed_by_what_is_said(
    tmp_path: Path, label: str, text: str, timed: bool, where: str | None
) -> None:
    words = [[w, i, i + 1] for i, w in enumerate(text.split())] if timed else None
    (clip,) = read_manifest(write(tmp_path, GOOD | {"label": label, "text": text, "words": words}))
    assert filed_under(clip) == where


def test_the_table_of_sounds_is_consistent() -> None:
    sounds = known_sounds()
    assert len(sounds) > 50 and set(DIGITS.values()) == set("0123456789")
    for label, sound in sounds.items():
        assert sound.label == label and sound.family in FAMILIES and sound.words
        assert (sound.reply is not None) == (sound.family in ("alert", "notice")), label
        assert set(sound.generators) <= set(GENERATORS)
        if sound.reply is not None:
            assert sound.reply.text and sound.reply.emotion in ("urgent", "normal", "happy", "sad")
    replies = [sound.reply.text for sound in sounds.values() if sound.reply is not None]
    assert len(set(replies)) == len(replies)  # a reply tells which sound it was
    assert sound_of("space_ship").words == "space ship" and sound_of("space_ship").reply is None


@pytest.mark.parametrize("name", sorted(GENERATORS))
def test_a_generator_keeps_its_promises(name: str) -> None:
    for seed, seconds in ((0, 0.4), (1, 2.0), (2, 7.3)):
        x = GENERATORS[name](np.random.default_rng(seed), seconds)
        again = GENERATORS[name](np.random.default_rng(seed), seconds)
        assert x.dtype == np.float32 and np.array_equal(x, again)
        assert 0 < len(x) <= 16000 * max(seconds, 2.5) + 16000
        assert np.isfinite(x).all() and (name == "silence" or np.abs(x).max() == pytest.approx(1, abs=1e-6))
