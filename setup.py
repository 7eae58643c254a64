"""Package metadata, and CMake for csrc/ (CMakeLists.txt). Build and tool configuration is in pyproject.toml.

FASTLOOP_NO_NATIVE=1 builds without the compiled kernels: every op then runs in PyTorch, and `fastloop doctor`
says so. FASTLOOP_CUDA=1 compiles the CUDA kernels with nvcc, 0 does not; by default a wheel has them if nvcc
is there, and an install in place compiles them when they are first used.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
WITHOUT = "or set FASTLOOP_NO_NATIVE=1 to install without the compiled kernels (slower)"


class CMakeBuild(build_ext):
    """Builds fastloop._native with CMake, where setuptools wants it."""

    def run(self) -> None:
        self.in_place = bool(self.inplace)  # setuptools takes it back while it builds
        super().run()

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        cmake = shutil.which("cmake")
        if cmake is None:
            raise CompileError(f"fastloop: cmake is not on PATH; install it, {WITHOUT}")
        configure = [
            cmake,
            *("-S", str(ROOT)),
            *("-B", str(build)),
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={self._pybind11()}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target}",
        ]
        in_place = self.in_place or bool(getattr(self, "editable_mode", False))
        configure.append(f"-DFASTLOOP_CUDA={'ON' if compiles_cuda(in_place) else 'OFF'}")
        self._run("configuring the compiled kernels", configure)
        jobs = str(self.parallel or os.cpu_count() or 1)
        self._run("compiling the kernels", [cmake, "--build", str(build), "--parallel", jobs])
        if not in_place:
            copy_cuda_sources(target / "cuda_kernels")

    def _pybind11(self) -> str:
        try:
            import pybind11
        except ModuleNotFoundError as error:
            raise CompileError(
                f"fastloop: pybind11 is not installed; build with isolation, install pybind11, {WITHOUT}"
            ) from error
        return pybind11.get_cmake_dir()

    def _run(self, what: str, command: list[str]) -> None:
        try:
            subprocess.run(command, check=True)
        except subprocess.CalledProcessError as error:
            raise CompileError(
                f"fastloop: {what} failed (the reason is above). It takes make and a C++ compiler (gcc 12 or "
                f"newer, or clang): install them (Debian: apt install build-essential), {WITHOUT}"
            ) from error


def compiles_cuda(in_place: bool) -> bool:
    """Whether nvcc compiles csrc/cuda now: as FASTLOOP_CUDA says, else for a wheel where there is one."""
    choice = os.environ.get("FASTLOOP_CUDA", "")
    if choice not in ("", "0", "1"):
        raise SystemExit(f"fastloop: FASTLOOP_CUDA must be 0 or 1, got {choice!r}")
    return choice == "1" if choice else not in_place and shutil.which("nvcc") is not None


def copy_cuda_sources(target: Path) -> None:
    """What is compiled on the user's machine, beside the package; a checkout has it in csrc/cuda."""
    target.mkdir(parents=True, exist_ok=True)
    for file in (ROOT / "csrc/cuda").iterdir():
        if file.suffix in (".cu", ".cuh", ".h") or file.name == "flags.txt":
            shutil.copy(file, target)


def native_extensions() -> list[Extension]:
    """fastloop._native, unless FASTLOOP_NO_NATIVE asks for none."""
    choice = os.environ.get("FASTLOOP_NO_NATIVE", "")
    if choice not in ("", "0", "1"):
        raise SystemExit(f"fastloop: FASTLOOP_NO_NATIVE must be 0 or 1, got {choice!r}")
    return [] if choice == "1" else [Extension("fastloop._native", sources=[])]


def version() -> str:
    found = re.search(r'^__version__ = "(.+)"$', (ROOT / "fastloop/__init__.py").read_text(), re.MULTILINE)
    if found is None:
        raise SystemExit("fastloop: no __version__ in fastloop/__init__.py")
    return found[1]


EXTRAS = {
    "cuda": ["flash-attn", "cupy-cuda13x", "cuda-bindings", "nvidia-ml-py"],
    "serve": ["starlette", "uvicorn", "msgspec", "prometheus-client"],
    "train": [
        "lightning",
        "scipy",
        "webdataset",
        "jiwer",
        "matplotlib",
        "sacrebleu",
        "whisper-normalizer",
        "pyarrow",
    ],
    "ray": ["ray[data]"],
    "mic": ["sounddevice"],
    "bench": ["pytest", "pytest-benchmark", "openai-whisper", "transformers>=4.57.6", "matplotlib"],
    "test": [
        "pytest>=8",
        "pytest-xdist",
        "hypothesis",
        "openai-whisper",
        "transformers>=4.57.6",
        "librosa",
        "scipy",
        "lightning",
        "webdataset",
        "jiwer",
        "matplotlib",
        "sacrebleu",
        "whisper-normalizer",
        "pyarrow",
        "ray[data]",
        "triton; sys_platform == 'linux' and platform_machine == 'x86_64'",
        "ruff",
        "mypy",
        "types-PyYAML",
    ],
}

readme = ROOT / "README.md"
setup(
    name="fastloop",
    version=version(),
    description="An engine for audio interaction models: perceive, decide, respond, all the time",
    long_description=readme.read_text() if readme.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=[*find_packages(include=["fastloop", "fastloop.*"]), "fastloop.triton_kernels"],
    package_dir={"fastloop": "fastloop", "fastloop.triton_kernels": "triton_kernels"},
    package_data={
        "fastloop": ["py.typed", "models/**/*", "soundflow/**/*.yaml"],
        "fastloop.triton_kernels": ["tables/*.json"],
    },
    include_package_data=False,
    install_requires=[
        "torch>=2.11",
        "numpy",
        "einops",
        "safetensors",
        "tokenizers",
        "soundfile",
        "soxr",
        "typer",
        "rich",
        "pyyaml",
    ],
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["fastloop = fastloop.cli:main"]},
    ext_modules=native_extensions(),
    cmdclass={"build_ext": CMakeBuild},
)
