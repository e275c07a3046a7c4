"""Attention finds the decisive image where there is one, and stays the mean where there is none."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.special import expit
from sklearn.metrics import log_loss, roc_auc_score

from raymed.bundle import Bundle
from raymed.config import UserError, to_json
from raymed.metrics.calibration import Calibration, logit_of
from raymed.metrics.levels import AGGREGATES, aggregate
from raymed.models.attention_pool import AttentionPool, pooled
from raymed.tasks.attention import (
    CaseImages,
    FeatureMeter,
    attention_tensors,
    fit_attention,
    image_energies,
    load_attention,
)

VIEWS, WIDTH = 4, 12


def case_images(seed: int, num_cases: int, decisive: bool) -> CaseImages:
    """Cases of VIEWS images, in no order, 30 % positive. decisive: one image of each, anywhere among the others, is
    marked by one feature; its logit tells the class, those of the others are noise. Otherwise all tell it alike."""
    random = np.random.default_rng(seed)
    targets = (random.random(num_cases) < 0.3).astype(int)
    cases, told = np.repeat(np.arange(num_cases), VIEWS), np.repeat(2 * targets - 1, VIEWS)
    features, noise = random.normal(size=(len(cases), WIDTH)), random.normal(size=len(cases))
    marked = np.zeros(len(cases), bool)
    marked[np.arange(num_cases) * VIEWS + random.integers(VIEWS, size=num_cases)] = True
    if decisive:
        features[marked, 3] += 3
        logits = np.where(marked, noise + 2 * told, 2 * noise)
    else:
        logits = 0.7 * told + noise
    order = random.permutation(len(cases))
    return CaseImages(features[order], logits[order], 10 * cases[order], targets)


def compared(pool: AttentionPool, images: CaseImages) -> dict[str, np.ndarray]:
    """Name of a rule -> scores of cases."""
    scores = {how: aggregate(expit(images.logits), images.cases, how)[0] for how in AGGREGATES}
    energies = image_energies(pool, images.features)
    for name, values in (("attention", energies), ("mean of logits", 0 * energies)):
        scores[name] = pooled(images.logits, values, images.cases)[0]
    return scores


def marked_too_high(images: CaseImages) -> CaseImages:
    """The first image of each case, marked, with a logit that is higher by 3 whatever the class."""
    first = np.isin(np.arange(len(images.cases)), np.unique(images.cases, return_index=True)[1])
    features = images.features + 3 * first[:, None] * (np.arange(WIDTH) == 3)
    return replace(images, features=features, logits=images.logits + 3 * first)


def calibrated_loss(scores: np.ndarray, images: CaseImages) -> float:
    """Negative log-likelihood of a case after Platt scaling."""
    logits = logit_of(scores)
    return log_loss(images.targets, Calibration.fit(logits, images.targets)(logits))


@pytest.mark.parametrize("seed", range(4))
def test_it_finds_the_decisive_image(seed):
    train, val, test = (case_images(10 * seed + k, num, decisive=True) for k, num in enumerate((150, 50, 600)))
    pool, report = fit_attention(train, val, seed)
    auroc = {name: roc_auc_score(test.targets, scores) for name, scores in compared(pool, test).items()}
    others = max(value for name, value in auroc.items() if name != "attention")
    assert auroc["attention"] > 0.94 and auroc["attention"] > others + 0.08, auroc
    assert report["applied"] and report["steps"] > 0
    energies = image_energies(pool, test.features)
    assert roc_auc_score(test.features[:, 3] > 2, energies) > 0.9  # the mark, and not the class


def test_without_a_decisive_image_it_is_no_worse_than_the_mean():
    loss, auroc, applied = [], [], []
    for seed in range(6):
        train, val, test = (
            case_images(100 + 10 * seed + k, num, decisive=False) for k, num in enumerate((100, 40, 400))
        )
        pool, report = fit_attention(train, val, seed)
        scores = compared(pool, test)
        told = [
            (log_loss(test.targets, scores[n]), roc_auc_score(test.targets, scores[n]))
            for n in ("attention", "mean of logits")
        ]
        loss.append(told[0][0] - told[1][0])
        auroc.append(told[0][1] - told[1][1])
        applied.append(report["applied"])
    assert sum(applied) <= 2
    assert np.mean(loss) < 0.005 and np.mean(auroc) > -0.003
    assert max(loss) < 0.05 and min(auroc) > -0.03


@pytest.mark.parametrize("decisive", [True, False])
def test_on_validation_it_is_never_worse_than_the_mean(decisive):
    for seed in range(3):
        train, val = case_images(seed, 60, decisive), case_images(50 + seed, 30, decisive)
        pool, report = fit_attention(train, val, seed)
        scores = compared(pool, val)
        before, after = (calibrated_loss(scores[name], val) for name in ("mean of logits", "attention"))
        assert report["before"]["nll"] == pytest.approx(before, rel=1e-4)
        assert report["after"]["nll"] == pytest.approx(after, rel=1e-4)
        assert report["after"]["nll"] <= report["before"]["nll"]
        assert json.loads(to_json(report)) == report


def test_logits_that_are_all_too_high_are_no_reason():
    loss, auroc = [], []
    for seed in range(4):
        train, val, test = (
            marked_too_high(case_images(200 + 10 * seed + k, num, decisive=False))
            for k, num in enumerate((100, 40, 400))
        )
        scores = compared(fit_attention(train, val, seed)[0], test)
        loss.append(calibrated_loss(scores["attention"], test) - calibrated_loss(scores["mean of logits"], test))
        auroc.append(roc_auc_score(test.targets, scores["attention"]))
        auroc[-1] -= roc_auc_score(test.targets, scores["mean of logits"])
    assert max(loss) < 0.03 and min(auroc) > -0.01, (loss, auroc)


def test_a_training_set_without_errors_leaves_the_mean():
    train, val = case_images(0, 80, decisive=True), case_images(1, 40, decisive=True)
    signs = 2 * train.targets[train.cases // 10] - 1
    pool, report = fit_attention(replace(train, logits=60.0 * signs), val, 0)
    assert not report["applied"] and report["steps"] == 0 and report["weight_decay"] is None
    assert report["after"] == report["before"]
    assert np.array_equal(image_energies(pool, val.features), np.zeros(len(val.logits)))


def test_one_validation_case_proves_nothing():
    train = case_images(0, 80, decisive=True)
    val = CaseImages(train.features[:2], train.logits[:2], np.zeros(2, int), np.array([1]))
    assert not fit_attention(train, val, 0)[1]["applied"]


def test_the_same_seed_gives_the_same_bits_on_any_number_of_threads():
    train, val = case_images(0, 80, decisive=True), case_images(1, 40, decisive=True)
    threads, drawn = torch.get_num_threads(), []
    try:
        for num in (1, 2):
            torch.set_num_threads(num)
            torch.manual_seed(num)
            drawn.append(fit_attention(train, val, 5)[0].state_dict())
            assert torch.get_num_threads() == num
            after = torch.rand(1)
            torch.manual_seed(num)
            assert torch.equal(after, torch.rand(1))  # nobody else's random numbers are used up
    finally:
        torch.set_num_threads(threads)
    assert drawn[0].keys() == drawn[1].keys() and all(torch.equal(drawn[0][n], drawn[1][n]) for n in drawn[0])
    other = fit_attention(train, val, 6)[0].state_dict()
    assert not torch.equal(other["signal.weight"], drawn[0]["signal.weight"])


def test_features_that_never_vary_and_their_units_do_not_matter():
    train, val = case_images(0, 100, decisive=True), case_images(1, 40, decisive=True)
    pool, report = fit_attention(train, val, 0)
    scaled = [replace(images, features=images.features * 1e3 + 7) for images in (train, val)]
    assert fit_attention(*scaled, 0)[1]["after"]["nll"] == pytest.approx(report["after"]["nll"], abs=1e-3)
    dead = [replace(images, features=images.features * (np.arange(WIDTH) != 0)) for images in (train, val)]
    pool, report = fit_attention(*dead, 0)
    assert report["applied"] and np.isfinite(image_energies(pool, dead[1].features)).all()


def test_it_travels_in_a_bundle(tmp_path):
    train, val = case_images(0, 80, decisive=True), case_images(1, 40, decisive=True)
    pool, _ = fit_attention(train, val, 0, hidden=7)
    other = {"ood.means": torch.zeros(2, 3)}
    bundle = Bundle("classifier", {"w": torch.zeros(1)}, {}, {}, {}, extras=other | attention_tensors(pool))
    loaded = load_attention(Bundle.load(bundle.save(tmp_path / "bundle")).extras)
    assert loaded is not None and not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    assert np.array_equal(image_energies(loaded, val.features), image_energies(pool, val.features))
    assert load_attention(other) is None


def test_what_cannot_be_used_is_said():
    train, val = case_images(0, 20, decisive=True), case_images(1, 10, decisive=True)
    with pytest.raises(UserError, match="12 and 5 numbers: of two encoders"):
        fit_attention(train, replace(val, features=val.features[:, :5]), 0)
    with pytest.raises(UserError, match=r"of 20 cases, and \(19,\) targets"):
        replace(train, targets=train.targets[1:])
    with pytest.raises(UserError, match=r"got \(80, 12\), \(79,\)"):
        replace(train, logits=train.logits[1:])
    with pytest.raises(UserError, match="one target a case"):
        CaseImages(np.empty((0, 3)), np.empty(0), np.empty(0, int), np.empty(0))
    with pytest.raises(UserError, match="not finite"):
        replace(train, logits=np.full_like(train.logits, np.nan))


def test_features_of_several_workers_stand_in_the_order_of_the_manifest():
    random = torch.Generator().manual_seed(0)
    rows = torch.tensor([11, 4, 8, 2, 9, 4])  # row 4 twice: padding
    features, logits = torch.randn(6, 3, generator=random), torch.randn(6, generator=random)
    features[5], logits[5] = features[1], logits[1]
    first, second = FeatureMeter(), FeatureMeter()
    for meter, part in ((first, slice(0, 2)), (second, slice(2, 4)), (second, slice(4, 6))):
        meter.update({"features": features[part], "logit": logits[part]}, None, rows[part])
    first.merge(second)
    order = [3, 1, 2, 4, 0]
    assert first.index.tolist() == [2, 4, 8, 9, 11] and first.compute() == {}
    assert np.array_equal(first.features, features[order].numpy())
    assert np.array_equal(first.logits, logits[order].double().numpy())
