"""Cases to read again: their label disagrees with models that had not seen them.

A reader who reads them again should not know why they were chosen: the file he gets (`read_again_csv`) names cases and
nothing else. Mending only labels that a model disputes flatters the model, so as many others are to be read with them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from raymed.report.page import Block, Table, Text
from raymed.report.tables import decimal

READ_AGAIN = "cases_to_read_again.csv"


@dataclass(frozen=True)
class Doubt:
    """A case whose label models disagreed with that had not seen it. `name` is a pseudonym."""

    name: str
    label: str  # by the reference standard
    score: float  # mean out-of-fold probability of the positive class
    wrong: int  # repeats in which the decision was not the label
    repeats: int
    num_images: int


def find_doubts(
    names: Sequence[str],
    scores: np.ndarray,
    decided: np.ndarray,
    targets: np.ndarray,
    num_images: np.ndarray,
    classes: tuple[str, str] = ("negative", "positive"),
    most: int = 20,
) -> list[Doubt]:
    """Cases decided against their label in more than half of the repeats, those farthest from it first.

    Args:
        names: N pseudonyms. targets: (N,) of {0, 1}. num_images: (N,) int.
        scores: (R, N) out-of-fold probabilities of the positive class, in R repeats of a cross-validation.
        decided: (R, N) bool, decided positive: each fold has its threshold.
        classes: what targets 0 and 1 are called. most: how many are listed.
    """
    wrong = (decided != (targets == 1)).sum(axis=0)
    mean = scores.mean(axis=0)
    order = np.argsort(-np.abs(mean - targets), kind="stable")
    disputed: list[int] = order[wrong[order] > len(scores) / 2][:most].tolist()
    return [
        Doubt(names[i], classes[targets[i]], float(mean[i]), int(wrong[i]), len(scores), int(num_images[i]))
        for i in disputed
    ]


def read_again_blocks(doubts: Sequence[Doubt]) -> list[Block]:
    """What the page says of them; nothing where there are none."""
    if not doubts:
        return []
    rows = [
        [doubt.name, doubt.label, decimal(doubt.score), f"{doubt.wrong} of {doubt.repeats}", str(doubt.num_images)]
        for doubt in doubts
    ]
    explained = (
        "Models that had not seen these cases decided against their label. The label may be wrong, or the case hard. "
        f"{READ_AGAIN}, beside this page, lists them without score, label or order, for a reader who should not know "
        "why they were chosen. Read as many others with them: mending only labels that the model disputes flatters it."
    )
    header = ["", "label", "out-of-fold score", "decided otherwise", "images"]
    return [Text(explained), Table(header, rows, "Cases to read again, most disputed first.")]


def read_again_csv(doubts: Sequence[Doubt]) -> str:
    """What a second reader gets: cases by name and two empty columns, without score, label or order of doubt."""
    import pandas as pd

    rows = sorted((doubt.name, doubt.num_images, "", "") for doubt in doubts)
    columns = pd.Index(["case", "num_images", "reading", "comment"])
    return pd.DataFrame(rows, columns=columns).to_csv(index=False, lineterminator="\n")
