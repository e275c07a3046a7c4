"""The DICOM objects of a phantom hospital: `raymed.data.phantoms` as an X-ray machine would store them."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.random import Generator, default_rng

from raymed.data.phantom_hospital_register import Study, site_of
from raymed.data.phantoms import VIEWS, hsg

if TYPE_CHECKING:
    from pydicom import Dataset

_MACHINES = (("RF", "SIEMENS", "AXIOM Luminos dRF"), ("XA", "Philips", "Allura Xper FD20"))
_UID_ROOT = "1.2.826.0.1.3680043.8.498."  # pydicom's own
_SAYS = {"none": "", "denied": "NO", "lie": "NO", "stated": "YES", "unsaid": ""}


@dataclass(frozen=True)
class Stored:
    """One object as it was written: path relative to the folder, modality, view ("" for CT), what BurnedInAnnotation
    says, and the box of the text (x0, y0, x1, y1) in pixels, x1 and y1 just outside; None where there is none."""

    path: str
    modality: str
    view: str
    says: str
    text_box: tuple[int, int, int, int] | None


def write_study(folder: Path, study: Study, seed: int, size: int) -> Iterator[Stored]:
    """Write early and late view of a study below `folder`; yield what was written."""
    for instance, view in enumerate(VIEWS, start=1):
        # The patient's right lies on the left of a drawn image: what is said of the patient is turned into it.
        drawn_side = {"left": "right", "right": "left"}.get(study.side, "none")
        picture, _, _ = hsg(study.number, view, drawn_side, seed=seed, size=size)
        picture = picture if study.right == "left" else picture[:, ::-1]
        frames = _run(picture, study.frames, default_rng([seed, study.number, instance, 2]))
        box = None
        if study.text in ("stated", "unsaid", "lie"):
            corner = study.number % 4
            frames, box = _with_text(frames, _lines(study), corner)
        modality, maker, model = _MACHINES[study.site]
        ds = _identity(study, seed, modality, instance)
        ds.Manufacturer, ds.ManufacturerModelName = maker, model
        ds.SeriesDescription = f"HSG {view}" + f" {study.person.roman.replace('^', ' ')}" * study.telling
        ds.ViewPosition, ds.BodyPartExamined = "AP", "PELVIS"
        ds.PatientOrientation = ["L" if study.right == "left" else "R", "F"]
        if _SAYS[study.text]:
            ds.BurnedInAnnotation = _SAYS[study.text]
        _put_pixels(ds, frames, study, default_rng([seed, study.number, instance, 3]))
        yield Stored(_save(folder, study, ds, instance), modality, view, _SAYS[study.text], box)


def write_ct(folder: Path, study: Study, seed: int) -> Stored:
    """Write an axial CT slice under the study's own number, as scanners' scout views end up among X-rays."""
    instance = len(VIEWS) + 1
    y, x = np.mgrid[-1:1:64j, -1:1:64j]
    body = np.where(np.hypot(x, 1.3 * y) < 0.8, 40, -1000) + 700 * (np.hypot(x, y + 0.3) < 0.12)
    ds = _identity(study, seed, "CT", instance)
    ds.SeriesDescription, ds.Manufacturer, ds.ManufacturerModelName = "Pelvis 5.0", "GE MEDICAL SYSTEMS", "Revolution"
    _describe_pixels(ds, body.shape, 16, "MONOCHROME2")
    ds.PixelRepresentation, ds.RescaleSlope, ds.RescaleIntercept, ds.RescaleType = 1, 1, -1024, "HU"
    ds.ImageOrientationPatient, ds.PixelSpacing = [1, 0, 0, 0, 1, 0], [5, 5]
    ds.PixelData = (body + 1024).astype("<i2").tobytes()
    return Stored(_save(folder, study, ds, instance), "CT", "", "", None)


def _lines(study: Study) -> str:
    return f"{study.person.roman.replace('^', ' ').upper()}\n{study.patient_id} F {study.age}"


def _run(picture: np.ndarray, num_frames: int, rng: Generator) -> np.ndarray:
    """(F, H, W) uint8: a short run in which the contrast medium arrives; the last frame of one is the picture."""
    if num_frames == 1:
        return picture[None]
    strength = np.linspace(0.8, 1, num_frames)[:, None, None]
    noise = rng.normal(0, 2, (num_frames, *picture.shape))
    return np.clip(np.round(picture * strength + noise), 0, 255).astype(np.uint8)


def _with_text(frames: np.ndarray, lines: str, corner: int) -> tuple[np.ndarray, tuple[int, int, int, int]]:
    """The frames with white text in a corner (0: top left, then clockwise), and its box."""
    from PIL import Image, ImageDraw, ImageFont

    height, width = frames.shape[1:]
    font = ImageFont.load_default(size=max(8, height // 16))
    mask = Image.new("L", (width, height))
    draw = ImageDraw.Draw(mask)
    draw.fontmode = "1"  # no grey at the edges, as in most machines
    right, bottom = corner in (1, 2), corner in (2, 3)
    at = (width - 3 if right else 2, height - 3 if bottom else 2)
    draw.multiline_text(at, lines, 255, font, anchor=("r" if right else "l") + ("d" if bottom else "a"), spacing=2)
    ink = np.asarray(mask)
    y, x = np.nonzero(ink)
    box = (int(x.min()), int(y.min()), int(x.max()) + 1, int(y.max()) + 1)
    return np.maximum(frames, ink), box


def _identity(study: Study, seed: int, modality: str, instance: int) -> "Dataset":
    """Patient, study and series of an object."""
    from pydicom import uid
    from pydicom.dataset import Dataset, FileMetaDataset

    kinds = {
        "RF": uid.XRayRadiofluoroscopicImageStorage,
        "XA": uid.XRayAngiographicImageStorage,
        "CT": uid.CTImageStorage,
    }

    def number(*parts: object) -> uid.UID:
        return uid.generate_uid(_UID_ROOT, [str(part) for part in (seed, study.accession, *parts)])

    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = uid.ExplicitVRLittleEndian
    ds.SpecificCharacterSet = list(study.charset)
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = kinds[modality]
    ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = number("object", instance)
    ds.StudyInstanceUID, ds.SeriesInstanceUID = number("study"), number("series", modality)
    hangul = f"{study.person.name[0]}^{study.person.name[1:]}"
    ds.PatientName = hangul if study.charset == ("ISO_IR 192",) else f"{study.person.roman}=={hangul}"
    ds.PatientID, ds.PatientSex, ds.PatientAge = study.patient_id, "F", f"{study.age:03d}Y"
    ds.PatientBirthDate, ds.StudyDate, ds.StudyTime = f"{study.person.born:%Y%m%d}", f"{study.day:%Y%m%d}", "101500"
    ds.AccessionNumber, ds.StudyID, ds.StudyDescription = study.accession, "1", "Hysterosalpingography"
    ds.Modality, ds.InstitutionName, ds.ReferringPhysicianName = modality, site_of(study, seed), ""
    ds.SeriesNumber, ds.InstanceNumber = 1 + (modality == "CT"), instance
    return ds


def _put_pixels(ds: "Dataset", frames: np.ndarray, study: Study, rng: Generator) -> None:
    """Store (F, H, W) uint8 with the study's bits and photometric interpretation."""
    values = frames
    if study.bits == 12:
        values = frames.astype(np.uint16) * 16 + rng.integers(0, 16, frames.shape, np.uint16)
    if study.photometric == "MONOCHROME1":
        values = 2**study.bits - 1 - values
    _describe_pixels(ds, frames.shape[1:], study.bits, study.photometric)
    ds.PixelIntensityRelationship, ds.PixelIntensityRelationshipSign = "LOG", 1
    ds.WindowCenter, ds.WindowWidth = 2 ** (study.bits - 1), 2**study.bits
    if len(frames) > 1:
        ds.NumberOfFrames, ds.FrameTime, ds.FrameIncrementPointer = len(frames), 500, 0x00181063
    ds.PixelData = values.astype("u1" if study.bits == 8 else "<u2").tobytes()


def _describe_pixels(ds: "Dataset", shape: tuple[int, ...], bits: int, photometric: str) -> None:
    ds.Rows, ds.Columns = shape
    ds.SamplesPerPixel, ds.PhotometricInterpretation, ds.PixelRepresentation = 1, photometric, 0
    ds.BitsAllocated, ds.BitsStored, ds.HighBit = 8 if bits == 8 else 16, bits, bits - 1


def _save(folder: Path, study: Study, ds: "Dataset", instance: int) -> str:
    """Write an object where an export of the archive would; site 2 writes names without an ending."""
    ending = "" if study.site else ".dcm"
    path = f"PA{study.number + 1:06d}/ST000001/IM{instance:06d}{ending}"
    (folder / path).parent.mkdir(parents=True, exist_ok=True)
    ds.save_as(folder / path, enforce_file_format=True)
    return path
