"""The node, with real associations and a real server: what an archive sends comes back as a report and overlays."""

import contextlib
import io
import logging
import re
import socket

import pydicom
import pytest
from dicom_helpers import Archive, content, files, is_assessment, is_over, node, send_study, serving, texts
from pydicom.uid import SecondaryCaptureImageStorage
from pynetdicom import AE
from waiting import until

from raymed.config import UserError
from raymed.serve.access.tokens import add_token
from raymed.serve.dicom.node import Patience
from raymed.serve.dicom.pacs import Receiver, parse_receivers


def echo(port, calling="PACS1", called="RAYMED"):
    """Status of a C-ECHO; None where there is no association."""
    entity = AE(calling)
    entity.add_requested_context("1.2.840.10008.1.1")
    association = entity.associate("127.0.0.1", port, ae_title=called)
    status = association.send_c_echo().Status if association.is_established else None
    association.release()
    return status


def test_who_is_not_allowed_gets_no_association(tmp_path):
    with node(tmp_path, "http://127.0.0.1:9", 9) as port:
        assert echo(port) == 0
        assert echo(port, calling="PACS2") is None
        assert echo(port, called="OTHER") is None


def test_who_says_nothing_holds_nobody_up(tmp_path):
    with node(tmp_path, "http://127.0.0.1:9", 9) as port, contextlib.ExitStack() as stack:
        silent = [stack.enter_context(socket.create_connection(("127.0.0.1", port), 15)) for _ in range(12)]
        assert echo(port) == 0  # pynetdicom by itself takes ten
        assert silent[0].recv(1) == b""  # and lets who is silent stay for half a minute


def test_a_study_comes_back_as_report_and_overlays(tmp_path, sent, server):
    with Archive() as pacs, node(tmp_path, server, pacs.port) as port:
        for study in sent[:6]:  # runs and single images, MONOCHROME1 and 2
            assert set(send_study(study, port)) == {0x0000}
        reports = until(lambda: len(pacs.of("SR")) == 6 and pacs.of("SR"))
        until(lambda: is_over(tmp_path))
        for study in sent[:6]:
            (report,) = [ds for ds in reports if ds.StudyInstanceUID == study[0].StudyInstanceUID]
            assert (report.PatientID, report.PatientName) == (study[0].PatientID, study[0].PatientName)
            assert "RESEARCH USE ONLY" in texts(report) and is_assessment(report)
            overlays = [ds for ds in pacs.of("OT") if ds.StudyInstanceUID == report.StudyInstanceUID]
            assert len(overlays) == sum(int(ds.get("NumberOfFrames") or 1) for ds in study)
            assert {ds.SOPClassUID for ds in overlays} == {SecondaryCaptureImageStorage}
    kinds = {ds.PhotometricInterpretation for study in sent[:6] for ds in study}
    assert kinds == {"MONOCHROME1", "MONOCHROME2"} and any("NumberOfFrames" in ds for study in sent[:6] for ds in study)


def test_a_resend_makes_no_second_result(tmp_path, sent, server):
    with Archive() as pacs:
        with node(tmp_path, server, pacs.port) as port:
            send_study(sent[0], port)
            until(lambda: pacs.of("SR") and is_over(tmp_path))
            num = len(pacs.received)
            send_study(sent[0], port)
            send_study(sent[1], port)  # what is asked after it shows that it was passed over
            until(lambda: len(pacs.of("SR")) == 2 and is_over(tmp_path))
        with node(tmp_path, server, pacs.port) as port:  # nor after a restart
            send_study(sent[0], port)
            send_study(sent[2], port)
            until(lambda: len(pacs.of("SR")) == 3 and is_over(tmp_path))
        of_first = [ds for ds in pacs.received if ds.StudyInstanceUID == sent[0][0].StudyInstanceUID]
        assert len(of_first) == num
        assert len({ds.SOPInstanceUID for ds in pacs.received}) == len(pacs.received)
        assert all(map(is_assessment, pacs.of("SR")))
    again = tmp_path / "again"
    with Archive() as pacs, node(again, server, pacs.port) as port:  # a node that knows nothing makes the same objects
        send_study(sent[0], port)
        until(lambda: pacs.of("SR") and is_over(again))
        assert {ds.SOPInstanceUID for ds in pacs.received} == {ds.SOPInstanceUID for ds in of_first}


