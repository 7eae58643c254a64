"""Encoder and decoder against transformers' own modules, on random weights, in float32.

Runs with transformers 4.57 (what the published code pins) and 5.x, whose audio tower was rewritten.
The bound, ||ours - theirs|| / ||theirs|| < 1e-5, is some 80 float32 roundings (1.2e-7) of slack on sums
taken in another order; a wrong mask, position, bias or row block is off by a tenth or more.
"""

from __future__ import annotations

import inspect
import random
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Qwen2Config, Qwen2ForCausalLM
from transformers.models.qwen2_5_omni.configuration_qwen2_5_omni import Qwen2_5OmniAudioEncoderConfig
from transformers.models.qwen2_5_omni.modeling_qwen2_5_omni import Qwen2_5OmniAudioEncoder

from fastloop.config import MEL_BINS, DecoderConfig, EncoderConfig, ModelConfig, small
from fastloop.decoder import Decoder, StepRows, decoder_shapes
from fastloop.encoder import Encoder, encoder_shapes
from fastloop.ops import use_backend

BOUND = 1e-5
VOCAB = 96

ENCODERS = {
    "small": EncoderConfig(layers=2, width=64, heads=2, ffn=128),
    "wide heads": EncoderConfig(layers=1, width=256, heads=2, ffn=192),
    "published heads": EncoderConfig(layers=3, width=192, heads=3, ffn=768),
    "short blocks": EncoderConfig(layers=2, width=32, heads=4, ffn=64, block_frames=80),
}
DECODERS: dict[str, dict[str, Any]] = {
    "small": {"width": 64, "heads": 4, "kv_heads": 2, "head_width": 16, "rope_base": 1e4},
    "multi-head": {"width": 128, "heads": 2, "kv_heads": 2, "head_width": 64, "rope_base": 1e5},
    "published ratio": {"width": 256, "heads": 8, "kv_heads": 1, "head_width": 128, "rope_base": 1e6},
    "seven to one": {"width": 112, "heads": 7, "kv_heads": 1, "head_width": 16, "rope_base": 1e6},
    "wider than the model": {"width": 48, "heads": 4, "kv_heads": 2, "head_width": 64, "rope_base": 1e6},
}


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape
    return ((ours.double() - theirs.double()).norm() / theirs.double().norm()).item()


@torch.no_grad()
def randomise(module: nn.Module, seed: int) -> None:
    """Weights of unit gain, norms away from 1 and biases away from 0, so that none can be forgotten."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() > 1:
            parameter.copy_(noise / parameter[0].numel() ** 0.5)
        else:
            parameter.copy_(0.3 * noise)
    for child in module.modules():
        weight = getattr(child, "weight", None)
        if "norm" in type(child).__name__.lower() and weight is not None:
            weight += 1


def with_decoder(encoder: EncoderConfig, out: int) -> ModelConfig:
    base = small(vocab=VOCAB)
    decoder = DecoderConfig(
        layers=1, width=out, heads=1, kv_heads=1, head_width=2, ffn=2, vocab=VOCAB, vocab_padded=VOCAB
    )
    return ModelConfig(name="parity", encoder=encoder, decoder=decoder, tokens=base.tokens)


@dataclass
class EncoderPair:
    theirs: Qwen2_5OmniAudioEncoder
    ours: Encoder

    @torch.no_grad()
    def call(self, frames: Tensor, lengths: list[int]) -> Tensor:
        """Theirs as the released server calls it: frames [F, C] in pieces of `lengths` -> [tokens, D]."""
        arguments = {
            "input_features": frames.T.contiguous(),
            "feature_lens": torch.tensor(lengths),
            "aftercnn_lens": torch.tensor([(length - 1) // 2 + 1 for length in lengths]),
        }
        assert set(arguments) <= set(inspect.signature(self.theirs.forward).parameters)
        return self.theirs(**arguments).last_hidden_state


@pytest.fixture(scope="module", params=ENCODERS)
def encoders(request: pytest.FixtureRequest) -> EncoderPair:
    dims, out = ENCODERS[request.param], 56
    config = with_decoder(dims, out)
    theirs = Qwen2_5OmniAudioEncoder._from_config(
        Qwen2_5OmniAudioEncoderConfig(
            num_mel_bins=MEL_BINS,
            encoder_layers=dims.layers,
            encoder_attention_heads=dims.heads,
            encoder_ffn_dim=dims.ffn,
            d_model=dims.width,
            n_window=dims.block_frames // 2,
            output_dim=out,
        )
    )
    theirs.eval()
    randomise(theirs, seed=dims.width)
    state, weights = theirs.state_dict(), {}
    plain = {"norm1": "self_attn_layer_norm", "norm2": "final_layer_norm", "norm": "ln_post"}
    plain["out"] = "self_attn.out_proj"
    for name in encoder_shapes(config):
        *path, module, kind = name.removeprefix("encoder.").split(".")
        prefix = ".".join([*path, ""]) if path else ""
        if module == "qkv":
            parts = [state.get(f"{prefix}self_attn.{p}_proj.{kind}") for p in "qkv"]
            weights[name] = torch.cat([torch.zeros(dims.width) if p is None else p for p in parts])
        else:
            weights[name] = state[f"{prefix}{plain.get(module, module)}.{kind}"]
    return EncoderPair(theirs, Encoder(config, weights))


@torch.no_grad()
@pytest.mark.parametrize("chunks", [1, 2, 7])
def test_encoder_chunk_wise(encoders: EncoderPair, chunks: int) -> None:
    chunk = encoders.ours.config.chunk_frames
    frames = torch.randn(chunks, chunk, MEL_BINS, generator=torch.Generator().manual_seed(chunks))
    theirs = encoders.call(frames.flatten(0, 1), [chunk] * chunks)
    assert relative_error(encoders.ours.encode(frames).flatten(0, 1), theirs) < BOUND


@torch.no_grad()
@pytest.mark.parametrize("length", [4, 7, 40, 79, 80, 81, 198, 199, 200, 201, 202, 203, 400, 517])
def test_encoder_offline(encoders: EncoderPair, length: int) -> None:
    frames = torch.randn(length, MEL_BINS, generator=torch.Generator().manual_seed(length))
    theirs = encoders.call(frames, [length])
    assert relative_error(encoders.ours.encode_offline(frames), theirs) < BOUND


@dataclass
class DecoderPair:
    theirs: Qwen2ForCausalLM
    ours: Decoder

    @torch.no_grad()
    def call(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Theirs: rows x [B, T, D] -> hidden before the final norm [B, T, D], logits [B, T, V]."""
        kept: list[Tensor] = []
        hook = self.theirs.model.norm.register_forward_pre_hook(lambda _, inputs: kept.append(inputs[0]))
        logits = self.theirs(inputs_embeds=x, use_cache=False).logits
        hook.remove()
        return kept[0], logits


