"""The model with random weights, and its steps over fixed buffers: what a captured engine would replay."""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from fastloop import ops, stored
from fastloop.checkpoint import Model
from fastloop.config import MEL_BINS, ModelConfig
from fastloop.decoder import Decoder, StepRows, decoder_shapes
from fastloop.encoder import Encoder, encoder_shapes
from fastloop.mel import MelState, mel_chunk
from fastloop.ops import dispatch
from fastloop.ops.dependent import dependent_launches
from fastloop.quantise import QUANTISERS, Quantised
from fastloop.testing.cases import byte_tokenizer

from .record import Context

PAGE = 64
# What a captured engine runs: kernels that may start before the one in front of them has ended, or not.
OURS, APART = "ours", "ours, one after the other"
KV_LAYERS = (
    4  # layers that have pages of their own; more would not fit beside 1,024 streams, fewer stay in L2
)


def backend(name: str, context: Context) -> contextlib.AbstractContextManager[None]:
    """Force a backend for every op that has it, or what OURS and APART say."""
    if name in (OURS, APART) and not context.dry:
        return _ours(name == OURS)
    if name in (OURS, APART):  # interpreted, on the CPU
        name = "triton"
        dispatch.BACKENDS_OF["cpu"] = tuple(dict.fromkeys((*dispatch.BACKENDS_OF["cpu"], "triton")))
    chosen = {op.name: name for op in ops.REGISTRY.values() if name in op.implementations}
    if name == "graph":  # torch alone: what has none can be captured as it is defined
        chosen = dict.fromkeys(ops.REGISTRY, "reference") | chosen
    return dispatch.use_backend(",".join(f"{op}={backend}" for op, backend in chosen.items()))


@contextlib.contextmanager
def _ours(dependent: bool) -> Iterator[None]:
    with dispatch.use_backend(""), dispatch.capturable(), dependent_launches(dependent):
        yield


@functools.cache
def _tile(device: str, dtype: torch.dtype) -> Tensor:
    return torch.randn(1 << 22, device=device).to(dtype)


