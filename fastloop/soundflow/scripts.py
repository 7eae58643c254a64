"""Scripts of sub-tasks with speech: what is said to the model, between sounds, and what it should answer.

A script takes the sounds that a planner chose and returns beats: sounds and spoken lines, in order, and
rules that hold in this stream ("tell me when the dog barks"). Lines come from phrases.yaml or are made up
(sums, numbers); they are spoken by espeak-ng.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib import resources
from string import Formatter
from typing import Any

import yaml

from .grammar import Rule
from .sequence import Reply
from .sounds import Library, sound_of
from .synth import Rng

FOREVER_S = 1e6
_TEENS = "ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen"
NUMBERS = f"zero one two three four five six seven eight nine {_TEENS}".split()
WATCHED = ("dog", "cat", "rooster", "sneezing", "coughing", "doorbell", "car_horn", "glass_breaking", "siren")


@dataclass(frozen=True)
class Beat:
    """One event, gap_s after the end of the one before: a sound of that label, or, with `say`, a line
    spoken in `language`. reply: the answer, or None for silence; `own`: this reply holds, not the label's.
    """

    label: str
    gap_s: float
    say: str = ""
    language: str = "en"
    reply: Reply | None = None
    own: bool = False


@dataclass(frozen=True)
class Script:
    beats: tuple[Beat, ...]
    rules: tuple[Rule, ...] = ()


Writer = Callable[[Rng, Script, Library, float], Script]


@functools.cache
def phrases() -> Mapping[str, Any]:
    text = resources.files(__package__).joinpath("phrases.yaml").read_text(encoding="utf-8")
    return yaml.safe_load(text)


def line(rng: Rng, say: str, reply: Reply | None, label: str = "speech", language: str = "en") -> Beat:
    """A spoken line after a pause of 1.5 to 4 s, in which the answer before it has room."""
    return Beat(label, float(rng.uniform(1.5, 4.0)), say, language, reply, own=True)


def _count(rng: Rng, seconds: float, each_s: float = 6.0) -> int:
    return max(1, int(seconds / each_s * rng.uniform(0.6, 1.0)))


def _reply(row: Mapping[str, Any]) -> Reply:
    return Reply(row["reply"], row.get("emotion", "normal"))


def _woven(rng: Rng, sounds: tuple[Beat, ...], lines: list[Beat]) -> tuple[Beat, ...]:
    """Sounds and lines in random order, each in its own."""
    order = rng.permutation([0] * len(sounds) + [1] * len(lines))
    left = iter(sounds), iter(lines)
    return tuple(next(left[int(which)]) for which in order)


def _from_table(name: str) -> Writer:
    def write(rng: Rng, script: Script, library: Library, seconds: float) -> Script:
        rows = phrases()[name]
        chosen = [rows[int(rng.integers(len(rows)))] for _ in range(_count(rng, seconds))]
        lines = [line(rng, row["say"], _reply(row)) for row in chosen]
        return Script(_woven(rng, script.beats, lines))

    return write


def sums(rng: Rng, script: Script, library: Library, seconds: float) -> Script:
    """Spoken sums of two digits."""
    lines = []
    for _ in range(_count(rng, seconds)):
        a, b = int(rng.integers(10)), int(rng.integers(10))
        lines.append(
            line(
                rng,
                f"what is {NUMBERS[a]} plus {NUMBERS[b]}?",
                Reply(f"{NUMBERS[a + b]}.".capitalize(), "normal"),
            )
        )
    return Script(_woven(rng, script.beats, lines))


def _target(rng: Rng, library: Library) -> str:
    return str(rng.choice([label for label in WATCHED if library.has(label)]))


def _sprinkled(rng: Rng, sounds: tuple[Beat, ...], target: str, times: int) -> tuple[Beat, ...]:
    others = tuple(beat for beat in sounds if beat.label != target)
    wanted = [Beat(target, float(rng.uniform(5.5, 8.0))) for _ in range(times)]  # apart: each an event
    return _woven(rng, others, wanted)


def watch(rng: Rng, script: Script, library: Library, seconds: float) -> Script:
    """`tell me when you hear a dog`: then each dog is named, whatever the label's own reply is."""
    target = _target(rng, library)
    words = sound_of(target).words
    told = line(rng, f"tell me when you hear {words}", Reply("OK, I will.", "normal"), "instruction")
    times = int(rng.integers(1, max(2, int(seconds / 10)) + 1))
    rule = Rule(target, "instruction", FOREVER_S, Reply(f"I hear {words}.", "normal"))
    return Script((told, *_sprinkled(rng, script.beats, target, times)), (rule,))


