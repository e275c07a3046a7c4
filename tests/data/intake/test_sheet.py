"""Sheets as Excel shows them, and every way in which Excel spoils an identifier."""

import datetime
import unicodedata

import pytest
from openpyxl import Workbook

from raymed.config import UserError
from raymed.data.intake.sheet import address, read_sheet

HEADER = ["Key", "Result", "Date"]


@pytest.fixture
def excel(tmp_path):
    """excel(rows, change=None, **arguments) writes the rows below HEADER and reads them; change(worksheet) before."""

    def write_and_read(rows, change=lambda sheet: None, **arguments):
        book = Workbook()
        sheet = book.worksheets[0]
        for row in [HEADER, *rows]:
            sheet.append(row)
        change(sheet)
        book.save(tmp_path / "sheet.xlsx")
        return read_sheet(tmp_path / "sheet.xlsx", **arguments)

    return write_and_read


@pytest.fixture
def text(tmp_path):
    """text(content, name, **arguments) writes bytes and reads them."""

    def write_and_read(content, name="sheet.csv", **arguments):
        (tmp_path / name).write_bytes(content)
        return read_sheet(tmp_path / name, **arguments)

    return write_and_read


def message(call, *args, **kwargs):
    with pytest.raises(UserError) as info:
        call(*args, **kwargs)
    return str(info.value)


@pytest.mark.parametrize(
    ("value", "number_format", "shown"),
    [
        ("00042", "General", "00042"),
        (42, "00000", "00042"),
        (1234567, "00000", "1234567"),
        (12345, "00-000", "12-345"),
        (1234567, "00-000", "1234-567"),
        (42, '"0"0000', "00042"),
        (42, "0.00", "42"),
        (42.0, "General", "42"),
        (-3, "00000", "-3"),
        (0.1, "0%", "0.1"),
        (True, "General", "TRUE"),
        (None, "00000", ""),
        (" \u200bA 1\u00a0", "@", "A 1"),
    ],
)
def test_cells_are_text_as_excel_shows_them(excel, value, number_format, shown):
    def form(sheet):
        sheet["A2"].number_format = number_format

    assert excel([[value, "x", None]], form).table["Key"].tolist() == [shown]


def test_dates_are_iso_and_text_is_composed(excel):
    day = datetime.datetime(2024, 3, 1)
    table = excel([["1", unicodedata.normalize("NFD", "폐쇄"), day], ["2", "x", day.replace(hour=9)]]).table
    assert table["Result"].tolist() == ["폐쇄", "x"]
    assert table["Date"].tolist() == ["2024-03-01", "2024-03-01 09:00:00"]


def test_the_index_is_the_row_number_and_empty_rows_and_columns_go(excel):
    sheet = excel([["1", "a", ""], [None, None, None], ["2", "b", ""]])
    assert sheet.table.index.tolist() == [2, 4]
    assert sheet.table.columns.tolist() == HEADER
    titled = excel([["1", "a", ""]], lambda s: (s.insert_rows(1), s.__setitem__("A1", "HSG 2021")), header=2)
    assert titled.table.index.tolist() == [3] and titled.table["Key"].tolist() == ["1"]


def test_dates_and_rounded_numbers_are_bad_as_identifiers_only(excel):
    rows = [[datetime.date(2021, 3, 4), "a", datetime.date(2021, 3, 4)], [1234567890123456, "b", 1234567890123456]]
    assert excel(rows).bad == []
    bad = excel([["7", "c", None], *rows], keys=["Key"]).bad
    assert [(cell.row, cell.column, cell.kind) for cell in bad] == [
        (3, "Key", "date as an identifier"),
        (4, "Key", "rounded identifier"),
    ]
    assert bad[0].text.startswith("A3 holds a date") and "as text" in bad[0].text
    assert "2021" not in bad[0].text and "123456" not in bad[1].text
    assert excel([[999999999999999, "b", None]], keys=["Key"]).bad == []


def test_merged_cells_are_named(excel):
    sheet = excel([["1", "a", "x"], ["2", None, "y"], ["3", None, "z"]], lambda s: s.merge_cells("B2:B4"))
    assert [(cell.row, cell.column, cell.kind) for cell in sheet.bad] == [
        (3, "Result", "merged cells"),
        (4, "Result", "merged cells"),
    ]
    assert "B3 is part of the merged cells B2:B4" in sheet.bad[0].text
    told = message(excel, [["1", "a", "x"]], lambda s: s.merge_cells("A1:B1"))
    assert "A1:B1" in told and "--header-row" in told


def test_formulas_give_their_stored_result_or_are_named(excel, tmp_path):
    sheet = excel([["1", "=A2", "x"], ["2", "b", "=1/0"]])
    assert [(cell.row, cell.column, cell.kind) for cell in sheet.bad] == [
        (2, "Result", "formula without a result"),
        (3, "Date", "formula without a result"),
    ]
    assert sheet.bad[0].text.startswith("B2 is a formula without a stored result")
    _store_result(tmp_path / "sheet.xlsx", b"<f>A2</f><v></v>", b"<f>A2</f><v>17</v>")
    again = read_sheet(tmp_path / "sheet.xlsx")
    assert again.table["Result"].tolist() == ["17", "b"]
    assert [cell.row for cell in again.bad] == [3]


