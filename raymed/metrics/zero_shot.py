"""Zero-shot classification: images against prompts, without a classifier having been trained.

A class is the mean of the unit embeddings of its prompts, of length 1 again (prompt ensemble). Of classes that exclude
each other the probabilities are softmax(cosine / T). A finding, of which an image may have several, is scored by how
much nearer the image is to its positive prompts ("pleural effusion") than to its negative ones ("no pleural effusion").

Every figure is a `Statistic`, so that `bootstrap_ci` gives its interval by patient. A control with shuffled labels says
what the same figure is where images and labels have nothing to do with each other: it must sit at chance.

Sources: Radford et al., "Learning transferable visual models from natural language supervision", ICML 2021, section
3.1.4 (ensembles); Tiu et al., "Expert-level detection of pathologies from unannotated chest X-ray images", Nat. Biomed.
Eng. 2022 (positive and negative prompts).
"""

import re
from collections.abc import Callable, Sequence

import numpy as np

from raymed.config import UserError, check_range
from raymed.metrics.bootstrap import mean_statistic
from raymed.metrics.classification import Statistic
from raymed.metrics.retrieval import TIE, unit

MIN_POSITIVE = 10
"""Images with a finding, and without it, for it to enter the average over findings."""


def class_embeddings(prompts: Sequence[np.ndarray]) -> np.ndarray:
    """(C, D) float32 unit vectors of C classes, from the (P_c, D) embeddings of the prompts of each.

    Raises UserError for a class without prompts, and for prompts that cancel out.
    """
    for number, of_class in enumerate(prompts):
        if not len(of_class):
            raise UserError(f"class {number} has no prompt: give each class at least one sentence")
    return unit(np.stack([unit(of_class).mean(axis=0) for of_class in prompts]))


def class_probabilities(image: np.ndarray, classes: np.ndarray, temperature: float) -> np.ndarray:
    """softmax(cosine / temperature): (N, C) float64 of images (N, D) and `class_embeddings` (C, D)."""
    from scipy.special import softmax

    check_range("temperature", temperature, 0, low_open=True)
    return softmax(unit(image).astype(np.float64) @ unit(classes).T / temperature, axis=1)


def finding_scores(image: np.ndarray, positive: np.ndarray, negative: np.ndarray) -> np.ndarray:
    """cos(image, positive) - cos(image, negative), in [-2, 2]: (N, F) float64 of images (N, D) and the
    `class_embeddings` (F, D) of the findings' positive and negative prompts."""
    image = unit(image).astype(np.float64)
    return image @ unit(positive).T - image @ unit(negative).T


def zero_shot_statistic(
    scores: np.ndarray, present: np.ndarray, names: Sequence[str], min_positive: int = MIN_POSITIVE
) -> Statistic:
    """auroc/NAME of every finding, and macro_auroc, the mean over those that can be told.

    Args:
        scores: (N, F), higher where the finding is more likely; a column that is not finite has an undefined AUROC.
        present: (N, F) of {0, 1} or bool.
        names: of the F findings; what a metric's name cannot hold becomes "_" (`finding_metric`).
        min_positive: a finding enters the average if so many images have it and so many do not; which these are is
            decided once, for the data as they are. Without one the average is undefined.
    """
    scores, present = np.asarray(scores, np.float64), np.asarray(present, bool)
    if scores.shape != present.shape or scores.ndim != 2 or scores.shape[1] != len(names):
        raise UserError(
            f"scores and findings must both be (N, {len(names)}), got {scores.shape} and {present.shape}: one column "
            "for each named finding"
        )
    metrics = [finding_metric(name) for name in names]
    parts = [_area(column, has_it) for column, has_it in zip(scores.T, present.T, strict=True)]
    averaged = [metrics[f] for f in told_findings(scores, present, min_positive)]

    def statistic(counts: np.ndarray) -> dict[str, np.ndarray]:
        found = {metric: part(counts) for metric, part in zip(metrics, parts, strict=True)}
        mean = np.mean([found[metric] for metric in averaged], axis=0) if averaged else np.full(len(counts), np.nan)
        return found | {"macro_auroc": mean}

    return statistic