def their_decoder(config: DecoderConfig) -> Qwen2ForCausalLM:
    values: dict[str, Any] = {
        "vocab_size": config.vocab_padded,
        "hidden_size": config.width,
        "intermediate_size": config.ffn,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_width,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied,
        "max_position_embeddings": 1 << 20,
    }
    if "rope_parameters" in inspect.signature(Qwen2Config).parameters:  # 5.x
        values["rope_parameters"] = {"rope_type": "default", "rope_theta": config.rope_base}
    else:
        values["rope_theta"] = config.rope_base
    return Qwen2ForCausalLM(Qwen2Config(**values)).eval()


@pytest.fixture(scope="module", params=[*DECODERS, "tied"])
def decoders(request: pytest.FixtureRequest) -> DecoderPair:
    tied = request.param == "tied"
    dims = DECODERS["small" if tied else request.param]
    config = DecoderConfig(layers=2, ffn=80, vocab=VOCAB, vocab_padded=VOCAB, tied=tied, **dims)
    base = small(vocab=VOCAB)
    model = ModelConfig(name="parity", encoder=base.encoder, decoder=config, tokens=base.tokens)
    theirs = their_decoder(config)
    randomise(theirs, seed=config.width)
    state, weights = theirs.state_dict(), {}
    plain = {
        "norm1": "input_layernorm",
        "norm2": "post_attention_layernorm",
        "out": "self_attn.o_proj",
        "down": "mlp.down_proj",
        "embed": "embed_tokens",
        "norm": "norm",
    }
    for name in decoder_shapes(model):
        *path, module, kind = name.removeprefix("decoder.").split(".")
        prefix = ".".join(["model", *path, ""])
        if module == "qkv":
            weights[name] = torch.cat([state[f"{prefix}self_attn.{p}_proj.{kind}"] for p in "qkv"])
        elif module == "gate_up":
            weights[name] = torch.cat([state[f"{prefix}mlp.{p}_proj.{kind}"] for p in ("gate", "up")])
        elif module == "head":
            weights[name] = state["lm_head.weight"]
        else:
            weights[name] = state[f"{prefix}{plain[module]}.{kind}"]
    return DecoderPair(theirs, Decoder(model, weights))


