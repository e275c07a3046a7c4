"""What one file says of itself, without its pixels: is it an image, of how many frames, and which harmless tags has it.

Only what stands in `COLUMNS` leaves a DICOM header. Name, numbers and dates of birth are compared with it, since a
description or a folder's name may hold them too, and go no further.
"""

import re
import unicodedata
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from raymed.data.intake.telling import Telling

if TYPE_CHECKING:
    from pydicom import Dataset

COLUMNS = ("modality", "series", "view", "side", "right", "scanner", "site", "year", "age", "sex")
"""The tags that may be kept, under the names of the manifest's columns."""
PATH_KEYS = ("path", "name", "stem")
"""Keys that are no DICOM tag: the path relative to the folder, the file's name, and that without its ending."""
SITE_TAGS = ("InstitutionName", "InstitutionalDepartmentName", "StationName")
"""DICOM tags that may tell sites apart."""

EMPTY, NO_IMAGE, NO_PIXELS = "empty file", "not an image", "DICOM object without an image"
DAMAGED = "damaged header"

_IDENTIFYING = ("PatientID", "OtherPatientIDs", "PatientBirthDate", "AccessionNumber", "StudyID")
_READ = (
    *("SOPClassUID", "Rows", "NumberOfFrames", "Modality", "SeriesDescription", "ViewPosition", "ImageLaterality"),
    *("PatientOrientation", "Manufacturer", "ManufacturerModelName", "StudyDate", "PatientAge", "PatientSex"),
    *("BurnedInAnnotation", "PatientName"),
)
_OLDEST = 90


@dataclass(frozen=True)
class Found:
    """One image file.

    path: relative to the images' folder, with "/". frames: how many frames (slices) it holds, at least 1. key: text of
    the key tag, patient: the Patient ID, name: the patient's name in all its scripts; "" where the file has none. These
    are identifiers, NFC and without spaces around them. tags: what there is of `COLUMNS`, never identifying. burned_in:
    "yes" or "no" as BurnedInAnnotation says, "" where it says nothing. telling: what names the patient, or may: "path",
    or one of `COLUMNS`, which is left out for it.
    """

    path: str
    frames: int
    key: str
    patient: str
    tags: dict[str, str] = field(default_factory=dict)
    burned_in: str = ""
    telling: tuple[str, ...] = ()
    name: str = ""


def describe(file: Path, path: str, key: str, site: str = "") -> Found | str:
    """The image in a file, or why there is none: `EMPTY`, `NO_IMAGE`, `NO_PIXELS`, `DAMAGED`.

    Args:
        file: where it lies.
        path: what `Found.path` is to be.
        key: a DICOM keyword, or one of `PATH_KEYS`.
        site: one of `SITE_TAGS`, which becomes the column `site`; "" = none.

    Raises:
        OSError: the file cannot be opened or read.
    """
    with file.open("rb") as opened:
        head = opened.read(132)
    if not head:
        return EMPTY
    try:
        if head[128:] == b"DICM" or file.suffix.lower() in (".dcm", ".dicom", ".ima"):
            return _dicom(file, path, key, site)
        frames = _slices(file) if file.name.lower().endswith((".nii", ".nii.gz")) else _pictures(file)
        return NO_IMAGE if not frames else Found(path, frames, _of_path(path, key), "")
    except Exception as error:  # decoders raise anything at all on damaged files
        if isinstance(error, OSError) and error.errno is not None:
            raise
        return DAMAGED


def normal(text: object) -> str:
    """Text of an identifier: NFC, no spaces around it. None becomes ""."""
    return unicodedata.normalize("NFC", str("" if text is None else text)).strip()


def _of_path(path: str, key: str) -> str:
    pure = PurePosixPath(path)
    return normal({"path": path, "name": pure.name, "stem": pure.stem}.get(key, ""))


