"""The 3B step on a CPU beside its rival, in one process: python bench/cpu_rivals.py --precision int8

Rival: PyTorch with transformers' Qwen2 at the published dims, random weights, every Linear in dynamic int8
(torch.ao.quantization.quantize_dynamic), attention by scaled_dot_product_attention over a DynamicCache; and
the audio tower's layers in the same way. Ours: the native engine in the precision asked for (with int4 the
encoder is int8). Calls alternate, so that what else the machine does hits both alike. The rival holds its
weights more than once; a third of the layers and of the vocabulary (--third) fits 24 GB, at equal ratios.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from transformers import DynamicCache, Qwen2Config, Qwen2ForCausalLM, WhisperConfig
from transformers.models.whisper.modeling_whisper import WhisperEncoderLayer

from fastloop.config import ModelConfig
from fastloop.testing.cpu_bench import CpuBench
from fastloop.testing.timing import side_by_side

ROUNDS = 3
RIVAL, OURS = "torch int8", "fastloop"


def quantised(module: nn.Module) -> nn.Module:
    """Random float32 weights, then dynamic int8, module by module: the whole never stands in float32."""
    module.to_empty(device="cpu")
    for parameter in module.parameters():
        parameter.data.normal_(std=0.02)
    return torch.ao.quantization.quantize_dynamic(module, {nn.Linear}, dtype=torch.qint8, inplace=True)


def language_model(config: ModelConfig) -> Qwen2ForCausalLM:
    c = config.decoder
    with torch.device("meta"):
        model = Qwen2ForCausalLM(
            Qwen2Config(
                vocab_size=c.vocab_padded,
                hidden_size=c.width,
                intermediate_size=c.ffn,
                num_hidden_layers=c.layers,
                num_attention_heads=c.heads,
                num_key_value_heads=c.kv_heads,
                rope_theta=c.rope_base,
                max_position_embeddings=32_768,
                tie_word_embeddings=False,
                attn_implementation="sdpa",
            )
        )
    for i, layer in enumerate(model.model.layers):
        model.model.layers[i] = quantised(layer)
    holder = nn.ModuleList([model.lm_head])
    model.lm_head = quantised(holder)[0]
    rotary = type(model.model.rotary_emb)(model.config)
    model.model.rotary_emb = rotary
    model.model.norm.to_empty(device="cpu").weight.data.fill_(1.0)
    return model.eval()


def decoder_call(model: Qwen2ForCausalLM, rows: int, context: int, logits: bool) -> Callable[[], object]:
    """`rows` embedded rows behind `context` positions; the cache is cut back after every call."""
    c = model.config
    width = c.hidden_size // c.num_attention_heads
    cache = DynamicCache()
    for layer in range(c.num_hidden_layers if context else 0):
        keys = torch.randn(1, c.num_key_value_heads, context, width)
        cache.update(keys, keys.clone(), layer)
    x = torch.randn(1, rows, c.hidden_size)

    def call() -> object:
        with torch.inference_mode():
            hidden = model.model(inputs_embeds=x, past_key_values=cache, use_cache=True).last_hidden_state
            cache.crop(context)
            return model.lm_head(hidden[:, -1:]) if logits else hidden

    return call


def encoder_call(config: ModelConfig) -> Callable[[], object]:
    """The layers of the audio tower on the 20 positions of a chunk (without stem and head: in its favour)."""
    e = config.encoder
    whisper = WhisperConfig(
        d_model=e.width, encoder_attention_heads=e.heads, encoder_ffn_dim=e.ffn, encoder_layers=e.layers
    )
    whisper._attn_implementation = "sdpa"
    layers = []
    for _ in range(e.layers):
        with torch.device("meta"):
            layer = WhisperEncoderLayer(whisper)
        layers.append(quantised(layer).eval())
    x = torch.randn(1, config.chunk_frames // 2, e.width)

    def call() -> object:
        with torch.inference_mode():
            y = x
            for layer in layers:
                y = layer(y, None, None)[0]
            return y

    return call


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--precision", choices=("int8", "int4"), default="int8")
    parser.add_argument("--third", action="store_true", help="a third of the decoder's layers and vocabulary")
    parser.add_argument("--contexts", default="0,1024,4096")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    ours = CpuBench("3b-third" if given.third else "3b", given.precision, given.threads)
    config = ours.config
    model = language_model(config)
    rows_of = {"listening step": config.chunk_rows, "text token": 1}
    results = []

    def compare(name: str, context: int, calls: dict[str, Callable[[], object]]) -> None:
        times = side_by_side(calls, ROUNDS, block=2)
        best = {who: t.minimum * 1e3 for who, t in times.items()}
        told = ", ".join(f"{who} {ms:.1f} ms" for who, ms in best.items())
        print(f"{name}, context {context}: {told}: {best[RIVAL] / best[OURS]:.2f}x", flush=True)
        results.append({"name": name, "context": context, "minimum_ms": best})
        if given.json:
            given.json.write_text(json.dumps(vars(given) | {"json": None, "results": results}, indent=1))

    compare("encoder", 0, {RIVAL: encoder_call(config), OURS: ours.encoder_call(1)})
    for context in map(int, given.contexts.split(",")):
        for name, rows in rows_of.items():
            logits = name == "text token"
            theirs = decoder_call(model, rows, context, logits)
            compare(name, context, {RIVAL: theirs, OURS: ours.step_call(rows, 1, context, logits)})


if __name__ == "__main__":
    main()
