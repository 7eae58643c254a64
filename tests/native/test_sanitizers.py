"""The native tests (tests/native/*.cpp) under AddressSanitizer with UBSan, and under ThreadSanitizer.

By hand, in a checkout:  cmake -S . -B build/sanitize -DFASTLOOP_SANITIZE=thread
                         cmake --build build/sanitize --parallel && ctest --test-dir build/sanitize
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SANITIZERS = ("address,undefined", "thread")
PROGRAMS = re.findall(
    r"\w+", re.findall(r"foreach\(name ([^)]*)\)", (Path(__file__).parent / "CMakeLists.txt").read_text())[0]
)
PROBE = "int main(int count, char** values) { return values[count] != nullptr; }"
MINUTES = 15  # of a build on a machine that does much else: a guard against hanging, no measure


def cmake() -> str:
    """The one on PATH, or the wheel's beside this interpreter."""
    found = shutil.which("cmake") or shutil.which("cmake", path=str(Path(sys.executable).parent))
    return found or pytest.skip("no cmake")


def run(command: list[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=60 * MINUTES)


@pytest.fixture(scope="module", params=SANITIZERS)
def programs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where they are, built with a sanitizer; a skip where the compiler or its programs do not work."""
    flag = f"-fsanitize={request.param}"
    compiler = shutil.which(os.environ.get("CXX", "c++")) or pytest.skip("no C++ compiler")
    scratch = tmp_path_factory.mktemp("probe")
    (scratch / "probe.cpp").write_text(PROBE)
    for command in ([compiler, flag, "probe.cpp", "-o", "probe"], [str(scratch / "probe")]):
        probe = run(command, scratch)
        if probe.returncode:
            pytest.skip(f"{flag} does not work here: {probe.stderr.strip().splitlines()[-1:] or command}")
    build = ROOT / "build" / f"sanitize-{request.param.replace(',', '-')}"
    build.mkdir(parents=True, exist_ok=True)
    with (build / ".lock").open("w") as lock:  # other test processes want it, too
        fcntl.flock(lock, fcntl.LOCK_EX)
        for command in (
            [cmake(), "-S", str(ROOT), "-B", str(build), f"-DFASTLOOP_SANITIZE={request.param}"],
            [cmake(), "--build", str(build), "--parallel", str(os.cpu_count())],
        ):
            made = run(command, ROOT)
            assert made.returncode == 0, made.stdout[-4000:] + made.stderr[-4000:]
    return build / "tests" / "native"


@pytest.mark.slow
@pytest.mark.parametrize("program", [*PROGRAMS, "example", "example_cuda"])
def test_nothing_is_found(programs: Path, program: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FASTLOOP_CPU_ISA", raising=False)
    ran = run([str(programs / program)], programs)
    assert ran.returncode == 0, ran.stdout[-4000:] + ran.stderr[-8000:]
