"""Real files of every kind in a folder that goes away and comes back."""

import json
import os
import shutil
import stat
import threading
from pathlib import Path

import nibabel
import numpy as np
import pytest
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import BasicTextSRStorage, ExplicitVRLittleEndian, XRayRadiofluoroscopicImageStorage

from raymed.config import UserError
from raymed.data.intake import scan as scan_module
from raymed.data.intake.scan import Found, scan

IDENTITY = {
    "PatientName": "Kim^Minji=金^敏智=김^민지",
    "PatientID": "00012345",
    "PatientBirthDate": "19880301",
    "AccessionNumber": " 00778899",
    "PatientAddress": "Hanbit-ro 7",
    "ReferringPhysicianName": "Park^Bora",
    "OtherPatientIDs": "N0004512",
    "StudyInstanceUID": "1.2.3.4.5",
}


def write_dicom(path, frames=1, **tags):
    """A fluoroscopy object of 4 x 6 pixels with `IDENTITY` and the tags (None = not there)."""
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = XRayRadiofluoroscopicImageStorage
    ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = "1.2.3"
    ds.SpecificCharacterSet = "ISO_IR 192"
    ds.Rows, ds.Columns, ds.SamplesPerPixel, ds.PhotometricInterpretation = 4, 6, 1, "MONOCHROME2"
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 8, 8, 7, 0
    ds.PixelData = bytes(range(24)) * frames
    if frames > 1:
        ds.NumberOfFrames = frames
    for name, value in (IDENTITY | tags).items():
        if value is not None:
            setattr(ds, name, value)
    path.parent.mkdir(parents=True, exist_ok=True)
    ds.save_as(path, enforce_file_format=True)
    return path


def only(folder, **options) -> Found:
    """The one image of a folder."""
    (found,) = scan(folder, **options).found
    return found


def test_all_that_is_kept_of_a_header(tmp_path):
    write_dicom(
        tmp_path / "a" / "IM1",
        frames=3,
        **{"Modality": "RF", "SeriesDescription": "HSG late", "ViewPosition": "AP", "ImageLaterality": "R"},
        **{"Manufacturer": "SIEMENS", "ManufacturerModelName": "Luminos", "StudyDate": "20230412"},
        **{"PatientAge": "034Y", "PatientSex": "F", "PatientOrientation": ["L", "F"], "BurnedInAnnotation": "YES"},
        InstitutionName="Hanbit Hospital",
    )
    tags = {"modality": "RF", "series": "HSG late", "view": "AP", "side": "right", "right": "left"}
    tags |= {"scanner": "SIEMENS Luminos", "year": "2023", "age": "34", "sex": "F"}
    assert only(tmp_path) == Found("a/IM1", 3, "00778899", "00012345", tags, "yes", name="Kim^Minji=金^敏智=김^민지")
    assert only(tmp_path, site="InstitutionName").tags == tags | {"site": "Hanbit Hospital"}
    assert set(tags) | {"site"} == set(scan_module.COLUMNS)


def test_a_header_that_says_nothing(tmp_path):
    write_dicom(tmp_path / "x.dcm", **dict.fromkeys(IDENTITY))
    assert only(tmp_path) == Found("x.dcm", 1, "", "")


@pytest.mark.parametrize(
    "tag, value, column, expected",
    [
        ("PatientAge", "018M", "age", "1"),
        ("PatientAge", "005D", "age", "0"),
        ("PatientAge", "097Y", "age", "90"),
        ("PatientAge", "34", "age", None),
        ("PatientOrientation", ["R", "F"], "right", "right"),
        ("PatientOrientation", ["LP", "F"], "right", "left"),
        ("PatientOrientation", ["A", "F"], "right", None),
        ("StudyDate", "2021.03.04", "year", "2021"),
        ("StudyDate", "unknown", "year", None),
        ("ManufacturerModelName", "Philips Allura", "scanner", "Philips Allura"),
        ("ImageLaterality", "U", "side", None),
        ("PatientSex", "female", "sex", None),
    ],
)
def test_what_a_tag_becomes(tmp_path, tag, value, column, expected):
    write_dicom(tmp_path / "x.dcm", **({"Manufacturer": "PHILIPS"} if column == "scanner" else {}), **{tag: value})
    assert only(tmp_path).tags.get(column) == expected


