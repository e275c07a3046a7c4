"""Is an image of the kind that the network was trained on? Two distances of its features from the training features.

    mahalanobis  to the nearest class mean under one covariance for all classes, shrunk (Lee et al., "A simple unified
                 framework for detecting out-of-distribution samples", 2018; shrinkage: Ledoit and Wolf, 2004)
    knn          to the k-th nearest training feature, all of unit norm (Sun et al., "Out-of-distribution detection with
                 deep nearest neighbors", 2022)

Both grow with foreignness. An image is foreign when either exceeds its threshold. They see different things: the first
a feature vector of unusual length or in a direction that never varied, the second a gap between the known images.

Why not a score on the classifier's own neurons, such as LINe: it improves on the energy score that it is built on for
images far off, loses to it for near ones, and on a small network was dominated by feature distances (two classes of
digits left out, 5 seeds, FPR at 95 % TPR: LINe .19 to .37 by setting, energy .13, kNN .08, Mahalanobis .03).

Thresholds are never taken from the features that the statistics were fitted on: those lie closer than any new image.
They are order statistics of the validation split, which neither the encoder nor the statistics have seen, with the
guarantee of `upper_bound`. With too few validation patients for that, training and validation features are scored
together, out of fold by patient; the encoder has still seen most of these images, and the true rate of false alarms may
be higher than stated.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raymed.config import UserError
from raymed.metrics.calibration import FOLDS, upper_bound

K = 5  # neighbours
MAX_STORED = 2000  # training features in a bundle
FPR = 0.05
SCORES = ("mahalanobis", "knn")
_CHUNK = 1024
_RULE = "foreign when either distance exceeds its threshold; each is set at half of fpr (Bonferroni)"


class FeatureDistances(nn.Module):
    """Features (B, D) -> their two distances from the training features. Plain torch: it can be exported.

    means: (C, D) of the classes. whiten: (D, D), x -> x @ whiten has the identity as its covariance within classes.
    bank: (M, D) training features of unit norm. k: which neighbour's distance counts.
    """

    means: Tensor
    whiten: Tensor
    bank: Tensor

    def __init__(self, means: Tensor, whiten: Tensor, bank: Tensor, k: int = K):
        super().__init__()
        self.k = min(k, len(bank))
        for name, tensor in (("means", means), ("whiten", whiten), ("bank", bank)):
            self.register_buffer(name, tensor.float())

    @classmethod
    def fit(cls, features: np.ndarray, labels: np.ndarray, k: int = K) -> "FeatureDistances":
        """Learn from the features (N, D) of training images and their labels (N,).

        Of more than MAX_STORED features, as many are kept, drawn once and for all by a fixed seed.

        Raises:
            UserError: a feature is not finite, or all are equal: the encoder has diverged or collapsed.
        """
        from scipy.linalg import cholesky, solve_triangular
        from sklearn.covariance import ledoit_wolf

        features = _checked(features)
        classes, code = np.unique(labels, return_inverse=True)
        means = np.stack([features[code == c].mean(0) for c in range(len(classes))])
        covariance, _ = ledoit_wolf(features - means[code], assume_centered=True)
        variance = covariance.trace() / len(covariance)
        floor = 1e-6 * variance * np.eye(len(covariance))  # features that are never on have no variance of their own
        lower = cholesky(covariance + floor, lower=True)
        whiten = solve_triangular(lower, np.eye(len(lower)), lower=True).T
        kept = np.arange(len(features))
        if len(kept) > MAX_STORED:
            kept = np.sort(np.random.default_rng(0).choice(len(features), MAX_STORED, replace=False))
        bank = F.normalize(torch.from_numpy(features[kept]), dim=1)
        return cls(torch.from_numpy(means), torch.from_numpy(whiten.copy()), bank, k)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """(B, D) -> (mahalanobis (B,), knn (B,)), float32."""
        features = features.float()
        apart = (features[:, None] - self.means) @ self.whiten
        # A contrastive encoder puts a class almost on one point: float32 has no digits left there for 2 - 2 cos.
        unit, bank = (F.normalize(vectors.double(), dim=1) for vectors in (features, self.bank))
        kth = (unit @ bank.T).topk(self.k, dim=1).values[:, -1]
        return apart.norm(dim=2).amin(1), (2 - 2 * kth).clamp(min=0).sqrt().float()

    @torch.no_grad()
    def score(self, features: np.ndarray) -> dict[str, np.ndarray]:
        """Features (N, D) -> {"mahalanobis": (N,), "knn": (N,)} float64, some at a time."""
        parts = [torch.stack(self(torch.from_numpy(_float32(part)))) for part in _chunks(features)]
        return dict(zip(SCORES, torch.cat(parts, dim=1).double().numpy(), strict=True))


def fit_ood(
    train: tuple[np.ndarray, np.ndarray, np.ndarray], val: tuple[np.ndarray, np.ndarray, np.ndarray], fpr: float = FPR
) -> tuple[FeatureDistances, dict[str, Any]]:
    """Distances from the training features, and thresholds for them.

    Args:
        train, val: features (N, D), labels (N,), patients (N,) of the splits.
        fpr: the rate of false alarms, at most, for a random image of a new patient, both distances together. Where the
            patients are too few to promise it, the lowest rate that they can promise: 2 / (patients + 1).

    Returns:
        The distances and a description for people and programs: k, fpr, thresholds {mahalanobis, knn}, threshold_from
        ("validation" or "cross-validation"), rule, stored (features kept), patients (behind the thresholds), flagged:
        the fraction of validation images called foreign, and of those of each class: a rare class may bear most of it.
    """
    distances = FeatureDistances.fit(train[0], train[1])
    scores, patients, source = distances.score(val[0]), val[2], "validation"
    own = scores
    if _lowest_rate(patients) > fpr:
        scores, patients = _out_of_fold(train, val)
        source = "cross-validation"
    fpr = max(fpr, _lowest_rate(patients))
    thresholds = {name: upper_bound(values, patients, fpr / 2) for name, values in scores.items()}
    described = {"k": distances.k, "fpr": fpr, "thresholds": thresholds, "threshold_from": source, "rule": _RULE}
    described |= {"stored": len(distances.bank), "patients": len(np.unique(patients))}
    return distances, described | {"flagged": _flagged_by_class(is_foreign(own, thresholds), val[1])}


def is_foreign(scores: Mapping[str, np.ndarray], thresholds: Mapping[str, float]) -> np.ndarray:
    """(N,) bool: either distance exceeds its threshold."""
    return np.any([scores[name] > thresholds[name] for name in SCORES], axis=0)


def separation(
    distances: FeatureDistances,
    thresholds: Mapping[str, float],
    inside: np.ndarray,
    foreign: Mapping[str, np.ndarray],
) -> dict[str, Any]:
    """How well foreign sets are told from known images.

    Args:
        inside: features (N, D) of images of the right kind that nothing was fitted on: the test split.
        foreign: name of a set (another modality, say) -> its features.

    Returns:
        {"inside": {"flagged", "images"}, "foreign": {name: {"mahalanobis", "knn": AUROC, "flagged": fraction called
        foreign, "images"}}}.
    """
    from sklearn.metrics import roc_auc_score

    known = distances.score(inside)
    found: dict[str, Any] = {"inside": _flagged(known, thresholds), "foreign": {}}
    for name, features in foreign.items():
        scores = distances.score(features)
        truth = np.repeat([0, 1], [len(inside), len(features)])
        areas = {s: float(roc_auc_score(truth, np.concatenate([known[s], scores[s]]))) for s in SCORES}
        found["foreign"][name] = areas | _flagged(scores, thresholds)
    return found


def _lowest_rate(patients: np.ndarray) -> float:
    """The lowest rate of false alarms that two thresholds from so many patients can promise."""
    return 2 / (len(np.unique(patients)) + 1)


def _out_of_fold(train: tuple, val: tuple) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Scores of all images by statistics of other patients, and the patients."""
    from sklearn.model_selection import GroupKFold

    features, labels, patients = (np.concatenate(pair) for pair in zip(train, val, strict=True))
    folds = min(FOLDS, len(np.unique(patients)))
    scores = {name: np.zeros(len(features)) for name in SCORES}
    for kept, held_out in GroupKFold(folds, shuffle=True, random_state=0).split(features, groups=patients):
        found = FeatureDistances.fit(features[kept], labels[kept]).score(features[held_out])
        for name in SCORES:
            scores[name][held_out] = found[name]
    return scores, patients


def _flagged(scores: Mapping[str, np.ndarray], thresholds: Mapping[str, float]) -> dict[str, float]:
    flagged = is_foreign(scores, thresholds)
    return {"flagged": float(flagged.mean()), "images": len(flagged)}


def _flagged_by_class(flagged: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    of_class = {name: flagged[labels == k] for name, k in (("positive", 1), ("negative", 0))}
    return {"all": float(flagged.mean())} | {name: float(part.mean()) for name, part in of_class.items() if len(part)}


def _checked(features: np.ndarray) -> np.ndarray:
    """Features as float64, or UserError."""
    features = np.asarray(features, np.float64)
    if bad := int((~np.isfinite(features).all(1)).sum()):
        raise UserError(f"features of {bad} training images are not finite: the encoder has diverged; lower its lr")
    if np.ptp(features, axis=0).max() == 0:
        raise UserError("all training images have the same features: the encoder has collapsed; lower its lr")
    return features


def _chunks(features: np.ndarray) -> list[np.ndarray]:
    return [features[start : start + _CHUNK] for start in range(0, len(features), _CHUNK)]


def _float32(features: np.ndarray) -> np.ndarray:
    return np.array(features, np.float32)  # a copy: a read-only memory map is no tensor