def _store_result(path, before, after):
    """What Excel does when it saves: the result stands beside the formula. openpyxl never writes it."""
    import zipfile

    with zipfile.ZipFile(path) as book:
        parts = {name: book.read(name) for name in book.namelist()}
    name = "xl/worksheets/sheet1.xml"
    changed = parts[name].replace(before, after)
    assert changed != parts[name]
    with zipfile.ZipFile(path, "w") as book:
        for part, content in (parts | {name: changed}).items():
            book.writestr(part, content)


def test_error_values_are_named(excel):
    bad = excel([["1", "#N/A", "x"]]).bad
    assert [(cell.kind, cell.text[:2]) for cell in bad] == [("error value", "B2")]


def test_the_sheet_must_be_clear(excel, tmp_path):
    def second(sheet):
        sheet.parent.create_sheet("Labels").append(["Key"])
        sheet.parent.create_sheet("Empty")

    assert message(excel, [["1", "a", ""]], second).endswith("Those with content: 'Sheet', 'Labels' (--sheet NAME)")
    assert excel([["1", "a", ""]], second, sheet="Labels").table.empty
    assert "did you mean 'Labels'?" in message(excel, [["1", "a", ""]], second, sheet="labels")
    korean = excel([["1", "a", ""]], lambda s: setattr(s, "title", "판독"), sheet=unicodedata.normalize("NFD", "판독"))
    assert len(korean.table) == 1


def test_headers_must_be_clear(excel):
    twice = message(excel, [["1", "a", "x"]], lambda s: s.__setitem__("C1", " Result"))
    assert "B1 and C1 hold the same text" in twice and "Result" not in twice
    nameless = message(excel, [["1", "a", ""], ["2", "a", "x"]], lambda s: s.__setitem__("C1", None))
    assert "C1 is empty, but C3 is not" in nameless
    assert excel([["1", "a", "x"]], lambda s: s.__setitem__("B1", "Re\n sult")).table.columns[1] == "Re sult"


@pytest.mark.parametrize(
    ("first", "is_data"),
    [
        ("ACC0,sick,x", True),  # built as ACC1
        ("K,well,x", True),  # stands below
        ("K,Result,00012345", True),
        ("K,Result,2021-03-04", True),
        ("AccessionNumber,Result,Reader 1", False),
        ("Key no. 2,Result 2021,Age", False),
    ],
)
def test_a_first_row_that_is_no_header(text, first, is_data):
    sheet = text(f"{first}\nACC1,well,2\nACC2,well,3\n".encode())
    assert sheet.looks_like_data == is_data


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "cp949"])
def test_text_in_the_encodings_of_windows(text, encoding):
    sheet = text("Key,판독\n00042,폐쇄\n".encode(encoding))
    assert sheet.table.to_dict("list") == {"Key": ["00042"], "판독": ["폐쇄"]}
    assert sheet.encoding == {"utf-8": "utf-8-sig"}.get(encoding, encoding)


def test_a_stated_encoding_is_the_only_one(text):
    latin = "Key,Ort\n1,Zürich\n".encode("latin-1")
    assert text(latin, encoding="latin-1").table["Ort"].tolist() == ["Zürich"]
    assert "is not utf-8: name its encoding" in message(text, latin, encoding="utf-8")
    assert "there is no encoding 'kr'" in message(text, latin, encoding="kr")
    assert "is not utf-8-sig or cp949" in message(text, b"Key\n\xff\xff\xff\n")


def test_separators_quotes_and_short_numbers(text):
    assert text(b"a;b\n1;2,5\n").table.to_dict("list") == {"a": ["1"], "b": ["2,5"]}
    assert text(b"a\tb\n1\t2\n", "s.tsv").table["b"].tolist() == ["2"]
    assert text(b'a,b\n"1,5","x\ny"\n').table["b"].tolist() == ["x\ny"]
    bad = text(b"Key,b\n007,1\n2.02E+13,2.02E+13\n", keys=["Key"]).bad
    assert [(cell.row, cell.column, cell.kind) for cell in bad] == [(3, "Key", "rounded identifier")]
    assert len(text(b"Key,b\n007,1\n2.02E+13,2.02E+13\n", keys=None).bad) == 2
    assert "C1 is empty, but C2 is not" in message(text, b"a,b\n1,2,3\n")


def test_files_of_other_kinds(text, tmp_path):
    assert "has a password or is an old .xls" in message(text, b"\xd0\xcf\x11\xe0" + bytes(600), "s.xlsx")
    assert "cannot be read as an Excel file" in message(text, b"Key\n1\n", "s.xlsx")
    assert "must be one of '.xlsx'" in message(text, b"", "s.xls")
    assert "there is no file" in message(read_sheet, tmp_path / "none.csv")
    assert "no column names in row 1" in message(text, b"")


def test_addresses():
    assert [address(17, column) for column in (1, 2, 26, 27, 52, 703)] == ["A17", "B17", "Z17", "AA17", "AZ17", "AAA17"]
