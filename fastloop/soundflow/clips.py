"""A manifest of clips (JSON lines) -> clips with label, split, licence and the times at which they are heard.

Fields of a line, * = required: id*, path* (relative to the manifest), split*, label*, duration_s*,
licence*, source*, expected ("respond" | "silent"), debatable, active ([[t0, t1], ...] s), text,
words ([[word, t0, t1], ...] s), speaker or source_group. Other fields are kept out.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from ..config import SAMPLE_RATE
from ..errors import FastloopError

Span = tuple[float, float]


class DataError(FastloopError, ValueError):
    """A manifest, a clip, a grammar or a corpus is not what it should be; the message names the place."""


class Unreadable(DataError):
    """A clip that the manifest names cannot be read."""


@dataclass(frozen=True)
class Clip:
    """One recording; times in seconds of the clip."""

    id: str
    path: Path
    split: str
    label: str
    duration_s: float
    licence: str
    source: str
    expected: str | None = None
    debatable: bool = False
    active: tuple[Span, ...] = ()
    text: str = ""
    words: tuple[tuple[str, float, float], ...] = ()
    group: str = ""  # speaker or origin: clips of one group share it

    def read(self) -> np.ndarray:
        """The whole clip, int16 [S] at 16 kHz mono; Unreadable where it cannot be read."""
        try:
            pcm, rate = soundfile.read(self.path, dtype="int16")
        except (OSError, soundfile.LibsndfileError) as error:
            raise Unreadable(f"{self.path}: cannot be read: {error}") from error
        if rate != SAMPLE_RATE or pcm.ndim != 1:
            raise Unreadable(f"{self.path}: {rate} Hz, {pcm.ndim} channels; clips are {SAMPLE_RATE} Hz mono")
        if len(pcm) == 0:
            raise Unreadable(f"{self.path}: holds no sound")
        return pcm


def _pairs(value: Any, width: int) -> bool:
    """[[...], ...] with rows of `width` whose last two are times in order."""
    return isinstance(value, list) and all(
        isinstance(row, list)
        and len(row) == width
        and all(isinstance(t, (int, float)) for t in row[-2:])
        and 0 <= row[-2] <= row[-1]
        for row in value
    )


def _clip(row: Any, folder: Path, where: str) -> Clip:
    if not isinstance(row, dict):
        raise DataError(f"{where}: must be a JSON object, is a {type(row).__name__}")

    def field(name: str, kind: type | tuple[type, ...], default: Any = None, required: bool = False) -> Any:
        value = row.get(name)
        if value is None:
            if required:
                raise DataError(f"{where}: field {name!r} is missing")
            return default
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise DataError(f"{where}: field {name!r} is {value!r}, a {type(value).__name__}")
        return value

    active, words = field("active", list, []), field("words", list, [])
    if not _pairs(active, 2):
        raise DataError(f"{where}: field 'active' must be [[start, end], ...] in seconds, is {active!r}")
    if not _pairs(words, 3):
        raise DataError(f"{where}: field 'words' must be [[word, start, end], ...], is {words!r}")
    expected = field("expected", str)
    if expected not in (None, "respond", "silent"):
        raise DataError(f"{where}: field 'expected' is {expected!r}; 'respond' and 'silent' are known")
    duration = float(field("duration_s", (int, float), required=True))
    if not 0 < duration < 24 * 3600:
        raise DataError(f"{where}: field 'duration_s' is {duration}, which is no length of a clip")
    name = field("id", str, required=True)
    return Clip(
        id=name,
        path=folder / field("path", str, required=True),
        split=field("split", str, required=True),
        label=field("label", str, required=True),
        duration_s=duration,
        licence=field("licence", str, required=True),
        source=field("source", str, required=True),
        expected=expected,
        debatable=field("debatable", bool, False),
        active=tuple((float(a), float(b)) for a, b in active),
        text=field("text", str, ""),
        words=tuple((str(w), float(a), float(b)) for w, a, b in words),
        group=field("speaker", str) or field("source_group", str) or name,
    )


def read_manifest(path: Path, split: str | None = None) -> list[Clip]:
    """Clips of a manifest in its order, of one split or of all; DataError names line and field."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    clips: list[Clip] = []
    seen: dict[str, int] = {}  # id -> line
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{where}: not valid JSON: {error}") from error
        clip = _clip(row, path.parent, where)
        if clip.id in seen:
            raise DataError(f"{where}: field 'id': {clip.id!r} is taken by line {seen[clip.id]}")
        seen[clip.id] = number
        if split is None or clip.split == split:
            clips.append(clip)
    if not clips:
        of = "" if split is None else f" of split {split!r}"
        raise DataError(f"{path}: holds no clip{of}")
    return clips


class Cache:
    """Arrays by name, the most recently used ones, at most `limit` bytes of them."""

    def __init__(self, limit: int = 384 << 20) -> None:
        self.limit, self.held = limit, 0
        self.arrays: OrderedDict[str, np.ndarray] = OrderedDict()

    def get(self, name: str, make: Callable[[], np.ndarray]) -> np.ndarray:
        """The array of that name, made on first use; not to be written to."""
        if name in self.arrays:
            self.arrays.move_to_end(name)
            return self.arrays[name]
        array = make()
        array.setflags(write=False)
        self.arrays[name] = array
        self.held += array.nbytes
        while self.held > self.limit and len(self.arrays) > 1:
            self.held -= self.arrays.popitem(last=False)[1].nbytes
        return array
