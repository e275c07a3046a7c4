"""Headers as machines and people spoil them: an answer without what is damaged, or 422 that names it."""

import io

import pydicom
import pytest
from dicom_helpers import content, studies, texts
from pydicom import Dataset
from pydicom.datadict import dictionary_VR
from pydicom.dataelem import RawDataElement
from pydicom.tag import Tag
from test_dicom_objects import case_of, made, of
from test_dicom_web import JSON, post, results

from raymed.serve.dicom.endpoint import Endpoint

ALL = ["report", "overlay", "segmentation"]
NUMBER, ITEM = ("UL", b"\7\0\0\0"), ("SQ", b"\xfe\xff\x00\xe0\0\0\0\0")
UIDS = ("SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID")


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    """A single image of a study."""
    folder = tmp_path_factory.mktemp("hospital") / "of_phantoms"
    return next(ds for study in studies(folder) for ds in study if "NumberOfFrames" not in ds)


def spoiled(ds: Dataset, **attributes: tuple[str, bytes] | None) -> Dataset:
    """A copy with attributes of any VR, of bytes as they are; None = without."""
    copy = pydicom.dcmread(io.BytesIO(content(ds)))
    for keyword, told in attributes.items():
        tag = Tag(keyword)
        copy.pop(tag, None)
        if told is not None:
            vr, value = told
            value += b" " * (len(value) % 2)
            copy[tag] = RawDataElement(tag, vr, len(value), value, 0, False, True)
    return copy


def in_space(ds: Dataset) -> Dataset:
    """A copy that is a slice."""
    copy = spoiled(ds)
    copy.Modality, copy.SOPClassUID = "CT", pydicom.uid.CTImageStorage
    copy.file_meta.MediaStorageSOPClassUID = copy.SOPClassUID
    copy.FrameOfReferenceUID, copy.ImagePositionPatient = "1.2.3.4", [1, 2, 3]
    copy.ImageOrientationPatient, copy.PixelSpacing, copy.SliceThickness = [1, 0, 0, 0, 1, 0], [0.5, 0.5], 2
    return copy


def field_of(response) -> str:
    """What a request was refused for."""
    assert response.status_code == 422, response.content[:200]
    told = response.json()
    assert told["detail"].startswith(f"{told['field']}: ")
    return told["field"]


def test_odd_bytes_are_written_as_they_are(image):
    odd = pydicom.dcmread(io.BytesIO(content(spoiled(image, PatientSex=NUMBER, PatientID=None))))
    assert odd["PatientSex"].VR == "UL" and odd.PatientSex == 7 and "PatientID" not in odd


@pytest.mark.parametrize("keyword", ["PatientID", "PatientSex", "AccessionNumber", "StudyDate"])
def test_texts_of_the_patient_may_be_any(client, image, keyword):
    for raw in (None, b"", b"A\\B", b"\xff\xfe\0\1", b"x" * 200):
        odd = spoiled(image, **{keyword: None if raw is None else (dictionary_VR(keyword), raw)})
        found = results(post(client, [odd], results=["report", "overlay"]))
        assert [ds.Modality for ds in found] == ["SR", "OT"]
        assert {ds.StudyInstanceUID for ds in found} == {image.StudyInstanceUID}


def test_a_patient_in_another_vr_is_written_in_the_standards(client, image):
    found = results(post(client, [spoiled(image, PatientID=("SH", b"17"))], results=["report", "overlay"]))
    assert [(ds.PatientID, ds["PatientID"].VR) for ds in found] == [("17", "LO")] * 2


@pytest.mark.parametrize("told", [NUMBER, ITEM], ids=["number", "sequence"])
def test_what_is_no_text_is_named(client, image, told, tmp_path):
    for keyword in ("PatientID", "PatientName", "PatientBirthDate", "PatientSex", "AccessionNumber", "StudyDate"):
        odd = spoiled(image, **{keyword: told})
        assert field_of(post(client, [image, odd])) == f"files[1].{keyword}"
        for accept in ("application/json", JSON):  # which take nothing over
            assert post(client, [odd], accept).status_code == 200
        report = refusal(client, tmp_path, odd)
        assert report.StudyInstanceUID == image.StudyInstanceUID and report.get(keyword) in (None, "")


def refusal(client, folder, ds) -> Dataset:
    """The report that a node makes of a study that cannot be used."""
    endpoint, about = Endpoint("http://127.0.0.1:9", "hsg"), client.get("/v1/models/hsg")
    endpoint._send = lambda *_, **__: about
    (folder / "image.dcm").write_bytes(content(ds))
    return pydicom.dcmread(io.BytesIO(endpoint._refused([folder / "image.dcm"], "it is odd", "", "")))


