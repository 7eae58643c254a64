"""Training: initial weights, loss, optimiser, schedule, checkpoints that resume to the bit.

A step is a function of (seed, step number): batches are drawn from it, so a run that was interrupted and
resumed computes what an uninterrupted one computes (same machine, threads and versions; float32).
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..config import ConfigError, ModelConfig
from ..decoder import Decoder, decoder_shapes
from ..encoder import Encoder, encoder_shapes
from .sequence import IGNORED, TokenSequence

Weights = dict[str, Tensor]
PROBE = "probe.weight"  # [classes + 1, D], trained along and left out of the checkpoint


@dataclass(frozen=True)
class TrainConfig:
    """steps is the length of the cosine; rates are AdamW's; the loss is decision + text_weight x text +
    probe_weight x probe.
    """

    steps: int
    peak_rate: float = 2e-3
    warmup: int = 50
    weight_decay: float = 0.05
    clip_norm: float = 1.0
    text_weight: float = 0.3
    probe_weight: float = 1.0

    def rate(self, step: int) -> float:
        """Linear warm-up, then half a cosine down to 2 % of the peak."""
        if step < self.warmup:
            return self.peak_rate * (step + 1) / self.warmup
        progress = min(1.0, (step - self.warmup) / max(1, self.steps - self.warmup))
        return self.peak_rate * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))


@dataclass(frozen=True)
class Batch:
    """frames float32 [B, chunks, F, C]; ids, labels int64 [B, T]; audio bool [B, T], chunks x A true a row;
    active int64 [B, chunks, A]: the class of sound under each audio token, 0 where there is none.
    """

    frames: Tensor
    ids: Tensor
    labels: Tensor
    audio: Tensor
    active: Tensor


@dataclass(frozen=True)
class Losses:
    """total is differentiable; the rest is for reading: mean losses, and right / all decisions by kind."""

    total: Tensor
    decision: float
    text: float
    probe: float
    silent_right: float
    respond_right: float


def initial_weights(config: ModelConfig, seed: int, classes: int) -> Weights:
    """Unit-gain linear layers, residual branches scaled down by depth, zero biases; float32."""
    generator = torch.Generator().manual_seed(seed)
    weights: Weights = {}
    for name, shape in (encoder_shapes(config) | decoder_shapes(config)).items():
        if name.endswith("bias"):
            value = torch.zeros(shape)
        elif len(shape) == 1:
            value = torch.ones(shape)
        else:
            value = torch.randn(shape, generator=generator)
            if name == "decoder.embed.weight":
                value *= 0.5
            else:
                value *= math.prod(shape[1:]) ** -0.5
            if name.endswith(("out.weight", "down.weight", "fc2.weight")):
                layers = config.encoder.layers if name.startswith("encoder.") else config.decoder.layers
                value *= (2 * layers) ** -0.5
        weights[name] = value
    weights[PROBE] = torch.zeros(classes + 1, config.decoder.width)
    return weights


def collate(frames: Tensor, active: Tensor, sequences: Sequence[TokenSequence], fill: int) -> Batch:
    """frames [B, chunks, F, C], active [B, chunks, A] and one sequence a row -> Batch; short rows are filled
    up, unlabelled.
    """
    longest = max(len(s.ids) for s in sequences)

    def stack(rows: Sequence[Tensor], value: int | bool) -> Tensor:
        return torch.stack([F.pad(row, (0, longest - len(row)), value=value) for row in rows])

    return Batch(
        frames,
        stack([s.ids for s in sequences], fill),
        stack([s.labels for s in sequences], IGNORED),
        stack([s.audio for s in sequences], False),
        active,
    )


class Objective:
    """The loss of a batch, through the runtime's own encoder and decoder.

    decision: over the two control logits alone, as the runtime's decision head sees nothing else.
    text: emotion, text and TEXT_END, over the whole vocabulary.
    probe: a linear layer names the class of sound under each audio token. Decisions are rare, this is
    dense: it teaches the encoder what to hear long before the decisions do. It is not part of the model.
    """

    def __init__(self, config: ModelConfig, weights: Mapping[str, Tensor], settings: TrainConfig) -> None:
        self.config = config
        self.encoder = Encoder(config, weights)
        self.decoder = Decoder(config, weights)
        self.probe = weights[PROBE]
        self.settings = settings

    def __call__(self, batch: Batch) -> Losses:
        x = F.embedding(batch.ids, self.decoder.embedding)
        audio = self.encoder.encode(batch.frames.flatten(0, 1)).flatten(0, 1)  # [B chunks A, D]
        hidden = self.decoder.sequence(x.masked_scatter(batch.audio[..., None], audio))[:, :-1]
        labels, at, t = batch.labels[:, 1:], batch.ids[:, :-1], self.config.tokens
        learned = labels != IGNORED
        decides = learned & (at == t.assistant)
        speaks = learned & ~decides
        control = self.decoder.logits(hidden[decides])[:, [t.keep_silence, t.text_begin]]
        respond = (labels[decides] == t.text_begin).long()
        decision = F.cross_entropy(control, respond)
        text = F.cross_entropy(self.decoder.logits(hidden[speaks]), labels[speaks], reduction="sum")
        text = text / speaks.sum().clamp(min=1)
        probe = F.cross_entropy(F.linear(audio, self.probe), batch.active.flatten())
        right = (control.argmax(dim=-1) == respond).float()
        return Losses(
            decision + self.settings.text_weight * text + self.settings.probe_weight * probe,
            decision.item(),
            text.item(),
            probe.item(),
            right[respond == 0].mean().item(),
            right[respond == 1].mean().item(),
        )


class Trainer:
    """Weights, AdamW and the step number; `advance` does one step, `save`/`load` keep all of it."""

    def __init__(self, config: ModelConfig, settings: TrainConfig, weights: Weights) -> None:
        self.config = config
        self.settings = settings
        self.weights = {name: value.clone().requires_grad_() for name, value in weights.items()}
        self.objective = Objective(config, self.weights, settings)
        self.first = {name: torch.zeros_like(value) for name, value in weights.items()}
        self.second = {name: torch.zeros_like(value) for name, value in weights.items()}
        self.step = 0

    def advance(self, batch: Batch) -> Losses:
        """One AdamW step (Loshchilov and Hutter, arXiv 1711.05101) with clipped gradients."""
        losses = self.objective(batch)
        names = list(self.weights)
        gradients = dict(
            zip(names, torch.autograd.grad(losses.total, list(self.weights.values())), strict=True)
        )
        width = self.config.encoder.width
        for name, gradient in gradients.items():
            if name.startswith("encoder.layers") and name.endswith("qkv.bias"):
                gradient[width : 2 * width] = 0  # the architecture has no key bias
        norm = torch.stack([g.square().sum() for g in gradients.values()]).sum().sqrt()
        scale = (self.settings.clip_norm / (norm + 1e-6)).clamp(max=1.0)
        self._update({name: gradient * scale for name, gradient in gradients.items()})
        return losses

    @torch.no_grad()
    def _update(self, gradients: Weights) -> None:
        self.step += 1
        rate, beta1, beta2 = self.settings.rate(self.step - 1), 0.9, 0.98
        for name, gradient in gradients.items():
            weight, first, second = self.weights[name], self.first[name], self.second[name]
            first.lerp_(gradient, 1 - beta1)
            second.lerp_(gradient.square(), 1 - beta2)
            if weight.dim() > 1:
                weight.mul_(1 - rate * self.settings.weight_decay)
            root = (second / (1 - beta2**self.step)).sqrt_().add_(1e-8)
            weight.sub_(rate / (1 - beta1**self.step) * first / root)

    def save(self, path: Path) -> None:
        """Everything a resumed run needs; the file is whole or absent, never half written."""
        groups = {"weights": self.weights, "first": self.first, "second": self.second}
        tensors = {
            f"{g}/{name}": value.detach() for g, group in groups.items() for name, value in group.items()
        }
        part = path.with_suffix(".part")
        save_file(tensors, part, metadata={"step": str(self.step), "steps": str(self.settings.steps)})
        os.replace(part, path)

    def load(self, path: Path) -> None:
        """Continue from `save`; ConfigError where the file belongs to another model or schedule."""
        with safe_open(path, framework="pt") as file:
            found = file.metadata() or {}
            if found.get("steps") != str(self.settings.steps):
                raise ConfigError(
                    f"{path}: was trained for {found.get('steps')} steps, this run for "
                    f"{self.settings.steps}; give the same length or another --out"
                )
            for group, values in (("weights", self.weights), ("first", self.first), ("second", self.second)):
                for name, value in values.items():
                    with torch.no_grad():
                        value.copy_(file.get_tensor(f"{group}/{name}"))
            self.step = int(found["step"])


def planned_steps(path: Path) -> int:
    """The length of the schedule of a saved run."""
    with safe_open(path, framework="pt") as file:
        return int((file.metadata() or {})["steps"])
