"""The seven benchmarks of the paper that ask about finished clips, each in the layout it is published in.

    mmau, mmau-spoken            mmau-test-mini.json beside test-mini-audios/ (github.com/Sakshi113/MMAU), or
                                 Parquet with the same fields and `audio`
    llama-questions              eval_datas/llama_questions/ of OpenAudioBench (huggingface.co/datasets/
                                 baichuan-inc/OpenAudioBench): llama_questions.csv with Questions, Answer,
                                 audio_filename, and audios/; or Parquet with question, answer, audio
    web-questions                eval_datas/web_questions/ there: question, answers, audio_filename; or
                                 Parquet with question, answers, audio
    alpaca-eval, sd-qa           alpacaeval_full/*.parquet and sd-qa/REGION-*.parquet of VoiceBench
                                 (huggingface.co/datasets/hlt-lab/voicebench): prompt, reference, audio
    librispeech                  test-clean/ and test-other/ (openslr.org/12), or any folder with *.trans.txt
    covost2-en-zh, covost2-zh-en covost_v2.en_zh-CN.test.tsv, covost_v2.zh-CN_en.test.tsv and Common Voice's
                                 clips/ (github.com/facebookresearch/covost); or the TSV before it was split

Read from the folder that holds them, or from one file. What is asked about a clip comes as text or is heard
after it; MMAU's own spoken instructions are not published, so mmau-spoken takes a folder of ID.wav (flac,
mp3, ogg), and without one espeak-ng speaks.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from .benchmark_files import AUDIO, BenchmarkError, Cell, Row, locate, rows, text, texts

CHOICE, ANSWER, OPEN, WORDS, TRANSLATION = "choice", "answer", "open", "words", "translation"
SPOKEN_ENDINGS = (".wav", ".flac", ".mp3", ".ogg")


@dataclass(frozen=True)
class Item:
    """One clip and what is asked about it.

    prompt: the question or the words in it, for people and judges.  references: right answers.
    instruction: text that goes with the clip.  spoken: an instruction that is heard after it: a file, or
    text to be spoken.  groups: what is counted apart, such as {"task": "music"}.  row: as published.
    """

    id: str
    sound: Path | Cell
    prompt: str
    references: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    instruction: str | None = None
    spoken: Path | str | None = None
    groups: Mapping[str, str] = field(default_factory=dict)
    row: Mapping[str, Any] = field(default_factory=dict, repr=False)


@dataclass(frozen=True)
class Folders:
    """Where a set lies: its folder or file, its clips where they are elsewhere, its spoken instructions."""

    path: Path
    audio: Path | None = None
    spoken: Path | None = None


@dataclass(frozen=True)
class Benchmark:
    """How a set is read and scored. published: figures of the paper's 3 B model (arXiv 2606.05121)."""

    kind: str
    read: Callable[[Folders], Iterator[tuple[str, Item]]]
    published: str
    instruction: str | None = None
    target: str = "en"  # language of the answers


def read_items(name: str, folders: Folders, limit: int = 0) -> list[Item]:
    """The items of a set, at most `limit` (0: all). BenchmarkError names file, line and field."""
    if name not in BENCHMARKS:
        raise BenchmarkError(f"{name!r} is no benchmark; choose from {', '.join(BENCHMARKS)}")
    seen: dict[str, str] = {}
    items: list[Item] = []
    for where, item in BENCHMARKS[name].read(folders):
        if item.id in seen:
            raise BenchmarkError(f"{where}: id {item.id!r} is taken by {seen[item.id]}")
        seen[item.id] = where
        items.append(item)
        if len(items) == limit:
            break
    if not items:
        raise BenchmarkError(f"{folders.path}: holds no item of {name}")
    return items


# ---- MMAU


def _mmau(folders: Folders) -> Iterator[tuple[str, Item]]:
    patterns = ("mmau-test-mini.json", "mmau-test.json", "*.json", "data/*.parquet", "*.parquet")
    for file in locate(folders.path, patterns):
        for row in rows(file):
            where, values = row
            choices = _choices(row)
            question = text(row, "question")
            answer = text(row, "answer") if values.get("answer") else None  # the large test keeps it back
            if answer is not None and answer not in choices:
                raise BenchmarkError(f"{where}: field 'answer' is {answer!r}, none of the choices")
            groups = {k: str(values[k]) for k in ("task", "difficulty", "sub-category") if values.get(k)}
            sound = values.get(AUDIO)
            if not isinstance(sound, Cell):
                sound = (folders.audio or file.parent) / text(row, "audio_id")
            yield (
                where,
                Item(
                    id=text(row, "id"),
                    sound=sound,
                    prompt=question,
                    references=() if answer is None else (answer,),
                    choices=choices,
                    instruction=f"{question} Choose the right answer: {'; '.join(choices)}.",
                    groups=groups,
                    row={k: v for k, v in values.items() if k != AUDIO},
                ),
            )


def _choices(row: Row) -> tuple[str, ...]:
    """A list; in some Parquet copies the text of one."""
    where, values = row
    value = values.get("choices")
    return texts((where, {"choices": _literal(value)} if "choices" in values else {}), "choices")


def _literal(value: Any) -> Any:
    """Text that spells a list -> the list; anything else as it is."""
    if isinstance(value, str) and value.strip().startswith("["):
        try:
            return ast.literal_eval(value.strip())
        except (ValueError, SyntaxError):
            return value
    return value


