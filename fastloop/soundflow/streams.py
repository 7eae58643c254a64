"""Streams by number: stream `index` of the endless collection `seed`, for builders and for trainers.

library = Library.open("manifest.jsonl", "train")
made = stream(seed=0, index=17, mix=default_mix(library), seconds=25.6)    # made.pcm, made.record
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from .abilities import SubTask, sub_task, sub_tasks
from .clips import DataError, Unreadable
from .compose import Composed, compose
from .grammar import shipped_scenarios
from .grounding import ground
from .planner import GrammarPlanner, Planner
from .sounds import Library
from .suitability import problems
from .synth import Rng

ATTEMPTS = 30  # plans drawn for one index before giving up


@dataclass(frozen=True)
class Mix:
    """What streams are drawn from: sources, sub-tasks with weights, a planner; and how.

    rejected: how often a composed stream was thrown away, by kind of problem (suitability.py).
    """

    library: Library
    tasks: tuple[SubTask, ...]
    planner: Planner
    tfjp: bool = True
    rejected: Counter[str] = field(default_factory=Counter)

    def draw(self, rng: Rng) -> SubTask:
        """A sub-task by weight; where none has any, all alike."""
        weights = np.array([task.weight for task in self.tasks])
        if not weights.any():
            weights = np.ones(len(self.tasks))
        return self.tasks[int(rng.choice(len(self.tasks), p=weights / weights.sum()))]


def chosen_tasks(names: Sequence[str] = ()) -> tuple[SubTask, ...]:
    """The sub-tasks named; none: those that have a weight; "all": every one that can be generated."""
    if list(names) == ["all"]:
        return tuple(task for task in sub_tasks().values() if task.generated)
    return tuple(map(sub_task, names)) or tuple(task for task in sub_tasks().values() if task.weight > 0)


def default_mix(library: Library, tasks: Sequence[str] = (), exclude: Sequence[str] = ()) -> Mix:
    """The shipped scenarios, with `chosen_tasks(tasks)`, without the labels `exclude`."""
    planner = GrammarPlanner(shipped_scenarios(), library, frozenset(exclude))
    return Mix(library, chosen_tasks(tasks), planner)


def stream(seed: int, index: int, mix: Mix, seconds: float | None = None) -> Composed:
    """The same arguments and clips give the same bytes. seconds: length of the stream; None: drawn.

    Where a clip cannot be read, or the stream is not suitable, another plan is drawn; the clip is named in
    mix.library.unreadable, the reason counted in mix.rejected.
    """
    library, why = mix.library, ""
    for attempt in range(ATTEMPTS):
        rng = np.random.default_rng([seed, zlib.crc32(library.split.encode()), index, attempt])
        task = mix.draw(rng)
        outline = mix.planner.outline(rng, task, seconds)
        plan = ground(rng, outline, task, library, f"{library.split}-{seed}-{index:07d}", mix.tfjp)
        try:
            made = compose(plan, library)
        except Unreadable as error:
            why = str(error)
            continue
        found = problems(made.pcm, made.record)
        if not found:
            return made
        why = found[0]
        mix.rejected[why.partition(":")[0]] += 1
    raise DataError(f"stream {index} of seed {seed}: {ATTEMPTS} plans in a row failed; the last: {why}")
