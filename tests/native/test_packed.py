"""linear on packed weights of every format: right, and equal to the bit in any batch, on any threads."""

from __future__ import annotations

import functools
import gc
import itertools
import os
import weakref

import numpy as np
import pytest
import torch
from torch import Tensor

from fastloop.ops.linear import linear_cpu, linear_packed, linear_ref
from fastloop.ops.native import PRECISIONS, native, pack, packed_once, reason
from fastloop.quantise import QUANTISERS, Quantised, dequantise_int4, dequantise_int8
from fastloop.testing.assertions import bits, seeded
from fastloop.testing.tolerance import error_bound, relative_error

pytestmark = pytest.mark.skipif(native is None, reason=reason)
ISAS = native.isas().split() if native else []
every_isa = pytest.mark.parametrize("isa", ISAS)
every_precision = pytest.mark.parametrize("precision", PRECISIONS)


def weights(seed: int, outputs: int, inputs: int) -> Tensor:
    return torch.randn(outputs, inputs, generator=seeded(seed)) * inputs**-0.5


def stored(weight: Tensor, precision: str) -> Tensor:
    """The float32 weights that the packed ones stand for."""
    if precision == "bfloat16":
        return weight.bfloat16().float()
    if precision == "float32":
        return weight
    quantised = QUANTISERS[precision](weight)
    dequantise = {"int8": dequantise_int8, "int4": dequantise_int4}[quantised.precision]
    return dequantise(quantised.values, quantised.scale)


def rounded(x: Tensor, precision: str) -> Tensor:
    """What the kernels make of the rows: bfloat16, or bytes with a scale of the row's own."""
    if precision == "bfloat16":
        return x.bfloat16().float()
    if precision == "float32":
        return x
    top = x.abs().amax(1, keepdim=True)
    return (x * (127 / top)).round() * (top / 127)


@every_precision
@every_isa
def test_errs_at_most_twice_as_much_as_the_same_rounding_in_torch(isa: str, precision: str) -> None:
    """Against the stored weights in float64: with the rows as they were, and with the rows as they are
    rounded, where nothing but float32 sums is left to err.
    """
    for seed, (rows, outputs, inputs) in enumerate(
        itertools.product((1, 2, 14, 15, 100), (70,), (32, 96, 288))
    ):
        weight, x = weights(seed, outputs, inputs), torch.randn(rows, inputs, generator=seeded(seed + 1))
        held, row = stored(weight, precision), rounded(x, precision)
        out, emulated = linear_packed(x, pack(weight, precision), outputs, isa=isa), linear_ref(row, held)
        for truth in (linear_ref(x.double(), held.double()), linear_ref(row.double(), held.double())):
            assert relative_error(out, truth) <= error_bound(emulated, truth, torch.float32)


@every_isa
def test_int4_in_groups_of_64(isa: str) -> None:
    for seed, (rows, inputs) in enumerate(itertools.product((1, 2, 14, 15, 100), (64, 320))):
        quantised = QUANTISERS["int4"](weights(seed, 70, inputs), 64)
        # Rounded already: no number is so near the middle of two bytes that a last bit decides.
        x, held = (
            rounded(torch.randn(rows, inputs, generator=seeded(seed + 1)), "int4"),
            quantised.dequantised(),
        )
        packed = pack(quantised)
        assert packed.nbytes == pytest.approx(96 * inputs * (0.5 + 2 / 64), rel=0.01)  # 3 panels of 32
        out, truth = linear_packed(x, packed, 70, isa=isa), linear_ref(x.double(), held.double())
        assert relative_error(out, truth) <= error_bound(linear_ref(x, held), truth, torch.float32)


