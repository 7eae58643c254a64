"""The seven sets in their published layouts: what is read of them, and what is said of wrong fields."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from fastloop.audio import AudioError
from fastloop.config import SAMPLE_RATE
from fastloop.soundflow.benchmark_files import BenchmarkError, Cell, rows, samples
from fastloop.soundflow.benchmarks import BENCHMARKS, Folders, Item, read_items
from fastloop.testing import benchmark_sets as sets

LLAMA, WEB, COVOST = "llama_questions.csv", "web_questions.csv", "covost_v2.en_zh-CN.test.tsv"


def read(name: str, path: Path, **places: Path) -> list[Item]:
    return read_items(name, Folders(path, **places))


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_set_is_read_and_its_sounds_are_there(tmp_path: Path, name: str) -> None:
    items = read(name, sets.SETS[name](tmp_path))
    assert len(items) >= 2
    assert all(item.prompt for item in items)
    for item in items:
        pcm = samples(item.sound)
        assert pcm.dtype == np.float32
        assert abs(len(pcm) / SAMPLE_RATE - sets.CLIP_S) < 0.3  # mp3 pads, and rows of Parquet differ
    assert len(read_items(name, Folders(tmp_path), limit=1)) == 1


def test_mmau_asks_with_its_choices_and_counts_by_task(tmp_path: Path) -> None:
    items = read("mmau", sets.mmau(tmp_path))
    assert items[1].references == ("A woman",)
    assert items[1].instruction == "What makes sound 1? Choose the right answer: A man; A woman; Rain; A dog."
    assert items[1].groups == {
        "task": "music",
        "difficulty": "hard",
        "sub-category": "Acoustic Source Inference",
    }
    assert items == read("mmau", tmp_path / "mmau-test-mini.json")


def test_the_large_test_of_mmau_has_no_answers(tmp_path: Path) -> None:
    root = sets.mmau(tmp_path)
    rows = json.loads((root / "mmau-test-mini.json").read_text())
    (root / "mmau-test-mini.json").unlink()
    (root / "mmau-test.json").write_text(json.dumps([row | {"answer": ""} for row in rows]))
    assert [item.references for item in read("mmau", root)] == [(), (), ()]


def test_mmau_is_also_read_from_parquet_with_choices_as_text(tmp_path: Path) -> None:
    listed = json.loads((sets.mmau(tmp_path) / "mmau-test-mini.json").read_text())
    copies = [row | {"choices": str(row["choices"])} for row in listed]
    file = sets.parquet(tmp_path / "copy" / "data" / "test_mini-00000-of-00001.parquet", copies)
    found, wanted = read("mmau", tmp_path / "copy"), read("mmau", tmp_path)
    for one, other in zip(found, wanted, strict=True):
        assert (one.id, one.choices, one.references) == (other.id, other.choices, other.references)
    assert [item.sound for item in found] == [Cell(file, i) for i in range(3)]


def test_spoken_instructions_come_from_a_folder_or_are_to_be_spoken(tmp_path: Path) -> None:
    root, spoken = sets.mmau(tmp_path / "set"), tmp_path / "spoken"
    sets.sound_file(spoken / "id-0.wav")
    sets.sound_file(spoken / "id-1.flac")
    items = read("mmau-spoken", root, spoken=spoken)
    assert [item.spoken for item in items] == [spoken / n for n in ("id-0.wav", "id-1.flac", "id-2.wav")]
    assert all(item.instruction is None for item in items)
    asked = [item.instruction for item in read("mmau", root)]
    assert [item.spoken for item in read("mmau-spoken", root)] == asked


def test_questions_have_all_their_answers(tmp_path: Path) -> None:
    assert [i.references for i in read("llama-questions", sets.llama_questions(tmp_path))] == [
        ("Paris",),
        ("Shakespeare",),
    ]
    items = read("web-questions", sets.web_questions(tmp_path))
    assert [item.references for item in items] == [
        ("Jamaican Creole English", "Jamaican English"),
        ("Euro", "Peseta"),
    ]
    assert items[1].prompt == "what, in all, is money of spain?"


def test_questions_are_also_read_from_parquet(tmp_path: Path) -> None:
    sets.parquet(tmp_path / "l/data/test-0.parquet", [{"question": "q", "answer": "a"}])
    assert read("llama-questions", tmp_path / "l")[0].references == ("a",)
    sets.parquet(tmp_path / "w/data/test-0.parquet", [{"url": "u", "question": "q", "answers": ["a", "b"]}])
    assert read("web-questions", tmp_path / "w")[0].references == ("a", "b")


def test_sounds_of_parquet_are_the_right_rows(tmp_path: Path) -> None:
    file = sets.parquet(tmp_path / "a.parquet", [{"prompt": str(i)} for i in range(5)], group=2)
    lengths = [len(samples(item.sound)) for item in read("alpaca-eval", file)]
    assert lengths == [round((sets.CLIP_S + 0.1 * i) * SAMPLE_RATE) for i in range(5)]


def test_regions_and_splits_are_groups(tmp_path: Path) -> None:
    assert [i.groups["region"] for i in read("sd-qa", sets.sd_qa(tmp_path))] == ["ind_n"] * 2 + ["usa"] * 2
    root = sets.librispeech(tmp_path)
    items = read("librispeech", root)
    assert [(item.groups["split"], item.id, item.references) for item in items] == [
        ("test-clean", "0-12-0000", ("HE HOPED THERE WOULD BE STEW",)),
        ("test-clean", "0-12-0001", ("FOR DINNER",)),
        ("test-other", "1-12-0000", ("MISTER BROWN",)),
    ]
    assert [item.groups for item in read("librispeech", root / "test-other")] == [{"split": "test-other"}]


def test_covost_is_read_as_its_own_script_writes_it(tmp_path: Path) -> None:
    items = read("covost2-en-zh", sets.covost2(tmp_path))
    assert items[0].prompt == 'He said "yes\\" twice.'
    assert items[0].references == ("他说了两次\u201c是\u201d。",)
    with pytest.raises(BenchmarkError, match=r"holds none of covost_v2\.zh-CN_en"):
        read("covost2-zh-en", tmp_path)


def test_covost_before_it_was_split_gives_the_test_split_only(tmp_path: Path) -> None:
    file = tmp_path / "covost_v2.en_zh-CN.tsv"
    file.write_text("path\ttranslation\tsplit\na.mp3\t一\ttrain\nb.mp3\t二\ttest\nc.mp3\t三\ttest_covost\n")
    items = read("covost2-en-zh", tmp_path, audio=tmp_path / "cv")
    assert [(item.sound, item.references) for item in items] == [(tmp_path / "cv" / "b.mp3", ("二",))]


# ---- what is wrong is named


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"question": 7}, "field 'question' must be a string, is 7"),
        ({"choices": []}, "field 'choices' must be a list of strings"),
        ({"choices": "A man"}, "field 'choices' must be a list of strings"),
        ({"answer": "A cat"}, "field 'answer' is 'A cat', none of the choices"),
        ({"id": "id-0"}, "id 'id-0' is taken by"),
        ({"audio_id": None}, "field 'audio_id' must be a string"),
    ],
)
def test_a_wrong_field_of_mmau_is_named_with_its_line(
    tmp_path: Path, changes: dict[str, object], words: str
) -> None:
    root = sets.mmau(tmp_path, 2, **changes)
    line = [
        i for i, text in enumerate((root / "mmau-test-mini.json").read_text().split("\n"), 1) if text == "  {"
    ]
    with pytest.raises(BenchmarkError) as error:
        read("mmau", root)
    assert str(error.value).startswith(f"{root / 'mmau-test-mini.json'}:{line[1]}: ")
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "holds no item"),
        ("{}\n[]", ":2: must be a JSON object, is a list"),
        ("[\n{},", ":2: not valid JSON: a list has the end here"),
        ("[\n 1\n]", ":2: must be a JSON object, is a int"),
        ('[{"id": "a"}\n\n 3]', ":3: not valid JSON: a list has '3' here"),
        ("[\n{]", ":2: not valid JSON"),
        ("[\n]", "holds no item"),
        ('[{"id": "a"}]\n]', ":1: not valid JSON: something follows the list"),
    ],
)
def test_a_broken_list_is_named_with_its_line(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "a.json"
    file.write_text(text)
    with pytest.raises(BenchmarkError) as error:
        list(rows(file))
    assert str(error.value).startswith(str(file))
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("name", "file", "text", "words"),
    [
        ("llama-questions", LLAMA, "Questions,Answer,audio_filename\na,b,c\nd,,e\n", ":3: field 'Answer'"),
        ("llama-questions", LLAMA, "Questions,Answer\na,b\n", ":2: field 'audio_filename'"),
        ("llama-questions", LLAMA, "Questions,Answer\na,b,c\n", ":2: has more fields"),
        ("web-questions", WEB, "question,answers,audio_filename\na,;,c\n", ":2: field 'answers'"),
        ("covost2-en-zh", COVOST, "path\tsentence\na\tb\n", ":2: field 'translation'"),
        ("librispeech", "1/2/1-2.trans.txt", "1-2-0000 A B\n1-2-0001\n", ":2: must be an utterance's id"),
        ("covost2-en-zh", COVOST, "path\ttranslation\tsplit\na\tb\ttrain\n", ": holds no item of covost2"),
        ("librispeech", "1/2/1-2.trans.txt", "", ": holds no item of librispeech"),
        ("sd-qa", "usa.txt", "", "holds none of"),
    ],
)
def test_a_wrong_line_of_a_table_is_named(
    tmp_path: Path, name: str, file: str, text: str, words: str
) -> None:
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_text(text)
    with pytest.raises(BenchmarkError) as error:
        read(name, tmp_path)
    assert words in str(error.value)
    assert str(tmp_path) in str(error.value)


def test_a_wrong_row_of_parquet_is_named(tmp_path: Path) -> None:
    file = sets.parquet(tmp_path / "usa-0.parquet", [{"prompt": "a", "reference": r} for r in ("x", None)])
    with pytest.raises(BenchmarkError, match=r"usa-0\.parquet:row 1: field 'reference' must be a string"):
        read("sd-qa", file)
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(BenchmarkError, match=r"usa-0\.parquet: cannot be read"):
        read("sd-qa", file)


def test_what_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(BenchmarkError, match="no such file or directory"):
        read("mmau", tmp_path / "none")
    with pytest.raises(BenchmarkError, match=r"'mmlu' is no benchmark; choose from mmau, "):
        read("mmlu", tmp_path)
    (tmp_path / "a.xml").write_text("")
    with pytest.raises(BenchmarkError, match=r"is none of \.json, "):
        read("mmau", tmp_path / "a.xml")


def test_a_sound_of_parquet_that_cannot_be_read_is_named_by_its_row(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet as pq

    broken = [{"audio": {"bytes": b, "path": "x"}, "prompt": "p"} for b in (b"RIFF", None)]
    pq.write_table(pyarrow.Table.from_pylist(broken), tmp_path / "a.parquet")
    for i, item in enumerate(read("alpaca-eval", tmp_path / "a.parquet")):
        with pytest.raises(AudioError, match=rf"a\.parquet:row {i}: "):
            samples(item.sound)
