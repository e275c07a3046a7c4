"""STOW-RS: a study goes in, DICOM comes out."""

import io
import json
import time

import pydicom
import pytest
import torch
from dicom_helpers import content, flaws, texts
from fastapi.testclient import TestClient
from pydicom import Dataset
from pydicom.sr.codedict import codes
from waiting import until

from raymed.config import UserError
from raymed.serve.app import create_app
from raymed.serve.dicom.multipart import DICOM, read_related, related_of_files, write_related
from raymed.serve.dicom.overlay import overlay_size
from raymed.serve.explain import Explainer
from raymed.serve.problems import busy
from raymed.serve.uploads.dicom import Counted

ADDRESS = "/v1/models/hsg/studies"
RELATED = f'multipart/related; type="{DICOM}"'
JSON = "application/dicom+json"


def post(client, parts, accept=RELATED, address=ADDRESS, **query):
    body, kind = write_related([part if isinstance(part, bytes) else content(part) for part in parts])
    return client.post(address, content=body, params=query, headers={"Content-Type": kind, "Accept": accept})


def results(response) -> list[Dataset]:
    assert response.status_code == 200, response.text
    parts = read_related(response.content, response.headers["content-type"])
    return [pydicom.dcmread(io.BytesIO(part)) for part in parts]


def test_a_study_is_answered_by_a_report(client, sent):
    for study in sent[:4]:
        report = results(post(client, study, results="report"))[0]
        assert report.SOPClassUID == pydicom.uid.ComprehensiveSRStorage and flaws(report) == []
        assert (report.StudyInstanceUID, report.PatientName) == (study[0].StudyInstanceUID, study[0].PatientName)
        answer = post(client, study, "application/json").json()
        assert answer["model"] == "hsg" and f"bundle sha256: {answer['bundle']}" in texts(report)
        import highdicom

        group = highdicom.sr.srread(io.BytesIO(content(report))).content.get_image_measurement_groups()[0]
        measured = group.get_measurements(codes.DCM.Probability)[0].value
        assert measured == pytest.approx(answer["result"]["probability"])
        assert group.finding_type.value == "occluded"


def test_the_answer_is_that_of_predict(client, sent):
    files = [("file", (f"{i}.dcm", content(ds))) for i, ds in enumerate(sent[0])]
    predicted = client.post("/v1/models/hsg:predict", files=files).json()
    assert post(client, sent[0], "application/json").json() == predicted


def test_every_image_with_a_map_gets_an_overlay(client, sent):
    found = results(post(client, sent[0], results=["report", "overlay", "segmentation"]))
    assert [ds.Modality for ds in found] == ["SR"] + ["OT", "SEG"] * len(sent[0])
    for overlay in found[1::2]:
        assert flaws(overlay) == [] and overlay.pixel_array.std() > 0
    names = [ds.SourceImageSequence[0].ReferencedSOPInstanceUID for ds in found[1::2]]
    assert names == [ds.SOPInstanceUID for ds in sent[0]]


def test_pictures_get_half_the_room_for_pixels(app_config, sent):
    """Which they give back."""
    small = next(study for study in sent if not any("NumberOfFrames" in ds for ds in study))
    overlay = 3 * 384**2  # of an image of 64 x 64 pixels, enlarged
    app = create_app(app_config(**{"limits.held_pixels": 3 * overlay}))
    with TestClient(app) as client:
        report, *overlays = results(post(client, small))
        assert len(small) > len(overlays) == 1
        assert f"no pictures of {len(small) - 1} of the heat maps" in texts(report)
        room = app.state.service.room
        until(lambda: room.free == room.pixels)


def test_a_picture_is_as_large_as_is_reckoned(client, sent):
    for study in sent[:4]:
        for ds in results(post(client, study))[1:]:
            image = next(i for i in study if i.SOPInstanceUID == ds.SourceImageSequence[0].ReferencedSOPInstanceUID)
            footer = len(ds.PixelData) - overlay_size(image.Rows, image.Columns)
            assert 0 < footer < 150 * 3 * ds.Columns


