"""A sheet as people keep it, Excel or CSV, as text: every cell as Excel shows it, and what cannot be trusted named.

    file -> grid of texts, doubtful cells -> header -> Sheet

An identifier of digits is a number to Excel, and `00042` a number with a format: leading zeros are put back from the
format. What Excel has spoilt for good (an identifier taken for a date, digits beyond the fifteenth, a merged cell) is
told by its address, such as B17, so that it can be mended there.
"""

import csv
import datetime
import io
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from raymed.config import UserError, check_choice

if TYPE_CHECKING:
    from openpyxl.worksheet.worksheet import Worksheet

_EXCEL = (".xlsx", ".xlsm", ".xltx")
_TEXT = (".csv", ".tsv", ".txt")
_OLE = b"\xd0\xcf\x11\xe0"  # old .xls, and any Office file with a password
_MOST_DIGITS = 15  # a number of Excel is a float64
_SHORT_NUMBER = re.compile(r"-?\d(\.\d+)?E\+\d+")
_ZEROS = re.compile(r"0+([-/ ]0+)*")
_INVISIBLE = dict.fromkeys(map(ord, "\u200b\u200c\u200d\u2060\ufeff"))
Address = tuple[int, int]
"""Row and column, from 1."""


@dataclass(frozen=True)
class BadCell:
    """A cell that cannot be used. The text does not repeat what stands in it, which may be an identifier."""

    row: int
    """As Excel numbers the rows; the header's is 1 unless stated."""
    column: str
    """Name of its column."""
    kind: str
    """What it is counted under, e.g. "merged cells"."""
    text: str
    """What is wrong and what to do, with its address."""


@dataclass(frozen=True)
class Sheet:
    """table: text, what is empty is ""; its index is the row number in the file. encoding: of a text file, else ""."""

    table: pd.DataFrame
    bad: list[BadCell]
    encoding: str = ""

    @property
    def looks_like_data(self) -> bool:
        """Whether what should be the columns' names looks like a row of data: a long number or a date, a text that
        stands in its column again, or one with digits that is built like one below it (ACC0 and ACC1)."""
        return any(_is_data(str(name), set(self.table[name])) for name in self.table.columns)


@dataclass
class _Grid:
    """Texts by row and column. bad: address -> (kind, text). unfit: the same, for cells that hold an identifier."""

    texts: list[list[str]]
    bad: dict[Address, tuple[str, str]] = field(default_factory=dict)
    unfit: dict[Address, tuple[str, str]] = field(default_factory=dict)
    merged: list[tuple[str, range]] = field(default_factory=list)
    """Ranges such as A1:C1, with their rows."""


def read_sheet(
    path: str | Path,
    sheet: str | None = None,
    encoding: str | None = None,
    *,
    header: int = 1,
    keys: Sequence[str] | None = (),
) -> Sheet:
    """Read one sheet of an Excel file (.xlsx, .xlsm), or a CSV or TSV file.

    Args:
        sheet: its name; None = the only one that is not empty.
        encoding: of a text file; None = UTF-8, or UTF-16 where a byte order mark says so, else cp949 (Korean Windows).
        header: number of the row that holds the columns' names.
        keys: columns that hold identifiers, as `plain` has their names (None = all): dates, cut off and rounded numbers
            in them are bad cells.

    Returns:
        The sheet: texts are NFC without spaces around them; whole numbers are written whole, with the zeros of their
        format; dates are ISO (2024-03-01). Empty rows, and columns with neither name nor value, are left out.

    Raises:
        UserError: no such file, another format, a password, no such sheet or several, another encoding; a header with
            merged cells, a column without a name, or two of one name.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"there is no file {path}: check its name and folder")
    check_choice("the sheet's ending", path.suffix.lower(), (*_EXCEL, *_TEXT))
    used = ""
    if path.suffix.lower() in _EXCEL:
        grid = _excel(path, sheet)
    else:
        grid, used = _text(path, encoding)
    return _with_header(grid, path, header, keys, used)


def clean(text: str) -> str:
    """NFC, no invisible characters, no spaces around."""
    return unicodedata.normalize("NFC", text.translate(_INVISIBLE)).strip()


def plain(name: str) -> str:
    """A column's name without capitals, spaces, hyphens and underscores: "Patient ID" is "patientid"."""
    return re.sub(r"[\s_-]", "", name).casefold()


