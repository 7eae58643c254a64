"""History review: questions about what a stream held, with answers derived from its turns."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from .sequence import Reply
from .sounds import sound_of
from .synth import Rng

QUESTION = "question"  # label of a spoken question about the stream
ABSENT = ("siren", "dog", "crying_baby", "glass_breaking", "coughing", "doorbell", "rooster", "sneezing")


@dataclass(frozen=True)
class Question:
    text: str
    answer: Reply


def _heard(turns: Sequence[dict[str, Any]]) -> list[str]:
    """Labels in order, without earlier questions; a string of digits counts once."""
    labels: list[str] = []
    for turn in turns:
        if turn["label"] == QUESTION:
            continue
        if not (labels and labels[-1] == turn["label"] == "spoken_digits"):
            labels.append(turn["label"])
    return labels


def _words(label: str) -> str:
    return sound_of(label).words


def _sentence(text: str) -> Reply:
    return Reply(f"{text[0].upper()}{text[1:]}.", "normal")


def ask(rng: Rng, turns: Sequence[dict[str, Any]], background: Collection[str] = ()) -> Question:
    """A question about the foreground events of a stream, in time order, and the true answer.

    background: labels that are also heard under the events; how often, or whether, is not asked of them.
    """
    heard = _heard(turns)
    if not heard:
        return Question("what did you hear?", _sentence("nothing special"))
    kind = str(rng.choice(["first", "last", "count", "whether"], p=[0.25, 0.25, 0.2, 0.3]))
    if len(set(heard)) == 1 and kind in ("first", "last"):
        return Question("what did you hear?", _sentence(_words(heard[0])))
    if kind == "first":
        return Question("what did you hear first?", _sentence(_words(heard[0])))
    if kind == "last":
        return Question("what did you hear last?", _sentence(_words(heard[-1])))
    clear = [label for label in heard if label not in background]
    absent = [label for label in ABSENT if label not in heard and label not in background]
    if not clear or (kind == "whether" and rng.random() < 0.5):
        return Question(f"did you hear {_words(str(rng.choice(absent)))}?", Reply("No.", "normal"))
    about = str(rng.choice(clear))
    if kind == "count":
        return Question(
            f"how many times did you hear {_words(about)}?", Reply(f"{heard.count(about)}.", "normal")
        )
    return Question(f"did you hear {_words(about)}?", Reply("Yes.", "normal"))
