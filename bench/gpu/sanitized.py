"""What compute-sanitizer runs: one small call of every op in Triton, several where kernels differ, and the
same in CUDA C++ where an op has it.
"""

from __future__ import annotations

import sys

import torch

from fastloop.ops import REGISTRY
from fastloop.ops.triton import kernel
from fastloop.testing import op_cases as cases
from fastloop.testing.op_cases import CASES, Case


def calls(generator: torch.Generator) -> list[tuple[str, Case]]:
    """The self-check's cases, and those that take the other paths: split depth, split contexts, 16 bits."""
    found = [(op, case) for op in REGISTRY for case in CASES[op](generator)]
    long = cases.paged_attention_case(
        generator, rows=(13, 1), lens=(400, 333), gaps=((5, 170), (0, 300)), dtype=torch.bfloat16
    )
    listeners = cases.paged_attention_case(
        generator, rows=[13] * 8 + [1], lens=[13 + 40 * b for b in range(9)], heads=8, kv_heads=1,
        head_width=64, gaps=[(0, 0), *((5, 9 + b) for b in range(8))], page=64, dtype=torch.bfloat16,
    )  # fmt: skip
    scaled = cases.paged_attention_case(
        generator, rows=(13, 1), lens=(400, 333), gaps=((5, 170), (0, 300)), dtype=torch.bfloat16, scaled=True
    )
    deep = cases.linear_case(generator, rows=13, width_in=1300, width_out=34, residual=True)
    gate = cases.linear_case(
        generator, rows=13, width_in=200, width_out=70, epilogue="silu_gate", dtype=torch.bfloat16
    )
    clusters = cases.linear_case(
        generator, rows=13, width_in=1304, width_out=40, residual=True, dtype=torch.bfloat16
    )
    drawn = cases.sample_case(generator, rows=5, vocab=5000, dtype=torch.bfloat16)
    return [
        *found,
        ("paged_attention", long),
        ("paged_attention", listeners),
        ("paged_attention", scaled),
        ("rope_append", cases.rope_append_case(generator, rows=9, dtype=torch.bfloat16, scaled=True)),
        ("linear", deep),
        ("linear", gate),
        ("linear", clusters),
        ("sample", drawn),
    ]


def in_cuda(op: str, arguments: dict[str, object]) -> None:
    """The call by the backend "cuda", if there is one that takes it."""
    found = REGISTRY[op].implementations.get("cuda")
    if found is not None and not REGISTRY[op].refusal("cuda", (), arguments):
        found(**arguments)


def main() -> None:
    device = "cpu" if "--dry-run" in sys.argv else "cuda"
    for op, case in calls(torch.Generator().manual_seed(1)):
        if device == "cpu" and op in ("mel", "sample"):  # slow to interpret, and tested elsewhere
            continue
        arguments = {n: v.to(device) if isinstance(v, torch.Tensor) else v for n, v in case.arguments.items()}
        kernel(op)(**arguments)
        if device == "cuda":
            in_cuda(op, arguments)
    if device == "cuda":
        torch.cuda.synchronize()
    print("every op ran")


if __name__ == "__main__":
    main()
