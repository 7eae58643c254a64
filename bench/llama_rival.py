"""llama.cpp as a rival on the CPU: the decoder's dims with random weights in a GGUF file, and its calls.

Needs llama-cpp-python, which compiles itself for this machine, and gguf; fastloop itself needs neither:
CMAKE_ARGS="-DLLAVA_BUILD=OFF -DLLAMA_OPENSSL=OFF" pip install llama-cpp-python gguf
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from pathlib import Path

import gguf
import llama_cpp as api
import numpy as np
import torch

from fastloop.config import DecoderConfig

VERSION = str(api.__version__)
TILE = 1 << 20  # random values; every matrix repeats them
FILL_ROWS = 512  # of one call that fills the cache
WAYS = {"": api.LLAMA_FLASH_ATTN_TYPE_DISABLED, " flash": api.LLAMA_FLASH_ATTN_TYPE_ENABLED}


def write_model(path: Path, c: DecoderConfig, precision: str) -> None:
    """Every matrix in `precision` (Q8_0, Q4_0), the head, tied to the embedding, too: the least bytes.

    Matrices are written one by one. The vocabulary is cut to a multiple of 32 rows, as llama.cpp interleaves
    Q4_0 only in eights of rows.
    """
    kind = gguf.GGMLQuantizationType[precision]
    writer = gguf.GGUFWriter(path, "qwen2")
    vocab = c.vocab_padded // 32 * 32
    writer.add_context_length(32_768)
    writer.add_embedding_length(c.width)
    writer.add_block_count(c.layers)
    writer.add_feed_forward_length(c.ffn)
    writer.add_head_count(c.heads)
    writer.add_head_count_kv(c.kv_heads)
    writer.add_rope_dimension_count(c.head_width)
    writer.add_rope_freq_base(c.rope_base)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(vocab)
    writer.add_tokenizer_model("none")
    shapes = dict(_shapes(c, vocab))
    for name, shape in shapes.items():
        if len(shape) == 1:
            writer.add_tensor_info(name, shape, np.dtype(np.float32), 4 * shape[0])
        else:
            stored = gguf.quant_shape_to_byte_shape(shape, kind)
            writer.add_tensor_info(name, stored, np.dtype(np.uint8), int(np.prod(stored)), kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    normal = np.random.default_rng(0).standard_normal(TILE, dtype=np.float32)
    tiles: dict[int, np.ndarray] = {}
    for name, shape in shapes.items():
        if len(shape) == 1:
            writer.write_tensor_data(np.full(shape, "norm" in name, np.float32))
            continue
        inputs = shape[1]
        if inputs not in tiles:
            tiles[inputs] = gguf.quantize(normal.reshape(-1, 1024) * inputs**-0.5, kind).ravel()
        writer.write_tensor_data(np.resize(tiles[inputs], gguf.quant_shape_to_byte_shape(shape, kind)))
    writer.close()


def _shapes(c: DecoderConfig, vocab: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Tensors of a Qwen2 by their names in GGUF: [outputs, inputs] or [channels]."""
    yield "token_embd.weight", (vocab, c.width)
    yield "output_norm.weight", (c.width,)
    queries, keys = c.heads * c.head_width, c.kv_heads * c.head_width
    for i in range(c.layers):
        yield f"blk.{i}.attn_norm.weight", (c.width,)
        for name, outputs in (("q", queries), ("k", keys), ("v", keys)):
            yield f"blk.{i}.attn_{name}.weight", (outputs, c.width)
            yield f"blk.{i}.attn_{name}.bias", (outputs,)
        yield f"blk.{i}.attn_output.weight", (c.width, queries)
        yield f"blk.{i}.ffn_norm.weight", (c.width,)
        yield f"blk.{i}.ffn_gate.weight", (c.ffn, c.width)
        yield f"blk.{i}.ffn_up.weight", (c.ffn, c.width)
        yield f"blk.{i}.ffn_down.weight", (c.width, c.ffn)


@api.llama_log_callback
def _errors_only(level: int, text: bytes, data: ctypes.c_void_p) -> None:
    if level == 4:  # GGML_LOG_LEVEL_ERROR
        print(text.decode(errors="replace"), end="", flush=True)


class LlamaModel:
    """A loaded file, with one cache (float16) for each way of attention: plain and flash."""

    def __init__(self, path: Path, threads: int, positions: int) -> None:
        api.llama_log_set(_errors_only, ctypes.c_void_p(0))
        api.llama_backend_init()
        params = api.llama_model_default_params()
        params.load_mode = api.LLAMA_LOAD_MODE_NONE  # read, not mapped: nothing is fetched from a disk later
        self.model = api.llama_model_load_from_file(str(path).encode(), params)
        if not self.model:
            raise RuntimeError(f"{path}: llama.cpp cannot load it")
        self.width = api.llama_model_n_embd(self.model)
        self.contexts = {way: self._context(kind, threads, positions) for way, kind in WAYS.items()}

    def _context(self, flash: int, threads: int, positions: int) -> object:
        params = api.llama_context_default_params()
        params.n_ctx = positions
        params.n_batch = params.n_ubatch = FILL_ROWS
        params.n_threads = params.n_threads_batch = threads
        params.flash_attn_type = flash
        context = api.llama_init_from_model(self.model, params)
        if not context:
            raise RuntimeError(f"llama.cpp makes no context of {positions} positions")
        return context

    def fill(self, positions: int) -> None:
        """Positions up to this one, of random rows, into every cache; those already there stay."""
        for context in self.contexts.values():
            memory = api.llama_get_memory(context)
            while (held := api.llama_memory_seq_pos_max(memory, 0) + 1) < positions:
                batch = self._batch(min(FILL_ROWS, positions - held), held, logits=False)
                self._decode(context, batch)
                api.llama_batch_free(batch)

    def calls(self, rows: int, position: int, logits: bool) -> dict[str, Callable[[], object]]:
        """By way of attention: `rows` embedded rows behind `position` others; the cache is cut back after.

        `logits` are of the last row. Without them llama.cpp leaves out the last layer's MLP as well: in its
        favour.
        """
        self.fill(position)

        def call_of(context: object) -> Callable[[], object]:
            batch, memory = self._batch(rows, position, logits), api.llama_get_memory(context)

            def call() -> None:
                self._decode(context, batch)
                api.llama_memory_seq_rm(memory, 0, position, -1)

            return call

        return {way: call_of(context) for way, context in self.contexts.items()}

    def _batch(self, rows: int, position: int, logits: bool) -> api.llama_batch:
        batch = api.llama_batch_init(rows, self.width, 1)
        batch.n_tokens = rows
        x = torch.randn(rows, self.width)
        ctypes.memmove(batch.embd, x.data_ptr(), x.nbytes)
        for row in range(rows):
            batch.pos[row] = position + row
            batch.n_seq_id[row] = 1
            batch.seq_id[row][0] = 0
            batch.logits[row] = logits and row == rows - 1
        return batch

    @staticmethod
    def _decode(context: object, batch: api.llama_batch) -> None:
        if (status := api.llama_decode(context, batch)) != 0:
            raise RuntimeError(f"llama_decode of {batch.n_tokens} rows returned {status}")
        api.llama_synchronize(context)
