"""What an op demands of its arguments, executable: a violation names op, tensor and what differs.

Shapes and dtypes are checked on every device. Values (slots, page numbers, lengths) only on the CPU: reading
them elsewhere would synchronise, and while a graph is traced or captured they are not those of its replays.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator

import torch
from torch import Tensor


def check_dims(op: str, **tensors: tuple[Tensor, str]) -> dict[str, int]:
    """Unify named dimensions over tensors; a mismatch names tensor, dimension and both sizes.

    >>> check_dims("linear", x=(torch.zeros(3, 4), "N D"), weight=(torch.zeros(5, 4), "O D"))
    {'N': 3, 'D': 4, 'O': 5}
    """
    sizes: dict[str, int] = {}
    for name, (tensor, spec) in tensors.items():
        letters = spec.split()
        if tensor.dim() != len(letters):
            raise ValueError(
                f"{op}: {name} must have {len(letters)} dimensions [{spec}], got {tuple(tensor.shape)}"
            )
        for letter, size in zip(letters, tensor.shape, strict=True):
            expected = int(letter) if letter.isdigit() else sizes.setdefault(letter, size)
            if size != expected:
                raise ValueError(
                    f"{op}: dimension {letter} of {name} is {size}, elsewhere {expected} "
                    f"({name} is {tuple(tensor.shape)} for [{spec}])"
                )
    return sizes


def check_floats(op: str, **tensors: Tensor | None) -> None:
    """All of one floating-point dtype; None is an argument that was not given."""
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    first, wanted = next((name, tensor.dtype) for name, tensor in given.items())
    if not wanted.is_floating_point:
        raise TypeError(f"{op}: {first} must be of a floating-point dtype, got {wanted}")
    for name, tensor in given.items():
        if tensor.dtype != wanted:
            raise TypeError(
                f"{op}: {name} is {tensor.dtype}, {first} is {wanted}; convert one with .to(dtype)"
            )


def check_dtype(op: str, wanted: torch.dtype, **tensors: Tensor) -> None:
    """All of exactly this dtype."""
    for name, tensor in tensors.items():
        if tensor.dtype != wanted:
            raise TypeError(
                f"{op}: {name} must be {wanted}, got {tensor.dtype}; convert it with .to({wanted})"
            )


_unread: contextvars.ContextVar[bool] = contextvars.ContextVar("unread", default=False)


@contextlib.contextmanager
def unread_values() -> Iterator[None]:
    """Inside, no op checks values: a captured step must not read any on the host."""
    token = _unread.set(True)
    try:
        yield
    finally:
        _unread.reset(token)


def readable(tensor: Tensor) -> bool:
    """Whether the values may be looked at: on the CPU, and neither while tracing nor in `unread_values`."""
    return tensor.device.type == "cpu" and not (torch.compiler.is_compiling() or _unread.get())


def check_range(op: str, name: str, values: Tensor, low: int, high: int) -> None:
    """low <= values < high, where they are readable."""
    if not readable(values) or not values.numel():
        return
    least, most = (int(end) for end in values.aminmax())
    if least < low or most >= high:
        raise ValueError(f"{op}: {name} holds {least if least < low else most}, must be in [{low}, {high})")
