"""What a trained classifier is evaluated on has its classes, its preprocessing, and no split."""

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from raymed.bundle import Bundle
from raymed.config import UserError, to_dict
from raymed.data.manifest import DataConfig
from raymed.data.preprocess import Preprocess
from raymed.tasks.external import LabelledData, data_of

PREPROCESS = Preprocess(size=12, fit="letterbox", mean=(0.3,), std=(0.2,))


def bundle(names=("occluded", "patent"), kind="classifier") -> Bundle:
    classes = {"names": list(names), "positive": "occluded"}
    return Bundle(kind=kind, weights={}, model={}, preprocess=to_dict(PREPROCESS), classes=classes)


@pytest.fixture
def manifest(tmp_path):
    def write(labels, **columns):
        names = [f"{i}.png" for i in range(len(labels))]
        for i, name in enumerate(names):
            pixels = np.random.default_rng(i).integers(0, 255, (16, 20), np.uint8)
            Image.fromarray(pixels).save(tmp_path / name)
        pd.DataFrame({"image": names, "label": labels} | columns).to_csv(tmp_path / "manifest.csv", index=False)
        return str(tmp_path / "manifest.csv")

    return write


def read(path, tmp_path, model=None, **changes):
    config = data_of(model or bundle(), DataConfig(path, **changes))
    return config, LabelledData.read(config, tmp_path / "cache")


def test_every_row_is_of_the_test_split_as_the_model_reads_it(manifest, tmp_path):
    path = manifest(["patent", "occluded", "patent"], split=["train", "val", "test"])
    config, data = read(path, tmp_path)
    assert config.preprocess == data.preprocess == PREPROCESS and not data.measured
    assert (data.positive, config.positive) == ("occluded", "occluded") and data.labels.tolist() == [0, 1, 0]
    assert [len(data.splits[name]) for name in ("train", "val", "test")] == [0, 0, 3]


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (["patent", "normal", "occluded", "normal"], "does not know (rows): 'normal' (2)."),
        (["patent", "Occluded", "occluded"], "'Occluded' (1)"),
        (list("abcdefg"), "'a' (1), 'b' (1), 'c' (1), 'd' (1), 'e' (1), ..."),
        (["patent", "patent"], "no row has the label 'occluded'"),
    ],
)
def test_classes_that_are_not_the_model_s_are_named(manifest, tmp_path, labels, said):
    with pytest.raises(UserError) as error:
        read(manifest(labels), tmp_path, on_problem="skip")
    message = str(error.value)
    assert said in message and "The model tells 'occluded' from 'patent'" in message
    assert "--data.label COLUMN" in message and "--map" in message


def test_another_column_may_hold_them(manifest, tmp_path):
    path = manifest(["a", "b"], result=["patent", "occluded"])
    with pytest.raises(UserError, match=r"'a' \(1\), 'b' \(1\)"):
        read(path, tmp_path)
    assert read(path, tmp_path, label="result")[1].labels.tolist() == [0, 1]


def test_a_model_of_several_classes_needs_not_meet_all(manifest, tmp_path):
    model = bundle(("normal", "occluded", "polyp"))
    _, data = read(manifest(["polyp", "occluded"]), tmp_path, model)
    assert data.labels.tolist() == [0, 1] and data.classes == ("occluded", "polyp")


@pytest.mark.parametrize(
    ("model", "changes", "said"),
    [
        (bundle(), {"positive": "patent"}, "the model finds 'occluded'"),
        (bundle(), {"classes": ("a", "b")}, "--data.classes states 'a', 'b'"),
        (bundle(kind="clip"), {}, "the model is a clip"),
    ],
)
def test_what_contradicts_the_model_is_refused(model, changes, said):
    with pytest.raises(UserError, match=said):
        data_of(model, DataConfig("m.csv", **changes))


def test_the_positive_class_may_be_repeated():
    assert data_of(bundle(), DataConfig("m.csv", positive="occluded", classes=("patent", "occluded"))).positive


def test_phantoms_are_of_other_patients(tmp_path):
    manifest, changes = LabelledData().phantoms(tmp_path)
    table = pd.read_csv(manifest)
    assert table["patient"].nunique() == 120 and set(table["label"]) == {"occluded", "patent"}
    assert changes == {"data.deidentified": True}
