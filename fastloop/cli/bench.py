"""`fastloop bench cpu`: times of the native CPU engine beside the ceilings of this machine."""

from __future__ import annotations

import json as jsonlib
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from .terminal import complain

bench_app = typer.Typer(name="bench", help="Measure kernels and steps.", no_args_is_help=True)

Size = Annotated[
    str, typer.Option(help="Dims, with random weights: nano, 3b, or 3b-third (a third of its layers).")
]
Precision = Annotated[str, typer.Option(help="float32, bfloat16, int8 or int4.")]
Kv = Annotated[str, typer.Option(help="Of the KV pages: float32, bfloat16 or int8.")]
Group = Annotated[int, typer.Option(help="int4: inputs that share a scale, 32 or 64.")]
Threads = Annotated[int, typer.Option(min=1, max=256, help="Threads that share every call.")]
Sessions = Annotated[str, typer.Option(help="Numbers of sessions, separated by commas.")]
Contexts = Annotated[str, typer.Option(help="Context lengths in positions, separated by commas.")]
Seconds = Annotated[float, typer.Option(min=0.0, help="How long each call is repeated.")]
Out = Annotated[Path | None, typer.Option(help="Write the figures to this JSON file.")]
Plot = Annotated[Path | None, typer.Option(help="Draw a roofline to this PNG file.")]


@bench_app.callback()
def bench() -> None:
    """Measure kernels and steps."""


@bench_app.command("cpu")
def cpu_command(
    size: Size = "nano",
    precision: Precision = "int8",
    kv: Kv = "bfloat16",
    group: Group = 32,
    threads: Threads = 1,
    sessions: Sessions = "1",
    contexts: Contexts = "0,1024,4096",
    seconds: Seconds = 2.0,
    json: Out = None,
    plot: Plot = None,
) -> None:
    """Time the native CPU engine; every figure beside its floor on this machine.

    The machine's ceilings (arithmetic peaks, read bandwidth) are measured
    before and after every figure.

    \b
    Examples:
      fastloop bench cpu
      fastloop bench cpu --size 3b --precision int8 --threads 2 --json 3b.json --plot 3b.png
      fastloop bench cpu --sessions 1,8,64 --contexts 0,1950
    """
    from ..ops.native import PRECISIONS, native, reason
    from ..quantise import GROUPS
    from ..testing.cpu_bench import SIZES, CpuBench, Figure, roofline, table

    for name, value, choices in (
        ("size", size, tuple(SIZES)),
        ("precision", precision, PRECISIONS),
        ("kv", kv, PRECISIONS[:3]),
        ("group", group, GROUPS),
    ):
        if value not in choices:
            complain("bench cpu", f"--{name} is {value!r}; choose from {', '.join(map(str, choices))}")
            raise typer.Exit(2)
    if native is None:
        complain("bench cpu", reason)
        raise typer.Exit(1)
    for path in (json, plot):
        if path is not None and not path.parent.is_dir():
            complain("bench cpu", f"{path}: there is no folder {path.parent}")
            raise typer.Exit(2)
    counts, lengths = _numbers("sessions", sessions, 1), _numbers("contexts", contexts, 0)
    figures: list[Figure] = []
    measured = CpuBench(size, precision, threads, seconds, kv, group)
    for figure in measured.figures(counts, lengths):
        lines = table([figure])
        for line in lines if not figures else lines[1:]:
            typer.echo(line)
        figures.append(figure)
        if json is not None:  # whole after every figure: an interrupted run keeps what it has
            rows = [asdict(f) | {"of_peak": f.of_peak, "of_read": f.of_read} for f in figures]
            json.write_text(
                jsonlib.dumps(
                    {"threads": threads, "kv": kv, "group": group, "isas": native.isas(), "figures": rows},
                    indent=1,
                )
            )
    if plot is not None:
        roofline(figures, str(plot))


def _numbers(name: str, text: str, least: int) -> list[int]:
    """A list of whole numbers; exit code 2 where it is none."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) >= least for part in parts):
        complain(
            "bench cpu", f"--{name} is {text!r}; give whole numbers from {least} on, separated by commas"
        )
        raise typer.Exit(2)
    return [int(part) for part in parts]
