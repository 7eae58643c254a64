"""Build a corpus: shards of streams, in parallel, resumable shard by shard, the same bytes every time.

Workers are processes of this machine, or actors of Ray Data (ray_builder.py).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import multiprocessing
import os
import threading
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import asdict
from pathlib import Path

from .clips import DataError, read_manifest
from .grammar import read_scenarios
from .lock import alone
from .shards import SPLITS
from .sounds import Library, known_sounds
from .workshop import BuildConfig, Built, Workshop, fingerprint


@functools.lru_cache(maxsize=1)
def _workshop(config: BuildConfig) -> Workshop:
    """The workshop of this process."""
    return Workshop(config)


def make_shard(config: BuildConfig, number: int, out: Path) -> Built:
    """Write shard `number` of a build; for worker processes."""
    return _workshop(config).make(number, out)


def _check(config: BuildConfig, workers: int) -> None:
    """DataError for settings that are wrong, before any process starts or anything is written."""
    library = Workshop(config).mix.library
    if config.split not in SPLITS:
        raise DataError(f"a corpus is of split {' or '.join(SPLITS)}, not {config.split!r}")
    if workers < 0:
        raise DataError(f"workers must be 0 or more, got {workers}")
    if strange := sorted(set(config.exclude) - set(known_sounds()) - set(library.filed)):
        raise DataError(
            f"there is no label {strange[0]!r} to leave out; known: {', '.join(library.labels())}"
        )
    if config.scenarios:
        clips = {clip.label for clip in read_manifest(Path(config.manifest))}  # of any split
        for path in config.scenarios:
            (scenario,) = read_scenarios([Path(path)])
            named = {*scenario.beds, *scenario.passing, *scenario.events}
            if strange := sorted(named - clips - set(known_sounds()) - set(library.filed)):
                raise DataError(f"{path}: {strange[0]!r} is neither a packaged sound nor a label of a clip")


def unused(config: BuildConfig) -> Counter[str]:
    """Clips of the split that no stream can hold, by label: labels that no packaged sound and no scenario
    names, and speech whose text or word times do not tell what is in it.
    """
    library = Library.open(config.manifest, config.split)
    named = {*known_sounds(), *(library.filed if config.planner == "random" else ())}
    for scenario in read_scenarios([Path(p) for p in config.scenarios]):
        named |= {*scenario.beds, *scenario.passing, *scenario.events}
    filed = {clip.id for label in named for clip in library.filed.get(label, ())}
    filed |= {name.rpartition("#")[0] for name in library.cuts}
    return Counter(clip.label for clip in library.clips.values() if clip.id not in filed)


@contextlib.contextmanager
def _claimed(config: BuildConfig, out: Path) -> Iterator[None]:
    """Have the split of this folder for one build: what a second one would find half-written is at work."""
    lock = out / f"{config.split}.build.lock"
    with contextlib.ExitStack() as stack:
        try:
            out.mkdir(parents=True, exist_ok=True)
            free = alone(stack.enter_context(lock.open("a")))
        except OSError as error:
            raise DataError(f"{out}: cannot be used: {error}") from error
        if not free:
            raise DataError(
                f"{out}: another build of its {config.split} corpus is at work; wait for it, or choose "
                "another --out"
            )
        _claim(config, out)
        yield


def _claim(config: BuildConfig, out: Path) -> None:
    """Note in `<split>.build.json` what is being built; DataError where it is something else already."""
    note = out / f"{config.split}.build.json"
    mine = {"fingerprint": fingerprint(config), **asdict(config)}
    try:
        if note.exists():
            before = json.loads(note.read_text(encoding="utf-8"))
            if before.get("fingerprint") != mine["fingerprint"]:
                settings = json.loads(json.dumps(asdict(config)))
                changed = [name for name, value in settings.items() if value != before.get(name)]
                what = ", ".join(changed) or "clips, or versions of fastloop and its libraries"
                raise DataError(
                    f"{out} holds another {config.split} corpus (different: {what}); choose another --out, "
                    "or remove it"
                )
        else:
            part = note.with_suffix(".part")  # a note that a kill cut in half would be of no build
            part.write_text(json.dumps(mine, indent=1) + "\n", encoding="utf-8")
            part.replace(note)
        for left in out.glob(f".{config.split}-*.partial"):
            left.unlink()
    except (OSError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{out}: cannot be used: {error}") from error


def build(
    config: BuildConfig,
    out: Path,
    workers: int = 0,
    ray: bool = False,
    progress: Callable[[Built, int], None] | None = None,
) -> Built:
    """Make the shards that `out` lacks, with `workers` processes (0: in this one), or with Ray Data.

    progress: called after each shard with the totals so far and the number of shards. DataError where
    anything is wrong, or another build is at work in `out`; shards that were finished stay, and the next
    call goes on after them.
    """
    _check(config, workers)
    with _claimed(config, out):
        missing = [n for n in range(config.shards) if not (out / config.shard_name(n)).exists()]
        total = Built(found=config.shards - len(missing))
        if ray:
            from .ray_builder import build_with_ray

            results = build_with_ray(config, out, missing, workers)
        elif workers > 0:
            results = _parallel(config, out, missing, workers)
        else:
            results = (make_shard(config, number, out) for number in missing)
        with contextlib.closing(results):
            for each in results:
                total.add(each)
                if progress is not None:
                    progress(dataclasses.replace(total), config.shards)
    return total


def _end_with_parent() -> None:
    """Of a worker: end when the process that started it is gone. It would wait for work for ever, since it
    holds both ends of the queue itself.
    """

    def watch() -> None:
        process = multiprocessing.parent_process()
        assert process is not None
        process.join()  # also where it was killed
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _parallel(
    config: BuildConfig, out: Path, missing: Sequence[int], workers: int
) -> Generator[Built, None, None]:
    """Shards as they get ready; a failure stops the rest."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(workers, len(missing) or 1), context, _end_with_parent) as pool:
        waiting = {pool.submit(make_shard, config, number, out) for number in missing}
        try:
            while waiting:
                ready, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                for future in ready:
                    yield future.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
