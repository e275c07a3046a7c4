"""The facts of a paper from runs' folders: a real training on an imported phantom hospital, told again."""

import json
import math
import runpy
import shutil
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from raymed.bundle import Bundle
from raymed.config import UserError, to_json
from raymed.data.intake import ImportConfig, SheetColumns, import_data
from raymed.data.phantom_hospital import write_hospital
from raymed.report.clinical_figures import CalibrationCurve, Level
from raymed.report.clinical_page import ClinicalRecord
from raymed.report.gallery import Case, View
from raymed.report.paper import Confusion, Recalibration, Study, evaluation_facts, paper_pack
from raymed.results.finished import FinishedRun, find_run
from raymed.results.paper import missing, paper_of
from raymed.results.paper_facts import read_facts, write_facts
from raymed.results.paper_study import read_study

REPO = Path(__file__).resolve().parents[2]
TINY = (
    "--data.preprocess.size=16 --method=ce --single.batch-size=16 --single.steps=4 --single.evaluations=1 "
    "--data.split-seed=3"
).split()


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with an import of 40 studies (hsg), and a storage with one training of it (runs/one)."""
    folder = tmp_path_factory.mktemp("study")
    hospital = write_hospital(folder / "hospital", num_studies=40, size=64)
    config = ImportConfig(
        images=hospital / "images",
        labels=hospital / "labels.xlsx",
        sheet="Labels",
        to=folder / "hsg",
        columns=SheetColumns(label="Result", patient="PatientID"),
        map=("occluded=폐쇄,occ.", "patent=개통"),
        unlabelled=("equivocal", "판정 불가"),
        patients=hospital / "mapping.csv",
        modalities=("RF", "XA"),
        site="InstitutionName",
        on_problem="skip",
        key_file=folder / "secret" / "my.key",
    )
    import_data(config)
    given = [f"--data.manifest={folder / 'hsg' / 'manifest.csv'}", "--data.positive=occluded"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train_classifier.py", *given, *TINY, "--name=one", f"--storage={folder}"])
        runpy.run_path(str(REPO / "jobs" / "train_classifier.py"), run_name="__main__")
    return folder


@pytest.fixture
def training(place) -> FinishedRun:
    return find_run("one", str(place))


@pytest.fixture
def bare(training, tmp_path) -> FinishedRun:
    """The training, had it kept no facts.json."""
    return replace(training, folder=tmp_path / "bare")


@pytest.fixture
def manifest(place) -> pd.DataFrame:
    return pd.read_csv(place / "hsg" / "manifest.csv", dtype=str, keep_default_na=False)


def found(cards=(), **changes) -> ClinicalRecord:
    """What an evaluation of four cases found."""
    figure = {"mean": 0.75, "ci_low": 0.5, "ci_high": 1.0, "std": math.nan}
    level = Level("case", np.array([0.1, 0.4, 0.6, 0.9]), np.array([0, 1, 0, 1]), 0.5, {"auroc": figure}, 4)
    bins = [{"mean_score": 0.25, "fraction": 0.5, "ci_low": math.nan, "ci_high": math.nan}]
    fields = {
        "classes": ("patent", "occluded"),
        "operating": {"rule": "youden", "chosen on": "the validation set"},
        "calibration": {"after": CalibrationCurve(bins, {})},
        "readers": {"Reader 1": {"reference": {"sensitivity": figure}}},
        "subgroups": [{"attribute": "site", "group": "A", "num": 4, "num_positive": 2, "auroc": None}],
        "cases": cards,
    }
    return ClinicalRecord("t", "d", "s", [level], **fields | changes)


def other_hospital(training: FinishedRun, folder: Path, **changes) -> FinishedRun:
    """An evaluation of the training's model on as many images of other content."""
    data = training.record.data
    content = [f"{number:016x}" for number in range(len(data["content"]))]
    record = replace(training.record, name="other", data=data | {"content": content} | changes)
    write_facts(folder, found(), f"{training.key}/seed-2023")
    return FinishedRun(folder, record, {}, "other-1")


