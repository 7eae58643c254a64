"""The CUDA C++ kernels of csrc/cuda as backend "cuda": each op on tensors of a GPU, on torch's stream.

The compiled part (csrc/include/fastloop_cuda.h) plans and launches; images come from cuda_images. A kernel is
the default of its op for the calls that a results file shows it right and faster for (`DEFAULTS`,
tests/ops/test_defaults.py), where its image is there or can be compiled.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..config import HOP_SAMPLES
from .cuda_images import architecture, image
from .decide import _check as check_decide
from .dependent import are_dependent
from .dispatch import BackendError, Limits, Op, Refuses
from .linear import EPILOGUES
from .linear import _check as check_linear
from .linear_quantised import check_quantised
from .mel import CLAMPS, EDGES, check_mel
from .native import FLOAT32, address, check_in_place, native, reason, require_native, rows_of
from .paged_attention import _check as check_paged_attention
from .sample import _check as check_sample

BFLOAT16 = (torch.bfloat16,)
FORMATS = {torch.float8_e4m3fn: 1, torch.uint8: 2}  # fastloop_cuda_weights of quantised ones
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn)  # in fastloop_cuda_dtype's order
PAGES = {  # paged_attention: q's dtype -> those of the pages
    torch.float32: (torch.float32, torch.bfloat16),
    torch.bfloat16: (torch.bfloat16, torch.float8_e4m3fn),
    torch.float16: (torch.float16,),
}


ATTENTION = ("by shape", "mma", "wgmma")  # paged_attention's kernels, in fastloop_cuda_attention's order


@dataclass(frozen=True)
class Gpu:
    """One device as the launches see it: its kernels, its stream, its scratch memory."""

    device: torch.device
    modules: dict[str, Any] = field(default_factory=dict)  # op -> fastloop._native.cuda.Module
    scratch: dict[tuple[str, int], Tensor] = field(
        default_factory=dict
    )  # (op, stream) -> what its calls share

    def module(self, op: str) -> Any:
        """The op's kernels, loaded with the first call; two threads may load them twice, once too often."""
        if op not in self.modules:
            try:
                cuda = require_native().cuda
                found = cuda.describe(self.device.index)
                code = image(op, architecture(found["major"], found["minor"]))
                self.modules[op] = cuda.Module(self.device.index, code)
            except (ImportError, ValueError) as error:
                raise BackendError(f"op {op}: backend 'cuda' cannot run ({error})") from error
        return self.modules[op]

    def stream(self) -> int:
        """torch's current one."""
        return torch.cuda.current_stream(self.device).cuda_stream

    def workspace(self, op: str, size: int) -> Tensor | None:
        """Zeros, which kernels leave as zeros where it matters (their counters); None for no bytes.

        Calls of an op on one stream follow each other, so they share it; another op would not find zeros
        where its counters are. A capture gets its own, zeroed by the graph: several may be replayed at once.
        """
        if size == 0:
            return None
        if torch.cuda.is_current_stream_capturing():
            return torch.zeros(size, dtype=torch.uint8, device=self.device)
        place = (op, self.stream())
        kept = self.scratch.get(place)
        if kept is None or kept.numel() < size:
            kept = self.scratch[place] = torch.zeros(size, dtype=torch.uint8, device=self.device)
        return kept


@functools.cache
def gpu(device: torch.device) -> Gpu:
    """The one of a device with an index."""
    return Gpu(device)


def gpu_of(op: str, **tensors: Tensor | None) -> Gpu:
    """The GPU that all of them are on; an error names the one that is elsewhere."""
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    home = next(iter(given.values())).device
    if home.type != "cuda":
        raise BackendError(
            f"{op}: backend 'cuda' runs on CUDA tensors, got {home}; move them or change FASTLOOP_BACKEND"
        )
    for name, tensor in given.items():
        if tensor.device != home:
            raise ValueError(f"{op}: {name} is on {tensor.device}, the others on {home}; move one of them")
    return gpu(home)


def _launch(home: Gpu, op: str, call: Any) -> None:
    """A planned call, such as fastloop._native.cuda.Linear, on torch's stream with its scratch memory."""
    workspace = home.workspace(op, call.workspace_bytes)
    call.launch(
        workspace=address(workspace),
        workspace_bytes=0 if workspace is None else workspace.numel(),
        dependent=are_dependent(),
        stream=home.stream(),
    )


def linear_cuda(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    epilogue: str = "none",
    residual: Tensor | None = None,
    splits: int = 0,
) -> Tensor:
    """`linear_ref` on a GPU (csrc/cuda/linear.cu), all in bfloat16: x [N, D], weight [O, D], bias [O],
    residual [N, O'] -> y [N, O']. Sums and epilogue are in float32 and rounded once. Any N; made for 1 to 64.

    splits: ranges of the depth that blocks sum apart, for tuning; 0 leaves it to the size of the device.
    """
    width = check_linear(x, weight, bias, epilogue, residual)
    weight = rows_of(weight)
    return _linear(x, weight, width, bias, epilogue, residual, splits=splits)


