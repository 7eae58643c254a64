"""The CUDA part of the C ABI from plain C: the example is strict C99, and runs as far as a machine goes."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from types import ModuleType

import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory, emulation: ModuleType) -> Path:
    """Built of what it needs: the example, the host side of csrc/cuda, the errors of csrc/common."""
    folder = tmp_path_factory.mktemp("example")
    compiler = shutil.which(os.environ.get("CC", "cc")) or pytest.skip("no C compiler")
    includes = [f"-I{ROOT / 'csrc' / name}" for name in ("include", "common", "cuda")]
    sources = [*(ROOT / "csrc/cuda").glob("*.cpp"), ROOT / "csrc/common/status.cpp"]
    strict = ["-std=c99", "-pedantic", "-Wall", "-Wextra", "-Wstrict-prototypes", "-Werror"]
    libraries = ["-ldl", "-lm", "-o", "example"]
    for command in (
        [compiler, *strict, *includes, "-c", str(HERE / "example_cuda.c"), "-o", "example.o"],
        [emulation.compiler(), "-std=c++20", *includes, *map(str, sources), "example.o", *libraries],
    ):
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
    return folder / "example"


def run(example: Path, library: str, *arguments: str) -> tuple[int, str]:
    environment = os.environ | {"FASTLOOP_LIBCUDA": library}
    done = subprocess.run([example, *arguments], env=environment, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def test_without_a_driver(example: Path) -> None:
    code, said = run(example, "libnot_there.so.1")
    assert code == 0 and said.startswith("no CUDA driver: libnot_there.so.1")


def test_on_an_emulated_gpu(
    example: Path, emulation: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.syspath_prepend(str(HERE))
    driver = __import__("cuda_driver")
    driver.driver(emulation.compiler())
    library = os.environ["FASTLOOP_LIBCUDA"]
    assert run(example, library) == (
        0, "fake GPU 0: sm_90, 132 processors\nno image: name a cubin of csrc/cuda/linear.cu\n",
    )  # fmt: skip
    kernels = emulation.build_library([ROOT / "csrc/cuda/linear.cu"])
    image = tmp_path / "linear.cubin"
    image.write_bytes(driver.IMAGE + str(kernels).encode() + b"\0")
    code, said = run(example, library, str(image))
    assert (code, said.splitlines()[-1]) == (0, "largest error of the product: 0"), said
    image.write_bytes(b"text, and no kernel")
    code, said = run(example, library, str(image))
    assert code == 1 and "neither a cubin nor a fat binary" in said
