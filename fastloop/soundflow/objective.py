"""The loss of a batch: text cross-entropy + lambda x control-token cross-entropy (+ probes).

    control  KEEP_SILENCE or TEXT_BEGIN at ASSISTANT, over these two logits alone: the runtime's decision
             head sees nothing else
    text     emotion, text and TEXT_END, over the whole vocabulary
    probes   which sounds, digits and questions are under each audio token, answered or not, from the
             encoder's and the decoder's output. Decisions are rare, this is dense: it teaches hearing long
             before the decisions do, and to know apart what is never answered but may be asked for

Source of the first two: Audio Interaction Model, arXiv 2606.05121; lambda 1 there and here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..config import ConfigError, ModelConfig
from .sequence import IGNORED, TokenSequence
from .trainable import Trainable

LOSSES = ("total", "control", "text", "heard", "recognised", "silent_right", "respond_right")


class Batch(NamedTuple):
    """frames float32 [N, F, C], the chunks of all rows in order; ids, labels int64 [B, T]; audio bool
    [B, T], true at the slots of the audio tokens, N x A of them; active bool [N, A, K]: which of the K
    classes are heard under each audio token; digits bool [B, T]: the decisions where digits are to be
    written.
    """

    frames: Tensor
    ids: Tensor
    labels: Tensor
    audio: Tensor
    active: Tensor
    digits: Tensor

    def to(self, device: torch.device) -> Batch:
        return Batch(*(tensor.to(device) for tensor in self))


def collate(frames: Tensor, active: Tensor, sequences: Sequence[TokenSequence], fill: int) -> Batch:
    """frames [N, F, C], active [N, A, K] and the sequence of each row -> Batch; short rows are filled up with
    the id `fill`, unlabelled.
    """
    longest = max(len(s.ids) for s in sequences)

    def stack(rows: Sequence[Tensor], value: int | bool) -> Tensor:
        return torch.stack([F.pad(row, (0, longest - len(row)), value=value) for row in rows])

    ids = stack([s.ids for s in sequences], fill)
    labels = stack([s.labels for s in sequences], IGNORED)
    audio, digits = (
        stack(rows, False) for rows in ([s.audio for s in sequences], [s.digits for s in sequences])
    )
    return Batch(frames, ids, labels, audio, active, digits)


@dataclass(frozen=True)
class Weighting:
    """total = text_weight x text + control_weight x control + probe_weight x (heard + recognised).

    silence_weight: how much more than a missed answer one too many costs. A decision is right at
    p(respond) > silence_weight / (1 + silence_weight) of what the data says; the model learns odds that are
    so much lower, and decides at 0.5 all the same.  digits_weight: how much more than other missed answers
    digits cost that are not written.
    """

    text_weight: float = 1.0
    control_weight: float = 1.0  # lambda
    probe_weight: float = 0.0
    silence_weight: float = 1.0
    digits_weight: float = 1.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not number or not math.isfinite(value) or value < 0:
                raise ConfigError(f"Weighting.{name}: must be a number from 0 on, got {value!r}")


class Objective(nn.Module):
    """Batch -> losses float32 [7] in the order of LOSSES; the first is differentiable, the others are for
    reading: mean losses, and the share of right decisions where silence and where an answer was right
    (NaN where there was none).
    """

    def __init__(self, model: Trainable, weighting: Weighting) -> None:
        super().__init__()
        self.model = model
        self.weighting = weighting

    @property
    def config(self) -> ModelConfig:
        return self.model.config

    def forward(self, batch: Batch) -> Tensor:
        with ops.use_backend("reference"):  # the differentiable one
            return self._losses(batch)

    def _losses(self, batch: Batch) -> Tensor:
        encoder, decoder = self.model.stages()
        tokens = encoder.encode(batch.frames).flatten(0, 1)  # [N A, D]
        x = F.embedding(batch.ids, decoder.embedding).masked_scatter(batch.audio[..., None], tokens)
        hidden = decoder.sequence(x)  # [B, T, D]
        at, t = batch.ids[:, :-1], self.config.tokens
        labels, before = batch.labels[:, 1:], hidden[:, :-1]  # the label is the next token's
        learned = labels != IGNORED
        decides = learned & (at == t.assistant)
        speaks = learned & ~decides
        logits = decoder.logits(before[decides])[:, [t.keep_silence, t.text_begin]].float()
        respond = (labels[decides] == t.text_begin).long()
        control = self._control(logits, respond, batch.digits[:, 1:][decides])
        text = F.cross_entropy(decoder.logits(before[speaks]).float(), labels[speaks], reduction="sum")
        text = text / speaks.sum().clamp(min=1)
        w = self.weighting
        total = w.text_weight * text + w.control_weight * control
        heard, recognised = self._probes(tokens, hidden[batch.audio], batch.active.flatten(0, 1))
        total = total + w.probe_weight * (heard + recognised)
        right = (logits.argmax(dim=-1) == respond).float()
        shares = right[respond == 0].mean(), right[respond == 1].mean()
        parts = (control, text, heard, recognised, *shares)
        return torch.stack([total, *(part.detach().float() for part in parts)])

    def _control(self, logits: Tensor, respond: Tensor, digits: Tensor) -> Tensor:
        """Mean cross-entropy of decisions, each by what an error costs; logits [N, 2], respond int64 [N],
        digits bool [N]: an answer that is digits.
        """
        w = self.weighting
        costs = logits.new_tensor([w.silence_weight, 1.0])[respond] * (1 + digits * (w.digits_weight - 1))
        losses = F.cross_entropy(logits, respond, reduction="none")
        return (costs * losses).sum() / costs.sum()

    def _probes(self, tokens: Tensor, hidden: Tensor, active: Tensor) -> tuple[Tensor, Tensor]:
        """Binary cross-entropies of the two probes, summed over the classes; tokens, hidden [N A, D], active
        bool [N A, K].
        """
        if self.weighting.probe_weight == 0:
            nothing = tokens.new_zeros(())
            return nothing, nothing
        normed = F.rms_norm(hidden, hidden.shape[-1:])
        truth = active.float()
        pairs = ((tokens, self.model.heard), (normed, self.model.recognised))
        heard, recognised = (
            F.binary_cross_entropy_with_logits(
                F.linear(x, w.weight.to(x.dtype), w.bias.to(x.dtype)).float(), truth, reduction="sum"
            )
            / len(x)
            for x, w in pairs
        )
        return heard, recognised
