"""linear_quantised in Triton against its definition: every format and epilogue, ragged sizes, split depth."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastloop.config import MEL_BINS, small
from fastloop.decoder import Decoder, StepRows
from fastloop.encoder import Encoder
from fastloop.ops import dispatch
from fastloop.ops.linear import EPILOGUES
from fastloop.quantise import QUANTISERS, Quantised
from fastloop.stored import precision_of
from fastloop.testing.assertions import seeded
from fastloop.testing.cases import random_weights
from fastloop.testing.implementations import Implementation
from fastloop.testing.op_cases import Case, linear_quantised_case
from fastloop.testing.tolerance import error_bound, relative_error
from fastloop.triton_kernels.launch import record_launches
from fastloop.triton_kernels.linear_quantised import linear_quantised_triton

Check = Callable[[str, Case], None]
KINDS = ("int8", "fp8", "int4", "int4-64")


@pytest.mark.parametrize("epilogue", EPILOGUES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_the_definition(check: Check, kind: str, epilogue: str, dtype: torch.dtype) -> None:
    sizes: dict[str, Any] = {"rows": 13, "width_in": 192, "width_out": 70, "bias": True, "residual": True}
    case = linear_quantised_case(seeded(1), kind=kind, epilogue=epilogue, dtype=dtype, **sizes)
    check("linear_quantised", case)


@pytest.mark.parametrize("kind", ["int8", "fp8"])
@pytest.mark.parametrize(("rows", "width_in", "width_out"), [(1, 1, 1), (17, 67, 130), (65, 200, 33)])
def test_any_size(check: Check, kind: str, rows: int, width_in: int, width_out: int) -> None:
    sizes: dict[str, Any] = {"rows": rows, "width_in": width_in, "width_out": width_out}
    check("linear_quantised", linear_quantised_case(seeded(rows), kind=kind, **sizes))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("epilogue", EPILOGUES)
def test_split_depth(check: Check, kind: str, epilogue: str) -> None:
    """Deep and narrow: the depth is split, and the second kernel adds, scales and finishes."""
    case = linear_quantised_case(
        seeded(2), kind=kind, rows=5, width_in=2112, width_out=34, bias=True, epilogue=epilogue
    )
    with record_launches() as launches:
        linear_quantised_triton(**case.arguments)
    assert [launch.kernel.__name__ for launch in launches] == ["_linear", "_add_splits"]
    check("linear_quantised", case)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_do_not_see_each_other(device: str, kind: str) -> None:
    case = linear_quantised_case(seeded(3), kind=kind, rows=13, width_in=192, width_out=40)
    run = Implementation("linear_quantised", "triton", device)
    clean = run(**case.arguments)
    case.arguments["x"][4, 77] = torch.nan
    spoilt = run(**case.arguments)
    others = torch.arange(13) != 4
    assert spoilt[4].isnan().all() and torch.equal(spoilt[others], clean[others])


def test_a_channel_of_zeros(device: str) -> None:
    """Its scale is 0, so its output is the bias."""
    case = linear_quantised_case(seeded(4), kind="fp8", bias=True)
    case.arguments["values"][5] = 0
    case.arguments["scale"][5] = 0
    out = Implementation("linear_quantised", "triton", device)(**case.arguments)
    assert torch.equal(out[:, 5], case.arguments["bias"][5].expand(13))


@pytest.mark.parametrize("precision", ["int8", "fp8", "int4"])
def test_a_step_of_the_model(precision: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Encoder and decoder over a converted checkpoint's weights: every matrix by the kernel, none of them a
    product of floats, beside the same weights as float64.
    """
    monkeypatch.setitem(dispatch.BACKENDS_OF, "cpu", (*dispatch.BACKENDS_OF["cpu"], "triton"))
    config = small(layers=1)
    weights = random_weights(config)
    wanted = {name: precision_of(name, tuple(w.shape), precision) for name, w in weights.items()}
    matrices = {name: QUANTISERS[kept](weights[name]) for name, kept in wanted.items() if kept}
    floats = {name: weight for name, weight in weights.items() if name not in matrices}
    exact = {name: weight.double() for name, weight in floats.items()}
    exact |= {name: matrix.dequantised().double() for name, matrix in matrices.items()}

    def step(weights: dict[str, Tensor], quantised: dict[str, Quantised]) -> list[Tensor]:
        home = device if quantised else "cpu"
        moved = {name: weight.to(home) for name, weight in weights.items()}
        few = {name: matrix.to(home) for name, matrix in quantised.items()}
        dtype = weights["decoder.embed.weight"].dtype
        frames = torch.randn(2, 40, MEL_BINS, generator=seeded(1)).to(home)
        x = torch.randn(5, config.decoder.width, generator=seeded(2), dtype=dtype).to(home)
        c = config.decoder
        pages = torch.zeros(2, c.layers, 1, 8, c.kv_heads, c.head_width, dtype=dtype, device=home)
        slots = torch.arange(5, device=home)
        starts = torch.tensor([0, 5], dtype=torch.int32, device=home)
        table = torch.tensor([[0]], dtype=torch.int32, device=home)
        rows = StepRows(slots, slots, starts, table, starts[1:], torch.zeros_like(starts)[None])
        hidden = Decoder(config, moved, few).forward(x, rows, *pages)
        return [Encoder(config, moved, few).encode(frames).cpu(), hidden.cpu()]

    with dispatch.use_backend("linear_quantised=triton"), torch.inference_mode():
        made = step(floats, matrices)
    plain = step({name: weight.float() for name, weight in exact.items()}, {})
    for got, near, true in zip(made, plain, step(exact, {}), strict=True):
        assert relative_error(got, true) <= error_bound(near, true, torch.float32)
