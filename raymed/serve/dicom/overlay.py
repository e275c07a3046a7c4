"""A heat map, or what else a model shows, over its image, as a Secondary Capture image that any viewer shows.

the image under the map (the report's colours), then a footer (`raymed.serve.footer`)
"""

from typing import TYPE_CHECKING, Any

import numpy as np

from raymed.report.gallery import HEAT_MAP_SENTENCE
from raymed.serve.dicom.provenance import Case, coding_scheme, local_code, referenced
from raymed.serve.explain import blend
from raymed.serve.footer import marked, times

if TYPE_CHECKING:
    from highdicom.sc import SCImage

    from raymed.serve.handlers import Region, Upload

_OF_THE_PICTURE = ("BurnedInAnnotation", "Laterality", "BodyPartExamined", "LossyImageCompression")
_OF_THE_PICTURE += ("LossyImageCompressionRatio", "LossyImageCompressionMethod")


def overlay(case: Case, region: "Region", values: np.ndarray) -> "SCImage":
    """The overlay of one image of the case. values: (H, W), the region's."""
    from highdicom.sc import SCImage

    place, method, answer = region.place, region.method, case.answer
    image = case.images[place]
    # What it says of the picture may be of the image's series: images of two series do not share one here.
    common = case.common("overlay", place + 1, place, method)
    common["series_instance_uid"] = case.series_uid("overlay", image.header.SeriesInstanceUID)
    blended = blend(image.pixels, values)
    made = SCImage(
        marked(blended, answer.model, case.version, method, answer.research_only, region.finding),
        photometric_interpretation="RGB",
        bits_allocated=8,
        coordinate_system="PATIENT",
        patient_orientation=("L", "F"),
        study_instance_uid=case.first.StudyInstanceUID,
        **common,
    )
    made.copy_patient_and_study_information(image.header)
    made.PatientOrientation = image.header.get("PatientOrientation")
    _describe(made, image, region)
    return made


def overlay_size(height: int, width: int) -> int:
    """Bytes of the overlay of an image, but for its footer and header."""
    return 3 * height * width * times(width) ** 2


def _describe(made: Any, image: "Upload", region: "Region") -> None:
    """What it was derived from, and how."""
    from highdicom.sr import CodedConcept

    source = referenced(image)
    source.PurposeOfReferenceCodeSequence = [
        CodedConcept("121322", "DCM", "Source image for image processing operation")
    ]
    made.SourceImageSequence = [source]
    about = f"It shows: {region.finding}." if region.finding else HEAT_MAP_SENTENCE
    made.DerivationDescription = f"{region.method} of {made.ManufacturerModelName} over the image. {about}"
    what = "Region" if region.finding else "Heat map"
    made.DerivationCodeSequence = [CodedConcept(*local_code("OVERLAY", f"{what} over the source image"))]
    made.CodingSchemeIdentificationSequence = [coding_scheme()]
    for keyword in _OF_THE_PICTURE:
        if keyword in image.header:
            setattr(made, keyword, image.header[keyword].value)
