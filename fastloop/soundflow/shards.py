"""Shards: webdataset tars of composed streams, written whole or not at all, and read field by field.

A shard holds, per stream, `<id>.flac` (16 kHz mono, 16 bit) and `<id>.json`, the record: the public
structure of StreamAudio-2M (id, stream_scene_type, num_turns, turns with user, assistant, emotion,
scene_type, audio_path; arXiv 2606.05121) plus ability, sub_task, split, seed, duration_s, and for each
turn label, start_s, end_s, answer_s: stream times in seconds. Turns are in the order of their start;
answer_s is the time from which the answer is due, null for silence.

`parse_stream` is the one reader of a record, and nothing is written that it cannot read. What cannot be
used is never skipped silently: it is reported with its shard, its id and the reason.
"""

from __future__ import annotations

import io
import itertools
import json
import math
import os
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import soundfile

from ..config import SAMPLE_RATE
from ..errors import FastloopError

if TYPE_CHECKING:
    from .compose import Composed

SILENCE = "<no need to response>"  # as StreamAudio-2M spells it
SPLITS = ("train", "val")
LENGTH_S = 0.05  # so much may a sound and its duration_s differ
Report = Callable[[str], None]

QUESTION = "question"  # label of a spoken question about the stream


class ShardError(FastloopError):
    """A shard or a sample of one is not what it should be; the message says which and why."""


@dataclass(frozen=True)
class Turn:
    """One sound of a stream. reply None: silence is right. answer_s: the stream time from which the answer
    is due, None where none is; in a record it has a time if and only if there is a reply. All times in
    seconds of the stream. background: it lies under what happens, and is nothing to be asked about. snr_db:
    its level over all else that is heard with it, None where nobody knows.
    """

    user: str
    reply: str | None
    emotion: str | None
    label: str
    scene: str
    start_s: float
    end_s: float
    answer_s: float | None
    background: bool = False
    snr_db: float | None = None


@dataclass(frozen=True)
class Stream:
    """One composed stream: what it is about and, in time order, what is heard in it."""

    id: str
    scene: str
    ability: str
    sub_task: str
    split: str
    seconds: float
    turns: tuple[Turn, ...]

    @property
    def silent(self) -> bool:
        """Nothing in it calls for an answer."""
        return all(turn.reply is None for turn in self.turns)


def write_shard(path: Path, streams: Iterable[Composed]) -> int:
    """Write a tar that is whole or absent -> number of streams; the same streams give the same bytes."""
    part = path.with_name(f".{path.name}.{os.getpid()}.partial")
    count = 0
    try:
        with part.open("wb") as file:
            with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
                for made in streams:
                    name = made.record["id"]
                    _member(tar, f"{name}.flac", encode_flac(made.pcm))
                    parse_stream(made.record)
                    text = json.dumps(made.record, ensure_ascii=False, allow_nan=False)
                    _member(tar, f"{name}.json", text.encode())
                    count += 1
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return count


def _member(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)  # time, owner and mode are fixed: equal contents, equal bytes
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def encode_flac(pcm: np.ndarray) -> bytes:
    """float32 [S] within [-1, 1) -> 16-bit FLAC at 16 kHz."""
    buffer = io.BytesIO()
    whole = np.clip(np.round(pcm * 32768), -32768, 32767).astype(np.int16)
    soundfile.write(buffer, whole, SAMPLE_RATE, format="FLAC", subtype="PCM_16")
    return buffer.getvalue()


def find_shards(paths: Sequence[Path]) -> list[Path]:
    """Tar files, and all tars of directories, in order of name; ShardError where there are none."""
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = sorted(path.rglob("*.tar"))
            if not inside:
                raise ShardError(f"{path}: no *.tar in it; `fastloop data build` writes shards")
            found += inside
        elif path.is_file():
            found.append(path)
        else:
            raise ShardError(f"{path}: no such file or directory")
    return found


def also(reasons: list[str], skipped: Report) -> Report:
    """A Report that keeps what it passes on."""

    def tell(reason: str) -> None:
        reasons.append(reason)
        skipped(reason)

    return tell


def nothing_usable(split: str | None, places: Sequence[Path], reasons: Sequence[str]) -> ShardError:
    """The error of a corpus without a stream: the first reason of those given, or else what makes streams."""
    of = "" if split is None else f" of split {split!r}"
    why = ""
    if reasons:
        why = f": {len(reasons)} could not be used, the first: {reasons[0]}"
    elif split is not None:
        why = f"; `fastloop data build --split {split}` makes some"
    return ShardError(f"no usable stream{of} in {', '.join(map(str, places))}{why}")


def read_streams(
    shards: Sequence[Path], split: str | None, skipped: Report
) -> Iterator[tuple[Stream, np.ndarray]]:
    """The streams of a split (None: of all) with their sound, float32 [S]; `skipped` is told what is left
    out and why. ShardError where a tar cannot be read.
    """
    for shard in shards:
        try:
            for name, sample in _samples(shard):
                try:
                    stream = parse_stream(_json(sample))
                    if split in (None, stream.split):
                        yield stream, _sound(sample, stream)
                except ShardError as error:
                    skipped(f"{shard.name}/{name}: {error}")
        except (OSError, EOFError, tarfile.TarError) as error:
            raise ShardError(f"{shard}: cannot be read: {error}") from error


