"""The publication pack as a whole: files, figures at their widths with Hangul, checklists, and what is left to fill."""

import importlib.util
import json
import re
import warnings
import zlib
from contextlib import contextmanager

import pytest
from paper_example import STUDY, group, record

from raymed.config import to_json
from raymed.report.paper import Curves, Flow, PaperRecord, Study, figures, paper_pack
from raymed.report.paper.canvas import MM, TWO_COLUMNS, journal_figure
from raymed.report.paper.flow import arrange
from raymed.report.paper.guidelines import CLAIM, TRIPOD_AI
from raymed.report.paper.methods import methods, sections
from raymed.report.paper.tables import tables_of
from raymed.report.paper.word import BLANK, write_text
from raymed.report.style import font_families

EXTERNAL = {"external": record().cohort["test"]}
WITHOUT_FIGURES = {"curves": Curves(), "subgroups": (), "flow": None, "cohort": {}}
FIGURES = {"flow": 183, "discrimination": 183, "calibration": 89, "decision_curve": 89, "subgroups": 183}


@pytest.fixture(scope="module")
def pack(tmp_path_factory):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Glyph")  # a character that no font has
        return paper_pack(record(), tmp_path_factory.mktemp("paper"))


def test_files(pack):
    tables = [table.name for table in tables_of(record())]
    expected = {"record.json", "methods.md", "methods.docx", "methods.ko.md", "methods.ko.docx", "tables.docx"}
    expected |= {"checklists.docx", "checklist_tripod_ai.csv", "checklist_claim.csv"}
    expected |= {f"{name}.{ending}" for name in tables for ending in ("csv", "tex")}
    expected |= {f"figure_{name}.{ending}" for name in FIGURES for ending in ("pdf", "svg")}
    assert {path.name for path in pack.folder.iterdir()} == expected == {path.name for path in pack.files}
    assert pack.blanks == []


def test_the_record_is_written_in_full(pack):
    assert json.loads((pack.folder / "record.json").read_text()) == json.loads(to_json(record()))


@pytest.mark.parametrize(("name", "width"), FIGURES.items())
def test_figures_have_the_width_of_a_journal(pack, name, width):
    svg = (pack.folder / f"figure_{name}.svg").read_text()
    pdf = (pack.folder / f"figure_{name}.pdf").read_bytes()
    points = float(re.search(r'<svg[^>]* width="([\d.]+)pt"', svg)[1])
    box = re.search(rb"/MediaBox \[ ?0 0 ([\d.]+) ([\d.]+) ?\]", pdf)
    assert points * 25.4 / 72 == pytest.approx(width, abs=0.05)
    assert float(box[1]) * 25.4 / 72 == pytest.approx(width, abs=0.05)


def drawn_text(pack, name):
    """Texts of a figure: its outlines carry them as comments."""
    svg = (pack.folder / f"figure_{name}.svg").read_text()
    return [text.replace("\u00a0", " ") for text in re.findall(r"<!-- (.*?) -->", svg)]


def test_the_flow_tells_every_count(pack):
    told = drawn_text(pack, "flow")
    whole = " ".join(told)
    for count in (437, 27, 12, 9, 6, 410, 66, 17, 20, 198, 50, 59, 18 + 8, 2 + 51, 18, 8, 2, 51):
        assert f"(n = {count})" in whole
    assert "77 patients, 79 cases, 158 images" in told and "389 patients, 820 images" in told


