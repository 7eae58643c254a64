"""The published layout -> ours: the numbers of encoder and decoder, the config, the report."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.qwen2_5_omni.modeling_qwen2_5_omni import Qwen2_5OmniAudioEncoder

from fastloop.checkpoint import load
from fastloop.config import MEL_BINS, PUBLISHED_SYSTEM_PROMPT, PUBLISHED_TOKENS
from fastloop.convert import convert
from fastloop.engine import Engine
from fastloop.options import EngineConfig
from fastloop.testing.cases import random_sound
from fastloop.testing.tolerance import relative_error

BOUND = 1e-5  # as for parity with transformers
LAYERS, HEADS, GROUPS, HEAD, ROPE_BASE, EPS = 2, 4, 2, 4, 5e5, 1e-6
Writers = dict[str, Callable[..., Any]]


def litgpt(weights: dict[str, Tensor], ids: Tensor) -> Tensor:
    """LitGPT's forward in float64, from its own names: ids [T] -> logits [T, V]."""
    w = {name: value.double() for name, value in weights.items()}

    def norm(x: Tensor, name: str) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * w[f"{name}.weight"]

    def rope(x: Tensor) -> Tensor:  # [heads, T, K]
        theta = ROPE_BASE ** -(torch.arange(0, HEAD, 2).double() / HEAD)
        angle = (torch.arange(x.shape[1])[:, None] * theta).repeat(1, 2)
        first, second = x.chunk(2, dim=-1)
        return x * angle.cos() + torch.cat((-second, first), -1) * angle.sin()

    def heads(x: Tensor, at: str) -> tuple[Tensor, Tensor, Tensor]:
        if f"{at}attn.qkv.weight" in w:
            qkv = x @ w[f"{at}attn.qkv.weight"].T + w[f"{at}attn.qkv.bias"]
            parts = qkv.split([HEADS * HEAD, GROUPS * HEAD, GROUPS * HEAD], dim=-1)
            q, k, v = (p.unflatten(-1, (-1, HEAD)).transpose(0, 1) for p in parts)
        else:  # the older name: of each group its queries, its key, its value
            qkv = x @ w[f"{at}attn.attn.weight"].T + w[f"{at}attn.attn.bias"]
            grouped = qkv.unflatten(-1, (GROUPS, HEADS // GROUPS + 2, HEAD)).permute(1, 2, 0, 3)
            q = grouped[:, :-2].flatten(0, 1)
            k, v = grouped[:, -2], grouped[:, -1]
        return q, k, v

    x = w["transformer.wte.weight"][ids]
    mask = torch.ones(len(ids), len(ids)).tril().log()
    for layer in range(LAYERS):
        at = f"transformer.h.{layer}."
        q, k, v = heads(norm(x, f"{at}norm_1"), at)
        k, v = (t.repeat_interleave(HEADS // GROUPS, dim=0) for t in (rope(k), v))
        scores = (rope(q) @ k.mT / HEAD**0.5 + mask).softmax(-1)
        x = x + (scores @ v).transpose(0, 1).flatten(1) @ w[f"{at}attn.proj.weight"].T
        y = norm(x, f"{at}norm_2")
        y = F.silu(y @ w[f"{at}mlp.fc_1.weight"].T) * (y @ w[f"{at}mlp.fc_2.weight"].T)
        x = x + y @ w[f"{at}mlp.proj.weight"].T
    return norm(x, "transformer.ln_f") @ w["lm_head.weight"].T


@torch.no_grad()
@pytest.mark.parametrize("older", [False, True])
def test_numbers_are_those_of_the_source(
    write: Writers, tower: Qwen2_5OmniAudioEncoder, tmp_path: Path, older: bool
) -> None:
    source = write["published"](tmp_path / "source", tower, older)
    report = convert(tmp_path / "source", tmp_path / "ours", trust_pickle=True)
    model = load(tmp_path / "ours")
    ids = torch.randint(151_936, (37,), generator=torch.Generator().manual_seed(0))
    hidden = model.decoder.sequence(model.decoder.embed(ids)[None])[0]
    assert relative_error(model.decoder.logits(hidden), litgpt(source, ids)) < BOUND

    frames = torch.randn(3, 40, MEL_BINS, generator=torch.Generator().manual_seed(1))
    lengths = torch.tensor([40, 40, 40])
    theirs = tower(
        frames.flatten(0, 1).T.contiguous(), feature_lens=lengths, aftercnn_lens=(lengths - 1) // 2 + 1
    )
    ours = model.encoder.encode(frames).flatten(0, 1)
    assert relative_error(ours, theirs.last_hidden_state) < BOUND
    assert report.source_format == "published" and report.cast == {}
    assert report.tensors == len(model.weights) and report.weight_bytes == model.weight_bytes
    assert [name.split(":")[1] for name in report.unused] == ["audio_bos_eos_token.weight"]


def test_config_tokenizer_and_protocol_come_along(published_master: Path, tmp_path: Path) -> None:
    config = convert(published_master, tmp_path / "heard", trust_pickle=True).config
    model = load(tmp_path / "heard")
    assert model.config == config and config.name == "heard"
    d, e = config.decoder, config.encoder
    assert (d.layers, d.width, d.heads, d.kv_heads, d.head_width, d.ffn) == (2, 16, 4, 2, 4, 24)
    assert (d.vocab, d.vocab_padded, d.rope_base, d.norm_eps, d.tied) == (151_921, 151_936, 5e5, 1e-6, False)
    assert (e.layers, e.width, e.heads, e.ffn, e.block_frames) == (2, 16, 2, 24, 80)
    assert (config.tokens, config.system_prompt) == (PUBLISHED_TOKENS, PUBLISHED_SYSTEM_PROMPT)
    source = (published_master / "tokenizer.json").read_text()
    assert model.tokenizer.encode("a word") == list(b"a word") and "<|last|>" in source
    assert model.tokenizer.vocab_size == 151_921
    engine = Engine(model, EngineConfig(max_sessions=1))
    session = engine.open()
    session.push(random_sound(0.8))
    engine.run_until_idle()
    assert [e.type for e in session.poll()].count("decision") == 2


@pytest.mark.parametrize("wanted", [None, "float32", "bfloat16", "float16"])
def test_dtypes(published: Path, tmp_path: Path, wanted: str | None) -> None:
    """One dtype comes out: the one asked for, or that of the decoder's embedding; every cast is told."""
    shards = sorted(published.glob("*.safetensors"))
    held = [safetensors.torch.load_file(shard) for shard in shards]
    for shard, weights in zip(shards, held, strict=True):
        safetensors.torch.save_file({n: t.bfloat16() for n, t in weights.items()}, shard)
    report = convert(published, tmp_path / "ours", trust_pickle=True, dtype=wanted)
    model = load(tmp_path / "ours")
    target = getattr(torch, wanted or "bfloat16")
    assert report.dtype == target and {t.dtype for t in model.weights.values()} == {target}
    embedding = next(w["transformer.wte.weight"] for w in held if "transformer.wte.weight" in w)
    assert torch.equal(model.weights["decoder.embed.weight"], embedding.bfloat16().to(target))
    decoder = sum(len(weights) for weights in held)
    tower = len(torch.load(published / "audiointeraction_ChunkwisedEncoder.pth", weights_only=True)) - 1
    want = {"torch.float32": tower, "torch.bfloat16": decoder}
    want.pop(str(target), None)
    assert report.cast == want
    again = torch.load(published / "audiointeraction_ChunkwisedEncoder.pth", weights_only=True)
    assert torch.equal(model.weights["encoder.conv1.weight"], again["conv1.weight"].to(target))


def test_a_yaml_number_with_an_exponent_alone_is_read(published: Path, tmp_path: Path) -> None:
    """YAML 1.1 takes `1e-06` for text; LitGPT writes it so."""
    path = published / "model_config.yaml"
    lines = [line for line in path.read_text().splitlines() if not line.startswith("norm_eps")]
    path.write_text("\n".join([*lines, "norm_eps: 1e-06", ""]))
    assert convert(published, tmp_path / "ours", trust_pickle=True).config.decoder.norm_eps == 1e-6


def test_progress_counts_every_byte(published_master: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    report = convert(
        published_master, tmp_path / "x", trust_pickle=True, progress=lambda *step: seen.append(step)
    )
    done = [step[0] for step in seen]
    assert done == sorted(set(done)) and len(seen) == report.tensors
    assert {total for _, total in seen} == {report.weight_bytes} == {done[-1]}


def test_a_shard_may_be_a_link_as_in_a_download_cache(published: Path, tmp_path: Path) -> None:
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for number, shard in enumerate(sorted(published.glob("*.safetensors"))):
        shard.rename(blobs / f"blob{number}")
        shard.symlink_to(blobs / f"blob{number}")
    convert(published, tmp_path / "ours", trust_pickle=True)
    assert load(tmp_path / "ours").weight_bytes > 0
