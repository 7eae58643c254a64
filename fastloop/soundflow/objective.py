"""The loss of a batch: text cross-entropy + lambda x control-token cross-entropy (+ probes).

    control  KEEP_SILENCE or TEXT_BEGIN at ASSISTANT, over these two logits alone: the runtime's decision
             head sees nothing else
    text     emotion, text and TEXT_END, over the whole vocabulary
    probes   which sounds, digits and questions are under each audio token, answered or not, from the
             encoder's and the decoder's output; and at the end of every chunk what was heard so far, at
             all, first and last, from halfway through the decoder. Decisions are rare, questions more so,
             this is dense: it teaches hearing and remembering long before they do, and to know apart what
             is never answered but may be asked for

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
from .sequence import IGNORED, Due, TokenSequence
from .trainable import Trainable

LOSSES = ("total", "control", "text", "heard", "recognised", "recalled", "silent_right", "respond_right")


class Batch(NamedTuple):
    """frames float32 [N, F, C], the chunks of all rows in order; ids, labels int64 [B, T]; audio bool
    [B, T], true at the slots of the audio tokens, N x A of them; active bool [N, A, K]: which of the K
    classes are heard under each audio token; past bool [N, 3, K]: which were heard in the row until the
    chunk ends, at all, first and last; due uint8 [B, T]: what is to be said at each decision.
    """

    frames: Tensor
    ids: Tensor
    labels: Tensor
    audio: Tensor
    active: Tensor
    past: Tensor
    due: Tensor

    def to(self, device: torch.device) -> Batch:
        return Batch(*(tensor.to(device, non_blocking=True) for tensor in self))


def collate(
    frames: Tensor,
    active: Tensor,
    past: Tensor,
    sequences: Sequence[TokenSequence],
    fill: int,
    multiple: int = 1,
) -> Batch:
    """frames [N, F, C], active [N, A, K], past [N, 3, K] and the sequence of each row -> Batch; rows are
    filled up with the id `fill`, unlabelled, to a multiple of `multiple` tokens.
    """
    longest = -(-max(len(s.ids) for s in sequences) // multiple) * multiple

    def stack(rows: Sequence[Tensor], value: int | bool) -> Tensor:
        return torch.stack([F.pad(row, (0, longest - len(row)), value=value) for row in rows])

    ids = stack([s.ids for s in sequences], fill)
    labels = stack([s.labels for s in sequences], IGNORED)
    audio = stack([s.audio for s in sequences], False)
    due = stack([s.due for s in sequences], Due.NOTHING)
    return Batch(frames, ids, labels, audio, active, past, due)


@dataclass(frozen=True)
class Weighting:
    """total = text_weight x text + control_weight x control + probe_weight x (heard + recognised)
    + recalled_weight x recalled, which is a sum over three times as many classes.

    silence_weight: how much more than a missed answer one too many costs. A decision is right at
    p(respond) > silence_weight / (1 + silence_weight) of what the data says; the model learns odds that are
    so much lower, and decides at 0.5 all the same.  digits_weight, alerts_weight: how much more than a missed
    answer to a question digits cost that are not written, and anything else that is not answered.
    """

    text_weight: float = 1.0
    control_weight: float = 1.0  # lambda
    probe_weight: float = 0.0
    recalled_weight: float = 0.0
    silence_weight: float = 1.0
    digits_weight: float = 1.0
    alerts_weight: float = 1.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not number or not math.isfinite(value) or value < 0:
                raise ConfigError(f"Weighting.{name}: must be a number from 0 on, got {value!r}")


class Objective(nn.Module):
    """Batch -> losses float32 [8] in the order of LOSSES; the first is differentiable, the others are for
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
        control = self._control(logits, respond, batch.due[:, 1:][decides].long())
        text = F.cross_entropy(decoder.logits(before[speaks]).float(), labels[speaks], reduction="sum")
        text = text / speaks.sum().clamp(min=1)
        w = self.weighting
        total = w.text_weight * text + w.control_weight * control
        probes = self._probes(batch, tokens, hidden, decoder.halfway)
        heard, recognised, recalled = probes
        total = total + w.probe_weight * (heard + recognised) + w.recalled_weight * recalled
        right = (logits.argmax(dim=-1) == respond).float()
        shares = right[respond == 0].mean(), right[respond == 1].mean()
        parts = (control, text, *probes, *shares)
        return torch.stack([total, *(part.detach().float() for part in parts)])

    def _control(self, logits: Tensor, respond: Tensor, due: Tensor) -> Tensor:
        """Mean cross-entropy of decisions, each by what an error costs; logits [N, 2], respond int64 [N],
        due int64 [N]: what an answer is.
        """
        w = self.weighting
        missed = {Due.DIGITS: w.digits_weight, Due.ALERT: w.alerts_weight}
        costs = logits.new_tensor([missed.get(kind, 1.0) for kind in Due])[due]
        costs = costs.where(respond == 1, w.silence_weight)
        losses = F.cross_entropy(logits, respond, reduction="none")
        return (costs * losses).sum() / costs.sum()

    def _probes(self, batch: Batch, tokens: Tensor, hidden: Tensor, halfway: Tensor) -> tuple[Tensor, ...]:
        """Binary cross-entropies of the three probes, summed over what each tells apart; tokens [N A, D],
        hidden, halfway [B, T, D].
        """
        if self.weighting.probe_weight == self.weighting.recalled_weight == 0:
            return (tokens.new_zeros(()),) * 3
        model, a = self.model, self.config.chunk_tokens
        active, past = batch.active.flatten(0, 1), batch.past.flatten(1)
        return (
            _told(model.heard, tokens, active),
            _told(model.recognised, _normed(hidden[batch.audio]), active),
            _told(model.recalled, _normed(halfway[batch.audio][a - 1 :: a]), past),
        )


def _normed(x: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:])


def _told(probe: nn.Linear, x: Tensor, truth: Tensor) -> Tensor:
    """Binary cross-entropy of what a probe tells from x [R, D]; truth bool [R, K]; summed over K."""
    logits = F.linear(x, probe.weight.to(x.dtype), probe.bias.to(x.dtype)).float()
    return F.binary_cross_entropy_with_logits(logits, truth.float(), reduction="sum") / len(x)
