"""One command on a machine with a GPU: build, test, measure, compare; under nine minutes.

    python bench/gpu_check.py --out DIR [--section NAME ...] [--budget SECONDS] [--tune]
    python bench/gpu_check.py --out DIR --dry-run      the whole program on the CPU, tiny, kernels interpreted

Writes DIR/gpu_check.json (everything) and DIR/gpu_check.txt (the table) every few seconds, and all that the
sections print to DIR/gpu_check.log. Each section runs in a process of its own with a limit of time, so a
crash, a hang or a poisoned CUDA context costs that section alone and is named. Exit code 1 where a section
failed or found something wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from gpu.goals import verdicts
from gpu.table import page

BEGAN = time.monotonic()  # before torch is imported: a section's limit counts from here
ROOT = Path(__file__).resolve().parents[1]

# Section: its seconds, and what the sections before it have left over. Their order is what a run cut short
# should have: right before fast, ours before theirs, long tests last.
SECTIONS = {
    "build": 85,
    "tune": 90,
    "parity": 50,
    "ceilings": 20,
    "ops": 50,
    "steps": 45,
    "rivals": 60,
    "engine": 35,
    "live": 60,
    "batches": 35,
    "tests": 60,
    "sanitizer": 35,
}
BUDGET_S = 535  # of all but `tune`
LEAST_S = 10  # a section is not begun with less time than this
GRACE_S = 5  # that a section has to come to its end before it is stopped
TELL_S = 5  # between two writes while a section runs
KILL_S = 10  # a process that hangs in the driver does not end at all


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the results; made if missing")
    parser.add_argument(
        "--section", action="append", choices=list(SECTIONS), help="only these; may be repeated"
    )
    parser.add_argument("--budget", type=float, help=f"seconds for everything (default {BUDGET_S})")
    parser.add_argument("--tune", action="store_true", help="also measure block sizes, go on with the best")
    parser.add_argument("--dry-run", action="store_true", help="the whole program on the CPU with tiny sizes")
    parser.add_argument("--commit", help="of these sources, where no git can tell it")
    parser.add_argument("--child", metavar="SECTION", help=argparse.SUPPRESS)
    parser.add_argument("--limit", type=float, default=60, help=argparse.SUPPRESS)
    parser.add_argument("--parts", type=Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported, here and in children
    chosen.out.mkdir(parents=True, exist_ok=True)
    if chosen.child:
        return child(chosen)
    (chosen.out / "gpu_check.log").unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(prefix="gpu_check_", ignore_cleanup_errors=True) as parts:
        return parent(chosen, Path(parts))


def parent(chosen: argparse.Namespace, parts: Path) -> int:
    """Run the sections one after the other and gather what each writes into the folder `parts`."""
    began = time.monotonic()
    names = [n for n in SECTIONS if n in (chosen.section or [])] or [n for n in SECTIONS if n != "tune"]
    names = [n for n in SECTIONS if n in names or (n == "tune" and chosen.tune)]
    budget = chosen.budget or BUDGET_S + SECTIONS["tune"] * ("tune" in names)
    results: dict[str, Any] = {
        "command": " ".join([Path(sys.executable).name, *sys.argv]),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "dry_run": chosen.dry_run,
        "machine": {},  # as the first section saw it: device, versions, commit
        "sections": {},
    }

    def tell(name: str, found: dict[str, Any]) -> None:
        machine = found.get("values", {}).pop("machine", {})
        results["machine"] = results["machine"] or machine
        results["sections"][name] = found
        results["goals"] = verdicts(results["sections"]) if not chosen.dry_run else []
        results["seconds"] = round(time.monotonic() - began, 1)
        write(results, chosen.out)

    scale = min(1.0, budget / sum(SECTIONS[name] for name in names))
    for place, name in enumerate(names):
        reserved = scale * sum(SECTIONS[later] for later in names[place + 1 :])
        left = budget - (time.monotonic() - began)
        if left < LEAST_S:
            tell(name, {"status": "skipped", "reason": f"{left:.0f} s left of the budget"})
        else:
            limit = max(left - reserved, min(left, LEAST_S))
            tell(name, section(name, limit, chosen, parts, tell))
    print((chosen.out / "gpu_check.txt").read_text())
    return int(bool(problems(results)))


def section(
    name: str,
    limit: float,
    chosen: argparse.Namespace,
    parts: Path,
    tell: Callable[[str, dict[str, Any]], None] = lambda name, found: None,
) -> dict[str, Any]:
    """One section in its own process; whatever happens to it, what it wrote is kept. tell: hears of it
    meanwhile.
    """
    command = [sys.executable, __file__, "--out", str(chosen.out), "--parts", str(parts), "--child", name]
    command += ["--limit", str(limit), *(["--dry-run"] if chosen.dry_run else [])]
    command += ["--commit", chosen.commit] if chosen.commit else []
    began, log = time.monotonic(), parts / f"{name}.log"

    def found(status: str) -> dict[str, Any]:
        part = parts / f"{name}.json"
        written: dict[str, Any] = json.loads(part.read_text()) if part.exists() else {}
        return written | {"status": status, "seconds": round(time.monotonic() - began, 1)}

    with log.open("w") as said:  # no pipe, whose end waits for all that the section started
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=said, stderr=subprocess.STDOUT, start_new_session=True,
            env=environment(parts),
        )  # fmt: skip
    status = ""
    try:
        while not status:
            left = began + limit - time.monotonic()
            try:
                status = "failed" if process.wait(max(min(left, TELL_S), 0.01)) else "ok"
            except subprocess.TimeoutExpired:
                status = f"stopped after {limit:.0f} s" if left <= TELL_S else ""
                tell(name, found("running"))
    finally:
        end(process)
    result = found(status)
    printed = log.read_text(errors="replace")
    with (chosen.out / "gpu_check.log").open("a") as whole:
        whole.write(f"==== {name}: {status}\n{printed}\n")
    if status != "ok":
        result |= {"log": printed[-4000:], "exit_code": process.returncode}
    print(f"{name}: {result['status']}, {result['seconds']} s", flush=True)
    return result


def end(process: subprocess.Popen[bytes]) -> None:
    """A section and whatever it started and left behind."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(KILL_S)