def _samples(shard: Path) -> Iterator[tuple[str, dict[str, bytes]]]:
    """(name, {ending: content}) of the neighbours in a tar that share a name."""
    with tarfile.open(shard) as tar:
        files = (info for info in tar if info.isfile())
        for name, group in itertools.groupby(files, lambda info: info.name.rpartition(".")[0]):
            contents = ((info, tar.extractfile(info)) for info in group)
            yield name, {info.name.rpartition(".")[2]: file.read() for info, file in contents if file}


def _json(sample: Mapping[str, bytes]) -> Mapping[str, Any]:
    if "json" not in sample:
        raise ShardError("no .json beside the sound")
    try:
        values = json.loads(sample["json"])
    except ValueError as error:
        raise ShardError(f".json is not valid: {error}") from error
    if not isinstance(values, dict):
        raise ShardError(f".json holds a {type(values).__name__}, not an object")
    return values


def _sound(sample: Mapping[str, bytes], stream: Stream) -> np.ndarray:
    if "flac" not in sample:
        raise ShardError("no .flac beside the .json")
    try:
        pcm, rate = soundfile.read(io.BytesIO(sample["flac"]), dtype="float32")
    except soundfile.LibsndfileError as error:
        raise ShardError(f".flac cannot be decoded: {error}") from error
    if rate != SAMPLE_RATE or pcm.ndim != 1:
        raise ShardError(f".flac has {rate} Hz and {pcm.ndim} dimension(s); it must be {SAMPLE_RATE} Hz mono")
    check_length(stream, pcm)
    return pcm


def check_length(stream: Stream, pcm: np.ndarray) -> None:
    """ShardError where the sound, float32 [S], is not as long as its record says."""
    seconds = len(pcm) / SAMPLE_RATE
    if abs(seconds - stream.seconds) > LENGTH_S:
        raise ShardError(f"duration_s is {stream.seconds:g}, the sound lasts {seconds:g} s")


class Fields:
    """Typed look-ups in a JSON object; an error names the field."""

    def __init__(self, values: Mapping[str, Any], where: str = "") -> None:
        self.values, self.where = values, where

    def text(self, name: str) -> str:
        return self._typed(name, str, "a string")

    def optional_text(self, name: str) -> str | None:
        return None if self.values.get(name) is None else self.text(name)

    def seconds(self, name: str) -> float:
        value = float(self._typed(name, (int, float), "a number of seconds"))
        if not (math.isfinite(value) and value >= 0):
            raise ShardError(f"{self.where}{name}: must be a time in seconds, got {value!r}")
        return value

    def optional_seconds(self, name: str) -> float | None:
        return None if self.values.get(name) is None else self.seconds(name)

    def optional_decibels(self, name: str) -> float | None:
        if self.values.get(name) is None:
            return None
        value = float(self._typed(name, (int, float), "decibels"))
        if not math.isfinite(value):
            raise ShardError(f"{self.where}{name}: must be decibels, is {value!r}")
        return value

    def _typed(self, name: str, kind: Any, wanted: str) -> Any:
        value = self.values.get(name)
        if not isinstance(value, kind) or isinstance(value, bool):
            got = "missing" if name not in self.values else f"{value!r}"
            raise ShardError(f"{self.where}{name}: must be {wanted}, is {got}")
        return value


def parse_stream(values: Mapping[str, Any]) -> Stream:
    """The JSON of a sample -> Stream; ShardError names the field that is wrong."""
    fields = Fields(values)
    turns = values.get("turns")
    if not isinstance(turns, list):
        raise ShardError("turns: must be a list")
    if values.get("split") not in SPLITS:
        raise ShardError(f"split: must be one of {SPLITS}, is {values.get('split')!r}")
    parsed = tuple(_turn(turn, i) for i, turn in enumerate(turns))
    if any(a.start_s > b.start_s for a, b in itertools.pairwise(parsed)):
        raise ShardError("turns: must be in time order")
    return Stream(
        id=fields.text("id"),
        scene=fields.text("stream_scene_type"),
        ability=fields.text("ability"),
        sub_task=fields.text("sub_task"),
        split=fields.text("split"),
        seconds=fields.seconds("duration_s"),
        turns=parsed,
    )


def _turn(values: Any, index: int) -> Turn:
    where = f"turns[{index}]."
    if not isinstance(values, dict):
        raise ShardError(f"turns[{index}]: must be an object, is {values!r}")
    fields = Fields(values, where)
    reply: str | None = fields.text("assistant").strip()
    answer_s = fields.optional_seconds("answer_s")
    if reply == SILENCE:
        reply = None
    elif not reply:
        raise ShardError(f"{where}assistant: is empty; silence is spelt {SILENCE!r}")
    if (reply is None) != (answer_s is None):
        raise ShardError(f"{where}answer_s: is {answer_s!r}, but assistant is {values['assistant']!r}")
    turn = Turn(
        user=fields.optional_text("user") or "",
        reply=reply,
        emotion=fields.optional_text("emotion") if reply is not None else None,
        label=fields.text("label"),
        scene=fields.optional_text("scene_type") or "",
        start_s=fields.seconds("start_s"),
        end_s=fields.seconds("end_s"),
        answer_s=answer_s,
        background=reply is None and "snr_db" not in values,  # what happens has a level over all else
        snr_db=fields.optional_decibels("snr_db"),
    )
    if turn.end_s < turn.start_s:
        raise ShardError(f"{where}end_s: {turn.end_s:g} is before start_s {turn.start_s:g}")
    return turn