def test_a_case_that_is_not_explained_in_time_is_answered_without_maps_and_says_so(app_config, sent, monkeypatch):
    def endless(self, method, image):
        while True:
            time.sleep(0.01)
            yield

    monkeypatch.setattr(Explainer, "_heat_map", endless)
    with TestClient(create_app(app_config(**{"limits.timeout_s": 2.0}))) as client:
        (report,) = results(post(client, sent[0]))
        assert report.Modality == "SR" and "no heat maps" in texts(report)
        asked_for = post(client, sent[0], explain="occlusion")
        assert (asked_for.status_code, asked_for.json()["field"]) == (422, "explain")
        maps_alone = post(client, sent[0], results="overlay")
        assert (maps_alone.status_code, maps_alone.json()["field"]) == (422, "explain")


def test_a_case_whose_maps_the_device_has_no_memory_for_is_answered_without(client, sent, monkeypatch):
    def full(self, method, image):
        raise torch.OutOfMemoryError
        yield

    monkeypatch.setattr(Explainer, "_heat_map", full)
    (report,) = results(post(client, sent[0]))
    assert report.Modality == "SR" and "no heat maps" in texts(report)
    asked_for = post(client, sent[0], explain="occlusion")
    assert (asked_for.status_code, asked_for.json()["field"]) == (503, "explain")
    monkeypatch.undo()
    assert "no heat maps" not in texts(results(post(client, sent[0]))[0])


def test_a_method_that_is_not_possible_is_not_told_as_a_case_that_is_too_large(client, sent, monkeypatch):
    """As of a version that has come since the study was planned."""
    handler = client.app.state.service.models.get("hsg").handler
    monkeypatch.setattr(handler, "about", lambda: {"explain": ["gradcam"]})
    monkeypatch.setattr(handler.explainer, "methods", ("occlusion",))
    refused = post(client, sent[0])
    assert (refused.status_code, refused.json()["field"]) == (422, "explain")
    assert "gradcam needs feature maps" in refused.json()["detail"]


def test_a_server_that_is_busy_keeps_no_maps_from_a_report(client, sent, monkeypatch):
    """Who comes again gets them."""
    explain, refusals = Explainer.__call__, [busy("4 images wait for hsg already")]

    async def refused_once(*arguments):
        if refusals:
            raise refusals.pop()
        return await explain(*arguments)

    monkeypatch.setattr(Explainer, "__call__", refused_once)
    refused = post(client, sent[0])
    assert refused.status_code == 503 and "Retry-After" in refused.headers
    assert [ds.Modality for ds in results(post(client, sent[0]))] == ["SR"] + ["OT"] * len(sent[0])


def test_who_asks_twice_gets_the_same_objects(client, sent):
    first, second = (results(post(client, sent[0])) for _ in range(2))
    assert [ds.SOPInstanceUID for ds in first] == [ds.SOPInstanceUID for ds in second]


def test_stow_clients_get_the_standards_response(client, sent):
    report = results(post(client, sent[0], results="report"))[0]
    response = post(client, [*sent[0], report, b"no DICOM"], JSON)
    assert response.status_code == 202 and response.headers["content-type"] == JSON
    told = Dataset.from_json(response.json())
    assert [item.ReferencedSOPInstanceUID for item in told.ReferencedSOPSequence] == [
        ds.SOPInstanceUID for ds in sent[0]
    ]
    assert [item.FailureReason for item in told.FailedSOPSequence] == [0x0122, 0xC000]
    answer = json.loads(told.private_block(0x0099, "RAYMED")[0x01].value)
    assert answer["decision"] in ("positive", "negative", "abstain")
    assert post(client, sent[0], JSON).status_code == 200


def test_what_the_model_was_not_made_for_is_left_out_of_a_study(client, sent):
    other = pydicom.dcmread(io.BytesIO(content(sent[0][1])))
    other.Modality = "CT"
    report = results(post(client, [other, sent[0][0]], results="report"))[0]
    evidence = report.CurrentRequestedProcedureEvidenceSequence[0].ReferencedSeriesSequence[0].ReferencedSOPSequence
    assert [item.ReferencedSOPInstanceUID for item in evidence] == [sent[0][0].SOPInstanceUID]
    alone = post(client, [other])
    assert alone.status_code == 422 and alone.json()["field"] == "files[0].modality"


