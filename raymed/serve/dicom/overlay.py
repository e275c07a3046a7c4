"""A heat map over the image it explains, as a Secondary Capture image that any viewer shows.

    the image under the map (the report's colours), then a footer: RESEARCH USE ONLY, model, version, what the map is

The footer is part of the picture, so that it is seen wherever the picture goes.
"""

from typing import TYPE_CHECKING, Any

import numpy as np

from raymed.report.gallery import HEAT_MAP_SENTENCE
from raymed.serve.dicom.provenance import RESEARCH_ONLY, Case, coding_scheme, local_code, referenced
from raymed.serve.explain import blend

if TYPE_CHECKING:
    from highdicom.sc import SCImage

    from raymed.serve.handlers import Upload

_SMALLEST = 384
"""Pixels across; a smaller image is enlarged, so that its footer can be read."""
_OF_THE_PICTURE = ("BurnedInAnnotation", "Laterality", "BodyPartExamined", "LossyImageCompression")
_OF_THE_PICTURE += ("LossyImageCompressionRatio", "LossyImageCompressionMethod")
_ABOUT = "where the network looks, no evidence of a finding"


def overlay(case: Case, place: int, values: np.ndarray, method: str) -> "SCImage":
    """The overlay of one image of the case.

    Args:
        place: of the image in the case, from 0.
        values: (H, W) float in [0, 1] on the image's own grid.
        method: how the map was made.
    """
    from highdicom.sc import SCImage

    image = case.images[place]
    picture = _with_footer(_enlarged(blend(image.pixels, values)), _footer(case, method))
    made = SCImage(
        picture,
        photometric_interpretation="RGB",
        bits_allocated=8,
        coordinate_system="PATIENT",
        patient_orientation=("L", "F"),
        study_instance_uid=case.first.StudyInstanceUID,
        **case.common("overlay", place + 1, place, method),
    )
    made.copy_patient_and_study_information(image.header)
    made.PatientOrientation = image.header.get("PatientOrientation")
    _describe(made, image, method)
    return made


def overlay_size(height: int, width: int) -> int:
    """Bytes of the overlay of an image, but for its footer and header."""
    return 3 * height * width * _times(width) ** 2


def _times(width: int) -> int:
    """How much larger an image is drawn."""
    return -(-_SMALLEST // width)


def _enlarged(picture: np.ndarray) -> np.ndarray:
    times = _times(picture.shape[1])
    return picture.repeat(times, axis=0).repeat(times, axis=1)


def _footer(case: Case, method: str) -> str:
    mark = f"{RESEARCH_ONLY}\n" if case.answer.research_only else ""
    return f"{mark}{case.answer.model} {case.version}, {method}\n{_ABOUT}"


def _with_footer(picture: np.ndarray, text: str) -> np.ndarray:
    """The picture above a black strip with the text, which is as large as its width allows."""
    from PIL import Image, ImageDraw, ImageFont

    width = picture.shape[1]
    measure = ImageDraw.Draw(Image.new("L", (1, 1)))
    size = max(8, width // 28)
    while size > 8 and measure.multiline_textbbox((0, 0), text, ImageFont.load_default(size))[2] > width - 8:
        size -= 1
    font = ImageFont.load_default(size)
    height = int(measure.multiline_textbbox((0, 0), text, font, spacing=4)[3]) + 8
    strip = Image.new("RGB", (width, height))
    ImageDraw.Draw(strip).multiline_text((4, 2), text, "white", font, spacing=4)
    return np.concatenate([picture, np.asarray(strip)])


def _describe(made: Any, image: "Upload", method: str) -> None:
    """What it was derived from, and how."""
    from highdicom.sr import CodedConcept

    source = referenced(image)
    source.PurposeOfReferenceCodeSequence = [
        CodedConcept("121322", "DCM", "Source image for image processing operation")
    ]
    made.SourceImageSequence = [source]
    made.DerivationDescription = f"{method} of {made.ManufacturerModelName} over the image. {HEAT_MAP_SENTENCE}"
    made.DerivationCodeSequence = [CodedConcept(*local_code("OVERLAY", "Heat map over the source image"))]
    made.CodingSchemeIdentificationSequence = [coding_scheme()]
    for keyword in _OF_THE_PICTURE:
        if keyword in image.header:
            setattr(made, keyword, image.header[keyword].value)
