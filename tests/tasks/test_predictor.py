"""A finished training's bundle, given the images it was tested on, says what training said, and how far to trust it."""

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from scipy.special import expit, logit

from raymed.bundle import NOT_STATED, Bundle
from raymed.config import UserError, to_json
from raymed.data.dataset import load
from raymed.data.manifest import DataConfig
from raymed.data.preprocess import Preprocess
from raymed.data.readers import read
from raymed.metrics.calibration import Calibration
from raymed.tasks.classifier import ClassifierRecipe, ContrastiveStage, Stage
from raymed.tasks.predictor import Predictor, complete, input_contract, with_separation
from raymed.tasks.task import Optim
from raymed.train.runs.results import decided
from raymed.train.unit import Unit, predictions, train_unit

OPTIM = Optim(lr=2e-3)


def write_images(folder) -> None:
    """Three images a patient, of several sizes: 8 bits, 16 bits and colour. Every third patient has a bright patch."""
    rng = np.random.default_rng(7)
    rows = []
    for patient in range(60):
        for view, (height, width) in enumerate([(16, 16), (20, 26), (30, 24)]):
            pixels = rng.normal(90, 35, (height, width))
            if patient % 3 == 0:
                pixels[3:10, 3:10] += 70
            pixels = pixels.clip(0, 255)
            stored = [
                pixels.astype(np.uint8),
                (pixels * 257).astype(np.uint16),
                np.stack([pixels] * 3, 2).astype(np.uint8),
            ]
            stored[2][..., 0] //= 2
            name = f"{patient:02d}{view}.png"
            Image.fromarray(stored[view]).save(folder / name)
            label = "patch" if patient % 3 == 0 else "plain"
            rows.append({"image": name, "label": label, "patient": patient, "case": patient, "view": "abc"[view]})
    pd.DataFrame(rows).to_csv(folder / "manifest.csv", index=False)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(unit, its data, folder of images, bundle as training left it)."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("images")
    write_images(folder)
    preprocess = Preprocess(size=16, fit="letterbox")
    data = DataConfig(str(folder / "manifest.csv"), positive="patch", deidentified=True, preprocess=preprocess)
    recipe = ClassifierRecipe(
        data=data,
        method="supcon_asl",
        supcon=ContrastiveStage(steps=20, batch_size=12, evaluations=2, optim=OPTIM),
        head=Stage(steps=20, batch_size=12, evaluations=2, optim=Optim(lr=1e-2)),
    )
    unit = Unit(recipe=recipe, seed=3, folder=folder / "unit", key="k", name="n", parent=None, cache=folder / "cache")
    train_unit(unit)
    yield unit, load(data, unit.cache), folder, Bundle.load(unit.folder / "bundle")
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def completed(trained):
    """The bundle with everything that is learned after training, saved and loaded again."""
    unit, data, folder, bundle = trained
    predictor = Predictor.from_bundle(bundle)
    val, test = predictions(unit, "val"), predictions(unit, "test")
    train = data.splits["train"]
    full = complete(
        bundle,
        train_features=predictor.data_features(data, train),
        train_labels=data.labels[train],
        train_patients=data.patients[train],
        val_features=predictor.data_features(data, val["where"]),
        val_labels=val["targets"],
        val_patients=val["patients"],
        decided={
            split: unit.recipe.decide.table(data, p["where"], p["scores"])
            for split, p in (("val", val), ("test", test))
        },
        contract=input_contract(data, modality="DX"),
        licences={"data": {"name": "CC BY 4.0", "source": "drawn"}},
    )
    return Bundle.load(full.save(folder / "completed"))


def images_of(trained, rows) -> list[np.ndarray]:
    _, _, folder, _ = trained
    names = pd.read_csv(folder / "manifest.csv")["image"]
    return [read(folder / names[row - 1]) for row in rows]


def test_from_the_files_to_the_probabilities_of_training(trained, completed):
    """Through reader, resampling and normalisation, 16 bits and colour included, one by one and together."""
    unit, _, _, _ = trained
    test = predictions(unit, "test")
    images, predictor = images_of(trained, test["rows"]), Predictor.from_bundle(completed)
    assert {(image.dtype.name, image.ndim) for image in images} == {("uint8", 2), ("uint16", 2), ("uint8", 3)}
    together, alone = predictor(images), [predictor([image])[0] for image in images]
    for found in (together, alone):
        np.testing.assert_allclose([p.raw_probability for p in found], test["scores"], atol=1e-6)
    assert np.ptp(test["scores"]) > 0.01
    decided = np.where(test["scores"] >= completed.operating_point["threshold"], "patch", "plain")
    assert [p.decision for p in together] == decided.tolist()