def test_the_cohort_is_that_of_the_manifest_by_the_splits_of_the_training(training, manifest):
    record = paper_of(training)
    split = training.images.set_index("row")["split"]
    cases = manifest.assign(split=[split.get(row) for row in range(1, len(manifest) + 1)]).drop_duplicates("case")

    assert record.unit == "case" and record.positive == "occluded"
    assert record.cohort["all"].counts == {
        "patients": manifest["patient"].nunique(),
        "cases": manifest["case"].nunique(),
        "images": len(manifest),
    }
    for part in ("train", "val", "test"):
        inside = cases[cases["split"] == part]
        assert record.cohort[part].units == len(inside)
        assert record.cohort[part].classes == Counter(inside["label"])
        assert record.cohort[part].categories["site"] == Counter(inside["site"])
        assert record.cohort[part].quantities["age"].mean == pytest.approx(inside["age"].astype(int).mean())
    assert record.preprocessing.num_blanked == (manifest["blank_boxes"] != "").sum() > 0
    assert (record.split.method, record.split.unit, record.split.seed) == ("random", "patient", 3)


def test_the_flow_is_that_of_the_import(place, training, manifest):
    told = json.loads((place / "hsg" / "import.json").read_text())
    flow = paper_of(training).flow

    assert flow is not None
    assert (flow.assessed, flow.included) == (told["flow"][0][1], len(manifest))
    assert dict(flow.excluded) == dict(told["flow"][1:-1])


def test_rows_that_the_training_left_out_are_counted(training):
    data = training.record.data
    fewer = {name: values[:-2] for name, values in data.items() if isinstance(values, list)}
    flow = paper_of(replace(training, record=replace(training.record, data=data | fewer))).flow

    assert flow is not None
    assert flow.excluded["not used: duplicate or unusable"] == 2
    assert flow.included == len(data["row"]) - 2


def test_studies_that_came_later_are_not_excluded(place, training, tmp_path):
    """The set grows on after a training; the flow is that of what the training saw."""
    told = json.loads((place / "hsg" / "import.json").read_text())
    grown = {"flow": [["files", 900], ["not an image", 100], ["in the manifest", 800]]}
    grown |= {"counts": told["counts"] | {"images": 800}, "time": told["time"] + 1e6}
    folder = tmp_path / "hsg"
    shutil.copytree(place / "hsg", folder)
    earlier = {name: told[name] for name in ("time", "counts", "flow")}
    (folder / "import.json").write_text(json.dumps(told | grown | {"earlier": [earlier]}))
    run = moved(training, folder / "manifest.csv")
    assert paper_of(run).flow == paper_of(training).flow
    (folder / "import.json").write_text(json.dumps(told | grown))  # nothing is known of what there was before
    assert paper_of(run).flow is None


def configured(training: FinishedRun, **changes) -> FinishedRun:
    """The training with another `decide`."""
    config = json.loads(json.dumps(training.record.config))
    config["recipe"]["decide"] |= changes
    return replace(training, record=replace(training.record, config=config))


def with_point(training: FinishedRun, folder: Path, **changes) -> FinishedRun:
    """The training with another operating point in its model."""
    bundle = Bundle.load(Path(training.summary["paths"]["model"]))
    replace(bundle, operating_point=bundle.operating_point | changes).save(folder)
    paths = training.summary["paths"] | {"model": str(folder)}
    return replace(training, summary=training.summary | {"paths": paths})


def test_attention_is_claimed_only_where_it_was_taken(training, tmp_path):
    run = configured(training, aggregate="attention")
    for applied, told in ((True, "attention"), (False, "mean_of_logits")):
        of = with_point(run, tmp_path / told, aggregate="attention", attention={"applied": applied})
        assert paper_of(of).model.aggregate == told
    assert paper_of(folds_of(run)).model.aggregate == "attention_or_mean"
    assert paper_of(folds_of(training)).model.aggregate == "mean"