@pytest.mark.parametrize(
    "description, told",
    [
        ("HSG KIM Minji", True),
        ("HSG 김민지님", True),
        ("repeat of 12345", True),
        ("born 19880301", True),
        ("acc. 778899", True),
        ("was N0004512", True),
        ("Kimura sign, 112345, minjis", False),
        ("HSG late", False),
    ],
)
def test_a_description_that_names_the_patient_is_left_out(tmp_path, description, told):
    write_dicom(tmp_path / "x.dcm", SeriesDescription=description)
    found = only(tmp_path)
    assert found.telling == (("series",) if told else ())
    assert found.tags.get("series") == (None if told else description)


def test_a_path_that_names_the_patient_is_told(tmp_path):
    write_dicom(tmp_path / "KIM_MINJI" / "1.dcm")
    write_dicom(tmp_path / "PA00012345" / "1.dcm")
    write_dicom(tmp_path / "ST000001" / "1.dcm")
    assert [found.telling for found in scan(tmp_path).found] == [("path",), ("path",), ()]


def test_a_description_that_nobody_else_has_may_be_a_name(tmp_path):
    series = {"00001": "HSG", "00002": "HSG", "00003": "HSG Seo-yeon"}  # as the header does not spell it
    for patient, text in series.items():
        for number in range(2):
            write_dicom(tmp_path / patient[-1] / str(number), PatientID=patient, SeriesDescription=text)
    found = scan(tmp_path).found
    assert [image.tags.get("series") for image in found] == ["HSG"] * 4 + [None] * 2
    assert [image.telling for image in found] == [()] * 4 + [("series",)] * 2


def test_a_person_with_two_numbers_is_one_of_whom_a_description_may_tell(tmp_path):
    for patient, text in {"00001": "HSG", "00002": "HSG", "00003": "김영희", "00004": "김영희"}.items():
        write_dicom(tmp_path / patient, PatientID=patient, PatientName="Kim^Younghee", SeriesDescription=text)
    assert [image.tags.get("series") for image in scan(tmp_path).found] == ["HSG"] * 2 + ["김영희"] * 2
    found = scan(tmp_path, persons={"00003": "00004", "00004": "00004"}).found
    assert [image.tags.get("series") for image in found] == ["HSG"] * 2 + [None] * 2


def test_names_in_another_encoding_are_counted_and_do_not_end_it(tmp_path):
    write_dicom(tmp_path / "share" / "a" / "1.dcm")
    for name in ("김영희.dcm", "a/김영희", "박지우"):
        file = write_dicom(tmp_path / "1.dcm")
        os.rename(file, os.fsencode(tmp_path / "share") + b"/" + name.encode("cp949"))
    os.mkdir(os.fsencode(tmp_path / "share") + "/폴더".encode("cp949"))
    result = scan(tmp_path / "share", patience=(), checkpoint=tmp_path / "scan.jsonl")
    assert [image.path for image in result.found] == ["a/1.dcm"]
    assert result.others == {"name is not UTF-8: mount the share with iocharset=utf8": 4}


def test_pictures_and_volumes_have_their_key_in_the_path(tmp_path):
    grey = Image.fromarray(np.arange(24, dtype=np.uint8).reshape(4, 6))
    grey.save(tmp_path / "0007.png")
    grey.save(tmp_path / "run.tif", save_all=True, append_images=[grey, grey])
    nibabel.Nifti1Image(np.zeros((4, 5, 6), np.int16), np.eye(4)).to_filename(tmp_path / "brain.nii.gz")
    found = {image.path: (image.frames, image.key) for image in scan(tmp_path, "stem").found}
    assert found == {"0007.png": (1, "0007"), "run.tif": (3, "run"), "brain.nii.gz": (6, "brain.nii")}
    assert [image.key for image in scan(tmp_path, "name", patterns=["*.PNG"]).found] == ["0007.png"]
    assert [image.key for image in scan(tmp_path).found] == ["", "", ""]


def test_what_is_no_image_is_counted(tmp_path):
    write_dicom(tmp_path / "image.dcm")
    report = write_dicom(tmp_path / "report.dcm", Rows=None)
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = BasicTextSRStorage
    ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = "1.2.4"
    ds.save_as(report, enforce_file_format=True)
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "letter.dcm").write_text("no image either")
    (tmp_path / "empty.png").touch()
    (tmp_path / "broken.nii").write_bytes(b"\x00" * 400)
    (tmp_path / "gone.dcm").symlink_to(tmp_path / "nowhere.dcm")
    (tmp_path / "loop").symlink_to(tmp_path)
    result = scan(tmp_path, patience=())
    assert [image.path for image in result.found] == ["image.dcm"]
    assert result.others == {
        "DICOM object without an image": 1,
        "cannot be opened": 1,
        "damaged header": 1,
        "empty file": 1,
        "link to a folder, not followed": 1,
        "not an image": 2,
    }


