"""A phantom hospital: HSG examinations as they come off a file share, with a known truth.

    images/PA000001/ST000001/IM000001.dcm ...   RF and XA objects, two a study, and what else lies on a share
    labels.xlsx      sheet "Labels", a row a study, three of them wrong
    mapping.csv      which two patient numbers are one person
    truth.csv        what is really so, a row an image; for tests
    hospital.json    the parameters

Everything that makes importing hard is among them once or more: single images and runs, MONOCHROME1 and 2, 8 and 12
bits, Hangul names in two character sets, text in the picture that BurnedInAnnotation states, conceals or denies, a
patient seen twice, one with two numbers, two of one name, keys with leading zeros, two sites, four years, pictures that
are mirrored and say so (PatientOrientation), a name in a series description, a CT slice, files that are no images.
"""

import json
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

from raymed.config import UserError, check_range
from raymed.data.phantom_hospital_images import Stored, write_ct, write_study
from raymed.data.phantom_hospital_register import SMALLEST, WITH_CT, Study, draw_register, site_of
from raymed.data.phantom_hospital_sheet import key_in_sheet, write_mapping, write_sheet

_VERSION = 2  # counts up when the same parameters give another hospital
_RECORD = "hospital.json"


def write_hospital(folder: Path, *, num_studies: int = 60, seed: int = 0, size: int = 160) -> Path:
    """Write a phantom hospital into a folder of its own; returns the folder.

    The same arguments give the same bytes. A folder with a hospital of the same arguments is kept as it is. A quarter
    of the studies are occluded on one side; one in twenty (two at least) is reported as equivocal. truth.csv has the
    columns image (relative to images/), study, person, patient_id, accession, key_in_sheet, name, roman, modality,
    site, year, age, view, frames, bits, photometric, right (the edge of the picture where the patient's right is),
    label, side (of the patient), reported, burned_in (what the tag says: yes, no, or nothing) and text_box
    ("x0 y0 x1 y1" or nothing).

    Args:
        num_studies: at least 12, so that all that is hard fits in.
        size: height and width of the images in pixels.

    Raises:
        UserError: an argument is out of range, or the folder holds something else.
    """
    check_range("num_studies", num_studies, SMALLEST)
    check_range("seed", seed, 0)
    check_range("size", size, 64)
    folder = Path(folder)
    parameters = {"num_studies": num_studies, "seed": seed, "size": size, "version": _VERSION}
    record = folder / _RECORD
    if record.is_file() and json.loads(record.read_text()) == parameters:
        return folder
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} holds other files; give the phantom hospital a folder of its own")
    unfinished = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        (unfinished / "images").mkdir(parents=True)
        _write(unfinished, draw_register(num_studies, seed), seed, size)
        (unfinished / _RECORD).write_text(json.dumps(parameters))
        if folder.exists():
            folder.rmdir()
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def _write(folder: Path, studies: list[Study], seed: int, size: int) -> None:
    import pandas as pd

    images = folder / "images"
    rows = [_truth(study, stored, seed) for study in studies for stored in _objects(images, study, seed, size)]
    (images / "Thumbs.db").write_bytes(b"\xd0\xcf\x11\xe0" + bytes(508))
    (images / "readme.txt").write_text("Export 2025-01-02\n")
    pd.DataFrame(rows).to_csv(folder / "truth.csv", index=False)
    write_sheet(folder / "labels.xlsx", studies)
    write_mapping(folder / "mapping.csv", studies)


def _objects(images: Path, study: Study, seed: int, size: int) -> Iterator[Stored]:
    yield from write_study(images, study, seed, size)
    if study.number == WITH_CT:
        yield write_ct(images, study, seed)


def _truth(study: Study, stored: Stored, seed: int) -> dict[str, object]:
    return {
        "image": stored.path,
        "study": study.number,
        "person": study.person.number,
        "patient_id": study.patient_id,
        "accession": study.accession,
        "key_in_sheet": key_in_sheet(study),
        "name": study.person.name,
        "roman": study.person.roman,
        "modality": stored.modality,
        "site": site_of(study, seed),
        "year": study.day.year,
        "age": study.age,
        "view": stored.view,
        "frames": study.frames if stored.view else 1,
        "bits": study.bits,
        "photometric": study.photometric,
        "right": study.right if stored.view else "",
        "label": study.label,
        "side": study.side,
        "reported": study.reported,
        "burned_in": {"YES": "yes", "NO": "no"}.get(stored.says, ""),
        "text_box": " ".join(map(str, stored.text_box or ())),
    }
