"""evaluate_classifier and compare_models from a bundle's folder to the summary."""

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pandas as pd
import pytest
import torch
from external_hospital import CASES, make_bundle

from raymed.config import UserError
from raymed.data.manifest import DataConfig
from raymed.results.paper_facts import read_facts
from raymed.tasks.external import LabelledData
from raymed.tracking.outbox import Outbox
from raymed.train.runs.job import RunConfig

JOBS = Path(__file__).resolve().parents[2] / "jobs"


def job(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"job_{name}", JOBS / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def place(tmp_path_factory, hospital):
    """A storage, with the models "good" and "poor", and "seen" that was trained on image 8."""
    folder = tmp_path_factory.mktemp("place")
    hospital.bundle.save(folder / "good")
    make_bundle(7).save(folder / "poor")
    contents = torch.from_numpy(hospital.data().content[[8]].view(np.int64))
    make_bundle(extras={"trained_on": contents}).save(folder / "seen")
    make_bundle(extras={}).save(folder / "silent")
    return folder


@pytest.fixture
def evaluate(place, hospital):
    """evaluate(model, fields of the data config, **of the job) -> folder of the run."""
    module = job("evaluate_classifier")

    def run(model, name, data=None, **fields):
        recipe = LabelledData(DataConfig(str(hospital.manifest), **(data or {})))
        run = RunConfig(name=name, storage=str(place / "storage"))
        return module.evaluate(module.EvaluateClassifier(recipe, str(place / model), run=run, **fields)).parent

    return run


@pytest.fixture
def compare(place, hospital):
    module = job("compare_models")

    def run(*models, name, data=None, **fields):
        recipe = LabelledData(DataConfig(str(hospital.manifest), **(data or {})))
        run = RunConfig(name=name, storage=str(place / "storage"))
        models = tuple(str(place / model) for model in models)
        return module.compare(module.CompareModels(recipe, models, run=run, **fields)).parent

    return run


def artifacts(folder: Path) -> set[str]:
    return {Path(r["path"]).name for r in Outbox(folder / "tracking.jsonl").records() if r["op"] == "artifact"}


def test_an_evaluation_is_kept_and_told_by_case_and_by_image(evaluate, hospital, capsys):
    folder = evaluate("good", "open", {"deidentified": True}, prevalences=(0.1,))
    summary = json.loads((folder / "summary.json").read_text())
    assert list(summary["figures"]) == ["case", "image"] and summary["best"] == "case"
    of = summary["figures"]["case"]["test"]["sensitivity"]
    assert of["total"] == hospital.targets.sum() and of["ci_low"] <= of["mean"] <= of["ci_high"]
    assert summary["test_openings"] == 1 and summary["sentence"] in capsys.readouterr().out
    page = (folder / "evaluation.html").read_text()
    assert "no evidence of localisation" in page and "data:image/jpeg" in page and "PPV" in page
    table = pd.read_csv(folder / "table.csv")
    assert list(table.columns[:3]) == ["level", "metric", "mean"] and set(table["level"]) == {"case", "image"}
    assert table["metric"][0] == "sensitivity" and "ppv_at_0.1" in set(table["metric"])
    facts, key = read_facts(folder)
    assert key == "hsg-1/seed-1" and facts["unit"] == "case"
    assert {"evaluation.html", "table.csv", "roc_pr.png", "summary.json"} <= artifacts(folder)


def test_pictures_that_may_not_be_shown_stay(evaluate):
    folder = evaluate("good", "closed")
    assert "data:image/jpeg" not in (folder / "evaluation.html").read_text()
    assert "evaluation.html" not in artifacts(folder) and "roc_pr.png" in artifacts(folder)
    assert json.loads((folder / "summary.json").read_text())["test_openings"] == 2


def test_a_patient_whom_the_model_was_trained_on_is_refused_or_left_out(evaluate, place):
    with pytest.raises(UserError, match=r"the model was trained.* 2 rows \(9, 10\)"):
        evaluate("seen", "refused")
    assert not (place / "storage" / "runs" / "refused").exists()
    folder = evaluate("seen", "skipped", {"on_problem": "skip"})
    assert f"{CASES - 1} cases (118 images) of 55 patients" in (folder / "evaluation.html").read_text()
    assert (
        "left out, patients that the model was trained on: 2 rows (9, 10)" in (folder / "evaluation.html").read_text()
    )


def test_a_model_that_does_not_say_what_it_was_trained_on_is_told(evaluate):
    assert (
        "whether it has seen these patients is not known"
        in (evaluate("silent", "silent") / "evaluation.html").read_text()
    )


def test_classes_of_another_kind_are_refused_before_there_is_a_run(evaluate, place):
    with pytest.raises(UserError, match="'Busan'.*--data.label COLUMN"):
        evaluate("good", "classes", {"label": "site"})
    assert not (place / "storage" / "runs" / "classes").exists()


def test_a_comparison_tells_which_is_better(compare, place, capsys):
    folder = compare("good", "poor", name="pair")
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["sentence"].startswith("good is better: AUROC differs by +")
    assert summary["models"] == {"good": str(place / "good"), "poor": str(place / "poor")}
    assert summary["sentence"] in capsys.readouterr().out
    of = summary["figures"]
    expected = of["good"]["case"]["auroc"]["mean"] - of["poor"]["case"]["auroc"]["mean"]
    assert summary["differences"]["case"]["auroc"]["mean"] == pytest.approx(expected)
    table = pd.read_csv(folder / "differences.csv")
    assert set(table["level"]) == {"case", "image"}


def test_a_comparison_wants_to_know_what_both_were_trained_on(compare, place):
    with pytest.raises(UserError, match=r"seen was trained.* 2 rows \(9, 10\)"):
        compare("good", "seen", name="one")
    with pytest.raises(UserError, match="--allow-unknown-training-set"):
        compare("good", "silent", name="two")
    folder = compare("good", "silent", name="two", allow_unknown_training_set=True)
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["sentence"].startswith("Cannot tell which is better: AUROC differs by +0.000")
    assert any("not known whether" in note for note in summary["notes"])


def test_what_cannot_be_compared_is_refused(compare, place):
    with pytest.raises(UserError, match="two different models"):
        compare("good", "good", name="same")
    with pytest.raises(UserError, match="--models is needed"):
        compare(name="none")
    with pytest.raises(UserError, match="metric must be one of"):
        compare("good", "poor", name="metric", metric="loss")
    other = make_bundle(classes={"names": ["occluded", "patent"], "positive": "patent"})
    other.save(place / "other")
    with pytest.raises(UserError, match="find different"):
        compare("good", "other", name="positive")


def test_preprocessings_may_differ(compare, place):
    bundle = make_bundle(3)
    replace(bundle, preprocess=bundle.preprocess | {"size": 20}).save(place / "larger")
    folder = compare("good", "larger", name="sizes")
    assert (folder / "table.csv").stat().st_size > 200
