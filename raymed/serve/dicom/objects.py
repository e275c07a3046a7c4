"""The objects that an answer becomes: a report, and of each image with a heat map an overlay and a segmentation."""

import base64
from collections.abc import Iterator, Mapping, Sequence
from io import BytesIO
from math import inf
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from raymed.config import UserError
from raymed.serve.dicom.geometry import to_source
from raymed.serve.dicom.overlay import overlay, overlay_size
from raymed.serve.dicom.provenance import Case
from raymed.serve.dicom.report import report
from raymed.serve.dicom.segmentation import segmentation

if TYPE_CHECKING:
    from pydicom import Dataset

    from raymed.data.preprocess import Preprocess
    from raymed.serve.handlers import Upload

Kind = Literal["report", "overlay", "segmentation"]
KINDS: tuple[Kind, ...] = get_args(Kind)


def objects(
    case: Case,
    kinds: Sequence[Kind],
    preprocess: "Preprocess",
    before: "Dataset | None" = None,
    most_bytes: float = inf,
) -> "list[Dataset]":
    """Make them, the report first. It says why an image has no segmentation, where those were asked for, and how
    many heat maps have no picture at all.

    Args:
        preprocess: how the images became the network's input, which maps are brought back by.
        before: the report that this one takes the place of, see `report`.
        most_bytes: of all pictures (`pictures_size`); images whose pictures would not fit have none.
    """
    pictures, notes, size, num_left_out = [], [], 0, 0
    for place, values, method in maps(case, preprocess):
        if (larger := size + _size(case.images[place], kinds)) > most_bytes:
            num_left_out += 1
            continue
        size = larger
        if "overlay" in kinds:
            pictures.append(overlay(case, place, values, method))
        if "segmentation" in kinds:
            try:
                pictures.append(segmentation(case, place, values, method))
            except UserError as error:
                notes.append(f"image {place + 1}: {error}")
    if num_left_out:
        notes.append(f"no pictures of {num_left_out} of the heat maps: all of them together are too large")
    return [*([report(case, before, notes)] if "report" in kinds else []), *pictures]


def pictures_size(case: Case, kinds: Sequence[Kind]) -> int:
    """Bytes of the pictures of a case, but for footers and headers."""
    return sum(_size(case.images[place], kinds) for place, _ in _explained(case))


def _size(image: "Upload", kinds: Sequence[Kind]) -> int:
    height, width = image.pixels.shape[:2]
    return ("overlay" in kinds) * overlay_size(height, width) + ("segmentation" in kinds) * height * width


def predecessor(header: "Dataset", before: str) -> "Dataset | None":
    """The earlier report of a study that "SERIES/INSTANCE" names; None for "". Raises UserError for another form."""
    from pydicom import Dataset
    from pydicom.uid import UID, ComprehensiveSRStorage

    if not before:
        return None
    series, _, instance = before.partition("/")
    if not (series and instance and UID(series).is_valid and UID(instance).is_valid):
        raise UserError("before: SERIES/INSTANCE of the earlier report is expected, two UIDs")
    found = Dataset()
    found.StudyInstanceUID, found.SeriesInstanceUID = header.StudyInstanceUID, series
    found.SOPClassUID, found.SOPInstanceUID = ComprehensiveSRStorage, instance
    return found


def to_bytes(made: "Dataset") -> bytes:
    """An object as a file."""
    content = BytesIO()
    made.save_as(content, enforce_file_format=True)
    return content.getvalue()


def maps(case: Case, preprocess: "Preprocess") -> Iterator[tuple[int, np.ndarray, str]]:
    """(place, map on the image's own grid (H, W), method) of every image of the answer that has one."""
    for place, explanation in _explained(case):
        height, width = case.images[place].pixels.shape[:2]
        yield place, to_source(map_of(explanation), preprocess, height, width), explanation["method"]


def _explained(case: Case) -> Iterator[tuple[int, Mapping[str, Any]]]:
    for place, told in enumerate(case.answer.result.get("images") or []):
        explanation = told.get("explanation")
        if explanation and explanation.get("map"):
            yield place, explanation


def map_of(explanation: Mapping[str, Any]) -> np.ndarray:
    """(H, W) float32 in [0, 1]: the map of an explanation (`raymed.serve.explain.Explanation`)."""
    values = np.frombuffer(base64.b64decode(explanation["map"]), np.uint8).reshape(explanation["shape"])
    return values.astype(np.float32) / 255
