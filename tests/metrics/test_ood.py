"""Foreign features are told from known ones, and the stated rate of false alarms is that of new images."""

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist, mahalanobis
from scipy.stats import binom
from sklearn.covariance import LedoitWolf
from sklearn.neighbors import NearestNeighbors

from raymed.config import UserError
from raymed.data.preprocess import Preprocess
from raymed.metrics.ood import FeatureDistances, fit_ood, is_foreign, separation
from raymed.models.resnet import ResNetSmall

D = 48


def known(rng: np.random.Generator, num: int, first_patient: int = 0):
    """Features, labels and patients (two images each) of two classes with one covariance."""
    labels = (rng.random(num) < 0.3).astype(int)
    scale = np.linspace(0.2, 2, D)
    features = 5 + 2 * labels[:, None] * (np.arange(D) < 8) + rng.normal(size=(num, D)) * scale
    return features.astype(np.float32), labels, first_patient + np.arange(num) // 2


def test_the_distances_are_those_of_scipy_and_scikit_learn():
    rng = np.random.default_rng(0)
    features, labels, _ = known(rng, 300)
    new = known(rng, 20)[0]
    scores = FeatureDistances.fit(features, labels, k=3).score(new)
    means = np.stack([features[labels == c].mean(0) for c in (0, 1)]).astype(np.float64)
    precision = LedoitWolf(assume_centered=True).fit(features - means[labels]).precision_
    expected = [min(mahalanobis(x, mean, precision) for mean in means) for x in new]
    np.testing.assert_allclose(scores["mahalanobis"], expected, rtol=1e-4)
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    neighbours = NearestNeighbors(n_neighbors=3).fit(unit)
    distance, _ = neighbours.kneighbors(new / np.linalg.norm(new, axis=1, keepdims=True))
    np.testing.assert_allclose(scores["knn"], distance[:, 2], rtol=1e-4)


def test_close_features_keep_their_digits():
    """A contrastive encoder puts a class almost on one point, where 2 - 2 cos is zero in float32."""
    rng = np.random.default_rng(0)
    features = 1 + 1e-4 * rng.normal(size=(50, D))
    found = FeatureDistances.fit(features, np.zeros(50), k=1).score(features[:5] + 1e-5 * rng.normal(size=(5, D)))
    unit = torch.nn.functional.normalize(torch.from_numpy(features)).numpy()
    assert cdist(unit, unit).max() < 1e-3 and (found["knn"] > 0).all() and (found["knn"] < 1e-4).all()


def test_many_features_are_thinned_out_alike_every_time():
    rng = np.random.default_rng(0)
    features = rng.normal(size=(2300, 4))
    first, second = (FeatureDistances.fit(features, np.zeros(2300)) for _ in range(2))
    assert first.bank.shape == (2000, 4) and torch.equal(first.bank, second.bank)


@pytest.mark.parametrize(
    ("name", "score"),
    [("shifted", "mahalanobis"), ("shifted", "knn"), ("unused direction", "mahalanobis"), ("turned", "knn")],
)
def test_other_distributions_are_told_apart(name, score):
    rng = np.random.default_rng(0)
    train, val, test = known(rng, 600), known(rng, 200, 1000), known(rng, 200, 2000)[0]
    other = known(rng, 200)[0]
    foreign = {
        "shifted": other + 2 * np.where(np.arange(D) % 2, -1, 1),
        "unused direction": np.where(np.arange(D) == 0, other + 4, other),
        "turned": other[:, ::-1] * np.where(np.arange(D) % 2, -1, 1),
    }[name]
    distances, described = fit_ood(train, val)
    found = separation(distances, described["thresholds"], test, {name: foreign})
    assert found["foreign"][name][score] > 0.95 and found["foreign"][name]["flagged"] > 0.8
    assert found["inside"]["flagged"] < 0.12 and found["inside"]["images"] == 200
    same = separation(distances, described["thresholds"], test, {"same": other})["foreign"]["same"]
    assert 0.4 < same[score] < 0.6


def rates(train, val, fresh) -> tuple[float, float, str]:
    """False alarms on fresh features: by the thresholds of `fit_ood`, and by the quantiles of the training features."""
    distances, described = fit_ood(train, val)
    scores, own = distances.score(fresh), distances.score(train[0])
    naive = {name: float(np.quantile(values, 0.975)) for name, values in own.items()}
    honest = is_foreign(scores, described["thresholds"]).mean()
    return float(honest), float(is_foreign(scores, naive).mean()), described["threshold_from"]


