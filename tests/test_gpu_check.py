"""bench/gpu_check.py: its whole program on the CPU with tiny sizes, and what it does when a section fails."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytest.importorskip("triton", reason="triton is not installed")
SCRIPT = Path(__file__).resolve().parents[1] / "bench" / "gpu_check.py"


def run(out: Path, *options: str, script: Path = SCRIPT) -> tuple[int, dict[str, Any], str]:
    """Exit code, the JSON, the table."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(script), "--out", str(out), *options]
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
    assert results["machine"]["commit"] and results["machine"]["device"] and results["date"]
    for name in ("ops", "steps", "engine", "live", "batches", "rivals"):
        assert sections[name]["lines"], name
        for line in sections[name]["lines"]:
            assert (line["median_us"] > 0 and line["name"] in table) or line["name"][:45] in table
    assert {line["name"] for line in sections["ops"]["lines"]} > {"decide", "rope_append"}
    steps = {re.sub(r"\d+", "N", line["name"]) for line in sections["steps"]["lines"]}
    assert steps >= {"decision at N, host to host", "text token at N", "mel, N stream", "encoder, N chunk"}
    rivals = {re.sub(r"\d+", "N", name) for name in sections["rivals"]["values"]["ratios"]}
    assert rivals >= {"decision at N: torch + graph / ours", "decision after N s: published loop / ours"}
    assert sections["engine"]["values"]["growth_steps"] >= 60 and sections["live"]["values"]["runs"]
    assert len(sections["parity"]["values"]["errors"]) > 8
    assert "DRY RUN" in table and "no problems" in table
    assert {p.name for p in tmp_path.iterdir()} == {
        "dry_run.json", "gpu_check.json", "gpu_check.log", "gpu_check.txt",
    }  # fmt: skip


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


FAKES = {  # section -> what its process does
    "build": "raise ValueError('wrong')",
    "parity": "record.line('half', 'triton', 1e-3); os.abort()",
    "ceilings": "os._exit(0)",
    "ops": "record.put(half=1); raise SystemExit(0)",
    "steps": "record.line('whole', 'triton', 1e-3)",
}


def test_whatever_a_section_does_the_next_ones_run(tmp_path: Path) -> None:
    """In a checkout of links whose sections are fakes: they raise, crash, leave; what they wrote is kept, and
    every result has device, date, commit and command.
    """
    root, out = tmp_path / "root", tmp_path / "out"
    (root / "bench").mkdir(parents=True)
    for link in ("fastloop", "triton_kernels", "csrc"):
        (root / link).symlink_to(SCRIPT.parents[1] / link)
    shutil.copytree(SCRIPT.parent / "gpu", root / "bench" / "gpu")
    script = Path(shutil.copy(SCRIPT, root / "bench"))
    for name, body in FAKES.items():
        text = f"import os\n\n\ndef run(context, record):\n    {body}\n"
        (root / "bench" / "gpu" / f"{name}.py").write_text(text)
    chosen = [word for name in FAKES for word in ("--section", name)]
    code, results, table = run(out, "--dry-run", "--commit", "abc123", *chosen, script=script)
    sections = results["sections"]
    status = {name: found["status"] for name, found in sections.items()}
    assert code == 1
    assert status == dict(zip(FAKES, ("failed", "failed", "ok", "ok", "ok"), strict=True))
    assert sections["build"]["problems"] == ["ValueError: wrong"]
    assert [line["name"] for line in sections["parity"]["lines"]] == ["half"]
    assert sections["ops"]["values"]["half"] == 1 and sections["steps"]["lines"]
    assert "whole" in table and "half" in table and table.count("PROBLEM") == 2
    machine = results["machine"]
    assert machine["commit"] == "abc123" and machine["device"] and machine["versions"]["torch"]
    assert "commit abc123" in table and results["date"] in table and "--commit abc123" in results["command"]


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


