"""The rows of the sheet: their key, what their label means, and what else they state, in the manifest's words."""

import difflib
import re
import shlex
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from raymed.config import UserError
from raymed.data.intake.header import PATH_KEYS
from raymed.data.intake.labels import Label, LabelMap
from raymed.data.intake.settings import ImportConfig, SheetColumns
from raymed.data.intake.sheet import Sheet, plain

FIXED = ("image", "label", "patient", "case", "side", "view", "frame", "site", "scanner", "year", "age", "sex")
FIXED += ("modality", "series", "right", "blank_boxes", "burned_in")
"""Columns of every manifest that an import writes, besides those of readers."""
_BY_NAME = {"label": ("label", "result"), "patient": ("patient", "patientid")}
_BY_NAME |= {name: (name,) for name in ("view", "site", "age", "sex")}
"""Columns that are used without being named, by their plain names."""
_OLDEST = 90
_SIDES = {"left": ("l", "lt", "left", "좌", "좌측", "왼쪽"), "right": ("r", "rt", "right", "우", "우측", "오른쪽")}
_SIDES |= {"both": ("b", "both", "bilateral", "양측", "양쪽")}
_SEXES = {"F": ("f", "female", "여", "여자", "여성"), "M": ("m", "male", "남", "남자", "남성"), "O": ("o", "other")}
_AGE = re.compile(r"0*(\d{1,3})(?:\.0+)? ?(?:y|yrs?|years?|세)?")
_FILE = re.compile(r"\.(png|jpe?g|tiff?|bmp|dcm|dicom|nii(\.gz)?)$", re.IGNORECASE)
_MANY = 20  # classes


@dataclass(frozen=True)
class Finding:
    """Something a person is to know of one row or image. `kind` and `text` hold no identifier; key and image may."""

    kind: str
    text: str
    row: int | None = None
    key: str = ""
    image: str = ""
    stops: bool = False
    """Whether it ends an import that does not skip."""


@dataclass(frozen=True)
class Row:
    """One row of the sheet.

    number: as Excel shows it. label: what its text means. stated: the manifest's columns that the sheet fills; patient
    and case are identifiers still. problem: why the row cannot be used, "" where it can.
    """

    number: int
    key: str
    label: Label
    stated: dict[str, str] = field(default_factory=dict)
    problem: str = ""


def used_columns(sheet: Sheet, config: ImportConfig, path: Path) -> SheetColumns:
    """The columns with those that go by their name filled in. Raises UserError for a column that is not there."""
    given, names = config.columns, list(sheet.table.columns)
    found = {field: _called(field, names) for field in _BY_NAME if getattr(given, field) is None}
    if config.site:
        found.pop("site", None)
    columns = replace(given, key=given.key or config.key, **found)
    if not columns.label:
        _check_header(sheet, config, path)
        listing = ", ".join(map(repr, names))
        raise UserError(f"{path}: which column holds the label (--columns.label NAME)? The columns are {listing}")
    for what, name in _named(columns):
        if name not in names:
            _check_header(sheet, config, path)
            raise UserError(_no_such_column(sheet, path, what, name))
    clash = sorted({*columns.keep} & {*FIXED})
    if clash:
        raise UserError(f"--columns.keep {clash[0]}: the manifest has a column of that name; rename it in the sheet")
    return columns


def _check_header(sheet: Sheet, config: ImportConfig, path: Path) -> None:
    """Before columns are listed by their names. Raises UserError where those look like data, and may name somebody."""
    if sheet.looks_like_data:
        raise UserError(
            f"{path}: row {config.header_row} is to hold the names of its {sheet.table.shape[1]} columns, and looks "
            "like data: put names above it, or name the row that holds them (--header-row)"
        )


def column_notes(sheet: Sheet, given: SheetColumns, used: SheetColumns) -> list[str]:
    """Which columns are used because of their names, and which are not used."""
    found = [field for field in _BY_NAME if getattr(given, field) is None and getattr(used, field)]
    notes = [
        f"{field}: column {getattr(used, field)!r}, by its name (--columns.{field} '' leaves it unused)"
        for field in found
        if field != "label"
    ]
    rest = [repr(name) for name in sheet.table.columns if name not in {name for _, name in _named(used)}]
    return [*notes, *[f"columns of the sheet that are not used: {', '.join(rest)}"] * bool(rest)]


def _called(field: str, names: Sequence[str]) -> str | None:
    known = {plain(name): name for name in names}
    return next((known[name] for name in _BY_NAME[field] if name in known), None)


def _no_such_column(sheet: Sheet, path: Path, field: str, name: str) -> str:
    names = list(sheet.table.columns)
    known = {plain(one): one for one in names}
    near = difflib.get_close_matches(plain(name), known, n=1)
    hint = f" Did you mean --columns.{field} {shlex.quote(known[near[0]])}?" if near else ""
    paths = next((one for one in names if _FILE.search(next(iter(sheet.table[one]), ""))), None)
    if field == "key" and paths:
        hint = f" If {paths!r} links rows to images: --key path --columns.key {shlex.quote(paths)}"
    return f"{path} has no column {name!r} (--columns.{field}); its columns are {', '.join(map(repr, names))}.{hint}"


def identifier_columns(config: ImportConfig) -> tuple[str, ...]:
    """Columns that hold identifiers, those that go by their name included."""
    columns = config.columns
    patient = _BY_NAME["patient"] if columns.patient is None else (columns.patient,)
    return tuple(name for name in (columns.key or config.key, *patient, columns.case) if name)


