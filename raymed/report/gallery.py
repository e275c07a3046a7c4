"""Cases to look at: what a model got wrong, what it was surest of, and where its network looks.

`choose_cases` says which cases, `case_gallery` shows each with all its views as a block of a page. Beside a heat map
stands that of the same network with random weights: a heat map that hardly changes then shows the picture and not what
was learned (J. Adebayo et al., "Sanity Checks for Saliency Maps", NeurIPS 2018).
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from raymed.report.page import Card, Gallery, Tile
from raymed.report.tables import decimal

HEAT_MAP_SENTENCE = (
    "Heat maps show where the network looks, not where the disease is: they are no evidence of localisation."
)
RESULTS = ("false negative", "false positive", "true positive", "true negative")

_LONGEST = 384  # pixels of a view's longer edge in the page
_QUALITY = 90
_OPACITY = 0.65


@dataclass(frozen=True)
class View:
    """One image of a case. What is written into it must have been blanked; maps are of its height and width."""

    name: str  # "early", "late", "frame 3"
    image: np.ndarray  # (H, W) grey, shown from its lowest to its highest value, or (H, W, 3) uint8
    heat_map: np.ndarray | None = None  # (H, W) in [0, 1]
    random_map: np.ndarray | None = None  # (H, W) in [0, 1], with random weights


@dataclass(frozen=True)
class Case:
    """One case. `name` is a pseudonym; `facts` are shown, and each is a filter."""

    name: str
    positive: bool  # by the reference standard
    score: float  # on the scale of the threshold
    views: Sequence[View] = ()
    facts: Mapping[str, str] = field(default_factory=dict)  # "site" -> "Seoul"
    threshold: float | None = None  # by which it was decided; None = the one of all


def choose_cases(
    scores: np.ndarray, targets: np.ndarray, threshold: float | np.ndarray, most: int = 12
) -> dict[str, list[int]]:
    """Which of N cases to show: {one of `RESULTS`: their positions}, at most `most` of each, the surest decision first.

    So wrong decisions begin with the gravest, and right ones are the most confident.

    Args:
        scores: (N,) float. targets: (N,) of {0, 1}. A case is decided positive when score >= threshold.
        threshold: of all cases, or (N,) of each.
    """
    scores, thresholds = np.asarray(scores), np.broadcast_to(threshold, np.shape(scores))
    results = np.array([result_of(bool(y), s, t) for s, y, t in zip(scores, targets, thresholds, strict=True)])
    surest = np.where(scores >= thresholds, -scores, scores)
    order = np.argsort(surest, kind="stable")
    return {result: order[results[order] == result][:most].tolist() for result in RESULTS}


def result_of(positive: bool, score: float, threshold: float) -> str:
    """One of `RESULTS`."""
    decided = bool(score >= threshold)
    return f"{'true' if decided == positive else 'false'} {'positive' if decided else 'negative'}"


def case_gallery(
    cases: Sequence[Case], threshold: float, classes: tuple[str, str] = ("negative", "positive")
) -> Gallery:
    """Cards of the cases, those decided wrongly first, with filters by result and by each fact.

    threshold: of cases that have none of their own. classes: what targets 0 and 1 are called.
    """
    cards = [_card(case, threshold if case.threshold is None else case.threshold, classes) for case in cases]
    return Gallery(sorted(cards, key=lambda card: RESULTS.index(card.mark)))


def randomisation_sentence(cases: Sequence[Case]) -> str:
    """How alike heat maps are to those of random weights, over all views that have both; "" where none has."""
    views = [view for case in cases for view in case.views]
    found = np.array([value for view in views if (value := map_correlation(view)) is not None])
    if not len(found):
        return ""
    low, median, high = np.quantile(found, (0.25, 0.5, 0.75))
    return (
        "Weight-randomisation check: beside each heat map stands that of the same network with random weights. Their "
        f"rank correlation ρ over {len(found)} images has median {median:.2f} (quartiles {low:.2f} and {high:.2f}); "
        "towards 1, heat maps show edges of the picture rather than what was learned."
    )


def map_correlation(view: View) -> float | None:
    """Spearman's correlation of the two maps of a view over its pixels; None where one is missing or constant."""
    from scipy.stats import rankdata

    maps = view.heat_map, view.random_map
    if maps[0] is None or maps[1] is None or np.ptp(maps[0]) == 0 or np.ptp(maps[1]) == 0:
        return None
    return float(np.corrcoef(rankdata(maps[0]), rankdata(maps[1]))[0, 1])


def _card(case: Case, threshold: float, classes: tuple[str, str]) -> Card:
    result = result_of(case.positive, case.score, threshold)
    tone: Literal["good", "open"] = "good" if result.startswith("true") else "open"
    decided = classes[case.score >= threshold]
    lines = [
        f"score {decimal(case.score)} (threshold {decimal(threshold)}): decided {decided}",
        f"reference standard: {classes[case.positive]}",
        ", ".join(f"{name} {value or 'not stated'}" for name, value in case.facts.items()),
    ]
    tags = {"Result": result} | {name: value for name, value in case.facts.items()}
    return Card(case.name, result, tone, [line for line in lines if line], [_tiles(v) for v in case.views], tags)


def _tiles(view: View) -> list[Tile]:
    """The view, its heat map, and that of random weights."""
    picture = _to_rgb(view.image)
    tiles = [Tile(_jpeg(picture), view.name)]
    if view.heat_map is not None:
        tiles.append(Tile(_jpeg(_overlaid(picture, view.heat_map)), _heat_map_caption(view.heat_map)))
    if view.random_map is not None:
        correlation = map_correlation(view)
        alike = "" if correlation is None else f", ρ\N{NO-BREAK SPACE}=\N{NO-BREAK SPACE}{correlation:.2f}"
        tiles.append(Tile(_jpeg(_overlaid(picture, view.random_map)), f"random weights{alike}"))
    return tiles


def _heat_map_caption(heat_map: np.ndarray) -> str:
    return "heat map" if heat_map.any() else "heat map: empty"


def _to_rgb(image: np.ndarray) -> np.ndarray:
    """(H, W, 3) float in [0, 1]."""
    if image.ndim == 3:
        return image / 255
    low, high = float(image.min()), float(image.max())
    grey = (image - low) / (high - low) if high > low else np.zeros(image.shape)
    return np.repeat(grey[..., None], 3, axis=2)


def _overlaid(picture: np.ndarray, heat_map: np.ndarray) -> np.ndarray:
    """The picture under a map that is the more opaque the higher it is."""
    from matplotlib import colormaps

    if heat_map.shape != picture.shape[:2]:
        raise ValueError(f"a heat map is {heat_map.shape}, its image {picture.shape[:2]}")
    opacity = _OPACITY * heat_map[..., None]
    return (1 - opacity) * picture + opacity * colormaps["inferno"](heat_map)[..., :3]


def _jpeg(picture: np.ndarray) -> bytes:
    """Without metadata, and no larger than the page can use."""
    from PIL import Image

    image = Image.fromarray((255 * picture).round().clip(0, 255).astype(np.uint8))
    image.thumbnail((_LONGEST, _LONGEST))
    encoded = io.BytesIO()
    image.save(encoded, "JPEG", quality=_QUALITY, subsampling=0)
    return encoded.getvalue()
