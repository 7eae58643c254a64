"""flash-attn (the package, 2.x) as backend "flash_attn" of paged_attention: imported with its first call.

Its kernels read keys where they lie in pages of a multiple of 256 slots and know no gaps. A call with other
pages, or with a gap, gets the keys that it sees copied side by side first: one write and one read of them
more, so a session behind a prefix is better served by our own kernels. It is no op's default.

Source: FlashAttention-2 (Dao 2023, arXiv 2307.08691), `flash_attn_with_kvcache`.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from .dispatch import BackendError, Op
from .paged_attention import _check, _pages

MISSING = "flash-attn is not installed; pip install flash-attn (Linux, a CUDA GPU)"
HALVES = (torch.float16, torch.bfloat16)
PAGE_MULTIPLE = 256  # slots; what its paged kernels are compiled for
WIDEST = 256


def paged_attention_flash_attn(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    block_table: Tensor,
    row_starts: Tensor,
    kv_lens: Tensor,
    gaps: Tensor,
) -> Tensor:
    """`paged_attention_ref` by flash-attn: q [N, H, K], pages [P, Q, G, K], block_table int32 [B, M],
    row_starts int32 [B + 1], kv_lens int32 [B], gaps int32 [B, 2] -> [N, H, K]. q and pages are of one dtype,
    float16 or bfloat16; K is a multiple of 8 up to 256.

    Reads row counts and gaps on the host, so no graph can capture it: BackendError. Also where flash-attn
    does not load.
    """
    _check(q, k_pages, v_pages, block_table, row_starts, kv_lens, gaps)
    kernel = _kernel()
    if q.is_cuda and torch.cuda.is_current_stream_capturing():
        raise BackendError(
            "paged_attention: backend 'flash_attn' reads lengths on the host; do not capture it"
        )
    if not q.shape[0]:
        return q.new_empty(q.shape)
    page = k_pages.shape[1]
    begin, end = gaps.unbind(1)
    hidden = (end - begin).where(begin < kv_lens, 0)  # a gap behind the slots is none
    seen = kv_lens - hidden
    table = _pages(block_table, kv_lens, page, k_pages.shape[0])
    if page % PAGE_MULTIPLE == 0 and not bool(hidden.any()):
        keys, values, paged = k_pages, v_pages, {"block_table": table.int()}
    else:
        place = _places(table, page, begin, hidden, seen)
        keys, values, paged = k_pages.flatten(0, 1)[place], v_pages.flatten(0, 1)[place], {}
    counts = row_starts.diff()
    # The mask is aligned to a sequence's last row and last key: sequences of fewer rows are padded in front.
    row = torch.arange(-int(counts.max()), 0, device=q.device) + row_starts[1:, None]  # [B, most rows]
    real = row >= row_starts[:-1, None]
    out = kernel(q[row.where(real, 0)], keys, values, cache_seqlens=seen, causal=True, **paged)
    return out[real]


def _places(table: Tensor, page: int, begin: Tensor, hidden: Tensor, seen: Tensor) -> Tensor:
    """Where the keys of each sequence lie that are not in its gap, in order: int64 [B, most seen], as rows of
    the pool; behind a sequence's last one, any.
    """
    number = torch.arange(int(seen.max()), device=table.device)
    slot = number + hidden[:, None] * (number >= begin[:, None])
    slot = slot.where(number < seen[:, None], 0)
    return table.gather(1, slot // page) * page + slot % page


def _refuses(arguments: Mapping[str, Any]) -> str:
    """What it does not take beside other dtypes."""
    q, width = arguments["q"], arguments["q"].shape[-1]
    if arguments["k_pages"].dtype != q.dtype:
        return f"it takes pages in q's dtype, got {arguments['k_pages'].dtype} for q in {q.dtype}"
    if width % 8 or width > WIDEST:
        return f"it takes heads whose width is a multiple of 8 up to {WIDEST}, got {width}"
    return ""


def _kernel() -> Callable[..., Tensor]:
    """flash_attn.flash_attn_with_kvcache; BackendError where there is none (its package 4 has none)."""
    try:
        return importlib.import_module("flash_attn").flash_attn_with_kvcache
    except (ImportError, AttributeError) as error:
        raise BackendError(f"paged_attention: backend 'flash_attn' does not load ({error})") from error


def register_flash_attn(op: Op[..., Any]) -> None:
    """Give paged_attention its backend "flash_attn"; or record why there is none."""
    if importlib.util.find_spec("flash_attn") is None:
        op.unavailable["flash_attn"] = MISSING
    else:
        takes = {"q": HALVES, "k_pages": HALVES}
        op.register("flash_attn", paged_attention_flash_attn, takes=takes, refuses=_refuses)
