"""What holds for every op: its schema, its fake, its contract. Fed by the table of cases."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fastloop.ops import REGISTRY, use_backend
from fastloop.testing.assertions import bits, seeded
from fastloop.testing.implementations import Implementation, copied, implementations
from fastloop.testing.op_cases import CASES, Case
from fastloop.testing.selfcheck import expected, judge, results

# The docstrings' shapes and dtypes. A letter is one size wherever it stands in the op, "*" one of its own.
FLOAT, INT, LONG, BOOL = torch.float32, torch.int32, torch.int64, torch.bool
CONTRACTS: dict[str, dict[str, tuple[str, torch.dtype]]] = {
    "mel": {
        "pcm": ("B *", FLOAT),
        "slots": ("B", LONG),
        "tail": ("Z 360", FLOAT),
        "peak": ("Z", FLOAT),
        "seen": ("Z", LONG),
        "filters": ("C 201", FLOAT),
        "bands": ("C 2", INT),
    },
    "conv_stem": {
        "frames": ("* * C", FLOAT),
        "weight1": ("E C 3", FLOAT),
        "bias1": ("E", FLOAT),
        "weight2": ("E E 3", FLOAT),
        "bias2": ("E", FLOAT),
        "positions": ("* E", FLOAT),
    },
    "layer_norm": {"x": ("* E", FLOAT), "weight": ("E", FLOAT), "bias": ("E", FLOAT)},
    "rms_norm": {"x": ("N D", FLOAT), "weight": ("D", FLOAT), "residual": ("N D", FLOAT)},
    "linear": {
        "x": ("N D", FLOAT),
        "weight": ("O D", FLOAT),
        "bias": ("O", FLOAT),
        "residual": ("N O/2", FLOAT),
    },
    "linear_quantised": {
        "x": ("N D", FLOAT),
        "values": ("O D", torch.int8),
        "scale": ("O", FLOAT),
        "bias": ("O", FLOAT),
        "residual": ("N O/2", FLOAT),
    },
    "rope_append": {
        "qkv": ("N W", FLOAT),
        "bias": ("W", FLOAT),
        "positions": ("N", LONG),
        "slots": ("N", LONG),
        "inv_freq": ("K/2", FLOAT),
        "k_pages": ("P Q G K", FLOAT),
        "v_pages": ("P Q G K", FLOAT),
    },
    "block_attention": {"qkv": ("* * 3E", FLOAT)},
    "paged_attention": {
        "q": ("N H K", FLOAT),
        "k_pages": ("P Q G K", FLOAT),
        "v_pages": ("P Q G K", FLOAT),
        "block_table": ("B *", INT),
        "row_starts": ("B+1", INT),
        "kv_lens": ("B", INT),
        "gaps": ("B 2", INT),
    },
    "decide": {
        "x": ("R D", FLOAT),
        "norm_weight": ("D", FLOAT),
        "head": ("2 D", FLOAT),
        "slots": ("R", LONG),
        "policy": ("Z 3", FLOAT),
        "state": ("Z 2", INT),
    },
    "sample": {
        "logits": ("R V", FLOAT),
        "banned": ("* V", BOOL),
        "phase": ("R", LONG),
        "temperature": ("R", FLOAT),
        "top_k": ("R", LONG),
        "top_p": ("R", FLOAT),
        "seed": ("R", LONG),
        "counter": ("R", LONG),
    },
}
EVERY_OP = pytest.mark.parametrize("op", REGISTRY)


def cases(op: str) -> list[Case]:
    return CASES[op](seeded(1))


def fullest(op: str) -> Case:
    """The case with the most tensors."""
    return max(cases(op), key=lambda case: len(tensors(case)))


def tensors(case: Case) -> dict[str, Tensor]:
    return {name: value for name, value in case.arguments.items() if isinstance(value, Tensor)}


def test_tables_are_whole() -> None:
    assert set(CASES) == set(CONTRACTS) == set(REGISTRY)
    for op, contract in CONTRACTS.items():
        seen = set().union(*(tensors(case) for case in cases(op)))
        assert seen == set(contract), f"{op}: cases and contract differ in {seen ^ set(contract)}"


def test_opcheck(implementation: Implementation) -> None:
    """torch's own check: schema, what is changed in place, autograd registration, fakes, dynamic shapes."""
    op = REGISTRY[implementation.op]
    for case in cases(implementation.op):
        arguments = {name: implementation.place(value) for name, value in copied(case.arguments).items()}
        with use_backend(f"{implementation.op}={implementation.backend}"):
            torch.library.opcheck(op.torch_op, (), arguments)


@EVERY_OP
def test_the_torch_op_is_the_python_op(op: str) -> None:
    """torch.ops.fastloop.<op> is there, takes the same arguments, and gives the same to the bit."""
    torch_op = getattr(torch.ops.fastloop, op)
    assert [a.name for a in torch_op.default._schema.arguments] == list(_parameters(op))
    for case in cases(op):
        theirs = results(torch_op, case.arguments, case.mutates)
        ours = results(REGISTRY[op], case.arguments, case.mutates)
        assert all(torch.equal(bits(a), bits(b)) for a, b in zip(ours, theirs, strict=True))