@every_precision
@pytest.mark.parametrize("gated", [False, True])
@every_isa
def test_a_row_is_the_same_beside_any_1_to_63_others(isa: str, precision: str, gated: bool) -> None:
    """To the bit."""
    packed = pack(weights(1, 70, 96), precision, gated)
    x, bias = torch.randn(64, 96, generator=seeded(2)), torch.randn(70, generator=seeded(3))
    epilogue, width = ("silu_gate", 35) if gated else ("gelu", 70)
    product = functools.partial(
        linear_packed, packed=packed, width=width, bias=bias, epilogue=epilogue, isa=isa
    )
    alone = torch.cat([product(x[i : i + 1]) for i in range(64)])
    for count in range(2, 65):
        first = 64 - count
        assert torch.equal(product(x[first:]), alone[first:]), f"{count} rows"
        assert torch.equal(product(x[:count]), alone[:count]), f"{count} rows"


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_whole_numbers_are_exact_on_every_instruction_set(precision: str) -> None:
    """Products of bytes are whole; with scales of powers of two so are their sums, to the bit, everywhere."""
    inputs, g = 2048, seeded(4)
    x = torch.randint(-127, 128, (15, inputs), generator=g).float()
    x[:, 0] = 127.0  # the row's scale is 1
    if precision == "int8":
        q = torch.randint(-127, 128, (70, inputs), generator=g)
        quantised = Quantised(q.to(torch.int8), torch.full((70,), 0.5))
        held = q * 0.5
    else:
        q = torch.randint(0, 16, (70, inputs), generator=g)
        scale = 2.0 ** torch.randint(-3, 1, (70, inputs // 32), generator=g)
        quantised = Quantised((q[:, ::2] | q[:, 1::2] << 4).to(torch.uint8), scale.bfloat16(), 32)
        held = (q - 8) * scale.repeat_interleave(32, dim=1)
    truth = x.double() @ held.double().T  # below 2^24 units of 1/8
    packed = pack(quantised, precision)
    for isa in ISAS:
        assert torch.equal(linear_packed(x, packed, 70, isa=isa).double(), truth), isa


def test_int8_is_the_same_to_the_bit_on_every_instruction_set() -> None:
    """Of 800,000 numbers some lie so near the middle of two bytes that a fused product would change them."""
    packed = pack(weights(5, 33, 8190), "int8")
    x = torch.randn(100, 8190, generator=seeded(6))
    outs = [linear_packed(x, packed, 33, isa=isa) for isa in ISAS]
    assert all(torch.equal(out, outs[0]) for out in outs)


@pytest.fixture
def torch_threads() -> object:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@every_precision
@pytest.mark.usefixtures("torch_threads")
def test_threads_and_repeats_change_nothing(precision: str) -> None:
    packed = pack(weights(7, 640, 512), precision)
    x = torch.randn(64, 512, generator=seeded(8))  # enough work to be shared
    outs = []
    for threads in (1, 2, 3, 3, 2):
        torch.set_num_threads(threads)
        outs.append(linear_packed(x, packed, 640))
    assert all(torch.equal(out, outs[0]) for out in outs)


@every_precision
@every_isa
@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_stays_in_its_row(isa: str, precision: str, poison: float) -> None:
    packed = pack(weights(9, 70, 96), precision)
    x = torch.randn(16, 96, generator=seeded(10))
    clean = linear_packed(x, packed, 70, isa=isa)
    x[5, 77] = poison
    dirty, others = linear_packed(x, packed, 70, isa=isa), torch.arange(16) != 5
    assert torch.equal(bits(dirty[others]), bits(clean[others])) and not dirty[5].isfinite().any()


@every_precision
def test_rows_of_zeros_and_no_rows(precision: str) -> None:
    packed = pack(weights(11, 70, 96), precision)
    assert torch.equal(linear_packed(torch.zeros(3, 96), packed, 70), torch.zeros(3, 70))
    assert linear_packed(torch.zeros(0, 96), packed, 70).shape == (0, 70)


@every_precision
def test_packed_weights_take_the_bytes_of_their_format(precision: str) -> None:
    each = {"float32": 4.0, "bfloat16": 2.0, "int8": 1 + 4 / 512, "int4": 0.5 + 2 / 32}[precision]
    assert pack(weights(12, 320, 512), precision).nbytes == pytest.approx(320 * 512 * each, rel=0.01)


def test_misaligned_memory_is_an_error() -> None:
    crooked = torch.frombuffer(bytearray(4 * 96 + 1), dtype=torch.uint8)[1:]
    x = torch.empty(0).set_(crooked.untyped_storage()[1:]).as_strided((1, 96), (96, 1))
    with pytest.raises(ValueError, match="x is not aligned to 4 bytes"):
        linear_packed(x, pack(weights(13, 8, 96)), 8)


def test_a_packing_is_kept_until_its_weight_changes() -> None:
    """...by an operation in place, seen by its version; or by other memory under the same tensor."""
    weight, x = weights(14, 8, 96), torch.randn(3, 96, generator=seeded(15))
    made: list[Tensor] = []
    keep = functools.partial(packed_once, weight, "test", lambda w: made.append(w) or object())
    assert keep() is keep() and len(made) == 1
    weight[0, 0] = 5
    assert keep() is keep() and len(made) == 2
    weight.data = weights(16, 8, 96)
    assert keep() is keep() and len(made) == 3
    for change in (lambda: weight.mul_(2), lambda: weight.copy_(weights(17, 8, 96))):
        change()
        assert relative_error(linear_cpu(x, weight), x.double() @ weight.double().T) < 1e-6


def test_a_packing_goes_with_its_weight() -> None:
    weight = weights(18, 8, 96)

    class Packing:
        pass

    gone = weakref.ref(packed_once(weight, "test", lambda _: Packing()))
    assert gone() is not None
    del weight
    gc.collect()
    assert gone() is None


def test_tensors_without_a_version_are_packed_at_every_call() -> None:
    x = torch.randn(3, 96, generator=seeded(19))
    with torch.inference_mode():
        weight = weights(20, 8, 96)
        linear_cpu(x, weight)
        weight[0] = 7
        assert relative_error(linear_cpu(x, weight), x.double() @ weight.double().T) < 1e-6


def test_a_forked_process_has_threads_of_its_own() -> None:
    """Ops make a team anew; a team that was made before the fork says that its threads are not there."""
    packed, x = pack(weights(21, 640, 512), "float32"), torch.randn(64, 512, generator=seeded(22))
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        truth, old = linear_packed(x, packed, 640).numpy(), native.Team(2)
        child = os.fork()
        if child == 0:
            status = 1
            try:
                right = np.array_equal(
                    linear_packed(x, packed, 640).numpy(), truth
                )  # torch's threads are gone
                with pytest.raises(ValueError, match="this process was forked"):
                    native.ceiling(0, old)
                status = 0 if right else 2
            finally:
                os._exit(status)
        assert os.waitpid(child, 0)[1] == 0
    finally:
        torch.set_num_threads(before)
