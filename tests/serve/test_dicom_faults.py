"""A node whose archive or server is not there for a while loses nothing."""

import logging
import shutil
import tracemalloc
from io import BytesIO

import pydicom
import pytest
from dicom_helpers import Archive, content, files, free_port, is_assessment, is_over, node, send_study, serving, texts
from pydicom.uid import SegmentationStorage
from waiting import until

from raymed.serve.dicom.endpoint import Endpoint, NotNow, Results, identity_of_report
from raymed.serve.dicom.node import Node
from raymed.serve.dicom.pacs import Receiver, send
from raymed.serve.dicom.queue import Queue
from raymed.serve.uploads.dicom import Counted

NODE = "raymed.dicom"


def test_results_wait_for_an_archive_that_is_down(tmp_path, sent, server):
    port_of_pacs = free_port()
    with node(tmp_path, server, port_of_pacs) as port:
        send_study(sent[0], port)
        send_study(sent[1], port)
        until(lambda: len(Queue(tmp_path).ready()) == 2)
        with Archive(port=port_of_pacs, refuses=1) as pacs:  # and says that it is full at first
            until(lambda: is_over(tmp_path))
            assert len(pacs.of("SR")) == 2
            assert len({ds.SOPInstanceUID for ds in pacs.received}) == len(pacs.received)


def test_what_an_archive_does_not_take_holds_nothing_else_up(tmp_path, sent, server):
    with Archive(classes=(SegmentationStorage,)) as pacs, node(tmp_path, server, pacs.port) as port:
        send_study(sent[0], port)
        send_study(sent[1], port)
        until(lambda: len(pacs.of("SR")) == 2)
        overlays = [len(sent[0])] * 2  # are kept; a report goes a moment after it has arrived
        until(lambda: [len(result.files) for result in Queue(tmp_path).ready()] == overlays)


def test_an_archive_that_takes_none_of_the_objects_is_there(tmp_path, sent):
    (tmp_path / "image.dcm").write_bytes(content(sent[0][0]))
    with Archive() as pacs:
        ((_, why),) = send("RAYMED", Receiver("PACS1", "127.0.0.1", pacs.port), [tmp_path / "image.dcm"])
    assert why == "the receiver takes no objects of this class"


def test_an_endpoint_that_is_not_ready_is_asked_again_when_it_says(tmp_path, sent, app_config, bundle_folder, caplog):
    caplog.set_level(logging.INFO, NODE)
    later = tmp_path / "bundle"
    config = app_config(models=(f"hsg={later}",), **{"follow.every_s": 0.2, "access.hosts": ("127.0.0.1",)})
    with serving(config) as address, Archive() as pacs, node(tmp_path / "node", address, pacs.port) as port:
        send_study(sent[0], port)
        until(lambda: "HTTP 503" in caplog.text)
        shutil.copytree(bundle_folder, later)
        until(lambda: pacs.of("SR"))
    asked = [record for record in caplog.records if "HTTP 503" in record.message]
    assert len(asked) == 1 and "again in 5 s" in asked[0].message  # its Retry-After, not a wait of our own


def test_an_endpoint_that_is_down_is_waited_for(tmp_path, sent, app_config, caplog):
    caplog.set_level(logging.INFO, NODE)
    with Archive() as pacs, node(tmp_path, f"http://127.0.0.1:{free_port()}", pacs.port) as port:
        send_study(sent[0], port)
        until(lambda: caplog.text.count("not there") >= 2)
        assert len(files(tmp_path, "images")) == len(sent[0])
    with serving(app_config(**{"access.hosts": ("127.0.0.1",)})) as address, Archive() as pacs:
        with node(tmp_path, address, pacs.port):
            assert is_assessment(until(lambda: pacs.of("SR"))[0])