def test_sides_are_not_mirrored(bare, tmp_path):
    assert bare.record.config["recipe"]["augment"]["flip"] > 0
    assert paper_of(bare).training.augmentation["flip"] > 0
    sides = paper_of(with_point(bare, tmp_path / "model", unit="case+side"))
    assert sides.unit == "side" and sides.training.augmentation["flip"] == 0


def folds_of(training: FinishedRun, **summary) -> FinishedRun:
    """The training as if it were a cross-validation, of which no model is left."""
    config = training.record.config | {"cv": "5x3"}
    summary = training.summary | {"paths": {}} | summary
    return replace(training, record=replace(training.record, name="folds", config=config), summary=summary)


def test_thresholds_of_a_nested_cross_validation_come_from_inner_folds(bare):
    for summary, told in (({}, "the out-of-fold scores of the other folds"), ({"nested": {"inner": 3}}, "inner folds")):
        point = paper_of(folds_of(bare, **summary)).operating_point
        assert point.rule == "youden" and point.threshold is None and told in str(point.chosen_on)


def test_the_command_names_no_folder_of_this_machine(place, training, tmp_path):
    paper_pack(paper_of(training), tmp_path)
    for name in ("methods.md", "methods.ko.md", "record.json"):
        text = (tmp_path / name).read_text()
        assert "--data.manifest=hsg/manifest.csv" in text and str(place) not in text
    told = (
        "python jobs/x.py --data.root=/mnt/kim/share/images --supcon.encoder-from ~/runs/one/b --seeds 1 2 --size=2/3"
    )
    run = replace(training, summary=training.summary | {"command": told})
    kept = "python jobs/x.py --data.root=share/images --supcon.encoder-from one/b --seeds 1 2 --size=2/3"
    assert paper_of(run).command == kept


def test_model_and_settings_are_those_of_the_run(training):
    record = paper_of(training)

    assert (record.operating_point.rule, record.operating_point.chosen_on) == ("youden", "the validation set")
    assert record.model.aggregate == "mean" and record.model.num_parameters == 307_377
    assert record.recalibration == Recalibration("none")
    assert record.training.phases[0].steps == 4 and record.statistics.unit == "patient"
    assert record.software["Python"] == ".".join(map(str, sys.version_info[:3]))


def test_figures_of_the_model_are_those_of_its_seed(training):
    record, summary = paper_of(training), training.summary
    bundle = json.loads((Path(summary["paths"]["model"]) / "bundle.json").read_text())

    assert list(record.performance) == ["Case", "Image"]
    auroc = summary["figures"]["ce"]["test"]["auroc"]["mean"]
    assert record.performance["Case"]["auroc"]["mean"] == pytest.approx(auroc)
    assert record.operating_point.threshold == pytest.approx(bundle["operating_point"]["threshold"])
    confusion = record.confusion
    assert confusion.tp + confusion.fn == record.cohort["test"].classes["occluded"]
    assert confusion.tn + confusion.fp == record.cohort["test"].classes["patent"]
    assert set(record.curves.roc) == {"Case", "Image"}


def test_several_seeds_stand_beside_the_model_of_one(training):
    config = training.record.config | {"seeds": [1, 2]}
    record = paper_of(replace(training, record=replace(training.record, config=config)))
    assert list(record.performance) == ["Case", "Image", "Case, mean of 2 seeds", "Image, mean of 2 seeds"]


def test_without_facts_the_figures_are_those_of_the_summary(bare):
    record, summary = paper_of(bare), bare.summary
    bundle = json.loads((Path(summary["paths"]["model"]) / "bundle.json").read_text())

    assert record.performance["Case"]["auroc"] == summary["figures"]["ce"]["test"]["auroc"]
    assert record.performance["Image"]["auroc"] == summary["image_figures"]["ce"]["test"]["auroc"]
    assert record.operating_point.threshold == bundle["operating_point"]["threshold"]
    assert not record.curves.roc and record.confusion is None


