"""The cases that a clinical evaluation shows: all their views, where the network looks, and where it would look if it
had learned nothing."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from raymed.data.dataset import DataSet
from raymed.data.intake.pseudonyms import PSEUDONYM
from raymed.data.manifest import DataConfig, read_manifest
from raymed.explain.gradcam import grad_cam
from raymed.explain.randomised import randomised
from raymed.report.gallery import Case, View, choose_cases
from raymed.results.scores import Scored
from raymed.tasks.predictor import Predictor

_BATCH = 64
_SEED = 0  # of the random weights


def shown_cases(
    predictors: Iterable[Predictor],
    by: np.ndarray,
    data: DataSet,
    scored: Scored,
    inside: Sequence[np.ndarray],
    names: Sequence[str],
    attributes: Mapping[str, Sequence[str]],
    most: int,
) -> list[Case]:
    """The gravest errors and the surest right decisions, at most `most` of each result; see `choose_cases`.

    Args:
        predictors: where pictures may be shown, those whose networks decided; without any, cases have no views.
        by: (U,) which of them decided each unit: its heat maps are by that one.
        scored: U units. inside: the images of each. names: U. attributes: name -> U texts.
    """
    chosen = choose_cases(scored.scores, scored.table.targets, scored.cut, most)
    units = [unit for of_result in chosen.values() for unit in of_result]
    views: dict[int, View] = {}
    for k, predictor in enumerate(predictors):
        if own := [inside[unit] for unit in units if by[unit] == k]:
            views |= _views(predictor, data, np.concatenate(own))
    thresholds = scored.thresholds
    return [
        Case(
            name=names[unit],
            positive=bool(scored.table.targets[unit]),
            score=float(scored.scores[unit]),
            views=[views[image] for image in inside[unit].tolist() if image in views],
            facts={name: values[unit] for name, values in attributes.items()},
            threshold=None if thresholds is None else float(thresholds[unit]),
        )
        for unit in units
    ]


def row_names(level: str, data: DataSet, inside: Sequence[np.ndarray]) -> list[str]:
    """U units by their rows in the manifest, which hold their pseudonyms: "case of rows 33, 34"."""
    return [_by_rows(level, data.rows[images].tolist()) for images in inside]


def pseudonyms(level: str, config: DataConfig, data: DataSet, inside: Sequence[np.ndarray]) -> list[str]:
    """U units by the pseudonyms that an import gave them, "C-7F3K2Q4A" or "C-7F3K2Q4A left".

    Where the manifest names them otherwise, as an identifier may be what it has, and for images: `row_names`.
    """
    table = read_manifest(config).table.set_index("row")
    column = level.split("+")[0]
    known = table[column].to_dict() if column in ("patient", "case") and column in table else {}
    sides = data.sides if level == "case+side" else None
    found = []
    for images, by_rows in zip(inside, row_names(level, data, inside), strict=True):
        name = str(known.get(data.rows[images[0]], ""))
        side = "" if sides is None else f" {sides[images[0]]}"
        found.append(name + side if PSEUDONYM.fullmatch(name) else by_rows)
    return found


def _views(predictor: Predictor, data: DataSet, where: np.ndarray) -> dict[int, View]:
    """The images at `where` with their maps, by index."""
    network = predictor.network
    learned = nn.Sequential(network.encoder, network.head)
    random = randomised(learned, _given(predictor, data, where[:_BATCH]), _SEED)
    found = {}
    for start in range(0, len(where), _BATCH):
        part = where[start : start + _BATCH]
        image, given = data.batch(part).unit_image(), _given(predictor, data, part)
        maps = [_heat_maps(encoder, head, given) for encoder, head in (learned, random)]
        for k, index in enumerate(part.tolist()):
            heat, without = (None if of is None else of[k] for of in maps)
            found[index] = View(_view_name(data, index), _picture(image[k].numpy()), heat, without)
    return found


def _given(predictor: Predictor, data: DataSet, where: np.ndarray) -> Tensor:
    """The images at `where` as the encoder takes them."""
    return predictor.preprocess.normalise(data.batch(where).unit_image()).to(predictor.device)


def _heat_maps(encoder: Any, head: Any, given: Tensor) -> np.ndarray | None:
    """(B, H, W) of the positive class; None for networks without feature maps."""
    with torch.no_grad():
        if encoder.maps(given[:1]).ndim != 4:
            return None
    return grad_cam(encoder, head, given).cpu().numpy()


def _picture(image: np.ndarray) -> np.ndarray:
    """(C, H, W) in [0, 1] -> as a `View` has it."""
    return image[0] if len(image) == 1 else (255 * image.transpose(1, 2, 0)).round().astype(np.uint8)


def _view_name(data: DataSet, index: int) -> str:
    name = "" if data.views is None else str(data.views[index])
    return name or f"row {data.rows[index]}"


def _by_rows(level: str, rows: Sequence[int]) -> str:
    listed = ", ".join(map(str, rows))
    return f"row {listed}" if level == "image" else f"{level} of row{'s' * (len(rows) > 1)} {listed}"
