"""History review: questions about what a stream held, with answers derived from its turns."""

from __future__ import annotations

import functools
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from .grammar import shipped_scenarios
from .sequence import Reply
from .shards import QUESTION
from .sounds import sound_of
from .synth import Rng

ANYTHING, FIRST, LAST = "what did you hear?", "what did you hear first?", "what did you hear last?"
COUNT, WHETHER = "how many times did you hear {}?", "did you hear {}?"


@dataclass(frozen=True)
class Question:
    text: str
    answer: Reply


def _heard(labels: Sequence[str]) -> list[str]:
    """Labels in order, without earlier questions; a string of digits counts once."""
    heard: list[str] = []
    for label in labels:
        if label == QUESTION:
            continue
        if not (heard and heard[-1] == label == "spoken_digits"):
            heard.append(label)
    return heard


def _words(label: str) -> str:
    return sound_of(label).words


@functools.cache
def _asked_about() -> tuple[str, ...]:
    """What may be asked about without having been heard: whatever happens in a scenario, speech apart. Were
    it a few sounds, a model could say no to these, and yes to others, without listening.
    """
    labels = {label for scenario in shipped_scenarios() for label in scenario.events}
    return tuple(sorted(name for name in labels if sound_of(name).family not in ("digits", "chatter")))


def _sentence(text: str) -> Reply:
    return Reply(f"{text[0].upper()}{text[1:]}.", "normal")


def ask(rng: Rng, labels: Sequence[str], background: Collection[str] = ()) -> Question:
    """A question about the foreground events of a stream, and the true answer.

    labels: of the events, in time order.  background: labels that are also heard under the events; how often,
    or whether, is not asked of them.
    """
    text = _question(rng, _heard(labels), background)
    reply = answer(text, labels, background)
    assert reply is not None
    return Question(text, reply)


def _question(rng: Rng, heard: Sequence[str], background: Collection[str]) -> str:
    if not heard:
        return ANYTHING
    kind = str(rng.choice(["first", "last", "count", "whether"], p=[0.25, 0.25, 0.2, 0.3]))
    if len(set(heard)) == 1 and kind in ("first", "last"):
        return ANYTHING
    if kind == "first":
        return FIRST
    if kind == "last":
        return LAST
    behind = {_words(label) for label in background}
    clear = [label for label in heard if _words(label) not in behind]
    there = {_words(label) for label in heard} | behind
    absent = [label for label in _asked_about() if _words(label) not in there]
    if absent and (not clear or (kind == "whether" and rng.random() < 0.5)):
        return WHETHER.format(_words(str(rng.choice(absent))))
    if not clear:
        return FIRST
    about = _words(str(rng.choice(clear)))
    return (COUNT if kind == "count" else WHETHER).format(about)


def form(text: str) -> tuple[str, str]:
    """A question, with {} for what it names, and that; the text itself and "" where it names nothing."""
    for asked in (COUNT, WHETHER):
        before, after = asked.split("{}")
        if text.startswith(before) and text.endswith(after):
            return asked, text.removeprefix(before).removesuffix(after)
    return text, ""


def answer(text: str, labels: Sequence[str], background: Collection[str] = ()) -> Reply | None:
    """The true answer to a question in these words; None where it has none, or a bed may be meant."""
    heard = [_words(label) for label in _heard(labels)]
    if text == ANYTHING:
        words = {*heard} or {"nothing special"}
        return _sentence(words.pop()) if len(words) == 1 else None
    if text in (FIRST, LAST):
        return _sentence(heard[0 if text == FIRST else -1]) if heard else None
    asked, about = form(text)
    if asked not in (COUNT, WHETHER):
        return None
    times = heard.count(about)
    if about in {_words(label) for label in background}:
        return None
    if asked == WHETHER:
        # Names what it speaks of: from a lone yes or no a model learns no word of the question.
        return Reply(f"{about[0].upper()}{about[1:]}? {'Yes' if times else 'No'}.", "normal")
    return Reply(f"{times}.", "normal") if times else None
