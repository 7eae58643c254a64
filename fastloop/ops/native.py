"""The compiled part, `fastloop._native`: loaded once; where it is missing, the reason is kept for `doctor`.

Ops that have a native implementation register it as backend "cpu" if `native` is there, and put `reason`
into their table of unavailable backends if it is not. The kernels take float32 tensors (KV pages also
bfloat16) at addresses: `check_native` keeps everything else away from them. Tensors that are read are copied
where their rows are not contiguous.
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ..config import ConfigError
from ..quantise import GROUPS, QUANTISERS, Quantised
from .dispatch import Op, P, R

ISA_VARIABLE = "FASTLOOP_CPU_ISA"  # forces an instruction set; read once, by the module
ABI_VERSION = 2  # FASTLOOP_ABI_VERSION of csrc/include/fastloop.h that the wrappers here are written for


def _load() -> tuple[ModuleType | None, str]:
    """The module and "", or None and why it cannot be used."""
    try:
        module = importlib.import_module("fastloop._native")
    except ModuleNotFoundError:
        return None, (
            "fastloop._native is not built: reinstall with a C++ compiler at hand, FASTLOOP_NO_NATIVE unset"
        )
    except ImportError as error:
        return None, f"fastloop._native does not load ({error}); reinstall fastloop on this machine"
    if module.abi_version() != ABI_VERSION:
        return None, (
            f"fastloop._native has ABI version {module.abi_version()}, this code needs {ABI_VERSION}; "
            "it is left over from another build: reinstall fastloop"
        )
    forced, known = os.environ.get(ISA_VARIABLE, ""), module.isas().split()
    if forced and forced not in known:
        raise ConfigError(f"{ISA_VARIABLE} is {forced!r}; this machine has {', '.join(known)}")
    return module, ""


native, reason = _load()


def require_native() -> ModuleType:
    """The compiled module, or ImportError that says why there is none and what to do."""
    if native is None:
        raise ImportError(reason)
    return native


FLOAT32 = (torch.float32,)
PRECISIONS = ("float32", "bfloat16", "int8", "int4")  # of packed weights, in the order of fastloop_format
PAGE_FORMATS = {torch.float32: 0, torch.bfloat16: 1}  # fastloop_format of KV pages


def register_native(
    op: Op[P, R],
    implementation: Callable[P, R],
    takes: Mapping[str, Sequence[torch.dtype]],
    default: bool = True,
) -> None:
    """Make `implementation` the op's backend "cpu", and its default on CPUs for what it `takes`; or record
    why it is not there.

    It has the arguments of the op, and isa: one of `native.isas()`, for tests and measurements.
    """
    if native is None:
        op.unavailable["cpu"] = reason
    else:
        op.register("cpu", implementation, default_on="cpu" if default else "", takes=takes)


def check_native(op: str, **tensors: Tensor | None) -> None:
    """Tensors the kernels can read: on the CPU, float32 where they are floats, without a gradient to keep."""
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if tensor.device.type != "cpu":
            raise ValueError(
                f"{op}: backend 'cpu' got {name} on {tensor.device}; move it or change FASTLOOP_BACKEND"
            )
        if tensor.is_floating_point() and tensor.dtype != torch.float32:
            raise TypeError(
                f"{op}: backend 'cpu' computes in float32, {name} is {tensor.dtype}; convert it with "
                ".float() or change FASTLOOP_BACKEND"
            )
        if tensor.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{op}: backend 'cpu' computes no gradient, and {name} requires one; use torch.no_grad() or "
                "FASTLOOP_BACKEND=reference"
            )


def check_pages(op: str, k_pages: Tensor, v_pages: Tensor) -> None:
    """KV pages the kernels can use."""
    for name, pages in (("k_pages", k_pages), ("v_pages", v_pages)):
        if pages.device.type != "cpu":
            raise ValueError(
                f"{op}: backend 'cpu' got {name} on {pages.device}; move it or change FASTLOOP_BACKEND"
            )
        if pages.dtype not in PAGE_FORMATS:
            raise TypeError(
                f"{op}: backend 'cpu' takes {name} in torch.float32 or torch.bfloat16, got {pages.dtype}; "
                "change FASTLOOP_BACKEND"
            )


def check_in_place(op: str, name: str, tensor: Tensor) -> None:
    """What is changed in place is contiguous."""
    if not tensor.is_contiguous():
        raise ValueError(
            f"{op}: {name} is changed in place and must be contiguous, its strides are {tensor.stride()}"
        )


def address(tensor: Tensor | None) -> int:
    """Where a tensor begins; 0 for none. The caller keeps the tensor alive while a kernel uses it."""
    return 0 if tensor is None else tensor.data_ptr()


def rows_apart(tensor: Tensor) -> bool:
    """Whether the rows of a [N, D] are contiguous and do not overlap."""
    rows, width = tensor.shape
    return (width < 2 or tensor.stride(1) == 1) and (rows < 2 or tensor.stride(0) >= width)


def rows_of(tensor: Tensor) -> Tensor:
    """[N, D] as it is, or a copy with contiguous rows."""
    return tensor if rows_apart(tensor) else tensor.contiguous()


def team() -> Any:
    """The threads that ops share: as many as torch's, made once in a process; None for one."""
    threads = torch.get_num_threads()
    return None if threads == 1 else _team(os.getpid(), threads)


