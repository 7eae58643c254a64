"""bench/gpu_check.py: its whole program on the CPU with tiny sizes, and what it does when a section fails."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytest.importorskip("triton", reason="triton is not installed")
SCRIPT = Path(__file__).resolve().parents[1] / "bench" / "gpu_check.py"


def run(out: Path, *options: str) -> tuple[int, dict[str, Any], str]:
    """Exit code, the JSON, the table."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(SCRIPT), "--out", str(out), *options]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    found = out / "gpu_check.json"
    assert found.exists(), done.stderr[-2000:]
    return done.returncode, json.loads(found.read_text()), (out / "gpu_check.txt").read_text()


@pytest.mark.slow
def test_the_whole_program_without_a_gpu(tmp_path: Path) -> None:
    code, results, table = run(tmp_path, "--dry-run", "--tune", "--budget", "2000")
    sections = results["sections"]
    logs = {name: s.get("log", s.get("problems")) for name, s in sections.items() if s["status"] != "ok"}
    assert code == 0 and not logs, logs
    assert set(sections) == set(load().SECTIONS)
    for name in ("ops", "steps", "engine", "batches", "rivals"):
        assert sections[name]["lines"], name
        for line in sections[name]["lines"]:
            assert (line["median_us"] > 0 and line["name"] in table) or line["name"][:45] in table
    assert {line["name"] for line in sections["ops"]["lines"]} > {"decide", "rope_append"}
    assert len(sections["parity"]["values"]["errors"]) > 8
    assert "DRY RUN" in table and "no problems" in table
    assert not (tmp_path / "parts").exists()


def test_a_section_that_fails_is_named_and_the_others_run(tmp_path: Path) -> None:
    """Without a GPU and without --dry-run, every section says what is missing."""
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    code, results, table = run(tmp_path, "--section", "ceilings", "--section", "ops")
    assert code == 1
    assert [s["status"] for s in results["sections"].values()] == ["failed", "failed"]
    assert "sees no GPU" in results["sections"]["ops"]["log"]
    assert table.count("PROBLEM") == 2


def load() -> ModuleType:
    """The script as a module."""
    sys.path.insert(0, str(SCRIPT.parent))
    try:
        spec = importlib.util.spec_from_file_location("gpu_check", SCRIPT)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    finally:
        sys.path.remove(str(SCRIPT.parent))


def test_the_sections_fit_the_budget_and_are_files() -> None:
    module = load()
    for name in module.SECTIONS:
        assert (SCRIPT.parent / "gpu" / f"{name}.py").is_file()
    assert sum(module.SECTIONS.values()) - module.SECTIONS["tune"] == module.BUDGET_S < 9 * 60


def test_a_section_that_hangs_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """...with all that it started, and what it had written is kept."""
    module = load()
    parts = tmp_path / "parts"
    parts.mkdir()
    sleeper = tmp_path / "sleeper.py"
    sleeper.write_text(
        "import pathlib, subprocess, sys, time\n"
        f'pathlib.Path({str(parts / "ops.json")!r}).write_text(\'{{"values": {{"half": 1}}}}\')\n'
        "subprocess.run([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
    )
    monkeypatch.setattr(module, "__file__", str(sleeper))
    monkeypatch.setattr(module, "environment", lambda out: dict(os.environ))
    chosen = module.argparse.Namespace(out=tmp_path, dry_run=False)
    found = module.section("ops", 3.0, chosen, parts)
    assert found["status"] == "stopped after 3 s" and found["values"] == {"half": 1}
    (problem,) = module.problems({"sections": {"ops": found}})
    assert problem == "ops: stopped after 3 s; its log is in gpu_check.json"