def told_findings(scores: np.ndarray, present: np.ndarray, min_positive: int = MIN_POSITIVE) -> list[int]:
    """Columns that enter the average: enough images have the finding, enough do not, and all scores are finite."""
    positive = np.asarray(present, bool).sum(axis=0)
    fewer = np.minimum(positive, len(present) - positive)
    return np.flatnonzero((fewer >= max(1, min_positive)) & np.isfinite(scores).all(axis=0)).tolist()


def finding_metric(name: str) -> str:
    """The metric of a finding, such as auroc/Pleural_Effusion."""
    return "auroc/" + re.sub(r"[^\w.\-]+", "_", name, flags=re.ASCII)


def shuffled_control(present: np.ndarray, seed: int = 0) -> np.ndarray:
    """Labels, findings or texts (N, ...) in random order: the same rows, each beside an image of somebody else.

    What findings have in common (that they occur together) stays, as whole rows move. For retrieval shuffle the texts
    and leave the groups; R@k is then k / N where every group has one pair.
    """
    return np.asarray(present)[np.random.default_rng(seed).permutation(len(present))]


def multiclass_statistic(scores: np.ndarray, targets: np.ndarray) -> Statistic:
    """accuracy and balanced_accuracy (the mean over classes of how much of each is right) of classes that exclude each
    other.

    Args:
        scores: (N, C) probabilities or cosines; right is where the true class has the highest one alone.
        targets: (N,) of 0..C-1. Classes that do not occur are left out of the balance.
    """
    scores, targets = np.asarray(scores, np.float64), np.asarray(targets)
    own = np.take_along_axis(scores, targets[:, None], axis=1)
    right = (scores >= own).sum(axis=1) == 1
    member = (targets[:, None] == np.unique(targets)).astype(np.float64)
    summed = np.column_stack([right, member, member * right[:, None]])

    def statistic(counts: np.ndarray) -> dict[str, np.ndarray]:
        sums = np.einsum("rn,nk->rk", counts, summed)
        num, right_of_class = np.split(sums[:, 1:], 2, axis=1)
        with np.errstate(invalid="ignore", divide="ignore"):  # a class that was not drawn: nan
            return {
                "accuracy": sums[:, 0] / counts.sum(axis=1),
                "balanced_accuracy": (right_of_class / num).mean(axis=1),
            }

    return statistic


def foil_statistic(name: str, image: np.ndarray, true: np.ndarray, foil: np.ndarray) -> Statistic:
    """The fraction of images nearer to their caption than to one in which a single fact is wrong; chance is 0.5, and a
    tie counts as wrong.

    Args:
        name: of the metric, such as foil/side. image, true, foil: (N, D) embeddings.

    Source: Hsieh et al., "SugarCrepe", NeurIPS 2023; Parcalabescu et al., "VALSE", ACL 2022 (pairwise accuracy).
    """
    image, true, foil = unit(image), unit(true), unit(foil)
    margin = np.einsum("nd,nd->n", image, true) - np.einsum("nd,nd->n", image, foil)
    return mean_statistic(name, margin > TIE)


def _area(scores: np.ndarray, targets: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """counts (R, N) -> AUROC (R,) of one finding, ties counting one half; nan unless both classes are drawn."""
    order = np.argsort(scores, kind="stable")
    first_of_tie = np.flatnonzero(np.diff(scores[order], prepend=-np.inf))
    is_positive = targets[order].astype(np.float64)

    def area(counts: np.ndarray) -> np.ndarray:
        undefined = np.full(len(counts), np.nan)
        if not np.isfinite(scores).all():
            return undefined
        sorted_counts = np.take(counts, order, axis=1)
        positive = np.add.reduceat(sorted_counts * is_positive, first_of_tie, axis=1)
        negative = np.add.reduceat(sorted_counts * (1 - is_positive), first_of_tie, axis=1)
        ordered = (positive * (np.cumsum(negative, axis=1) - negative / 2)).sum(axis=1)
        pairs = positive.sum(axis=1) * negative.sum(axis=1)
        return np.divide(ordered, pairs, out=undefined, where=pairs > 0)

    return area
