"""Cross-validation: every case is scored once a repeat, by networks that have not seen its patient."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.special import expit
from sklearn.metrics import roc_auc_score
from small import load_data, make_unit, recipe, write_images

from raymed.data.folds import CrossValidation
from raymed.metrics.calibration import Calibration, logit_of
from raymed.metrics.classification import tune_threshold
from raymed.metrics.reliability import fit_calibrator
from raymed.results.folds import fold_differences, fold_figures, folds_of, out_of_fold
from raymed.train.unit import predictions, train_unit


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Two folds, two repeats, of a data set with two images a case: (data, finished units)."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("folds")
    settled = recipe(write_images(folder), method="asl", data__case="patient")
    units = [replace(make_unit(settled, folder / fold.name), fold=fold) for fold in CrossValidation(2, 2).trainings()]
    for unit in units:
        train_unit(unit)
    yield load_data(settled), units
    torch.set_num_threads(before)


def of_cases(arrays):
    """Mean score and label of each case of two images."""
    return arrays["scores"].reshape(-1, 2).mean(1), arrays["targets"].reshape(-1, 2)[:, 0]


def on_one_scale(unit, scores):
    """As probabilities by what the unit's own validation cases are."""
    val, labels = of_cases(predictions(unit, "val"))
    return Calibration.fit(logit_of(val), labels.astype(float))(logit_of(scores))


def test_networks_of_other_scales_rank_cases_alike(trained, monkeypatch):
    """A network whose logits are all three higher says the same, and must not lift the cases of its fold."""
    _, units = trained
    before = out_of_fold(units)

    def lifted(unit, split):
        arrays = dict(predictions(unit, split))
        if unit.folder == units[0].folder:
            arrays["scores"] = expit(logit_of(arrays["scores"]) + 3)
        return arrays

    monkeypatch.setattr("raymed.train.runs.results.predictions", lifted)
    after = out_of_fold(units)
    np.testing.assert_allclose(after[0].scores, before[0].scores, atol=0.02)
    assert np.array_equal(after[1].scores, before[1].scores)


def test_every_case_is_held_out_once_a_repeat(trained):
    data, units = trained
    repeats = out_of_fold(units)
    assert len(repeats) == 2
    for k, repeat in enumerate(repeats):
        assert np.array_equal(repeat.units, np.arange(48)) and np.array_equal(repeat.patients, np.arange(48))
        assert np.array_equal(repeat.targets, data.labels[::2])
        for fold, unit in enumerate(units[2 * k : 2 * k + 2]):
            arrays = predictions(unit, "test")
            held_out = np.flatnonzero(repeat.fold == fold)
            assert np.array_equal(np.unique(data.cases[arrays["where"]]), held_out)
            np.testing.assert_allclose(repeat.scores[held_out], on_one_scale(unit, of_cases(arrays)[0]), rtol=1e-9)
    assert not np.array_equal(repeats[0].fold, repeats[1].fold)


def test_a_case_is_decided_by_the_threshold_of_the_other_folds(trained):
    _, units = trained
    repeat = out_of_fold(units)[0]
    for fold in (0, 1):
        other, own = repeat.fold != fold, repeat.fold == fold
        threshold = tune_threshold(repeat.scores[other], repeat.targets[other], "youden")
        assert repeat.thresholds[fold] == threshold
        assert np.array_equal(repeat.decided[own], repeat.scores[own] >= threshold)
    assert repeat.thresholds[-1] == tune_threshold(repeat.scores, repeat.targets, "youden")


def test_figures_are_means_over_repeats(trained):
    _, units = trained
    repeats = out_of_fold(units)
    found = fold_figures(repeats)
    auroc = [roc_auc_score(r.targets, r.scores) for r in repeats]
    sensitivity = [r.decided[r.targets == 1].mean() for r in repeats]
    accuracy = [(r.decided == r.targets).mean() for r in repeats]
    assert found["auroc"]["mean"] == pytest.approx(np.mean(auroc)) and found["auroc"]["n"] == 2
    assert found["recall"]["mean"] == pytest.approx(np.mean(sensitivity))
    assert found["accuracy"]["mean"] == pytest.approx(np.mean(accuracy))
    assert found["auroc"]["ci_low"] < found["auroc"]["mean"] < found["auroc"]["ci_high"]
    assert found["auroc"]["num_patients"] == 48


def test_a_case_is_calibrated_by_the_other_folds(trained):
    _, units = trained
    repeats = out_of_fold(units)
    for repeat in repeats:
        for fold in (0, 1):
            other, own = repeat.fold != fold, repeat.fold == fold
            of_others = repeat.scores[other], repeat.targets[other], repeat.patients[other]
            calibrator, _ = fit_calibrator("platt", *of_others)
            np.testing.assert_allclose(repeat.calibrated[own], calibrator(logit_of(repeat.scores[own])), rtol=1e-9)
    brier = [np.mean((r.calibrated - r.targets) ** 2) for r in repeats]
    assert fold_figures(repeats)["brier_calibrated"]["mean"] == pytest.approx(np.mean(brier))


def test_what_is_decided_inside_a_fold_has_its_threshold_from_there(trained):
    data, units = trained
    units = [replace(unit, key=f"fold {number}") for number, unit in enumerate(units[:2])]
    inner = {units[0].key: units[:1], units[1].key: units}  # of the second: two validation parts together
    found = out_of_fold(units, inner=inner)[0]
    for fold, unit in enumerate(units):
        parts = [(of, *of_cases(predictions(of, "val"))) for of in inner[unit.key]]
        scores = np.concatenate([on_one_scale(of, raw) for of, raw, _ in parts])
        targets = np.concatenate([labels for *_, labels in parts])
        assert found.thresholds[fold] == pytest.approx(tune_threshold(scores, targets, "youden"), abs=1e-12)


def test_differences_are_paired_and_of_what_the_figures_are_of(trained):
    _, units = trained
    repeats = out_of_fold(units)
    worse = [replace(r, scores=1 - r.scores, decided=~r.decided) for r in repeats]
    found, figures, of_worse = fold_differences(worse, repeats), fold_figures(repeats), fold_figures(worse)
    assert found["auroc"]["n"] == 2 and found["auroc"]["num_patients"] == 48
    for name in ("auroc", "recall", "ece"):
        assert found[name]["mean"] == pytest.approx(of_worse[name]["mean"] - figures[name]["mean"])
    same = fold_differences(repeats, repeats)["auroc"]
    assert same["mean"] == same["ci_low"] == same["ci_high"] == 0


def test_a_job_trains_on_the_folds_or_on_the_datas_own_splits():
    assert folds_of("") == (None,)
    assert [fold.name for fold in folds_of("2x1")] == ["repeat-0-fold-0", "repeat-0-fold-1"]


def test_images_stand_beside(trained):
    data, units = trained
    by_image = out_of_fold(units, "image")[0]
    assert len(by_image.scores) == len(data) and np.array_equal(by_image.targets, data.labels)