def read_rows(sheet: Sheet, columns: SheetColumns, labels: LabelMap) -> tuple[list[Row], list[Finding]]:
    """All rows, and what is wrong with some of them.

    Raises:
        UserError: the labels have very many texts and no mapping says what they mean.
    """
    findings: list[Finding] = []
    used = {name for _, name in _named(columns)}
    bad = [cell for cell in sheet.bad if cell.column in used]
    rows = []
    for number, cells in zip(sheet.table.index.tolist(), sheet.table.to_dict("records"), strict=True):
        cells = {str(name): text for name, text in cells.items()}
        row = Row(number, cells[str(columns.key)], labels(cells[str(columns.label)]), _stated(cells, columns, labels))
        wrong = [Finding(cell.kind, cell.text, number, row.key, stops=True) for cell in bad if cell.row == number]
        wrong = wrong or [Finding(*why, number, row.key, stops=True) for why in _wrong(row, cells, columns, labels)]
        findings += [*wrong, *_not_understood(row, cells, columns)]
        rows.append(replace(row, problem=wrong[0].kind) if wrong else row)
    classes = {row.label.name for row in rows if row.label.kind == "class"}
    if len(classes) > _MANY:
        raise UserError(
            f"the column {columns.label!r} holds {len(classes)} different texts: name the column of the classes "
            "(--columns.label), or say which texts mean which class (--map CLASS=text,text)"
        )
    return _without_duplicates(rows, findings), findings


def _named(columns: SheetColumns) -> list[tuple[str, str]]:
    """(field, column) of all columns that are used."""
    fields = [(field, [value] if isinstance(value, str) else value) for field, value in vars(columns).items() if value]
    return [(field, name) for field, names in fields for name in names]


def _stated(cells: Mapping[str, str], columns: SheetColumns, labels: LabelMap) -> dict[str, str]:
    """What a row states, in the manifest's columns."""
    fields = ("patient", "case", "side", "view", "frame", "site", "age", "sex")
    stated = {name: cells[column] for name in fields if (column := getattr(columns, name))}
    stated = {name: _in_our_words(name, text) for name, text in stated.items()}
    if columns.date:
        stated["year"] = (re.match(r"\d{4}(?=\D|$|\d{4}$)", cells[columns.date]) or [""])[0]
    for number, column in enumerate(columns.readers, 1):
        said = labels(cells[column])
        stated[f"label_reader{number}"] = said.name if said.kind == "class" else ""
    return stated | {column: cells[column] for column in columns.keep}


def _in_our_words(name: str, text: str) -> str:
    if name == "age":
        years = _AGE.fullmatch(text.casefold())
        return str(min(int(years[1]), _OLDEST)) if years else ""
    words = {"side": _SIDES, "sex": _SEXES}.get(name)
    if not words:
        return text
    return next((word for word, texts in words.items() if text.casefold() in texts), "")


def _wrong(row: Row, cells: Mapping[str, str], columns: SheetColumns, labels: LabelMap) -> Iterable[tuple[str, str]]:
    """(kind, text) of whatever is wrong with a row."""
    if not row.key:
        yield "no key", f"row {row.number}: the column {columns.key!r} is empty"
    for column in [str(columns.label), *columns.readers]:
        if labels(cells[column]).kind == "unknown":
            near = labels.nearest(cells[column])
            hint = f" (did you mean {near!r}?)" if near else ""
            yield "unknown label", f"row {row.number}: the text in {column!r} is in no list of --map{hint}"
    if columns.side and cells[columns.side] and not row.stated["side"]:
        yield "unknown side", f"row {row.number}: the text in {columns.side!r} is neither left, right nor both"
    frame = row.stated.get("frame", "")
    if frame and not (frame.isdecimal() and int(frame) >= 1):
        yield "no frame number", f"row {row.number}: the text in {columns.frame!r} is no whole number from 1"


def _not_understood(row: Row, cells: Mapping[str, str], columns: SheetColumns) -> Iterable[Finding]:
    """Cells without which the row can do."""
    for column, name in ((columns.age, "age"), (columns.sex, "sex"), (columns.date, "year")):
        if column and cells[column] and not row.stated[name]:
            text = f"row {row.number}: the text in {column!r} is no {name}"
            yield Finding("not understood, left empty", text, row.number, row.key)


def _without_duplicates(rows: Sequence[Row], findings: list[Finding]) -> list[Row]:
    """Rows of one key that neither side nor frame tells apart: one of them where they say the same, else none."""
    by_key: dict[str, list[Row]] = {}
    for row in rows:
        by_key.setdefault(row.key, []).append(row)
    kept: dict[int, Row] = {row.number: row for row in rows}
    for key, same in by_key.items():
        if not key or len(same) == 1 or told_apart_by(same):
            continue
        numbers = ", ".join(str(row.number) for row in same)
        if all((row.label, row.stated, row.problem) == (same[0].label, same[0].stated, "") for row in same):
            text = f"rows {numbers} say the same: the first is used"
            findings.append(Finding("repeated row", text, same[0].number, key))
            for row in same[1:]:
                del kept[row.number]
            continue
        for row in same:
            text = f"row {row.number}: the rows {numbers} have one key and say different things"
            findings.append(Finding("duplicate key", text, row.number, key, stops=True))
            kept[row.number] = replace(row, problem=row.problem or "duplicate key")
    return list(kept.values())


def told_apart_by(rows: Sequence[Row]) -> str:
    """ "frame" or "side" where all rows differ in it, else ""."""
    for name in ("frame", "side"):
        values = Counter(row.stated.get(name, "") for row in rows)
        if "" not in values and max(values.values()) == 1:
            return name
    return ""


def sheet_identifiers(rows: Iterable[Row], config: ImportConfig) -> set[str]:
    """Every identifier that the sheet holds."""
    keys = set() if config.key in PATH_KEYS else {row.key for row in rows}
    return keys | {row.stated.get(name, "") for row in rows for name in ("patient", "case")} - {""}
