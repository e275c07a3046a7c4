"""Which objects are images that a model may be asked about, and in which encodings they are taken."""

from functools import cache
from typing import TYPE_CHECKING

from raymed.serve.uploads.dicom import TRANSFER_SYNTAXES

if TYPE_CHECKING:
    from pydicom.uid import UID

_IMAGES = (
    "ComputedRadiographyImageStorage",
    "CTImageStorage",
    "DigitalIntraOralXRayImageStorageForPresentation",
    "DigitalIntraOralXRayImageStorageForProcessing",
    "DigitalMammographyXRayImageStorageForPresentation",
    "DigitalMammographyXRayImageStorageForProcessing",
    "DigitalXRayImageStorageForPresentation",
    "DigitalXRayImageStorageForProcessing",
    "EnhancedCTImageStorage",
    "EnhancedMRImageStorage",
    "EnhancedXAImageStorage",
    "EnhancedXRFImageStorage",
    "MRImageStorage",
    "MultiFrameGrayscaleByteSecondaryCaptureImageStorage",
    "MultiFrameGrayscaleWordSecondaryCaptureImageStorage",
    "MultiFrameTrueColorSecondaryCaptureImageStorage",
    "NuclearMedicineImageStorage",
    "OphthalmicPhotography16BitImageStorage",
    "OphthalmicPhotography8BitImageStorage",
    "PositronEmissionTomographyImageStorage",
    "SecondaryCaptureImageStorage",
    "UltrasoundImageStorage",
    "UltrasoundMultiFrameImageStorage",
    "VLEndoscopicImageStorage",
    "VLMicroscopicImageStorage",
    "VLPhotographicImageStorage",
    "XRayAngiographicImageStorage",
    "XRayRadiofluoroscopicImageStorage",
)


@cache
def image_classes() -> "tuple[UID, ...]":
    """SOP classes of images."""
    from pydicom import uid

    return tuple(getattr(uid, name) for name in _IMAGES)


@cache
def transfer_syntaxes() -> "tuple[UID, ...]":
    """Encodings of pixels, the preferred ones first."""
    from pydicom.uid import UID

    return tuple(UID(syntax) for syntax in TRANSFER_SYNTAXES)
