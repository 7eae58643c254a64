"""Quantised matrices in checkpoints: what is written is what is loaded, what is wrong is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastloop.checkpoint import CheckpointError, Model, load, save
from fastloop.config import ConfigError, small
from fastloop.convert import convert
from fastloop.engine import Engine
from fastloop.ops.native import native, reason
from fastloop.options import EngineConfig
from fastloop.quantise import (
    GROUPS,
    QUANTISERS,
    dequantise_int4,
    dequantise_int8,
    quantise_fp8,
    quantise_int4,
    quantise_int8,
)
from fastloop.stored import precision_of
from fastloop.testing.cases import random_model, random_sound
from fastloop.testing.tolerance import relative_error

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
needs_native = pytest.mark.skipif(native is None, reason=reason)
PRECISIONS = ("int8", "int4", "fp8")
CHANNELS = {"int8": quantise_int8, "fp8": quantise_fp8}


@pytest.fixture(scope="module")
def model() -> Model:
    return random_model(small())


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, model: Model) -> Path:
    return save(
        tmp_path_factory.mktemp("plain") / "m", model.config, model.weights, model.tokenizer.to_json()
    )


@pytest.fixture(scope="module", params=PRECISIONS)
def kept(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, plain: Path) -> Path:
    directory = tmp_path_factory.mktemp(request.param) / request.param
    convert(plain, directory, dtype=request.param)
    return directory


@given(seed=st.integers(0, 2**32 - 1), outputs=st.integers(1, 9), inputs=st.integers(1, 70))
def test_int8_errs_by_half_a_step_at_most(seed: int, outputs: int, inputs: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(outputs, inputs, generator=generator) * 10.0 ** torch.randint(-20, 20, (outputs, 1))
    weight[0] = 0
    q, scale = quantise_int8(weight)
    assert q.abs().max() <= 127 and scale[0] == 0
    off = (dequantise_int8(q, scale).double() - weight.double()).abs()
    assert bool((off <= scale.double()[:, None] * (0.5 + 1e-4)).all())
    assert not dequantise_int8(q, scale)[0].any()


@given(seed=st.integers(0, 2**32 - 1), groups=st.integers(1, 5), group=st.sampled_from(GROUPS))
def test_int4_takes_the_best_of_its_scales(seed: int, groups: int, group: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(3, groups * group, generator=generator)
    weight[1, :group] = 0
    packed, scale = quantise_int4(weight, group)
    assert packed.shape == (3, groups * group // 2) and scale.shape == (3, groups)
    kept = dequantise_int4(packed, scale)
    assert not kept[1, :group].any()
    # Never worse than the plain rounding to the group's extreme.
    parts = weight.view(3, groups, group)
    extreme = parts.gather(2, parts.abs().argmax(2, keepdim=True))
    plain_scale = (extreme / -8).bfloat16().float()
    safe = torch.where(plain_scale == 0, torch.ones_like(plain_scale), plain_scale)
    rounded = ((parts / safe).round().clamp(-8, 7) * plain_scale).view_as(weight)
    assert (kept - weight).square().sum() <= (rounded - weight).square().sum() * (1 + 1e-6)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("outputs", [1, 4, 5, 11])
def test_pieces_are_the_whole(precision: str, outputs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(outputs, 64, generator=torch.Generator().manual_seed(outputs))
    whole = QUANTISERS[precision](weight)
    monkeypatch.setattr("fastloop.quantise.PIECE_VALUES", 4 * 64)
    pieces = QUANTISERS[precision](weight)
    assert torch.equal(pieces.values, whole.values) and torch.equal(pieces.scale, whole.scale)


def test_int4_refuses_what_groups_do_not_fit() -> None:
    with pytest.raises(ValueError, match="48 inputs in groups of 32"):
        quantise_int4(torch.zeros(2, 48))


def test_what_is_stored_is_what_was_quantised(kept: Path, model: Model) -> None:
    loaded, wanted = load(kept), kept.name
    assert loaded.precision == wanted and loaded.dtype == torch.bfloat16
    for name, weight in model.weights.items():
        precision = precision_of(name, tuple(weight.shape), wanted)
        if precision is None:
            assert torch.equal(loaded.weights[name], weight.bfloat16()), name
            continue
        matrix = loaded.quantised[name]
        assert matrix.precision == precision and matrix.shape == tuple(weight.shape)
        values, scale = CHANNELS.get(precision, quantise_int4)(weight)
        assert torch.equal(matrix.values, values) and torch.equal(matrix.scale, scale)
    assert set(loaded.weights) | set(loaded.quantised) == set(model.weights)


def test_an_fp8_checkpoint_is_fp8_in_every_matrix_of_the_layers(tmp_path: Path, plain: Path) -> None:
    """Biases, the K bias above all, embedding, head and stem are floats; every matrix has its error told."""
    report = convert(plain, tmp_path / "m", dtype="fp8")
    loaded = load(tmp_path / "m")
    kept = {name for name, w in load(plain).weights.items() if w.dim() == 2 and ".layers." in name}
    assert set(loaded.quantised) == set(report.errors) == kept
    assert {m.values.dtype for m in loaded.quantised.values()} == {torch.float8_e4m3fn}
    assert all(0.01 < error < 0.04 for error in report.errors.values())  # 3 bits of mantissa
    assert loaded.weights["decoder.layers.0.qkv.bias"].dtype == torch.bfloat16
    assert report.weight_bytes == loaded.weight_bytes


@pytest.mark.parametrize("device", ["meta", pytest.param("cuda", marks=needs_gpu)])
def test_on_another_device_they_stay_as_they_are(kept: Path, device: str) -> None:
    here, there = load(kept), load(kept, device=device)
    assert there.precision == kept.name and set(there.weights) == set(here.weights)
    for name, matrix in here.quantised.items():
        moved = there.quantised[name]
        assert moved.values.device.type == moved.scale.device.type == device
        assert (moved.precision, moved.shape) == (matrix.precision, matrix.shape)
        if device == "cuda":
            assert torch.equal(moved.dequantised().cpu(), matrix.dequantised())
    assert there.weight_bytes == here.weight_bytes
    assert not load(kept, dtype="bfloat16", device=device).quantised


def test_a_dtype_dequantises(kept: Path) -> None:
    loaded, floats = load(kept), load(kept, dtype="float32")
    assert not floats.quantised and floats.precision is None
    for name, matrix in loaded.quantised.items():
        assert torch.equal(floats.weights[name], matrix.dequantised()), name
    assert floats.fingerprint != loaded.fingerprint == load(kept).fingerprint


def test_the_report_names_the_errors(tmp_path: Path, plain: Path, model: Model) -> None:
    report = convert(plain, tmp_path / "m", dtype="int8")
    assert report.precision == "int8" and report.source_format == "fastloop"
    loaded = load(tmp_path / "m")
    assert set(report.errors) == set(loaded.quantised)
    for name, error in report.errors.items():
        assert error == relative_error(loaded.quantised[name].dequantised(), model.weights[name]) < 0.01
    assert report.weight_bytes == loaded.weight_bytes
    with pytest.raises(CheckpointError, match="is int8 already"):
        convert(tmp_path / "m", tmp_path / "again")


def test_groups_of_64(tmp_path: Path, plain: Path, model: Model) -> None:
    """Stored, loaded, dequantised, and reported matrix by matrix: each errs more than in groups of 32."""
    reports = {group: convert(plain, tmp_path / str(group), dtype="int4", group=group) for group in GROUPS}
    loaded = load(tmp_path / "64")
    floats = load(tmp_path / "64", dtype="float32")
    coarse = [name for name, matrix in loaded.quantised.items() if matrix.group == 64]
    fits = [n for n in loaded.quantised if n.startswith("decoder.") and model.weights[n].shape[1] % 64 == 0]
    assert sorted(coarse) == sorted(fits) and len(coarse) == 6  # ffn is 96: down stays int8
    for name in coarse:
        values, scale = quantise_int4(model.weights[name], 64)
        assert torch.equal(loaded.quantised[name].values, values)
        assert torch.equal(loaded.quantised[name].scale, scale)
        assert torch.equal(floats.weights[name], dequantise_int4(values, scale))
        assert reports[32].errors[name] < reports[64].errors[name] < 1.5 * reports[32].errors[name]
    assert reports[64].weight_bytes == loaded.weight_bytes
    for options in ({"dtype": "int4", "group": 16}, {"dtype": "int8", "group": 64}, {"group": 64}):
        with pytest.raises(CheckpointError, match=r"group \d+: int4 has groups of 32 or 64"):
            convert(plain, tmp_path / "no", **{"dtype": "bfloat16"} | options)


@needs_native
def test_groups_of_64_are_served(tmp_path: Path, plain: Path) -> None:
    """tests/native/test_packed.py says what their products are."""
    convert(plain, tmp_path / "m", dtype="int4", group=64)
    loaded = load(tmp_path / "m")
    with Engine(loaded, EngineConfig(max_sessions=1)) as engine:
        session = engine.open()
        session.push(random_sound(2.0, seed=1))
        engine.run_until_idle()
        chances = [e.p_respond for e in session.poll() if e.type == "decision"]
    assert loaded.precision == "int4" and len(chances) == 5 and all(0 < p < 1 for p in chances)


def test_wrong_parts_are_named(kept: Path, tmp_path: Path) -> None:
    raw = (kept / "model.safetensors").read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    name = next(key for key in header if key.endswith("qkv.weight.scale") and key.startswith("decoder."))
    header[name]["shape"] = [header[name]["shape"][0] // 2, *header[name]["shape"][1:], 2]
    lost = header.pop("decoder.layers.1.down.weight.scale")
    header["stray"] = lost
    encoded = json.dumps(header).encode()
    for file in kept.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "model.safetensors").write_bytes(
        len(encoded).to_bytes(8, "little") + encoded + raw[8 + size :]
    )
    with pytest.raises(CheckpointError) as caught:
        load(tmp_path)
    told = str(caught.value)
    assert "missing (1): decoder.layers.1.down.weight.scale" in told
    assert "wrong kind (1)" in told and name in told and "stray" in told


@needs_native
def test_a_quantised_checkpoint_listens_as_its_source_packed_so(kept: Path, plain: Path) -> None:
    """The engine on the stored integers == the engine that quantises the float checkpoint itself."""
    if kept.name == "fp8":
        pytest.skip("the native runner has no fp8 weights")
    events = []
    source = load(plain, dtype="bfloat16")
    for loaded, precision in ((load(kept), "auto"), (source, kept.name)):
        with Engine(loaded, EngineConfig(max_sessions=1, precision=precision)) as engine:
            session = engine.open()
            session.push(random_sound(4.0, seed=3))
            engine.run_until_idle()
            events.append([event.to_dict() for event in session.poll()])
    first, second = (
        [(e["chunk"], e["p_respond"]) for e in heard if e["type"] == "decision"] for heard in events
    )
    assert len(first) == 10 and [c for c, _ in first] == [c for c, _ in second]


@needs_native
def test_runners_refuse_what_they_cannot_serve(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load(kept)
    if kept.name == "fp8":
        for config in (EngineConfig(), EngineConfig(runner="native"), EngineConfig(precision="int8")):
            with pytest.raises(ConfigError, match="native runner cannot serve this engine: it has no fp8"):
                Engine(loaded, config)
        return
    with pytest.raises(ConfigError, match="'float32' is asked for"):
        Engine(loaded, EngineConfig(precision="float32"))
    monkeypatch.setattr("fastloop.engine.runners.native", None)
    with pytest.raises(ConfigError, match="native runner cannot serve"):
        Engine(loaded)
