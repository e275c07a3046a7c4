"""The report of a clinical evaluation: its tables, its pictures, and that it says only what it was given."""

import dataclasses

import clinical_example
import numpy as np
import pytest
from test_page import Page

from raymed.report.clinical_figures import Level
from raymed.report.clinical_page import ClinicalRecord, headline_table, write_clinical_page
from raymed.report.gallery import HEAT_MAP_SENTENCE, Case

PICTURES = ["calibration", "confusion", "decision_curve", "predictive_values", "roc_pr", "subgroups"]


@pytest.fixture(scope="module")
def record():
    return clinical_example.record(num_cards=2)


@pytest.fixture(scope="module")
def written(record, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("raymed.report.style.DPI", 60)
        return write_clinical_page(tmp_path_factory.mktemp("report"), record)


@pytest.fixture(scope="module")
def page(written):
    return Page(written.read_text())


def sections(page):
    return [value for tag, name, value in page.attributes if (tag, name) == ("h2", "id")]


def row(page, name, cells):
    return next(row for row in page.rows if row and row[0] == name and len(row) == cells)


def said(of):
    """With the wider interval."""
    low, high = min(of["ci_low"], of.get("analytic_low", np.inf)), max(of["ci_high"], of.get("analytic_high", -np.inf))
    return f"{of['mean']:.3f} {low:.3f} – {high:.3f}"


def bootstrapped(of):
    return f"{of['mean']:.3f} {of['ci_low']:.3f} – {of['ci_high']:.3f}"


def test_every_section_picture_and_file_is_there(written, page, record):
    assert sorted(path.stem for path in (written.parent / "figures").iterdir()) == PICTURES
    assert sections(page) == [
        "results-by-case", "predictive-values", "calibration", "decision-curve", "readers", "subgroups",
        "case-gallery", "cases-to-read-again", "model", "repeat", "notes",
    ]  # fmt: skip
    assert page.tags.count("article") == len(record.cases) > 6
    assert page.tags.count("img") == len(PICTURES) + 5 * len(record.cases)  # two views; one has no random map
    assert (written.parent / "cases_to_read_again.csv").read_bytes().startswith(b"\xef\xbb\xbfcase,")  # for Excel


def test_cases_stand_first_and_images_beside_them(page, record):
    cases, images = record.levels
    assert ["", "by case", "analytic interval", "by image"] in page.rows
    assert row(page, "evaluated", 4)[1:] == ["120 cases 108 patients", "", "240 images 108 patients"]
    positive = cases.num_positive
    assert row(page, "positive", 4)[1:] == [f"{n} {100 * positive / 120:.1f} %" for n in (positive,)] + [
        "", f"{2 * positive} {100 * positive / 120:.1f} %",
    ]  # fmt: skip
    of = cases.figures["sensitivity"]
    wilson = f"{of['analytic_low']:.3f} – {of['analytic_high']:.3f} Wilson"
    assert row(page, "sensitivity", 4)[1:] == [bootstrapped(of), wilson, bootstrapped(images.figures["sensitivity"])]
    assert row(page, "AUROC", 4)[1:] == [said(cases.figures["auroc"]), "", said(images.figures["auroc"])]
    fixed = "sensitivity_at_specificity_0.9"
    assert row(page, "sensitivity at specificity 0.9", 4)[1] == said(cases.figures[fixed])
    assert not any(r and r[0].startswith(("recall", "precision", "ppv at", "npv at")) for r in page.rows)


def test_the_glance_is_of_cases(page, record):
    of = record.levels[0].figures["specificity"]
    text = "specificity, 95 % CI " + said(of).partition(" ")[2].replace("–", "to")
    assert text in [t.replace("\N{NO-BREAK SPACE}", " ") for t in page.texts]


def test_prevalences_readers_calibration_and_subgroups_in_numbers(page, record):
    figures = record.levels[0].figures
    assert row(page, "5 %", 3)[1:] == [said(figures["ppv_at_0.05"]), said(figures["npv_at_0.05"])]
    reader = record.readers["판독의 A"]
    rates = [
        reader[against][metric] for against in ("reference", "others") for metric in ("sensitivity", "specificity")
    ]
    assert row(page, "판독의 A", 5)[1:] == [said(rate) for rate in rates]
    assert row(page, "model", 5)[1:] == [said(figures["sensitivity"]), said(figures["specificity"]), "", ""]
    assert row(page, "all readers", 3)[1] == said(record.agreement["all readers"]["kappa"])
    assert row(page, "after", 4)[1] == said(record.calibration["after"].figures["calibration_slope"])
    few = next(group for group in record.subgroups if group["too_few"])
    assert row(page, "Jeju site", 6)[1:3] == [str(few["num"]), str(few["num_positive"])]
    assert row(page, "Jeju site", 6)[3:] == ["too few"] * 3
    told = next(group for group in record.subgroups if group["group"] == "서울")
    assert row(page, "서울 site", 6)[3] == said(told["auroc"])


def test_heat_maps_are_never_without_the_sentence(written, record, tmp_path):
    sentence = "Heat maps show where the network looks, not where the disease is: they are no evidence of localisation."
    assert sentence == HEAT_MAP_SENTENCE and sentence in written.read_text()
    assert "Weight-randomisation check" in written.read_text()
    plain = ClinicalRecord("T", "d", "s", record.levels[:1], cases=[Case("C-1", True, 0.9)])
    html = write_clinical_page(tmp_path, plain).read_text()
    assert sentence not in html and "C-1" in html


def test_what_was_not_evaluated_has_no_section(record, tmp_path):
    path = write_clinical_page(tmp_path, ClinicalRecord("T", "79 cases.", "Found.", record.levels[:1]))
    page = Page(path.read_text())
    assert sections(page) == ["results-by-case", "predictive-values"]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["evaluation.html", "figures"]
    assert ["", "by case", "analytic interval"] in page.rows


def test_analytic_intervals_have_a_column_only_where_there_are_any(record):
    bare = {name: {k: of[k] for k in ("mean", "ci_low", "ci_high")} for name, of in record.levels[0].figures.items()}
    table = headline_table([dataclasses.replace(record.levels[0], figures=bare)])
    assert table.header == ["", "by case"] and all(len(row) == 2 for row in table.rows)


def test_undefined_and_infinite_figures_are_said(tmp_path):
    undefined = {"mean": None, "ci_low": float("nan"), "ci_high": None}
    infinite = {"mean": float("inf"), "ci_low": 3.2, "ci_high": float("inf")}
    scores, targets = np.array([0.9, 0.7, 0.1]), np.array([1, 1, 0])
    level = Level("case", scores, targets, 0.5, {"npv": undefined, "lr_positive": infinite, "auroc": undefined})
    page = Page(write_clinical_page(tmp_path, ClinicalRecord("T", "d", "s", [level])).read_text())
    assert row(page, "NPV", 2)[1] == "n/a n/a – n/a"
    assert row(page, "LR+", 2)[1] == "inf 3.200 – inf"


def test_one_class_alone_is_no_error(tmp_path):
    level = Level("case", np.array([0.9, 0.7, 0.1]), np.array([0, 0, 0]), 0.5, {})
    page = Page(write_clinical_page(tmp_path, ClinicalRecord("T", "d", "s", [level])).read_text())
    assert "Curves and predictive values need cases of both classes." in page.texts
    assert sections(page) == ["results-by-case"] and page.tags.count("img") == 1  # the confusion matrix