def test_what_cannot_be_read_is_left_out_of_no_decision(client, sent, monkeypatch):
    unknown = pydicom.dcmread(io.BytesIO(content(sent[0][1])))
    unknown.file_meta.TransferSyntaxUID = pydicom.uid.HTJ2KLossless
    unknown.PixelData = pydicom.encaps.encapsulate([b"pixels"])
    crowded = pydicom.dcmread(io.BytesIO(content(sent[0][1])))
    monkeypatch.setattr(Counted, "left", 300)
    crowded.update({(0x0009, 0x1000 + i): pydicom.DataElement((0x0009, 0x1000 + i), "LO", "x") for i in range(400)})
    for wrong, status in ((unknown, 415), (crowded, 413), (content(sent[0][1])[:300], 422), (b"no DICOM", 415)):
        for accept in (RELATED, "application/json"):
            refused = post(client, [sent[0][0], wrong], accept)
            assert (refused.status_code, refused.json()["field"]) == (status, "files[1]")
        assert post(client, [sent[0][0], wrong], JSON).status_code == 202  # which says so


def test_a_report_in_an_encoding_that_is_not_taken_is_no_image(client, sent):
    report = results(post(client, sent[0], results="report"))[0]
    report.file_meta.TransferSyntaxUID = pydicom.uid.DeflatedExplicitVRLittleEndian
    assert len(results(post(client, [*sent[0], report], results="report"))) == 1


def test_an_earlier_report_is_named(client, sent):
    first = results(post(client, sent[0][:1], results="report"))[0]
    before = f"{first.SeriesInstanceUID}/{first.SOPInstanceUID}"
    later = results(post(client, sent[0], results="report", before=before))[0]
    named = later.PredecessorDocumentsSequence[0].ReferencedSeriesSequence[0].ReferencedSOPSequence[0]
    assert named.ReferencedSOPInstanceUID == first.SOPInstanceUID != later.SOPInstanceUID
    assert post(client, sent[0], before="1.2.3").status_code == 422


def test_one_file_needs_no_multipart(client, sent):
    response = client.post(ADDRESS, content=content(sent[0][0]), headers={"Content-Type": DICOM})
    assert results(response)[0].Modality == "SR"


def test_studies_are_answered_one_by_one(client, sent):
    assert post(client, [sent[0][0], sent[1][0]]).status_code == 422
    one = f"{ADDRESS}/{sent[0][0].StudyInstanceUID}"
    assert post(client, sent[0], address=one).status_code == 200
    assert post(client, sent[1], address=one).status_code == 409


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Accept": "image/png"}, 406),
        ({"Content-Type": "application/json"}, 422),
        ({"Content-Type": 'multipart/related; type="application/pdf"; boundary=x'}, 422),
        ({"Content-Type": "multipart/related"}, 422),
        ({"Content-Type": f"{RELATED}; boundary=other"}, 422),
    ],
)
def test_other_forms_are_refused(client, sent, headers, status):
    body, kind = write_related([content(sent[0][0])])
    response = client.post(ADDRESS, content=body, headers={"Content-Type": kind, "Accept": "*/*"} | headers)
    assert response.status_code == status and response.headers["content-type"] == "application/problem+json"


def test_what_cannot_be_used_is_said_without_values(client, sent):
    assert post(client, [b"nothing"]).status_code == 422
    assert post(client, sent[0], results="picture").status_code == 422
    assert post(client, sent[0], nonsense="1").status_code == 422
    assert client.post("/v1/models/other/studies", content=b"", headers={"Content-Type": DICOM}).status_code == 404
    cut = content(sent[0][0])[:-1000]
    response = post(client, [cut])
    assert response.status_code == 422
    assert str(sent[0][0].PatientID) not in response.text and sent[0][0].SOPInstanceUID not in response.text


def test_bodies_come_back_as_they_went(tmp_path):
    parts = [b"", b"\r\n--x\r\n", bytes(range(256)) * 100]
    assert read_related(*write_related(parts)) == parts
    for place, part in enumerate(parts):
        (tmp_path / str(place)).write_bytes(part)
    pieces, headers = related_of_files(sorted(tmp_path.iterdir()))
    body = b"".join(pieces)
    assert read_related(body, headers["Content-Type"]) == parts and headers["Content-Length"] == str(len(body))
    body, kind = write_related(parts)
    with pytest.raises(UserError):
        read_related(b"no boundary", kind)
    with pytest.raises(UserError, match="at most 2000"):
        read_related(*write_related([b"x"] * 2001))
