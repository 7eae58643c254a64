"""The kernels of fastloop.triton_kernels as backend "triton": imported with the first call of one.

Where triton is missing, the reason is kept for `doctor`. On GPUs a kernel is the default of its op where a
results file shows it right and faster there (tests/ops/test_defaults.py).
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from .dispatch import BackendError, Limits, Op, Refuses

MISSING = "triton is not installed; pip install triton (Linux, a CUDA GPU)"
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
PAGES = (*FLOATS, torch.float8_e4m3fn)
TAKES: dict[str, Limits] = {  # op -> the dtypes that its kernel has code for
    "conv_stem": {"frames": FLOATS, "weight1": FLOATS},
    "layer_norm": {"x": FLOATS},
    "rms_norm": {"x": FLOATS},
    "linear": {"x": FLOATS},
    "linear_quantised": {"x": FLOATS},
    "rope_append": {"qkv": FLOATS, "k_pages": PAGES},
    "block_attention": {"qkv": FLOATS},
    "paged_attention": {"q": FLOATS, "k_pages": PAGES},
    "decide": {"x": FLOATS},
    "sample": {"logits": FLOATS},
}


DEFAULTS = (*TAKES, "mel")  # on GPUs, for the calls that "cuda" does not serve
FEW_ROWS = 64  # of `linear`: there cuBLAS is as fast, and nothing was measured behind


def _has_many_rows(arguments: Mapping[str, Any]) -> str:
    rows = len(arguments["x"])
    return "" if rows <= FEW_ROWS else f"{rows} rows, it was measured up to {FEW_ROWS}"


LEAVES: dict[str, Refuses] = {"linear": _has_many_rows}  # op -> the calls that torch serves


@functools.cache
def kernel(op: str) -> Callable[..., Any]:
    """`<op>_triton` of fastloop.triton_kernels.<op>; BackendError where that cannot be imported."""
    try:
        module = importlib.import_module(f"fastloop.triton_kernels.{op}")
    except ImportError as error:
        raise BackendError(
            f"op {op}: backend 'triton' does not load ({error}); see `fastloop doctor`"
        ) from error
    return getattr(module, f"{op}_triton")


def register_triton(ops: Iterable[Op[..., Any]]) -> None:
    """Give every op its backend "triton"; or record why there is none."""
    found = importlib.util.find_spec("triton") is not None
    for op in ops:
        if found:
            run, takes = functools.partial(_call, op.name), TAKES.get(op.name, {})
            default = "cuda" if op.name in DEFAULTS else ""
            op.register("triton", run, default_on=default, takes=takes, leaves=LEAVES.get(op.name))
        else:
            op.unavailable["triton"] = MISSING


def _call(op: str, *args: Any, **kwargs: Any) -> Any:
    return kernel(op)(*args, **kwargs)
