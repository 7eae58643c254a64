"""`fastloop convert`: a foreign checkpoint into the format that the runtime loads."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn

from ..convert import Report, convert
from ..files import CheckpointError


def convert_command(
    source: Annotated[
        Path,
        typer.Argument(help="Directory: the published layout, or a Hugging Face Qwen2.5-Omni (thinker)."),
    ],
    destination: Annotated[Path, typer.Argument(help="Directory to make; it must not exist yet.")],
    trust_pickle: Annotated[
        bool,
        typer.Option(
            "--trust-pickle",
            help="Read the published layout's .pth. Reading a pickle can run code: only for files you trust.",
        ),
    ] = False,
    dtype: Annotated[
        str | None,
        typer.Option(help="float32, bfloat16 or float16; without it, that of the decoder's embedding."),
    ] = None,
) -> None:
    """Convert a checkpoint of another format into one that fastloop loads."""
    console = Console(stderr=True)
    columns = (BarColumn(), DownloadColumn(binary_units=True), TimeRemainingColumn())
    try:
        with Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task("converting", total=None)
            report = convert(
                source,
                destination,
                trust_pickle=trust_pickle,
                dtype=dtype,
                progress=lambda done, total: bar.update(task, completed=done, total=total),
            )
    except CheckpointError as error:
        typer.secho(f"fastloop convert: {error}", err=True, fg=typer.colors.RED)
        raise typer.Exit(1) from error
    typer.echo(describe(report))


def describe(report: Report) -> str:
    """What was done, in a few lines."""
    encoder, decoder = report.config.encoder, report.config.decoder
    lines = [
        f"{report.source_format} checkpoint -> {report.destination}",
        f"  encoder  {encoder.layers} layers, width {encoder.width}",
        f"  decoder  {decoder.layers} layers, width {decoder.width}, vocabulary {decoder.vocab}",
        f"  weights  {report.tensors} tensors, {report.weight_bytes / 1e9:.2f} GB in {report.dtype}",
    ]
    lines += [f"  cast     {count} tensors from {dtype}" for dtype, count in report.cast.items()]
    if report.unused:
        lines.append(f"  unused   {len(report.unused)} tensors, such as {report.unused[0]}")
    return "\n".join(lines)
