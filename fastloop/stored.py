"""How the matrices of a checkpoint are stored: as floats, or quantised as two tensors each.

    N        float [O, D]
    N.int8   int8 [O, D]        N.scale   float32 [O]
    N.fp8    float8_e4m3fn [O, D]         float32 [O]
    N.int4   uint8 [O, D / 2]   N.scale   bfloat16 [O, D / group], group 32 or 64 in all of a file

Quantised are the matrices of the layers; embedding, head, stem and biases (the K bias above all) stay floats.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from .quantise import GROUPS, QUANTISERS, Quantised
from .tensorfile import Kind, Shape

CHANNELS = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}  # precisions with one scale a channel


def precision_of(name: str, shape: Shape, wanted: str | None, group: int = GROUPS[0]) -> str | None:
    """What a tensor becomes in a checkpoint of precision `wanted`: "int8", "fp8", "int4", or None: it stays a
    float.

    Under int4 the encoder's matrices, whose rows are few, and those that the groups do not fit are int8.
    """
    if wanted is None or len(shape) != 2 or ".layers." not in name:
        return None
    four = wanted == "int4"
    return "int8" if four and (name.startswith("encoder.") or shape[1] % group) else wanted


def precisions_in(shapes: Mapping[str, Shape], found: Iterable[str]) -> dict[str, str]:
    """Name -> precision of the matrices that a file with these tensors keeps quantised."""
    there = set(found)
    return {
        name: precision
        for name, shape in shapes.items()
        for precision in QUANTISERS
        if precision_of(name, shape, precision) and f"{name}.{precision}" in there
    }


def group_in(shapes: Mapping[str, Shape], precisions: Mapping[str, str], found: Mapping[str, Shape]) -> int:
    """The group of a file's int4 matrices: the one that the shapes of most of their scales say."""
    said = Counter(
        group
        for name, precision in precisions.items()
        for group in GROUPS
        if precision == "int4"
        and tuple(found.get(f"{name}.scale", ())) == (shapes[name][0], shapes[name][1] // group)
    )
    return said.most_common(1)[0][0] if said else GROUPS[0]


def kinds_of(
    shapes: Mapping[str, Shape],
    precisions: Mapping[str, str],
    dtype: torch.dtype,
    group: int = GROUPS[0],
) -> dict[str, Kind]:
    """Stored name -> (dtype, shape), in the order of `shapes`."""
    kinds: dict[str, Kind] = {}
    for name, shape in shapes.items():
        precision = precisions.get(name)
        if precision is None:
            kinds[name] = (dtype, shape)
            continue
        outputs, inputs = shape
        if precision != "int4":
            kinds[f"{name}.{precision}"] = (CHANNELS[precision], shape)
            kinds[f"{name}.scale"] = (torch.float32, (outputs,))
        else:
            kinds[f"{name}.int4"] = (torch.uint8, (outputs, inputs // 2))
            kinds[f"{name}.scale"] = (torch.bfloat16, (outputs, inputs // group))
    return kinds


def joined(name: str, precision: str, tensors: Mapping[str, Tensor]) -> Quantised:
    """A matrix from its two tensors."""
    values, scale = tensors[f"{name}.{precision}"], tensors[f"{name}.scale"]
    return Quantised(values, scale, 2 * values.shape[1] // scale.shape[1] if precision == "int4" else 0)


def parts(matrix: Quantised) -> tuple[Tensor, Tensor]:
    """The two tensors of a matrix, in the order in which they are stored."""
    return matrix.values, matrix.scale
