"""Images of the CUDA C++ kernels of csrc/cuda, one for each op: found, or compiled here.

    python -m fastloop.ops.cuda_images linear [--arch sm_90a] [--out FILE]      compile one, without a GPU

In this order: what the build made (FASTLOOP_CUDA=1, or a wheel built where nvcc is); what an earlier process
compiled (a folder of the user, FASTLOOP_CACHE chooses another); compiled now, by CuPy's NVRTC, else by an
nvcc on PATH. All are named by a digest of the sources, so none is ever used with other ones.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import importlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from .dispatch import BackendError

SOURCES = (".cu", ".cuh", ".h")


def source_folder() -> Path:
    """csrc/cuda of the checkout this runs in, else the sources beside the installed package."""
    package = Path(__file__).resolve().parents[1]
    checkout = package.parent / "csrc" / "cuda"
    return checkout if checkout.is_dir() else package / "cuda_kernels"


@functools.cache
def source_key() -> str:
    """A digest of all that is compiled; CMakeLists.txt builds the same one."""
    files = sorted(f for f in source_folder().iterdir() if f.suffix in SOURCES or f.name == "flags.txt")
    digests = "".join(hashlib.sha256(file.read_bytes()).hexdigest() for file in files)
    return hashlib.sha256(digests.encode()).hexdigest()[:16]


def flags() -> list[str]:
    """What nvcc and NVRTC are both given."""
    return (source_folder() / "flags.txt").read_text().split()


def architecture(major: int, minor: int) -> str:
    """What to compile for: sm_90 with its own instructions, which no other GPU has."""
    return f"sm_{major}{minor}" + ("a" if (major, minor) == (9, 0) else "")


def cache_folder() -> Path:
    """Where compiled kernels are kept."""
    chosen = os.environ.get("FASTLOOP_CACHE")
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastloop"
    return (Path(chosen) if chosen else base) / "cuda"


def image(op: str, arch: str) -> bytes:
    """A cubin or fat binary of csrc/cuda/<op>.cu with code for `arch`; BackendError with all that failed."""
    built = Path(__file__).resolve().parents[1] / "cuda_kernels" / f"{op}-{source_key()}.fatbin"
    if built.is_file():
        return built.read_bytes()
    kept = cache_folder() / f"{op}-{arch}-{source_key()}.cubin"
    if kept.is_file():
        return kept.read_bytes()
    failures = []
    for compiler in (compile_nvrtc, compile_nvcc):
        try:
            made = compiler(op, arch)
        except BackendError as error:
            failures.append(str(error))
            continue
        _keep(kept, made)
        return made
    raise BackendError(
        f"op {op}: backend 'cuda' has no kernel for {arch}: {'; '.join(failures)}. "
        "Install cupy-cuda13x, or nvcc"
    )


def _keep(path: Path, content: bytes) -> None:
    """Write it whole or not at all; where nothing can be written, the next process compiles again."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(content)
        Path(file.name).replace(path)
    except OSError:
        return


def compile_nvrtc(op: str, arch: str) -> bytes:
    """A cubin by CuPy's NVRTC; BackendError where that is not installed, or with what the compiler says."""
    try:
        nvrtc = importlib.import_module("cupy.cuda").nvrtc
    except ImportError as error:
        raise BackendError(f"CuPy is not there ({error})") from error
    source = source_folder() / f"{op}.cu"
    options = [*flags(), f"--gpu-architecture={arch}", f"--include-path={source.parent}"]
    program = nvrtc.createProgram(source.read_text(), source.name, [], [])
    try:
        try:
            nvrtc.compileProgram(program, options)
        except nvrtc.NVRTCError as error:
            raise BackendError(f"NVRTC: {error}\n{nvrtc.getProgramLog(program)}") from error
        return bytes(nvrtc.getCUBIN(program))
    finally:
        nvrtc.destroyProgram(program)


def compile_nvcc(op: str, arch: str) -> bytes:
    """A cubin by the nvcc on PATH; BackendError where there is none, or with what it says."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        raise BackendError("nvcc is not on PATH")
    virtual = arch.replace("sm_", "compute_")
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "image.cubin"
        source = source_folder() / f"{op}.cu"
        target = ["-cubin", f"-gencode=arch={virtual},code={arch}", "-o", str(made)]
        done = subprocess.run([nvcc, *flags(), *target, str(source)], capture_output=True, text=True)
        if done.returncode:
            raise BackendError(f"nvcc: {done.stderr[-2000:]}")
        return made.read_bytes()


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("op", choices=sorted(f.stem for f in source_folder().glob("*.cu")))
    parser.add_argument("--arch", default="sm_90a", help="sm_80, sm_90a, ... (default sm_90a)")
    parser.add_argument("--out", type=Path, help="the image's file (default <op>-<arch>.cubin)")
    chosen = parser.parse_args()
    path = chosen.out or Path(f"{chosen.op}-{chosen.arch}.cubin")
    try:
        path.write_bytes(image(chosen.op, chosen.arch))
    except BackendError as error:
        print(error, file=sys.stderr)
        return 1
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
