"""The clinical page of a cross-validation: it tells decisions as they fell, and finds what is planted in the labels.

Labels are changed after the training: the networks and their scores stay what they are.
"""

import base64
import csv
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import brier_score_loss, confusion_matrix, roc_auc_score
from small import OPTIM, load_data, recipe, write_images
from test_page import Page

from raymed.bundle import Bundle
from raymed.config import replace as changed
from raymed.data.folds import CrossValidation
from raymed.data.preprocess import Preprocess
from raymed.explain.gradcam import grad_cam
from raymed.metrics.operating import wilson
from raymed.report.clinical_page import write_clinical_page
from raymed.results.fold_page import fold_record, write_fold_evaluation
from raymed.results.folds import fold_figures, out_of_fold
from raymed.results.paper_facts import read_facts
from raymed.tasks.classifier import ClassifierRecipe
from raymed.tasks.predictor import Predictor
from raymed.train.compute import Compute
from raymed.train.runs.job import RunConfig, open_job
from raymed.train.unit import train_unit, unit_data

CASES, FOLDS, REPEATS = 48, 2, 3
NOISE = {0, 8, 17, 21, 30, 33}
"""Cases whose label is the other one from the start, so that not every decision is right."""
POSITIVES = 14


@dataclass(frozen=True)
class Config:
    """Of a job."""

    recipe: ClassifierRecipe
    compute: Compute = Compute()
    run: RunConfig = RunConfig()


def pseudonym(case: int) -> str:
    return "C-" + base64.b32encode(case.to_bytes(5, "big")).decode()


def write_manifest(manifest: Path, name: str, flipped: set[int], case=pseudonym) -> Path:
    """Beside the given one, with cases and sites, and the labels of some cases the other way round."""
    table = pd.read_csv(manifest, dtype=str)
    cases = np.arange(len(table)) // 2
    other = {"patch": "plain", "plain": "patch"}
    labels = [other[y] if c in flipped else y for c, y in zip(cases, table["label"], strict=True)]
    more = {"label": labels, "case": list(map(case, cases.tolist())), "site": np.where(cases % 2, "서울", "Busan")}
    table.assign(**more).to_csv(manifest.with_name(name), index=False)
    return manifest.with_name(name)


@pytest.fixture(autouse=True)
def coarse(monkeypatch):
    monkeypatch.setattr("raymed.report.style.DPI", 60)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a manifest, and a finished cross-validation of it: (manifest, config, units)."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("folds")
    manifest = write_manifest(write_images(folder, CASES), "cases.csv", NOISE)
    given = {"single.steps": 20, "single.accumulate": 1, "single.optim": changed(OPTIM, {"lr": 1e-2})}
    settled = changed(recipe(manifest, method="ce", data__preprocess=Preprocess(size=32)), given)
    # An MLflow that does not answer: nothing waits for it.
    config = Config(settled, run=RunConfig(name="cv", storage=str(folder / "storage"), tracking="http://127.0.0.1:9"))
    with open_job("any", config) as job:
        units = [replace(job.unit(fold.name, 3), fold=fold) for fold in CrossValidation(FOLDS, REPEATS).trainings()]
        for unit in units:
            train_unit(unit)
    yield manifest, config, units
    torch.set_num_threads(before)


def found(units, images: bool = False, n_boot: int = 50, **more: Any):
    """(repeats, record) of units."""
    repeats = out_of_fold(units)
    beside = out_of_fold(units, "image") if images else ()
    data = load_data(units[0].recipe)
    return repeats, fold_record(units, repeats, data, beside, title="t", n_boot=n_boot, **more)


def relabelled(place, name: str, flipped: set[int]):
    """The units, had these cases had the other label than that of their picture."""
    manifest, _, units = place
    path = write_manifest(manifest.with_name("manifest.csv"), name, flipped)
    return [replace(unit, recipe=changed(unit.recipe, {"data.manifest": str(path)})) for unit in units]


@pytest.fixture(scope="module")
def told(place):
    return found(place[2], images=True, n_boot=2000, pictures=True)


@pytest.fixture(scope="module")
def median(told):
    """The number of the repeat that is shown."""
    auprc = [fold_figures([repeat])["auprc"]["mean"] for repeat in told[0]]
    assert len(set(auprc)) == REPEATS
    return auprc.index(sorted(auprc)[1])


def test_decisions_are_those_that_fell_and_not_those_of_one_threshold(told, median):
    repeats, record = told
    shown, level = repeats[median], record.levels[0]
    assert record.shown == f"repeat {median + 1} of 3, whose AUPRC is the median"
    assert np.array_equal(level.decided, shown.decided) and np.array_equal(level.scores, shown.scores)
    assert np.isnan(level.threshold) and len(np.unique(level.thresholds)) == FOLDS
    one = [shown.scores >= t for t in shown.thresholds]
    assert not any(np.array_equal(shown.decided, of) for of in one)