def _mmau_spoken(folders: Folders) -> Iterator[tuple[str, Item]]:
    for where, item in _mmau(folders):
        spoken: Path | str | None = item.instruction
        if folders.spoken is not None:
            places = [folders.spoken / f"{item.id}{ending}" for ending in SPOKEN_ENDINGS]
            spoken = next((place for place in places if place.is_file()), places[0])
        yield where, replace(item, instruction=None, spoken=spoken)


# ---- questions in speech


def _llama_questions(folders: Folders) -> Iterator[tuple[str, Item]]:
    for file, row in _open_audio_bench(folders, "llama_questions"):
        prompt, answer = text(row, "Questions", "question"), text(row, "Answer", "answer")
        yield row[0], replace(_asked(folders, file, row), prompt=prompt, references=(answer,))


def _web_questions(folders: Folders) -> Iterator[tuple[str, Item]]:
    for file, row in _open_audio_bench(folders, "web_questions"):
        where, values = row
        answers = _literal(values.get("answers"))
        if isinstance(answers, str):
            answers = [part.strip() for part in answers.split(";") if part.strip()]
        references = texts((where, {"answers": answers} if "answers" in values else {}), "answers")
        yield where, replace(_asked(folders, file, row), prompt=text(row, "question"), references=references)


def _open_audio_bench(folders: Folders, name: str) -> Iterator[tuple[Path, Row]]:
    places = (f"{name}.csv", f"{name}/{name}.csv", f"eval_datas/{name}/{name}.csv")
    for file in locate(folders.path, (*places, "data/test-*.parquet", "*.parquet")):
        for row in rows(file):
            yield file, row


def _asked(folders: Folders, file: Path, row: Row) -> Item:
    """The clip of a row, without question and answers."""
    sound = row[1].get(AUDIO)
    if isinstance(sound, Cell):
        return Item(f"{file.stem}/{sound.row}", sound, "")
    name = text(row, "audio_filename")
    return Item(name, (folders.audio or file.parent / "audios") / name, "")


def _alpaca_eval(folders: Folders) -> Iterator[tuple[str, Item]]:
    patterns = ("alpacaeval_full/*.parquet", "alpacaeval/*.parquet", "test-*.parquet", "*.parquet")
    for file in locate(folders.path, patterns):
        for row in rows(file):
            yield row[0], replace(_asked(folders, file, row), prompt=text(row, "prompt"))


def _sd_qa(folders: Folders) -> Iterator[tuple[str, Item]]:
    for file in locate(folders.path, ("sd-qa/*.parquet", "*.parquet")):
        region = file.name.split("-")[0]
        for row in rows(file):
            yield (
                row[0],
                replace(
                    _asked(folders, file, row),
                    prompt=text(row, "prompt"),
                    references=(text(row, "reference"),),
                    groups={"region": region},
                ),
            )


# ---- speech to write down, and to translate


def _librispeech(folders: Folders) -> Iterator[tuple[str, Item]]:
    root = folders.path.absolute()
    wanted = [root / name for name in ("test-clean", "test-other") if (root / name).is_dir()] or [root]
    files = [file for folder in wanted for file in locate(folder, ("**/*.trans.txt",))]
    for file in files:
        split = file.parents[2].name  # SPLIT/SPEAKER/CHAPTER/SPEAKER-CHAPTER.trans.txt
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise BenchmarkError(f"{file}: cannot be read: {error}") from error
        for number, line in enumerate(lines, start=1):
            name, _, words = line.partition(" ")
            if not words.strip():
                raise BenchmarkError(f"{file}:{number}: must be an utterance's id and its words, is {line!r}")
            item = Item(name, file.parent / f"{name}.flac", words, (words,), groups={"split": split})
            yield f"{file}:{number}", item


def _covost2(source: str, target: str) -> Callable[[Folders], Iterator[tuple[str, Item]]]:
    stem = f"covost_v2.{source}_{target}"

    def read(folders: Folders) -> Iterator[tuple[str, Item]]:
        patterns = (f"{stem}.test.tsv", f"{source}/{stem}.test.tsv", f"{stem}.tsv", f"{source}/{stem}.tsv")
        for file in locate(folders.path, patterns):
            for row in rows(file):
                where, values = row
                if values.get("split") not in (None, "test"):  # only the TSV before it was split has it
                    continue
                name = text(row, "path")
                sound = (folders.audio or file.parent / "clips") / name
                translation = text(row, "translation")
                yield where, Item(name, sound, str(values.get("sentence") or ""), (translation,))

    return read


WRITE = "Write down what is said."
INTO_CHINESE, INTO_ENGLISH = "Translate what is said into Chinese.", "Translate what is said into English."

BENCHMARKS = {
    "mmau": Benchmark(CHOICE, _mmau, "0.557 (sound 0.641, music 0.478, speech 0.551)"),
    "mmau-spoken": Benchmark(CHOICE, _mmau_spoken, "0.582 (sound 0.656, music 0.579, speech 0.397)"),
    "llama-questions": Benchmark(ANSWER, _llama_questions, "0.673"),
    "web-questions": Benchmark(ANSWER, _web_questions, "0.543"),
    "alpaca-eval": Benchmark(OPEN, _alpaca_eval, "4.28 of 5"),
    "sd-qa": Benchmark(ANSWER, _sd_qa, "0.521"),
    "librispeech": Benchmark(WORDS, _librispeech, "test-clean 0.0317, test-other 0.0604", WRITE),
    "covost2-en-zh": Benchmark(TRANSLATION, _covost2("en", "zh-CN"), "55.22", INTO_CHINESE, "zh"),
    "covost2-zh-en": Benchmark(TRANSLATION, _covost2("zh-CN", "en"), "35.21", INTO_ENGLISH, "en"),
}