def _parameters(op: str) -> list[str]:
    code = REGISTRY[op].reference.__code__
    return list(code.co_varnames[: code.co_argcount])


@EVERY_OP
def test_fakes_have_the_real_shapes(op: str) -> None:
    """Size, dtype and strides of every result, without computing it."""
    for case in cases(op):
        real = results(REGISTRY[op], case.arguments, case.mutates)
        with FakeTensorMode() as mode:
            ghosts = {
                n: mode.from_tensor(v) if isinstance(v, Tensor) else v for n, v in case.arguments.items()
            }
            made = getattr(torch.ops.fastloop, op)(**ghosts)
        for ghost, result in zip(made if isinstance(made, tuple) else [made], real, strict=False):
            assert (ghost.shape, ghost.dtype, ghost.stride()) == (result.shape, result.dtype, result.stride())


@EVERY_OP
def test_compiles_without_a_break(op: str) -> None:
    """torch.compile traces a call through the op and gives what the op gives, changed arguments included."""
    torch_op = getattr(torch.ops.fastloop, op)
    for case in cases(op):
        torch.compiler.reset()
        compiled = torch.compile(lambda **a: torch_op(**a), backend="aot_eager", fullgraph=True)
        theirs, ours = (results(run, case.arguments, case.mutates) for run in (compiled, REGISTRY[op]))
        assert all(torch.equal(bits(a), bits(b)) for a, b in zip(ours, theirs, strict=True))


def test_repeats_are_bit_equal(implementation: Implementation) -> None:
    for case in cases(implementation.op):
        first = results(implementation, case.arguments, case.mutates)
        for _ in range(3):
            again = results(implementation, case.arguments, case.mutates)
            assert all(torch.equal(bits(a), bits(b)) for a, b in zip(first, again, strict=True))


def apart(tensor: Tensor) -> Tensor:
    """The same values with something else between the rows."""
    wide = torch.full((*tensor.shape[:-1], tensor.shape[-1] + 3), 77, dtype=tensor.dtype)
    wide[..., : tensor.shape[-1]] = tensor
    return wide[..., : tensor.shape[-1]]


def turned(tensor: Tensor) -> Tensor:
    """The same values in memory in the opposite order of dimensions."""
    order = list(reversed(range(tensor.dim())))
    return tensor.permute(order).clone(memory_format=torch.contiguous_format).permute(order)


POOLS = {"k_pages", "v_pages"}  # gigabytes of an engine, which makes them contiguous: nobody copies them


@pytest.mark.parametrize("spread", [apart, turned])
def test_tensors_need_not_be_contiguous(implementation: Implementation, spread: Any) -> None:
    """What is read may have any strides. What is changed in place is changed right, or refused by name; so is
    a pool of pages, which is not copied.
    """
    for case in cases(implementation.op):
        plains, truths = expected(implementation.op, case)
        for name, tensor in tensors(case).items():
            arguments = copied(case.arguments) | {name: spread(tensor)}
            try:
                made = implementation(**arguments)
            except ValueError as error:
                changed = f"{name} is changed in place and must be contiguous"
                pool = f"{name} must be contiguous; the pool is not copied"
                assert (changed if name in case.mutates else pool) in str(error)
                assert name in case.mutates or name in POOLS
                continue
            outs = [*(made if isinstance(made, tuple) else [made]), *(arguments[n] for n in case.mutates)]
            for number, (out, plain, truth) in enumerate(zip(outs, plains, truths, strict=True)):
                found = judge(f"result {number}", out, plain, truth)
                assert found.ok, f"{name} with strides {spread(tensor).stride()}: {found.problem}"


Violation = tuple[str, str, Tensor, tuple[str, ...]]


def violations(op: str) -> Iterator[Violation]:
    """(what is done, argument, its bad value, what the message must hold) for every rule of the contract."""
    contract = CONTRACTS[op]
    letters = [letter for shape, _ in contract.values() for letter in shape.split() if letter != "*"]
    for name, tensor in tensors(fullest(op)).items():
        shape, dtype = contract[name]
        yield "a dimension more", name, tensor[None], (name,)
        yield "a dimension less", name, tensor[0], (name,)
        for dim, letter in enumerate(shape.split()):
            size, shared = tensor.shape[dim], letters.count(letter) > 1
            if shared or len(letter) > 1 or letter.isdigit():
                longer = torch.cat((tensor, tensor.narrow(dim, 0, 1)), dim=dim)
                yield f"{letter} + 1", name, longer, (str(size + 1), *([str(size)] if shared else []))
        wrong = INT if dtype in (FLOAT, LONG) else FLOAT
        yield f"{wrong} for {dtype}", name, tensor.nan_to_num().to(wrong), (name, str(wrong))