def _is_data(name: str, below: set[str]) -> bool:
    if name in below or re.fullmatch(r"[\W\d_]*\d{4}[\W\d_]*", name):
        return True
    return bool(re.search(r"\d", name)) and _built(name) in map(_built, below)


def _built(text: str) -> str:
    """How a text is built: "ACC0-12" is "a9-99"."""
    return re.sub(r"[^\W\d_]+", "a", re.sub(r"\d", "9", text))


def address(row: int, column: int) -> str:
    """(17, 2) -> "B17"."""
    letters = ""
    while column:
        column, letter = divmod(column - 1, 26)
        letters = chr(ord("A") + letter) + letters
    return f"{letters}{row}"


def _with_header(grid: _Grid, path: Path, header: int, keys: Sequence[str] | None, encoding: str) -> Sheet:
    if header < 1 or len(grid.texts) < header or not any(grid.texts[header - 1]):
        raise UserError(f"{path} has no column names in row {header}: name the row that holds them (--header-row)")
    for name, rows in grid.merged:
        if header in rows:
            raise UserError(
                f"{path}: {name} is one merged cell, where row {header} is to hold the columns' names, one a cell: "
                "unmerge it, or name the row that holds them (--header-row)"
            )
    rows = {number: cells for number, cells in enumerate(grid.texts, 1) if number > header and any(cells)}
    names = _names(grid.texts[header - 1], rows, path, header)
    table = pd.DataFrame(
        [[cells[at - 1] if at <= len(cells) else "" for at in names] for cells in rows.values()],
        index=pd.Index(rows, dtype=int),
        columns=list(names.values()),
        dtype=object,
    )
    identifiers = {plain(key) for key in (names.values() if keys is None else keys)}
    unfit = {where: what for where, what in grid.unfit.items() if plain(names.get(where[1], "")) in identifiers}
    bad = [
        BadCell(row, names[at], kind, text)
        for (row, at), (kind, text) in sorted((unfit | grid.bad).items())
        if row > header and at in names
    ]
    return Sheet(table, bad, encoding)


def _names(cells: Sequence[str], rows: dict[int, list[str]], path: Path, header: int) -> dict[int, str]:
    """Number of a column -> its name."""
    names: dict[int, str] = {}
    for at in range(1, max([len(cells), *map(len, rows.values())]) + 1):
        name = " ".join(cells[at - 1].split()) if at <= len(cells) else ""
        filled = next((row for row, texts in rows.items() if at <= len(texts) and texts[at - 1]), None)
        if not name and filled is None:
            continue
        if not name:
            raise UserError(
                f"{path}: {address(header, at)} is empty, but {address(filled or 0, at)} is not: give the column a name"
            )
        if name in names.values():
            other = next(column for column, known in names.items() if known == name)
            places = f"{address(header, other)} and {address(header, at)}"
            raise UserError(f"{path}: {places} hold the same text: give the columns different names")
        names[at] = name
    return names


def _excel(path: Path, sheet: str | None) -> _Grid:
    formulas = _worksheet(path, sheet, values=False)
    addresses = {(cell.row, cell.column) for row in formulas.iter_rows() for cell in row if cell.data_type == "f"}
    values = _worksheet(path, sheet, values=True) if addresses else formulas
    grid = _Grid([["" for _ in range(values.max_column)] for _ in range(values.max_row)])
    for row in values.iter_rows():
        for cell in row:
            _place(grid, cell, (cell.row, cell.column) in addresses)
    for area in values.merged_cells.ranges:
        grid.merged.append((area.coord, range(area.min_row, area.max_row + 1)))
        for where in list(area.cells)[1:]:
            why = f"{address(*where)} is part of the merged cells {area.coord}: unmerge them and fill in each"
            grid.bad[where] = "merged cells", why
    return grid


def _worksheet(path: Path, sheet: str | None, *, values: bool) -> "Worksheet":
    import warnings

    from openpyxl import load_workbook

    if path.read_bytes()[:4] == _OLE:
        raise UserError(f"{path} has a password or is an old .xls file: save it in Excel as .xlsx without a password")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of openpyxl, about styles and extensions it does not keep
            book = load_workbook(path, data_only=values)
    except Exception as error:  # openpyxl raises whatever zipfile and its XML parsers do
        raise UserError(f"{path} cannot be read as an Excel file ({type(error).__name__}): save it again") from error
    if sheet is not None:
        titles = {clean(one.title): one for one in book.worksheets}
        check_choice(f"sheet of {path.name}", clean(sheet), titles)
        return titles[clean(sheet)]
    filled = [one for one in book.worksheets if one.max_row > 1 or one["A1"].value is not None]
    if len(filled) == 1:
        return filled[0]
    names = ", ".join(repr(one.title) for one in filled) or "none"
    raise UserError(f"{path}: which sheet holds the labels? Those with content: {names} (--sheet NAME)")


