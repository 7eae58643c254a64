"""`fastloop convert`: a foreign checkpoint into the format that the runtime loads."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .terminal import complain, one_line

if TYPE_CHECKING:
    from ..convert import Report

Source = Annotated[
    Path, typer.Argument(help="Directory: the published layout, or a Hugging Face Qwen2.5-Omni (thinker).")
]
Destination = Annotated[Path, typer.Argument(help="Directory to make; it must not exist yet.")]
_TRUST = "Read the published layout's .pth. Reading a pickle can run code: only for files you trust."
TrustPickle = Annotated[bool, typer.Option("--trust-pickle", help=_TRUST)]
_DTYPE = (
    "float32, bfloat16, float16, int8, fp8 (for GPUs) or int4; without it, that of the decoder's embedding."
)
Dtype = Annotated[str | None, typer.Option(metavar="NAME", help=_DTYPE)]
Group = Annotated[int, typer.Option(help="int4: inputs that share a scale, 32 or 64 (faster, errs more).")]


def convert_command(
    source: Source,
    destination: Destination,
    trust_pickle: TrustPickle = False,
    dtype: Dtype = None,
    group: Group = 32,
) -> None:
    """Convert a checkpoint of another format into one that fastloop loads.

    Everything is checked before anything is written, all that is wrong is
    named at once, and the new directory appears whole or not at all.

    \b
    Examples:
      fastloop convert ./audio-interaction-3b ./my-model --trust-pickle
      fastloop convert ./Qwen2.5-Omni-3B ./my-model --dtype bfloat16
      fastloop convert ./Qwen2.5-Omni-3B ./my-model --dtype int4 --group 64
      fastloop listen door.wav --model ./my-model
    """
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn

    from ..convert import convert
    from ..files import CheckpointError

    console = Console(stderr=True)
    columns = (BarColumn(), DownloadColumn(binary_units=True), TimeRemainingColumn())
    watched = console.is_terminal and not console.is_dumb_terminal
    try:
        with Progress(*columns, console=console, transient=True, disable=not watched) as bar:
            task = bar.add_task("converting", total=None)
            report = convert(
                source,
                destination,
                trust_pickle=trust_pickle,
                dtype=dtype,
                group=group,
                progress=lambda done, total: bar.update(task, completed=done, total=total),
            )
    except CheckpointError as error:
        for line in str(error).splitlines():  # one problem a line
            complain("convert", line)
        raise typer.Exit(2) from error
    typer.echo(describe(report))


def describe(report: Report) -> str:
    """What was done, in a few lines."""
    encoder, decoder = report.config.encoder, report.config.decoder
    dtype = str(report.dtype).removeprefix("torch.")
    lines = [
        f"{report.source_format} checkpoint -> {one_line(str(report.destination))}",
        f"  encoder  {encoder.layers} layers, width {encoder.width}",
        f"  decoder  {decoder.layers} layers, width {decoder.width}, vocabulary {decoder.vocab}",
        f"  weights  {report.tensors} tensors, {report.weight_bytes / 1e9:.2f} GB in {dtype}",
    ]
    lines += _quantised(report)
    lines += [f"  cast     {n} tensors from {of.removeprefix('torch.')}" for of, n in report.cast.items()]
    if report.unused:
        lines.append(f"  unused   {len(report.unused)} tensors, such as {one_line(report.unused[0])}")
    return "\n".join(lines)


def _quantised(report: Report) -> list[str]:
    """The relative errors of quantised matrices: of all, then a line a layer."""
    if report.precision is None:
        return []
    layers: dict[str, dict[str, float]] = {}
    for name, error in report.errors.items():
        part, _, number, matrix, _ = name.split(".")
        layers.setdefault(f"{part} {number}", {})[matrix] = error
    mean = sum(report.errors.values()) / len(report.errors)
    worst = max(report.errors, key=lambda name: report.errors[name])
    told = f"{mean:.2%} on average, {report.errors[worst]:.2%} at most ({worst})"
    lines = [f"  {report.precision:<8} {len(report.errors)} matrices; relative error {told}"]
    if others := Counter(kept for kept in report.kept.values() if kept != report.precision):
        named = ", ".join(f"{count} in {kept}" for kept, count in others.items())
        lines.append(
            f"           of them {named}: the encoder's, and those whose inputs fill no whole groups"
        )
    for layer, errors in layers.items():
        lines.append(
            f"    {layer:<12}" + "  ".join(f"{matrix} {error:.2%}" for matrix, error in errors.items())
        )
    return lines