@pytest.mark.parametrize("keyword", UIDS)
def test_images_without_a_uid_are_none(client, image, keyword):
    for told in (None, ("UI", b""), ("UI", b"1.2.3\\1.2.4\0")):
        odd = spoiled(image, **{keyword: told})
        assert field_of(post(client, [b"no DICOM", odd])) == f"files[1].{keyword}"
        assert field_of(post(client, [image, odd])) == f"files[1].{keyword}"


def test_objects_of_no_class_are_no_images(client, image):
    for told in (None, ("UI", b""), ("UI", b"1.2.840.10008.5.1.4.1.1.2\\1.2.3"), ("UI", b"1.2.3")):
        odd = spoiled(image, SOPClassUID=told)
        response = post(client, [odd])
        assert response.status_code == 422 and "no instance is one" in response.json()["detail"]
        assert field_of(client.post("/v1/models/hsg:predict", content=content(odd))) == "files[0]"


def test_what_merely_describes_is_left_out(client, image):
    for keyword, told in (
        ("Laterality", NUMBER),
        ("BodyPartExamined", NUMBER),
        ("PatientOrientation", NUMBER),
        ("LossyImageCompression", NUMBER),
        ("LossyImageCompressionRatio", ("DS", b"1\\x")),
        ("ProcedureCodeSequence", ("LO", b"hysterosalpingography")),
        ("ProcedureCodeSequence", ITEM),
        ("ViewCodeSequence", ("UN", b"garbage!")),
        ("AnatomicRegionSequence", ("LO", b"uterus")),
        ("ImagerPixelSpacing", ("DS", b"1\\2\\3")),
        ("SeriesNumber", ("IS", b"1.5")),
        ("InstanceNumber", ("IS", b"1\\x")),
        ("StudyDescription", ("LO", b"\xff" * 300)),
        ("WindowWidth", ("DS", b"nan")),
    ):
        found = results(post(client, [spoiled(image, **{keyword: told})], results=ALL))
        assert {ds.Modality for ds in found} >= {"SR", "OT"}, keyword
        for ds in found:
            assert keyword not in ds or ds[keyword].VR == dictionary_VR(keyword), keyword


def test_overlay_planes_and_curves_are_left_out(client, image, tmp_path):
    """Attributes of repeating groups, whose keywords lead back to no tag."""
    odd = spoiled(image)
    for tag, vr, value in (
        (0x60000010, "US", odd.Rows),
        (0x60000050, "SS", [1, 1]),
        (0x60003000, "OW", bytes(odd.Rows * odd.Columns // 8)),
        (0x60020010, "US", odd.Rows),
        (0x50000005, "US", 2),
        (0x50003000, "OW", bytes(8)),
    ):
        odd.add_new(tag, vr, value)
    assert [ds.Modality for ds in results(post(client, [odd], results=ALL))] == ["SR", "OT", "SEG"]
    assert refusal(client, tmp_path, odd).StudyInstanceUID == image.StudyInstanceUID


def test_frames_that_are_not_there(client, image):
    for raw in (b"-1", b"0", b"x", b"1\\2", b"1.5", b"99999999999", b"2"):
        odd = spoiled(image, NumberOfFrames=("IS", raw))
        assert field_of(post(client, [odd])) == "files[0]", raw
        assert field_of(client.post("/v1/models/hsg:predict", content=content(odd))) == "files[0]", raw


def test_pixels_that_are_not_stated(client, image):
    for keyword in ("Rows", "BitsStored", "SamplesPerPixel", "PixelRepresentation"):
        for told in (None, ("US", b""), ("US", b"\xff\xff"), ("US", b"\1\0\2\0"), ("DS", b"1.5")):
            assert field_of(post(client, [spoiled(image, **{keyword: told})])) == "files[0]", (keyword, told)


def test_no_segmentation_lies_where_nothing_is(image):
    def objects(**attributes):
        return made(case_of([spoiled(in_space(image), **attributes)]), ["report", "segmentation"])

    assert len(of("SEG", objects())) == 1
    for keyword in ("PixelSpacing", "ImagePositionPatient", "ImageOrientationPatient", "SliceThickness"):
        for raw in (b"x", b"1\\2\\3\\4", b"0\\0", b"-1\\-1", b"nan\\nan", b"1e999\\1e999", b"1e999\\0\\0"):
            found = objects(**{keyword: ("DS", raw)})
            assert len(found) == 1 and "no segmentation of an image whose header" in texts(found[0]), (keyword, raw)
