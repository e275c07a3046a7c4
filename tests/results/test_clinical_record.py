"""The record of an evaluation: every figure is of cases at the model's own threshold, and nothing is fitted."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from external_hospital import CASES, THRESHOLD, calibrated, make_bundle, write_hospital
from sklearn.metrics import average_precision_score, brier_score_loss, cohen_kappa_score, roc_auc_score

from raymed.config import UserError
from raymed.report.clinical_page import write_clinical_page
from raymed.results.clinical import clinical_record
from raymed.results.paper_facts import read_facts, write_facts
from raymed.results.scores import answer, check_same_units
from raymed.tasks.predictor import Predictor


def evaluate(hospital, bundle=None, data=None, **more):
    data = data or hospital.data()
    where = more.pop("where", data.splits["test"])
    return clinical_record(
        Predictor.from_bundle(bundle or hospital.bundle), data, where, title="t", n_boot=more.pop("n_boot", 50), **more
    )


@pytest.fixture(scope="module")
def record(hospital):
    return evaluate(hospital, pictures=True, prevalences=(0.05,))


def test_cases_come_first_calibrated_and_images_stand_beside_as_they_are(hospital, record):
    cases, images = record.levels
    raw = hospital.raw.reshape(CASES, 2).mean(1)
    assert (cases.name, images.name, record.classes) == ("case", "image", ("patent", "occluded"))
    np.testing.assert_allclose(cases.scores, calibrated(raw), atol=1e-6)
    assert cases.threshold == pytest.approx(calibrated(np.array(THRESHOLD)))
    np.testing.assert_allclose(images.scores, hospital.raw, atol=1e-6)
    assert images.threshold == 0.4 and cases.num_patients == images.num_patients == 56
    assert np.array_equal(cases.targets, hospital.targets)
    assert np.array_equal(images.targets, np.repeat(hospital.targets, 2))


def test_figures_are_those_of_other_libraries(hospital, record):
    raw, targets = hospital.raw.reshape(CASES, 2).mean(1), hospital.targets
    figures, of_images = (level.figures for level in record.levels)
    decided = raw >= THRESHOLD
    assert figures["sensitivity"]["mean"] == pytest.approx(decided[targets == 1].mean())
    assert figures["specificity"]["mean"] == pytest.approx((~decided)[targets == 0].mean())
    assert figures["ppv"]["count"] == (decided & (targets == 1)).sum() and figures["ppv"]["total"] == decided.sum()
    assert figures["auroc"]["mean"] == pytest.approx(roc_auc_score(targets, raw))
    assert figures["auprc"]["mean"] == pytest.approx(average_precision_score(targets, raw))
    assert figures["brier"]["mean"] == pytest.approx(brier_score_loss(targets, calibrated(raw)))
    assert figures["auroc"]["num_patients"] == 56 and 0 < figures["ppv_at_0.05"]["mean"] < figures["ppv"]["mean"]
    assert of_images["auroc"]["mean"] == pytest.approx(roc_auc_score(np.repeat(targets, 2), hospital.raw))
    assert of_images["accuracy"]["mean"] == pytest.approx(((hospital.raw >= 0.4) == np.repeat(targets, 2)).mean())
    assert {"before calibration", "after calibration"} == set(record.calibration)
    assert record.decision is not None and len(record.decision["model"]) == 99


def test_the_sentence_and_the_facts_say_what_was_found(hospital, record):
    right = ((hospital.raw.reshape(CASES, 2).mean(1) >= THRESHOLD) & (hospital.targets == 1)).sum()
    num = hospital.targets.sum()
    assert record.sentence.startswith(f"{right} of {num} occluded cases are found (sensitivity {right / num:.3f}, 95")
    assert record.data == "External test set: 60 cases (120 images) of 56 patients."
    assert record.operating["rule"] == "youden" and record.operating["chosen on"] == "val"
    assert "uncertain band" in record.more[0] and record.model["run"] == "hsg-1/seed-1"


def test_decisions_stay_the_raw_ones_where_calibration_is_flat(hospital):
    """A step whose one probability is that of scores on both sides of the threshold."""
    steps = {
        "kind": "isotonic",
        "applied": True,
        "logits": (-9.0, -8.0, 8.0, 9.0),
        "probabilities": (0.1, 0.5, 0.5, 0.9),
    }
    level = evaluate(hospital, make_bundle(calibration=steps)).levels[0]
    raw = hospital.raw.reshape(CASES, 2).mean(1)
    assert (np.abs(level.scores - 0.5) < 1e-12).sum() > 10
    assert np.array_equal(level.decided, raw >= THRESHOLD)


def test_readers_are_compared_with_the_reference_and_with_each_other(hospital, record):
    assert list(record.readers) == ["reader1", "reader2"]
    reference = record.readers["reader1"]["reference"]
    assert reference["sensitivity"]["mean"] == reference["specificity"]["mean"] == 1
    targets, read = hospital.targets, np.arange(CASES) >= 5
    second = np.where(np.arange(CASES) % 10 == 3, 1 - targets, targets)
    found = record.readers["reader2"]["reference"]["sensitivity"]
    assert found["total"] == (targets[read] == 1).sum()
    assert found["mean"] == pytest.approx((second == 1)[read & (targets == 1)].mean())
    kappa = record.agreement["reader1, reader2"]["kappa"]["mean"]
    assert kappa == pytest.approx(cohen_kappa_score(targets[read], second[read]))


def test_one_reader_and_none(tmp_path):
    hospital = write_hospital(tmp_path, label_reader2="")
    found = evaluate(hospital)
    assert list(found.readers) == ["reader1"] and set(found.readers["reader1"]) == {"reference"} and not found.agreement
    data = replace(hospital.data(), readers={})
    assert not evaluate(hospital, data=data).readers


def test_a_case_is_positive_to_a_reader_who_calls_one_image_so(hospital):
    data = hospital.data()
    texts = np.array(["patent"] * len(data), "<U8")
    texts[1] = "occluded"
    found = evaluate(hospital, data=replace(data, readers={"label_reader1": texts}))
    decided = found.readers["reader1"]["reference"]["ppv"]
    assert decided["total"] == 1 and decided["count"] == hospital.targets[0]


def test_subgroups_are_of_cases_and_ages_are_bands(hospital, record):
    counts = {(group["attribute"], group["group"]): group["num"] for group in record.subgroups}
    assert counts == {
        ("site", "Busan"): 30, ("site", "서울"): 30,
        ("age", "18-29"): 20, ("age", "40-49"): 20, ("age", "not stated"): 20,
    }  # fmt: skip


def test_ages_that_are_no_years_do_not_stop_an_evaluation(hospital):
    data = hospital.data()
    ages = data.groups["age"].astype("<U9")
    ages[:2] = "thirty"
    found = evaluate(hospital, data=replace(data, groups={"age": ages}))
    assert {g["group"]: g["num"] for g in found.subgroups}["not stated"] == 21
    assert any("age: 2 rows are not in whole years" in note for note in found.notes)


def test_the_gallery_shows_all_views_with_both_maps_and_names_rows_alone(hospital, record):
    wrong = [case for case in record.cases if case.positive != (case.score >= record.levels[0].threshold)]
    assert len(wrong) == 10
    for case in record.cases:
        assert case.name.startswith("case of rows ") and [view.name for view in case.views] == ["early", "late"]
        first = int(case.name.removeprefix("case of rows ").split(",")[0]) - 1
        pixels = hospital.data().batch(np.array([first])).unit_image()[0, 0].numpy()
        assert np.array_equal(case.views[0].image, pixels)
        assert all(view.heat_map.shape == view.random_map.shape == view.image.shape for view in case.views)
    views = [view for case in record.cases for view in case.views]
    assert np.mean([view.random_map.max() == 1 for view in views]) > 0.5
    assert np.mean([np.array_equal(view.heat_map, view.random_map) for view in views]) < 0.3


def test_no_picture_is_shown_unless_it_may_be(hospital, tmp_path):
    found = evaluate(hospital)
    assert found.cases and not any(case.views for case in found.cases)
    page = write_clinical_page(tmp_path, found).read_text()
    assert "data:image/jpeg" not in page and "서울" in page


def test_the_page_and_the_facts_of_a_paper_take_it(hospital, record, tmp_path):
    assert "no evidence of localisation" in write_clinical_page(tmp_path, record).read_text()
    write_facts(tmp_path, record, "key")
    facts, key = read_facts(tmp_path)
    assert key == "key" and facts["performance"]["Case"]["auroc"]["mean"] == record.levels[0].figures["auroc"]["mean"]


def test_some_images_only(hospital):
    """As of an internal test split."""
    data = hospital.data()
    where = np.arange(20, 60)
    found = evaluate(hospital, data=data, where=where, about="Test split")
    assert found.data == "Test split: 20 cases (40 images) of 20 patients."
    assert np.array_equal(found.levels[0].targets, hospital.targets[10:30])


def test_cases_of_one_class_alone_have_what_can_be_said_of_them(hospital, tmp_path):
    data = hospital.data()
    found = evaluate(hospital, data=data, where=np.flatnonzero(data.labels == 0), prevalences=(0.1,))
    assert found.decision is None and not found.calibration and np.isnan(found.levels[0].figures["auroc"]["mean"])
    num = (hospital.targets == 0).sum()
    assert f" of {num} patent cases are cleared" in found.sentence and "occluded cases" not in found.sentence
    assert write_clinical_page(tmp_path, found).stat().st_size > 5_000


def test_a_model_of_images_has_one_level(hospital):
    point = {"threshold": 0.3, "criterion": "f1", "chosen_on": "val"}
    found = evaluate(hospital, make_bundle(operating_point=point, calibration={}, uncertain_band={}))
    (level,) = found.levels
    assert (
        level.name == "image" and level.threshold == pytest.approx(0.3) and set(found.calibration) == {"as predicted"}
    )
    np.testing.assert_allclose(level.scores, hospital.raw, atol=1e-6)
    assert found.cases[0].name.startswith("row ")


def test_without_patients_cases_are_resampled(hospital):
    data = hospital.data(patient="")
    found = evaluate(hospital, data=data)
    for level in found.levels:
        assert level.num_patients is None and level.figures["auroc"]["unit"] == "case"
    assert found.data.endswith("60 cases (120 images).")


def test_a_model_of_cases_wants_to_know_them(hospital):
    with pytest.raises(UserError, match="--data.case COLUMN"):
        evaluate(hospital, data=hospital.data(case=""))


def test_models_that_decide_about_different_units_are_not_compared(hospital):
    data = hospital.data()
    found = [
        answer(Predictor.from_bundle(bundle), data, data.splits["test"])
        for bundle in (hospital.bundle, make_bundle(operating_point={"threshold": 0.5}))
    ]
    with pytest.raises(UserError, match="case and image"):
        check_same_units(found)


def test_networks_of_tokens_have_no_maps(hospital):
    predictor = Predictor.from_bundle(hospital.bundle)
    predictor.network.encoder.maps = lambda x: torch.zeros(len(x), 4, 3)  # type: ignore[method-assign]
    predictor.network.encoder.forward = lambda x: x.flatten(1)[:, :128]  # type: ignore[method-assign]
    data = hospital.data()
    found = clinical_record(predictor, data, data.splits["test"], title="t", pictures=True, n_boot=20)
    assert all(view.heat_map is None and view.random_map is None for case in found.cases for view in case.views)