def test_the_table_tells_means_as_the_run_does(told, median):
    repeats, record = told
    figures, run = record.levels[0].figures, fold_figures(repeats)
    for name in ("auroc", "auprc", "sensitivity", "specificity", "ppv", "npv", "accuracy"):
        assert {k: figures[name][k] for k in run[name]} == run[name], name
    assert figures["brier"]["mean"] == pytest.approx(
        np.mean([brier_score_loss(repeat.targets, repeat.calibrated) for repeat in repeats])
    )
    found = [repeat.decided[repeat.targets == 1].sum() for repeat in repeats]
    of = figures["sensitivity"]
    assert (of["count"], of["total"]) == (pytest.approx(np.mean(found)), POSITIVES)
    assert (of["analytic_low"], of["analytic_high"]) == pytest.approx(wilson(np.mean(found), POSITIVES))  # type: ignore[arg-type]
    assert record.sentence.startswith(f"On average over the repeats, {np.mean(found):.1f}".removesuffix(".0") + " of")


def test_curves_counts_and_figures_of_the_repeat_agree(told, median):
    repeats, record = told
    shown, own = repeats[median], record.levels[0].own
    (tn, fp), (fn, tp) = confusion_matrix(shown.targets, shown.decided)
    assert own["sensitivity"]["mean"] == tp / (tp + fn) and own["specificity"]["mean"] == tn / (tn + fp)
    assert (own["ppv"]["count"], own["ppv"]["total"]) == (tp, tp + fp)
    assert own["f1"]["mean"] == pytest.approx(2 * tp / (2 * tp + fp + fn))
    assert own["auroc"]["mean"] == pytest.approx(roc_auc_score(shown.targets, shown.scores))
    assert np.array_equal(record.calibration["after calibration"].scores, shown.calibrated)
    sites = {group["group"]: group for group in record.subgroups}
    assert sites["서울"]["num"] + sites["Busan"]["num"] == CASES
    images = record.levels[1]
    assert images.num_repeats == REPEATS and len(images.scores) == 2 * CASES


def test_subgroups_are_decided_by_the_same_thresholds(place):
    """With enough positives in each."""
    units = relabelled(place, "many.csv", set(range(1, CASES, 4)))
    repeats, record = found(units)
    shown = next(r for r in repeats if np.array_equal(r.scores, record.levels[0].scores))
    for group, odd in (("Busan", 0), ("서울", 1)):
        (of,) = (g for g in record.subgroups if g["group"] == group)
        inside = (shown.units % 2 == odd) & (shown.targets == 1)
        assert of["sensitivity"]["mean"] == pytest.approx(shown.decided[inside].mean())
        both = shown.units % 2 == odd
        assert of["auroc"]["mean"] == pytest.approx(roc_auc_score(shown.targets[both], shown.scores[both]))


def test_the_gallery_has_each_case_by_the_network_of_its_fold(place, told, median):
    _, _, units = place
    repeats, record = told
    shown, data = repeats[median], load_data(units[0].recipe)
    number = {pseudonym(case): case for case in range(CASES)}
    of_repeat = units[FOLDS * median : FOLDS * (median + 1)]
    networks = [Predictor.from_bundle(Bundle.load(unit.folder / "bundle")) for unit in of_repeat]
    for case in record.cases:
        unit = number[case.name]
        assert case.threshold == shown.thresholds[shown.fold[unit]] and case.score == shown.scores[unit]
        assert (case.score >= case.threshold) == shown.decided[unit] and case.positive == shown.targets[unit]
        assert len(case.views) == 2
    picked = [next(c for c in record.cases if shown.fold[number[c.name]] == fold) for fold in range(FOLDS)]
    for fold, case in enumerate(picked):
        where = np.array([2 * number[case.name]])
        maps = [_map(network, data, where) for network in networks]
        np.testing.assert_allclose(case.views[0].heat_map, maps[fold], atol=1e-4)
        assert np.abs(maps[1 - fold] - maps[fold]).max() > 1e-2
    wrong = shown.decided != (shown.targets == 1)
    assert sum(wrong[number[case.name]] for case in record.cases) == sum(
        min(12, n) for n in ((wrong & shown.decided).sum(), (wrong & ~shown.decided).sum())
    )


def _map(predictor, data, where):
    given = predictor.preprocess.normalise(data.batch(where).unit_image())
    return grad_cam(predictor.network.encoder, predictor.network.head, given)[0].numpy()


def test_a_fold_is_calibrated_without_its_own_labels(place):
    """Labels of cases that the other network of the repeat had trained on, and not chosen anything by."""
    _, _, units = place
    before = out_of_fold(units)
    first, data = before[0].fold == 0, unit_data(units[1])
    trained_on = set(np.unique(data.cases[data.splits["train"]]).tolist())
    assert trained_on < set(np.flatnonzero(first).tolist()) and len(trained_on) > 12
    after, record = found(relabelled(place, "calibration.csv", NOISE ^ set(sorted(trained_on)[::3])))
    assert (before[0].targets != after[0].targets).sum() > 4 and np.array_equal(before[0].fold, after[0].fold)
    assert np.array_equal(before[0].calibrated[first], after[0].calibrated[first])
    assert not np.array_equal(before[0].calibrated[~first], after[0].calibrated[~first])
    told = record.calibration["after calibration"].scores
    assert any(np.array_equal(repeat.calibrated, told) for repeat in after)


