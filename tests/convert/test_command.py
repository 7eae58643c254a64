"""`fastloop convert` as a user meets it: what it says, exit codes, Ctrl-C."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from fastloop.checkpoint import load
from fastloop.cli import app

LIMIT_S = 120  # only a hang reaches it


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["convert", *map(str, arguments)], catch_exceptions=False)


def test_it_tells_what_it_did(published: Path, tmp_path: Path) -> None:
    result = run(published, tmp_path / "ours", "--trust-pickle", "--dtype", "bfloat16")
    assert (result.exit_code, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    assert lines[0] == f"published checkpoint -> {tmp_path / 'ours'}"
    assert [line.split()[0] for line in lines[1:]] == ["encoder", "decoder", "weights", "cast", "unused"]
    assert "2 layers, width 16, vocabulary 151921" in lines[2] and "in bfloat16" in lines[3]
    tensors = int(re.search(r"cast +(\d+) tensors from float32", lines[4])[1])  # type: ignore[index]
    assert tensors > 50 and "audio_bos_eos_token.weight" in lines[5]
    assert load(tmp_path / "ours").dtype == torch.bfloat16


def test_it_tells_which_matrices_int4_does_not_fit(published: Path, tmp_path: Path) -> None:
    result = run(published, tmp_path / "ours", "--trust-pickle", "--dtype", "int4")  # inputs: 16 and 24
    assert (result.exit_code, result.stderr) == (0, "")
    loaded = load(tmp_path / "ours")
    assert {matrix.precision for matrix in loaded.quantised.values()} == {"int8"}
    assert f"of them {len(loaded.quantised)} in int8: " in result.stdout


def test_an_unknown_dtype_is_told_which_there_are(published: Path, tmp_path: Path) -> None:
    result = run(published, tmp_path / "ours", "--trust-pickle", "--dtype", "int5")
    assert result.exit_code == 2 and not (tmp_path / "ours").exists()
    assert "dtype 'int5': weights are one of float32, bfloat16, float16, int8, int4, fp8" in result.stderr


def test_a_pickle_needs_a_word(published: Path, tmp_path: Path) -> None:
    result = run(published, tmp_path / "ours")
    assert result.exit_code == 2 and result.stdout == "" and not (tmp_path / "ours").exists()
    assert result.stderr.startswith("fastloop convert: ") and "--trust-pickle" in result.stderr
    assert result.stderr.count("\n") == 1


def test_every_problem_is_a_line(published: Path, tmp_path: Path) -> None:
    (published / "model_config.yaml").write_text(
        (published / "model_config.yaml")
        .read_text()
        .replace("intermediate_size: 24", "intermediate_size: 25")
    )
    tower = torch.load(published / "audiointeraction_ChunkwisedEncoder.pth", weights_only=True)
    tower["odd\n\x1b[31mname"] = tower.pop("conv1.bias")
    torch.save(tower, published / "audiointeraction_ChunkwisedEncoder.pth")
    result = run(published, tmp_path / "ours", "--trust-pickle")
    lines = result.stderr.splitlines()
    assert result.exit_code == 2 and len(lines) == 4
    assert all(line.startswith("fastloop convert: ") and line.isprintable() for line in lines)
    assert str(published) in lines[0]
    assert [line.split(" (")[0] for line in lines[1:]] == [
        f"fastloop convert: {kind}" for kind in ("missing", "left over", "wrong shape")
    ]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["{tmp}/none", "{tmp}/new"], "does not exist"),
        (["{tmp}", "{tmp}/new"], "neither model_config.yaml"),
        (["{tmp}/published", "{tmp}/published"], "exists already"),
        (["{tmp}/published", "{tmp}/new", "--dtype", "int3"], "float32, bfloat16, float16"),
        (["{tmp}/published"], "destination"),
        (["{tmp}/published", "{tmp}/new", "--force"], "--force"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    published: Path, tmp_path: Path, arguments: list[str], told: str
) -> None:
    result = run(*(a.format(tmp=tmp_path) for a in arguments), "--trust-pickle")
    assert result.exit_code == 2 and result.stdout == "" and len(result.stderr.splitlines()) == 1
    assert result.stderr.startswith("fastloop convert: ") and told in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["published"]


INTERRUPTED = """
import os, signal, sys
from fastloop import tensorfile
from fastloop.cli import main
inner, count, stop = tensorfile.require_finite, [0], int(sys.argv[3])
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background ignores it
import fastloop.convert as convert
def checked(tensor, name):
    count[0] += 1
    if count[0] == 20:
        os.kill(os.getpid(), stop)
    inner(tensor, name)
convert.require_finite = checked
sys.argv = ["fastloop", "convert", *sys.argv[1:3], "--trust-pickle"]
main()
"""


@pytest.mark.parametrize(("stop", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopped_in_the_middle_it_leaves_nothing(
    published: Path, tmp_path: Path, stop: signal.Signals, code: int
) -> None:
    paths = (str(published), str(tmp_path / "new" / "ours"))
    command = [sys.executable, "-c", INTERRUPTED, *paths, str(int(stop))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S)
    assert done.returncode == code and done.stdout == "" and "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["published"]


def test_what_was_converted_is_heard(published: Path, tmp_path: Path) -> None:
    """From a foreign directory to decisions in two commands."""
    assert run(published, tmp_path / "ours", "--trust-pickle").exit_code == 0
    options = ["--json", "--threshold", "1", "--model", str(tmp_path / "ours")]
    heard = CliRunner().invoke(app, ["listen", "-", *options], input=bytes(32_000))
    assert heard.exit_code == 0 and heard.stdout.count('"decision":"silent"') == 3
