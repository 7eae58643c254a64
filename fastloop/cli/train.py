"""`fastloop train`: shards of streams -> a model that the engine loads."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..config import ConfigError
from ..errors import FastloopError
from .terminal import complain, cpu_threads

MISSING = "pip install 'fastloop[train]' installs what training needs"


def train_command(
    stage: Annotated[str, typer.Argument(help="A stage that comes with the package, or a YAML file.")],
    data: Annotated[list[Path], typer.Option(help="Shards, or directories of them; may be repeated.")],
    out: Annotated[Path, typer.Option(help="Directory of the run: state, model, log, plot.")],
    source: Annotated[
        str | None, typer.Option("--from", help="Checkpoint to start from: a packaged model or a directory.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last saved state in --out.")
    ] = False,
    steps: Annotated[int | None, typer.Option(help="Instead of the stage's own number of steps.")] = None,
    threads: Annotated[int, typer.Option(help="CPU threads; 0: as many as there are cores.")] = 0,
    workers: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Processes that make features and batches ahead; default: on a GPU one a core, else none.",
        ),
    ] = None,
) -> None:
    """Train a model, or go on with one.

    \b
    Stages: format, adapter, streaming, instruct (in this order, for a large model);
    nano, nano_gpu (all in one); ablation (few steps, for fastloop.soundflow.ablation).
    Examples:
      fastloop train nano --data corpus --out runs/nano
      fastloop train nano --data corpus --out runs/nano --resume
      fastloop train streaming --data corpus --out runs/streaming --from runs/adapter/model
      torchrun --nproc-per-node 8 -m fastloop train streaming --data corpus --out runs/s --from big
    """
    try:
        finished = _train(stage, data, out, source, resume, steps, threads, workers)
    except ModuleNotFoundError as error:
        complain("train", f"{error}; {MISSING}")
        raise typer.Exit(1) from error
    except (ConfigError, FastloopError) as error:
        complain("train", str(error))
        raise typer.Exit(2) from error
    except OSError as error:  # a full disk, a folder that is a file
        complain("train", f"{error}; a state that is saved in {out} is kept, and --resume goes on from it")
        raise typer.Exit(1) from error
    raise typer.Exit(0 if finished else 130)


def _train(
    name: str,
    data: list[Path],
    out: Path,
    source: str | None,
    resume: bool,
    steps: int | None,
    threads: int,
    workers: int | None,
) -> bool:
    import contextlib
    import dataclasses

    import torch

    from ..soundflow.shards import find_shards
    from ..soundflow.stage import read_stage
    from ..soundflow.train import MODEL, Trainer

    torch.set_num_threads(cpu_threads(threads))
    stage = read_stage(name)
    if steps is not None:
        stage = dataclasses.replace(stage, steps=steps)
    skipped: list[str] = []
    shards = find_shards(data)
    trainer = Trainer(
        stage, shards, out, source=source, resume=resume, workers=workers, skipped=skipped.append
    )
    with contextlib.closing(trainer):
        main = trainer.fabric.is_global_zero
        if main and skipped:
            complain("train", f"{len(skipped)} streams could not be used:")
            for line in skipped:
                typer.echo(f"  {line}", err=True)
        finished = trainer.run()
    if main:
        state = "complete" if finished else "stopped; --resume goes on"
        typer.echo(f"step {trainer.step} of {stage.steps}, {state}: {out / MODEL}")
    return finished
