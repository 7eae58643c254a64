"""What this device can do at most: bytes read, bytes copied, operations of a bfloat16 product."""

from __future__ import annotations

import torch

from .clock import measure
from .record import Context, Record


def run(context: Context, record: Record) -> None:
    """Values: read and copy (bytes a second, read and written both counted), matmul (operations a second)."""
    count = 1 << (20 if context.dry else 30)
    x = torch.empty(count, dtype=context.dtype, device=context.device).normal_()
    y = torch.empty_like(x)
    reads = {"sum": lambda: x.sum(), "amax": lambda: x.amax(), "dot": lambda: torch.dot(x, x)}
    found = {name: x.nbytes / measure([call], context.device, 0.3).minimum for name, call in reads.items()}
    record.put(reads=found, copy=2 * x.nbytes / measure([lambda: y.copy_(x)], context.device, 0.3).minimum)
    record.put(read=max(record.values["copy"], *found.values()))
    n = 256 if context.dry else 8192
    a, b = (torch.randn(n, n, device=context.device).to(context.dtype) for _ in range(2))
    record.put(matmul=2 * n**3 / measure([lambda: a @ b], context.device, 0.5).minimum)
    for name, scale, unit in (("read", 1e9, "GB/s"), ("copy", 1e9, "GB/s"), ("matmul", 1e12, "TFLOP/s")):
        record.put(**{f"{name}_text": f"{record.values[name] / scale:.0f} {unit}"})