def test_a_pack_of_it_has_no_number_to_fill_in_that_the_run_knows(training, tmp_path):
    pack = paper_pack(paper_of(training, study=read_study(tmp_path / "study.toml")), tmp_path)
    words = ("number", "seed", "learning rate", "loss", "threshold", "method", "size", "metric")
    asked = [blank for blank in pack.blanks if blank.startswith(words)]
    assert asked == ["number, training, experience and blinding of the readers"]


def test_a_manifest_that_has_changed_is_refused(place, training, tmp_path):
    folder = tmp_path / "hsg"
    folder.mkdir()
    table = pd.read_csv(place / "hsg" / "manifest.csv", dtype=str, keep_default_na=False)
    table.iloc[1:].to_csv(folder / "manifest.csv", index=False)
    with pytest.raises(UserError, match="has changed since one was made of it"):
        paper_of(moved(training, folder / "manifest.csv"))


def test_without_its_manifest_a_cohort_is_counted_by_images(training, manifest, tmp_path):
    run = moved(training, tmp_path / "gone.csv")
    record = paper_of(run)

    assert [str(tmp_path / "gone.csv") in note for note in missing(run)] == [True]
    assert not missing(training)
    assert record.cohort["all"].counts == {"patients": manifest["patient"].nunique(), "images": len(manifest)}
    assert record.flow is None and record.preprocessing.num_blanked is None
    # What a case is, is gone with it: nothing that counts cases may count images.
    assert set(record.cohort) == {"all"} and record.cohort["all"].units == 0 and not record.cohort["all"].classes
    told = paper_pack(record, tmp_path / "pack")
    assert "numbers in training, validation and test sets, with positives in each" in told.blanks
    assert "were patent" not in (tmp_path / "pack" / "methods.md").read_text()


def moved(training: FinishedRun, path: Path) -> FinishedRun:
    config = json.loads(json.dumps(training.record.config))
    config["recipe"]["data"]["manifest"] = str(path)
    return replace(training, record=replace(training.record, config=config))


def test_a_run_that_was_moved_takes_its_model_along(training, tmp_path):
    folder = shutil.copytree(training.folder, tmp_path / "kept" / "one")
    text = (folder / "summary.json").read_text().replace(str(training.folder), "/nowhere/runs/one")
    (folder / "summary.json").write_text(text)
    assert paper_of(find_run(str(folder))).model.num_parameters == 307_377


def test_the_headline_is_of_the_test_set_whose_curves_are_known(bare, tmp_path):
    record = paper_of(bare, other_hospital(bare, tmp_path))

    assert list(record.performance) == ["External test, case", "Case", "Image"]
    assert record.performance["External test, case"]["auroc"]["mean"] == 0.75
    assert record.cohort["external"].counts == record.cohort["all"].counts
    assert record.cohort["test"].units < record.cohort["all"].units
    assert set(record.curves.roc) == {"External test, case"} and list(record.readers) == ["Reader 1"]
    assert record.confusion is None  # the flow draws it below the internal test set


def test_an_external_test_set_stands_beside_an_internal_one(training, tmp_path):
    own = replace(training, folder=tmp_path / "own")
    own.folder.mkdir()
    write_facts(own.folder, found(readers={"Reader 2": {}}), f"{training.key}/seed-2023")
    record = paper_of(own, other_hospital(training, tmp_path))

    assert list(record.performance) == ["Case", "External test, case"]
    assert list(record.curves.roc) == ["Case", "External test, case"]
    assert list(record.curves.calibration) == ["After", "External test, after"]
    assert "Reader 1" not in record.readers and record.confusion == Confusion(1, 1, 1, 1)