def test_what_the_data_set_decoded_gives_the_same(trained, completed):
    """The cache holds 16 bits here, 8-bit images times 257."""
    unit, data, _, _ = trained
    test, predictor = predictions(unit, "test"), Predictor.from_bundle(completed)
    pixels = data.batch(test["where"]).image
    assert pixels.dtype == torch.uint16
    found = predictor.from_pixels(pixels)
    np.testing.assert_allclose([p.raw_probability for p in found], test["scores"], atol=1e-6)
    from_files = predictor(images_of(trained, test["rows"]))
    np.testing.assert_allclose([p.ood["knn"] for p in found], [p.ood["knn"] for p in from_files], atol=1e-5)
    features = predictor.features(images_of(trained, test["rows"]))
    np.testing.assert_allclose(features, predictor.data_features(data, test["where"]), atol=1e-5)


def test_a_fresh_process_gives_training_s_probabilities(trained, completed):
    unit, _, folder, _ = trained
    test = predictions(unit, "test")
    np.savez(folder / "first.npz", *images_of(trained, test["rows"][:4]))
    code = (
        "import sys, numpy as np; from pathlib import Path; from raymed.bundle import Bundle\n"
        "from raymed.tasks.predictor import Predictor\n"
        f"folder = Path({str(folder)!r}); images = list(np.load(folder / 'first.npz').values())\n"
        "for p in Predictor.from_bundle(Bundle.load(folder / 'completed'))(images): print(p.raw_probability)\n"
        "assert not {'ray', 'mlflow', 'deepspeed'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    np.testing.assert_allclose([float(line) for line in done.stdout.split()], test["scores"][:4], atol=1e-6)


def test_probability_threshold_and_band_are_on_one_scale(trained, completed):
    """A planted calibration: the answer is calibrated, the decision and the band stay those of the raw scores."""
    unit, _, _, _ = trained
    test = predictions(unit, "test")
    threshold = completed.operating_point["threshold"]
    low, high = np.quantile(test["scores"], [0.3, 0.6])
    planted = replace(
        completed,
        calibration={"applied": True, "temperature": 0.5, "bias": 0.7},
        uncertain_band=completed.uncertain_band | {"low": float(low), "high": float(high)},
    )
    predictor = Predictor.from_bundle(planted)
    found = predictor(images_of(trained, test["rows"]))
    np.testing.assert_allclose([p.probability for p in found], expit(logit(test["scores"]) / 0.5 + 0.7), atol=1e-5)
    assert predictor.threshold == found[0].threshold == pytest.approx(expit(logit(threshold) / 0.5 + 0.7))
    assert [p.decision == "patch" for p in found] == [p.probability >= p.threshold for p in found]
    assert [p.uncertain for p in found] == [predictor.band[0] <= p.probability <= predictor.band[1] for p in found]
    assert 0 < sum(p.uncertain for p in found) < len(found)
    open_band = replace(planted, uncertain_band=planted.uncertain_band | {"low": 0.0, "high": 1.0})
    assert Predictor.from_bundle(open_band).band == (0, 1)


def test_what_is_learned_after_training(trained, completed):
    unit, data, _, bundle = trained
    val, test = decided(unit, "val"), decided(unit, "test")
    assert val.level == "case" and len(val) == len(np.unique(data.cases[data.splits["val"]]))
    assert completed.calibration["images"] == len(val) and completed.calibration["folds"] >= 2
    band = completed.uncertain_band
    assert band["low"] <= completed.operating_point["threshold"] <= band["high"]
    referred = np.mean((test.scores >= band["low"]) & (test.scores <= band["high"]))
    assert band["test"]["referred"] == pytest.approx(referred)
    assert completed.calibration["test"]["before"]["brier"] == pytest.approx(completed.metrics["test"]["brier"])
    assert completed.ood["k"] == 5 and completed.ood["stored"] == len(data.splits["train"])
    assert set(completed.extras) == {"ood.means", "ood.whiten", "ood.bank", "trained_on"}
    seen = np.concatenate([data.content[data.splits[split]] for split in ("train", "val")])
    assert np.array_equal(bundle.extras["trained_on"].numpy(), np.sort(seen.view(np.int64)))
    assert completed.licences == {
        "weights": {"name": NOT_STATED, "source": NOT_STATED}, "data": {"name": "CC BY 4.0", "source": "drawn"}
    }  # fmt: skip
    assert completed.intended_use == NOT_STATED and completed.metrics == bundle.metrics
    assert completed.contract == {
        "modality": "DX", "body_part": NOT_STATED, "size": 16, "channels": 1, "photometric": "MONOCHROME2", "bits": 16,
        "images_per_prediction": 1, "views_per_case": 3, "views": ["a", "b", "c"],
        "file_kinds": ["PNG", "JPEG", "TIFF", "DICOM", "NIfTI"],
    }  # fmt: skip


def test_foreign_images_are_flagged(trained, completed):
    """Checkerboards are nothing like noise with a patch; every second image of the test split is left alone."""
    unit, data, _, _ = trained
    test, predictor = predictions(unit, "test"), Predictor.from_bundle(completed)
    rng = np.random.default_rng(0)
    board = (np.indices((16, 16)).sum(0) // 4 % 2 * 200).astype(np.uint8)
    boards = [board + rng.integers(0, 40, (16, 16), dtype=np.uint8) for _ in range(30)]
    flagged = [p.ood["foreign"] for p in predictor(boards)]
    own = [p.ood["foreign"] for p in predictor(images_of(trained, test["rows"]))]
    assert np.mean(flagged) > 0.9 and np.mean(own) < 0.5
    own_features = predictor.data_features(data, test["where"])
    found = with_separation(completed, own_features, {"boards": predictor.features(boards)}).ood["separation"]
    assert found["foreign"]["boards"]["flagged"] == np.mean(flagged) and found["inside"]["flagged"] == np.mean(own)
    assert found["foreign"]["boards"]["mahalanobis"] > 0.95 and found["foreign"]["boards"]["knn"] > 0.95


def test_a_bundle_without_more_than_training_left_still_predicts(trained):
    unit, _, _, bundle = trained
    test, predictor = predictions(unit, "test"), Predictor.from_bundle(bundle)
    found = predictor(images_of(trained, test["rows"][:3]))
    assert [(p.uncertain, p.ood, p.probability == p.raw_probability) for p in found] == [(None, None, True)] * 3
    assert predictor.band is None and predictor.threshold == pytest.approx(bundle.operating_point["threshold"])
    assert set(found[0].row()) == {"probability", "raw_probability", "decision", "threshold", "uncertain"}


def test_a_row_is_flat_and_strict_json(trained, completed):
    rng = np.random.default_rng(0)
    row = Predictor.from_bundle(completed)([rng.integers(0, 255, (16, 16), dtype=np.uint8)])[0].row()
    assert list(row)[-3:] == ["mahalanobis", "knn", "foreign"] and "ood" not in row
    assert {type(value) for value in row.values()} == {float, str, bool} and to_json(row)


def test_one_module_holds_all_of_it(trained, completed):
    """`network` alone, exported and run, gives what the predictor says."""
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 255, (18, 22), dtype=np.uint8) for _ in range(3)]
    predictor = Predictor.from_bundle(completed)
    image = predictor.input_image(images)
    exported = torch.export.export(predictor.network, (image,), dynamic_shapes=({0: torch.export.Dim("b", min=1)},))
    logit, mahalanobis, knn = exported.module()(image)
    for i, p in enumerate(predictor(images)):
        assert float(Calibration()(logit[i].item())) == pytest.approx(p.raw_probability, abs=1e-6)
        assert (mahalanobis[i].item(), knn[i].item()) == pytest.approx((p.ood["mahalanobis"], p.ood["knn"]), rel=1e-4)


