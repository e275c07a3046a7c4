"""Word documents: tables with three rules as journals print them, and text with its blanks marked in yellow.

Hangul is set in Malgun Gothic, which every Korean Windows has; Word takes another font where it is missing.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from raymed.report.paper.table import PaperTable, printed, with_headings
from raymed.storage import write_atomic

BLANK = re.compile(r"\[TO FILL: [^\]]*\]")
LATIN, HANGUL = "Arial", "Malgun Gothic"
_HEADING = re.compile(r"(#+) (.*)")


def write_tables(path: Path, tables: Sequence[PaperTable], *, landscape: bool = False) -> None:
    """One document with every table on a page of its own, titles above and notes below."""
    document = _document(landscape)
    for position, table in enumerate(tables):
        if position:
            document.add_page_break()
        _runs(document.add_paragraph(), table.title, bold=True)
        _table(document, table)
        if table.notes:
            _runs(document.add_paragraph(), table.notes, size=8)
    _save(document, path)


def write_text(path: Path, markdown: str) -> None:
    """Headings ("# ..."), list items ("- ...") and paragraphs; no other markup is known."""
    document = _document()
    for block in filter(None, map(str.strip, markdown.split("\n"))):
        if heading := _HEADING.match(block):
            paragraph = document.add_heading(level=len(heading[1]))
            _runs(paragraph, heading[2], size=16 - 2 * len(heading[1]))
        elif block.startswith("- "):
            _runs(document.add_paragraph(style="List Bullet"), block[2:])
        else:
            _runs(document.add_paragraph(), block)
    _save(document, path)


def _document(landscape: bool = False) -> Any:
    """An empty A4 document in the fonts of both scripts, by nobody."""
    from docx import Document
    from docx.oxml.ns import qn
    from docx.shared import Mm, Pt

    document = Document()
    section = document.sections[0]
    long, short = Mm(297), Mm(210)
    section.page_width, section.page_height = (long, short) if landscape else (short, long)
    section.left_margin = section.right_margin = section.top_margin = section.bottom_margin = Mm(20)
    if landscape:
        from docx.enum.section import WD_ORIENT

        section.orientation = WD_ORIENT.LANDSCAPE
    normal: Any = document.styles["Normal"]
    normal.font.name, normal.font.size = LATIN, Pt(10)
    normal.element.rPr.rFonts.set(qn("w:eastAsia"), HANGUL)
    properties = document.core_properties
    properties.author, properties.comments = "", ""
    return document


def _table(document: Any, table: PaperTable) -> None:
    from docx.enum.table import WD_TABLE_ALIGNMENT

    lines = [(list(table.columns), 0)]
    for row, heading in with_headings(table.rows):
        if heading:
            lines.append(([heading, *[""] * (len(table.columns) - 1)], 0))
        lines.append(([row.name, *map(printed, row.cells)], 4 * bool(row.group)))
    grid = document.add_table(rows=len(lines), cols=len(table.columns))
    grid.alignment = WD_TABLE_ALIGNMENT.CENTER
    for position, (line, (texts, indent)) in enumerate(zip(grid.rows, lines, strict=True)):
        _keep_whole(line, header=position == 0)
        for column, (cell, text) in enumerate(zip(line.cells, texts, strict=True)):
            _fill(cell, text, bold=position == 0, indent=indent * (column == 0), centred=_is_number(table, column))
    for column, width in zip(grid.columns, _widths(document, [texts for texts, _ in lines]), strict=True):
        column.width = width
        for cell in column.cells:
            cell.width = width
    for cell in grid.rows[0].cells:
        _rule(cell, top=12, bottom=6)
    for cell in grid.rows[-1].cells:
        _rule(cell, bottom=12)


def _widths(document: Any, lines: Sequence[Sequence[str]]) -> list[int]:
    """Of the columns, from the length of their texts: together the width of the page between its margins."""
    section = document.sections[0]
    whole = section.page_width - section.left_margin - section.right_margin
    lengths = [min(40, max(map(len, column))) + 3 for column in zip(*lines, strict=True)]
    return [int(whole * length / sum(lengths)) for length in lengths]


def _is_number(table: PaperTable, column: int) -> bool:
    """Whether a column is set in its middle: one of numbers, not of sentences."""
    return column > 0 and not all(isinstance(row.cells[column - 1], str) for row in table.rows)


def _fill(cell: Any, text: str, *, bold: bool, indent: int, centred: bool) -> None:
    from docx.enum.text import WD_ALIGN_PARAGRAPH
    from docx.shared import Mm, Pt

    paragraph = cell.paragraphs[0]
    paragraph.paragraph_format.space_after = paragraph.paragraph_format.space_before = Pt(2)
    paragraph.paragraph_format.left_indent = Mm(indent)
    if centred:
        paragraph.alignment = WD_ALIGN_PARAGRAPH.CENTER
    _runs(paragraph, text, bold=bold, size=9)


def _runs(paragraph: Any, text: str, *, bold: bool | None = None, size: float | None = None) -> None:
    """Add the text, its blanks highlighted."""
    from docx.enum.text import WD_COLOR_INDEX
    from docx.oxml.ns import qn
    from docx.shared import Pt, RGBColor

    blanks = BLANK.findall(text)
    for piece in filter(None, re.split(f"({BLANK.pattern})", text)):
        run = paragraph.add_run(piece)
        run.bold, run.font.name, run.font.color.rgb = bold, LATIN, RGBColor(0, 0, 0)
        run._element.rPr.rFonts.set(qn("w:eastAsia"), HANGUL)
        if size:
            run.font.size = Pt(size)
        if piece in blanks:
            run.font.highlight_color = WD_COLOR_INDEX.YELLOW


def _rule(cell: Any, **edges: int) -> None:
    """Rules at edges of a cell, in eighths of a point."""
    from docx.oxml import OxmlElement
    from docx.oxml.ns import qn

    properties = cell._tc.get_or_add_tcPr()
    borders = OxmlElement("w:tcBorders")
    for edge, width in edges.items():
        rule = OxmlElement(f"w:{edge}")
        for name, value in (("val", "single"), ("sz", str(width)), ("space", "0"), ("color", "000000")):
            rule.set(qn(f"w:{name}"), value)
        borders.append(rule)
    properties.append(borders)


def _keep_whole(row: Any, header: bool) -> None:
    """No page break within a row; a header is repeated on every page."""
    from docx.oxml import OxmlElement

    properties = row._tr.get_or_add_trPr()
    properties.append(OxmlElement("w:cantSplit"))
    if header:
        properties.append(OxmlElement("w:tblHeader"))


def _save(document: Any, path: Path) -> None:
    written = io.BytesIO()
    document.save(written)
    write_atomic(path, written.getvalue())
