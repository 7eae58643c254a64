"""Build a corpus: shards of streams, in parallel, resumable shard by shard, the same bytes every time.

Shard k of a build holds streams k * STRIDE, k * STRIDE + 1, ... of the collection `seed` until it is
`shard_s` long: which worker makes it, and when, does not matter.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import multiprocessing
import os
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass, field
from pathlib import Path

from .abilities import sub_task, sub_tasks
from .clips import DataError
from .compose import Composed, Mix, stream
from .corpus import write_shard
from .planner import GrammarPlanner, read_scenarios
from .sounds import Library

STRIDE = 100_000  # more streams than a shard can hold


@dataclass(frozen=True)
class BuildConfig:
    """What a corpus is a function of, together with the clips and the versions of the libraries."""

    manifest: str
    split: str
    seed: int = 0
    hours: float = 1.0
    shard_s: float = 600.0
    seconds: float | None = None
    tasks: tuple[str, ...] = ()
    scenarios: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not 0 < self.hours < 1e6:
            raise DataError(f"hours must be positive, got {self.hours}")
        if not 1 <= self.shard_s <= 86_400:
            raise DataError(f"a shard must be 1 s to a day long, got {self.shard_s} s")
        if self.seconds is not None and not 4 <= self.seconds <= 3600:
            raise DataError(f"a stream must be 4 s to an hour long, got {self.seconds} s")
        if self.seed < 0:
            raise DataError(f"the seed must not be negative, got {self.seed}")

    @property
    def shards(self) -> int:
        return max(1, math.ceil(self.hours * 3600 / self.shard_s - 1e-9))

    def shard_name(self, number: int) -> str:
        return f"{self.split}-{number:05d}.tar"


@dataclass
class Built:
    """What a build did: shards made and found, streams and seconds made, clips that could not be read."""

    made: int = 0
    found: int = 0
    streams: int = 0
    seconds: float = 0.0
    unreadable: dict[str, str] = field(default_factory=dict)


class Workshop:
    """A library and a mix, opened once in a process; makes shards."""

    def __init__(self, config: BuildConfig) -> None:
        self.config = config
        self.library = Library.open(config.manifest, config.split)
        scenarios = read_scenarios([Path(p) for p in config.scenarios])
        tasks = tuple(sub_task(name) for name in config.tasks)
        self.mix = Mix(
            tasks or tuple(task for task in sub_tasks().values() if task.weight > 0),
            GrammarPlanner(scenarios, self.library, frozenset(config.exclude)),
        )

    def streams(self, number: int) -> Iterator[Composed]:
        """The streams of shard `number`; the last shard ends where the hours are full."""
        config = self.config
        wanted = min(config.shard_s, config.hours * 3600 - number * config.shard_s)
        total, index = 0.0, number * STRIDE
        while total < wanted - 1e-6:
            made = stream(config.seed, index, self.library, self.mix, config.seconds)
            yield made
            total, index = total + made.record["duration_s"], index + 1

    def make(self, number: int, out: Path) -> Built:
        """Write one shard."""
        seconds = 0.0

        def counted() -> Iterator[Composed]:
            nonlocal seconds
            for made in self.streams(number):
                seconds += made.record["duration_s"]
                yield made

        try:
            streams = write_shard(out / self.config.shard_name(number), counted())
        except OSError as error:
            raise DataError(
                f"{out}: shard {number} could not be written: {error}; finished shards are kept, run the "
                "same command again to go on"
            ) from error
        return Built(1, 0, streams, seconds, dict(self.library.cache.unreadable))


_workshop: Workshop | None = None  # of a worker process


def _start(config: BuildConfig) -> None:
    global _workshop
    _workshop = Workshop(config)


def _make(number: int, out: Path) -> Built:
    assert _workshop is not None
    return _workshop.make(number, out)


def fingerprint(config: BuildConfig) -> str:
    """A hash of everything that decides the bytes: settings, manifest, scenarios."""
    digest = hashlib.sha256(json.dumps({**asdict(config), "manifest": ""}, sort_keys=True).encode())
    for path in (config.manifest, *config.scenarios):
        try:
            digest.update(Path(path).read_bytes())
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error}") from error
    return digest.hexdigest()


def _claim(config: BuildConfig, out: Path) -> None:
    """Note in `<split>.build.json` what is being built; DataError where it is something else already."""
    note = out / f"{config.split}.build.json"
    mine = {"fingerprint": fingerprint(config), **asdict(config)}
    try:
        out.mkdir(parents=True, exist_ok=True)
        if note.exists():
            before = json.loads(note.read_text(encoding="utf-8"))
            if before.get("fingerprint") != mine["fingerprint"]:
                changed = [k for k in mine if json.loads(json.dumps(mine[k])) != before.get(k)]
                raise DataError(
                    f"{out} holds another {config.split} corpus (different: {', '.join(changed)}); choose "
                    "another --out, or remove it"
                )
        else:
            note.write_text(json.dumps(mine, indent=1) + "\n", encoding="utf-8")
        for left in out.glob(f".{config.split}-*.partial"):
            left.unlink()
    except (OSError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{out}: cannot be used: {error}") from error


def build(
    config: BuildConfig, out: Path, workers: int = 0, progress: Callable[[Built, int], None] | None = None
) -> Built:
    """Make the shards that `out` lacks, with `workers` processes (0: in this one).

    progress: called with the totals so far and the number of shards after each one. DataError where
    anything is wrong; shards that were finished stay, and the next call goes on after them.
    """
    workshop = Workshop(config)  # here too: settings that are wrong fail before any process starts
    _claim(config, out)
    missing = [n for n in range(config.shards) if not (out / config.shard_name(n)).exists()]
    total = Built(found=config.shards - len(missing))
    here = (workshop.make(number, out) for number in missing)
    with contextlib.closing(here if workers < 1 else _parallel(config, out, missing, workers)) as results:
        for each in results:
            total.made += each.made
            total.streams += each.streams
            total.seconds += each.seconds
            total.unreadable.update(each.unreadable)
            if progress is not None:
                progress(total, config.shards)
    return total


def _parallel(
    config: BuildConfig, out: Path, missing: Sequence[int], workers: int
) -> Generator[Built, None, None]:
    """Shards as they get ready; a failure stops the rest."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(workers, len(missing) or 1), context, _start, (config,)) as pool:
        waiting = {pool.submit(_make, number, out) for number in missing}
        try:
            while waiting:
                ready, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                for future in ready:
                    yield future.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
