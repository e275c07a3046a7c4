"""The challenger answers its share of the patients, whichever way a request names them."""

import base64
import io
from collections import Counter

import dicom_helpers
import pydicom
import pytest
from fastapi.testclient import TestClient
from hostile import NAME, deflated, dicom
from prometheus_client.parser import text_string_to_metric_families
from test_dicom_web import post, results

from raymed.serve.app import create_app
from raymed.serve.canary import is_in_share, patient_of
from raymed.serve.uploads import File
from raymed.tracking import connect

PREDICT = "/v1/models/hsg:predict"


@pytest.mark.parametrize(
    ("attributes", "patient"),
    [
        ({"PatientID": "P1", "StudyInstanceUID": "1.2.9"}, "P1"),
        ({"StudyInstanceUID": "1.2.9"}, "1.2.9"),
        ({"PatientID": "", "StudyInstanceUID": "1.2.9"}, "1.2.9"),
        ({}, ""),
    ],
)
def test_a_patient_is_named_by_his_number_or_his_study(attributes, patient, png):
    assert patient_of([File(png), File(dicom(**attributes)), File(dicom(PatientID="another"))]) == (
        patient or "another"
    )
    assert patient_of([File(dicom(**attributes))]) == patient


def test_what_cannot_be_read_names_nobody(png):
    sound = dicom(PatientID="P1")
    damaged = [b"", png, deflated(), sound[:140], bytes(128) + b"DICM" + bytes(500), b"DICM" * 50]
    assert patient_of([File(content) for content in damaged]) == ""


@pytest.fixture
def client(registry_home, app_config):
    """Of a server whose challenger answers half of the patients."""
    connect(None, registry_home).set_registered_model_alias("hsg", "challenger", "2")
    changes = {"models": ("hsg=models:/hsg@champion",), "storage": str(registry_home), "follow.canary": 0.5}
    with TestClient(create_app(app_config(**changes))) as started:
        yield started


def test_every_request_of_a_patient_is_answered_by_one_version(client, images, png, capfd):
    patients = [f"Kim-{number}" for number in range(24)]
    expected = ["2" if is_in_share("hsg", patient, 0.5) else "1" for patient in patients]
    assert 4 < expected.count("2") < 20
    for _ in range(2):
        objects = [dicom(images[0], PatientID=patient, BodyPartExamined="UTERUS") for patient in patients]
        by_object = [client.post(PREDICT, content=content).json() for content in objects]
        by_header = [client.post(PREDICT, content=png, headers={"X-Patient": p}).json() for p in patients]
        assert [answer["version"] for answer in by_object] == expected
        assert [answer["version"] for answer in by_header] == expected
    assert len({(answer["version"], answer["result"]["threshold"]) for answer in by_header}) == 2
    assert [client.post(PREDICT, content=png).json()["version"] for _ in range(8)] == ["1"] * 8
    told = "".join(capfd.readouterr()) + client.get("/metrics").text + client.get("/readyz").text
    assert "Kim-" not in told and NAME.split("^")[0] not in told


def test_a_version_that_is_asked_for_by_its_number_answers_whoever_the_patient_is(client, images, png):
    patient = next(name for name in map("Kim-{}".format, range(99)) if is_in_share("hsg", name, 0.5))
    named = dicom(images[0], PatientID=patient, BodyPartExamined="UTERUS")

    def asked(path, content, headers):
        data = base64.b64encode(content).decode()
        tensor = {"name": "image", "datatype": "BYTES", "shape": [1], "data": [data]}
        answer = client.post(path, json={"inputs": [tensor]}, headers=headers)
        assert answer.status_code == 200, answer.text
        return answer.json()["model_version"]

    for content, headers in ((named, {}), (png, {"X-Patient": patient})):
        assert asked("/v2/models/hsg/infer", content, headers) == "2"
        assert asked("/v2/models/hsg/versions/1/infer", content, headers) == "1"
    found = client.post("/v2/models/hsg/versions/2/infer", json={"inputs": []})
    assert found.status_code == 404, "by its number only the champion answers"


def test_a_study_is_planned_by_the_version_that_answers_it(client, sent):
    """Which explanations are possible, and which images it was made for."""
    versions = client.app.state.service.models.served["hsg"].versions
    champion, challenger = versions["champion"].handler, versions["challenger"].handler
    challenger.explainer.methods = ("occlusion",)
    challenger.bundle.contract["modality"] = "CT"

    def answered(patient):
        study = [pydicom.dcmread(io.BytesIO(dicom_helpers.content(ds))) for ds in sent[0]]
        study[1].Modality = "CT"
        for ds in study:
            ds.PatientID = patient
        report, *overlays = results(post(client, study))
        assert "no heat maps" not in dicom_helpers.texts(report)
        method = overlays[0].DerivationDescription.split()[0]
        series = report.CurrentRequestedProcedureEvidenceSequence[0].ReferencedSeriesSequence
        used = [item.ReferencedSOPInstanceUID for each in series for item in each.ReferencedSOPSequence]
        return method, [ds.SOPInstanceUID for ds in study].index(*used)

    patients = sorted(map("Kim-{}".format, range(24)), key=lambda patient: is_in_share("hsg", patient, 0.5))
    assert (answered(patients[0]), answered(patients[-1])) == (("gradcam", 0), ("occlusion", 1))
    champion.explainer.methods = ()
    assert answered(patients[-1]) == ("occlusion", 1)


def test_readiness_and_metrics_name_both(client):
    assert client.get("/readyz").json()["hsg"]["versions"] == {"champion": "1", "challenger": "2"}
    lines = [line for line in client.get("/metrics").text.splitlines() if line.startswith("raymed_model_info{")]
    assert len(lines) == 2 and any('alias="challenger"' in line and 'version="2"' in line for line in lines)


def test_what_either_decides_is_told_apart(client, png):
    patients = [f"Kim-{number}" for number in range(8)]
    answers = [client.post(PREDICT, content=png, headers={"X-Patient": patient}).json() for patient in patients]
    aliases = ["challenger" if answer["version"] == "2" else "champion" for answer in answers]
    assert set(aliases) == {"champion", "challenger"}
    families = {each.name: each for each in text_string_to_metric_families(client.get("/metrics").text)}

    def counted(family, name, *labels):
        samples = [sample for sample in families[family].samples if sample.name == name]
        return {tuple(sample.labels[label] for label in labels): sample.value for sample in samples}

    decisions = Counter((alias, answer["decision"]) for alias, answer in zip(aliases, answers, strict=True))
    assert counted("raymed_decisions", "raymed_decisions_total", "alias", "decision") == decisions
    assert counted("raymed_score", "raymed_score_count", "alias") == Counter((alias,) for alias in aliases)
