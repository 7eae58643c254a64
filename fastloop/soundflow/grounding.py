"""Outline -> Plan: every sound gets a source (a clip, a generator, a voice), a seed and a level."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from . import voices
from .abilities import SubTask
from .grammar import Rule
from .planner import Outline
from .scripts import Beat, reading
from .sequence import Reply
from .sounds import DIGITS, SYNTHETIC, Library, sound_of
from .synth import Rng, log_uniform

BED_DB = (-60.0, -28.0)  # level of what goes on all the time, dB full scale
SNR_DB = (5.0, 25.0)  # an event above that
QUIETEST_DB, LOUDEST_DB = -55.0, -9.0
FEW = 8  # with so many clips, a sound that also has generators comes from a clip every second time
VOICE_SHARE = {
    "train": 0.3,
    "val": 0.15,
}  # of digit strings, said by a synthetic voice
READING_SHARE = 0.5  # of speech to ignore to train on, read aloud by a synthetic voice
READ_S = (1.5, 9.0)  # about how long
STRING_SHARE = 0.4  # of digit strings, one recording of several digits
DIGIT_NAMES = [name for name in DIGITS if name != "oh"]
DIGIT_PAUSE_S = (0.03, 0.7)
SPEED = (0.85, 1.18)  # of what was recorded, to train on: as other speakers, other animals
NARROW_SHARE = 0.12  # of streams, heard through a telephone's band


@dataclass(frozen=True)
class Layer:
    """Ignored sound under the events; level dB full scale, while audible."""

    label: str
    source: str
    seed: int
    start_s: float
    seconds: float
    level_db: float


@dataclass(frozen=True)
class Part:
    """One event, gap_s after the end of the one before.

    sources: one, or one for each digit of a string, heard after pauses_s.  text: what a voice says.
    reply: None is silence; `own`: it holds whatever came before.  speed: how much faster than recorded.
    """

    label: str
    sources: tuple[str, ...]
    seed: int
    gap_s: float
    level_db: float
    longest_s: float
    reply: Reply | None = None
    own: bool = False
    text: str = ""
    pauses_s: tuple[float, ...] = ()
    speed: float = 1.0

    @property
    def generated(self) -> bool:
        """Whether it comes from a generator or a voice: from no room, and without silence around it."""
        return self.sources[0].startswith(SYNTHETIC) or voices.is_voice(self.sources[0])


@dataclass(frozen=True)
class Plan:
    """Everything that `compose` needs, apart from the library: a stream is a function of it.

    tfjp: clips are prepared and begin at multiples of half a chunk.  narrow: the whole stream through a
    telephone's band.
    """

    id: str
    split: str
    seed: int
    scene: str
    ability: str
    sub_task: str
    seconds: float
    layers: tuple[Layer, ...]
    parts: tuple[Part, ...]
    rules: tuple[Rule, ...] = ()
    question: str = ""
    tfjp: bool = True
    narrow: bool = False


def source_for(rng: Rng, library: Library, label: str) -> str:
    """A clip's id or a generator's name."""
    clips, generators = library.filed.get(label, []), sound_of(label).generators
    if clips and (not generators or rng.random() < len(clips) / (len(clips) + FEW)):
        return clips[int(rng.integers(len(clips)))].id
    return SYNTHETIC + str(rng.choice(list(generators)))


def _seed(rng: Rng) -> int:
    return int(rng.integers(1 << 62))


def _layers(rng: Rng, library: Library, outline: Outline, level: float) -> tuple[Layer, ...]:
    layers = []
    for i, label in enumerate(outline.beds):
        below = 0.0 if i == 0 else rng.uniform(0, 20)
        source = source_for(rng, library, label)
        layers.append(Layer(label, source, _seed(rng), 0.0, outline.seconds, level - below))
    for label in outline.passing:
        source, seconds = source_for(rng, library, label), log_uniform(rng, 0.4, 8.0)
        start = rng.uniform(0, outline.seconds)
        above = level + rng.uniform(-5, 15)
        layers.append(Layer(label, source, _seed(rng), start, seconds, min(above, -20.0)))
    return tuple(layers)


def _digits(rng: Rng, library: Library) -> tuple[tuple[str, ...], str, tuple[float, ...]]:
    """Sources, what a voice says, and pauses: one recording of a string, clips of one speaker, or a voice."""
    roll, count = rng.random(), int(rng.integers(1, 7))
    pauses = tuple(float(p) for p in rng.uniform(*DIGIT_PAUSE_S, count))
    voiced = VOICE_SHARE["train" if library.split == "train" else "val"]
    strings = [clip for clip in library.filed.get("spoken_digits", ()) if clip.words]
    if voices.available() and (roll < voiced or not (strings or library.singles)):
        said = " ".join(str(rng.choice(DIGIT_NAMES)) for _ in pauses)
        return (str(voices.draw(rng, library.split)),), said, pauses
    if strings and (roll < voiced + STRING_SHARE or not library.singles):
        return (strings[int(rng.integers(len(strings)))].id,), "", (0.0,)
    speakers = sorted(library.singles)
    if library.split == "train":  # a few have read hundreds, many a dozen: each as often as there is to hear
        speakers = [speaker for speaker in speakers for _ in library.singles[speaker]]
    clips = library.singles[speakers[int(rng.integers(len(speakers)))]]
    return tuple(clips[int(rng.integers(len(clips)))].id for _ in pauses), "", pauses


def _reading(rng: Rng, library: Library) -> tuple[tuple[str, ...], str] | None:
    """A voice and what it reads aloud; None where a recording is to be heard."""
    if library.split != "train" or not voices.available() or rng.random() >= READING_SHARE:
        return None
    voice = voices.draw(rng, library.split)
    return (str(voice),), reading(rng, round(log_uniform(rng, *READ_S) * voice.rate / 60))


def _part(rng: Rng, library: Library, beat: Beat, bed_db: float) -> Part:
    sound = sound_of(beat.label)
    level = float(np.clip(max(bed_db, QUIETEST_DB) + rng.uniform(*SNR_DB), QUIETEST_DB, LOUDEST_DB))
    text, longest = beat.say, sound.longest_s
    pauses: tuple[float, ...] = (0.0,)
    if beat.say:
        sources: tuple[str, ...] = (str(voices.draw(rng, library.split, beat.language)),)
    elif beat.label == "spoken_digits":
        sources, text, pauses = _digits(rng, library)
    elif beat.label == "speech" and (read := _reading(rng, library)) is not None:
        sources, text = read
    else:
        sources = (source_for(rng, library, beat.label),)
    if sources[0].startswith(SYNTHETIC):
        longest = min(longest, log_uniform(rng, 1.5, 20.0))
    varied = library.split == "train" and not beat.say and not sources[0].startswith(SYNTHETIC)
    speed = float(rng.uniform(*SPEED)) if varied else 1.0
    reply = beat.reply if beat.own else sound.reply
    return Part(
        beat.label, sources, _seed(rng), beat.gap_s, level, longest, reply, beat.own, text, pauses, speed
    )


def ground(rng: Rng, outline: Outline, task: SubTask, library: Library, name: str, tfjp: bool = True) -> Plan:
    """Draw sources, seeds and levels for an outline."""
    bed_db = float(rng.uniform(*BED_DB))
    return Plan(
        id=name,
        split=library.split,
        seed=_seed(rng),
        scene=outline.scene,
        ability=task.ability,
        sub_task=task.name,
        seconds=outline.seconds,
        layers=_layers(rng, library, outline, bed_db),
        parts=tuple(_part(rng, library, beat, bed_db) for beat in outline.beats),
        rules=outline.rules,
        question=task.question,
        tfjp=tfjp,
        narrow=bool(rng.random() < NARROW_SHARE),
    )
