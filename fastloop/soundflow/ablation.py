"""What each part of SoundFlow is worth, at nano scale: one table, one command.

    python -m fastloop.soundflow.ablation --clips manifest.jsonl --out runs/ablation --jobs 2

Builds three corpora (as shipped, without TFJP, without event selection) and a validation corpus, trains the
stage once as it is and once with each thing changed, from the same seed for the same number of steps of the
same seconds of sound, and scores all on the same validation streams, each above the p(respond) of
`THRESHOLDS` where its F1 is best: after few steps a model is too bold or too shy, which of both by chance.
Trainings that are complete in --out are not done again. `ablation.md` and `ablation.json` hold the table.

The rows are those of the paper (arXiv 2606.05121): TFJP, hierarchical event selection, lambda, chunk length.
"""

from __future__ import annotations

import argparse
import dataclasses
import multiprocessing
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..config import ConfigError
from .builder import build
from .evaluate import Scores
from .scorecard import write_json
from .stage import Stage, read_stage
from .sweep import changed, scored, table, trained
from .truth import read_truth
from .workshop import BuildConfig

CORPORA: dict[str, dict[str, Any]] = {
    "shipped": {},
    "without_tfjp": {"tfjp": False},
    "without_selection": {"planner": "random"},
}
TRAIN_SEED, VAL_SEED = 20, 1
LAMBDAS = (0.5, 1.0, 2.0)
THRESHOLDS = (0.2, 0.35, 0.5, 0.65, 0.8)


@dataclass(frozen=True)
class Row:
    """One line of the table: fields of the stage that are changed, and the corpus."""

    changes: Mapping[str, Any] = field(default_factory=dict)
    corpus: str = "shipped"


def rows(stage: Stage) -> dict[str, Row]:
    """All lines. With another chunk, a batch holds as many seconds; lambda is control_weight, and the
    one that is shipped has no line of its own.
    """
    if stage.model is None:
        raise ConfigError(f"stage {stage.name!r} makes no model: an ablation starts from random weights")
    frames = stage.model.chunk_frames

    def chunk(to: int) -> Row:
        seconds = {
            f"{name}.chunks": plan.chunks * frames // to
            for name, plan in (("batch", stage.batch), ("late", stage.late))
            if plan is not None
        }
        return Row({"model.chunk_frames": to, **seconds})

    shipped = stage.loss.control_weight
    return {
        "as shipped": Row(),
        "without TFJP": Row(corpus="without_tfjp"),
        "without event selection": Row(corpus="without_selection"),
        **{f"lambda {w:g}": Row({"loss.control_weight": w}) for w in LAMBDAS if w != shipped},
        "chunks of 0.2 s": chunk(frames // 2),
        "chunks of 0.8 s": chunk(frames * 2),
    }


class Result(NamedTuple):
    """What a model scores, and the threshold that it does so with."""

    threshold: float
    scores: Scores


@dataclass(frozen=True)
class Training:
    """One row's work: a stage, the folder of its corpus, that of its run and that of the streams to score."""

    stage: Stage
    corpus: Path
    run: Path
    held_out: Path
    threads: int

    def __call__(self) -> Result:
        torch.set_num_threads(self.threads)
        model = trained(self.stage, [self.corpus], self.run, None)
        val = read_truth([self.held_out], "val", print)
        tried = [Result(threshold, scored(model, val, threshold)) for threshold in THRESHOLDS]
        return max(tried, key=lambda result: result.scores.figures["f1"].value or 0.0)


def _results(trainings: Mapping[str, Training], jobs: int) -> Iterable[tuple[str, Result]]:
    """Name and result of every row as it is done, `jobs` of them side by side in processes of their own."""
    if jobs <= 1:
        yield from ((name, training()) for name, training in trainings.items())
        return
    spawn = multiprocessing.get_context("spawn")  # a fork of a process with torch's threads can hang
    with ProcessPoolExecutor(jobs, spawn) as pool:
        running = {pool.submit(training): name for name, training in trainings.items()}
        try:
            for done in as_completed(running):
                yield running[done], done.result()
        finally:
            pool.shutdown(cancel_futures=True)  # where one failed, those that wait are not begun


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m fastloop.soundflow.ablation", description=__doc__)
    parser.add_argument("--clips", type=Path, required=True, help="manifest of clips")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--stage", default="ablation", help="a stage of the package, or a YAML file")
    parser.add_argument("--steps", type=int, help="of each training, instead of the stage's own number")
    parser.add_argument("--hours", type=float, default=3.0, help="of each training corpus")
    parser.add_argument("--val-hours", type=float, default=1.0)
    parser.add_argument("--tasks", default="", help="sub-tasks, as of `fastloop data build`")
    parser.add_argument("--jobs", type=int, default=1, help="trainings side by side")
    parser.add_argument("--threads", type=int, default=1, help="of each training")
    parser.add_argument("--workers", type=int, default=1, help="processes that build corpora")
    given = parser.parse_args(arguments)
    tasks = tuple(name for name in given.tasks.split(",") if name)
    common = BuildConfig(str(given.clips), seed=TRAIN_SEED, hours=given.hours, tasks=tasks)
    for name, settings in CORPORA.items():
        build(dataclasses.replace(common, **settings), given.out / name, given.workers)
    held_out = dataclasses.replace(common, split="val", seed=VAL_SEED, hours=given.val_hours)
    build(held_out, given.out / "shipped", given.workers)
    stage = read_stage(given.stage)
    steps = stage.steps if given.steps is None else given.steps
    trainings = {
        name: Training(
            changed(stage, row.changes, steps),
            given.out / row.corpus,
            given.out / "runs" / name.replace(" ", "_"),
            given.out / "shipped",
            given.threads,
        )
        for name, row in rows(stage).items()
    }
    done: dict[str, Result] = {}
    for name, result in _results(trainings, given.jobs):
        done[name] = result
        found = {row: done[row]._asdict() for row in trainings if row in done}
        write_json(given.out / "ablation.json", {"steps": steps, "hours": given.hours, "rows": found})
        told = {f"{row}, above {done[row].threshold:g}": done[row].scores for row in found}
        (given.out / "ablation.md").write_text(table("model", told), encoding="utf-8")
    print((given.out / "ablation.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
