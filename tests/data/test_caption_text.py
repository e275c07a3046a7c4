"""What is left of a text, which parts of a report are taken, and what is no caption."""

import pytest

from raymed.data.caption_text import captions_of, clean, fault, sections

REPORT = """EXAMINATION: CHEST (PA AND LAT)

INDICATION: Cough for two weeks.

FINDINGS:
Lungs: no consolidation.
Heart: normal in size.

IMPRESSION: No acute disease.
"""


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("  CT of\tthe \r\n chest \x00\x1f ", "CT of the chest"),
        ("pneu\u00admonia\u200b of the\u00a0left lobe\ufeff", "pneumonia of the left lobe"),
        ("Figure 3a. Axial CT shows a mass.", "Axial CT shows a mass."),
        ("Fig. 12: Axial CT shows a mass.", "Axial CT shows a mass."),
        ("Figure 4 \u2013 MR (1 day after): a wedge-shaped area", "MR (1 day after): a wedge-shaped area"),
        ("Figure B. Sagittal image of the aorta", "Sagittal image of the aorta"),
        ("Axial CT shows a mass (Figure 3a).", "Axial CT shows a mass."),
        ("A mass [see Fig. 2b, c] and (figs. 1 and 2) a cyst", "A mass and a cyst"),
        ("A cyst (Figures 1-3; 5)", "A cyst"),
        # What looks like a reference and is none, and what a caption needs.
        ("Figure 2 shows a 1.5 cm mass (2 cm before)", "Figure 2 shows a 1.5 cm mass (2 cm before)"),
        ("(Figure 2 shows the mass) <5 µm, 40°, ≥ 3", "(Figure 2 shows the mass) <5 µm, 40°, ≥ 3"),
        ("Figure a 3 cm cyst - or a mass", "Figure a 3 cm cyst - or a mass"),
        ("A stent (config 3), \u03b1-fetoprotein", "A stent (config 3), \u03b1-fetoprotein"),
    ],
)  # fmt: skip
def test_clean(text, cleaned):
    assert clean(text) == cleaned and clean(cleaned) == cleaned


def test_sections_by_their_headings():
    findings, impression = sections(REPORT, ("findings", "Impression"))
    assert clean(findings) == "Lungs: no consolidation. Heart: normal in size."
    assert clean(impression) == "No acute disease."
    assert [clean(text) for text in sections(REPORT, ("impression", "indication"))] == [
        "No acute disease.",
        "Cough for two weeks.",
    ]
    assert sections(REPORT, ("technique",)) == []


def test_sections_of_a_report_on_one_line():
    flat = "FINAL REPORT CLINICAL HISTORY: Fall. FINDINGS: CT: no fracture. My findings: none. IMPRESSION: Normal."
    assert [clean(text) for text in sections(flat, ("findings", "impression"))] == [
        "CT: no fracture. My findings: none.",
        "Normal.",
    ]


def test_two_sections_of_one_name_and_a_name_of_ones_own():
    text = "Findings: A nodule.\nAddendum: Seen again.\nFINDINGS: A cyst.\nHSG result: Both tubes patent."
    assert [clean(part) for part in sections(text, ("findings", "hsg result"))] == [
        "A nodule. A cyst.",
        "Both tubes patent.",
    ]


def test_a_text_without_headings_stays_whole():
    assert sections("No findings of note, heart: normal.", ("findings",)) == ["No findings of note, heart: normal."]


@pytest.mark.parametrize(
    ("caption", "kind"),
    [
        ("", "no caption"),
        ("... - !?", "no caption"),
        ("Tuberkulose \ufffd linker Oberlappen", "damaged caption"),
        ("IN PROGRESS", "caption under 20 characters"),
        ("x" * 19, "caption under 20 characters"),
        ("x" * 20, None),
        ("胸部レントゲン写真では右上葉に結節影を認める。", None),
    ],
)
def test_faults(caption, kind):
    found = fault(caption, 20)
    assert (found and found.kind) == kind


def test_captions_of_a_row():
    cells = ("A mass in the left breast.", "", "short", "A  mass in the left breast.", "A cyst in the right breast.")
    captions, faults = captions_of(cells, (), 20)
    assert captions == ("A mass in the left breast.", "A cyst in the right breast.")
    assert [found.kind for found in faults] == ["no caption", "caption under 20 characters"]
    assert captions_of((REPORT,), ("findings", "impression"), 10)[0] == (
        "Lungs: no consolidation. Heart: normal in size.",
        "No acute disease.",
    )
    nothing, faults = captions_of((REPORT,), ("technique",), 10)
    assert nothing == () and faults[0].text == "the report has none of the sections technique"
