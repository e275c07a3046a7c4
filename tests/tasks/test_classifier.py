"""The classifier recipe: which phases a method has, what moves in them, and what leaves training."""

import warnings
from dataclasses import fields, replace

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from raymed import config
from raymed.bundle import Bundle
from raymed.config import UserError
from raymed.data.augment import Augment
from raymed.data.dataset import load
from raymed.data.manifest import DataConfig
from raymed.losses import LOSSES
from raymed.tasks.classifier import METHODS, ClassifierRecipe, ContrastiveStage, Stage, load_classifier
from raymed.tasks.task import Optim
from raymed.train.checkpoints.checkpoint import load_weights
from raymed.train.compute import Compute
from raymed.train.loop import Fit
from raymed.train.nets import Networks

COMPUTE = Compute()


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """Six steps a phase on 60 random 16 x 16 images of 20 patients, one in four positive."""
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(3)
    for i in range(60):
        pixels = rng.integers(0, 160, (16, 16)) + 80 * (i % 4 == 0)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")
    labels = ["bright" if i % 4 == 0 else "dark" for i in range(60)]
    table = {"image": [f"{i}.png" for i in range(60)], "label": labels, "patient": [i // 3 for i in range(60)]}
    pd.DataFrame(table).to_csv(folder / "manifest.csv", index=False)
    optim = Optim(lr=5e-3)
    return ClassifierRecipe(
        data=DataConfig(manifest=str(folder / "manifest.csv"), positive="bright"),
        supcon=ContrastiveStage(steps=6, batch_size=8, evaluations=2, optim=optim),
        single=Stage(steps=6, batch_size=8, evaluations=2, optim=optim),
        head=Stage(steps=6, batch_size=8, evaluations=2, optim=optim),
    )


@pytest.fixture(scope="module")
def data(recipe, tmp_path_factory):
    return load(recipe.data, tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def supcon(recipe, data, tmp_path_factory):
    """The folder of a trained SupCon encoder's checkpoint."""
    fit = Fit([recipe.encoder_phase(data)], data, tmp_path_factory.mktemp("supcon"), 1, COMPUTE)
    list(fit.run())
    return fit.checkpoints("supcon").find("best")


@pytest.mark.parametrize("method", METHODS)
def test_a_method_is_its_phases_and_its_loss(method, recipe, data):
    phases = replace(recipe, method=method).phases(data)
    two_stage, loss = method.startswith("supcon_"), method.removeprefix("supcon_")
    assert [phase.name for phase in phases] == (["supcon", "head"] if two_stage else ["single"])
    last = phases[-1]
    assert type(last.task.loss) is LOSSES[loss] and last.task.joint is not two_stage
    assert (last.monitor, last.mode) == ("auprc", "max") and last.cache is two_stage
    assert last.starts_from == ({"encoder": "supcon.best"} if two_stage else {})
    assert set(last.task.networks()) == ({"encoder", "head"} if two_stage else {"classifier"})
    if two_stage:
        assert phases[0].monitor is None and phases[0].balanced and phases[0].task.networks().keys() == {"contrastive"}


def test_every_loss_is_two_methods():
    assert {"ce", "focal", "asl", "supcon_ce", "supcon_focal", "supcon_asl"} <= set(METHODS)
    assert set(METHODS) == {*LOSSES, *(f"supcon_{name}" for name in LOSSES)}
    with pytest.raises(UserError, match="did you mean 'supcon_asl'"):
        ClassifierRecipe(method="supconasl")


def test_hyper_parameters_reach_the_loss(recipe, data):
    changed = config.replace(recipe, {"losses.asl.gamma_neg": 1.5, "supcon.loss.temperature": 0.3})
    first, head = changed.phases(data)
    assert head.task.loss.gamma_neg == 1.5 and first.task.stage.loss.temperature == 0.3


def test_the_bias_starts_at_the_log_odds_of_a_batch(recipe, data):
    rate = data.labels[data.splits["train"]].mean()
    for balanced, expected in ((False, np.log(rate / (1 - rate))), (True, 0.0)):
        phase = config.replace(recipe, {"method": "ce", "single.balanced": balanced}).phases(data)[0]
        head = Networks(phase, 1, COMPUTE).module("classifier").head
        assert head.linear.bias.item() == pytest.approx(expected, abs=1e-6)


def test_a_frozen_encoder_does_not_move(recipe, data, supcon, tmp_path):
    """Neither its weights nor the statistics of its normalisation, cached or not."""
    before = {k: v for k, v in load_weights(supcon).items() if k.startswith("contrastive.encoder.")}
    assert any(k.endswith("running_var") for k in before)
    for cache in (True, False):
        (phase,) = config.replace(recipe, {"supcon.encoder_from": str(supcon)}).phases(data)
        fit = Fit([replace(phase, cache=cache)], data, tmp_path / str(cache), 1, COMPUTE)
        start = Networks(phase, 1, COMPUTE).weights(averaged=False)
        list(fit.run())
        after = load_weights(fit.checkpoints("head").find("last"))
        for name, weight in before.items():
            assert torch.equal(after[name.removeprefix("contrastive.")], weight), name
        assert not torch.equal(after["head.linear.weight"], start["head.linear.weight"])


def test_heads_share_an_encoder(recipe, data, supcon, tmp_path):
    shared = config.replace(recipe, {"supcon.encoder_from": str(supcon)})
    heads = {}
    for method in ("supcon_ce", "supcon_asl"):
        phases = replace(shared, method=method).phases(data)
        assert [phase.name for phase in phases] == ["head"]
        fit = Fit(phases, data, tmp_path / method, 1, COMPUTE)
        list(fit.run())
        heads[method] = load_weights(fit.checkpoints("head").find("best"))
    ce, asl = heads.values()
    assert all(torch.equal(ce[name], asl[name]) for name in ce if name.startswith("encoder."))
    assert not torch.equal(ce["head.linear.weight"], asl["head.linear.weight"])


@pytest.mark.parametrize("method", ["supcon_asl", "focal"])
def test_a_bundle_predicts_what_the_task_does(method, recipe, data, supcon, tmp_path):
    changed = config.replace(
        recipe,
        {"method": method, "supcon.encoder_from": str(supcon), "data.preprocess.normalisation": "dataset"},
    )
    data = replace(data, preprocess=replace(data.preprocess, normalisation="dataset", mean=(0.4,), std=(0.2,)))
    fit = Fit(changed.phases(data), data, tmp_path, 1, COMPUTE)
    list(fit.run())
    networks, _ = fit.best()
    task, batch = fit.phases[-1].task, data.batch(data.splits["test"])
    with torch.no_grad():
        expected = torch.sigmoid(task.predict(batch, networks)["logit"])
    loaded = Bundle.load(task.bundle(networks).save(tmp_path / "bundle"))
    assert loaded.classes == {"names": ["bright", "dark"], "positive": "bright"}
    classifier, preprocess = load_classifier(loaded)
    assert not classifier.training and preprocess == data.preprocess
    with torch.no_grad():
        found = torch.sigmoid(classifier(preprocess.normalise(batch.unit_image())))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert expected.std() > 1e-4
    with pytest.raises(UserError, match="holds a detector, not a classifier"):
        load_classifier(replace(loaded, kind="detector"))


def test_two_views_differ_and_belong_to_the_sample(recipe, data):
    from raymed.tasks.task import Step

    task = recipe.encoder_phase(data).task
    rows = data.splits["train"][:6]
    views = task._views(data.batch(rows), Step(3, 5, 0, ()))
    assert views.shape == (6, 2, 1, 16, 16) and not torch.allclose(views[:, 0], views[:, 1])
    alone = task._views(data.batch(rows[4:5]), Step(3, 5, 1, ()))
    torch.testing.assert_close(alone[0], views[4], rtol=1e-5, atol=1e-5)
    still = replace(task, augment=Augment(**{field.name: 0.0 for field in fields(Augment)}))
    plain = still._views(data.batch(rows), Step(3, 5, 0, ()))
    torch.testing.assert_close(plain[:, 0], task.preprocess.normalise(data.batch(rows).unit_image()))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 1}, "batch_size must be >= 2, got 1"),
        ({"accumulate": 0}, "accumulate must be >= 1, got 0"),
        ({"steps": 5, "evaluations": 6}, "evaluations must be >= 1 and <= 5, got 6"),
        ({"ema_decay": 1.0}, "ema_decay must be >= 0 and < 1, got 1"),
        ({"patience": 0}, "patience must be >= 1, got 0"),
    ],
)
def test_bad_stages_are_named(changes, message):
    with pytest.raises(UserError, match=message):
        Stage(**changes)


def test_options_without_effect_warn(recipe, data):
    with pytest.warns(UserWarning, match="compute.zero_stage has no effect with the torch engine"):
        Compute(zero_stage=1)
    with pytest.warns(UserWarning, match="supcon.patience has no effect"):
        ContrastiveStage(patience=2)
    head_only = Networks(recipe.phases(data)[1], 1, COMPUTE)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ClassifierRecipe()
        Compute(workers=2, zero_stage=2)
        COMPUTE.warn_where_useless([net.module for net in head_only.networks.values()])
        with pytest.raises(UserWarning, match="compute.channels_last has no effect"):
            COMPUTE.warn_where_useless([torch.nn.Linear(2, 2)])
