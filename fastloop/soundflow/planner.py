"""Scenario -> outline: which sounds a stream holds, in which order, and what calls for an answer.

    sub-task (abilities.yaml) + scenario (grammar.py) --planner--> Outline --grounding.py--> Plan

An outline names labels only; grounding gives them clips, generators and voices. Planners: the shipped
grammar, a language model (llm.py), and `RandomPlanner`, which knows nothing of scenarios (for ablation).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from .abilities import SubTask
from .clips import DataError
from .grammar import Rule, Scenario, Weights
from .scripts import SCRIPTS, Beat, Script
from .sounds import Library, sound_of
from .synth import Rng

GAP_S = (0.5, 0.8, 3.0)  # pause between events: at least, at most before the long tail, mean of that tail
NOMINAL_S = 25.6  # a sub-task's number of events is for a stream of this length


@dataclass(frozen=True)
class Outline:
    """A stream before any source is chosen; beats come one after another."""

    scene: str
    seconds: float
    beds: tuple[str, ...]
    passing: tuple[str, ...]
    beats: tuple[Beat, ...]
    rules: tuple[Rule, ...] = ()


class Planner(Protocol):
    """Anything that makes outlines; the same generator state must give the same outline."""

    def outline(self, rng: Rng, task: SubTask, seconds: float | None = None) -> Outline: ...


def pick(rng: Rng, weights: Weights) -> str:
    """One label, by weight."""
    names, values = list(weights), np.array(list(weights.values()))
    return str(rng.choice(names, p=values / values.sum()))


def pause(rng: Rng) -> float:
    """Seconds between two events."""
    return float(rng.uniform(*GAP_S[:2]) + rng.exponential(GAP_S[2]))


def length(rng: Rng, task: SubTask, seconds: float | None) -> float:
    """The given length, or one that the task allows, in whole chunks of 0.4 s."""
    return round(float(rng.uniform(*task.seconds)) / 0.4) * 0.4 if seconds is None else seconds


@dataclass(frozen=True)
class GrammarPlanner:
    """Draws outlines from scenarios; only sounds that the library can make, none of `exclude`."""

    scenarios: tuple[Scenario, ...]
    library: Library
    exclude: frozenset[str] = frozenset()

    def possible(self, weights: Weights, families: Weights | None = None) -> dict[str, float]:
        """The weights of what can be made, times those of the families."""
        found = {}
        for label, weight in weights.items():
            factor = 1.0 if families is None else families.get(sound_of(label).family, 0.0)
            if factor > 0 and label not in self.exclude and self.library.has(label):
                found[label] = weight * factor
        return found

    def frame(self, rng: Rng, task: SubTask, seconds: float | None) -> tuple[Scenario, Outline]:
        """A scenario and an outline of it without beats."""
        fitting = [s for s in self.scenarios if self.possible(s.events, task.families) or task.script]
        if not fitting:
            raise DataError(
                f"{task.name}: no scenario has an event of {dict(task.families)} that can be made"
            )
        scenario = fitting[int(rng.integers(len(fitting)))]
        seconds = length(rng, task, seconds)
        beds, passing = self.possible(scenario.beds), self.possible(scenario.passing)
        chosen = [pick(rng, beds)] if beds else ["silence"]
        if rng.random() < 0.5:  # real rooms are never one pure source
            chosen.append(str(rng.choice(["white_noise", "hum", "wind"])))
        count = int(rng.integers(task.passing[0], task.passing[1] + 1)) if passing else 0
        passes = tuple(pick(rng, passing) for _ in range(count))
        rules = scenario.rules if task.context else ()
        return scenario, Outline(scenario.scene, seconds, tuple(chosen), passes, (), rules)

    def outline(self, rng: Rng, task: SubTask, seconds: float | None = None) -> Outline:
        scenario, frame = self.frame(rng, task, seconds)
        beats = self._chain(rng, scenario, task, frame.seconds)
        return with_script(rng, frame, beats, task, self.library)

    def _chain(self, rng: Rng, scenario: Scenario, task: SubTask, seconds: float) -> list[Beat]:
        weights = self.possible(scenario.events, task.families)
        count = round(float(rng.uniform(*task.events)) * seconds / NOMINAL_S) if weights else 0
        beats: list[Beat] = []
        gap = float(rng.uniform(0.0, 5.0))
        for _ in range(count):
            follows = scenario.follows.get(beats[-1].label, {}) if beats else {}
            label = pick(rng, {name: w * follows.get(name, 1.0) for name, w in weights.items()})
            beats.append(Beat(label, gap))
            gap = pause(rng)
        return beats


@dataclass(frozen=True)
class RandomPlanner:
    """No event selection: every label that can be made alike, no scenario, no context."""

    library: Library
    exclude: frozenset[str] = frozenset()

    def outline(self, rng: Rng, task: SubTask, seconds: float | None = None) -> Outline:
        labels = [label for label in self.library.labels() if label not in self.exclude]
        seconds = length(rng, task, seconds)
        quiet = [label for label in labels if sound_of(label).family == "quiet"]
        passes = tuple(str(rng.choice(quiet)) for _ in range(rng.integers(0, 3)))
        count = round(float(rng.uniform(*task.events)) * seconds / NOMINAL_S)
        beats = [Beat(str(rng.choice(labels)), pause(rng)) for _ in range(count)]
        frame = Outline("anywhere", seconds, (str(rng.choice(quiet)),), passes, ())
        return with_script(rng, frame, beats, task, self.library)


def with_script(rng: Rng, frame: Outline, beats: Sequence[Beat], task: SubTask, library: Library) -> Outline:
    """The frame with these beats, rewritten by the sub-task's script if it has one."""
    script = Script(tuple(beats))
    if task.script:
        script = SCRIPTS[task.script](rng, script, library, frame.seconds)
    return Outline(
        frame.scene, frame.seconds, frame.beds, frame.passing, script.beats, (*script.rules, *frame.rules)
    )