def linear_quantised_cuda(
    x: Tensor,
    values: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    epilogue: str = "none",
    residual: Tensor | None = None,
    splits: int = 0,
) -> Tensor:
    """`linear_cuda` with weights that are widened to bfloat16 on their way into the products: values
    float8_e4m3fn [O, D] with scale float32 [O], D a multiple of 16, or uint8 [O, D / 2] (two int4 a byte)
    with scale bfloat16 [O, D / 32] or [O, D / 64]. x is not quantised.
    """
    group, width = check_quantised(x, values, scale, bias, epilogue, residual)
    if values.dtype not in FORMATS:
        raise TypeError(
            "linear_quantised: backend 'cuda' takes torch.float8_e4m3fn or two int4 in torch.uint8, got "
            f"{values.dtype}"
        )
    values, scale = values.contiguous(), scale.contiguous()
    return _linear(x, values, width, bias, epilogue, residual, scale, group, splits)


def _linear(
    x: Tensor,
    weight: Tensor,
    width: int,
    bias: Tensor | None,
    epilogue: str,
    residual: Tensor | None,
    scale: Tensor | None = None,
    group: int = 0,
    splits: int = 0,
) -> Tensor:
    """Both of them; weight as it is stored, its rows contiguous."""
    home = gpu_of("linear", x=x, weight=weight, bias=bias, residual=residual, scale=scale)
    if x.dtype != torch.bfloat16:
        raise TypeError(
            f"linear: backend 'cuda' takes torch.bfloat16, got {x.dtype}; convert it with .bfloat16()"
        )
    x = rows_of(x)
    bias = None if bias is None else bias.contiguous()
    residual = None if residual is None else rows_of(residual)
    y = x.new_empty(x.shape[0], width)
    call = require_native().cuda.Linear(
        module=home.module("linear"),
        rows=x.shape[0],
        in_=x.shape[1],
        out_rows=weight.shape[0],
        x=address(x),
        x_stride=x.stride(0),
        weight=address(weight),
        weight_stride=weight.stride(0),
        bias=address(bias),
        epilogue=EPILOGUES.index(epilogue) % 2,
        gated=epilogue == "silu_gate",
        residual=address(residual),
        residual_stride=0 if residual is None else residual.stride(0),
        out=address(y),
        out_stride=width,
        splits=splits,
        weight_format=FORMATS.get(weight.dtype, 0),
        scale=address(scale),
        group=group,
    )
    _launch(home, "linear", call)
    return y


