"""The results as text, for people. Needs nothing but the standard library."""

from __future__ import annotations

from typing import Any

from .goals import rows as goal_rows


def table(lines: list[dict[str, Any]]) -> list[str]:
    """Timed lines, in their order."""
    rows = [f"{'what':46}{'variant':20}{'median us':>11}{'p99 us':>10}{'GB/s':>8}{'roof':>7}  note"]
    for line in lines:
        rate = f"{line['gb_per_s']:8.0f}" if line["gb_per_s"] else f"{'':8}"
        share = f"{100 * line['share']:5.0f} %" if line["share"] else f"{'':7}"
        times = f"{line['median_us']:11.1f}{line['p99_us']:10.1f}"
        rows.append(f"{line['name'][:45]:46}{line['variant'][:19]:20}{times}{rate}{share}  {line['note']}")
    return rows


def page(results: dict[str, Any], problems: list[str]) -> str:
    """Everything on one page: machine, sections, ceilings, the lines of each section, ratios, problems."""
    sections = results["sections"]
    about, dry = results["machine"], "DRY RUN: tiny sizes on the CPU, no figure means anything"
    rows = [
        f"{about.get('device', 'device unknown')}, {results['date']}, "
        f"commit {about.get('commit') or 'unknown'}{f' ({dry})' if results['dry_run'] else ''}",
        f"versions: {about.get('versions')}",
        f"command: {results['command']}",
        "",
    ]
    for name, content in sections.items():
        values = content.get("values", {})
        told = "; ".join(f"{key}: {values[key]}" for key in values if key.endswith("_text"))
        status = f"{content['status']} {content.get('reason', '')}".strip()
        rows.append(f"{name:12}{status:24}{content.get('seconds', 0):7.1f} s  {told}")
    for name, content in sections.items():
        if content.get("lines"):
            rows += ["", f"== {name}", *table(content["lines"])]
        ratios = content.get("values", {}).get("ratios", {})
        rows += [f"{key:66}{value:8.2f} x" for key, value in ratios.items()]
    if not results["dry_run"]:
        rows += ["", "== what must hold on an H200 at the 3B dims", *goal_rows(sections)]
    rows += ["", *(f"PROBLEM {text}" for text in problems)] if problems else ["", "no problems"]
    return "\n".join(rows) + "\n"