def test_a_late_image_makes_a_report_that_supersedes(tmp_path, sent, server):
    with Archive() as pacs, node(tmp_path, server, pacs.port, results=("report",)) as port:
        send_study(sent[0][:1], port)
        until(lambda: len(pacs.of("SR")) == 1)
        send_study(sent[0][1:], port)
        first, second = until(lambda: len(pacs.of("SR")) == 2 and pacs.of("SR"))
    series = second.PredecessorDocumentsSequence[0].ReferencedSeriesSequence[0]
    assert series.ReferencedSOPSequence[0].ReferencedSOPInstanceUID == first.SOPInstanceUID
    assert series.SeriesInstanceUID == first.SeriesInstanceUID == second.SeriesInstanceUID
    assert "PredecessorDocumentsSequence" not in first
    evidence = second.CurrentRequestedProcedureEvidenceSequence[0].ReferencedSeriesSequence[0].ReferencedSOPSequence
    assert {item.ReferencedSOPInstanceUID for item in evidence} == {ds.SOPInstanceUID for ds in sent[0]}


def test_images_that_keep_coming_are_one_study(tmp_path, sent, server):
    with Archive() as pacs, node(tmp_path, server, pacs.port, quiet=1.0, results=("report",)) as port:
        for ds in sent[0]:
            send_study([ds], port)
        report = until(lambda: pacs.of("SR"))[0]
        assert len(pacs.received) == 1
        evidence = report.CurrentRequestedProcedureEvidenceSequence[0].ReferencedSeriesSequence[0]
        assert len(evidence.ReferencedSOPSequence) == len(sent[0])


def test_a_study_that_cannot_be_used_gets_a_report_that_says_so(tmp_path, sent, server):
    other = pydicom.dcmread(io.BytesIO(content(sent[0][0])))
    other.Modality, other.PatientID = "CT", "another"
    with Archive() as pacs, node(tmp_path, server, pacs.port) as port:
        send_study([other], port)
        (report,) = until(lambda: pacs.of("SR"))
        until(lambda: is_over(tmp_path))
    assert report.PatientID == "another"
    assert not is_assessment(report) and "XA is expected" in texts(report)
    group = report.ContentSequence[-1].ContentSequence[0]
    decision = [item for item in group.ContentSequence if item.ConceptNameCodeSequence[0].CodeValue == "DECISION"]
    assert decision[0].ConceptCodeSequence[0].CodeMeaning == "Not Evaluated"


def test_files_go_when_their_results_have_arrived(tmp_path, sent, server):
    with Archive() as pacs, node(tmp_path, server, pacs.port, days=0, results=("report",)) as port:
        send_study(sent[0], port)
        until(lambda: pacs.of("SR"))
        until(lambda: not [path for path in tmp_path.rglob("*") if path.suffix in (".dcm", ".sent")])
        send_study(sent[0], port)  # it is still known
        until(lambda: not files(tmp_path, "images"))
        assert len(pacs.of("SR")) == 1
        (late,) = [pydicom.dcmread(io.BytesIO(content(sent[0][0])))]
        late.SOPInstanceUID = late.file_meta.MediaStorageSOPInstanceUID = f"{late.SOPInstanceUID[:-2]}1"
        send_study([late], port)  # answered by itself: what came before it is not here any more
        report = until(lambda: len(pacs.of("SR")) == 2 and pacs.of("SR"))[-1]
        assert "PredecessorDocumentsSequence" not in report
    with Archive() as pacs, node(tmp_path / "kept", server, pacs.port, results=("report",)) as port:
        send_study(sent[0], port)
        until(lambda: pacs.of("SR") and is_over(tmp_path / "kept"))
        assert len(files(tmp_path / "kept", "images")) == len(sent[0])


def test_other_objects_are_refused_and_own_ones_go_nowhere(tmp_path, sent, server):
    with Archive() as pacs, node(tmp_path, server, pacs.port) as port:
        entity = AE("PACS1")
        entity.add_requested_context(pydicom.uid.RTPlanStorage)
        entity.add_requested_context(sent[0][0].SOPClassUID, ["1.2.840.10008.1.2.1"])
        association = entity.associate("127.0.0.1", port, ae_title="RAYMED")
        assert [context.abstract_syntax for context in association.rejected_contexts] == [pydicom.uid.RTPlanStorage]
        for name in ("StudyInstanceUID", "SeriesInstanceUID"):
            for value in (None, ["1.2.3", "1.2.4"]):
                wrong = pydicom.dcmread(io.BytesIO(content(sent[0][0])))
                setattr(wrong, name, value)
                assert association.send_c_store(wrong).Status == 0xA900
        association.release()
        send_study(sent[0], port)
        until(lambda: pacs.of("SR") and is_over(tmp_path))
        own = pydicom.dcmread(io.BytesIO(content(sent[1][0])))
        own.Manufacturer = "raymed"
        assert send_study([own], port) == [0x0000]
        assert len(files(tmp_path, "images")) == len(sent[0])


