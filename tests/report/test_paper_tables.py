"""Cohort and tables of a paper, read back from CSV, LaTeX and Word."""

import csv
import io
import re

import pandas as pd
import pytest
from paper_example import figure, record

from raymed.config import UserError
from raymed.report.paper import Flow, PaperRecord, Subgroup, cohort_of
from raymed.report.paper.table import Estimate, PaperTable, Row, Share, escaped, printed, to_csv, to_latex
from raymed.report.paper.tables import label, tables_of
from raymed.report.paper.word import write_tables

IMAGES = pd.DataFrame(
    [
        # patient, case, side, label, split, site, age, year
        ("P1", "C1", "left", "open", "train", "서울", "31", "2019"),
        ("P1", "C1", "left", "open", "train", "서울", "31", "2019"),
        ("P1", "C2", "left", "closed", "train", "", "33", "2021"),
        ("P2", "C3", "left", "open", "test", "Busan", "", "2022"),
        ("P2", "C3", "right", "open", "test", "서울", "", "2022"),
        ("P3", "C4", "right", "open", "train", "서울", "41", ""),
    ],
    columns=["patient", "case", "side", "label", "split", "site", "age", "year"],
)


def test_cohort_by_case():
    cohort = cohort_of(IMAGES)
    assert list(cohort) == ["all", "train", "test"]
    whole, train, test = cohort.values()
    assert whole.counts == {"patients": 3, "cases": 4, "images": 6} and whole.units == 4
    assert whole.classes == {"open": 3, "closed": 1} and train.classes == {"open": 2, "closed": 1}
    assert whole.categories["site"] == {"서울": 2, "Busan": 1, "": 1}
    assert whole.quantities["age"].num == 3 and whole.quantities["age"].mean == 35
    assert whole.quantities["age"].std == pytest.approx(28**0.5)  # 31, 33, 41
    assert (whole.quantities["age"].low, whole.quantities["age"].high) == (31, 41)
    assert (whole.years, train.years, test.years) == ((2019, 2022), (2019, 2021), (2022, 2022))
    assert "age" not in test.quantities


def test_cohort_by_other_units():
    assert cohort_of(IMAGES, "image")["all"].classes == {"open": 5, "closed": 1}
    assert cohort_of(IMAGES, "side")["all"].units == 5
    unnamed = cohort_of(IMAGES[["label", "split"]], "image")["test"]
    assert unnamed.counts == {"images": 2} and unnamed.years is None


def test_parts_sum_to_the_whole():
    cohort = cohort_of(IMAGES)
    for count in ("patients", "cases", "images"):
        assert cohort["all"].counts[count] == cohort["train"].counts[count] + cohort["test"].counts[count]


def test_cohort_refuses():
    with pytest.raises(UserError, match="patient whose images have several values of 'label': rows 1, 2, 3"):
        cohort_of(IMAGES, "patient")
    with pytest.raises(UserError, match="needs the column 'case'"):
        cohort_of(IMAGES.drop(columns="case"))
    with pytest.raises(UserError, match="unit must be one of"):
        cohort_of(IMAGES, "exam")
    with pytest.raises(UserError, match="several values of 'split'"):
        cohort_of(IMAGES.assign(split=["train", "test", "train", "test", "test", "train"]))


def test_flow_must_add_up():
    flow = Flow.of("case", [("found", 20), ("no label", 3), ("CT", 1)])
    assert (flow.assessed, flow.included, flow.excluded) == (20, 16, {"no label": 3, "CT": 1})
    with pytest.raises(UserError, match="are 16, but 17"):
        Flow("case", 20, {"no label": 4}, 17)


def tables():
    return {table.name: table for table in tables_of(record())}


def from_csv(text):
    assert text.startswith("\ufeff")
    header, *rows = csv.reader(io.StringIO(text.removeprefix("\ufeff")))
    assert len(set(header)) == len(header) and all(len(row) == len(header) for row in rows)
    return [dict(zip(header, row, strict=True)) for row in rows]


def from_latex(text):
    """Rows of cells as a reader sees them."""
    body = text.split(r"\midrule")[1].split(r"\bottomrule")[0]
    seen = {
        r"\%": "%",
        r"\&": "&",
        r"\_": "_",
        r"\#": "#",
        r"$\pm$": "±",
        "--": "–",
        r"\textless{}": "<",
        r"\quad ": "",
    }
    rows = []
    for line in body.strip().splitlines():
        assert line.endswith(r" \\")
        cells = re.split(r"(?<!\\) & |^ & ", line.removesuffix(r" \\"))
        for code, character in seen.items():
            cells = [cell.replace(code, character) for cell in cells]
        rows.append(cells)
    return rows


