"""Scenario -> outline: which sounds a stream holds, in which order, and what calls for an answer.

    sub-task (abilities.yaml) + scenario (scenarios/*.yaml) --planner--> Outline --grounding.py--> Plan

A scenario is a grammar: what may go on all the time, what may pass, what may happen, what makes what
likelier, and rules of context. An outline names labels only; grounding gives them clips and generators.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import yaml

from .abilities import SubTask
from .clips import DataError
from .sequence import Reply
from .sounds import Library, sound_of
from .synth import Rng

Weights = Mapping[str, float]
GAP_S = (0.5, 0.8, 3.0)  # pause between events: at least, at most before the long tail, mean of that tail


@dataclass(frozen=True)
class Rule:
    """`event`, when it begins at most within_s after an `after` ended, gets this reply (None: silence)."""

    event: str
    after: str
    within_s: float
    reply: Reply | None


@dataclass(frozen=True)
class Scenario:
    """A grammar; weights need not sum to 1. beds go on all the time, passing comes and goes, both ignored."""

    scene: str
    beds: Weights
    passing: Weights
    events: Weights
    follows: Mapping[str, Weights] = field(default_factory=dict)  # factors on events after the key
    rules: tuple[Rule, ...] = ()


@dataclass(frozen=True)
class Outline:
    """events: (label, pause in seconds since the end of the event before)."""

    scene: str
    seconds: float
    beds: tuple[str, ...]
    passing: tuple[str, ...]
    events: tuple[tuple[str, float], ...]
    rules: tuple[Rule, ...] = ()


class Planner(Protocol):
    """Anything that makes outlines; the same generator state must give the same outline."""

    def outline(self, rng: Rng, task: SubTask, seconds: float | None = None) -> Outline: ...


# ---- the files


def _weights(value: Any, where: str) -> dict[str, float]:
    if isinstance(value, list):
        value = dict.fromkeys(value, 1.0)
    if not isinstance(value, dict):
        raise DataError(f"{where}: must be a mapping of label: weight, is a {type(value).__name__}")
    for label, weight in value.items():
        if not isinstance(label, str) or not isinstance(weight, (int, float)) or not 0 < weight < 1e6:
            raise DataError(f"{where}: {label!r}: {weight!r} is no positive weight")
    return {label: float(weight) for label, weight in value.items()}


def _rule(row: Any, where: str) -> Rule:
    fields = {"event", "after", "within_s", "reply", "emotion"}
    if not isinstance(row, dict) or set(row) - fields or not {"event", "after"} <= set(row):
        raise DataError(f"{where}: a rule has event, after, within_s, reply and emotion; this is {row!r}")
    reply = Reply(str(row["reply"]), row.get("emotion")) if row.get("reply") else None
    return Rule(row["event"], row["after"], float(row.get("within_s", 20.0)), reply)


def parse_scenario(text: str, where: str) -> Scenario:
    """A scenario file; DataError names file and field."""
    try:
        row = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise DataError(f"{where}: not valid YAML: {error}") from error
    fields = {"scene", "beds", "passing", "events", "follows", "rules"}
    if not isinstance(row, dict) or set(row) - fields or not {"scene", "beds", "events"} <= set(row):
        found = sorted(row) if isinstance(row, dict) else row
        raise DataError(f"{where}: a scenario has {sorted(fields)}, this one {found}")
    scenario = Scenario(
        scene=str(row["scene"]),
        beds=_weights(row["beds"], f"{where}: beds"),
        passing=_weights(row.get("passing", {}), f"{where}: passing"),
        events=_weights(row["events"], f"{where}: events"),
        follows={k: _weights(v, f"{where}: follows: {k}") for k, v in (row.get("follows") or {}).items()},
        rules=tuple(_rule(r, f"{where}: rules") for r in row.get("rules") or ()),
    )
    named = [*scenario.follows, *(label for each in scenario.follows.values() for label in each)]
    named += [label for rule in scenario.rules for label in (rule.event, rule.after)]
    if strange := sorted(set(named) - set(scenario.events) - set(scenario.passing)):
        raise DataError(f"{where}: follows and rules name {strange}, which are no events here")
    return scenario


def shipped_scenarios() -> tuple[Scenario, ...]:
    """The packaged grammars, in the order of their file names."""
    folder = resources.files(__package__).joinpath("scenarios")
    names = sorted(entry.name for entry in folder.iterdir() if entry.name.endswith(".yaml"))
    return tuple(parse_scenario(folder.joinpath(n).read_text(encoding="utf-8"), n) for n in names)


def read_scenarios(paths: Sequence[Path]) -> tuple[Scenario, ...]:
    """Grammars from files; none: the packaged ones."""
    if not paths:
        return shipped_scenarios()
    try:
        return tuple(parse_scenario(path.read_text(encoding="utf-8"), str(path)) for path in paths)
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"a scenario cannot be read: {error}") from error


# ---- the grammar's planner


def pick(rng: Rng, weights: Weights) -> str:
    """One label, by weight."""
    names, values = list(weights), np.array(list(weights.values()))
    return str(rng.choice(names, p=values / values.sum()))


@dataclass(frozen=True)
class GrammarPlanner:
    """Draws outlines from scenarios; only sounds that the library can make, none of `exclude`."""

    scenarios: tuple[Scenario, ...]
    library: Library
    exclude: frozenset[str] = frozenset()

    def possible(self, weights: Weights, families: Weights | None = None) -> dict[str, float]:
        """The weights of what can be made, times those of the families."""
        return {
            label: weight * (1.0 if families is None else families.get(sound_of(label).family, 0.0))
            for label, weight in weights.items()
            if label not in self.exclude
            and self.library.has(label)
            and (families is None or families.get(sound_of(label).family, 0.0) > 0)
        }

    def outline(self, rng: Rng, task: SubTask, seconds: float | None = None) -> Outline:
        fitting = [s for s in self.scenarios if self.possible(s.events, task.families)]
        if not fitting:
            raise DataError(f"no scenario has an event of {dict(task.families)} that can be made")
        scenario = fitting[int(rng.integers(len(fitting)))]
        if seconds is None:
            seconds = round(float(rng.uniform(*task.seconds)) / 0.4) * 0.4
        beds = self.possible(scenario.beds)
        passing = self.possible(scenario.passing)
        chosen = [pick(rng, beds)] if beds else ["silence"]
        if rng.random() < 0.5:  # real rooms are never one pure source
            chosen.append(str(rng.choice(["white_noise", "hum", "wind"])))
        count = int(rng.integers(task.passing[0], task.passing[1] + 1)) if passing else 0
        passes = tuple(pick(rng, passing) for _ in range(count))
        rules = scenario.rules if task.context else ()
        events = self._chain(rng, scenario, task, seconds)
        return Outline(scenario.scene, seconds, tuple(chosen), passes, events, rules)

    def _chain(
        self, rng: Rng, scenario: Scenario, task: SubTask, seconds: float
    ) -> tuple[tuple[str, float], ...]:
        weights = self.possible(scenario.events, task.families)
        events: list[tuple[str, float]] = []
        count = round(float(rng.uniform(*task.events)) * seconds / 25.6)
        pause = float(rng.uniform(0.0, 5.0))
        for _ in range(count):
            follows = scenario.follows.get(events[-1][0], {}) if events else {}
            label = pick(rng, {name: w * follows.get(name, 1.0) for name, w in weights.items()})
            events.append((label, pause))
            pause = float(rng.uniform(*GAP_S[:2]) + rng.exponential(GAP_S[2]))
        return tuple(events)
