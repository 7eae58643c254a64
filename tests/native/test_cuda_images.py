"""Where a kernel's image comes from: the build, the cache, NVRTC, nvcc; and what is said if from nowhere."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fastloop.ops import cuda_images
from fastloop.ops.dispatch import BackendError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def empty_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Nothing is kept, no compiler is there."""
    monkeypatch.setenv("FASTLOOP_CACHE", str(tmp_path))
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setitem(sys.modules, "cupy", None)
    monkeypatch.setitem(sys.modules, "cupy.cuda", None)
    return tmp_path / "cuda"


class FakeNvrtc:
    """The functions of cupy.cuda.nvrtc that are called."""

    class NVRTCError(RuntimeError):
        pass

    def __init__(self, log: str = "") -> None:
        self.log, self.made, self.destroyed = log, [], 0

    def createProgram(self, *arguments: Any) -> int:
        self.made.append(arguments)
        return 7

    def compileProgram(self, program: int, options: list[str]) -> None:
        self.options = options
        if self.log:
            raise self.NVRTCError("NVRTC_ERROR_COMPILATION")

    def getProgramLog(self, program: int) -> str:
        return self.log

    def getCUBIN(self, program: int) -> bytes:
        return b"cubin"

    def destroyProgram(self, program: int) -> None:
        self.destroyed += program


def install(monkeypatch: pytest.MonkeyPatch, nvrtc: FakeNvrtc) -> None:
    cuda = SimpleNamespace(nvrtc=nvrtc)
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(cuda=cuda))
    monkeypatch.setitem(sys.modules, "cupy.cuda", cuda)


def test_nvrtc_compiles_once(monkeypatch: pytest.MonkeyPatch, empty_cache: Path) -> None:
    nvrtc = FakeNvrtc()
    install(monkeypatch, nvrtc)
    assert cuda_images.image("linear", "sm_90a") == b"cubin"
    assert cuda_images.image("linear", "sm_90a") == b"cubin"
    (made,) = nvrtc.made
    assert made[0] == (ROOT / "csrc/cuda/linear.cu").read_text() and nvrtc.destroyed == 7
    assert "--gpu-architecture=sm_90a" in nvrtc.options
    assert f"--include-path={ROOT / 'csrc/cuda'}" in nvrtc.options
    assert set(cuda_images.flags()) <= set(nvrtc.options)
    (kept,) = empty_cache.iterdir()
    assert kept.name == f"linear-sm_90a-{cuda_images.source_key()}.cubin"


def test_what_the_compilers_say_is_kept(monkeypatch: pytest.MonkeyPatch, empty_cache: Path) -> None:
    install(monkeypatch, FakeNvrtc("linear.cu(1): a mistake"))
    with pytest.raises(
        BackendError, match=r"no kernel for sm_80: NVRTC: (.|\n)*a mistake; nvcc is not on PATH"
    ):
        cuda_images.image("linear", "sm_80")
    assert not empty_cache.exists()


def test_nothing_is_there() -> None:
    with pytest.raises(
        BackendError, match=r"CuPy is not there .*; nvcc is not on PATH\. Install cupy-cuda13x"
    ):
        cuda_images.image("linear", "sm_80")


def test_a_cache_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FASTLOOP_CACHE", str(tmp_path / "file"))
    install(monkeypatch, FakeNvrtc())
    assert cuda_images.image("linear", "sm_90a") == b"cubin"


def test_what_the_build_made_comes_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cuda_images, "__file__", str(tmp_path / "fastloop/ops/cuda_images.py"))
    monkeypatch.setattr(cuda_images, "source_key", lambda: "0123456789abcdef")
    built = tmp_path / "fastloop/cuda_kernels/linear-0123456789abcdef.fatbin"
    built.parent.mkdir(parents=True)
    built.write_bytes(b"fat")
    assert cuda_images.image("linear", "sm_90a") == b"fat"


def test_the_key_follows_the_sources(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = tmp_path / "sources"
    shutil.copytree(ROOT / "csrc/cuda", folder)
    monkeypatch.setattr(cuda_images, "source_folder", lambda: folder)
    key = cuda_images.source_key.__wrapped__
    first = key()
    assert first == cuda_images.source_key() and re.fullmatch("[0-9a-f]{16}", first)
    (folder / "driver.cpp").write_text("of the host: no matter")
    assert key() == first
    (folder / "hopper.cuh").write_text((folder / "hopper.cuh").read_text() + "\n")
    assert key() != first


def test_cmake_names_them_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The part of CMakeLists.txt, configured alone."""
    monkeypatch.undo()
    cmake = shutil.which("cmake") or shutil.which("cmake", path=str(Path(sys.executable).parent))
    if cmake is None or shutil.which("nvcc") is None:
        pytest.skip("no cmake or no nvcc")
    text = (ROOT / "CMakeLists.txt").read_text()
    part = text[text.index("option(FASTLOOP_CUDA") :]
    (tmp_path / "csrc").symlink_to(ROOT / "csrc")
    header = "cmake_minimum_required(VERSION 3.18)\nproject(kernels LANGUAGES NONE)\n"
    (tmp_path / "CMakeLists.txt").write_text(f'{header}{part}\nmessage(STATUS "images: ${{images}}")\n')
    done = subprocess.run(
        [cmake, "-S", str(tmp_path), "-B", str(tmp_path / "build"), "-DFASTLOOP_CUDA=ON"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    ops = {file.stem for file in (ROOT / "csrc/cuda").glob("*.cu")}
    names = {f"{op}-{cuda_images.source_key()}.fatbin" for op in ops}
    assert {Path(path).name for path in done.stdout.split("images: ")[1].split("\n")[0].split(";")} == names


@pytest.mark.parametrize(
    ("version", "expected"), [((8, 0), "sm_80"), ((8, 9), "sm_89"), ((9, 0), "sm_90a"), ((10, 0), "sm_100")]
)
def test_architectures(version: tuple[int, int], expected: str) -> None:
    assert cuda_images.architecture(*version) == expected