def environment(parts: Path) -> dict[str, str]:
    """Of a section: the checkout is importable, kernels are cached in one place for all sections."""
    paths = [str(importable(parts)), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}


def importable(parts: Path) -> Path:
    """A folder with `fastloop` as it is installed (triton_kernels inside it), of links into the checkout: so
    that the sections run where nothing can be installed, on these sources and no others.
    """
    package = parts.resolve() / "import" / "fastloop"
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
    ceilings = chosen.parts / "ceilings.json"
    known = json.loads(ceilings.read_text())["values"] if ceilings.exists() else {}
    context = Context(
        device="cuda" if cuda else "cpu",
        dry=chosen.dry_run,
        config=published_3b() if cuda else small(vocab=64, layers=1),
        dtype=torch.bfloat16 if cuda else torch.float32,
        out=chosen.out,
        parts=chosen.parts,
        ends=BEGAN + chosen.limit - GRACE_S,
        ceilings={name: known[name] for name in ("read", "copy", "matmul")} if "matmul" in known else {},
    )
    record = Record(chosen.parts / f"{chosen.child}.json")
    record.put(machine=describe(context.device) | ({"commit": chosen.commit} if chosen.commit else {}))
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
        if content["status"] not in ("ok", "skipped", "running") and not content.get("problems"):
            found.append(f"{name}: {content['status']}; its log is in gpu_check.json")
    return found


def write(results: dict[str, Any], out: Path) -> None:
    """The JSON and the table, whole at any time."""
    for name, text in (
        ("gpu_check.json", json.dumps(results, indent=1)),
        ("gpu_check.txt", page(results, problems(results))),
    ):
        (out / f"{name}.tmp").write_text(text)
        (out / f"{name}.tmp").replace(out / name)


if __name__ == "__main__":
    sys.exit(main())