@pytest.mark.parametrize(
    ("image", "why"),
    [
        (np.full((20, 20), 7, np.uint8), "image 1: all pixels have one value"),
        (np.zeros((0, 20), np.uint8), "image 1: is empty"),
        (np.ones((20, 20), np.float32), r"image 1: .* got \(20, 20\) float32"),
        (np.ones((20, 20, 4), np.uint8), r"got \(20, 20, 4\) uint8"),
        (np.ones((1, 3, 20, 20), np.uint8), r"got \(1, 3, 20, 20\)"),
        ([[1, 2], [3, 4]], "got None None"),
    ],
)
def test_what_is_no_image_is_refused_by_its_place(image, why, trained, completed):
    fine = np.arange(400, dtype=np.uint8).reshape(20, 20)
    with pytest.raises(UserError, match=why):
        Predictor.from_bundle(completed)([fine, image])


def test_the_place_counts_over_batches(completed):
    fine = np.arange(256, dtype=np.uint8).reshape(16, 16)
    with pytest.raises(UserError, match="image 130: all pixels"):
        Predictor.from_bundle(completed)([fine] * 130 + [fine * 0])


@pytest.mark.parametrize("pixels", [torch.zeros(1, 1, 8, 8, dtype=torch.uint8), torch.zeros(2, 1, 16, 16)])
def test_pixels_of_another_kind_are_refused(pixels, completed):
    with pytest.raises(UserError, match=r"pixels must be \(B, 1, 16, 16\) uint8 or uint16"):
        Predictor.from_bundle(completed).from_pixels(pixels)


