"""A training run: stage + shards -> a directory with the model, its state, a log and a plot.

    OUT/stage.json  model.json  tokenizer.json  classes.json  data.json    what is trained, fixed at the start
    OUT/features/                                 log-mel of the shards, computed once
    OUT/state.ckpt                                weights, optimiser, step: what `resume` goes on from
    OUT/model/                                    the weights as a checkpoint that the runtime loads
    OUT/log.csv  loss.png                         every step

One process on a CPU, where the batches of a step are computed side by side, or on a GPU; under torchrun,
FSDP2 over all processes. A step is a function of (seed, step number), so a run that was interrupted and
resumed computes what an uninterrupted one would have: to the bit on a CPU in float32.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pickle
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from lightning.fabric import Fabric
from lightning.fabric.strategies.model_parallel import ModelParallelStrategy
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from ..checkpoint import TOKENIZER, load, save
from ..config import ConfigError, ModelConfig
from ..errors import FastloopError
from ..text import Tokenizer
from .ahead import Packed, made
from .batches import Batches, Drawn, sound_classes, spoken
from .features import FeatureSet, feature_set
from .objective import LOSSES, Batch, Objective
from .report import LossLog, Ticker, plot_losses
from .shards import Report, ShardError
from .side_by_side import SideBySide
from .stage import PRECISIONS, Stage, stage_from
from .trainable import Trainable, initial_weights

STATE, LOG, PLOT = "state.ckpt", "log.csv", "loss.png"
MODEL, STAGE, CONFIG, CLASSES, DATA = "model", "stage.json", "model.json", "classes.json", "data.json"
LENGTHS = 64  # tokens: cuDNN plans attention anew for every length of rows (bench/GPU.md)
BATCHES_AHEAD = 3  # that each process which draws them has ready
ROOT = "model.root."  # prefix of the model's own weights in a state


Start = tuple[ModelConfig, Tokenizer, Mapping[str, Tensor]]


class TrainError(FastloopError):
    """A run cannot start, go on or resume; the message says why."""


def make_fabric() -> Fabric:
    """One device; under torchrun one process of many, with FSDP2."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        return Fabric(accelerator="auto", devices=1)
    local = int(os.environ.get("LOCAL_WORLD_SIZE", str(world)))
    strategy = ModelParallelStrategy(
        shard, data_parallel_size=world, tensor_parallel_size=1, save_distributed_checkpoint=False
    )
    return Fabric(accelerator="auto", devices=local, num_nodes=world // local, strategy=strategy)


def shard(objective: Objective, mesh: DeviceMesh) -> Objective:
    """FSDP2: every layer on its own, then what is left as one."""
    for layer in objective.model.layers():
        fully_shard(layer, mesh=mesh["data_parallel"])
    fully_shard(objective, mesh=mesh["data_parallel"])
    return objective


class Trainer:
    """One run in one directory. `run` trains to the end of the stage, or to the first stop signal."""

    def __init__(
        self,
        stage: Stage,
        shards: list[Path],
        out: Path,
        *,
        source: str | None = None,
        resume: bool = False,
        workers: int | None = None,
        skipped: Report = print,
    ) -> None:
        """workers: processes that make features and draw batches ahead; None: on a GPU one for each core but
        one, on a CPU none.
        """
        self.stage, self.out = stage, out
        self.fabric = make_fabric()
        self.fabric.launch()
        self.step, self.stopped = 0, False
        self.workers = _spare_cores(self.fabric.device) if workers is None else workers
        self.coming: Iterator[Batch] | None = None
        self._check_directory(resume)
        given = self._given(source, resume)
        features = self._features(shards, given, skipped)
        self.config, self.tokenizer, weights = given or self._new(features)
        streams = fingerprint(features)
        if resume:
            self._check_data(streams)
        elif self.fabric.is_global_zero:
            self._describe(streams)
        classes = self._classes(features, resume)
        self.frames = self._frames_here(features)
        self.batches, self.late = (
            Batches(
                self.config,
                self.tokenizer,
                features,
                classes,
                seed=stage.seed,
                plan=plan,
                augment=stage.augment,
                prompts=stage.prompts,
                together=stage.accumulate * self.fabric.world_size,
                multiple=LENGTHS if self.fabric.device.type == "cuda" else 1,
            )
            for plan in (stage.batch, stage.late or stage.batch)
        )
        objective = Objective(
            Trainable(self.config, weights, len(classes), PRECISIONS[stage.precision]), stage.loss
        )
        self._freeze(objective)
        self.objective, self.optimizer = self._setup(objective)
        alone = self.fabric.world_size == 1 and self.fabric.device.type == "cpu"
        at_once = min(stage.accumulate, torch.get_num_threads()) if alone else 1
        self.beside = SideBySide(self.objective, at_once) if at_once > 1 else None
        if resume:
            self._restore()

    def _check_directory(self, resume: bool) -> None:
        exists = (self.out / STATE).exists()
        if exists and not resume:
            raise TrainError(f"{self.out / STATE} exists: give --resume to go on, or another --out")
        if resume and not exists:
            raise TrainError(f"{self.out / STATE}: nothing to resume from")
        self.out.mkdir(parents=True, exist_ok=True)

    def _kept(self, name: str, parse: Callable[[str], Any]) -> Any:
        """What a file of the run so far holds."""
        try:
            return parse((self.out / name).read_text(encoding="utf-8"))
        except (OSError, ValueError, TypeError, FastloopError) as error:
            raise self._damaged(name, error) from error

    def _damaged(self, name: str, error: Exception) -> TrainError:
        return TrainError(
            f"{self.out / name}: missing or damaged: {error}; start anew in another --out, with --from "
            f"{self.out / MODEL} if that is whole"
        )

    def _check_data(self, streams: str) -> None:
        if self._kept(DATA, json.loads) != streams:
            raise TrainError(
                f"{self.out}: --data holds other streams than in the run so far; give the same shards in the "
                f"same order, or start anew in another --out with --from {self.out / MODEL}"
            )

    def _given(self, source: str | None, resume: bool) -> Start | None:
        """What the run goes on from: itself, or the checkpoint `source`; None: a new model."""
        if resume:
            config = self._kept(CONFIG, lambda text: ModelConfig.from_json(text, CONFIG))
            tokenizer = self._kept(TOKENIZER, Tokenizer.from_json)
            return config, tokenizer, initial_weights(config, self.stage.seed)  # _restore fills them
        if source is None:
            return None
        model = load(source, dtype="float32")
        return model.config, model.tokenizer, model.weights

    def _features(self, shards: list[Path], given: Start | None, skipped: Report) -> FeatureSet:
        """Rank 0 computes them if they are not there; then everybody maps them."""
        if given is not None:
            frames = given[0].chunk_frames
        elif self.stage.model is not None:
            frames = self.stage.model.chunk_frames
        else:
            raise TrainError(f"stage {self.stage.name!r} makes no model: give one to start from with --from")
        with self.fabric.rank_zero_first():
            found = feature_set(shards, "train", frames, self.out / "features", skipped, self.workers)
        if not self.stage.abilities:
            return found
        kept = found.only(self.stage.abilities)
        if not kept.streams:
            raise ShardError(f"no stream has one of the abilities {', '.join(self.stage.abilities)}")
        return kept

    def _frames_here(self, features: FeatureSet) -> Tensor:
        """The kept frames: on a GPU whose memory they take no more than half of, else where they are."""
        device, kept = self.fabric.device, features.kept
        if device.type == "cuda" and kept.nbytes < torch.cuda.mem_get_info(device)[0] / 2:
            return kept.to(device)
        return kept

    def _new(self, features: FeatureSet) -> Start:
        """Random weights, and a tokenizer made for what the data says."""
        assert self.stage.model is not None
        config, tokenizer = self.stage.model.build([*spoken(features.streams), *self.stage.prompts])
        return config, tokenizer, initial_weights(config, self.stage.seed)

    def _describe(self, streams: str) -> None:
        """What is trained, for whoever resumes or exports."""
        (self.out / DATA).write_text(json.dumps(streams), encoding="utf-8")
        (self.out / CONFIG).write_text(self.config.to_json(), encoding="utf-8")
        (self.out / TOKENIZER).write_text(self.tokenizer.to_json(), encoding="utf-8")
        self._describe_stage()

    def _describe_stage(self) -> None:
        (self.out / STAGE).write_text(json.dumps(dataclasses.asdict(self.stage), indent=2), encoding="utf-8")

    def _classes(self, features: FeatureSet, resume: bool) -> dict[str, int]:
        """The classes of the probes, fixed at the start of a run."""
        path = self.out / CLASSES
        if resume:
            return self._kept(CLASSES, json.loads)
        classes = sound_classes(features.streams)
        if self.fabric.is_global_zero:
            path.write_text(json.dumps(classes, indent=1), encoding="utf-8")
        return classes

    def _freeze(self, objective: Objective) -> None:
        unknown = set(self.stage.trains)
        for name, parameter in objective.model.root.named_parameters():
            hits = {prefix for prefix in self.stage.trains if name.startswith(prefix)}
            parameter.requires_grad_(bool(hits))
            unknown -= hits
        if unknown:
            raise ConfigError(f"Stage.trains: no weight begins with {', '.join(sorted(unknown))}")

    def _setup(self, objective: Objective) -> tuple[Any, Any]:
        """AdamW (arXiv 1711.05101); matrices decay, gains and biases do not."""
        module = self.fabric.setup_module(objective)
        moving = [p for p in module.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in moving if p.dim() > 1], "weight_decay": self.stage.weight_decay},
            {"params": [p for p in moving if p.dim() <= 1], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=self.stage.rate(0), betas=(0.9, 0.98), fused=True)
        return module, self.fabric.setup_optimizers(optimizer)

    def _restore(self) -> None:
        before = self._kept(STAGE, lambda text: stage_from(json.loads(text), STAGE))
        state = {"model": self.objective, "optimizer": self.optimizer, "step": 0}
        try:
            self.fabric.load(self.out / STATE, state)
        except (OSError, RuntimeError, KeyError, ValueError, EOFError, pickle.UnpicklingError) as error:
            raise self._damaged(STATE, error) from error
        self.step = int(state["step"])
        if not self.stage.same_path(before, self.step):
            raise TrainError(
                f"{self.out}: the run so far followed another stage file ({self.out / STAGE}) than "
                f"{self.stage.name!r}; resume with that one, or start anew with --from {self.out / MODEL}"
            )
        if self.fabric.is_global_zero:
            self._describe_stage()

    def run(self) -> bool:
        """Train; True when the stage is complete, False when a signal (Ctrl-C, TERM) ended it early. The
        state is saved every `save_minutes`, at the end and at such a signal.
        """
        first, began, saved = self.step, time.monotonic(), time.monotonic()
        main = self.fabric.is_global_zero
        log = LossLog(self.out / LOG, self.step) if main else None
        ticker = Ticker(first, self.stage.steps) if main else None
        restore = {number: signal.signal(number, self._stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            while self.step < self.stage.steps and not self.stopped:
                losses = self.advance()
                now = time.monotonic()
                if log is not None and ticker is not None:
                    log.write(self.step, self.stage.rate(self.step - 1), now - began, losses)
                    ticker.show(self.step, now - began, losses)
                if now - saved > 60 * self.stage.save_minutes:
                    self.save()
                    saved = now
            self.save()
        finally:
            for number, handler in restore.items():
                signal.signal(number, handler)
            if log is not None and ticker is not None:
                log.close()
                ticker.close()
            self.coming = None  # ends its processes
        if main:
            plot_losses(self.out / LOG, self.out / PLOT)
        return not self.stopped

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self.stopped = True

    def advance(self) -> list[float]:
        """One optimiser step -> its losses, the means over the batches of this process."""
        stage = self.stage
        for group in self.optimizer.param_groups:
            group["lr"] = stage.rate(self.step)
        if self.coming is None:
            self.coming = self._coming()
        if self.beside is None:
            found = self._one_by_one(self.coming)
        else:
            found = self.beside.gradients(self.coming, stage.accumulate)
        if not torch.isfinite(found[0]):
            raise TrainError(
                f"step {self.step}: the loss is {found[0]}; go on from the last state with a lower peak_rate"
            )
        self.fabric.clip_gradients(self.objective, self.optimizer, max_norm=stage.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        return found.tolist()

    def _one_by_one(self, batches: Iterator[Batch]) -> Tensor:
        """The gradients of a step's batches -> the means of their losses [8]."""
        found, count = torch.zeros(len(LOSSES)), self.stage.accumulate
        for part in range(count):
            batch = next(batches)
            with self.fabric.no_backward_sync(self.objective, enabled=part + 1 < count):
                losses = self.objective(batch)
                self.fabric.backward(losses[0] / count)
            found += losses.detach().float().cpu() / count
        return found

    def _coming(self) -> Iterator[Batch]:
        """The batches of this process from the present step on, on its device."""
        stage, world, rank = self.stage, self.fabric.world_size, self.fabric.global_rank
        device = self.fabric.device
        of_a_step = stage.accumulate * world

        def draw(number: int) -> Packed | Batch:
            """Frames are made on the device, if what they are made of is there, else by whoever draws."""
            drawn = (self.late if stage.is_late(number // of_a_step) else self.batches).draw(number)
            return drawn.packed() if self.frames.device == device else drawn.made_of(self.frames)

        numbers = range(self.step * of_a_step + rank, stage.steps * of_a_step, world)
        for found in made(draw, numbers, self.workers, ahead=BATCHES_AHEAD, pin=True):
            here = found.to(device)
            if isinstance(here, Packed):
                here = Drawn.unpacked(here, self.config.chunk_frames).made_of(self.frames)
            yield here

    def close(self) -> None:
        """End the threads, and leave the process group, if there is one: at the interpreter's end its threads
        would abort.
        """
        if self.beside is not None:
            self.beside.close()
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()

    def save(self) -> None:
        """The state, then the model made from it; each is there whole or not at all."""
        part = self.out / f"{STATE}.part"
        self.fabric.save(part, {"model": self.objective, "optimizer": self.optimizer, "step": self.step})
        if self.fabric.is_global_zero:
            os.replace(part, self.out / STATE)
            export(self.out, self.out / MODEL)
        self.fabric.barrier()


def _spare_cores(device: torch.device) -> int:
    """Cores that a step leaves to each process of this machine."""
    if device.type == "cpu":
        return 0
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, (os.cpu_count() or 1) // here - 1)


def fingerprint(features: FeatureSet) -> str:
    """Of the records of all streams, in order: two runs that draw the same batches have the same one."""
    told = hashlib.sha256()
    for stream in features.streams:
        told.update(json.dumps(dataclasses.asdict(stream)).encode())
    return told.hexdigest()


def export(run: Path, to: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    """The weights of a run's last state as a checkpoint directory; an older one there is replaced."""
    state = torch.load(run / STATE, map_location="cpu", mmap=True, weights_only=True)["model"]
    weights = {
        name.removeprefix(ROOT): value.to(dtype) for name, value in state.items() if name.startswith(ROOT)
    }
    config = ModelConfig.from_json((run / CONFIG).read_text(encoding="utf-8"), CONFIG)
    fresh = to.with_name(f"{to.name}.new")
    shutil.rmtree(fresh, ignore_errors=True)
    save(fresh, config, weights, (run / TOKENIZER).read_text(encoding="utf-8"))
    shutil.rmtree(to, ignore_errors=True)
    return fresh.rename(to)
