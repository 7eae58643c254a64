"""The table of abilities and sub-tasks (abilities.yaml): what a builder makes of each, or what it lacks."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

import yaml

from .clips import DataError
from .scripts import SCRIPTS

QUESTIONS = ("", "history")


@dataclass(frozen=True)
class SubTask:
    """One slot of the table. weight 0: not in the default mix; needs: what is missing to make it.

    families: weight of each family of sounds (sounds.yaml).  events, passing: at least, at most (events per
    25.6 s).  seconds: shortest and longest stream.  context: the scenario's rules apply.
    script: what is said in the stream (scripts.py).  question: "history" asks about the stream at its end.
    """

    name: str
    ability: str
    how: str
    needs: str = ""
    weight: float = 0.0
    families: Mapping[str, float] = field(default_factory=dict)
    events: tuple[float, float] = (0, 5)
    passing: tuple[int, int] = (0, 3)
    seconds: tuple[float, float] = (20.0, 40.0)
    context: bool = False
    script: str = ""
    question: str = ""

    @property
    def generated(self) -> bool:
        return not self.needs


@functools.cache
def sub_tasks() -> Mapping[str, SubTask]:
    """name -> SubTask, in the order of the file."""
    text = resources.files(__package__).joinpath("abilities.yaml").read_text(encoding="utf-8")
    table = {}
    for ability, rows in yaml.safe_load(text).items():
        for name, row in rows.items():
            if name in table:
                raise DataError(f"abilities.yaml: {name} stands twice")
            table[name] = _sub_task(name, ability, row)
    return table


def _sub_task(name: str, ability: str, row: dict[str, Any]) -> SubTask:
    known = {f.name for f in dataclasses.fields(SubTask)} - {"name", "ability"}
    if unknown := sorted(set(row) - known):
        raise DataError(f"abilities.yaml: {name}: unknown fields {unknown}")
    if row.get("question", "") not in QUESTIONS:
        raise DataError(f"abilities.yaml: {name}: question {row['question']!r} is none of {QUESTIONS}")
    if row.get("script", "") not in ("", *SCRIPTS):
        raise DataError(f"abilities.yaml: {name}: there is no script {row['script']!r}")
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in row.items()}
    return SubTask(name, ability, **values)


def sub_task(name: str) -> SubTask:
    """A slot by name; DataError where there is none, or where it cannot be generated."""
    table = sub_tasks()
    if name not in table:
        raise DataError(f"there is no sub-task {name!r}; known: {', '.join(table)}")
    if not table[name].generated:
        raise DataError(f"sub-task {name!r} cannot be generated: it needs {table[name].needs}")
    return table[name]