@pytest.mark.parametrize(
    "target", [None, "WWW MMM occlusion of a tube with a very long name", "난관 폐쇄 및 협착 의심 소견"]
)
def test_the_flow_keeps_texts_in_their_boxes(target):
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    reasons = {"WIDE REASON IN CAPITALS WITH MANY MANY WORDS": 12, "조영제가 주입되기 전에 촬영된 영상": 15}
    drawing = arrange(
        record(study=Study(target=target), flow=Flow("case", 437, reasons, 410), cohort=record().cohort | EXTERNAL)
    )
    with matplotlib.rc_context({"font.family": list(font_families())}):
        page = Figure(figsize=(TWO_COLUMNS * MM, drawing.height * MM))
        axes = page.add_axes((0, 0, 1, 1))
        drawing.draw(axes)
        frames = [patch.get_window_extent() for patch in axes.patches if isinstance(patch, Rectangle)]
        assert all(page.bbox.x0 <= f.x0 and f.x1 <= page.bbox.x1 and page.bbox.y0 <= f.y0 for f in frames)
        assert not any(f.overlaps(g) for i, f in enumerate(frames) for g in frames[:i])
        for text in (text for text in axes.texts if text.get_text()):
            extent = text.get_window_extent()
            assert any(f.x0 < extent.x0 and extent.x1 < f.x1 and f.y0 < extent.y0 and extent.y1 < f.y1 for f in frames)


def test_legends_stand_below_the_curves_and_within_the_page(tmp_path, monkeypatch):
    drawn = []

    @contextmanager
    def kept(*arguments):
        with journal_figure(*arguments) as page:
            yield page
            page.draw_without_rendering()
            drawn.append([(axes.bbox.frozen(), axes.get_legend().get_window_extent()) for axes in page.axes])
            drawn.append(page.bbox)

    line = record().curves.roc["Case"]
    names = ["Case", "Image", "External test, case", "External test, image"]
    readers = {f"reader{number}": record().readers["판독의 1"] for number in range(3)}
    curves = Curves(dict.fromkeys(names, line), dict.fromkeys(names, line))
    monkeypatch.setattr(figures, "journal_figure", kept)
    figures.draw_figures(tmp_path, PaperRecord(curves=curves, readers=readers))
    panels, page = drawn
    assert len(panels) == 2
    for axes, legend in panels:
        assert legend.y1 < axes.y0 and legend.y0 >= page.y0 and legend.x1 <= page.x1


def test_curves_and_subgroups_tell_their_figures(pack):
    assert "Case: AUROC 0.912 (0.882 to 0.942)" in drawn_text(pack, "discrimination")
    assert {"판독의 1", "Operating point"} <= set(drawn_text(pack, "discrimination"))
    assert {"서울", "71 (18)", "8 (2)", "too few"} <= set(drawn_text(pack, "subgroups"))


@pytest.mark.skipif(importlib.util.find_spec("koreanize_matplotlib") is None, reason="no font with Hangul is installed")
def test_hangul_is_embedded_in_the_pdf(pack):
    pdf = (pack.folder / "figure_flow.pdf").read_bytes()
    assert b"+NanumGothic" in pdf and b"/FontFile2" in pdf and b"/Type3" not in pdf
    streams = re.findall(rb"stream\r?\n(.*?)\r?\nendstream", pdf, re.DOTALL)
    mapped = b"".join(zlib.decompress(stream) for stream in streams if stream[:1] == b"x")
    assert all(f"{ord(character):04X}".encode() in mapped.upper() for character in "폐쇄조영제")


def test_equal_records_give_equal_files(pack, tmp_path):
    again = paper_pack(record(), tmp_path)
    for path in again.files:
        if path.suffix != ".docx":  # a zip archive holds the time at which it was written
            assert path.read_bytes() == (pack.folder / path.name).read_bytes()


def test_an_empty_record(tmp_path):
    pack = paper_pack(PaperRecord(), tmp_path)
    assert {path.suffix for path in pack.files} == {".md", ".docx", ".json", ".csv"}
    assert len(pack.blanks) >= 40 and "number of parameters" in pack.blanks