def test_a_study_that_is_too_large_is_told_so(tmp_path, sent, app_config):
    config = app_config(**{"limits.body_bytes": 30_000, "access.hosts": ("127.0.0.1",)})
    with serving(config) as address, Archive() as pacs, node(tmp_path, address, pacs.port) as port:
        run = next(study for study in sent if sum(len(ds.PixelData) for ds in study) > 40_000)
        send_study(run, port)
        (report,) = until(lambda: pacs.of("SR"))
    assert not is_assessment(report) and "30000" in texts(report)


def take_on(queue, *study):
    for ds in study:
        queue.add(ds.StudyInstanceUID, ds.SOPInstanceUID, "PACS1", content(ds))


def answered(queue, address):
    """The report of the study that is due, answered as by a node."""
    (study,) = queue.due(0)
    found = Endpoint(address, "hsg", results=("report",)).ask(list(study.images.values()), study.before, study.refusal)
    queue.answer(study, found.files, identity_of_report(found.files[0]), found.is_refusal)
    return pydicom.dcmread(BytesIO(found.files[0]))


def replaced(report):
    """SOP Instance UIDs of the reports that one takes the place of."""
    documents = report.get("PredecessorDocumentsSequence") or []
    series = [series for document in documents for series in document.ReferencedSeriesSequence]
    return {item.ReferencedSOPInstanceUID for each in series for item in each.ReferencedSOPSequence}


def test_a_refusal_takes_the_place_of_no_answer(tmp_path, sent, app_config):
    """What was found in the images before the late one stands, until all of them are answered."""
    views = [pydicom.dcmread(BytesIO(content(sent[0][0]))) for _ in range(4)]
    for place, ds in enumerate(views, 1):
        ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = f"{ds.SOPInstanceUID[:-2]}{place}"
    queue, access = Queue(tmp_path), {"access.hosts": ("127.0.0.1",)}
    with serving(app_config(**{"limits.files": 1}, **access)) as address:
        take_on(queue, views[0])
        good = answered(queue, address)
        take_on(queue, views[1])
        refusal = answered(queue, address)
        take_on(queue, views[2])
        again = answered(queue, address)
    with serving(app_config(**access)) as address:
        take_on(queue, views[3])
        whole = answered(queue, address)
    assert is_assessment(good) and is_assessment(whole)
    for report in (refusal, again):
        assert not is_assessment(report) and "at most 1 make a case" in texts(report)
        assert "An earlier report of this study, about fewer images, stands" in texts(report)
    assert replaced(refusal) == set() and replaced(again) == {refusal.SOPInstanceUID}
    assert replaced(whole) == {good.SOPInstanceUID, again.SOPInstanceUID}


def test_a_refusal_is_replaced_by_an_answer(tmp_path, sent, app_config):
    queue, access = Queue(tmp_path), {"access.hosts": ("127.0.0.1",)}
    with serving(app_config(**{"limits.body_bytes": 1000}, **access)) as address:
        take_on(queue, sent[0][0])
        refusal = answered(queue, address)
    with serving(app_config(**access)) as address:
        take_on(queue, *sent[0][1:])
        whole = answered(queue, address)
    assert not is_assessment(refusal) and "stands" not in texts(refusal)
    assert is_assessment(whole) and replaced(whole) == {refusal.SOPInstanceUID}


def test_a_study_is_sent_without_being_held_in_memory(tmp_path, sent, app_config):
    large = tmp_path / "large.dcm"
    large.write_bytes(content(sent[0][0]))
    with large.open("r+b") as file:
        file.truncate(2**27)
    with serving(app_config(**{"access.hosts": ("127.0.0.1",)})) as address:
        endpoint = Endpoint(address, "hsg")
        endpoint.ask([large])  # whatever is imported and made only once
        tracemalloc.start()
        (report,) = endpoint.ask([large]).files
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert f"{2**26} bytes" in texts(pydicom.dcmread(BytesIO(report))) and most < 2**25


def test_a_full_disk_is_said(tmp_path, sent):
    with node(tmp_path, "http://127.0.0.1:9", 9) as port:
        (tmp_path / "images").rmdir()
        (tmp_path / "images").touch()  # nothing can be written there
        assert set(send_study(sent[0], port)) == {0xA700}


