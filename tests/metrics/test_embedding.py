"""The embedding meter against the definition, sample by sample."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from raymed.metrics.embedding import EmbeddingMeter, centroid_auroc


@pytest.fixture
def embedded():
    """(N, D) unit vectors of two overlapping classes, and targets."""
    rng = np.random.default_rng(4)
    targets = rng.permutation(np.arange(30) % 3 == 0).astype(int)
    z = rng.normal(size=(30, 5)) + targets[:, None] * 0.7
    return z / np.linalg.norm(z, axis=1, keepdims=True), targets


def test_equals_the_definition(embedded):
    z, targets = embedded
    scores = []
    for i in range(len(z)):
        others = np.arange(len(z)) != i
        c1, c0 = z[others & (targets == 1)].mean(0), z[others & (targets == 0)].mean(0)
        scores.append(z[i] @ (c1 - c0))
    value = centroid_auroc(z, targets)
    assert value == pytest.approx(roc_auc_score(targets, scores), abs=1e-12)
    assert 0.5 < value < 1


def test_extremes():
    z = np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    assert centroid_auroc(z, np.array([1, 1, 0, 0])) == 1.0
    assert math.isnan(centroid_auroc(z, np.array([1, 0, 0, 0])))
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(2000, 8))
    noise /= np.linalg.norm(noise, axis=1, keepdims=True)
    assert centroid_auroc(noise, (np.arange(2000) % 2)) == pytest.approx(0.5, abs=0.04)


def test_the_meter_does_not_mind_how_rows_come(embedded):
    z, targets = embedded
    z32 = torch.tensor(z, dtype=torch.float32)

    def meter(rows):
        rows = torch.as_tensor(rows)
        one = EmbeddingMeter()
        one.update({"embedding": z32[rows]}, SimpleNamespace(label=torch.as_tensor(targets)[rows]), rows + 1)
        return one

    whole = meter(range(30)).compute()
    assert whole == {"centroid_auroc": centroid_auroc(z32.numpy(), targets)}
    parts = meter([17, 3, 29])
    parts.merge(meter([r for r in range(30) if r not in (3, 29)]))  # 17 twice, as padding is
    parts.merge(meter([29, 3]))
    assert parts.compute() == whole