def _place(grid: _Grid, cell: Any, is_formula: bool) -> None:
    """Put one cell of openpyxl into the grid."""
    where, name, value = (cell.row, cell.column), cell.coordinate, cell.value
    if is_formula and value is None:
        text = f"{name} is a formula without a stored result: open the file in Excel and save it, or paste the values"
        grid.bad[where] = "formula without a result", text
    elif cell.data_type == "e":
        grid.bad[where] = "error value", f"{name} holds an error of Excel, such as #N/A: mend its formula"
    elif isinstance(value, datetime.date | datetime.time | datetime.timedelta):
        text = f"{name} holds a date where an identifier is expected: format the cell as text and type it again"
        grid.unfit[where] = "date as an identifier", text
    elif isinstance(value, int | float) and abs(value) >= 10**_MOST_DIGITS:
        text = f"{name} is a number of more than {_MOST_DIGITS} digits, which Excel rounds: type it again as text"
        grid.unfit[where] = "rounded identifier", text
    grid.texts[cell.row - 1][cell.column - 1] = clean(_shown(value, cell.number_format))


def _shown(value: Any, number_format: str) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).upper()
    if isinstance(value, int | float):
        return _number(value, number_format)
    if isinstance(value, datetime.datetime):
        return value.date().isoformat() if value.time() == datetime.time() else value.isoformat(" ")
    return value.isoformat() if isinstance(value, datetime.date | datetime.time) else str(value)


def _number(value: float, number_format: str) -> str:
    """42 in the format 00000 is 00042, and in 00-000 it is 00-042. Other formats leave a number as it is."""
    if not float(value).is_integer():
        return repr(value)
    shown = re.sub(r'[\\"]', "", number_format.split(";")[0])
    if value < 0 or not _ZEROS.fullmatch(shown):
        return str(int(value))
    digits = list(str(int(value)).zfill(shown.count("0")))
    written = [digits.pop() if sign == "0" else sign for sign in reversed(shown)]
    return "".join(digits) + "".join(reversed(written))


def _text(path: Path, encoding: str | None) -> tuple[_Grid, str]:
    text, used = _decoded(path, encoding)
    first = text.split("\n", 1)[0]
    separator = "\t" if path.suffix.lower() == ".tsv" else max(",;\t", key=first.count)
    try:
        rows = list(csv.reader(io.StringIO(text, newline=""), delimiter=separator))
    except csv.Error as error:
        raise UserError(f"{path} cannot be read as CSV: {error}") from error
    grid = _Grid([[clean(cell) for cell in row] for row in rows])
    for where, cell in _numbered(grid.texts):
        if _SHORT_NUMBER.fullmatch(cell):
            text = f"{address(*where)} holds a number cut short by Excel: format the column as text and save it again"
            grid.unfit[where] = "rounded identifier", text
    return grid, used


def _numbered(texts: Iterable[Iterable[str]]) -> Iterable[tuple[Address, str]]:
    return (((r, c), cell) for r, row in enumerate(texts, 1) for c, cell in enumerate(row, 1))


def _decoded(path: Path, encoding: str | None) -> tuple[str, str]:
    """The text and its encoding."""
    content = path.read_bytes()
    if b"\0" in content[:4] and not content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise UserError(f"{path} is no text file: give a CSV file, or an Excel file with its own ending")
    marked = "utf-16" if content.startswith((b"\xff\xfe", b"\xfe\xff")) else None
    tried = [encoding] if encoding else [marked] if marked else ["utf-8-sig", "cp949"]
    for name in tried:
        try:
            return content.decode(name), name
        except UnicodeDecodeError:
            continue
        except LookupError as error:
            raise UserError(f"there is no encoding {name!r}: try utf-8, cp949 or latin-1") from error
    raise UserError(f"{path} is not {' or '.join(tried)}: name its encoding (--encoding), or save it as UTF-8")
