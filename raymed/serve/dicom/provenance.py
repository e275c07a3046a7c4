"""What every object says of where it comes from: its UIDs, the equipment that made it, and who it is about.

UIDs are made of the study, the images, the bundle, its use and release and the kind of the object, so that whoever asks
twice gets objects that an archive knows to be the same, and one that says something else is another.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import raymed
from raymed.config import UserError
from raymed.serve.footer import RESEARCH_ONLY

if TYPE_CHECKING:
    from highdicom import ContributingEquipment
    from pydicom import DataElement, Dataset
    from pydicom.sr.coding import Code
    from pydicom.uid import UID

    from raymed.serve.handlers import Upload
    from raymed.serve.service import Answer

MANUFACTURER = "raymed"
SCHEME = "99RAYMED"
"""Coding scheme of what no standard scheme has a code for."""
_SERIES = {"report": 9001, "overlay": 9002, "segmentation": 9003}
"""Series numbers, above those of machines."""
_PERSONAL = ("PatientID", "PatientName", "PatientBirthDate", "PatientSex", "AccessionNumber", "StudyID", "StudyDate")
_PERSONAL += ("StudyTime", "ReferringPhysicianName")
_LAYOUT = 2  # counts up when the same answer is written differently


@dataclass(frozen=True)
class Case:
    """An answer, and the images that it is about, in the order of the answer. All are DICOM, and of one study."""

    answer: "Answer"
    images: "Sequence[Upload]"
    finding: str | None = None
    """What the probability is of: the positive class."""

    def __post_init__(self) -> None:
        if not self.images or any(image.header is None for image in self.images):
            raise UserError("a DICOM answer is given to DICOM images alone")
        if len({image.header.StudyInstanceUID for image in self.images}) > 1:
            raise UserError("the files are of several studies: send each study by itself")

    @property
    def first(self) -> "Dataset":
        """The header that patient and study are taken from."""
        return self.images[0].header

    @property
    def headers(self) -> "list[Dataset]":
        """Of each object."""
        return headers_of(self.images)

    @cached_property
    def reference(self) -> str:
        """Which images the answer is about, whatever order they came in."""
        return ",".join(sorted(f"{image.header.SOPInstanceUID}/{image.frame or 0}" for image in self.images))

    def series_uid(self, kind: str, *which: object) -> "UID":
        """Of all objects of a kind that one bundle, for one use, makes of the study. which: tells several series of
        them apart."""
        return _uid(kind, "series", *which, *self._whose)

    def uid(self, kind: str, *which: object) -> "UID":
        """Of one object: another where the images, the bundle, its use or its release are others."""
        return _uid(kind, *which, *self._whose, self.reference)

    @property
    def _whose(self) -> tuple[object, ...]:
        answer = self.answer
        return self.first.StudyInstanceUID, answer.model, answer.bundle, answer.research_only, answer.intended_use

    @property
    def version(self) -> str:
        """Of the model: the registry's, else the beginning of the bundle's hash."""
        return self.answer.version or self.answer.bundle[:12]

    @property
    def serial(self) -> str:
        """Of the model as a device: its hash."""
        return self.answer.bundle[:64] or "unknown"

    @property
    def software(self) -> str:
        """Versions of the server and of the model."""
        return f"raymed {raymed.__version__}, {self.answer.model} {self.version}"[:64]

    def common(self, kind: str, number: int = 1, *which: object) -> dict[str, Any]:
        """What highdicom wants to know of any object. which: tells objects of one kind apart."""
        mark = f"{RESEARCH_ONLY}: " if self.answer.research_only else ""
        return {
            "series_instance_uid": self.series_uid(kind),
            "series_number": _SERIES[kind],
            "sop_instance_uid": self.uid(kind, *which),
            "instance_number": number,
            "manufacturer": MANUFACTURER,
            "manufacturer_model_name": self.answer.model,
            "software_versions": self.software,
            "device_serial_number": self.serial,
            "series_description": f"{mark}{self.answer.model} {kind}"[:64],
            "specific_character_set": "ISO_IR 192",
            "contributing_equipment": [self.equipment()],
        }

    def equipment(self) -> "ContributingEquipment":
        """The model as equipment that has contributed to an object."""
        from highdicom import ContributingEquipment
        from pydicom.sr.codedict import codes

        told = [f"{name} {value}" for name, value in self.identity().items()]
        return ContributingEquipment(
            manufacturer=MANUFACTURER,
            purpose_of_reference=codes.DCM.ProcessingEquipment,
            manufacturer_model_name=self.answer.model,
            software_versions=self.software,
            device_serial_number=self.serial,
            contribution_description="; ".join(told)[:1024],
        )

    def identity(self) -> dict[str, str]:
        """Which weights, made by which run, with which preprocessing, for which use."""
        answer = self.answer
        found = {
            "version": answer.version,
            "run": answer.run_id,
            "bundle sha256": answer.bundle,
            "preprocessing": answer.preprocessing,
            "intended use": answer.intended_use,
        }
        return {name: value for name, value in found.items() if value}


def bare(header: "Dataset") -> "Dataset":
    """A copy without what highdicom takes of patient and study, since it refuses values that a hospital's machine may
    well have written. `copy_patient_and_study_information` of the header brings them back as they are."""
    found = copy.deepcopy(header)  # a shallow one shares its elements
    for keyword in _PERSONAL:
        setattr(found, keyword, None)
    return found


def damaged(header: "Dataset") -> list[str]:
    """Which attributes that every result takes over are there and cannot be written as the standard has them."""
    return [keyword for keyword in _PERSONAL if keyword in header and _element(header, keyword) is None]


def sound(images: "Sequence[Upload]") -> "list[Upload]":
    """The images with what their headers say in the standard's own value representations, without what is damaged, or
    is of a repeating group (overlay planes, curves), which no result needs."""
    headers = {id(image.header): _sound(image.header) for image in images if image.header is not None}
    return [replace(image, header=headers.get(id(image.header))) for image in images]


def _sound(header: "Dataset") -> "Dataset":
    from pydicom import Dataset
    from pydicom.datadict import keyword_for_tag, tag_for_keyword

    found = Dataset()
    for tag in header.keys():  # noqa: SIM118
        keyword = keyword_for_tag(tag)
        if tag_for_keyword(keyword) == tag and (element := _element(header, keyword)) is not None:
            found.add(element)
    return found


def _element(header: "Dataset", keyword: str) -> "DataElement | None":
    """An attribute as it can be written; None where it cannot."""
    from pydicom import DataElement
    from pydicom.config import IGNORE
    from pydicom.datadict import dictionary_VR
    from pydicom.filebase import DicomBytesIO
    from pydicom.filewriter import write_data_element

    vr, file = dictionary_VR(keyword), DicomBytesIO()
    file.is_little_endian, file.is_implicit_VR = True, False
    try:
        found = header[keyword]
        element = DataElement(keyword, vr, found.value, validation_mode=IGNORE)
        write_data_element(file, element, ["utf8"])
    except Exception:  # readers and writers raise anything at all on values of another kind
        return None
    return element if (found.VR == "SQ") == (vr == "SQ") else None


def headers_of(images: "Sequence[Upload]") -> "list[Dataset]":
    """Of each object that images are of, once; the frames of a run are of one."""
    return list({image.header.SOPInstanceUID: image.header for image in images}.values())


def local_code(value: str, meaning: str) -> "Code":
    """A concept of `SCHEME`."""
    from pydicom.sr.coding import Code

    return Code(value, SCHEME, meaning[:64])


def coding_scheme() -> Any:
    """What `SCHEME` is, for objects that use it."""
    from highdicom.coding_schemes import CodingSchemeIdentificationItem

    return CodingSchemeIdentificationItem(
        designator=SCHEME, name="raymed", version=str(_LAYOUT), responsible_organization=MANUFACTURER
    )


def referenced(image: "Upload") -> "Dataset":
    """Reference to an image (SOP Instance Reference Macro), of a frame where it is one of several."""
    from pydicom import Dataset

    item = Dataset()
    item.ReferencedSOPClassUID = image.header.SOPClassUID
    item.ReferencedSOPInstanceUID = image.header.SOPInstanceUID
    if image.frame is not None:
        item.ReferencedFrameNumber = image.frame
    return item


def is_own(header: "Dataset") -> bool:
    """Whether an object was made here, and must not be answered again."""
    return header.get("Manufacturer") == MANUFACTURER


def _uid(*parts: object) -> "UID":
    from pydicom.uid import generate_uid

    return generate_uid(entropy_srcs=[f"{part}\n" for part in ("raymed", _LAYOUT, *parts)])