def test_csv_has_every_number_in_full():
    case, image = "Case", "Image"
    rows = {row[""]: row for row in from_csv(to_csv(tables()["table_performance"]))}
    assert float(rows["AUROC"][case]) == 0.9123 and float(rows["AUROC"]["Case CI low"]) == 0.9123 - 0.03
    assert rows["Specificity"][image] == rows["Specificity"]["Image CI high"] == ""
    cohort = {(row["group"], row[""]): row for row in from_csv(to_csv(tables()["table_cohort"]))}
    positive = cohort["Reference standard", "폐쇄"]
    assert positive["Internal test"] == "20" and float(positive["Internal test %"]) == pytest.approx(100 * 20 / 79)
    assert float(cohort["", "Age (years)"]["Training SD"]) == 4.125
    assert cohort["", "Age (years): not recorded"]["All"] == "3"


@pytest.mark.parametrize("name", list(tables()))
def test_latex_says_what_is_printed(name):
    table = tables()[name]
    text = to_latex(table)
    rows = [row for row in from_latex(text) if not row[0].startswith(r"\multicolumn")]
    assert rows == [[row.name, *map(printed, row.cells)] for row in table.rows]
    assert text.count("{") == text.count("}") and rf"\label{{tab:{name.removeprefix('table_')}}}" in text
    assert text.count(r"\toprule") == text.count(r"\midrule") == text.count(r"\bottomrule") == 1
    assert ("kotex" in text) == bool(re.search("[가-힣]", text.split("\n", 1)[1]))


def test_latex_escapes():
    assert escaped(r"50 % & #1_a {x} ~ ^ < \ $") == (
        r"50 \% \& \#1\_a \{x\} \textasciitilde{} \textasciicircum{} \textless{} \textbackslash{} \$"
    )


def test_word_says_what_is_printed(tmp_path):
    from docx import Document

    made = tables_of(record())
    write_tables(tmp_path / "tables.docx", made)
    document = Document(str(tmp_path / "tables.docx"))
    assert len(document.tables) == len(made)
    for grid, table in zip(document.tables, made, strict=True):
        header, *rows = [[cell.text for cell in row.cells] for row in grid.rows]
        assert header == list(table.columns)
        groups = {row.group for row in table.rows if row.group}
        lines = [row for row in rows if not (row[0] in groups and not any(row[1:]))]
        assert lines == [[row.name, *map(printed, row.cells)] for row in table.rows]
        assert len(rows) - len(lines) == len(groups)
        assert all(width.mm > 8 for width in (column.width for column in grid.columns))
        assert sum(column.width.mm for column in grid.columns) == pytest.approx(170, abs=0.1)
        assert table.title in [paragraph.text for paragraph in document.paragraphs]


def test_word_sets_hangul_in_a_korean_font(tmp_path):
    from docx import Document
    from docx.oxml.ns import qn

    write_tables(tmp_path / "t.docx", [PaperTable("t", "표", ["", "값"], [Row("서울", [1])])])
    run = Document(str(tmp_path / "t.docx")).tables[0].cell(1, 0).paragraphs[0].runs[0]
    assert run.text == "서울" and run._element.rPr.rFonts.get(qn("w:eastAsia")) == "Malgun Gothic"


def test_cells():
    assert str(Estimate(figure(0.9123))) == "0.912 (0.882 to 0.942)"
    assert str(Estimate({"mean": 11.25, "ci_low": 5.5, "ci_high": 24.25})) == "11.2 (5.500 to 24.2)"
    assert str(Estimate({"mean": float("nan"), "ci_low": None, "ci_high": None})) == "n/a"
    assert str(Share(20, 79)) == "20 (25.3 %)" and str(Share(0, 0)) == "0"


def test_too_few_has_no_number():
    rows = {row.name: row.cells for row in tables()["table_subgroups"].rows}
    assert [printed(cell) for cell in rows["A & B_1"]] == ["8", "2", "too few", "too few"]
    assert printed(rows["서울"][2]) == "0.910 (0.880 to 0.940)"
    nothing = record(subgroups=[Subgroup("site", "A", 4, 1)])
    assert [t.columns for t in tables_of(nothing) if t.name == "table_subgroups"] == [["Subgroup", "Cases", "Positive"]]


def test_what_is_not_known_has_no_table():
    assert tables_of(PaperRecord()) == []
    names = {table.name for table in tables_of(record(flow=None, readers={}, comparison={}))}
    assert names == set(tables()) - {"table_flow", "table_readers", "table_comparison"}


def test_the_positive_class_stands_first():
    rows = [row.name for row in tables()["table_cohort"].rows if row.group == "Reference standard"]
    assert rows == ["폐쇄", "patent"]


def test_labels():
    assert label("ppv_at_0.05") == "PPV at a prevalence of 0.05"
    assert label("sensitivity_at_specificity_0.9") == "Sensitivity at a specificity of 0.9"
    assert label("accuracy_at_0.5") == "Accuracy at a threshold of 0.5"
    assert label("hit_rate") == "Hit rate"
