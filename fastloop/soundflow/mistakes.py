"""Histories that hold what a model gets wrong: answers that were missed, that were others, that nobody
wanted. What is right stays the label, so a model learns to go on from its own mistakes and to remember what
it has heard, not what it has said (as in DAgger, Ross et al. 2011, arXiv 1011.0686).
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence

import numpy as np

from .questions import QUESTION
from .sequence import Reply, Step, due_chunk, written
from .shards import Turn

MISSED_CHUNKS = 4  # in which an answer that is never given is wanted
TEMPTING_S = 1.0  # after which a sound to be ignored may be taken for another
ALERT, COUNT, NAME = "alert", "count", "name"


def kind(turn: Turn) -> str:
    """What the reply of a turn is mistaken within: alerts, and of answers to questions names or numbers."""
    if turn.label != QUESTION:
        return ALERT
    return COUNT if str(turn.reply).removesuffix(".").isdigit() else NAME


class Mistakes:
    """Draws mistakes among the replies of `turns`.

    chance: that an answer is missed (digits never are: `sequence.plan` draws those that are late), that
    another one is given in its place, and that a sound to be ignored is answered.
    """

    def __init__(self, turns: Iterable[Turn], chance: float) -> None:
        self.chance = chance
        alike = defaultdict[str, dict[Reply, None]](dict)  # in the order of the turns
        for turn in turns:
            if turn.reply and "? " not in turn.reply and not written(turn.reply):
                alike[kind(turn)][Reply(turn.reply, turn.emotion)] = None
        self.alerts = tuple(alike[ALERT])
        self.alike = {reply: tuple(found) for found in alike.values() for reply in found}

    def other(self, reply: Reply, rng: np.random.Generator) -> Reply:
        """What could be said in place of this: one digit is another, yes is no; an alert, a name or a number
        is another. The same where there is no other.
        """
        if written(reply.text):
            digits = reply.text.split()
            at = int(rng.integers(len(digits)))
            digits[at] = str((int(digits[at]) + int(rng.integers(1, 10))) % 10)
            return Reply(" ".join(digits), reply.emotion)
        about, asked, whether = reply.text.partition("? ")
        if asked:
            return Reply(f"{about}? {'No' if whether.startswith('Yes') else 'Yes'}.", reply.emotion)
        others = [other for other in self.alike.get(reply, ()) if other != reply]
        return others[int(rng.integers(len(others)))] if others else reply

    def make(self, steps: Sequence[Step], tempting: Collection[int], rng: np.random.Generator) -> list[Step]:
        """Steps that say what is right, in time or late -> steps of which some do not. tempting: chunks in
        which something is heard that is to be ignored.
        """
        made = list(steps)
        for chunk, step in enumerate(steps):
            if step.said is None:
                if self.alerts and chunk in tempting and made[chunk] == Step() and rng.random() < self.chance:
                    made[chunk] = Step(said=self.alerts[int(rng.integers(len(self.alerts)))])
                continue
            roll = rng.random()
            if step.said != step.wanted or roll >= 2 * self.chance:
                continue
            if roll < self.chance:
                made[chunk] = dataclasses.replace(step, said=self.other(step.said, rng))
            elif not written(step.said.text):
                _miss(made, chunk)
        return made


def tempting_chunks(turns: Iterable[Turn], chunks: int, chunk_s: float) -> set[int]:
    """A chunk of each turn that is to be ignored, where it has been heard for a second or has ended."""
    ignored = [t for t in turns if t.reply is None and not t.background and t.label != QUESTION]
    places = {due_chunk(min(turn.start_s + TEMPTING_S, turn.end_s), chunk_s) for turn in ignored}
    return {place for place in places if place < chunks}


def _miss(steps: list[Step], chunk: int) -> None:
    """Never give the answer of a chunk; it is wanted for as long as nothing else happens, MISSED_CHUNKS at
    most.
    """
    wanted = steps[chunk].wanted
    steps[chunk] = dataclasses.replace(steps[chunk], said=None)
    for then in range(chunk + 1, min(len(steps), chunk + MISSED_CHUNKS)):
        if steps[then] != Step():
            return
        steps[then] = Step(wanted=wanted)
