"""The CUDA kernels of mel, paged_attention, decide and sample, run on the CPU, as functions like the ops'.

Threads take turns in an order drawn from a seed, shared memory and results begin as NaN, asynchronous copies
arrive as late as they may (cuda_emulation). What runs on a GPU is the same source. How many blocks there are
is the tests' choice here, and the host's in test_cuda_launches.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from inspect import signature
from pathlib import Path
from struct import pack
from types import ModuleType
from typing import Any

import torch
from torch import Generator, Tensor

from fastloop.ops import REGISTRY
from fastloop.ops.mel import CLAMPS, EDGES

SOURCES = Path(__file__).resolve().parents[2] / "csrc" / "cuda"
OPS = ("mel", "paged_attention", "decide", "sample")
NAMES = {
    torch.float32: "f32",
    torch.bfloat16: "bf16",
    torch.float16: "f16",
    torch.float8_e4m3fn: "e4m3",
}


def generator(seed: int = 1) -> Generator:
    return torch.Generator().manual_seed(seed)


def poisoned(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.full(shape, torch.nan if dtype.is_floating_point else torch.iinfo(dtype).min, dtype=dtype)


def struct(fields: str, *values: Any) -> bytes:
    """A params struct as C lays it out; fields as in the module struct, P for the address of a tensor."""
    plain = [value.data_ptr() if isinstance(value, Tensor) else value for value in values]
    packed = pack("@" + fields, *plain)
    return packed + bytes(-len(packed) % 8)


def slots_map(pages: Tensor) -> bytes:
    """A tensor map of [slots, KV heads x head], boxes of up to 64 slots of a page and 64 columns, swizzled,
    as the host makes it (csrc/cuda/paged_attention.cpp) and tensor_map.h keeps it.
    """
    count, page, groups, head = pages.shape
    magic = int.from_bytes(b"tensor!!", "big")
    width = groups * head
    fields = struct("QPQQQIIII", magic, pages, width, count * page, 2 * width, 64, min(page, 64), 2, 3)
    return fields.ljust(128, b"\0")


def bound(op: str, args: tuple[Any, ...], named: dict[str, Any]) -> list[Any]:
    """A call of an op as [its tensors, in the order of the op's arguments and of the kernel's struct, the
    others...].
    """
    call = signature(REGISTRY[op].reference).bind(*args, **named)
    call.apply_defaults()
    values = list(call.arguments.values())
    tensors = [value for value in values if isinstance(value, Tensor)]
    return [tensors, *(value for value in values if not isinstance(value, Tensor))]


@dataclass
class Kernels:
    """Calls of the ops, with their arguments, as launches of the kernels.

    seed: of the order of threads; blocks: of a grid, or of a team, that may have any size; resident: clusters
    that run at the same time; held: whether sample keeps its logits in shared memory; wgmma: whether
    paged_attention runs the kernels for batches of listeners.
    """

    emulation: ModuleType
    seed: int = 0
    blocks: int = 3
    resident: int = 2
    held: bool = True
    wgmma: bool = False
    libraries: dict[str, Any] = field(default_factory=dict)

    def launch(
        self, kernel: str, grid: list[int], threads: int, *arguments: Any, shared: int = 0, cluster: int = 1
    ) -> None:
        op = next(op for op in OPS if kernel.startswith(op))
        if op not in self.libraries:
            self.libraries[op] = self.emulation.build([SOURCES / f"{op}.cu"])
        options = {"shared": shared, "cluster": cluster, "seed": self.seed, "resident": self.resident}
        self.libraries[op].launch(kernel, grid, [threads], *arguments, **options)

    def mel(self, *args: Any, **named: Any) -> Tensor:
        tensors, edge, clamp = bound("mel", args, named)
        pcm, filters = tensors[0], tensors[5]
        (streams, samples), bins = pcm.shape, len(filters)
        frames = poisoned(streams, samples // 160, bins)
        modes = EDGES.index(edge), 1 - CLAMPS.index(clamp)
        params = struct("PPPPPPPPqiiii", *tensors, frames, pcm.stride(0), samples, bins, *modes)
        self.launch("mel", [streams], 448, params, shared=100 * 1024)
        return frames

    def paged_attention(self, *args: Any, **named: Any) -> Tensor:
        tensors, *unscaled = bound("paged_attention", args, named)
        assert all(scale is None for scale in unscaled), "pages with scales are not these kernels'"
        q, k_pages, _, block_table, _, kv_lens, _ = tensors
        (_, heads, head), (page, groups) = q.shape, k_pages.shape[1:3]
        sums, scales = (poisoned(2 * self.blocks, groups, 128, width) for width in (head, 2))
        arrived = torch.zeros(self.blocks, groups, dtype=torch.int32)
        out = poisoned(*q.shape, dtype=q.dtype)
        names = NAMES[q.dtype], NAMES[k_pages.dtype], str(64 if head <= 64 else 128)
        params = struct(
            "PPPPPPPPPPPiiiiif", *tensors, out, sums, scales, arrived, len(kv_lens), heads, head, page,
            block_table.stride(0), head**-0.5,
        )  # fmt: skip
        if self.wgmma:
            assert names[0] == names[1] and head in (64, 128)
            maps = [slots_map(pages) for pages in tensors[1:3]]
            kernel = f"paged_attention_wgmma_{names[0]}_{names[2]}"
            self.launch(kernel, [self.blocks, groups], 384, *maps, params, shared=224 * 1024 + 560)
        else:
            kernel = "_".join(("paged_attention", *names))
            self.launch(kernel, [self.blocks, groups], 256, params, shared=128 * 1024)
        assert not arrived.any()
        return out

    def decide(self, *args: Any, **named: Any) -> tuple[Tensor, Tensor]:
        tensors, eps = bound("decide", args, named)
        x = tensors[0]
        rows, width = x.shape
        p, decision = poisoned(rows), poisoned(rows, dtype=torch.int32)
        aligned = width * x.element_size() % 16 == 0 and all(t.data_ptr() % 16 == 0 for t in tensors[:3])
        params = struct("PPPPPPPPqdiii", *tensors, p, decision, x.stride(0), eps, rows, width, aligned)
        team = {"shared": 12 * rows, "cluster": self.blocks}
        self.launch(f"decide_{NAMES[x.dtype]}", [self.blocks], 512, params, **team)
        return p, decision

    def sample(self, *args: Any, **named: Any) -> Tensor:
        (tensors,) = bound("sample", args, named)
        logits, banned = tensors[:2]
        rows, vocab = logits.shape
        tokens = poisoned(rows, dtype=torch.int64)
        slice_ = -(-vocab // self.blocks // 8) * 8
        aligned = vocab % 8 == 0 and all(t.data_ptr() % 16 == 0 for t in (logits, banned))
        params = struct(
            "PPPPPPPPPqiiii", *tensors, tokens, logits.stride(0), vocab, slice_, self.held, aligned
        )
        room = {"shared": 34 * 1024 + (4 * slice_ if self.held else 0), "cluster": self.blocks}
        self.launch(f"sample_{NAMES[logits.dtype]}", [rows * self.blocks], 512, params, **room)
        return tokens


@dataclass
class Emulated:
    """One op, as fastloop.testing calls implementations."""

    op: str
    kernels: Kernels

    def __call__(self, **arguments: Any) -> Any:
        return getattr(self.kernels, self.op)(**arguments)
