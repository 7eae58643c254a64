"""A shard of a corpus from its number and the settings of a build; builder.py says who makes which.

Shard k holds streams k * STRIDE, k * STRIDE + 1, ... of the collection `seed` until it is `shard_s` long:
which process makes it, and when, does not matter.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import soundfile
import soxr

from . import voices
from .clips import DataError
from .compose import Composed
from .grammar import read_scenarios
from .llm import LlmPlanner
from .planner import GrammarPlanner, Planner, RandomPlanner
from .shards import write_shard
from .sounds import Library
from .streams import Mix, chosen_tasks, stream

STRIDE = 100_000  # more streams than a shard can hold
PLANNERS = ("grammar", "random", "llm")


@dataclass(frozen=True)
class BuildConfig:
    """What a corpus is a function of, together with the clips and the versions of the libraries.

    tasks: as streams.chosen_tasks takes them.  seconds: length of every stream; None: drawn.
    planner: grammar, random (no event selection) or llm, which needs llm_url and llm_model and keeps its
    answers in the folder llm_kept.
    """

    manifest: str
    split: str = "train"
    seed: int = 0
    hours: float = 1.0
    shard_s: float = 600.0
    seconds: float | None = None
    tasks: tuple[str, ...] = ()
    scenarios: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    tfjp: bool = True
    planner: str = "grammar"
    llm_url: str = ""
    llm_model: str = ""
    llm_kept: str = ""

    def __post_init__(self) -> None:
        if not 0 < self.hours < 1e6:
            raise DataError(f"hours must be positive, got {self.hours}")
        if not 1 <= self.shard_s <= 86_400:
            raise DataError(f"a shard must be 1 s to a day long, got {self.shard_s} s")
        if self.seconds is not None and not 8 <= self.seconds <= 3600:
            raise DataError(f"a stream must be 8 s to an hour long, got {self.seconds} s")
        if self.seed < 0:
            raise DataError(f"the seed must not be negative, got {self.seed}")
        if self.planner not in PLANNERS:
            raise DataError(f"planner {self.planner!r} is none of {', '.join(PLANNERS)}")
        if self.planner == "llm" and not (self.llm_url and self.llm_model):
            raise DataError("planner llm needs the address of an endpoint and the name of a model")

    @property
    def shards(self) -> int:
        return max(1, math.ceil(self.hours * 3600 / self.shard_s - 1e-9))

    def shard_name(self, number: int) -> str:
        return f"{self.split}-{number:05d}.tar"


@dataclass
class Built:
    """What a build did: shards made and found, streams and seconds made, clips that could not be read, and
    streams that were thrown away, by kind of problem.
    """

    made: int = 0
    found: int = 0
    streams: int = 0
    seconds: float = 0.0
    unreadable: dict[str, str] = field(default_factory=dict)
    rejected: Counter[str] = field(default_factory=Counter)

    def add(self, other: Built) -> None:
        self.made += other.made
        self.streams += other.streams
        self.seconds += other.seconds
        self.unreadable |= other.unreadable
        self.rejected += other.rejected


class Workshop:
    """A library and a mix, opened once in a process; makes shards."""

    def __init__(self, config: BuildConfig) -> None:
        self.config = config
        library = Library.open(config.manifest, config.split)
        scenarios = read_scenarios([Path(p) for p in config.scenarios])
        exclude = frozenset(config.exclude)
        planner: Planner = GrammarPlanner(scenarios, library, exclude)
        if config.planner == "random":
            planner = RandomPlanner(library, exclude)
        elif config.planner == "llm":
            kept = Path(config.llm_kept) if config.llm_kept else None
            planner = LlmPlanner(
                GrammarPlanner(scenarios, library, exclude), config.llm_url, config.llm_model, kept
            )
        tasks = chosen_tasks(config.tasks)
        spoken = [task.name for task in tasks if task.script or task.question]
        if spoken and not voices.available():
            raise DataError(f"{voices.MISSING}, or leave out --tasks {','.join(spoken)}")
        self.mix = Mix(library, tasks, planner, config.tfjp)

    def streams(self, number: int) -> Iterator[Composed]:
        """The streams of shard `number`; the last shard ends where the hours are full."""
        config = self.config
        wanted = min(config.shard_s, config.hours * 3600 - number * config.shard_s)
        total, index = 0.0, number * STRIDE
        while total < wanted - 1e-6:
            made = stream(config.seed, index, self.mix, config.seconds)
            yield made
            total, index = total + made.record["duration_s"], index + 1

    def make(self, number: int, out: Path) -> Built:
        """Write one shard."""
        built, before = Built(made=1), Counter(self.mix.rejected)

        def counted() -> Iterator[Composed]:
            for made in self.streams(number):
                built.streams += 1
                built.seconds += made.record["duration_s"]
                yield made

        try:
            write_shard(out / self.config.shard_name(number), counted())
        except OSError as error:
            raise DataError(
                f"{out}: shard {number} could not be written: {error}; finished shards are kept, run the "
                "same command again to go on"
            ) from error
        built.unreadable = dict(self.mix.library.unreadable)
        built.rejected = self.mix.rejected - before
        return built


# Files of this package whose contents decide what a stream is.
DECIDING = """
sounds.yaml phrases.yaml abilities.yaml scenarios/*.yaml
synth.py ambience.py alerts.py scenes.py clips.py tfjp.py voices.py sounds.py
grammar.py scripts.py abilities.py planner.py llm.py grounding.py
render.py questions.py compose.py suitability.py streams.py shards.py workshop.py
"""


def fingerprint(config: BuildConfig) -> str:
    """A hash of all that decides the bytes: settings, manifest, scenarios, this code and what it calls; not
    where files lie.
    """
    settings = asdict(config) | {"manifest": "", "scenarios": "", "llm_url": "", "llm_kept": ""}
    settings["versions"] = [
        voices.version(),
        np.__version__,
        soxr.__version__,
        soundfile.__libsndfile_version__,
    ]
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    own = (file for name in DECIDING.split() for file in Path(__file__).parent.glob(name))
    for path in (Path(config.manifest), *map(Path, config.scenarios), *sorted(own)):
        try:
            digest.update(path.read_bytes())
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error}") from error
    return digest.hexdigest()
