"""What nvcc makes of csrc/cuda, without a GPU: it compiles for every architecture, nothing spills, and the
instructions that a kernel was written for are really in it.
"""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from fastloop.ops import cuda_images

ROOT = Path(__file__).resolve().parents[2]
OPS = sorted(file.stem for file in (ROOT / "csrc/cuda").glob("*.cu"))
ARCHITECTURES = ("sm_80", "sm_90a")
PROCESSOR_SHARED = {"sm_80": 167_936, "sm_90a": 233_472}  # bytes of one multiprocessor
RESERVED = 1024  # of them, for each block
REGISTERS = 65_536

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH"),
]
every_arch = pytest.mark.parametrize("arch", ARCHITECTURES)


@dataclass(frozen=True)
class Compiled:
    """One file for one architecture: registers of each kernel, and all that was said."""

    registers: dict[str, int]
    said: str
    code: str  # SASS, or "" where there is no cuobjdump

    def instructions(self, kernel: str) -> str:
        parts = re.split(r"\n\s+Function : (\w+)\n", self.code)
        return dict(zip(parts[1::2], parts[2::2], strict=True))[kernel]


@functools.cache
def compiled(op: str, arch: str, folder: Path) -> Compiled:
    cubin = folder / f"{op}-{arch}.cubin"
    source = ROOT / f"csrc/cuda/{op}.cu"
    target = ["-cubin", f"-gencode=arch={arch.replace('sm', 'compute')},code={arch}", "-o", str(cubin)]
    command = ["nvcc", *cuda_images.flags(), "-Xptxas", "-v", "-Werror", "all-warnings", *target, str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    names = re.findall(r"Compiling entry function '(\w+)'", done.stderr)
    counts = [int(count) for count in re.findall(r"Used (\d+) registers", done.stderr)]
    return Compiled(dict(zip(names, counts, strict=True)), done.stderr, sass(cubin))


def sass(cubin: Path) -> str:
    try:
        from triton import knobs
    except ImportError:
        return ""
    command = [knobs.nvidia.cuobjdump.path, "-sass", str(cubin)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cubins")


@every_arch
@pytest.mark.parametrize("op", OPS)
def test_nothing_is_spilled(op: str, arch: str, folder: Path) -> None:
    found = compiled(op, arch, folder)
    assert found.registers and all(0 < count <= 255 for count in found.registers.values())
    moved = re.findall(
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", found.said
    )
    assert len(moved) >= len(found.registers)
    assert {number for line in moved for number in line} == {"0"}, found.said
    assert "Potential Performance Loss" not in found.said  # products of wgmma that wait for each other


@every_arch
def test_two_blocks_of_linear_fit_into_a_processor(arch: str, folder: Path) -> None:
    """One loads while the other one ends: registers and the rings of csrc/cuda/linear.h allow it."""
    for kernel, registers in compiled("linear", arch, folder).registers.items():
        _, kind, rows = kernel.split("_")
        if kind not in ("wgmma", "mma"):
            continue  # small weights beside many rows of x: one block is enough
        if kind == "wgmma":
            threads, stages, barriers = 160, {"64": 4, "32": 5}.get(rows, 6), 16
        else:
            threads, stages, barriers = 128, 3 if rows == "64" else 4, 0
        shared = stages * ((128 + int(rows)) * 128 + barriers)
        assert 2 * threads * registers <= REGISTERS, kernel
        if kind == "wgmma" or arch == "sm_80":
            assert 2 * (shared + RESERVED) <= PROCESSOR_SHARED[arch], kernel


def test_linear_uses_what_it_was_written_for(folder: Path) -> None:
    """sm_90a: bulk tensor copies, products of four warps, dependent launch; sm_80: asynchronous copies."""
    old, new = (compiled("linear", arch, folder) for arch in ARCHITECTURES)
    if not new.code:
        pytest.skip("no cuobjdump: triton is not installed")
    kinds = ("mma", "e4m3", "int4")
    assert set(old.registers) == {f"linear_{kind}_{rows}" for kind in kinds for rows in (8, 16, 32, 64)}
    assert set(new.registers) == set(old.registers) | {f"linear_wgmma_{rows}" for rows in (8, 16, 32, 64)}
    for rows in (8, 16, 32, 64):
        code = new.instructions(f"linear_wgmma_{rows}")
        assert f"HGMMA.64x{rows}x16.F32.BF16" in code and "UTMALDG.2D" in code
        # the weights of the ring are on their way before the kernel in front is waited for
        assert code.index("UTMALDG.2D") < code.index("ACQBULK") < code.rindex("UTMALDG.2D")
        assert "PREEXIT" in code
        for found in (old, new):
            code = found.instructions(f"linear_mma_{rows}")
            assert "HMMA.16816.F32.BF16" in code and "LDGSTS" in code and "LDSM" in code


@every_arch
def test_attention_uses_what_it_was_written_for(arch: str, folder: Path) -> None:
    """Matrix products, their operands by ldmatrix (values transposed), pages by asynchronous copies."""
    found = compiled("paged_attention", arch, folder)
    if not found.code:
        pytest.skip("no cuobjdump: triton is not installed")
    for kernel in ("paged_attention_bf16_bf16_128", "paged_attention_bf16_e4m3_128"):
        code = found.instructions(kernel)
        for instruction in ("HMMA.16816.F32.BF16", "LDSM.16.M88.4", "LDSM.16.MT88.4", "LDGSTS.E.BYPASS.128"):
            assert instruction in code, (kernel, instruction)
    assert "HMMA" not in found.instructions("paged_attention_f32_f32_128")  # float32 is not rounded


@pytest.mark.parametrize("head", [64, 128])
@pytest.mark.parametrize("dtype", ["bf16", "f16"])
def test_attention_by_wgmma_is_what_it_was_written_for(dtype: str, head: int, folder: Path) -> None:
    """Registers move from the warps that load to those that multiply; products are asynchronous in groups,
    and the softmax stands beside those of the values.
    """
    found, kernel = compiled("paged_attention", "sm_90a", folder), f"paged_attention_wgmma_{dtype}_{head}"
    assert kernel not in compiled("paged_attention", "sm_80", folder).registers
    # as many as the groups' plan hands round: 128 x 40 + 256 x 232 = 384 x 168
    assert found.registers[kernel] == 168
    used = re.search(rf"function '{kernel}'(?:.*\n){{1,3}}?.*Used.* (\d+) bytes smem", found.said)
    assert used is not None
    assert int(used[1]) + 224 * 1024 + 560 + RESERVED <= PROCESSOR_SHARED["sm_90a"]
    if not found.code:
        pytest.skip("no cuobjdump: triton is not installed")
    code = found.instructions(kernel)
    loading, multiplying = code.index("USETMAXREG.DEALLOC.CTAPOOL 0x28"), code.index("USETMAXREG.TRY_ALLOC")
    assert "0xe8" in code[multiplying:].split(";")[0] and loading < multiplying
    for part, most in ((code[loading:multiplying], 40), (code, 232)):
        assert max(int(number) for number in re.findall(r"\bR(\d+)\b", part)) < most
    assert loading < code.index("UTMALDG.2D") < code.rindex("UTMALDG.2D") < multiplying
    kind = {"bf16": "F32.BF16", "f16": "F32"}[dtype]
    products = re.findall(rf"HGMMA\.64x(\d+)x16\.{kind} (.*);", code)
    scores = ["gsb0" in rest for columns, rest in products if columns == "64" and "tnspB" not in rest]
    sums = ["gsb0" in rest for columns, rest in products if int(columns) == head and "tnspB" in rest]
    # of the first step and of every other; of every step but the last, and of the last; gsb0: a group ends
    assert scores == 2 * [*[False] * (head // 16 - 1), True] and sums == 2 * [False, False, False, True]
    assert len(products) == len(scores) + len(sums)
    waits = re.split(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x(\d)", code)
    assert waits[1::2] == ["0", "1", "0", "0"]
    assert waits[4].count("MUFU.EX2") == 64 // 2 + 2  # a thread's weights, and by how much two rows shrink


@every_arch
@pytest.mark.parametrize("op", ["mel", "paged_attention", "decide", "sample"])
def test_dependent_kernels_wait_before_they_read(op: str, arch: str, folder: Path) -> None:
    """What comes from memory is read after the kernel in front has ended; sm_80 has no such launches."""
    found = compiled(op, arch, folder)
    if not found.code:
        pytest.skip("no cuobjdump: triton is not installed")
    for kernel in found.registers:
        code = found.instructions(kernel)
        assert ("ACQBULK" in code) == (arch == "sm_90a")
        reads = [code.find(name) for name in ("LDG.", "LDGSTS.", "STG.") if name in code]
        assert arch == "sm_80" or code.index("ACQBULK") < min(reads), kernel
    teams = op in ("decide", "sample")
    assert any("UCGABAR" in found.instructions(k) for k in found.registers) == (teams and arch == "sm_90a")