def test_an_older_pack_is_replaced(pack, tmp_path):
    line = record().curves.calibration
    paper_pack(record(**(WITHOUT_FIGURES | {"curves": Curves(calibration=line)})), tmp_path)
    (tmp_path / "draft.docx").write_bytes(b"the author's own")
    assert {"table_readers.csv", "figure_calibration.pdf"} <= {path.name for path in tmp_path.iterdir()}
    later = paper_pack(record(**WITHOUT_FIGURES, readers={}), tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {path.name for path in later.files} | {"draft.docx"}
    assert not {"table_readers.csv", "figure_calibration.pdf"} & names and "table_performance.csv" in names


@pytest.mark.parametrize("language", ["en", "ko"])
def test_word_has_the_text_of_the_markdown(tmp_path, language):
    from docx import Document
    from docx.enum.text import WD_COLOR_INDEX

    markdown = methods(record(study=Study(design="retrospective")), language)
    write_text(tmp_path / "methods.docx", markdown)
    paragraphs = Document(str(tmp_path / "methods.docx")).paragraphs
    told = [re.sub(r"^(#+|-) ", "", line) for line in markdown.splitlines() if line]
    assert [paragraph.text for paragraph in paragraphs] == told
    marked = [r.text for p in paragraphs for r in p.runs if r.font.highlight_color == WD_COLOR_INDEX.YELLOW]
    assert marked == BLANK.findall(markdown) and len(marked) > 10


def test_checklists_hold_every_item():
    assert [item.number for item in CLAIM] == [str(n) for n in range(1, 45)]
    numbers = [item.number for item in TRIPOD_AI]
    assert list(dict.fromkeys(re.match(r"\d+", n)[0] for n in numbers)) == [str(n) for n in range(1, 28)]
    letters = {n: sum(1 for m in numbers if re.fullmatch(rf"{n}[a-z]", m)) for n in range(1, 28)}
    assert {n: k for n, k in letters.items() if k} == {
        3: 3, 5: 2, 6: 3, 8: 3, 9: 3, 12: 7, 18: 6, 20: 3, 23: 2, 27: 3,
    }  # fmt: skip
    assert len(numbers) == 52


def test_every_place_of_a_checklist_exists(pack):
    written = {f"Methods: {heading}" for heading in sections(methods(record(cohort=record().cohort | EXTERNAL), "en"))}
    written |= {path.stem for path in pack.files}
    assert {place for item in (*TRIPOD_AI, *CLAIM) for place in item.places} <= written


def checklist(folder, name):
    import csv

    with (folder / f"checklist_{name}.csv").open(encoding="utf-8-sig", newline="") as file:
        return {row["Item"]: row for row in csv.DictReader(file)}


def test_a_missing_fact_is_left_to_the_authors(pack, tmp_path):
    full = checklist(pack.folder, "claim")
    assert full["44"]["Where it is answered"] == "Methods: Other information"
    assert full["44"]["Left to the authors"] == "" and full["40"]["Left to the authors"] == "[TO FILL: limitations]"
    paper_pack(record(**WITHOUT_FIGURES, study=Study(**(STUDY | {"funding": None}))), tmp_path)
    claim, tripod = (checklist(tmp_path, name) for name in ("claim", "tripod_ai"))
    for row in (claim["44"], tripod["18a"]):
        assert (row["Where it is answered"], row["Left to the authors"]) == ("", "[TO FILL: funding]")
    assert claim["43"]["Left to the authors"] == ""


def test_an_external_test_set_answers_its_item(pack, tmp_path):
    cohort = record().cohort | {"external": group(52, 57, 113, 19)}
    paper_pack(record(**WITHOUT_FIGURES | {"cohort": cohort}), tmp_path)
    asked, answered = (checklist(folder, "claim")["33"] for folder in (pack.folder, tmp_path))
    assert (
        asked["Where it is answered"] == "" and "external data, or that there was none" in asked["Left to the authors"]
    )
    assert answered["Where it is answered"] == "Methods: External test set" and not answered["Left to the authors"]
    english, korean = ((tmp_path / name).read_text() for name in ("methods.md", "methods.ko.md"))
    assert "on 52 patients, 57 cases and 113 images from elsewhere (19 cases positive)." in english
    assert "외부 자료에서도 시험하였다(환자 52명, 증례 57건, 영상 113장; 양성 19건)" in korean


def test_of_nothing_nothing_is_answered_but_the_aim(tmp_path):
    paper_pack(PaperRecord(), tmp_path)
    for name in ("claim", "tripod_ai"):
        for row in checklist(tmp_path, name).values():
            places = [place for place in row["Where it is answered"].split("; ") if place]
            assert all(place.endswith("(has blanks)") for place in places), row
