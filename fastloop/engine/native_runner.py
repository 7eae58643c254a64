"""The native runner: one compiled call for a pass of the encoder, one for a step of the decoder (csrc/cpu/).

    weights of the checkpoint -> packed once, in the precision of EngineConfig.precision
    frames [B, F, C] -> tokens [B, A, D]        rows of a ragged step -> hidden [N, D], logits [T, V]

It computes what the eager runner computes op by op, and is tested equal to it. A session's results are the
same to the bit alone and beside any others, whatever the number of threads. Inside a step everything but
weights, pages and dot products is float32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops
from ..checkpoint import Model
from ..config import MEL_BINS, ConfigError
from ..decision import DecisionState
from ..mel import MelState
from ..ops.native import address, pack, require_native
from ..quantise import GROUPS, Quantised
from ..tensorfile import release
from .kv_cache import KVCache
from .runner import EagerRunner, StepBatch, StepResult

TILE_FORMATS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}  # fastloop_format of KV pages
KV_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}  # kv_precision
CACHED_BYTES = 24 << 20  # of weights: what a last-level cache keeps
ROWS_BYTES = 512 << 10  # of rows: half of a second-level cache


def native_precision(precision: str, model: Model) -> str:
    """What EngineConfig.precision means for a model: "auto" keeps int8, int4 and bfloat16, else float32.

    ConfigError where the checkpoint is quantised and something else is asked for.
    """
    if model.precision is not None and precision not in ("auto", model.precision):
        raise ConfigError(
            f"EngineConfig.precision: the checkpoint is {model.precision}, {precision!r} is asked for; leave "
            "it at 'auto', or convert what the checkpoint was made from"
        )
    if precision != "auto":
        return precision
    return model.precision or ("bfloat16" if model.dtype == torch.bfloat16 else "float32")


def chunks_at_once(model: Model, weight_bytes: int) -> int:
    """Chunks of one pass of the encoder. Large weights come from memory and are read once for all of them;
    small ones stay in the cache, and there the rows should, too: a pass that overflows it costs half again.
    """
    if weight_bytes > CACHED_BYTES:
        return 1 << 30
    widest = 4 * max(model.config.encoder.ffn, 3 * model.config.encoder.width)
    return max(1, ROWS_BYTES // (widest * model.config.chunk_frames // 2))


class PackedModel:
    """A model's weights packed for the native kernels; what they point to lives as long as this does."""

    def __init__(self, model: Model, precision: str, isa: str | None = None) -> None:
        self.precision = precision
        self._native = require_native()
        self._kept: list[Any] = []
        self._weights: Mapping[str, Tensor | Quantised] = {**model.weights, **model.quantised}
        layer = self._weights["decoder.layers.0.gate_up.weight"]
        self.group = (isinstance(layer, Quantised) and layer.group) or GROUPS[0]  # the head's, as the layers'
        self.encoder = self._encoder(model, isa)
        self.decoder = self._decoder(model, isa)

    @property
    def nbytes(self) -> int:
        """Bytes of packed weights."""
        return sum(kept.nbytes for kept in self._kept if isinstance(kept, self._native.Weight))

    def pack(self, weight: Tensor | Quantised, precision: str, gated: bool = False) -> Any:
        """weight [O, D] -> its packed form, which is kept. Rows [gate; up] where gated."""
        packed = pack(weight, precision, gated, self.group)
        self._kept.append(packed)
        for source in (weight.values, weight.scale) if isinstance(weight, Quantised) else (weight,):
            release(source)  # or a checkpoint that is mapped would stand in memory twice
        return packed

    def _vector(self, values: Tensor) -> int:
        """The address of a float32 copy that is kept."""
        kept = values.float().contiguous()
        self._kept.append(kept)
        return kept.data_ptr()

    def _layers(self, prefix: str, count: int, pack: Callable[[str, Any], Any]) -> list[dict[str, Any]]:
        names = [name for name in self._weights if name.startswith(f"{prefix}.layers.0.")]
        short = [name.split(".", 3)[3] for name in names]
        return [
            {name: pack(name, self._weights[f"{prefix}.layers.{i}.{name}"]) for name in short}
            for i in range(count)
        ]

    def _encoder(self, model: Model, isa: str | None) -> Any:
        c, w = model.config.encoder, model.weights
        # Four bits are too few for the encoder, whose rows are few anyway.
        precision = "int8" if self.precision == "int4" else self.precision

        def pack(name: str, tensor: Any) -> Any:
            return self.pack(tensor, precision) if len(tensor.shape) == 2 else self._vector(tensor)

        fields = {
            "bins": MEL_BINS,
            "width": c.width,
            "heads": c.heads,
            "norm_eps": c.norm_eps,
            "positions": self._vector(model.encoder.positions),
            "most_positions": len(model.encoder.positions),
        }
        for name in ("conv1", "conv2"):  # [E, C, taps] -> inputs in the order (tap, channel)
            kernel = w[f"encoder.{name}.weight"]
            fields[f"{name}.weight"] = self.pack(kernel.mT.reshape(len(kernel), -1), precision)
            fields[f"{name}.bias"] = self._vector(w[f"encoder.{name}.bias"])
        for name in ("norm.weight", "norm.bias", "proj.weight", "proj.bias"):
            fields[name] = pack(name, w[f"encoder.{name}"])
        return self._native.Encoder(fields, self._layers("encoder", c.layers, pack), isa)

    def _decoder(self, model: Model, isa: str | None) -> Any:
        c, w = model.config.decoder, model.weights

        def pack(name: str, tensor: Any) -> Any:
            if len(tensor.shape) == 1:
                return self._vector(tensor)
            return self.pack(tensor, self.precision, gated=name == "gate_up.weight")

        inv_freq = model.decoder.inv_freq.double().contiguous()
        self._kept.append(inv_freq)
        fields = {
            "width": c.width,
            "heads": c.heads,
            "kv_heads": c.kv_heads,
            "head_width": c.head_width,
            "norm_eps": c.norm_eps,
            "norm.weight": self._vector(w["decoder.norm.weight"]),
            "head.weight": self.pack(model.decoder.head, self.precision),
            "inv_freq": inv_freq.data_ptr(),
        }
        return self._native.Decoder(fields, self._layers("decoder", c.layers, pack), isa)


