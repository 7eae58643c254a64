"""A training stage: what a YAML file says about one run, checked; and a new model's dims, where it makes one.

name, steps                      how it is called, optimiser steps in all
extends                          another stage, whose fields hold where this one says nothing
model                            dims of a new model; without it a run starts from --from
trains, abilities                weights that move (prefixes of names); abilities of the streams it reads
peak_rate, warmup, decay, ...    AdamW and its schedule
loss, batch, augment, prompts    objective.Weighting, batches.BatchPlan, augment.Augment, other prompts
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml

from ..config import ConfigError, DecoderConfig, EncoderConfig, ModelConfig, from_mapping
from ..text import Tokenizer
from .augment import Augment
from .batches import BatchPlan
from .objective import Weighting
from .vocabulary import build_tokenizer, token_ids

STAGES = Path(__file__).parent / "stages"
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class NewModel:
    """A model that starts from random weights. `decoder` takes all fields of DecoderConfig but the
    vocabulary, which is built from the replies of the data: at most `vocab` ids before the control tokens.
    """

    name: str
    encoder: dict[str, Any]
    decoder: dict[str, Any]
    system_prompt: str
    vocab: int = 480
    chunk_frames: int = 40

    def build(self, texts: list[str]) -> tuple[ModelConfig, Tokenizer]:
        """The config and the tokenizer; `texts`: what the model is going to say."""
        tokenizer = build_tokenizer(texts, self.vocab)
        padded = -(-tokenizer.vocab_size // 64) * 64
        vocabulary = {"vocab": tokenizer.vocab_size, "vocab_padded": padded}
        config = ModelConfig(
            name=self.name,
            encoder=from_mapping(EncoderConfig, self.encoder, "model.encoder"),
            decoder=from_mapping(DecoderConfig, self.decoder | vocabulary, "model.decoder"),
            tokens=token_ids(tokenizer),
            system_prompt=self.system_prompt,
            chunk_frames=self.chunk_frames,
        )
        return config, tokenizer


@dataclass(frozen=True)
class Stage:
    """One run. The learning rate rises over `warmup` steps, stays, and falls to 0 over the last `decay`
    steps (arXiv 2405.18392): what happens before the fall does not depend on `steps`, so that a longer run
    can go on from where a shorter one was.
    """

    name: str
    steps: int
    warmup: int = 100
    decay: int = 0
    peak_rate: float = 1e-3
    weight_decay: float = 0.05
    clip_norm: float = 1.0
    accumulate: int = 1  # batches in an optimiser step, on each process
    precision: str = "bfloat16"  # computed in; the weights and the optimiser are float32
    seed: int = 0
    save_minutes: float = 5.0
    trains: tuple[str, ...] = ("encoder.", "decoder.")
    abilities: tuple[str, ...] = ()  # none named: all
    prompts: tuple[str, ...] = ()
    loss: Weighting = field(default_factory=Weighting, metadata={"cls": Weighting})
    batch: BatchPlan = field(default_factory=BatchPlan, metadata={"cls": BatchPlan})
    late: BatchPlan | None = field(default=None, metadata={"cls": BatchPlan})  # while the rate falls
    augment: Augment = field(default_factory=Augment, metadata={"cls": Augment})
    model: NewModel | None = field(default=None, metadata={"cls": NewModel})

    def __post_init__(self) -> None:
        for name in ("trains", "abilities", "prompts"):
            value = getattr(self, name)
            if not isinstance(value, (list, tuple)) or not all(isinstance(item, str) for item in value):
                raise ConfigError(f"Stage.{name}: must be a list of strings, got {value!r}")
            object.__setattr__(self, name, tuple(value))
        for name, least in (("steps", 1), ("accumulate", 1), ("warmup", 0), ("decay", 0), ("seed", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise ConfigError(f"Stage.{name}: must be a whole number from {least} on, got {value!r}")
        for name in ("peak_rate", "weight_decay", "clip_norm", "save_minutes"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or isinstance(value, bool) or value < 0:
                hint = " (YAML reads 1e-3 as text; write 1.0e-3)" if isinstance(value, str) else ""
                raise ConfigError(f"Stage.{name}: must be a number from 0 on, got {value!r}{hint}")
        if self.precision not in PRECISIONS:
            raise ConfigError(f"Stage.precision: choose from {list(PRECISIONS)}, got {self.precision!r}")

    def rate(self, step: int) -> float:
        """The learning rate of step 0, 1, ..."""
        rise = min(1.0, (step + 1) / max(1, self.warmup))
        fall = min(1.0, (self.steps - step) / max(1, self.decay))
        return self.peak_rate * min(rise, fall)

    def same_path(self, other: Stage, step: int) -> bool:
        """Whether both stages compute the same up to `step`, so that one can go on where the other was."""
        if step > 0 and other.rate(step - 1) != self.rate(step - 1):
            return False
        alike = dataclasses.replace(other, steps=self.steps, decay=self.decay, save_minutes=self.save_minutes)
        if alike == self == other:
            return True
        late_from, other_late_from = (min(step, s.steps - s.decay) for s in (self, other))
        if late_from == other_late_from == step:  # neither has drawn by `late`
            return dataclasses.replace(alike, late=self.late) == self
        return alike == self and (self.late is None or late_from == other_late_from)

    def is_late(self, step: int) -> bool:
        """Whether step 0, 1, ... draws its batches by `late`, if there is one."""
        return step >= self.steps - self.decay


def stage_names() -> list[str]:
    """The stages that come with the package."""
    return sorted(path.stem for path in STAGES.glob("*.yaml"))


def read_stage(name_or_path: str) -> Stage:
    """A stage of the package by name, or any YAML file; ConfigError names the field that is wrong."""
    values, where = _fields(name_or_path, Path(), ())
    return stage_from(values, where)


def _fields(name_or_path: str, beside: Path, read: tuple[Path, ...]) -> tuple[Any, str]:
    """What a stage file says, over what the stage says that it extends (loss, batch, ... field by field), and
    where that was read. beside: the folder that a path is relative to; read: the files that led here.
    """
    shipped = STAGES / f"{name_or_path}.yaml"
    path = shipped if name_or_path in stage_names() else beside / name_or_path
    if any(path.resolve() == other.resolve() for other in read):
        raise ConfigError(f"{path}: extends itself, by way of {', '.join(map(str, read))}")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        known = ", ".join(stage_names())
        raise ConfigError(
            f"stage {name_or_path!r}: cannot be read: {error}; known stages: {known}"
        ) from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(values, dict) or "extends" not in values:
        return values, str(path)
    base = values.pop("extends")
    if not isinstance(base, str):
        raise ConfigError(f"{path}: extends: must be the name or the file of a stage, got {base!r}")
    under, _ = _fields(base, path.parent, (*read, path))
    return _over(values, under), str(path)


def _over(values: Any, under: Any) -> Any:
    """`values` where they say something, else `under`; mappings field by field."""
    if not isinstance(values, dict) or not isinstance(under, dict):
        return values
    return under | {name: _over(value, under.get(name)) for name, value in values.items()}


def stage_from(values: Any, where: str) -> Stage:
    """Plain data -> Stage; null is the same as not there."""
    if isinstance(values, dict):
        values = {name: value for name, value in values.items() if value is not None}
    try:
        return from_mapping(Stage, values, where)
    except TypeError as error:
        raise ConfigError(f"{where}: {error}") from error
