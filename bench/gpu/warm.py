"""Compile kernels ahead: `python warm.py PART OF` makes every OF-th call of the model and of the small cases;
with a third argument `tune` those that the section of this name tries.

Triton keeps what it compiles on disk, so after a few of these side by side the sections find kernels there.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))

from fastloop.config import published_3b
from fastloop.engine.buckets import ROWS
from fastloop.ops import REGISTRY
from fastloop.ops.triton import FEW_ROWS, kernel
from fastloop.testing.op_cases import Case
from fastloop.triton_kernels.calls import BATCHES, CALLS, LINEAR, made_on
from gpu import tune
from gpu.parity import small_checks
from gpu.record import Context
from gpu.sanitized import calls

HERE = Path()
CHUNKS = (1, 2, 4, 8, 16, 32, 64)  # of captured passes of the encoder
CONTEXT = Context("cuda", False, published_3b(), torch.bfloat16, HERE, HERE, 0.0, {})


def jobs() -> list[Callable[[], object]]:
    """Calls of the model's dims on zeros, for one stream and for many, then the small cases of every op."""
    found: list[Callable[[], object]] = [call for named in CALLS.values() for call in named.values()]
    found += in_batches()
    found += [functools.partial(_made, op, case) for op, case in calls(torch.Generator().manual_seed(1))]
    for op, _, make in small_checks(CONTEXT):
        found += [functools.partial(_made, op, case) for case in make(torch.Generator().manual_seed(1))]
    return found


def in_batches() -> Iterator[Callable[[], object]]:
    """What captured steps of many streams call, where kernels differ by how many there are: of floats up to
    the rows behind which torch multiplies, of few bits all, over pages of floats and of float8.
    """
    tokens = CONTEXT.config.chunk_tokens + 2
    for rows in ROWS:
        yield from _products("decoder", rows)
        yield functools.partial(BATCHES["decide"], max(1, rows // tokens))
        yield functools.partial(BATCHES["paged_attention, scaled pages"], rows)
        if rows <= FEW_ROWS:
            yield functools.partial(BATCHES["paged_attention"], rows)
    for chunks in CHUNKS:
        yield from _products("encoder", chunks * CONTEXT.config.chunk_frames // 2)
        yield functools.partial(BATCHES["conv_stem"], chunks)


def _products(part: str, rows: int) -> Iterator[Callable[[], object]]:
    for name, call in LINEAR.items():
        if name.startswith(part):
            if rows <= FEW_ROWS:
                yield functools.partial(call, rows)
            if not name.endswith(("head", "proj")):
                yield functools.partial(call, rows, weight=torch.float8_e4m3fn)


def _made(op: str, case: Case) -> None:
    if not REGISTRY[op].refusal("triton", (), case.arguments):
        moved = case.arguments.items()
        kernel(op)(**{n: v.cuda() if isinstance(v, torch.Tensor) else v for n, v in moved})


def main() -> None:
    part, of = (int(argument) for argument in sys.argv[1:3])
    done, failed = 0, []
    with made_on("cuda"), torch.inference_mode():
        for job in (list(tune.jobs(CONTEXT)) if "tune" in sys.argv else jobs())[part::of]:
            try:
                job()
                done += 1
            except Exception as error:  # named here; the sections will say what it means
                failed.append(f"{type(error).__name__}: {error}"[:200])
    torch.cuda.synchronize()
    print(f"{done} calls made; failed: {failed}")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
