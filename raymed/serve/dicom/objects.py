"""The objects that an answer becomes: a report, and of each image with a heat map an overlay and a segmentation."""

import base64
from collections.abc import Iterator, Mapping, Sequence
from io import BytesIO
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from raymed.config import UserError
from raymed.serve.dicom.geometry import to_source
from raymed.serve.dicom.overlay import overlay
from raymed.serve.dicom.provenance import Case
from raymed.serve.dicom.report import report
from raymed.serve.dicom.segmentation import segmentation

if TYPE_CHECKING:
    from pydicom import Dataset

    from raymed.data.preprocess import Preprocess

Kind = Literal["report", "overlay", "segmentation"]
KINDS: tuple[Kind, ...] = get_args(Kind)


def objects(
    case: Case, kinds: Sequence[Kind], preprocess: "Preprocess", before: "Dataset | None" = None
) -> "list[Dataset]":
    """Make them, the report first. It says why an image has no segmentation, where those were asked for.

    Args:
        preprocess: how the images became the network's input, which maps are brought back by.
        before: the report that this one takes the place of, see `report`.
    """
    pictures, notes = [], []
    for place, values, method in maps(case, preprocess):
        if "overlay" in kinds:
            pictures.append(overlay(case, place, values, method))
        if "segmentation" in kinds:
            try:
                pictures.append(segmentation(case, place, values, method))
            except UserError as error:
                notes.append(f"image {place + 1}: {error}")
    return [*([report(case, before, notes)] if "report" in kinds else []), *pictures]


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
    for place, told in enumerate(case.answer.result.get("images") or []):
        explanation = told.get("explanation")
        if explanation and explanation.get("map"):
            height, width = case.images[place].pixels.shape[:2]
            yield place, to_source(map_of(explanation), preprocess, height, width), explanation["method"]


def map_of(explanation: Mapping[str, Any]) -> np.ndarray:
    """(H, W) float32 in [0, 1]: the map of an explanation (`raymed.serve.explain.Explanation`)."""
    values = np.frombuffer(base64.b64decode(explanation["map"]), np.uint8).reshape(explanation["shape"])
    return values.astype(np.float32) / 255
