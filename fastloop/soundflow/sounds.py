"""What a stream can hold: sounds with their words and replies (sounds.yaml), and where they come from.

A source is named by a string: a clip's id, "synthetic:<generator>" or "espeak-ng/<voice>".
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from . import alerts, ambience, synth
from .clips import Cache, Clip, DataError, Unreadable, read_manifest
from .sequence import Reply
from .synth import Generator
from .tfjp import prepare

SYNTHETIC = "synthetic:"
SHORTEST_S = 0.12  # of a spoken digit: what was aligned to less was hardly said
GENERATORS: dict[str, Generator] = {
    **ambience.IGNORE,
    **alerts.ALERTS,
    **alerts.LOOKALIKES,
    "smoke_alarm": synth.smoke_alarm,
    "two_tone": synth.two_tone,
    "pulses": synth.pulses,
    "siren": synth.siren,
    "beep": synth.beep,
}
FAMILIES = ("alert", "notice", "digits", "chatter", "lookalike", "quiet")
DIGITS = {
    name: str(value)
    for value, names in enumerate(
        ["zero oh", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    )
    for name in names.split()
}
_TEENS = "ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen"
_MORE = "twenty thirty forty fifty sixty seventy eighty ninety hundred thousand million point double third"
_NUMBERS = frozenset(f"{_TEENS} {_MORE} first second".split())  # spoken numbers that are no digits


@dataclass(frozen=True)
class Sound:
    """One entry of sounds.yaml; reply None: to be ignored."""

    label: str
    words: str
    family: str = "quiet"
    reply: Reply | None = None
    heard_s: float = 0.5
    longest_s: float = 6.0
    generators: tuple[str, ...] = ()


@functools.cache
def known_sounds() -> Mapping[str, Sound]:
    """label -> Sound, as packaged."""
    text = resources.files(__package__).joinpath("sounds.yaml").read_text(encoding="utf-8")
    return {label: _sound(label, row) for label, row in yaml.safe_load(text).items()}


def _sound(label: str, row: dict[str, Any]) -> Sound:
    where = f"sounds.yaml: {label}"
    unknown = set(row) - {f.name for f in dataclasses.fields(Sound)} - {"emotion"}
    if unknown:
        raise DataError(f"{where}: unknown fields {sorted(unknown)}")
    if row["family"] not in FAMILIES:
        raise DataError(f"{where}: family {row['family']!r} is none of {FAMILIES}")
    if missing := set(row.get("generators", ())) - set(GENERATORS):
        raise DataError(f"{where}: no such generators: {sorted(missing)}")
    fields = {k: v for k, v in row.items() if k not in ("emotion", "reply", "generators")}
    reply = Reply(row["reply"], row.get("emotion")) if "reply" in row else None
    return Sound(label, reply=reply, generators=tuple(row.get("generators", ())), **fields)


def sound_of(label: str) -> Sound:
    """The entry of a label; one that is not known is a sound to ignore, called by its name."""
    return known_sounds().get(label) or Sound(label, label.replace("_", " "))


def filed_under(clip: Clip) -> str | None:
    """The label under which a clip serves as a source; None: it serves nowhere.

    Speech is filed by what is in it: digits alone, digits among other words, no number at all. Speech
    with other numbers, or with the letter o (which sounds as "oh", the digit), serves nowhere.
    """
    if not clip.label.startswith(("speech_", "spoken_digit")):
        return clip.label if clip.label != "reference_demo" else None
    spoken = clip.text.split()
    digits = [w for w in spoken if w in DIGITS]
    if not spoken or not set(spoken).isdisjoint(_NUMBERS):
        return None
    if not digits:
        return "speech"
    if clip.label == "spoken_digit" and len(spoken) == 1:
        return "spoken_digits"
    if not clip.words:
        return None
    if len(digits) == len(spoken):
        return "spoken_digits"
    return "digits_in_speech" if "o" not in spoken else None


def digit_cuts(clip: Clip) -> Iterator[Clip]:
    """Every digit of a transcribed recording, named `<id>#<word>`: a speaker who reads out a telephone number
    has read other numbers, too.
    """
    for place, (word, start_s, end_s) in enumerate(clip.words):
        if word in DIGITS and end_s - start_s >= SHORTEST_S:
            yield dataclasses.replace(
                clip, id=f"{clip.id}#{place}", text=word, words=(), active=((start_s, end_s),)
            )


class Library:
    """Sources by label: the clips of one split and the generators; decodes, prepares and keeps clips.

    Attributes:
        split: "train" or "val" (or any other of the manifest).
        filed: label -> clips.  singles: speaker -> clips of one spoken digit each.
        cuts: id -> one digit of a transcribed recording, as a clip of its own; to train on alone.
        unreadable: id -> what was wrong, of clips that were needed and could not be read.
    """

    def __init__(self, clips: list[Clip], split: str) -> None:
        self.split = split
        self.clips = {clip.id: clip for clip in clips if clip.split == split}
        self.filed: dict[str, list[Clip]] = {}
        for clip in self.clips.values():
            if (label := filed_under(clip)) is not None:
                self.filed.setdefault(label, []).append(clip)
        trained = self.clips.values() if split == "train" else ()
        self.cuts = {cut.id: cut for clip in trained for cut in digit_cuts(clip)}
        self.singles: dict[str, list[Clip]] = {}
        for clip in (*self.filed.get("spoken_digits", ()), *self.cuts.values()):
            if not clip.words:  # else it is rendered by them, and is a string of its own
                self.singles.setdefault(clip.group, []).append(clip)
        self.unreadable: dict[str, str] = {}
        self._sounds, self._prepared = Cache(), Cache()
        self._cores: dict[str, tuple[int, int]] = {}

    @classmethod
    def open(cls, manifest: Path | str, split: str) -> Library:
        return cls(read_manifest(Path(manifest), split), split)

    def has(self, label: str) -> bool:
        """Whether anything can make this sound."""
        return label in self.filed or bool(sound_of(label).generators)

    def labels(self) -> list[str]:
        """All that can be made, sorted."""
        return sorted({*self.filed, *(name for name, sound in known_sounds().items() if sound.generators)})

    def clip(self, name: str) -> Clip:
        """A clip or a cut of one."""
        found = self.clips.get(name) or self.cuts.get(name)
        if found is None:
            raise DataError(f"there is no clip {name!r} in split {self.split!r}")
        return found

    def pcm(self, clip: Clip) -> np.ndarray:
        """The clip as recorded, float32 [S]; Unreadable, every time, where it cannot be read."""
        if clip.id in self.unreadable:
            raise Unreadable(self.unreadable[clip.id])
        try:
            return self._sounds.get(clip.id, clip.read).astype(np.float32) / 32768
        except Unreadable as error:
            self.unreadable[clip.id] = str(error)
            raise

    def prepared(self, clip: Clip) -> tuple[np.ndarray, tuple[int, int]]:
        """The clip after tfjp.prepare: float32 [S], whole half chunks, and its core [first, end)."""

        def make() -> np.ndarray:
            done = prepare(self.pcm(clip))
            self._cores[clip.id] = done.core
            return done.pcm.astype(np.float32)

        pcm = self._prepared.get(clip.id, make)
        return pcm, self._cores[clip.id]