def test_logs_name_nobody(tmp_path, sent, server, caplog, capfd):
    caplog.set_level(logging.DEBUG)
    with Archive() as pacs, node(tmp_path, server, pacs.port) as port:
        send_study(sent[0], port)
        until(lambda: pacs.of("SR") and is_over(tmp_path))
    told = "\n".join(
        record.getMessage() for record in caplog.records if record.name.startswith(("raymed", "highdicom"))
    )
    told += "".join(capfd.readouterr())
    assert re.search(r"study [0-9a-f]{12}: \d images answered", told)
    ds = sent[0][0]
    for value in (ds.PatientID, ds.StudyInstanceUID, ds.SOPInstanceUID, ds.AccessionNumber, str(ds.PatientName)):
        assert value not in told
    names = " ".join(str(path) for path in tmp_path.rglob("*"))
    assert ds.StudyInstanceUID not in names and ds.PatientID not in names


def test_odd_values_are_told_nobody(tmp_path, sent, monkeypatch, caplog, recwarn):
    monkeypatch.setattr(pydicom.config.settings, "_reading_validation_mode", pydicom.config.WARN)
    monkeypatch.setattr(logging.getLogger("pydicom"), "level", logging.NOTSET)
    odd = pydicom.dcmread(io.BytesIO(content(sent[0][0])))
    with node(tmp_path, "http://127.0.0.1:9", 9) as port:
        odd.SeriesInstanceUID = "HONG.GILDONG"
        assert send_study([odd], port) == [0x0000]
    assert "HONG" not in caplog.text + "".join(str(warning.message) for warning in recwarn)


def test_a_node_without_a_valid_token_says_how_to_get_one(tmp_path, sent, app_config, caplog):
    config = app_config(**{"access.open": False, "access.tokens": tmp_path / "tokens.json"})
    add_token(tmp_path / "tokens.json", "another", 1)
    with serving(config) as address, node(tmp_path / "node", address, 9) as port:
        send_study(sent[0], port)
        until(lambda: "HTTP 401" in caplog.text)
    (told,) = {record.message for record in caplog.records if "HTTP 401" in record.message}
    for word in ("--token-file", "RAYMED_NODE_TOKEN", "jobs/serve_tokens.py add", "again in"):
        assert word in told


def test_receivers_are_named_for_every_sender():
    found = parse_receivers(["PACS1@10.0.0.5:104", "CT1=PACS1@10.0.0.5:104"], ["PACS1", "CT1"])
    assert found == {"PACS1": Receiver("PACS1", "10.0.0.5", 104), "CT1": Receiver("PACS1", "10.0.0.5", 104)}
    assert set(parse_receivers(["PACS1@h:1", "PACS2@h:2"], ["PACS2"])) == {"PACS2"}
    with pytest.raises(UserError, match="nobody gets the results of what CT1 sends"):
        parse_receivers(["PACS1@10.0.0.5:104"], ["CT1"])
    with pytest.raises(UserError, match="name the AE titles"):
        parse_receivers(["PACS1@10.0.0.5:104"], [])
    with pytest.raises(UserError, match="PACS has two addresses"):
        parse_receivers(["CT1=PACS@10.0.0.5:104", "CT2=PACS@10.0.0.6:104"], ["CT1", "CT2"])
    with pytest.raises(UserError, match="what CT1 sends is named twice"):
        parse_receivers(["CT1=PACS1@10.0.0.5:104", "CT1=PACS2@10.0.0.6:104"], ["CT1"])
    for wrong in ("PACS1", "PACS1@host", "PACS1@host:0", "A_TITLE_FAR_TOO_LONG@host:1", "@host:1"):
        with pytest.raises(UserError, match="TITLE@HOST:PORT"):
            parse_receivers([wrong], ["PACS1"])


def test_waits_grow_and_end():
    patience = Patience(longest=5)
    assert [patience.failed("it") for _ in range(5)] == [1, 2, 4, 5, 5]
    assert patience.failed("it", 0.0) == 0.0 and patience.is_due("it") and patience.is_due("other")
    patience.worked("it")
    assert patience.failed("it") == 1 and not patience.is_due("it")
