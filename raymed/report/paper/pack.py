"""The publication pack: tables, figures, methods and checklists of a study in one folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from raymed.config import to_json
from raymed.report.paper.checklists import checklist, places_of
from raymed.report.paper.figures import draw_figures
from raymed.report.paper.guidelines import CLAIM, TRIPOD_AI
from raymed.report.paper.methods import methods, sections
from raymed.report.paper.record import PaperRecord
from raymed.report.paper.table import to_csv, to_latex
from raymed.report.paper.tables import tables_of
from raymed.report.paper.word import BLANK, write_tables, write_text
from raymed.storage import write_atomic


@dataclass(frozen=True)
class Pack:
    """What was written."""

    folder: Path
    files: list[Path]
    blanks: list[str]
    """What is still to be filled in the methods, in their order."""


def paper_pack(record: PaperRecord, folder: Path) -> Pack:
    """Write the pack of a record into a folder, which may hold an older one.

    record.json                              every fact that the rest is made of
    methods.md, .docx; methods.ko.md, .docx  the methods section, its blanks marked
    table_*.csv, table_*.tex; tables.docx    cohort, flow, performance, ...
    figure_*.pdf, figure_*.svg               flow, discrimination, calibration, decision curve, subgroups
    checklist_*.csv; checklists.docx         TRIPOD+AI and CLAIM: where each item is answered

    What the record does not hold is left out or blank. Tables and figures of an earlier pack that this one does not
    write are removed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    english = methods(record, "en")
    tables = tables_of(record)
    figures = draw_figures(folder, record)
    places = places_of(sections(english), [table.name for table in tables], figures)
    checklists = [
        checklist("checklist_tripod_ai", "TRIPOD+AI checklist", TRIPOD_AI, places, record),
        checklist("checklist_claim", "CLAIM checklist (2024 update)", CLAIM, places, record),
    ]
    texts = {
        "record.json": to_json(record),
        "methods.md": english,
        "methods.ko.md": methods(record, "ko"),
        **{f"{table.name}.csv": to_csv(table) for table in (*tables, *checklists)},
        **{f"{table.name}.tex": to_latex(table) for table in tables},
    }
    for name, text in texts.items():
        write_atomic(folder / name, text)
    write_text(folder / "methods.docx", texts["methods.md"])
    write_text(folder / "methods.ko.docx", texts["methods.ko.md"])
    write_tables(folder / "checklists.docx", checklists, landscape=True)
    words = ["methods.docx", "methods.ko.docx", "checklists.docx"]
    if tables:
        write_tables(folder / "tables.docx", tables)
        words.append("tables.docx")
    written = {*texts, *words, *(f"{name}.{ending}" for name in figures for ending in ("pdf", "svg"))}
    _remove_older(folder, written)
    blanks = [blank.removeprefix("[TO FILL: ").removesuffix("]") for blank in BLANK.findall(english)]
    return Pack(folder, [folder / name for name in sorted(written)], list(dict.fromkeys(blanks)))


def _remove_older(folder: Path, written: set[str]) -> None:
    """Tables and figures of an earlier pack: they would stand beside others' facts."""
    for path in folder.iterdir():
        if path.name.startswith(("table_", "figure_")) or path.name == "tables.docx":
            if path.name not in written:
                path.unlink()
