"""Scores of streams whose truth is known: what was answered, when, how well, and what for nothing.

An answer is split into units: every digit of a written number is one, any other text is one. A turn that is
to be answered takes a unit between its onset and WITHIN_S after its answer is due: first every turn one
with the right text, then every turn that has none the first that is left. Units that belong to no turn are
false triggers.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jiwer

from .hear import Answer
from .questions import form
from .sequence import written
from .shards import Stream, Turn
from .statistics import NOTHING, Figure, bootstrap, share

WITHIN_S = 2.0  # so long after it is due an answer still counts
ECHO_S = 0.8  # so long after its end a sound is taken for the cause of a false trigger
KINDS = ("sound", "digits", "question")
NOISE_DB = {  # the bands of `Scores.noise`: from .. below
    "below 5 dB": (-math.inf, 5.0),
    "5 to 20 dB": (5.0, 20.0),
    "from 20 dB": (20.0, math.inf),
}


@dataclass(frozen=True)
class Unit:
    """A part of an answer that can belong to one turn."""

    t_s: float
    text: str
    emotion: str | None


def units(answers: Sequence[Answer]) -> list[Unit]:
    """Answers -> units in time order; "3 5" is two."""
    found = []
    for answer in answers:
        parts = answer.text.split() if written(answer.text) else [answer.text]
        found += [Unit(answer.t_s, part, answer.emotion) for part in parts]
    return found


def kind(turn: Turn) -> str:
    """Of a turn that is to be answered: a question, digits to write, or a sound."""
    if turn.label == "question":
        return "question"
    return "digits" if written(turn.reply or "") else "sound"


@dataclass(frozen=True)
class Outcome:
    """One stream: each turn that is to be answered with its unit or None, and the units of no turn."""

    stream: Stream
    answered: list[tuple[Turn, Unit | None]]
    false: list[Unit]
    heard: list[Unit]

    def hits(self) -> int:
        return sum(unit is not None for _, unit in self.answered)


def match(stream: Stream, answers: Sequence[Answer]) -> Outcome:
    """Give every turn its unit."""
    free = heard = units(answers)
    due = [turn for turn in stream.turns if turn.answer_s is not None]
    due.sort(key=lambda turn: turn.answer_s or 0.0)
    taken: dict[int, Unit] = {}
    for exact in (True, False):
        for i, turn in enumerate(due):
            latest = (turn.answer_s or 0.0) + WITHIN_S
            fits = [
                u for u in free if turn.start_s <= u.t_s <= latest and (not exact or u.text == turn.reply)
            ]
            if i not in taken and fits:
                taken[i] = fits[0]
                free = [unit for unit in free if unit is not fits[0]]
    return Outcome(stream, [(turn, taken.get(i)) for i, turn in enumerate(due)], free, heard)


@dataclass(frozen=True)
class Scores:
    """Figures by name, and of each label: share answered, share answered with the right words; of each
    silent label: share of its clips that no false trigger followed. noise: share answered with the right
    words by how far a sound is above all else, where the truth says it (`snr_db` of a turn). questions: share
    of questions answered right, by their form, and by whether an answer before was missed, other or unwanted:
    a model reads its own answers, too.
    """

    streams: int
    hours: float
    figures: dict[str, Figure]
    recall: dict[str, Figure]
    right: dict[str, Figure]
    silence: dict[str, Figure]
    noise: dict[str, Figure]
    questions: dict[str, Figure]


def score(outcomes: Sequence[Outcome]) -> Scores:
    """Totals over streams."""
    return Scores(
        streams=len(outcomes),
        hours=_hours(outcomes),
        figures=_triggers(outcomes) | _of_kinds(outcomes) | _words(outcomes) | _silence(outcomes),
        recall=_by_label(outcomes, lambda turn, unit: unit is not None),
        right=_by_label(outcomes, lambda turn, unit: unit is not None and unit.text == turn.reply),
        silence=_silence_by_label(outcomes),
        noise=_by_noise(outcomes),
        questions=_by_question(outcomes),
    )


def _hours(outcomes: Sequence[Outcome]) -> float:
    return sum(outcome.stream.seconds for outcome in outcomes) / 3600


def _f1(outcomes: Sequence[Outcome]) -> float:
    hits = sum(outcome.hits() for outcome in outcomes)
    wrong = sum(len(o.false) + len(o.answered) for o in outcomes) - hits
    return 2 * hits / (2 * hits + wrong) if hits + wrong else math.nan


def _per_hour(outcomes: Sequence[Outcome]) -> float:
    hours = _hours(outcomes)
    return sum(len(outcome.false) for outcome in outcomes) / hours if hours else math.nan


def _triggers(outcomes: Sequence[Outcome]) -> dict[str, Figure]:
    hits, false = sum(o.hits() for o in outcomes), sum(len(o.false) for o in outcomes)
    ambient = [outcome for outcome in outcomes if outcome.stream.silent]
    return {
        "precision": share(hits, hits + false),
        "recall": share(hits, sum(len(o.answered) for o in outcomes)),
        "f1": bootstrap(outcomes, _f1),
        "false_triggers_per_hour": bootstrap(outcomes, _per_hour),
        "false_triggers_per_ambient_hour": bootstrap(ambient, _per_hour),
    }


def _restricted(outcome: Outcome, wanted: str) -> Outcome:
    """Only the turns of a kind, and the false units that look like it."""
    answered = [(turn, unit) for turn, unit in outcome.answered if kind(turn) == wanted]
    false = [u for u in outcome.false if ("digits" if written(u.text) else "sound") == wanted]
    return Outcome(outcome.stream, answered, false, outcome.heard)


def _of_kinds(outcomes: Sequence[Outcome]) -> dict[str, Figure]:
    """Recall, F1, right words and latencies of sounds, digits and questions."""
    figures: dict[str, Figure] = {}
    for name in KINDS:
        own = [_restricted(outcome, name) for outcome in outcomes]
        pairs = [(turn, unit) for outcome in own for turn, unit in outcome.answered]
        hits = [(turn, unit) for turn, unit in pairs if unit is not None]
        figures[f"{name}_recall"] = share(len(hits), len(pairs))
        if name != "question":
            figures[f"{name}_f1"] = bootstrap(own, _f1, len(pairs))
        right = sum(unit.text == turn.reply for turn, unit in hits)
        figures[f"{name}_right"] = share(right, len(pairs))
        for point in ("onset", "end"):
            for q, shown in ((50, "median"), (95, "p95")):
                label = f"{name}_latency_from_{point}_{shown}_s"
                figures[label] = bootstrap(own, _latency(point, q), len(hits))
    return figures


def _latency(point: str, q: int) -> Callable[[Sequence[Outcome]], float]:
    """The q-th percentile of the seconds from onset or end of a turn to its answer."""

    def statistic(outcomes: Sequence[Outcome]) -> float:
        delays = sorted(
            unit.t_s - (turn.start_s if point == "onset" else turn.end_s)
            for outcome in outcomes
            for turn, unit in outcome.answered
            if unit is not None
        )
        if not delays:
            return math.nan
        return statistics.median(delays) if q == 50 else delays[min(len(delays) - 1, len(delays) * q // 100)]

    return statistic


def _words(outcomes: Sequence[Outcome]) -> dict[str, Figure]:
    """Word error rate of the digits of each stream that has any, all that was written against all said."""
    pairs = []
    for outcome in outcomes:
        said = [turn.reply or "" for turn, _ in outcome.answered if kind(turn) == "digits"]
        if said:
            heard = [unit.text for unit in outcome.heard if written(unit.text)]
            pairs.append((" ".join(" ".join(said).split()), " ".join(heard)))
    if not pairs:
        return {"word_error_rate": NOTHING}
    counts = []
    for reference, hypothesis in pairs:
        out = jiwer.process_words(reference, hypothesis)
        errors = out.substitutions + out.deletions + out.insertions
        counts.append((errors, out.substitutions + out.deletions + out.hits))

    def rate(items: Sequence[tuple[int, int]]) -> float:
        return sum(errors for errors, _ in items) / sum(words for _, words in items)

    return {"word_error_rate": bootstrap(counts, rate, sum(words for _, words in counts))}


def _silent_turns(outcome: Outcome) -> list[tuple[Turn, bool]]:
    """Every turn that calls for silence, and whether it got it."""
    return [
        (turn, not any(turn.start_s < unit.t_s <= turn.end_s + ECHO_S for unit in outcome.false))
        for turn in outcome.stream.turns
        if turn.reply is None
    ]


def _silence(outcomes: Sequence[Outcome]) -> dict[str, Figure]:
    turns = [right for outcome in outcomes for _, right in _silent_turns(outcome)]
    return {"silent_clips_right": share(sum(turns), len(turns))}


def _silence_by_label(outcomes: Sequence[Outcome]) -> dict[str, Figure]:
    counts: dict[str, list[bool]] = defaultdict(list)
    for outcome in outcomes:
        for turn, right in _silent_turns(outcome):
            counts[turn.label].append(right)
    return {label: share(sum(rights), len(rights)) for label, rights in sorted(counts.items())}


def _by_label(outcomes: Sequence[Outcome], hit: Callable[[Turn, Unit | None], bool]) -> dict[str, Figure]:
    counts: dict[str, list[bool]] = defaultdict(list)
    for outcome in outcomes:
        for turn, unit in outcome.answered:
            counts[turn.label].append(hit(turn, unit))
    return {label: share(sum(hits), len(hits)) for label, hits in sorted(counts.items())}


def _by_noise(outcomes: Sequence[Outcome]) -> dict[str, Figure]:
    """Share answered with the right words, of every kind in every band of NOISE_DB."""
    found: dict[str, Figure] = {}
    for wanted in KINDS:
        for band, (low, high) in NOISE_DB.items():
            rights = [
                unit is not None and unit.text == turn.reply
                for outcome in outcomes
                for turn, unit in outcome.answered
                if kind(turn) == wanted and turn.snr_db is not None and low <= turn.snr_db < high
            ]
            found[f"{wanted}, {band}"] = share(sum(rights), len(rights))
    return {name: figure for name, figure in found.items() if figure.n}


def _by_question(outcomes: Sequence[Outcome]) -> dict[str, Figure]:
    """Share answered with the right words, of every form of question, and after right and wrong answers."""
    found: dict[str, list[bool]] = defaultdict(list)
    for outcome in outcomes:
        wrong_s = [unit.t_s for unit in outcome.false]
        wrong_s += [t.answer_s or 0.0 for t, unit in outcome.answered if unit is None or unit.text != t.reply]
        for turn, unit in outcome.answered:
            if kind(turn) == "question":
                right = unit is not None and unit.text == turn.reply
                strayed = any(at_s < turn.start_s for at_s in wrong_s)
                for name in (form(turn.user)[0], "after a mistake" if strayed else "after none"):
                    found[name].append(right)
    return {name: share(sum(rights), len(rights)) for name, rights in sorted(found.items())}
