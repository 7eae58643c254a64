"""Scenario grammars (scenarios/*.yaml): what may go on, pass and happen, and what context changes.

scene     its name
beds      label: weight. What goes on all the time; ignored
passing   label: weight. What comes and goes, over anything; ignored
events    label: weight. What happens, one after another
follows   label: {label: factor}. After the first, the weight of the second is multiplied
rules     event, after, within_s, reply, emotion: `event`, when it begins at most within_s after an `after`
          ended, gets this reply; without a reply, silence is right
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from .clips import DataError
from .sequence import Reply

Weights = Mapping[str, float]


@dataclass(frozen=True)
class Rule:
    """`event`, when it begins at most within_s after an `after` ended, gets this reply (None: silence)."""

    event: str
    after: str
    within_s: float
    reply: Reply | None


@dataclass(frozen=True)
class Scenario:
    """One grammar; weights need not sum to 1."""

    scene: str
    beds: Weights
    passing: Weights
    events: Weights
    follows: Mapping[str, Weights] = field(default_factory=dict)
    rules: tuple[Rule, ...] = ()


def _weights(value: Any, where: str) -> dict[str, float]:
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
    within = row.get("within_s", 20.0)
    if not isinstance(within, (int, float)) or not within > 0:
        raise DataError(f"{where}: within_s must be a positive number of seconds, is {within!r}")
    reply = Reply(str(row["reply"]), row.get("emotion")) if row.get("reply") else None
    return Rule(str(row["event"]), str(row["after"]), float(within), reply)


def parse_scenario(text: str, where: str) -> Scenario:
    """A scenario file; DataError names file and field."""
    try:
        row = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise DataError(f"{where}: not valid YAML: {error}") from error
    fields = {"scene", "beds", "passing", "events", "follows", "rules"}
    if not isinstance(row, dict) or set(row) - fields or not {"scene", "beds", "events"} <= set(row):
        found = sorted(map(str, row)) if isinstance(row, dict) else repr(row)
        raise DataError(
            f"{where}: a scenario has {sorted(fields)} (scene, beds, events at least), not {found}"
        )
    follows, rules = row.get("follows") or {}, row.get("rules") or []
    if not isinstance(follows, dict) or not isinstance(rules, list):
        raise DataError(f"{where}: follows must be a mapping and rules a list")
    scenario = Scenario(
        scene=str(row["scene"]),
        beds=_weights(row["beds"], f"{where}: beds"),
        passing=_weights(row.get("passing") or {}, f"{where}: passing"),
        events=_weights(row["events"], f"{where}: events"),
        follows={str(k): _weights(v, f"{where}: follows: {k}") for k, v in follows.items()},
        rules=tuple(_rule(r, f"{where}: rules[{i}]") for i, r in enumerate(rules)),
    )
    named = [*scenario.follows, *(label for each in scenario.follows.values() for label in each)]
    named += [label for rule in scenario.rules for label in (rule.event, rule.after)]
    if strange := sorted(set(named) - set(scenario.events) - set(scenario.passing)):
        raise DataError(f"{where}: follows and rules name {strange}, which do not happen here")
    return scenario


def shipped_scenarios() -> tuple[Scenario, ...]:
    """The packaged grammars, in the order of their file names."""
    folder = resources.files(__package__).joinpath("scenarios")
    names = sorted(entry.name for entry in folder.iterdir() if entry.name.endswith(".yaml"))
    return tuple(parse_scenario(folder.joinpath(n).read_text(encoding="utf-8"), n) for n in names)


def read_scenarios(paths: Sequence[Path] = ()) -> tuple[Scenario, ...]:
    """Grammars from files; none: the packaged ones."""
    if not paths:
        return shipped_scenarios()
    try:
        return tuple(parse_scenario(path.read_text(encoding="utf-8"), str(path)) for path in paths)
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"a scenario cannot be read: {error}") from error
