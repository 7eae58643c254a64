"""Tiny benchmarks in their published layouts, of sounds made here, written by no code that reads them."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from ..config import SAMPLE_RATE
from .cases import random_sound

CLIP_S = 1.2


def made_sound(seconds: float, seed: int, rate: int = SAMPLE_RATE) -> np.ndarray:
    """Noise for an even seed, a tone for an odd one: models shall hear a difference."""
    if seed % 2 == 0:
        return 0.3 * random_sound(seconds * rate / SAMPLE_RATE, seed)
    t = np.arange(round(seconds * rate)) / rate
    return (0.5 * np.sin(2 * np.pi * 200 * (seed + 1) * t)).astype(np.float32)


def sound_file(path: Path, seed: int = 0, seconds: float = CLIP_S, rate: int = SAMPLE_RATE) -> Path:
    """The format is that of the name's ending."""
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, made_sound(seconds, seed, rate), rate)
    return path


def mmau(root: Path, count: int = 3, **changes: Any) -> Path:
    """mmau-test-mini.json and test-mini-audios/; `changes` of the last row."""
    rows: list[dict[str, Any]] = []
    for i in range(count):
        name = f"id-{i}"
        sound_file(root / f"test-mini-audios/{name}.wav", i)
        rows.append(
            {
                "id": name,
                "audio_id": f"./test-mini-audios/{name}.wav",
                "question": f"What makes sound {i}?",
                "choices": ["A man", "A woman", "Rain", "A dog"],
                "answer": ("A man", "A woman", "Rain")[i % 3],
                "dataset": "AudioSet",
                "task": ("sound", "music", "speech")[i % 3],
                "split": "test-mini",
                "category": "Reasoning",
                "sub-category": "Acoustic Source Inference",
                "difficulty": ("easy", "hard")[i % 2],
            }
        )
    rows[-1] |= changes
    (root / "mmau-test-mini.json").write_text(json.dumps(rows, indent=2))
    return root


def open_audio_bench(root: Path, name: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> Path:
    """eval_datas/NAME/NAME.csv and audios/; the last column is audio_filename."""
    folder = root / "eval_datas" / name
    for i, row in enumerate(rows):
        sound_file(folder / "audios" / row[-1], i)
    with (folder / f"{name}.csv").open("w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file).writerows([header, *rows])
    return root


def llama_questions(root: Path) -> Path:
    rows = [
        ("What is the capital of France?", "Paris", "0.mp3"),
        ("Who wrote Hamlet?", "Shakespeare", "1.mp3"),
    ]
    return open_audio_bench(root, "llama_questions", ("Questions", "Answer", "audio_filename"), rows)


def web_questions(root: Path) -> Path:
    rows = [
        ("what does jamaican people speak?", "Jamaican Creole English;Jamaican English", "web_0.mp3"),
        ("what, in all, is money of spain?", "['Euro', 'Peseta']", "web_1.mp3"),
    ]
    return open_audio_bench(root, "web_questions", ("question", "answers", "audio_filename"), rows)


def parquet(file: Path, rows: Sequence[dict[str, Any]], group: int = 2) -> Path:
    """Rows with a sound each, `group` rows together, as datasets uploads them."""
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    whole = []
    for i, row in enumerate(rows):
        buffer = io.BytesIO()
        soundfile.write(buffer, made_sound(CLIP_S + 0.1 * i, i), SAMPLE_RATE, format="WAV")
        whole.append({"audio": {"bytes": buffer.getvalue(), "path": f"{i}.wav"}, **row})
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pyarrow.Table.from_pylist(whole), file, row_group_size=group)
    return file


def alpaca_eval(root: Path) -> Path:
    rows = [{"prompt": f"Tell me about number {i}."} for i in range(3)]
    parquet(root / "alpacaeval_full/test-00000-of-00001.parquet", rows)
    return root


def sd_qa(root: Path) -> Path:
    for region in ("usa", "ind_n"):
        rows = [{"prompt": f"How many in {region}?", "reference": str(7 + i)} for i in range(2)]
        parquet(root / f"sd-qa/{region}-00000-of-00001.parquet", rows)
    return root


def librispeech(root: Path) -> Path:
    """test-clean and test-other with one chapter each, and a split that is not evaluated."""
    spoken = {"test-clean": ("HE HOPED THERE WOULD BE STEW", "FOR DINNER"), "test-other": ("MISTER BROWN",)}
    for speaker, (split, lines) in enumerate((*spoken.items(), ("train-clean-100", ("NOT THIS",)))):
        folder = root / split / str(speaker) / "12"
        names = [f"{speaker}-12-{i:04d}" for i in range(len(lines))]
        for i, name in enumerate(names):
            sound_file(folder / f"{name}.flac", 10 * speaker + i)
        text = "".join(f"{name} {line}\n" for name, line in zip(names, lines, strict=True))
        (folder / f"{speaker}-12.trans.txt").write_text(text)
    return root


def covost2(root: Path, source: str = "en", target: str = "zh-CN") -> Path:
    """The TSV after it was split, without quoting, and Common Voice's clips/ at 48 kHz."""
    english, chinese = 'He said "yes\\" twice.', "他说了两次\u201c是\u201d。"
    sentences = ((english, chinese), ("Two cats.", "两只猫。"))
    lines = ["path\tsentence\ttranslation\tclient_id"]
    for i, pair in enumerate(sentences):
        said, translation = pair if source == "en" else pair[::-1]
        name = f"common_voice_{source}_{i}.mp3"
        sound_file(root / "clips" / name, i, rate=48_000)
        lines.append(
            "\t".join((name, said.replace("\\", "\\\\"), translation.replace("\\", "\\\\"), f"c{i}"))
        )
    file = root / f"covost_v2.{source}_{target}.test.tsv"
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return root


SETS: dict[str, Callable[[Path], Path]] = {
    "mmau": mmau,
    "mmau-spoken": mmau,
    "llama-questions": llama_questions,
    "web-questions": web_questions,
    "alpaca-eval": alpaca_eval,
    "sd-qa": sd_qa,
    "librispeech": librispeech,
    "covost2-en-zh": covost2,
    "covost2-zh-en": lambda root: covost2(root, "zh-CN", "en"),
}
