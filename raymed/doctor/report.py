"""Findings for people."""

from collections.abc import Sequence

from raymed.doctor.finding import Finding

_COLOURS = {"ok": "green", "warning": "yellow", "failure": "red"}


def row(finding: Finding) -> None:
    """One line for a finding, as soon as it is there."""
    from rich.console import Console
    from rich.text import Text

    line = Text.assemble((f"{finding.level:8}", _COLOURS[finding.level]), f"{finding.name:20} {finding.seconds:5.1f} s")
    Console(highlight=False).print(line)


def show(findings: Sequence[Finding]) -> None:
    """A table of all, with what to do, and their number."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("check", "", "found")
    for finding in findings:
        colour = _COLOURS[finding.level]
        text = Text(finding.found)
        if finding.remedy:
            text.append(f"\ndo: {finding.remedy}", style="bold")
        table.add_row(finding.name, Text(finding.level, style=colour), text)
    console = Console(highlight=False)
    console.print(table)
    count = {level: sum(finding.level == level for finding in findings) for level in _COLOURS}
    console.print(f"{count['ok']} ok, {count['warning']} warnings, {count['failure']} failures")
