"""`fastloop bench cpu`: figures that add up, on a model small enough for a test."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from fastloop.cli import app
from fastloop.ops.native import native, reason

pytestmark = pytest.mark.skipif(native is None, reason=reason)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["bench", "cpu", *map(str, arguments)], catch_exceptions=False)


def test_every_figure_stands_beside_its_floor(tmp_path: Path) -> None:
    out, plot = tmp_path / "b.json", tmp_path / "b.png"
    result = run("--seconds", 0, "--sessions", "1,2", "--contexts", "0,70", "--json", out, "--plot", plot)
    assert result.exit_code == 0
    figures = json.loads(out.read_text())["figures"]
    assert len(result.output.splitlines()) == 1 + len(figures)
    assert {(f["sessions"], f["context"]) for f in figures if f["name"] == "listening step"} == {
        (1, 0),
        (1, 70),
        (2, 0),
        (2, 70),
    }
    for f in figures:
        peak = f["ceilings"]["float32" if f["name"] == "mel" else "int8"]
        floor = max(f["operations"] / peak, f["bytes"] / f["ceilings"]["read"]) * 1e3
        assert f["floor_ms"] == pytest.approx(floor) and f["share"] == pytest.approx(floor / f["median_ms"])
        assert 0 < f["minimum_ms"] <= f["median_ms"] <= f["p99_ms"] and f["calls"] >= 3
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_formats_of_pages_and_groups_of_weights(tmp_path: Path) -> None:
    """Bytes read: half of one and a share of a scale for a weight, one and a share for a number kept."""
    steps = {}
    for kv, group in (("bfloat16", 32), ("int8", 64)):
        out = tmp_path / f"{kv}.json"
        options = ("--precision", "int4", "--kv", kv, "--group", group, "--contexts", "0,128")
        assert run("--seconds", 0, *options, "--json", out).exit_code == 0
        steps[kv] = [f["bytes"] for f in json.loads(out.read_text())["figures"] if f["name"] == "text token"]
    weights = {kv: empty - (full - empty) / 128 for kv, (empty, full) in steps.items()}
    assert weights["int8"] / weights["bfloat16"] == pytest.approx((0.5 + 2 / 64) / (0.5 + 2 / 32))
    kept = {kv: full - empty for kv, (empty, full) in steps.items()}
    assert kept["int8"] / kept["bfloat16"] == pytest.approx((64 + 4) / (2 * 64))


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--size", "7b"], "--size is '7b'; choose from nano"),
        (["--precision", "int3"], "--precision is 'int3'; choose from float32"),
        (["--kv", "int4"], "--kv is 'int4'; choose from float32, bfloat16, int8"),
        (["--group", "16"], "--group is 16; choose from 32, 64"),
        (["--sessions", "1,x"], "--sessions is '1,x'"),
        (["--sessions", "0"], "--sessions is '0'"),
        (["--contexts", "-5"], "--contexts is '-5'"),
        (["--json", "nowhere/b.json"], "nowhere/b.json: there is no folder nowhere"),
        (["--plot", "nowhere/b.png"], "nowhere/b.png: there is no folder nowhere"),
    ],
)
def test_bad_options_are_one_line(arguments: list[str], told: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2 and told in result.output and len(result.output.splitlines()) == 1
