"""The 3B step on a CPU beside its rivals, in one process: python bench/cpu_rivals.py --precision int8

Rivals: PyTorch with transformers' Qwen2 at the published dims, random weights, every Linear in dynamic int8
(torch.ao.quantization.quantize_dynamic), attention by scaled_dot_product_attention over a DynamicCache; the
audio tower's layers in the same way; and, where llama-cpp-python and gguf are installed, llama.cpp at the
same dims in Q8_0 and Q4_0, with plain or flash attention, whichever is faster. Ours: the native engine in the
precision asked for (with int4 the encoder is int8). Calls alternate, so that what else the machine does hits
all alike. Where memory is short, a third of the layers and of the vocabulary (--size 3b-third: 9 GB) gives
much the same ratios.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from gpu.machine import stamp
from torch import nn
from transformers import DynamicCache, Qwen2Config, Qwen2ForCausalLM, WhisperConfig
from transformers.models.whisper.modeling_whisper import WhisperEncoderLayer

from fastloop.config import ModelConfig
from fastloop.testing.cpu_bench import SIZES, CpuBench
from fastloop.testing.timing import Timing, side_by_side

ABSENT: str | None = None  # the module for want of which llama.cpp takes no part
try:
    import llama_rival
except ModuleNotFoundError as error:
    ABSENT = error.name

OURS, TORCH = "fastloop", "torch int8"
LLAMA = {"llama.cpp Q8_0": "Q8_0", "llama.cpp Q4_0": "Q4_0"}


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
    holder = nn.ModuleList([model.lm_head])
    model.lm_head = quantised(holder)[0]  # first: while it is packed, 3b takes 14 GB
    for i, layer in enumerate(model.model.layers):
        model.model.layers[i] = quantised(layer)
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


def llama_model(config: ModelConfig, precision: str, threads: int, room: int) -> llama_rival.LlamaModel:
    """Random weights, by way of a file; caches of `room` positions."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.gguf"
        llama_rival.write_model(file, config.decoder, precision)
        return llama_rival.LlamaModel(file, threads, room)


def of_rivals(every: dict[str, Timing]) -> dict[str, Timing]:
    """By rival: of llama.cpp's two ways of attention the one whose best call is shorter."""
    best: dict[str, Timing] = {}
    for name, timing in every.items():
        if name != OURS:
            rival = name.removesuffix(" flash")
            best[rival] = min(best.get(rival, timing), timing, key=lambda t: t.minimum)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--precision", choices=("int8", "int4"), default="int8")
    parser.add_argument("--size", choices=SIZES, default="3b")
    parser.add_argument("--contexts", default="0,1024,4096")
    parser.add_argument("--without", choices=(TORCH, *LLAMA), action="append", default=[])
    parser.add_argument("--rounds", type=int, default=5, help="of two calls each")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    contexts = sorted(map(int, given.contexts.split(",")))  # llama.cpp's caches are filled on and on
    torch.set_num_threads(given.threads)
    config, versions = SIZES[given.size](), {}
    model = None
    if TORCH not in given.without:  # first, for the memory its packing takes
        model = language_model(config)
        versions[TORCH] = f"torch {torch.__version__}, transformers {transformers.__version__}"
    ours = CpuBench(given.size, given.precision, given.threads)
    llama = {name: precision for name, precision in LLAMA.items() if name not in given.without}
    if llama and ABSENT:
        print(f"absent: {', '.join(llama)} (no module {ABSENT})", flush=True)
        llama = {}
    loaded = {n: llama_model(config, p, given.threads, contexts[-1] + 256) for n, p in llama.items()}
    if loaded:
        versions |= dict.fromkeys(loaded, f"llama-cpp-python {llama_rival.VERSION}")
    results = []

    def compare(name: str, context: int, calls: dict[str, Callable[[], object]]) -> None:
        every = side_by_side(calls, given.rounds, block=2)
        rivals, own = of_rivals(every), every[OURS]
        told = [f"{name}, context {context}: {OURS} {own.median * 1e3:.1f} ({own.minimum * 1e3:.1f}) ms"]
        told += [
            f"{rival} {t.median * 1e3:.1f} ({t.minimum * 1e3:.1f}): "
            f"{t.median / own.median:.2f}x ({t.minimum / own.minimum:.2f}x)"
            for rival, t in rivals.items()
        ]
        print("; ".join(told), flush=True)
        results.append(
            {
                "name": name,
                "context": context,
                "median_ms": {who: t.median * 1e3 for who, t in every.items()},
                "minimum_ms": {who: t.minimum * 1e3 for who, t in every.items()},
                "times_faster": {who: t.minimum / own.minimum for who, t in rivals.items()},
            }
        )
        if given.json:
            told_of = stamp() | vars(given) | {"json": None, "versions": versions, "results": results}
            given.json.write_text(json.dumps(told_of, indent=1) + "\n")

    print("median (minimum), and how many times ours", flush=True)
    if model:
        compare("encoder", 0, {TORCH: encoder_call(config), OURS: ours.encoder_call(1)})
    for context in contexts:
        for name, rows in {"listening step": config.chunk_rows, "text token": 1}.items():
            logits = name == "text token"
            calls: dict[str, Callable[[], object]] = {OURS: ours.step_call(rows, 1, context, logits)}
            if model:
                calls[TORCH] = decoder_call(model, rows, context, logits)
            for rival, theirs in loaded.items():
                calls |= {rival + way: call for way, call in theirs.calls(rows, context, logits).items()}
            compare(name, context, calls)


if __name__ == "__main__":
    main()