def mel_cuda(
    pcm: Tensor,
    slots: Tensor,
    tail: Tensor,
    peak: Tensor,
    seen: Tensor,
    filters: Tensor,
    bands: Tensor,
    edge: str = "reflect",
    clamp: str = "running",
) -> Tensor:
    """`mel_ref` on a GPU (csrc/cuda/mel.cu), up to 256 bins: pcm float32 [B, S], slots int64 [B], filters
    float32 [C, 201], bands int32 [C, 2] -> frames float32 [B, S // 160, C]; the state is changed in place.
    """
    check_mel((pcm, slots, tail, peak, seen, filters, bands), edge, clamp)
    home = gpu_of("mel", pcm=pcm)
    for name, state in (("tail", tail), ("peak", peak), ("seen", seen)):
        check_in_place("mel", name, state)
    batch, samples = pcm.shape
    pcm, slots, filters, bands = rows_of(pcm), slots.contiguous(), filters.contiguous(), bands.contiguous()
    frames = pcm.new_empty(batch, samples // HOP_SAMPLES, len(filters))
    require_native().cuda.mel(
        module=home.module("mel"),
        batch=batch,
        samples=samples,
        pcm=address(pcm),
        pcm_stride=pcm.stride(0),
        slots=address(slots),
        slot_count=len(peak),
        tail=address(tail),
        peak=address(peak),
        seen=address(seen),
        bins=len(filters),
        filters=address(filters),
        bands=address(bands),
        edge=EDGES.index(edge),
        clamp=CLAMPS.index(clamp),
        frames=address(frames),
        dependent=are_dependent(),
        stream=home.stream(),
    )
    return frames


def paged_attention_cuda(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    block_table: Tensor,
    row_starts: Tensor,
    kv_lens: Tensor,
    gaps: Tensor,
    blocks: int = 0,
    kernel: str = "by shape",
) -> Tensor:
    """`paged_attention_ref` on a GPU (csrc/cuda/paged_attention.cu): q [N, H, K], pages [P, Q, G, K],
    block_table int32 [B, M], row_starts int32 [B + 1], kv_lens int32 [B], gaps int32 [B, 2] -> [N, H, K] in
    q's dtype.

    q bfloat16 with pages of bfloat16 or float8_e4m3fn, float16 with float16, float32 with float32 or bfloat16
    (without tensor cores); K is a multiple of 8 (16 for float8) up to 128. Equal inputs give equal bits.

    blocks: that share the work of a KV head, for tuning; 0 leaves it to the size of the device.
    kernel: one of ATTENTION, for tests and benchmarks; "wgmma" is for batches of listeners on sm_90, with
    pages in q's 16 bits, of 8, 16, 32 or a multiple of 64 tokens, and K of 64 or 128.
    """
    if kernel not in ATTENTION:
        raise ValueError(f"paged_attention: kernel must be one of {', '.join(ATTENTION)}, got {kernel!r}")
    check_paged_attention(q, k_pages, v_pages, block_table, row_starts, kv_lens, gaps)
    home = gpu_of(
        "paged_attention", q=q, k_pages=k_pages, v_pages=v_pages, block_table=block_table,
        row_starts=row_starts, kv_lens=kv_lens, gaps=gaps,
    )  # fmt: skip
    for name, pages in (("k_pages", k_pages), ("v_pages", v_pages)):
        if not pages.is_contiguous():
            raise ValueError(f"paged_attention: {name} must be contiguous; the pool is not copied")
    (rows, heads, width), (page, groups) = q.shape, k_pages.shape[1:3]
    q, table, row_starts = q.contiguous(), rows_of(block_table), row_starts.contiguous()
    kv_lens, gaps = kv_lens.contiguous(), gaps.contiguous()
    out = torch.empty_like(q)
    call = require_native().cuda.PagedAttention(
        module=home.module("paged_attention"),
        dtype=_dtype("paged_attention", "q", q),
        page_dtype=_dtype("paged_attention", "k_pages", k_pages),
        rows=rows,
        sequences=len(kv_lens),
        heads=heads,
        q=address(q),
        k_pages=address(k_pages),
        v_pages=address(v_pages),
        page_tokens=page,
        kv_heads=groups,
        head_width=width,
        row_starts=address(row_starts),
        block_table=address(table),
        table_width=table.shape[1],
        table_stride=table.stride(0),
        kv_lens=address(kv_lens),
        gaps=address(gaps),
        out=address(out),
        blocks=blocks,
        kernel=ATTENTION.index(kernel),
    )
    _launch(home, "paged_attention", call)
    return out


def decide_cuda(
    x: Tensor,
    norm_weight: Tensor,
    eps: float,
    head: Tensor,
    slots: Tensor,
    policy: Tensor,
    state: Tensor,
) -> tuple[Tensor, Tensor]:
    """`decide_ref` on a GPU (csrc/cuda/decide.cu): x [R, D], norm_weight [D], head [2, D] of float32,
    bfloat16 or float16, slots int64 [R], policy float32 [Z, 3], state int32 [Z, 2] (changed in place) ->
    p(respond) float32 [R], decision int32 [R]. In float64, logits are not rounded to x's dtype.
    """
    check_decide(x, norm_weight, head, slots, policy, state)
    home = gpu_of("decide", x=x, norm_weight=norm_weight, head=head, slots=slots, policy=policy, state=state)
    check_in_place("decide", "state", state)
    x, norm_weight, head = rows_of(x), norm_weight.contiguous(), head.contiguous()
    slots, policy = slots.contiguous(), policy.contiguous()
    p = x.new_empty(len(x), dtype=torch.float32)
    decision = x.new_empty(len(x), dtype=torch.int32)
    require_native().cuda.decide(
        module=home.module("decide"),
        dtype=_dtype("decide", "x", x),
        rows=x.shape[0],
        width=x.shape[1],
        x=address(x),
        x_stride=x.stride(0),
        norm_weight=address(norm_weight),
        eps=eps,
        head=address(head),
        slots=address(slots),
        slot_count=len(state),
        policy=address(policy),
        state=address(state),
        p_respond=address(p),
        decision=address(decision),
        dependent=are_dependent(),
        stream=home.stream(),
    )
    return p, decision


def sample_cuda(
    logits: Tensor,
    banned: Tensor,
    phase: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    seed: Tensor,
    counter: Tensor,
) -> Tensor:
    """`sample_ref` on a GPU (csrc/cuda/sample.cu): logits [R, V] of float32, bfloat16 or float16, banned bool
    [phases, V], phase int64 [R], temperature and top_p float32 [R], top_k, seed and counter int64 [R] -> ids
    int64 [R]; the same tokens, unless a draw lies within about 1e-11 of a step of the distribution.
    """
    check_sample(logits, banned, phase, temperature, top_k, top_p, seed, counter)
    home = gpu_of("sample", logits=logits, banned=banned, phase=phase, temperature=temperature, top_k=top_k)
    logits, banned = rows_of(logits), banned.contiguous()
    options = [t.contiguous() for t in (phase, temperature, top_k, top_p, seed, counter)]
    names = ("phase", "temperature", "top_k", "top_p", "seed", "counter")
    tokens = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
    require_native().cuda.sample(
        module=home.module("sample"),
        dtype=_dtype("sample", "logits", logits),
        rows=logits.shape[0],
        vocab=logits.shape[1],
        logits=address(logits),
        logits_stride=logits.stride(0),
        banned=address(banned),
        tokens=address(tokens),
        dependent=are_dependent(),
        stream=home.stream(),
        **{name: address(option) for name, option in zip(names, options, strict=True)},
    )
    return tokens


def _dtype(op: str, name: str, tensor: Tensor) -> int:
    """fastloop_cuda_dtype of a tensor; TypeError where there is none."""
    if tensor.dtype not in DTYPES:
        known = ", ".join(str(dtype) for dtype in DTYPES)
        raise TypeError(f"{op}: backend 'cuda' takes {name} in {known}, got {tensor.dtype}; convert it")
    return DTYPES.index(tensor.dtype)


KERNELS: dict[str, tuple[Callable[..., Any], Limits]] = {  # op -> its function, what that takes
    "linear": (linear_cuda, {"x": BFLOAT16}),
    "linear_quantised": (
        linear_quantised_cuda,
        {"x": BFLOAT16, "values": tuple(FORMATS)},
    ),
    "mel": (mel_cuda, {"pcm": FLOAT32}),
    "paged_attention": (paged_attention_cuda, {"q": DTYPES[:3], "k_pages": DTYPES}),
    "decide": (decide_cuda, {"x": DTYPES[:3], "policy": FLOAT32}),
    "sample": (sample_cuda, {"logits": DTYPES[:3], "temperature": FLOAT32}),
}


def _refuses_attention(arguments: Mapping[str, Any]) -> str:
    """What paged_attention's kernels are not compiled for."""
    q, pages = arguments["q"], arguments["k_pages"].dtype
    if arguments.get("kv_scale") is not None:
        return "it reads no scaled pages"
    if pages not in PAGES[q.dtype]:
        return f"it takes pages in {' or '.join(map(str, PAGES[q.dtype]))} for q in {q.dtype}, got {pages}"
    step = 16 if pages.itemsize == 1 else 8
    fits = q.shape[-1] % step == 0 and q.shape[-1] <= 128
    return "" if fits else f"it takes heads whose width is a multiple of {step} up to 128, got {q.shape[-1]}"


REFUSES: dict[str, Refuses] = {"paged_attention": _refuses_attention}  # op -> what else it does not take


BATCH = 512  # query rows of a KV head from which on paged_attention's kernels are faster than Triton's


def _is_small(arguments: Mapping[str, Any]) -> str:
    q, pages = arguments["q"], arguments["k_pages"]
    rows = q.shape[0] * (q.shape[1] // pages.shape[2])
    return "" if rows >= BATCH else f"{rows} query rows of a KV head, from {BATCH} on it is faster"


def _is_not_int4(arguments: Mapping[str, Any]) -> str:
    return "" if arguments["values"].dtype == torch.uint8 else "weights of 8 bits"


DEFAULTS: dict[str, Refuses | None] = {  # op -> the calls that another kernel is faster for
    "linear_quantised": _is_not_int4,
    "mel": None,
    "paged_attention": _is_small,
    "sample": None,
}
IMAGES = {"linear_quantised": "linear"}  # op -> the source of its kernels, where that has another name


@functools.cache
def _missing(kernels: str, device: torch.device) -> str:
    """Why there are no kernels of this name on a device, or ""; found out once."""
    try:
        gpu(device).module(kernels)
    except BackendError as error:
        return str(error)
    return ""


def _leaves(op: str, arguments: Mapping[str, Any]) -> str:
    """Calls that the default kernel of an op leaves to the next one."""
    home = next(value for value in arguments.values() if isinstance(value, Tensor)).device
    slower = DEFAULTS[op]
    return (slower(arguments) if slower else "") or _missing(IMAGES.get(op, op), home)


def register_cuda(ops: Iterable[Op[..., Any]]) -> None:
    """Give the ops that have one their backend "cuda"; or record why there is none."""
    for op in ops:
        if native is None:
            op.unavailable["cuda"] = reason
        elif op.name in KERNELS:
            function, limits = KERNELS[op.name]
            served = op.name in DEFAULTS
            op.register(
                "cuda", function, default_on="cuda" if served else "", takes=limits,
                refuses=REFUSES.get(op.name), leaves=functools.partial(_leaves, op.name) if served else None,
            )  # fmt: skip
