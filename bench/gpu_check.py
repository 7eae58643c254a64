"""One command on a machine with a GPU: build, test, measure, compare; under nine minutes.

    python bench/gpu_check.py --out DIR [--section NAME ...] [--budget SECONDS] [--tune]
    python bench/gpu_check.py --out DIR --dry-run      the whole program on the CPU, tiny, kernels interpreted

Writes DIR/gpu_check.json (everything) and DIR/gpu_check.txt (the table) after every section. Each section
runs in a process of its own with a limit of time, so a crash, a hang or a poisoned CUDA context costs that
section alone and is named. Exit code 1 where a section failed or found something wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib
import json
import os
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gpu.table import page

ROOT = Path(__file__).resolve().parents[1]

# Section: its seconds, and what the sections before it have left over. Their order is what a run cut short
# should have: right before fast, ours before theirs, long tests last.
SECTIONS = {
    "build": 85,
    "parity": 50,
    "ceilings": 20,
    "ops": 60,
    "steps": 50,
    "rivals": 65,
    "engine": 40,
    "batches": 45,
    "tests": 80,
    "sanitizer": 40,
    "tune": 240,
}
BUDGET_S = 535  # of all but `tune`
LEAST_S = 10  # a section is not begun with less time than this


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the results; made if missing")
    parser.add_argument(
        "--section", action="append", choices=list(SECTIONS), help="only these; may be repeated"
    )
    parser.add_argument("--budget", type=float, help=f"seconds for everything (default {BUDGET_S})")
    parser.add_argument("--tune", action="store_true", help="also measure block sizes, write their table")
    parser.add_argument("--dry-run", action="store_true", help="the whole program on the CPU with tiny sizes")
    parser.add_argument("--child", metavar="SECTION", help=argparse.SUPPRESS)
    parser.add_argument("--limit", type=float, default=60, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported, here and in children
    chosen.out.mkdir(parents=True, exist_ok=True)
    if chosen.child:
        return child(chosen)
    return parent(chosen)


def parent(chosen: argparse.Namespace) -> int:
    """Run the sections one after the other and gather what they write."""
    began = time.monotonic()
    names = [n for n in SECTIONS if n in (chosen.section or [])] or [n for n in SECTIONS if n != "tune"]
    names += ["tune"] if chosen.tune and "tune" not in names else []
    budget = chosen.budget or BUDGET_S + SECTIONS["tune"] * ("tune" in names)
    results: dict[str, Any] = {
        "command": " ".join([Path(sys.executable).name, *sys.argv]),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "dry_run": chosen.dry_run,
        "sections": {},
    }
    parts = chosen.out / "parts"
    parts.mkdir(exist_ok=True)
    for place, name in enumerate(names):
        reserved = sum(SECTIONS[later] for later in names[place + 1 :])
        left = budget - (time.monotonic() - began)
        if left < LEAST_S:
            results["sections"][name] = {"status": "skipped", "reason": f"{left:.0f} s left of the budget"}
        else:
            limit = max(left - reserved, min(left, LEAST_S))
            results["sections"][name] = section(name, limit, chosen, parts)
        results["seconds"] = round(time.monotonic() - began, 1)
        write(results, chosen.out)
    shutil.rmtree(parts)
    print((chosen.out / "gpu_check.txt").read_text())
    return int(bool(problems(results)))


def section(name: str, limit: float, chosen: argparse.Namespace, parts: Path) -> dict[str, Any]:
    """One section in its own process; whatever happens to it, what it wrote is kept."""
    command = [sys.executable, __file__, "--out", str(chosen.out), "--child", name, "--limit", str(limit)]
    command += ["--dry-run"] if chosen.dry_run else []
    began = time.monotonic()
    status, log = "ok", ""
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
        start_new_session=True, env=environment(chosen.out),
    )  # fmt: skip
    try:
        log, _ = process.communicate(timeout=limit)
        if process.returncode:
            status = "failed"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)  # the section and what it started
        log, _ = process.communicate()
        status = f"stopped after {limit:.0f} s"
    part = parts / f"{name}.json"
    found: dict[str, Any] = json.loads(part.read_text()) if part.exists() else {}
    found |= {"status": status, "seconds": round(time.monotonic() - began, 1)}
    if status != "ok":
        found["log"] = log[-4000:]
    print(f"{name}: {found['status']}, {found['seconds']} s", flush=True)
    return found


def environment(out: Path) -> dict[str, str]:
    """Of a section: the checkout is importable, kernels are cached in one place for all sections."""
    paths = [str(importable(out)), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}


def importable(out: Path) -> Path:
    """A folder with `fastloop` as it is installed (triton_kernels inside it), of links into the checkout: so
    that the sections run where nothing can be installed, on these sources and no others.
    """
    package = out.resolve() / "parts" / "import" / "fastloop"
    package.mkdir(parents=True, exist_ok=True)
    for source in (*(ROOT / "fastloop").iterdir(), ROOT / "triton_kernels"):
        link = package / source.name
        if source.name != "__pycache__" and not link.is_symlink():  # the build adds a file
            link.symlink_to(source)
    return package.parent


def child(chosen: argparse.Namespace) -> int:
    """In the process of one section."""
    import torch
    from gpu.machine import Telemetry, describe
    from gpu.record import Context, Record

    from fastloop.config import published_3b, small

    cuda = torch.cuda.is_available() and not chosen.dry_run
    if not cuda and not chosen.dry_run:
        print(f"torch {torch.__version__} sees no GPU; --dry-run runs the program on the CPU")
        return 1
    ceilings = chosen.out / "parts" / "ceilings.json"
    known = json.loads(ceilings.read_text())["values"] if ceilings.exists() else {}
    context = Context(
        device="cuda" if cuda else "cpu",
        dry=chosen.dry_run,
        config=published_3b() if cuda else small(vocab=64, layers=1),
        dtype=torch.bfloat16 if cuda else torch.float32,
        out=chosen.out,
        ends=time.monotonic() + chosen.limit - 5,
        ceilings={name: known[name] for name in ("read", "copy", "matmul")} if "matmul" in known else {},
    )
    record = Record(chosen.out / "parts" / f"{chosen.child}.json")
    if chosen.child == "build":
        record.put(**describe(context.device))
    with Telemetry() as telemetry, dry_blocks(chosen.dry_run):
        try:
            importlib.import_module(f"gpu.{chosen.child}").run(context, record)
        except Exception as error:  # named in the results; the other sections go on
            traceback.print_exc()
            record.problem(f"{type(error).__name__}: {error}"[:1000])
    record.put(telemetry=telemetry.summary())
    return int(bool(record.problems))


@contextlib.contextmanager
def dry_blocks(dry: bool) -> Iterator[None]:
    """In a dry run: blocks that the interpreter is quick with."""
    from fastloop.triton_kernels.tuning import overridden

    if not dry:
        yield
        return
    mel = {"BLOCK_FRAMES": 16, "BLOCK_DEPTH": 128, "warps": 4, "stages": 1}
    with overridden("mel", mel), overridden("sample", {"CHUNK": 64, "BLOCK": 64, "warps": 4}):
        yield


def problems(results: dict[str, Any]) -> list[str]:
    """Everything that is wrong, a line each."""
    found = []
    for name, content in results["sections"].items():
        found += [f"{name}: {text}" for text in content.get("problems", [])]
        if content["status"] not in ("ok", "skipped") and not content.get("problems"):
            found.append(f"{name}: {content['status']}; its log is in gpu_check.json")
    return found


def write(results: dict[str, Any], out: Path) -> None:
    """The JSON and the table, whole after every section."""
    (out / "gpu_check.json").write_text(json.dumps(results, indent=1))
    (out / "gpu_check.txt").write_text(page(results, problems(results)))


if __name__ == "__main__":
    sys.exit(main())