def test_goals_are_judged_by_lines_that_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each goal is met by a run just within it, missed just beyond, and told as not measured without it."""
    from torch import bfloat16

    from fastloop.config import published_3b

    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    goals, shapes = (importlib.import_module(f"gpu.{name}") for name in ("goals", "shapes"))

    timed = {shape.name for shape in shapes.shapes(published_3b(), bfloat16, dry=False)}

    def line(name: str, variant: str, ms: float, rate: float | None = None) -> dict[str, Any]:
        return {"name": name, "variant": variant, "median_us": 1e3 * ms, "gb_per_s": rate}

    def sections(better: float) -> dict[str, Any]:
        """better > 1: a run that much within every limit."""
        rivals = {"decision at 1024: torch + graph / ours": 1.5 * better}
        rivals |= {"decision at 4096: torch + graph / ours": 9.0}
        rivals |= {"decision after 60 s: published loop / ours": 20 * better}
        live = {"latency_ms": {"p99": 100 / better}, "missed": round(1 / better), "seconds": 59.5 * better}
        small, large = live | {"sessions": 10, "missed": 9}, live | {"sessions": 2000, "missed": 9}
        steps = [line(goals.DECISION, "triton", 2.1 / better), line(goals.DECISION, "graph", 1e-9)]
        steps += [line(goals.DECISION, "triton, fp8", 1.2 / better)]
        steps += [line(goals.TOKEN, "triton", 1.7 / better)]
        steps += [line(goals.TOKEN, "triton, fp8, fp8 KV", 0.95 / better), line(goals.TOKEN, "triton", 5.0)]
        steps += [line("mel, 1 stream", "triton", 0.05 / better)]
        steps += [line("encoder, 1 chunk", "triton", 0.5 / better)]
        linears = {"gate_up": 87, "down": 87, "qkv": 50, "out": 50}
        shares = {f"linear decoder {name}, 13 rows": share for name, share in linears.items()}
        shares["paged_attention, 64 x 13 rows at 4096"] = 80
        ops = [line(name, "cuda", 1.0, 40 * share * better) for name, share in shares.items()]
        ops += [line("paged_attention, 1 x 13 rows at 1024", "triton", 0.006 / better)]
        assert {x["name"] for x in ops} <= timed
        return {
            "ceilings": {"values": {"read": 4e12}},
            "steps": {"lines": steps},
            "ops": {"lines": ops},
            "rivals": {"values": {"ratios": rivals}},
            "live": {"values": {"runs": [small, live | {"sessions": 1000}, large]}},
            "engine": {"values": {"growth_bytes": round(1 / better), "growth_steps": 10_000 * better}},
        }

    assert [told["goal"] for told in goals.verdicts(sections(2.5)) if told["met"] is not True] == []
    assert [told["goal"] for told in goals.verdicts(sections(0.99)) if told["met"] is not False] == []
    assert {told["met"] for told in goals.verdicts({})} == {None}
    assert sum("not measured" in row for row in goals.rows({})) == len(goals.GOALS)
    assert sum(row.endswith("NOT MET") for row in goals.rows(sections(0.99))) == len(goals.GOALS)


Section = Callable[[str, float], tuple[dict[str, Any], list[dict[str, Any]]]]


@pytest.fixture
def section(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Section:
    """`section(script, limit)`: the script as a section, and what was told of it meanwhile. It finds its file
    of results as PART.
    """
    module = load()

    def run(script: str, limit: float) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        source, told = tmp_path / "section.py", []
        part = f"import pathlib; PART = pathlib.Path({str(tmp_path / 'ops.json')!r})\n"
        source.write_text(part + textwrap.dedent(script))
        monkeypatch.setattr(module, "__file__", str(source))
        monkeypatch.setattr(module, "environment", lambda parts: dict(os.environ))
        monkeypatch.setattr(module, "TELL_S", 0.2)
        chosen = module.argparse.Namespace(out=tmp_path, dry_run=False, commit=None)
        found = module.section("ops", limit, chosen, tmp_path, lambda name, now: told.append(now))
        for text in module.problems({"sections": {"ops": found}}):
            found.setdefault("told", []).append(text)
        return found, told

    return run


def test_a_section_that_hangs_is_stopped(section: Section) -> None:
    """What it had written is kept, and was told of while it ran."""
    found, told = section(
        """
        import time
        PART.write_text('{"values": {"half": 1}}')
        time.sleep(600)
        """,
        5.0,
    )
    assert found["status"] == "stopped after 5 s" and found["values"] == {"half": 1}
    assert found["told"] == ["ops: stopped after 5 s; its log is in gpu_check.json"]
    assert told[-1]["values"] == {"half": 1} and {now["status"] for now in told} == {"running"}


@pytest.mark.parametrize("then", ["time.sleep(600)", "os.abort()", "pass"])
def test_what_a_section_leaves_behind_ends_with_it(section: Section, then: str, tmp_path: Path) -> None:
    """Also where it holds the section's output open: nobody waits for that."""
    found, _ = section(
        f"""
        import os, subprocess, sys, time
        left = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        pathlib.Path({str(tmp_path / "pid")!r}).write_text(str(left.pid))
        print("words", flush=True)
        {then}
        """,
        5.0,
    )
    status = {"time.sleep(600)": "stopped after 5 s", "os.abort()": "failed", "pass": "ok"}[then]
    assert found["status"] == status
    assert status == "ok" or found["log"].startswith("words")
    assert status != "failed" or found["exit_code"] == -signal.SIGABRT
    state = Path("/proc", (tmp_path / "pid").read_text(), "stat")
    gone = time.monotonic() + 30
    while state.exists() and state.read_text().split()[2] != "Z" and time.monotonic() < gone:
        time.sleep(0.05)
    assert not state.exists() or state.read_text().split()[2] == "Z"


