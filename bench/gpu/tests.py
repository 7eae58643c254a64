"""The tests that need a GPU: Triton kernels against their definition, ops, CUDA kernels, the engine."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

from .machine import ROOT
from .record import Context, Record

WORKERS = 8
ENGINE = (
    "streams",
    "captured_runner",
    "captured_perceive",
    "quantised",
    "reply",
)  # those with graphs and streams of CUDA


def run(context: Context, record: Record) -> None:
    """Values: counts of passed, failed and skipped tests; a problem for each failure."""
    suites = {
        "triton": ["tests/triton", "-m", "not slow", "--ignore=tests/triton/test_resources.py"],
        "ops": ["tests/ops", "-m", "gpu", "--continue-on-collection-errors"],
        "cuda": ["tests/native/test_cuda_gpu.py"],
        "engine": [*(f"tests/engine/test_{name}.py" for name in ENGINE), "-k", "cuda"],
    }
    if context.dry:
        suites = {"triton": ["tests/triton/test_layer_norm.py", "tests/triton/test_tuning.py"]}
    elif importlib.util.find_spec("xdist"):
        suites = {name: [*options, f"-n{WORKERS}"] for name, options in suites.items()}
    for name, options in suites.items():
        report = context.out / "parts" / f"tests_{name}.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options]
        command += ["-o", "addopts=--import-mode=importlib", f"--junitxml={report}"]
        limit = max(context.left_s - 2, 5)
        try:
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=limit)
        except subprocess.TimeoutExpired:
            record.problem(f"tests of {name} did not end within {limit:.0f} s")
            continue
        if not report.exists():
            record.problem(f"tests of {name} did not run: {(done.stdout + done.stderr)[-600:]}")
            continue
        _count(name, report.read_text(), record)


def _count(name: str, xml: str, record: Record) -> None:
    cases = list(ElementTree.fromstring(xml).iter("testcase"))
    bad = [c for c in cases if c.find("failure") is not None or c.find("error") is not None]
    skipped = sum(c.find("skipped") is not None for c in cases)
    passed = len(cases) - len(bad) - skipped
    record.put(**{f"{name}_text": f"{passed} passed, {len(bad)} failed, {skipped} skipped"})
    if not passed:
        record.problem(f"tests of {name}: none passed")
    for case in bad[:20]:
        cause = case.find("failure") if case.find("failure") is not None else case.find("error")
        told = f"{cause.get('message')} {cause.text}" if cause is not None else ""
        missing = re.search(r"ModuleNotFoundError: No module named '(\w+)'", told)
        if missing and "collection failure" in told:  # of a test that needs what is not installed here
            record.put(**{f"not_collected_{case.get('name')}": f"needs {missing[1]}"})
            continue
        record.problem(f"{case.get('classname')}::{case.get('name')}: {told[:300]}")