def test_a_case_with_a_wrong_label_is_to_be_read_again(place, tmp_path):
    """A case that all repeats had decided rightly, most surely of all."""
    repeats = out_of_fold(place[2])
    right = np.all([r.decided & (r.targets == 1) for r in repeats], axis=0)
    mean = np.mean([r.scores for r in repeats], axis=0)
    planted = int(np.argmax(np.where(right, mean, -1)))
    assert right[planted]
    assert pseudonym(planted) not in [doubt.name for doubt in found(place[2])[1].read_again]

    _, record = found(relabelled(place, "wrong.csv", NOISE ^ {planted}))
    (doubt,) = (d for d in record.read_again if d.name == pseudonym(planted))
    assert (doubt.label, doubt.wrong, doubt.repeats, doubt.num_images) == ("plain", REPEATS, REPEATS, 2)
    assert doubt.score == pytest.approx(mean[planted])
    write_clinical_page(tmp_path, record)
    with (tmp_path / "cases_to_read_again.csv").open(encoding="utf-8-sig") as file:
        rows = list(csv.DictReader(file))
    assert {"case": pseudonym(planted), "num_images": "2", "reading": "", "comment": ""} in rows
    assert [row["case"] for row in rows] == sorted(doubt.name for doubt in record.read_again)


def test_what_may_be_an_identifier_is_not_told(place, tmp_path):
    manifest, _, units = place
    path = write_manifest(manifest.with_name("manifest.csv"), "names.csv", NOISE, lambda case: f"Kim-{case:04d}")
    named = [replace(unit, recipe=changed(unit.recipe, {"data.manifest": str(path)})) for unit in units]
    _, record = found(named)
    assert record.read_again and all(doubt.name.startswith("case of rows ") for doubt in record.read_again)
    write_clinical_page(tmp_path, record)
    assert not any("Kim-" in file.read_text("utf-8-sig") for file in tmp_path.iterdir() if file.is_file())


def test_the_page_says_what_is_mean_and_what_one_repeat(told, tmp_path):
    _, record = told
    page = Page(write_clinical_page(tmp_path, record).read_text())
    header = ["", "by case, mean of 3 repeats", "analytic interval", "the repeat shown", "by image, mean of 3 repeats"]
    assert header in page.rows
    row = next(row for row in page.rows if row and row[0] == "AUROC")
    level = record.levels[0]
    for cell, of in ((row[1], level.figures["auroc"]), (row[3], level.own["auroc"])):
        assert cell == f"{of['mean']:.3f} {of['ci_low']:.3f} – {of['ci_high']:.3f}"
    captions = [text for text in page.texts if f"Of {record.shown}." in text]
    assert len(captions) == 6  # ROC, counts, predictive values, calibration, decision curve, subgroups


def test_one_repeat_is_no_mean(place):
    _, record = found(place[2][:FOLDS])
    level = record.levels[0]
    assert not record.shown and not level.own and level.num_repeats == 1
    assert not record.sentence.startswith("On average") and level.figures["sensitivity"]["total"] == POSITIVES
    assert record.data == "Cross-validation, 2 folds, 1 repeat: 48 cases (96 images) of 48 patients."


def test_page_and_facts_of_a_job_and_pictures_only_where_they_may_be_shown(place):
    _, config, units = place
    repeats = out_of_fold(units)
    with open_job("any", config) as job:
        page = write_fold_evaluation(job, units, repeats)
        shut = replace(job, recipe=changed(job.recipe, {"data.deidentified": False}))
        logged = [r for r in job.outbox.records() if r["op"] == "artifact"]
        assert page == job.folder / "evaluation" / "evaluation.html" and "data:image/jpeg" in page.read_text()
        assert any("evaluation.html" in str(record) for record in logged)
        facts, key = read_facts(job.folder)
        c = facts["confusion"]
        table = [(r.targets, r.decided) for r in repeats]
        assert key == job.key and any(
            np.array_equal(confusion_matrix(*of), [[c.tn, c.fp], [c.fn, c.tp]]) for of in table
        )
        assert facts["operating_point"].threshold is None
        assert facts["operating_point"].chosen_on == "the out-of-fold scores of the other folds"
        assert facts["performance"]["Case"]["auroc"]["mean"] == fold_figures(repeats)["auroc"]["mean"]

        closed = [replace(unit, recipe=shut.recipe) for unit in units]
        page = write_fold_evaluation(shut, closed, repeats)
        assert page and "data:image/jpeg" not in page.read_text()
        assert [r for r in job.outbox.records() if r["op"] == "artifact"] == logged


def test_an_unfinished_cross_validation_has_no_page(place, tmp_path):
    _, config, units = place
    with open_job("any", config) as job:
        assert write_fold_evaluation(job, [*units[:-1], replace(units[-1], folder=tmp_path / "none")], []) is None