def test_nothing_in_nothing_out(completed):
    assert Predictor.from_bundle(completed)([]) == []


@pytest.mark.parametrize(
    ("change", "why"), [({"kind": "segmenter"}, "not a classifier"), ({"operating_point": {}}, "no operating point")]
)
def test_another_kind_of_bundle_is_refused(change, why, completed):
    with pytest.raises(UserError, match=why):
        Predictor.from_bundle(replace(completed, **change))


@pytest.mark.parametrize(("names", "other"), [(["a", "b"], "a"), (["a", "b", "c"], "not b")])
def test_the_name_of_the_other_class(names, other, trained, completed):
    board = np.tile(np.arange(16, dtype=np.uint8), (16, 1))
    classes = {"names": names, "positive": "b"}
    for threshold, expected in ((0.0, "b"), (1.0, other)):
        bundle = replace(completed, classes=classes, operating_point={"threshold": threshold})
        assert Predictor.from_bundle(bundle)([board])[0].decision == expected


def test_a_case_is_decided_by_its_images_together(trained, completed):
    unit, _, _, _ = trained
    test = predictions(unit, "test")
    predictor = Predictor.from_bundle(completed)
    alone = predictor(images_of(trained, test["rows"][:3]))
    together = predictor.case(alone)
    raw = np.mean([p.raw_probability for p in alone])
    assert together.raw_probability == pytest.approx(raw, abs=1e-12) and together.images == tuple(alone)
    assert together.probability == pytest.approx(float(predictor.calibration(logit([raw]))[0]))
    assert together.decision == ("patch" if raw >= completed.operating_point["threshold"] else "plain")
    assert together.num_foreign == sum(p.ood["foreign"] for p in alone) and together.threshold == predictor.threshold
    single = predictor.case(alone[:1])
    assert (single.probability, single.decision) == (pytest.approx(alone[0].probability), alone[0].decision)
    highest = replace(completed, operating_point=completed.operating_point | {"aggregate": "max"})
    found = Predictor.from_bundle(highest).case(alone)
    assert found.raw_probability == max(p.raw_probability for p in alone)
    with pytest.raises(UserError, match="a case without an image"):
        predictor.case([])


@pytest.mark.parametrize("kind", ["temperature", "isotonic"])
def test_other_calibrations_are_used_as_they_were_fitted(trained, completed, kind):
    values = (
        {"temperature": 0.5}
        if kind == "temperature"
        else {"logits": [-1.0, 0.0, 1.0], "probabilities": [0.1, 0.3, 0.9]}
    )
    bundle = replace(completed, calibration={"kind": kind, **values})
    unit, _, _, _ = trained
    predictor = Predictor.from_bundle(bundle)
    for p in predictor(images_of(trained, predictions(unit, "test")["rows"][:4])):
        at = float(logit(p.raw_probability))
        expected = (
            expit(at / 0.5) if kind == "temperature" else np.interp(at, values["logits"], values["probabilities"])
        )
        assert p.probability == pytest.approx(expected, abs=1e-6)


def test_probability_and_threshold_tell_the_decision_also_on_a_flat_step(completed):
    flat = {"kind": "isotonic", "logits": [-9.0, 9.0], "probabilities": [0.3, 0.3]}
    predictor = Predictor.from_bundle(replace(completed, calibration=flat))
    at = completed.operating_point["threshold"]
    raw = np.array([0.01, np.nextafter(at, 0), at, np.nextafter(at, 1), 0.99])
    told = predictor.told(raw)
    assert (told >= predictor.threshold).tolist() == [False, False, True, True, True]
    assert told == pytest.approx(0.3, abs=1e-12)
