"""Cross-validation: every case is scored once a repeat, by networks that have not seen its patient."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

sys.path.append(str(Path(__file__).resolve().parents[1] / "train"))
from small import load_data, make_unit, recipe, write_images  # noqa: E402

from raymed.data.folds import CrossValidation  # noqa: E402
from raymed.metrics.classification import tune_threshold  # noqa: E402
from raymed.results.folds import fold_figures, out_of_fold  # noqa: E402
from raymed.train.unit import predictions, train_unit  # noqa: E402


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
            means = arrays["scores"].reshape(-1, 2).mean(1)
            np.testing.assert_allclose(repeat.scores[held_out], means, rtol=1e-12)
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


def test_images_stand_beside(trained):
    data, units = trained
    by_image = out_of_fold(units, "image")[0]
    assert len(by_image.scores) == len(data) and np.array_equal(by_image.targets, data.labels)
