"""A region, such as a heat map, as a DICOM segmentation: one fractional segment, where it is high, on the pixels of its
image.

The fraction is the region's own value (FRACTIONAL, PROBABILITY), which of a heat map is no probability of disease; the
segment's type says so. It lies on the pixels of a single image, or in the image's frame of reference where it has one.
A frame of a run (XA, RF, US) has no geometry of its own, and DICOM no way to lay a segment on it: runs get overlays
alone.
"""

from typing import TYPE_CHECKING

import numpy as np

from raymed.config import UserError
from raymed.serve.dicom.provenance import MANUFACTURER, Case, bare, coding_scheme, local_code

if TYPE_CHECKING:
    from highdicom.seg import Segmentation
    from pydicom import Dataset

    from raymed.serve.handlers import Region

LOWEST = 0.5
"""Of the values, what belongs to the segment."""
_ATTENTION = ("ATTENTION", "Where a network looks, no finding")
_PLACED_BY = {"PixelSpacing": 2, "ImagePositionPatient": 3, "ImageOrientationPatient": 6, "SliceThickness": 1}
"""How many numbers each has."""


def segmentation(case: Case, region: "Region", values: np.ndarray) -> "Segmentation":
    """The segmentation of one image of the case. values: (H, W), the region's. Raises UserError: why there can be
    none."""
    if case.images[region.place].frame is not None:
        raise UserError("no segmentation of a frame of a run, which has no geometry of its own")
    try:
        return _segmentation(case, region, values)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError):  # whose text may hold what the header says
        raise UserError("no segmentation of an image whose header lacks, or damages, what one is placed by") from None


def _segmentation(case: Case, region: "Region", values: np.ndarray) -> "Segmentation":
    from highdicom.content import AlgorithmIdentificationSequence
    from highdicom.seg import Segmentation, SegmentDescription
    from pydicom.sr.codedict import codes

    place, method, finding = region.place, region.method, region.finding
    header = case.images[place].header
    algorithm = AlgorithmIdentificationSequence(
        name=case.answer.model,
        family=codes.DCM.ArtificialIntelligence,
        version=case.version or "unknown",
        source=MANUFACTURER,
        parameters=case.identity(),
    )
    category, shown = codes.SCT.SpatialAndRelationalConcept, _ATTENTION
    if finding:
        category, shown = codes.SCT.MorphologicallyAbnormalStructure, (finding, finding)
    segment = SegmentDescription(
        segment_number=1,
        segment_label=f"{method} of {case.answer.model}"[:64],
        segmented_property_category=category,
        segmented_property_type=local_code(*shown),
        algorithm_type="AUTOMATIC",
        algorithm_identification=algorithm,
        tracking_uid=case.uid("tracking", "segment", place, *([method] if finding else [])),
        tracking_id=f"{case.answer.model} {method} {place + 1}"[:64],
    )
    made = Segmentation(
        source_images=[_whole(header)],
        pixel_array=np.where(values >= LOWEST, values, 0).astype(np.float32)[None],
        segmentation_type="FRACTIONAL",
        segment_descriptions=[segment],
        omit_empty_frames=False,
        content_label="FINDING" if finding else "ATTENTION",
        coding_schemes=[coding_scheme()],
        **case.common("segmentation", place + 1, place, method),
    )
    if "FrameOfReferenceUID" not in made:  # nothing that highdicom took for granted, of some classes, may be told
        made.SharedFunctionalGroupsSequence[0].pop("PixelMeasuresSequence", None)
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
