"""One step of the decoder as work of the device alone: from static buffers to static buffers.

    ids, audio -> rows [N, D] -> decoder -> decide [R], sample [T] -> results

It computes what `EagerRunner.step` does, without a value on the host and without a shape that depends on one,
so a graph can capture it and the recorder can check it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import ops
from ..checkpoint import Model
from ..decision import DecisionState, decide
from ..ops.contract import unread_values
from ..ops.dispatch import capturable
from .kv_cache import KVCache
from .step_buffers import StepBuffers


@dataclass(frozen=True)
class DeviceStep:
    """The step of one model over one KV pool, one table of decision states and one of drawn tokens.

    A step leaves each token it draws in `last`, at its session's slot, where the next step can take it from
    before the host has seen it.
    """

    model: Model
    cache: KVCache
    decisions: DecisionState
    banned: Tensor  # bool [2, V]
    last: Tensor  # int64 [Z], the token each session has drawn last; Z as many as decision states

    @torch.inference_mode()
    def run(self, buffers: StepBuffers) -> None:
        """Launch the step on a set of buffers; its results are in `buffers.made` when the device is done."""
        with capturable(), unread_values():
            given, made, decoder = buffers.given, buffers.made, self.model.decoder
            hidden = decoder.forward(self._rows(buffers), buffers.rows, *self.cache.pages)
            p, decisions = decide(
                decoder, hidden[given["decide_rows"]], given["decide_slots"], self.decisions
            )
            made["p_respond"].copy_(p)
            made["decisions"].copy_(decisions)
            if buffers.bucket.draws:
                logits = decoder.logits(hidden[given["draw_rows"]])
                drawn = self._sample(logits, given)
                made["drawn"].copy_(drawn)
                self.last[given["draw_slots"]] = drawn

    def _rows(self, buffers: StepBuffers) -> Tensor:
        """The rows' embeddings [N, D], or the audio tokens that stand in their place."""
        given = buffers.given
        index, feeds = given["audio_index"], given["feed_slots"]
        drawn = self.last[feeds.clamp(min=0)].clamp(
            min=0
        )  # -1: it was not finite, and nobody takes the result
        own = self.model.decoder.embed(torch.where(feeds >= 0, drawn, given["ids"]))
        heard = buffers.audio[index.clamp(min=0)].to(own.dtype)
        return torch.where((index >= 0)[:, None], heard, own)

    def _sample(self, logits: Tensor, given: dict[str, Tensor]) -> Tensor:
        """logits [T, V] -> ids [T]."""
        names = ("draw_phase", "temperature", "top_k", "top_p", "seed", "counter")
        return ops.sample(logits, self.banned, *(given[name] for name in names))

    def static(self, buffers: StepBuffers) -> dict[str, Tensor]:
        """What the step reads and writes at fixed addresses."""
        cache, state = self.cache, {"state": self.decisions.state, "last": self.last}
        return buffers.static | state | {"k_pages": cache.k_pages, "v_pages": cache.v_pages}

    def constants(self) -> Iterator[Tensor]:
        """What the step only reads."""
        decoder = self.model.decoder
        yield from self.model.tensors
        yield from (decoder.head, decoder.control_head, decoder.inv_freq, self.banned, self.decisions.policy)
        if self.cache.layout.kv_scale is not None:
            yield self.cache.layout.kv_scale
