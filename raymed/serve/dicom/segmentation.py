"""A heat map as a DICOM segmentation: one fractional segment, where the map is high, on the pixels of its image.

The fraction is the map's own value (FRACTIONAL, PROBABILITY), which is no probability of disease; the segment's type
says so. It lies on the pixels of a single image, or in the image's frame of reference where it has one. A frame of
a run (XA, RF, US) has no geometry of its own, and DICOM no way to lay a segment on it: runs get overlays alone.
"""

from typing import TYPE_CHECKING

import numpy as np

from raymed.config import UserError
from raymed.serve.dicom.provenance import MANUFACTURER, Case, bare, coding_scheme, local_code

if TYPE_CHECKING:
    from highdicom.seg import Segmentation
    from pydicom import Dataset

LOWEST = 0.5
"""Of the map, what belongs to the segment."""
_PLACED_BY = {"PixelSpacing": 2, "ImagePositionPatient": 3, "ImageOrientationPatient": 6, "SliceThickness": 1}
"""How many numbers each has."""


def segmentation(case: Case, place: int, values: np.ndarray, method: str) -> "Segmentation":
    """The segmentation of one image of the case.

    Args:
        place: of the image in the case, from 0.
        values: (H, W) float in [0, 1] on the image's own grid.
        method: how the map was made.

    Raises:
        UserError: why there can be none.
    """
    image = case.images[place]
    if image.frame is not None:
        raise UserError("no segmentation of a frame of a run, which has no geometry of its own")
    try:
        return _segmentation(case, place, values, method)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError):  # whose text may hold what the header says
        raise UserError("no segmentation of an image whose header lacks, or damages, what one is placed by") from None


def _segmentation(case: Case, place: int, values: np.ndarray, method: str) -> "Segmentation":
    from highdicom.content import AlgorithmIdentificationSequence
    from highdicom.seg import Segmentation, SegmentDescription
    from pydicom.sr.codedict import codes

    header = case.images[place].header
    algorithm = AlgorithmIdentificationSequence(
        name=case.answer.model,
        family=codes.DCM.ArtificialIntelligence,
        version=case.version or "unknown",
        source=MANUFACTURER,
        parameters=case.identity(),
    )
    segment = SegmentDescription(
        segment_number=1,
        segment_label=f"{method} of {case.answer.model}"[:64],
        segmented_property_category=codes.SCT.SpatialAndRelationalConcept,
        segmented_property_type=local_code("ATTENTION", "Where a network looks, no finding"),
        algorithm_type="AUTOMATIC",
        algorithm_identification=algorithm,
        tracking_uid=case.uid("tracking", "segment", place),
        tracking_id=f"{case.answer.model} {method} {place + 1}"[:64],
    )
    made = Segmentation(
        source_images=[_whole(header)],
        pixel_array=np.where(values >= LOWEST, values, 0).astype(np.float32)[None],
        segmentation_type="FRACTIONAL",
        segment_descriptions=[segment],
        omit_empty_frames=False,
        content_label="ATTENTION",
        coding_schemes=[coding_scheme()],
        **case.common("segmentation", place + 1, place, method),
    )
    if "FrameOfReferenceUID" not in made:  # nothing that highdicom took for granted may be told
        del made.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence
    made.copy_patient_and_study_information(header)
    return made


def _check_place(header: "Dataset") -> None:
    """Raises ValueError for what is no place in the patient, and highdicom takes for one."""
    for keyword, num in _PLACED_BY.items():
        if header.get(keyword) not in (None, ""):
            values = np.atleast_1d(np.array(header[keyword].value, float))
            if len(values) != num or not np.isfinite(values).all() or (keyword == "PixelSpacing" and values.min() <= 0):
                raise ValueError(keyword)


def _whole(header: "Dataset") -> "Dataset":
    """The header with what highdicom takes for granted: one frame with functional groups, where the object might have
    had several."""
    from highdicom import PixelMeasuresSequence
    from pydicom import Dataset

    _check_place(header)
    whole = bare(header)
    if "NumberOfFrames" not in whole:
        whole.NumberOfFrames = 1
    if "SharedFunctionalGroupsSequence" not in whole and "ImageOrientationPatient" not in whole:
        whole.pop("FrameOfReferenceUID", None)  # a projection's, which leads from no pixel into the patient
    if "SharedFunctionalGroupsSequence" not in whole:
        whole.SharedFunctionalGroupsSequence = [Dataset()]
        whole.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence = PixelMeasuresSequence((1, 1), 1)
    return whole
