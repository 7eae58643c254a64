"""Compile kernels ahead: `python warm.py PART OF` makes every OF-th call of the model and of the small cases.

Triton keeps what it compiles on disk, so after a few of these side by side the sections find kernels there.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch

from fastloop.ops.triton import kernel


def jobs() -> list[Callable[[], object]]:
    """Calls of the model's dims on zeros, then the small cases of every op."""
    from sanitized import calls

    from fastloop.triton_kernels.calls import CALLS

    found: list[Callable[[], object]] = [call for named in CALLS.values() for call in named.values()]
    for op, case in calls(torch.Generator().manual_seed(1)):
        found.append(lambda op=op, case=case: kernel(op)(**_moved(case.arguments)))
    return found


def _moved(arguments: dict[str, object]) -> dict[str, object]:
    return {n: v.cuda() if isinstance(v, torch.Tensor) else v for n, v in arguments.items()}


def main() -> None:
    from fastloop.triton_kernels.calls import made_on

    part, of = (int(argument) for argument in sys.argv[1:])
    done, failed = 0, []
    with made_on("cuda"), torch.inference_mode():
        for job in jobs()[part::of]:
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