def _pictures(file: Path) -> int:
    """How many pictures a file holds; 0 where it is none."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(file) as image:
            return getattr(image, "n_frames", 1) if image.format in ("TIFF", "GIF") else 1
    except UnidentifiedImageError:
        return 0


def _slices(file: Path) -> int:
    from nibabel.loadsave import load

    shape = load(file).shape  # type: ignore[attr-defined]
    return shape[2] if len(shape) > 2 else 1


def _dicom(file: Path, path: str, key: str, site: str) -> Found | str:
    import pydicom
    import pydicom.config

    # A warning about an invalid value would print it, and it may name the patient.
    pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE
    wanted = [*_READ, *_IDENTIFYING, *([key] if key not in PATH_KEYS else []), *([site] if site else [])]
    ds = pydicom.dcmread(file, stop_before_pixels=True, force=True, specific_tags=wanted)
    if not ds.get("Rows"):
        return NO_PIXELS if "SOPClassUID" in ds or "DirectoryRecordType" in ds or _is_part_10(ds) else NO_IMAGE
    name = _text(ds, "PatientName")
    secrets = Telling(_identifiers(ds, key), [name])
    tags = {column: value for column, value in _tags(ds, site).items() if value}
    telling = [column for column in ("series", "view", "site") if secrets.within(tags.get(column, ""))]
    telling = ["path"] * secrets.within(path) + telling
    return Found(
        path=path,
        frames=int(ds.get("NumberOfFrames") or 1),
        key=_of_path(path, key) if key in PATH_KEYS else normal(_text(ds, key)),
        patient=normal(_text(ds, "PatientID")),
        tags={column: value for column, value in tags.items() if column not in telling},
        burned_in={"YES": "yes", "NO": "no"}.get(_text(ds, "BurnedInAnnotation").upper(), ""),
        telling=tuple(telling),
        name=name,
    )


def _is_part_10(ds: "Dataset") -> bool:
    return bool(getattr(ds, "file_meta", None))


def _text(ds: "Dataset", keyword: str) -> str:
    value = ds.get(keyword)
    return "" if value is None else normal(value)


def _tags(ds: "Dataset", site: str) -> dict[str, str]:
    date = re.match(r"(\d{4})\.?\d{2}\.?\d{2}", _text(ds, "StudyDate"))  # 2024.03.01: before DICOM 3
    maker, model = _text(ds, "Manufacturer"), _text(ds, "ManufacturerModelName")
    return {
        "modality": _text(ds, "Modality"),
        "series": _text(ds, "SeriesDescription"),
        "view": _text(ds, "ViewPosition"),
        "side": {"L": "left", "R": "right", "B": "both"}.get(_text(ds, "ImageLaterality"), ""),
        "right": _right(ds),
        "scanner": model if model.casefold().startswith(maker.casefold()) else f"{maker} {model}".strip(),
        "site": _text(ds, site) if site else "",
        "year": date[1] if date else "",
        "age": _years(_text(ds, "PatientAge")),
        "sex": _text(ds, "PatientSex") if _text(ds, "PatientSex") in ("M", "F", "O") else "",
    }


def _right(ds: "Dataset") -> str:
    """The edge of the picture where the patient's right is. The first value of PatientOrientation is where the rows
    run to (DICOM PS3.3 C.7.6.1.1.1): "L" = to the patient's left, at the picture's right edge."""
    towards = (_text_values(ds.get("PatientOrientation")) or [""])[0][:1]
    return {"L": "left", "R": "right"}.get(towards, "")


def _text_values(value: object) -> list[str]:
    if value is None or isinstance(value, str):
        return [value] if value else []
    return [str(item) for item in value]  # type: ignore[attr-defined]


def _years(age: str) -> str:
    """Whole years: "034Y" is 34, "018M" is 1. Above 89 it is 90: an age that few reach names them (45 CFR 164.514)."""
    found = re.fullmatch(r"(\d{1,3})([DWMY])", age)
    if not found:
        return ""
    return str(min(int(found[1]) // {"Y": 1, "M": 12, "W": 52, "D": 365}[found[2]], _OLDEST))


def _identifiers(ds: "Dataset", key: str) -> set[str]:
    """Whatever numbers the patient and the study; of several values each."""
    keywords = {*_IDENTIFYING, key} - {*PATH_KEYS}
    return {part for keyword in keywords for part in re.split(r"[\\\[\]',\s]+", _text(ds, keyword))}
