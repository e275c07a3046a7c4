"""A training that decides by attention: its bundle and its predictions say the same of every case."""

import numpy as np
import pytest
import torch
from test_predictor import OPTIM, write_images

import raymed.tasks.classifier as classifier
from raymed.bundle import Bundle
from raymed.config import UserError
from raymed.data.dataset import load
from raymed.data.manifest import DataConfig
from raymed.data.preprocess import Preprocess
from raymed.tasks.attention import CaseImages, fit_attention
from raymed.tasks.classifier import ClassifierRecipe, ContrastiveStage, Stage
from raymed.tasks.decide import Decide
from raymed.tasks.predictor import Predictor
from raymed.train.runs.results import decided, prediction
from raymed.train.unit import Unit, predictions, train_unit


def planted(train: CaseImages, val: CaseImages, seed: int):
    """An attention that differs from image to image, whether that helps or not."""
    pool, report = fit_attention(train, val, seed)
    pool.weight.copy_(torch.linspace(-2, 2, len(pool.weight)))
    return pool, report


@pytest.mark.parametrize("method", ["ce", "supcon_asl"])
def test_the_bundle_says_of_cases_what_training_said(tmp_path, method, monkeypatch):
    monkeypatch.setattr(classifier, "fit_attention", planted)
    write_images(tmp_path)
    preprocess = Preprocess(size=16, fit="letterbox")
    data = DataConfig(str(tmp_path / "manifest.csv"), positive="patch", deidentified=True, preprocess=preprocess)
    stage = Stage(steps=20, batch_size=12, evaluations=2, optim=OPTIM)
    supcon = ContrastiveStage(steps=20, batch_size=12, evaluations=2, optim=OPTIM)
    recipe = ClassifierRecipe(
        data=data, method=method, decide=Decide(aggregate="attention"), supcon=supcon, single=stage, head=stage
    )
    folder = tmp_path / "unit"
    unit = Unit(recipe=recipe, seed=3, folder=folder, key="k", name="n", parent=None, cache=tmp_path / "cache")
    figures = train_unit(unit)
    assert figures.keys() == {"val", "test"}
    bundle, images, found = Bundle.load(folder / "bundle"), load(data, unit.cache), predictions(unit, "test")
    assert (
        bundle.operating_point["aggregate"] == "attention" and bundle.operating_point["attention"]["cases"]["val"] > 0
    )
    predictor, pixels = Predictor.from_bundle(bundle), images.batch(found["where"]).image
    answers = predictor.from_pixels(torch.as_tensor(pixels))
    assert [answer.energy for answer in answers] == pytest.approx(found["energies"], abs=1e-4)
    assert np.ptp(found["energies"]) > 0.1 and "energy" not in answers[0].row()
    assert images.cases is not None
    cases, table = images.cases[found["where"]], decided(unit, "test")
    for case, score in zip(table.units, table.scores, strict=True):
        views = [answer for answer, of in zip(answers, cases, strict=True) if of == case]
        assert len(views) == 3
        assert predictor.case(views).raw_probability == pytest.approx(score, abs=1e-5)
        assert predictor.case(views[:1]).raw_probability == pytest.approx(views[0].raw_probability, abs=1e-12)
    assert np.array_equal(prediction(unit, "test", "image")[0], found["scores"])
    bundle.extras = {}
    with pytest.raises(UserError, match="holds none of its tensors"):
        Predictor.from_bundle(bundle)


def test_attention_needs_cases():
    with pytest.raises(UserError, match="no use for decide.unit image"):
        Decide(unit="image", aggregate="attention")
