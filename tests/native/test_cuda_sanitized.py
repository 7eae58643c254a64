"""The CUDA kernels on the CPU under AddressSanitizer: nothing outside a tensor or shared memory is touched.

In a process of its own: the sanitizer must be there before anything else.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]

CALLS = {
    "mel": """
        for streams, samples, bins in ((2, 6400, 128), (1, 7637, 80)):
            check("mel", mel_case(seeded(1), streams=streams, samples=samples, bins=bins))
    """,
    "paged_attention": """
        pairs = ((torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16),
                 (torch.bfloat16, torch.float8_e4m3fn))
        for dtype, pages in pairs:
            for blocks in (1, 9, 40):
                check("paged_attention", paged_attention_case(
                    seeded(blocks), rows=(5, 1, 0, 13), lens=(150, 12, 0, 277), heads=14, kv_heads=2,
                    gaps=((3, 9), (0, 0), (0, 0), (64, 130)), head_width=112, page=7, dtype=dtype,
                    page_dtype=pages), blocks=blocks, seed=blocks)
        for head_width, blocks in ((64, 1), (128, 9)):
            check("paged_attention", paged_attention_case(
                seeded(blocks), rows=(5, 1, 0, 13), lens=(150, 12, 0, 977), heads=14, kv_heads=2,
                gaps=((3, 9), (0, 0), (0, 0), (64, 130)), head_width=head_width, page=32,
                dtype=torch.bfloat16), blocks=blocks, seed=blocks, wgmma=True)
    """,
    "decide": """
        for blocks in (1, 2, 8):
            check("decide", decide_case(seeded(blocks), rows=40, width=53, sessions=9), blocks=blocks)
    """,
    "sample": """
        for blocks in (1, 2, 8):
            for vocab, dtype in ((3001, torch.float32), (37, torch.bfloat16)):
                case = sample_case(seeded(blocks), rows=5, vocab=vocab, dtype=dtype)
                check("sample", case, blocks=blocks, held=blocks != 2)
    """,
}
SCRIPT = """if True:
    import importlib.util, sys
    from pathlib import Path
    import torch
    from fastloop.testing.assertions import seeded
    from fastloop.testing.op_cases import decide_case, mel_case, paged_attention_case, sample_case
    from fastloop.testing.selfcheck import compare

    def load(path):
        spec = importlib.util.spec_from_file_location(path.stem, path)
        sys.modules[path.stem] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[path.stem])
        return sys.modules[path.stem]

    here, library, op = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    emulation, kernels = load(here / "cuda_emulation" / "emulation.py"), load(here / "cuda_kernels.py")
    own = kernels.Kernels(emulation, libraries={op: emulation.Library(library)})

    def check(op, case, **options):
        for name, value in options.items():
            setattr(own, name, value)
        found = compare(kernels.Emulated(op, own), case)
        assert found.ok, found.problem

    if True:
"""


@pytest.mark.slow
@pytest.mark.parametrize("op", CALLS)
def test_nothing_outside_is_touched(emulation: ModuleType, op: str) -> None:
    command = [emulation.compiler(), "-print-file-name=libasan.so"]
    runtime = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    if not Path(runtime).is_absolute():
        pytest.skip("the compiler has no AddressSanitizer")
    library = emulation.build_library([ROOT / f"csrc/cuda/{op}.cu"], emulation.SANITIZE, f"{op}-asan")
    environment = {**os.environ, "LD_PRELOAD": runtime, "ASAN_OPTIONS": "detect_leaks=0"}
    ran = subprocess.run(
        [sys.executable, "-c", SCRIPT + CALLS[op], str(HERE), str(library), op],
        capture_output=True,
        text=True,
        env=environment,
        cwd=ROOT,
    )
    assert ran.returncode == 0, ran.stderr[-4000:]