@functools.lru_cache(maxsize=4)
def _team(process: int, threads: int) -> Any:
    """A forked process has none of its parent's threads, so it makes its own."""
    return require_native().Team(threads)


def pack(
    weight: Tensor | Quantised, precision: str = "float32", gated: bool = False, group: int = GROUPS[0]
) -> Any:
    """weight [O, D] -> a fastloop._native.Weight in one of PRECISIONS. Rows [gate; up] where gated.

    group: of int4, for a weight that is not quantised yet; one that the groups do not fit becomes int8.
    """
    outputs, inputs = weight.shape
    if isinstance(weight, Tensor) and precision in QUANTISERS:
        fits = precision != "int4" or inputs % group == 0
        weight = QUANTISERS[precision if fits else "int8"](weight, group)
    if isinstance(weight, Quantised):
        precision = weight.precision  # of an int4 model some matrices are int8
        source, scale, group = weight.values.contiguous(), weight.scale.contiguous(), weight.group
        kind = PRECISIONS.index(precision)
    else:
        source = (weight if weight.dtype in PAGE_FORMATS else weight.float()).contiguous()
        scale, group, kind = None, 0, PAGE_FORMATS[source.dtype]
    return require_native().Weight(
        format=PRECISIONS.index(precision),
        source=kind,
        out=outputs,
        in_=inputs,
        gated=gated,
        data=address(source),
        scale=address(scale),
        group=group,
    )


_packed: WeakTensorKeyDictionary = (
    WeakTensorKeyDictionary()
)  # weight -> {form: (state of the weight, packed)}


def packed_once(weight: Tensor, form: str, make: Callable[[Tensor], Any]) -> Any:
    """make(weight), kept until the weight is freed or has changed.

    An op gets a plain weight with every call, and packing one costs as much as several products with it. A
    weight has changed when its version has (every in-place operation moves it on; autograd relies on the
    same) or its memory; writing through `.data` or through NumPy goes unseen. Tensors of inference mode have
    no version, so they are packed at every call. The kept form is as large as the weight: that is why ops
    that need it are no defaults, and models are packed once, by the native runner.
    """
    if weight.is_inference():
        return make(weight)
    state = (weight._version, weight.data_ptr(), weight.shape, weight.stride())
    forms = _packed.setdefault(weight, {})
    known = forms.get(form)
    if known is None or known[0] != state:
        known = forms[form] = (state, make(weight))
    return known[1]
