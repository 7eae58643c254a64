"""The tests that need a GPU: Triton kernels against their definition, ops, CUDA kernels, the engine."""

from __future__ import annotations

import importlib.util
import re
import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from .machine import ROOT
from .process import finished
from .record import Context, Record

WORKERS = 8
ENGINE = (
    "streams",
    "captured_runner",
    "captured_perceive",
    "quantised",
    "float8_pages",
    "reply",
    "several_engines",
)  # those with graphs and streams of CUDA


def run(context: Context, record: Record) -> None:
    """Values: counts of passed, failed and skipped tests; a problem for each failure. Each suite takes its
    share of the time that is left at most, and what its tests had shown by then counts; first those of the
    engine, which no other section checks.
    """
    suites = {
        "engine": [*(f"tests/engine/test_{name}.py" for name in ENGINE), "-k", "cuda"],
        "cuda": ["tests/native/test_cuda_gpu.py"],
        "ops": ["tests/ops", "-m", "gpu", "--continue-on-collection-errors"],
        "triton": ["tests/triton", "-m", "not slow", "--ignore=tests/triton/test_resources.py"],
    }
    if context.dry:
        suites = {"triton": ["tests/triton/test_layer_norm.py", "tests/triton/test_tuning.py"]}
    elif importlib.util.find_spec("xdist"):
        suites = {name: [*options, f"-n{WORKERS}"] for name, options in suites.items()}
    for place, (name, options) in enumerate(suites.items()):
        report = context.parts / f"tests_{name}.xml"
        limit = (context.left_s - 2) / (len(suites) - place)
        code, said = finished(command(options, report), limit, folder=context.parts)
        print(said)
        if code is None:
            _count_lines(name, said, limit, record)
        elif report.exists():
            _count(name, report.read_text(), record)
        else:
            record.problem(f"tests of {name} did not run: {said[-600:]}")


def command(options: Sequence[str], report: Path) -> list[str]:
    """pytest over some tests of the checkout; options: with paths in it. To be run in another folder: Python
    looks for modules where it is started, and would find `fastloop` there without its kernels
    (gpu_check.importable).
    """
    placed = [
        re.sub(r"^(--ignore=)?(?=tests/)", lambda found: f"{found[1] or ''}{ROOT}/", option)
        for option in options
    ]
    fixed = ["-v", "-p", "no:cacheprovider", "-o", "addopts=--import-mode=importlib", f"--junitxml={report}"]
    return [sys.executable, "-m", "pytest", *fixed, *placed]


def _count_lines(name: str, said: str, limit: float, record: Record) -> None:
    """Of a suite that was stopped: from pytest's line for each test. That it was stopped is no problem."""
    found = Counter(re.findall(r"\b(PASSED|FAILED|ERROR|SKIPPED)\b", said))
    bad = found["FAILED"] + found["ERROR"]
    counts = f"{found['PASSED']} passed, {bad} failed, {found['SKIPPED']} skipped"
    record.put(**{f"{name}_text": f"{counts} within {limit:.0f} s, the rest did not run"})
    if not found["PASSED"]:
        record.problem(f"tests of {name}: none passed within {limit:.0f} s: {said[-300:]}")
    for line in [line for line in said.splitlines() if re.search(r"\b(FAILED|ERROR)\b", line)][:20]:
        record.problem(line.strip()[:300])


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