VIOLATIONS = [(op, *violation) for op in REGISTRY for violation in violations(op)]


@pytest.mark.parametrize(
    ("op", "name", "bad", "told"),
    [(op, name, bad, told) for op, _, name, bad, told in VIOLATIONS],
    ids=[f"{op}: {name}, {done}" for op, done, name, *_ in VIOLATIONS],
)
def test_violations_are_named(op: str, name: str, bad: Tensor, told: tuple[str, ...]) -> None:
    """By every implementation: op, tensor, and both sizes or both dtypes; nothing has been changed."""
    case = fullest(op)
    for implementation in implementations(op):
        if implementation.missing:
            continue
        arguments = copied(case.arguments)
        with pytest.raises((ValueError, TypeError), match=f"^{op}: ") as caught:
            implementation(**arguments | {name: bad})
        for part in told:
            assert part in str(caught.value), f"{implementation}: {caught.value}"
        for changed in set(case.mutates) - {name}:
            assert torch.equal(bits(arguments[changed]), bits(case.arguments[changed]))


# Values that a kernel would read or write astray by; read where they are on the CPU.
ASTRAY: dict[str, tuple[str, dict[str, Any], str]] = {
    "a slot behind the pages": (
        "rope_append",
        {"slots": [0, 1, 2, 3, 24]},
        "slots holds 24, must be in [-1, 24)",
    ),
    "a slot below -1": ("rope_append", {"slots": [0, 1, -2, 3, 4]}, "slots holds -2"),
    "a session behind the state": ("decide", {"slots": [0, 1, 2, 3] * 3}, "slots holds 3, must be in [0, 3)"),
    "a session below 0": ("decide", {"slots": [0, 1, -1] * 4}, "slots holds -1"),
    "a phase that is not there": (
        "sample",
        {"phase": [0, 1, 2, 0, 1, 0]},
        "phase holds 2, must be in [0, 2)",
    ),
    "a page that is not there": ("paged_attention", {"block_table": [[1, 2, 7]] * 2}, "block_table holds 7"),
    "a page below 0": ("paged_attention", {"block_table": [[1, 2, -1]] * 2}, "block_table holds -1"),
    "more slots than pages": ("paged_attention", {"kv_lens": [41, 11]}, "kv_lens[0] is 41"),
    "fewer slots than rows": (
        "paged_attention",
        {"kv_lens": [12, 11], "gaps": [[0, 0]] * 2},
        "kv_lens[0] is 12",
    ),
    "rows of nobody": ("paged_attention", {"row_starts": [0, 12, 13]}, "from 0 to the 14 rows of q"),
    "rows twice": ("paged_attention", {"row_starts": [0, 15, 14]}, "row_starts must rise"),
    "rows before the first": ("paged_attention", {"row_starts": [1, 13, 14]}, "row_starts must rise"),
    "a gap in the new rows": ("paged_attention", {"gaps": [[6, 11], [0, 0]]}, "gap [6, 11) of sequence 0"),
    "a gap that ends before it begins": (
        "paged_attention",
        {"gaps": [[0, 0], [6, 5]]},
        "gap [6, 5) of sequence 1",
    ),
    "too few positions": ("conv_stem", {"positions": torch.zeros(19, 32)}, "dimension T of positions is 19"),
    "no such epilogue": ("linear", {"epilogue": "relu"}, "unknown epilogue 'relu'"),
    "no heads": ("block_attention", {"heads": 0}, "heads (0)"),
    "heads that do not divide": ("block_attention", {"heads": 5}, "is 96, not 3 x heads (5)"),
    "query heads that do not divide": ("paged_attention", {"q": torch.zeros(14, 3, 16)}, "H of q is 3"),
    "an odd weight to be gated": (
        "linear",
        {"weight": torch.zeros(95, 64), "bias": torch.zeros(95)},
        "silu_gate needs [gate; up] rows, an even number; got 95",
    ),
    "only keys": ("rope_append", {"qkv": torch.zeros(5, 64), "bias": torch.zeros(64)}, "W of qkv is 64"),
}


@pytest.mark.parametrize(("op", "changes", "told"), ASTRAY.values(), ids=ASTRAY)
def test_values_that_lead_astray_are_named(op: str, changes: dict[str, Any], told: str) -> None:
    case = fullest(op)
    bad = {
        name: torch.tensor(value, dtype=case.arguments[name].dtype) if isinstance(value, list) else value
        for name, value in changes.items()
    }
    for implementation in implementations(op):
        if (
            implementation.missing or implementation.device != "cpu"
        ):  # elsewhere reading them would synchronise
            continue
        arguments = copied(case.arguments)
        with pytest.raises(ValueError, match=f"^{op}: .*{re.escape(told)}"):
            implementation(**arguments | bad)
        for name in case.mutates:
            assert torch.equal(bits(arguments[name]), bits(case.arguments[name]))
