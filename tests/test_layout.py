"""The mirror: one name per op in every folder, and the shape of the repository."""

from __future__ import annotations

import importlib
import re
import subprocess
from pathlib import Path

import pytest

from fastloop.ops import REGISTRY
from fastloop.testing.op_cases import CASES

ROOT = Path(__file__).resolve().parents[1]

FOLDERS = {".ci", "bench", "csrc", "fastloop", "tests", "triton_kernels"}
FILES = {
    ".gitignore",
    ".pre-commit-config.yaml",
    "CHANGELOG.md",
    "CMakeLists.txt",
    "CONTRIBUTING.md",
    "LICENSE",
    "MANIFEST.in",
    "Makefile",
    "README.md",
    "constraints.txt",
    "pyproject.toml",
    "setup.py",
}

# What stands among the ops' files and is no op.
OPS_SHARED = {"__init__", "contract", "cuda", "cuda_images", "dependent", "dispatch"}
OPS_SHARED |= {"flash_attn", "native", "triton"}
TESTS_SHARED = {"conftest", "test_contract", "test_defaults", "test_dispatch", "test_flash_attn"}
TRITON_SHARED = {"__init__", "calls", "device", "launch", "resources", "tuning"}
STAGES = {"encoder", "decoder"}  # whole stages of the path in one call, as in fastloop/encoder.py
CPU_SHARED = STAGES | {"ceiling"}  # what the machine can do at most, for the benchmarks

LINES = 500
PROSE_AND_CODE = {".py", ".cpp", ".h", ".cu", ".cuh", ".md", ".toml", ".sh", ".js", ".html", ".css", ".proto"}
# Traces of one machine, and promises in place of work.
FORBIDDEN = re.compile(
    "|".join(["/wo" + "rk/", "/ro" + "ot/", "/ho" + "me/", r"\bTO" + r"DO\b", r"\bFIX" + r"ME\b"])
)

every_op = pytest.mark.parametrize("op", REGISTRY)


def tracked() -> list[Path]:
    """Files of the repository, relative to its root; without git there is no telling which are ours."""
    try:
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no git checkout")
    names = listed.stdout.decode().split("\0")
    return [Path(name) for name in names if name and (ROOT / name).is_file()]


def stems(folder: str, *suffixes: str) -> set[str]:
    files = (ROOT / folder).iterdir() if (ROOT / folder).is_dir() else ()
    return {file.stem for file in files if file.suffix in suffixes}


@every_op
def test_an_op_has_a_contract_a_definition_and_its_bytes(op: str) -> None:
    module = importlib.import_module(f"fastloop.ops.{op}")
    assert getattr(module, op) is REGISTRY[op]
    assert getattr(module, f"{op}_ref") is REGISTRY[op].reference
    for name in (f"{op}_ref", f"{op}_bytes"):
        assert (getattr(module, name).__doc__ or "").strip(), f"{name} has no docstring"
    assert f"{op}:" in (module.__doc__ or "").splitlines()[0]


@every_op
def test_an_op_has_its_test_its_benchmark_and_its_cases(op: str) -> None:
    assert (ROOT / f"tests/ops/test_{op}.py").is_file()
    assert (ROOT / f"bench/ops/bench_{op}.py").is_file()
    assert op in CASES
    assert f"def {op}_case(" in (ROOT / "fastloop/testing/op_cases.py").read_text()


@pytest.mark.parametrize(
    ("folder", "suffixes", "prefix", "shared"),
    [
        ("fastloop/ops", (".py",), "", OPS_SHARED),
        ("tests/ops", (".py",), "test_", TESTS_SHARED),
        ("tests/triton", (".py",), "test_", {"conftest"} | {f"test_{name}" for name in TRITON_SHARED}),
        ("bench/ops", (".py",), "bench_", {"conftest"}),
        ("triton_kernels", (".py",), "", TRITON_SHARED),
        ("csrc/cpu", (".cpp",), "", CPU_SHARED),
        ("csrc/cpu/isa", (".cpp",), "", CPU_SHARED),
        ("csrc/cuda", (".cu",), "", STAGES | {"condition"}),
    ],
)
def test_a_file_among_the_ops_is_named_as_one(
    folder: str, suffixes: tuple[str, ...], prefix: str, shared: set[str]
) -> None:
    """In lower folders nothing stands that has no contract above."""
    named = {f"{prefix}{op}" for op in REGISTRY}
    unknown = stems(folder, *suffixes) - named - shared
    assert not unknown, f"{folder}: {sorted(unknown)} are neither ops nor listed in {Path(__file__).name}"


def test_stages_are_those_of_the_path() -> None:
    assert stems("fastloop", ".py") >= STAGES


def test_top_level() -> None:
    files = tracked()
    assert {f.parts[0] for f in files if len(f.parts) > 1} == FOLDERS
    assert {f.name for f in files if len(f.parts) == 1} <= FILES


def test_files_can_be_read_in_one_sitting() -> None:
    long = {}
    for file in tracked():
        if file.suffix in PROSE_AND_CODE:
            count = len((ROOT / file).read_text().splitlines())
            if count > LINES:
                long[str(file)] = count
    assert not long, f"more than {LINES} lines: {long}"


def test_nothing_speaks_of_one_machine_or_of_later() -> None:
    found = []
    for file in tracked():
        try:
            text = (ROOT / file).read_text()
        except UnicodeDecodeError:
            continue
        found += [
            f"{file}:{text[: hit.start()].count(chr(10)) + 1}: {hit[0]}" for hit in FORBIDDEN.finditer(text)
        ]
    assert not found, found