def test_a_program_that_is_stopped_has_said_what_it_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """...even if something it started still holds its output."""
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    finished = importlib.import_module("gpu.process").finished
    script = """
    import subprocess, sys
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    print(child.pid, flush=True)
    child.wait()
    """
    code, said = finished([sys.executable, "-c", textwrap.dedent(script)], 5.0)
    assert code is None
    os.kill(int(said), signal.SIGKILL)  # it was still there
    assert finished([sys.executable, "-c", "import sys; print(1); sys.exit(3)"], 60) == (3, "1\n")


def test_the_build_leaves_kernels_of_other_gpus_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """setup.py does not learn of --inplace, which setuptools takes for itself, and would make a wheel's."""
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    build, record = (importlib.import_module(f"gpu.{name}") for name in ("build", "record"))
    asked: list[dict[str, str]] = []

    def finished(command: list[str], limit: float, env: dict[str, str]) -> tuple[int, str]:
        assert command[-4:] == ["setup.py", "--quiet", "build_ext", "--inplace"]
        asked.append(env)
        return 0, ""

    monkeypatch.setattr(build, "finished", finished)
    context = module_context(record, tmp_path)
    for built in (True, False):  # what is newer than its sources is kept
        monkeypatch.setattr(build, "_is_built", lambda built=built: built)
        build._native(context, record.Record(tmp_path / "build.json"))
    assert [(env["FASTLOOP_CUDA"], env["PATH"]) for env in asked] == [("0", os.environ["PATH"])]


def module_context(record: ModuleType, folder: Path) -> Any:
    """A section's context with a minute left."""
    from torch import float32

    from fastloop.config import small

    ends = time.monotonic() + 60
    return record.Context("cpu", True, small(), float32, folder, folder, ends, {})


def test_suites_find_the_kernels_where_nothing_is_installed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """-S leaves out how this checkout is installed, if it is; what pytest needs is named."""
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    tests, process, module = (
        *(importlib.import_module(f"gpu.{name}") for name in ("tests", "process")),
        load(),
    )
    report = tmp_path / "report.xml"
    python, *rest = tests.command(
        ["tests/triton/test_tuning.py", "--ignore=tests/triton/test_mel.py"], report
    )
    assert f"--ignore={tests.ROOT}/tests/triton/test_mel.py" in rest
    site = os.pathsep.join(p for p in sys.path if p.endswith("-packages"))
    environment = module.environment(tmp_path)
    environment["PYTHONPATH"] = os.pathsep.join([environment["PYTHONPATH"], site])
    code, said = process.finished([python, "-S", *rest], 300, environment, folder=tmp_path)
    assert code == 0 and "PASSED" in said, said[-2000:]
    code, said = process.finished([python, "-S", *rest], 300, environment)
    assert code and "No module named 'fastloop.triton_kernels'" in said, "the folder makes no difference"


def test_a_suite_that_is_stopped_counts_by_its_lines(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    tests, record = (importlib.import_module(f"gpu.{name}") for name in ("tests", "record"))
    said = """
tests/a.py::test_one PASSED                      [ 25%]
[gw1] [ 50%] FAILED tests/b.py::test_two[cuda-float32]
[gw0] [ 75%] PASSED tests/b.py::test_three
tests/b.py::test_four SKIPPED (no flash-attn)    [100%]
"""
    found = record.Record(tmp_path / "tests.json")
    tests._count_lines("ops", said, 20.4, found)
    assert found.values["ops_text"] == "2 passed, 1 failed, 1 skipped within 20 s, the rest did not run"
    assert found.problems == ["[gw1] [ 50%] FAILED tests/b.py::test_two[cuda-float32]"]
    tests._count_lines("cuda", "importing", 5, found)
    assert found.problems[1] == "tests of cuda: none passed within 5 s: importing"


def test_a_second_tuning_keeps_what_the_first_one_found(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """New entries stand in front, the last found first; they replace those of the same calls alone."""
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    tune = importlib.import_module("gpu.tune")
    first = {"linear": [{"max_rows": 16, "config": {"a": 1}}, {"max_rows": 32, "config": {"a": 2}}]}
    file = tmp_path / "table.json"
    file.write_text(
        json.dumps({"device": "a GPU", "measured": "before", **first, "sample": [{"config": {}}]})
    )
    found = {
        "linear": [{"max_rows": 16, "config": {"a": 3}}, {"max_rows": 64, "config": {"a": 4}}],
        "mel": [],
    }
    merged = tune._in_front(found, file)
    kept = [found["linear"][1], found["linear"][0], first["linear"][1]]
    assert merged == {"linear": kept, "sample": [{"config": {}}]}
    assert tune._in_front({"mel": []}, tmp_path / "none.json") == {}