@pytest.mark.parametrize("after", [None, 0.0])
def test_one_study_that_gets_no_answer_lets_others_go_first(tmp_path, sent, after):
    """Whatever it is told: the server that is busy by this study alone says the same as one that is busy by all."""
    asked = []

    class Choosy(Endpoint):
        def ask(self, files, before="", refusal=""):
            asked.append(pydicom.dcmread(files[0]).StudyInstanceUID)
            if asked[-1] == sent[0][0].StudyInstanceUID:
                raise NotNow("HTTP 503", after)
            return Results([files[0].read_bytes()])

    made = Node("RAYMED", {}, Choosy("http://127.0.0.1:9", "hsg"), Queue(tmp_path), quiet=0.0, longest_wait=0.01)
    for study in sent[:3]:
        made.queue.add(study[0].StudyInstanceUID, study[0].SOPInstanceUID, "PACS1", content(study[0]))
    first, *rest = [study[0].StudyInstanceUID for study in sent[:3]]
    until(lambda: made._ask() or asked.count(first) == 2)
    assert asked == [first, *rest, first]


def test_a_study_with_an_image_that_cannot_be_read_is_told_so(tmp_path, sent, server, monkeypatch):
    crowded = pydicom.dcmread(BytesIO(content(sent[0][1])))
    crowded.update({(0x0009, 0x1000 + i): pydicom.DataElement((0x0009, 0x1000 + i), "LO", "x") for i in range(400)})
    monkeypatch.setattr(Counted, "left", 300)
    with Archive() as pacs, node(tmp_path, server, pacs.port, quiet=2.0) as port:
        send_study([sent[0][0], crowded], port)
        (report,) = until(lambda: pacs.of("SR"))
        until(lambda: is_over(tmp_path))
    assert not is_assessment(report) and "too many data elements" in texts(report)


def test_who_is_to_get_what_is_kept_is_asked_for(tmp_path, sent, caplog):
    queue = Queue(tmp_path)
    for study, title in zip(sent[:3], ("OLD", "OLD", "PACS1"), strict=True):
        queue.add(study[0].StudyInstanceUID, study[0].SOPInstanceUID, title, content(study[0]))
    queue.answer(queue.due(0)[0], [b"report"], "1/2")
    with node(tmp_path, "http://127.0.0.1:9", 9, quiet=60.0):
        told = [record.message for record in caplog.records if "--reply-to" in record.message]
    assert told == ["results of 2 studies wait for OLD, whose address is not in --reply-to"]


def test_a_refusal_that_cannot_be_written_is_in_the_log(tmp_path, sent, server, caplog, monkeypatch):
    other = pydicom.dcmread(BytesIO(content(sent[0][0])))
    other.Modality = "CT"

    def broken(*_):
        raise ValueError(str(other.PatientID))

    with monkeypatch.context() as patch, Archive() as pacs, node(tmp_path, server, pacs.port) as port:
        patch.setattr(Endpoint, "_refused", broken)
        send_study([other], port)
        until(lambda: "no report can say so" in caplog.text)
        send_study(sent[1], port)
        assert until(lambda: pacs.of("SR"))[0].StudyInstanceUID == sent[1][0].StudyInstanceUID
        patch.undo()
        until(lambda: len(pacs.of("SR")) == 2)
    assert "HTTP 422: files[0].modality: XA is expected; no report can say so (ValueError); again in 1 s" in caplog.text
    assert str(other.PatientID) not in caplog.text


def test_one_study_that_cannot_be_asked_about_holds_no_other_up(tmp_path, sent, server, caplog):
    with Archive() as pacs, node(tmp_path, server, pacs.port, quiet=1.0) as port:
        send_study(sent[0], port)
        for path in files(tmp_path, "images"):
            path.unlink()  # by somebody's hand
        send_study(sent[1], port)
        assert until(lambda: pacs.of("SR"))[0].StudyInstanceUID == sent[1][0].StudyInstanceUID
    assert "FileNotFoundError; again in 1 s" in caplog.text