@torch.no_grad()
@pytest.mark.parametrize("batch, length", [(1, 1), (3, 33), (1, 200)])
def test_decoder_sequence(decoders: DecoderPair, batch: int, length: int) -> None:
    ids = torch.randint(VOCAB, (batch, length), generator=torch.Generator().manual_seed(length))
    x = decoders.ours.embed(ids)
    hidden, logits = decoders.call(x)
    ours = decoders.ours.sequence(x)
    assert relative_error(ours, hidden) < BOUND
    assert relative_error(decoders.ours.logits(ours.flatten(0, 1)), logits.flatten(0, 1)) < BOUND


class PagedSequence:
    """Rows of one sequence, fed piece by piece: a prefix, a gap up to the page's end, then the stream."""

    def __init__(self, rows: Tensor, prefix: int, start: int, page: int, pages: list[int]) -> None:
        self.rows, self.start, self.pages, self.page = rows, start, pages, page
        self.gap = (prefix, -(-prefix // page) * page)
        self.done = 0
        self.hidden: list[Tensor] = []

    def slot(self, row: int) -> int:
        """Slot of a row within the sequence; rows behind the prefix sit behind the gap."""
        return row if row < self.gap[0] else row + self.gap[1] - self.gap[0]

    def physical(self, row: int) -> int:
        page, offset = divmod(self.slot(row), self.page)
        return self.pages[page] * self.page + offset


def step(sequences: list[PagedSequence], counts: list[int], width: int) -> tuple[Tensor, StepRows]:
    """The next `counts[b]` rows of each sequence as one ragged step; `width` entries in a block table row."""
    x, positions, slots, starts, table, lens, gaps = [], [], [], [0], [], [], []
    for sequence, count in zip(sequences, counts, strict=True):
        rows = range(sequence.done, sequence.done + count)
        x.append(sequence.rows[sequence.done : sequence.done + count])
        positions += [sequence.start + row for row in rows]
        slots += [sequence.physical(row) for row in rows]
        starts.append(starts[-1] + count)
        table.append(sequence.pages + [0] * (width - len(sequence.pages)))
        lens.append(sequence.slot(rows[-1]) + 1)
        gaps.append(sequence.gap)
    return torch.cat(x), StepRows(
        positions=torch.tensor(positions),
        slots=torch.tensor(slots),
        row_starts=torch.tensor(starts, dtype=torch.int32),
        block_table=torch.tensor(table, dtype=torch.int32),
        kv_lens=torch.tensor(lens, dtype=torch.int32),
        gaps=torch.tensor(gaps, dtype=torch.int32),
    )


@torch.no_grad()
@pytest.mark.parametrize("page", [1, 8, 16])
@pytest.mark.parametrize("backend", ["reference", "paged_attention=torch"])
def test_decoder_paged(decoders: DecoderPair, backend: str, page: int) -> None:
    """Ragged steps over shuffled pages, the unwritten slots poisoned, equal whole sequences.

    RoPE sees differences of positions alone, so ours at any start must equal theirs at 0. (Theirs cannot
    be asked at a large start: its angles are float32 and lose 5000 x 6e-8 = 3e-4 rad there.)
    """
    config = decoders.ours.config.decoder
    choose = random.Random(page)
    lengths, prefixes, starts = [70, 13, 41, 1], [9, 8, 0, 1], [0, 5000, 17, 100_000]
    order = list(range(sum(-(-length // page) + 1 for length in lengths)))
    choose.shuffle(order)
    sequences = []
    for length, prefix, start in zip(lengths, prefixes, starts, strict=True):
        rows = torch.randn(length, config.width, generator=torch.Generator().manual_seed(length))
        pages = [order.pop() for _ in range(-(-length // page) + 1)]
        sequences.append(PagedSequence(rows, prefix, start, page, pages))
    pool = (config.layers, 1 + max(max(s.pages) for s in sequences), page, config.kv_heads, config.head_width)
    k_pages, v_pages = torch.full(pool, torch.nan), torch.full(pool, torch.nan)
    with use_backend(backend):
        while live := [s for s in sequences if s.done < len(s.rows)]:
            chosen = choose.sample(live, choose.randint(1, len(live)))
            counts = []
            for s in chosen:  # a prefix and what is behind its gap never share a step
                limit = (s.gap[0] if s.done < s.gap[0] else len(s.rows)) - s.done
                counts.append(choose.randint(1, min(limit, 20)))
            x, where = step(chosen, counts, width=max(len(s.pages) for s in chosen))
            hidden = decoders.ours.forward(x, where, k_pages, v_pages)
            for s, piece in zip(chosen, torch.split(hidden, counts), strict=True):
                s.hidden.append(piece)
                s.done += len(piece)
    for s in sequences:
        theirs, logits = decoders.call(s.rows[None])
        ours = torch.cat(s.hidden)
        assert relative_error(ours, theirs[0]) < BOUND
        assert relative_error(decoders.ours.logits(ours), logits[0]) < BOUND