class NativeRunner(EagerRunner):
    """The model in compiled calls, on the CPU."""

    def __init__(
        self,
        model: Model,
        cache: KVCache,
        decisions: DecisionState,
        mel: MelState,
        precision: str = "auto",
        threads: int | None = None,
    ) -> None:
        super().__init__(model, cache, decisions, mel)
        self.packed = PackedModel(model, native_precision(precision, model))
        self.team = require_native().Team(threads or torch.get_num_threads())
        self._chunks = chunks_at_once(model, self.packed.nbytes)
        self._norm = model.weights["decoder.norm.weight"].float()
        self._control = model.decoder.control_head.float()

    @torch.inference_mode()
    def encode(self, frames: Tensor) -> Tensor:
        frames = frames.contiguous()
        chunks, length, bins = frames.shape
        width = self.model.config.decoder.width
        tokens = torch.empty(chunks, length // 4, width)
        for first in range(0, chunks, self._chunks):
            self.packed.encoder.encode(
                self.team,
                min(self._chunks, chunks - first),
                length,
                frames.data_ptr() + first * length * bins * 4,
                tokens.data_ptr() + first * length // 4 * width * 4,
            )
        return tokens

    def _encode_offline(self, frames: Tensor) -> Tensor:
        block = self.model.config.encoder.block_frames
        whole = len(frames) // block * block
        parts = [self.encode(frames[:whole].unflatten(0, (-1, block))).flatten(0, 1)] if whole else []
        if whole < len(frames):
            parts.append(self.encode(frames[None, whole:])[0])
        return torch.cat(parts)

    @torch.inference_mode()
    def prefill(self, ids: Sequence[int], pages: Sequence[int]) -> None:
        batch = self._prefix_batch(ids, pages)
        self._forward(F.embedding(self._tensor(batch.ids), self.model.decoder.embedding).float(), batch)

    @torch.inference_mode()
    def step(self, batch: StepBatch) -> StepResult:
        x = F.embedding(self._tensor(batch.ids), self.model.decoder.embedding).float()
        if len(batch.audio):
            x[self._tensor(batch.audio_rows)] = torch.cat(list(batch.audio)).float()
        logits = self._forward(x, batch)
        return StepResult(*self._decide(x, batch), self._sample(logits, batch))

    def _forward(self, x: Tensor, batch: StepBatch) -> Tensor:
        """x float32 [N, D] becomes the hidden rows; returns logits float32 [T, V] of the rows that draw."""
        k, v = self.cache.k_pages, self.cache.v_pages
        logits = torch.empty(len(batch.draw_rows), len(self.model.decoder.head))
        self.packed.decoder.decode(
            team=self.team,
            rows=len(batch.ids),
            sequences=len(batch.kv_lens),
            x=x.data_ptr(),
            positions=batch.positions.ctypes.data,
            slots=batch.slots.ctypes.data,
            row_starts=batch.row_starts.ctypes.data,
            block_table=batch.block_table.ctypes.data,
            table_width=batch.block_table.shape[1],
            kv_lens=batch.kv_lens.ctypes.data,
            gaps=batch.gaps.ctypes.data,
            page_format=TILE_FORMATS[k.dtype],
            k_pages=k.data_ptr(),
            v_pages=v.data_ptr(),
            pages=k.shape[1],
            page_tokens=self.cache.page_tokens,
            logit_rows=len(batch.draw_rows),
            logit_row=batch.draw_rows.ctypes.data,
            logits=logits.data_ptr(),
            page_layout=int(self.cache.layout.tiled),
            key_range=address(self.cache.layout.key_range),
        )
        return logits

    def _decide(self, hidden: Tensor, batch: StepBatch) -> tuple[list[float], list[int]]:
        if not len(batch.decide_rows):
            return [], []
        p, decisions = ops.decide(
            hidden[self._tensor(batch.decide_rows)],
            self._norm,
            self.model.config.decoder.norm_eps,
            self._control,
            self._tensor(batch.decide_slots),
            self.decisions.policy,
            self.decisions.state,
        )
        return p.tolist(), decisions.tolist()
