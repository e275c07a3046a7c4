"""A unit from its recipe to its bundle, once and only once."""

import json
import multiprocessing
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from small import load_data, make_unit, recipe

from raymed.bundle import Bundle
from raymed.config import UserError, to_json
from raymed.metrics.classification import binary_metrics, tune_threshold
from raymed.storage import lock, working_copy
from raymed.tasks.classifier import load_classifier
from raymed.train.loop import Interrupted
from raymed.train.runs.results import decided
from raymed.train.unit import predictions, train_unit


def text(result: dict) -> str:
    """A result as JSON: NaN (a precision where nothing is decided positive) is not equal to itself."""
    return to_json(dict(sorted(result.items())))


@pytest.fixture(scope="module")
def trained(manifest, tmp_path_factory):
    """A finished unit, its result, and the evaluations that were reported."""
    unit, seen = make_unit(recipe(manifest), tmp_path_factory.mktemp("unit") / "seed-3"), []
    return unit, train_unit(unit, report=seen.append), seen


def test_result_and_predictions_agree(trained, data):
    unit, result, seen = trained
    assert [e.number for e in seen] == list(range(1, 8))
    assert text(json.loads((unit.folder / "result.json").read_text())) == text(result) == text(unit.result())
    val = decided(unit, "val")
    threshold = tune_threshold(val.scores, val.targets, unit.recipe.decide.operating_point)
    for split in ("val", "test"):
        arrays, where = predictions(unit, split), data.splits[split]
        assert np.array_equal(arrays["where"], where) and np.array_equal(arrays["rows"], data.rows[where])
        assert np.array_equal(arrays["patients"], data.patients[where])
        assert np.array_equal(arrays["targets"], data.labels[where])
        units = decided(unit, split)
        found = {name: value for name, value in result[split].items() if not name.startswith("image/")}
        assert text(binary_metrics(units.scores, units.targets, threshold)) == text(found)


def test_the_bundle_gives_the_predictions(trained, data):
    unit, result, _ = trained
    bundle = Bundle.load(unit.folder / "bundle")
    classifier, preprocess = load_classifier(bundle)
    for split in ("val", "test"):
        arrays = predictions(unit, split)
        with torch.no_grad():
            image = preprocess.normalise(data.batch(arrays["where"]).unit_image())
            np.testing.assert_allclose(torch.sigmoid(classifier(image)).numpy(), arrays["scores"], atol=1e-6)
    assert bundle.operating_point["threshold"] == result["val"]["threshold"] == result["test"]["threshold"]
    assert text(bundle.metrics) == text(result) and bundle.provenance["data"] == data.fingerprint


def test_the_records_tell_the_whole_story(trained, data):
    unit, result, _ = trained
    records = unit.outbox.records()
    first = records[0]
    assert (first["op"], first["key"], first["parent"]) == ("open", "run/unit", "run")
    assert first["params"]["method"] == "supcon_asl" and first["params"]["seed"] == 3
    assert first["tags"]["raymed.data"] == data.fingerprint
    assert (records[-1]["op"], records[-1]["status"]) == ("close", "FINISHED") and unit.outbox.status() == "FINISHED"
    final = [r["values"] for r in records if r["op"] == "metrics" and "final/test/auroc" in r["values"]]
    assert [f["final/test/auroc"] for f in final] == [result["test"]["auroc"]]
    assert {r["path"] for r in records if r["op"] == "artifact"} == {"bundle", "predictions.npz"}


def test_a_finished_unit_is_not_trained_again(trained):
    unit, result, _ = trained
    before = {path: path.stat().st_mtime_ns for path in unit.folder.rglob("*")}
    assert text(train_unit(unit, report=lambda e: pytest.fail("trained again"))) == text(result)
    assert {path: path.stat().st_mtime_ns for path in unit.folder.rglob("*")} == before


def test_an_interrupted_unit_continues_to_the_same_result(trained, manifest, tmp_path):
    unit = make_unit(recipe(manifest), tmp_path)
    asked = iter(range(1, 1000))
    with pytest.raises(Interrupted):
        train_unit(unit, interrupted=lambda: next(asked) == 17)
    assert unit.result() is None and unit.outbox.status() == "RUNNING"
    assert text(train_unit(unit)) == text(trained[1])
    for split in ("val", "test"):
        for name, values in predictions(trained[0], split).items():
            assert np.array_equal(predictions(unit, split)[name], values)


def test_an_encoder_is_trained_once_for_several_heads(trained, manifest, data, tmp_path):
    """The head on a shared encoder is the head of the whole recipe, to the bit."""
    shared = make_unit(recipe(manifest), tmp_path / "encoder", part="encoder")
    assert list(train_unit(shared)) == ["checkpoint"]
    assert not (shared.folder / "bundle").exists()
    head = recipe(manifest, supcon__encoder_from=str(shared.encoder_checkpoint))
    assert text(train_unit(make_unit(head, tmp_path / "head"))) == text(trained[1])


def hold(path, held, leave) -> None:
    with lock(path):
        held.set()
        leave.wait(60)


def test_a_unit_in_use_by_another_process_is_refused(manifest, tmp_path):
    unit, process = make_unit(recipe(manifest), tmp_path), multiprocessing.get_context("fork")
    held, leave = process.Event(), process.Event()
    other = process.Process(target=hold, args=(unit.folder / "lock", held, leave))
    other.start()
    assert held.wait(60)
    with pytest.raises(UserError, match=f"is in use by process {other.pid} on "):
        train_unit(unit)
    leave.set()
    other.join()
    assert other.exitcode == 0 and not (unit.folder / "result.json").exists()


def test_on_another_machine_it_lies_on_the_disk_of_that(manifest, tmp_path, monkeypatch):
    monkeypatch.setenv("RAYMED_LOCAL", str(tmp_path / "a"))
    shared = replace(make_unit(recipe(manifest), tmp_path / "shared"), cache=tmp_path / "a" / "0123" / "cache")
    apart = replace(shared, folder=working_copy("s3://bucket/storage/runs/run/seed-3"))
    sent = pickle.dumps([shared, apart])
    assert pickle.loads(sent) == [shared, apart]
    monkeypatch.setenv("RAYMED_LOCAL", str(tmp_path / "b"))
    arrived = pickle.loads(sent)
    assert [unit.folder for unit in arrived] == [tmp_path / "shared", tmp_path / "b/s3/bucket/storage/runs/run/seed-3"]
    assert all(unit.cache == tmp_path / "b" / "0123" / "cache" for unit in arrived)
    assert replace(arrived[1], folder=apart.folder, cache=apart.cache) == apart


def test_another_seed_is_another_model(trained, manifest, tmp_path):
    other = replace(make_unit(recipe(manifest), tmp_path), seed=4)
    train_unit(other)
    assert not np.array_equal(predictions(other, "test")["scores"], predictions(trained[0], "test")["scores"])


def test_one_phase_recipes_work_end_to_end(manifest, tmp_path):
    unit = make_unit(recipe(manifest, method="focal", single__balanced=True), tmp_path)
    result = train_unit(unit)
    assert 0 <= result["test"]["auroc"] <= 1 and load_data(unit.recipe).has_patients
    assert load_classifier(Bundle.load(unit.folder / "bundle"))