@pytest.mark.parametrize(("num_val", "source"), [(1200, "validation"), (20, "cross-validation")])
def test_the_rate_of_false_alarms_is_as_stated_on_new_images(num_val, source):
    """At most 5 % and, as the two scores agree in part, at least half of that, within the binomial error of the images
    that the thresholds come from. Quantiles of the training features themselves promise 5 % and give twice that.
    """
    rng = np.random.default_rng(1)
    honest, naive, where = rates(known(rng, 250), known(rng, num_val, 1000), known(rng, 4000)[0])
    assert where == source
    num = num_val if source == "validation" else 250 + num_val
    low, high = binom.ppf([0.01, 0.99], num, [0.025, 0.05]) / num
    assert low < honest < high
    assert naive > 2 * 0.05


def test_features_that_the_encoder_has_fitted_are_no_measure():
    """The encoder pulls its training images together: out of fold over them the rate is far above the stated one, over
    validation images it holds. That is why those come first."""
    rng = np.random.default_rng(2)
    train, val, fresh = known(rng, 800), known(rng, 600, 1000), known(rng, 3000)[0]
    centre = np.stack([train[0][train[1] == c].mean(0) for c in (0, 1)])[train[1]]
    tight = (centre + 0.7 * (train[0] - centre), train[1], train[2])
    honest, _, source = rates(tight, val, fresh)
    few, _, other = rates(tight, tuple(values[:20] for values in val), fresh)
    assert (source, other) == ("validation", "cross-validation")
    assert honest < 0.075 and few > 0.3


def test_few_patients_promise_what_they_can():
    """Nine patients: no threshold among ten can be exceeded by less than one in ten, and there are two thresholds."""
    rng = np.random.default_rng(3)
    features, labels, _ = known(rng, 60)
    train = features[:45], labels[:45], np.arange(45) // 9
    _, described = fit_ood(train, (features[45:], labels[45:], 5 + np.arange(15) // 4))
    assert described["threshold_from"] == "cross-validation" and described["patients"] == 9
    assert described["fpr"] == pytest.approx(0.2) and np.isfinite(list(described["thresholds"].values())).all()


def test_false_alarms_are_told_by_class():
    rng = np.random.default_rng(4)
    train = known(rng, 400)
    features, labels, patients = known(rng, 300, 1000)
    features = features + 3 * np.outer(
        labels, (-1) ** np.arange(D)
    )  # positives of the validation split look like nothing seen before
    _, described = fit_ood(train, (features, labels, patients), fpr=0.3)
    flagged = described["flagged"]
    assert flagged["positive"] > 0.4 > 0.05 > flagged["negative"]
    by_class = [flagged["negative"], flagged["positive"]]
    assert flagged["all"] == pytest.approx(np.average(by_class, weights=np.bincount(labels)))


@pytest.mark.parametrize(("value", "match"), [(np.nan, "5 training images are not finite"), (1.0, "collapsed")])
def test_an_encoder_that_failed_is_named(value, match):
    features = np.ones((20, 4))
    features[:5] = value
    with pytest.raises(UserError, match=match):
        FeatureDistances.fit(features, np.arange(20) % 2)


def test_features_that_are_never_on_do_no_harm():
    rng = np.random.default_rng(5)
    features = np.maximum(rng.normal(size=(30, 64)), 0) * (np.arange(64) < 40)
    scores = FeatureDistances.fit(features, np.arange(30) % 2).score(features)
    assert np.isfinite(scores["mahalanobis"]).all() and np.isfinite(scores["knn"]).all()


@torch.inference_mode()
def test_ultrasound_and_radiographs_are_told_apart(data_dir):
    """Even an untrained encoder sees that breast ultrasound is no chest radiograph."""
    from PIL import Image

    with np.load(data_dir / "pneumoniamnist" / "pneumoniamnist.npz") as npz:
        chests, labels = npz["train_images"][:700], npz["train_labels"][:700, 0]
    scans = sorted((data_dir / "busi_seg" / "images").iterdir())[:60]
    breasts = [np.asarray(Image.open(path).convert("L")) for path in scans]
    preprocess = Preprocess(size=28, normalisation="image")
    torch.manual_seed(0)
    encoder = ResNetSmall(1).eval()

    def features(images) -> np.ndarray:
        pixels = np.stack([preprocess.to_array(image) for image in images]).transpose(0, 3, 1, 2)
        image = preprocess.normalise(torch.from_numpy(pixels / np.float32(255)))
        return encoder.forward_head(encoder.forward_features(image), pre_logits=True).numpy()

    chest, breast, patients = features(chests), features(breasts), np.arange(700)
    distances, described = fit_ood(
        (chest[:400], labels[:400], patients[:400]), (chest[400:550], labels[400:550], patients[400:550])
    )
    found = separation(distances, described["thresholds"], chest[550:], {"ultrasound": breast})
    assert found["inside"]["flagged"] < 0.12
    assert max(found["foreign"]["ultrasound"][name] for name in ("mahalanobis", "knn")) > 0.95
