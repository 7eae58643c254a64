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


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--size", "7b"], "--size is '7b'; choose from nano"),
        (["--precision", "int3"], "--precision is 'int3'; choose from float32"),
        (["--sessions", "1,x"], "--sessions is '1,x'"),
        (["--sessions", "0"], "--sessions is '0'"),
        (["--contexts", "-5"], "--contexts is '-5'"),
    ],
)
def test_bad_options_are_one_line(arguments: list[str], told: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2 and told in result.output and len(result.output.splitlines()) == 1