def hush(rng: Rng, script: Script, library: Library, seconds: float) -> Script:
    """`do not tell me about the doorbell`: then it needs no answer."""
    labels = [
        name for name in ("doorbell", "coughing", "sneezing", "car_horn", "phone_ring") if library.has(name)
    ]
    target = str(rng.choice(labels))
    say = f"do not tell me about {sound_of(target).words}"
    told = line(rng, say, Reply("OK, I will not.", "normal"), "instruction")
    times = int(rng.integers(1, max(2, int(seconds / 10)) + 1))
    return Script(
        (told, *_sprinkled(rng, script.beats, target, times)), (Rule(target, "instruction", FOREVER_S, None),)
    )


def count_aloud(rng: Rng, script: Script, library: Library, seconds: float) -> Script:
    """`count how often you hear a dog`: then each is answered by its number."""
    target = _target(rng, library)
    say = f"count how often you hear {sound_of(target).words}"
    told = line(rng, say, Reply("OK, I will count.", "normal"), "instruction")
    times = int(rng.integers(1, max(2, int(seconds / 8)) + 1))
    beats, number = [told], 0
    for beat in _sprinkled(rng, script.beats, target, times):
        if beat.label == target:
            number += 1
            beat = replace(beat, reply=Reply(f"{number}.", "normal"), own=True)
        beats.append(beat)
    return Script(tuple(beats))


def name_it(rng: Rng, script: Script, library: Library, seconds: float) -> Script:
    """After a sound, `what was that sound?`; the sounds themselves are left alone."""
    beats: list[Beat] = []
    for beat in script.beats:
        words = sound_of(beat.label).words
        beats.append(replace(beat, reply=None, own=True))
        beats.append(line(rng, "what was that sound?", Reply(f"{words}.".capitalize(), "normal"), "question"))
    return Script(tuple(beats))


def _translate(into_english: bool) -> Writer:
    def write(rng: Rng, script: Script, library: Library, seconds: float) -> Script:
        rows, lines = phrases()["translation"], []
        languages = [key for key in rows[0] if key != "en"]
        for _ in range(_count(rng, seconds)):
            row, other = rows[int(rng.integers(len(rows)))], str(rng.choice(languages))
            if into_english:
                lines.append(line(rng, row[other], Reply(row["en"]), language=other))
            else:
                lines.append(line(rng, f"{phrases()['say_in'][other]}: {row['en']}", Reply(row[other])))
        return Script(_woven(rng, script.beats, lines))

    return write


def dictation(rng: Rng, script: Script, library: Library, seconds: float) -> Script:
    """Sentences, written down when each has ended."""
    rows = phrases()["dictation"]
    chosen = [str(rows[int(rng.integers(len(rows)))]) for _ in range(_count(rng, seconds, 5.0))]
    return Script(_woven(rng, script.beats, [line(rng, text, Reply(text)) for text in chosen]))


def reading(rng: Rng, words: int) -> str:
    """At least so many words of what somebody might read aloud, in whole sentences, none of them a digit."""
    lists, said = phrases()["reading"], ""
    while len(said.split()) < words:
        frame = str(rng.choice(lists["frames"]))
        parts = (
            literal + (str(rng.choice(lists[slot])) if slot else "")
            for literal, slot, _, _ in Formatter().parse(frame)
        )
        said += f"{''.join(parts)}. "
    return said.rstrip()


SCRIPTS: dict[str, Writer] = {
    "small_talk": _from_table("small_talk"),
    "facts": _from_table("facts"),
    "feelings": _from_table("feelings"),
    "home": _from_table("home"),
    "sums": sums,
    "watch": watch,
    "hush": hush,
    "count_aloud": count_aloud,
    "name_it": name_it,
    "to_english": _translate(True),
    "from_english": _translate(False),
    "dictation": dictation,
}
