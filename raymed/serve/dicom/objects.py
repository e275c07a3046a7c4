"""The objects that an answer becomes: a report, and an overlay and a segmentation of each region that it shows, such as
the heat map of an image."""

import base64
from collections.abc import Mapping, Sequence
from functools import partial
from io import BytesIO
from math import inf
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from raymed.config import UserError, from_dict
from raymed.data.preprocess import Preprocess
from raymed.serve.dicom.geometry import to_source
from raymed.serve.dicom.overlay import overlay, overlay_size
from raymed.serve.dicom.provenance import Case
from raymed.serve.dicom.report import report
from raymed.serve.dicom.segmentation import segmentation

if TYPE_CHECKING:
    from pydicom import Dataset

    from raymed.serve.handlers import Handler, Region, Upload

Kind = Literal["report", "overlay", "segmentation"]
KINDS: tuple[Kind, ...] = get_args(Kind)


def objects(
    case: Case,
    kinds: Sequence[Kind],
    regions: "Sequence[Region]",
    before: "Sequence[Dataset]" = (),
    most_bytes: float = inf,
    notes: Sequence[str] = (),
) -> "list[Dataset]":
    """Make them, the report first. It says why an image has no segmentation, where those were asked for, and how
    many regions have no picture at all.

    Args:
        regions: what the pictures show, see `regions_of`.
        before: the reports that this one takes the place of, see `report`.
        most_bytes: of all pictures (`pictures_size`); images whose pictures would not fit have none.
        notes: what else the report is to say.
    """
    pictures, told, size, num_left_out = [], [*notes], 0, 0
    for region in regions:
        if (larger := size + _size(case.images[region.place], kinds)) > most_bytes:
            num_left_out += 1
            continue
        size, values = larger, region.values()
        if "overlay" in kinds:
            pictures.append(overlay(case, region, values))
        if "segmentation" in kinds:
            try:
                pictures.append(segmentation(case, region, values))
            except UserError as error:
                told.append(f"image {region.place + 1}: {error}")
    if num_left_out:
        what = "regions" if any(region.finding for region in regions) else "heat maps"
        told.append(f"no pictures of {num_left_out} of the {what}: all of them together are too large")
    return [*([report(case, before, told)] if "report" in kinds else []), *pictures]


def pictures_size(case: Case, kinds: Sequence[Kind], regions: "Sequence[Region]") -> int:
    """Bytes of the pictures of a case, but for footers and headers."""
    return sum(_size(case.images[region.place], kinds) for region in regions)


def _size(image: "Upload", kinds: Sequence[Kind]) -> int:
    height, width = image.pixels.shape[:2]
    return ("overlay" in kinds) * overlay_size(height, width) + ("segmentation" in kinds) * height * width


def predecessor(header: "Dataset", before: str) -> "Dataset":
    """The earlier report of a study that "SERIES/INSTANCE" names. Raises UserError for another form."""
    from pydicom import Dataset
    from pydicom.uid import UID, ComprehensiveSRStorage

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


def regions_of(case: Case, handler: "Handler") -> "list[Region]":
    """What a handler shows of its answer: its own `regions`, else the heat maps."""
    if own := getattr(handler, "regions", None):
        return own(case.answer.result, case.images)
    return heat_maps(case, from_dict(Preprocess, handler.bundle.preprocess))


def heat_maps(case: Case, preprocess: Preprocess) -> "list[Region]":
    """Of every image of the answer that has one. preprocess: how the images became the network's input, which maps are
    brought back by."""
    from raymed.serve.handlers import Region

    explained = [told.get("explanation") for told in case.answer.result.get("images") or []]
    return [
        Region(place, partial(_on_image, case.images[place], found, preprocess), found["method"])
        for place, found in enumerate(explained)
        if found and found.get("map")
    ]


def _on_image(image: "Upload", explanation: Mapping[str, Any], preprocess: Preprocess) -> np.ndarray:
    return to_source(map_of(explanation), preprocess, *image.pixels.shape[:2])


def map_of(explanation: Mapping[str, Any]) -> np.ndarray:
    """(H, W) float32 in [0, 1]: the map of an explanation (`raymed.serve.explain.Explanation`)."""
    values = np.frombuffer(base64.b64decode(explanation["map"]), np.uint8).reshape(explanation["shape"])
    return values.astype(np.float32) / 255