def random_weights(shapes: dict[str, tuple[int, ...]], device: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Weights of unit gain, from one random tile each rolled differently: 3B draws would take a minute."""
    tile, weights = _tile(device, dtype), {}
    for number, (name, shape) in enumerate(shapes.items()):
        count = math.prod(shape)
        rolled = tile.roll(number * 7919)
        value = rolled.repeat(-(-count // len(tile)))[:count].view(shape)
        if len(shape) == 1:
            value = 0.1 * value + (0 if name.endswith("bias") else 1)
        elif name != "decoder.embed.weight":
            value = value * math.prod(shape[1:]) ** -0.5
        weights[name] = value.to(dtype)
    return weights


def whole_model(config: ModelConfig, device: str, dtype: torch.dtype) -> Model:
    """A model of random weights over a byte tokenizer, made on its device."""
    weights = random_weights(encoder_shapes(config) | decoder_shapes(config), device, dtype)
    return Model(config, weights, byte_tokenizer(config.decoder.vocab))


# One of each a process, shared by all that is timed: (part, dims, precision) -> it.
_MODELS: dict[tuple[str, str, str], Decoder | Encoder] = {}


def decoder(context: Context, precision: str = "") -> Decoder:
    """The decoder on the context's device; precision: of the matrices of its layers, "" for floats."""
    key = "decoder", context.config.name, precision
    if key not in _MODELS:
        _MODELS[key] = Decoder(context.config, *_kept(decoder_shapes(context.config), context, precision))
    found = _MODELS[key]
    assert isinstance(found, Decoder)
    return found


def encoder(context: Context, precision: str = "") -> Encoder:
    """The audio tower on the context's device."""
    key = "encoder", context.config.name, precision
    if key not in _MODELS:
        _MODELS[key] = Encoder(context.config, *_kept(encoder_shapes(context.config), context, precision))
    found = _MODELS[key]
    assert isinstance(found, Encoder)
    return found


def _kept(
    shapes: dict[str, tuple[int, ...]], context: Context, precision: str
) -> tuple[dict[str, Tensor], dict[str, Quantised]]:
    """Random weights as a checkpoint of a precision keeps them."""
    wanted = {name: stored.precision_of(name, shape, precision or None) for name, shape in shapes.items()}
    weights = random_weights(shapes, context.device, context.dtype)
    matrices = {name: QUANTISERS[kept](weights.pop(name)) for name, kept in wanted.items() if kept}
    return weights, matrices


def _layer_bytes(model: Decoder | Encoder) -> int:
    """Of the layers' weights, as they are kept."""
    matrices = (part for matrix in model.quantised.values() for part in stored.parts(matrix))
    floats = (w for name, w in model.weights.items() if ".layers." in name)
    return sum(tensor.nbytes for tensor in (*matrices, *floats))


def ragged(rows: Sequence[int], contexts: Sequence[int], device: str) -> tuple[StepRows, int]:
    """New rows of sequences behind their contexts, each with pages of its own; and how many pages that is."""
    lengths = [n + context for n, context in zip(rows, contexts, strict=True)]
    counts = [-(-length // PAGE) for length in lengths]
    first = [0, *itertools.accumulate(counts)]
    table = torch.zeros(len(rows), max(counts), dtype=torch.int32)
    positions, slots = [], []
    for b, (count, context, length) in enumerate(zip(counts, contexts, lengths, strict=True)):
        table[b, :count] = torch.arange(first[b], first[b] + count)
        index = torch.arange(context, length)
        positions.append(index)
        slots.append(first[b] * PAGE + index)
    starts = [0, *itertools.accumulate(rows)]
    found = StepRows(
        positions=torch.cat(positions).to(device),
        slots=torch.cat(slots).to(device),
        row_starts=torch.tensor(starts, dtype=torch.int32, device=device),
        block_table=table.to(device),
        kv_lens=torch.tensor(lengths, dtype=torch.int32, device=device),
        gaps=torch.zeros(len(rows), 2, dtype=torch.int32, device=device),
    )
    return found, first[-1]


class DecoderStep:
    """One ragged pass of the decoder; the last row of each sequence decides or, alone, draws a token."""

    def __init__(
        self,
        context: Context,
        rows: Sequence[int],
        contexts: Sequence[int],
        precision: str = "",
        scaled: bool = False,
    ) -> None:
        """precision: of the matrices of the layers, "" for floats; scaled: float8 KV pages."""
        self.context, self.config, self.device = context, context.config, context.device
        self.decoder = decoder(context, precision)
        self.rows, pages = ragged(rows, contexts, self.device)
        d = self.config.decoder
        kept = min(d.layers, KV_LAYERS)
        shape = (kept, 2, pages, PAGE, d.kv_heads, d.head_width)
        pool = torch.empty(shape, dtype=context.dtype, device=self.device).normal_()
        self.kv_scale = torch.ones(d.layers, 2, d.kv_heads, device=self.device) if scaled else None
        pool = pool.to(torch.float8_e4m3fn) if scaled else pool
        self.k_pages = [pool[i % kept, 0] for i in range(d.layers)]
        self.v_pages = [pool[i % kept, 1] for i in range(d.layers)]
        self.x = torch.empty(sum(rows), d.width, dtype=context.dtype, device=self.device).normal_()
        ends = self.rows.row_starts[1:].long() - 1
        lone = torch.tensor([n == 1 for n in rows], device=self.device)
        self.deciding, self.drawing = ends[~lone], ends[lone]
        self._decision_state(len(self.deciding))
        self._draw_options(len(self.drawing))
        self.kv_bytes = (
            2 * sum(n + c for n, c in zip(rows, contexts, strict=True)) * d.kv_heads * d.head_width
        )
        self.kv_bytes *= d.layers * pool.element_size()

    def _decision_state(self, count: int) -> None:
        self.slots = torch.arange(count, device=self.device)
        self.policy = torch.tensor([[0.5, 1.0, 0.0]], device=self.device).repeat(count, 1)
        self.state = torch.tensor([[2**30, 1]], dtype=torch.int32, device=self.device).repeat(count, 1)

    def _draw_options(self, count: int) -> None:
        d, device = self.config.decoder, self.device
        self.banned = torch.zeros(1, d.vocab_padded, dtype=torch.bool, device=device)
        self.zeros = torch.zeros(count, dtype=torch.int64, device=device)
        self.greedy = torch.zeros(count, device=device)
        self.whole = torch.ones(count, device=device)

    def run(self) -> tuple[Tensor, ...]:
        """(p(respond), decision of each listener, token of each speaker)."""
        found: tuple[Tensor, ...] = ()
        pages = (self.k_pages, self.v_pages, self.kv_scale)
        hidden = self.decoder.forward(self.x, self.rows, *pages)  # type: ignore[arg-type]
        if len(self.deciding):
            found = ops.decide(
                hidden[self.deciding],
                self.decoder.weights["decoder.norm.weight"],
                self.config.decoder.norm_eps,
                self.decoder.control_head,
                self.slots,
                self.policy,
                self.state,
            )
        if len(self.drawing):
            logits = self.decoder.logits(hidden[self.drawing])
            z = self.zeros
            found += (ops.sample(logits, self.banned, z, self.greedy, z, self.whole, z, z),)
        return found

    @property
    def weight_bytes(self) -> int:
        """Read once a step: the layers, and the whole head where a token is drawn."""
        d = self.decoder
        return _layer_bytes(d) + (d.head.nbytes if len(self.drawing) else d.control_head.nbytes)

    @property
    def operations(self) -> float:
        """Products of the layers and of the head, a sum and a product each."""
        d = self.decoder
        shapes = decoder_shapes(self.config)
        layers = sum(math.prod(s) for name, s in shapes.items() if ".layers." in name and len(s) == 2)
        return 2.0 * layers * len(self.x) + 2.0 * d.head.numel() * len(self.drawing)


class Perception:
    """A chunk of B streams: samples -> frames -> audio tokens [B, A, D]."""

    def __init__(self, context: Context, streams: int, precision: str = "") -> None:
        config, device = context.config, context.device
        self.encoder = encoder(context, precision)
        self.state = MelState.empty(streams, device)
        self.slots = torch.arange(streams, device=device)
        self.pcm = 0.1 * torch.randn(streams, config.chunk_samples, device=device)
        self.frames = torch.randn(streams, config.chunk_frames, MEL_BINS, device=device)

    def hear(self) -> Tensor:
        return mel_chunk(self.state, self.slots, self.pcm)

    def encode(self) -> Tensor:
        return self.encoder.encode(self.frames)

    def run(self) -> Tensor:
        return self.encoder.encode(self.hear())

    @property
    def weight_bytes(self) -> int:
        floats = (w.nbytes for name, w in self.encoder.weights.items() if ".layers." not in name)
        return _layer_bytes(self.encoder) + sum(floats)


class ListeningStep:
    """The whole step of B listeners: sound in, decisions out; only fixed buffers are read and written."""

    def __init__(
        self,
        context: Context,
        streams: int,
        history: int,
        backend_name: str,
        precision: str = "",
        scaled: bool = False,
    ) -> None:
        """history: KV slots of each stream behind which the step comes; precision: of the layers; scaled:
        float8 KV pages.
        """
        config = context.config
        self.context, self.backend = context, backend_name
        self.perception = Perception(context, streams, precision)
        rows = [config.chunk_rows] * streams
        self.step = DecoderStep(context, rows, [history] * streams, precision, scaled)
        starts = self.step.rows.row_starts[:-1].long()[:, None]
        audio = torch.arange(2, 2 + config.chunk_tokens, device=context.device)  # behind the control tokens
        self.audio_rows = (starts + audio).flatten()

    def run(self) -> tuple[Tensor, ...]:
        with backend(self.backend, self.context):
            tokens = self.perception.run()
            self.step.x.index_copy_(0, self.audio_rows, tokens.flatten(0, 1).to(self.step.x.dtype))
            self.out = self.step.run()
        return self.out

    @torch.inference_mode()
    def results(self, seed: int, run: Callable[[], object] | None = None) -> list[Tensor]:
        """p(respond) and decisions after fresh contents of every buffer."""
        generator = torch.Generator(self.context.device).manual_seed(seed)
        for buffer in (self.perception.pcm, self.step.x):
            buffer.normal_(generator=generator)
        self.perception.state.reset(torch.ones_like(self.perception.slots, dtype=torch.bool))
        self.step.state[:] = torch.tensor([2**30, 1], dtype=torch.int32, device=self.context.device)
        (run or self.run)()
        if self.context.device == "cuda":
            torch.cuda.synchronize()
        return [t.clone() for t in self.out]