def test_an_external_test_set_shares_no_image_with_the_training(training, tmp_path):
    content = ["f" * 16] * (len(training.images) - 1) + training.record.data["content"][:1]
    evaluation = other_hospital(training, tmp_path, content=content)
    with pytest.raises(UserError, match="1 images of other are among those of one"):
        paper_of(training, evaluation)


def test_an_evaluation_of_another_model_is_refused(training, tmp_path):
    evaluation = other_hospital(training, tmp_path)
    write_facts(tmp_path, found(), "somebody-else/seed-1")
    with pytest.raises(UserError, match="a model of the run somebody-else"):
        paper_of(training, evaluation)
    (tmp_path / "facts.json").unlink()
    with pytest.raises(UserError, match="holds no evaluation"):
        paper_of(training, evaluation)


def test_a_cross_validation_stands_beside_and_alone_divides_nothing(training):
    config = training.record.config | {"cv": "5x3"}
    folds = replace(training, record=replace(training.record, name="folds", config=config))
    beside, alone = paper_of(training, folds=folds), paper_of(folds)

    assert list(beside.performance) == ["Case", "Image", "Case, cross-validation", "Image, cross-validation"]
    assert (beside.split.folds, beside.split.repeats) == (alone.split.folds, alone.split.repeats) == (5, 3)
    assert set(beside.cohort) == {"all", "train", "val", "test"} and set(alone.cohort) == {"all"}
    with pytest.raises(UserError, match="one is no cross-validation"):
        paper_of(training, folds=training)
    other = replace(
        folds, record=replace(folds.record, data=folds.record.data | {"content": ["0"] * len(folds.images)})
    )
    with pytest.raises(UserError, match="are of different images"):
        paper_of(training, folds=other)


def test_a_run_that_is_not_there_or_not_finished(training, tmp_path):
    with pytest.raises(UserError, match="there is no finished run 'two'"):
        find_run("two", str(tmp_path))
    shutil.copytree(training.folder, tmp_path / "runs" / "two", ignore=shutil.ignore_patterns("summary.json"))
    with pytest.raises(UserError, match="there is no finished run 'two'"):
        find_run("two", str(tmp_path))


# facts.json


def test_facts_come_back_as_they_went(tmp_path):
    map_ = np.zeros((4, 4))
    cards = [Case("C-1", True, 0.9, [View("early", map_, map_, map_)])]
    write_facts(tmp_path, found(cards), "one-abc/seed-1")
    facts, key = read_facts(tmp_path)

    assert key == "one-abc/seed-1"
    assert "random weights" in facts.pop("explanation")
    assert to_json(facts) == to_json(evaluation_facts(found()))
    assert math.isnan(facts["curves"].calibration["After"].low[0])
    assert "C-1" not in (tmp_path / "facts.json").read_text()


def test_without_pictures_nothing_is_said_of_heat_maps(tmp_path):
    write_facts(tmp_path, found())
    assert read_facts(tmp_path)[0]["explanation"] is None
    assert read_facts(tmp_path / "elsewhere") == ({}, "")
    (tmp_path / "facts.json").write_text('{"facts": {}}')
    with pytest.raises(UserError, match="evaluate the model anew"):
        read_facts(tmp_path)


# study.toml


def test_words_of_the_authors(tmp_path):
    path = tmp_path / "paper" / "study.toml"
    assert read_study(path) == Study()
    path.write_text(path.read_text().replace('funding = ""', 'funding = " 없음 "'), encoding="utf-8")
    assert read_study(path) == Study(funding="없음")


@pytest.mark.parametrize(
    ("text", "message"),
    [("fundin = ''", "did you mean 'funding'"), ("funding = 3", "must be text"), ("funding", "cannot be read")],
)
def test_a_study_that_cannot_be_read(tmp_path, text, message):
    (tmp_path / "study.toml").write_text(text)
    with pytest.raises(UserError, match=message):
        read_study(tmp_path / "study.toml")