@pytest.fixture
def share(tmp_path):
    """A folder of six studies that can be taken away."""
    for i in range(6):
        write_dicom(tmp_path / "share" / f"ST{i}" / "IM1.dcm", AccessionNumber=f"0000{i}")
    return tmp_path / "share"


def test_a_share_that_comes_back_is_waited_for(share):
    undisturbed = scan(share)
    away = share.with_name("away")

    def take_away(count, total):
        assert total == 6
        if count == 3:
            share.rename(away)
            threading.Timer(0.15, away.rename, [share]).start()

    assert scan(share, patience=(0.05, 0.1, 0.2, 0.4), progress=take_away) == undisturbed


def stop_after(share, num, how):
    return lambda count, total: how(share) if count == num else None


def test_a_share_that_stays_away_leaves_a_checkpoint_from_which_it_goes_on(share, tmp_path):
    checkpoint, away = tmp_path / "private" / "scan.jsonl", share.with_name("away")
    undisturbed = scan(share)
    options = {"patience": (0.01,), "checkpoint": checkpoint}
    with pytest.raises(UserError, match=r"stopped answering after 4 of 6 files .*the same command goes on from there"):
        scan(share, **options, progress=stop_after(share, 4, lambda folder: folder.rename(away)))
    assert stat.S_IMODE(checkpoint.stat().st_mode) == 0o600
    away.rename(share)

    times = {}
    for i in (0, 1, 5):  # other content under the same size; of number 1 the time has changed, too
        file = share / f"ST{i}" / "IM1.dcm"
        times[i] = file.stat().st_mtime_ns
        write_dicom(file, AccessionNumber="99999")
        os.utime(file, ns=(times[i], times[i] + (i == 1)))
    keys = [image.key for image in scan(share, **options).found]
    assert keys == ["00000", "99999", "00002", "00003", "00004", "99999"]  # number 0 as the checkpoint knows it
    assert len(keys) == len(undisturbed.found)
    assert not checkpoint.exists()
    assert scan(share, **options).found[0].key == "99999"


def test_a_checkpoint_that_was_cut_off_or_asked_for_something_else(share, tmp_path):
    checkpoint = tmp_path / "scan.jsonl"
    options = {"patience": (), "checkpoint": checkpoint}
    with pytest.raises(UserError, match="after 4 of 6"):
        away = share.with_name("away")
        scan(share, **options, progress=stop_after(share, 4, lambda folder: folder.rename(away)))
    away.rename(share)
    lines = checkpoint.read_text().splitlines()
    assert [json.loads(line)["result"]["key"] for line in lines[1:]] == ["00000", "00001", "00002", "00003"]
    checkpoint.write_text("\n".join(lines)[:-20])
    other = scan(share, "PatientID", patience=(), checkpoint=checkpoint)
    assert {image.key for image in other.found} == {"00012345"}
    checkpoint.write_text("\n".join(lines)[:-20])
    assert scan(share, **options) == scan(share)


def test_an_unmounted_share_is_an_empty_folder(share):
    def unmount(folder):
        shutil.rmtree(folder)
        folder.mkdir()

    with pytest.raises(UserError, match="stopped answering after 2 of 6 .*start the same command again"):
        scan(share, patience=(0.01,), progress=stop_after(share, 2, unmount))


def test_one_file_that_vanishes_does_not_end_it(share):
    result = scan(share, patience=(0.01,), progress=stop_after(share, 2, lambda f: (f / "ST4" / "IM1.dcm").unlink()))
    assert len(result.found) == 5 and result.others == {"cannot be opened": 1}


@pytest.mark.parametrize(
    "folder, options, message",
    [
        ("nowhere", {}, "there is no folder .*nowhere.*connected"),
        ("share", {"key": "AccesionNumber"}, "no DICOM keyword.*did you mean 'AccessionNumber'"),
        ("share", {"site": "PatientName"}, "site must be one of 'InstitutionName'"),
        ("share", {"patterns": ["*.png"]}, "no file that matches '\\*.png'"),
    ],
)
def test_what_cannot_be_scanned(share, folder, options, message):
    with pytest.raises(UserError, match=message):
        scan(share.parent / folder, **options)


@pytest.mark.skipif(os.name == "nt", reason="Windows opens UNC paths itself")
@pytest.mark.parametrize("folder", ["\\\\server\\share\\hsg", "smb://server/share/hsg", Path("smb://server/share/hsg")])
def test_a_windows_path_elsewhere(folder):
    with pytest.raises(UserError, match=r"mount -t cifs //server/share/hsg /mnt"):
        scan(folder)
