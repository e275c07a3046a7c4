"""What a node keeps on disk."""

import os
import stat
import time

import pytest

from raymed.serve.dicom import queue as module
from raymed.serve.dicom.queue import Queue

DAY = 86400


@pytest.fixture
def queue(tmp_path):
    return Queue(tmp_path / "node")


@pytest.fixture
def clock(monkeypatch):
    """clock(SECONDS) moves the time."""
    now = [time.time()]
    monkeypatch.setattr(module.time, "time", lambda: now[0])

    def move(seconds):
        now[0] += seconds

    return move


def add(queue, *images, study="1.2.3", receiver="PACS1"):
    for image in images:
        queue.add(study, image, receiver, f"pixels of {image}".encode())


def deliver(queue):
    for result in queue.ready():
        for file in result.files:
            queue.confirm(file)
        queue.sent(result)


def contents(study):
    return sorted(path.read_text() for path in study.images.values())


def test_a_study_is_due_when_nothing_has_come_for_a_while(queue, clock):
    add(queue, "1", "2")
    clock(3)
    add(queue, "2")  # also what came before
    clock(3)
    assert queue.due(5) == []
    clock(3)
    (study,) = queue.due(5)
    assert contents(study) == ["pixels of 1", "pixels of 2"] and study.before == ""


def test_what_comes_while_it_is_asked_about_is_asked_about_next(queue):
    add(queue, "1")
    (study,) = queue.due(0)
    add(queue, "2")
    queue.answer(study, [b"report"], "9.1/9.2")
    (later,) = queue.due(0)
    assert contents(later) == ["pixels of 1", "pixels of 2"] and later.before == "9.1/9.2"
    queue.answer(later, [b"report", b"overlay"], "9.1/9.3")
    assert queue.due(0) == []
    assert [len(result.files) for result in queue.ready()] == [1, 2]
    assert queue.ready()[1].files[0].read_bytes() == b"report"


def test_studies_are_kept_apart_by_their_receivers(queue):
    add(queue, "1")
    add(queue, "2", receiver="PACS2")
    assert sorted(map(contents, queue.due(0))) == [["pixels of 1"], ["pixels of 2"]]
    for study in queue.due(0):
        queue.answer(study, [b"x"], "1/2")
    assert {result.receiver for result in queue.ready()} == {"PACS1", "PACS2"}


def test_what_is_confirmed_is_not_sent_again(queue):
    add(queue, "1")
    queue.answer(queue.due(0)[0], [b"a", b"b"], "1/2")
    queue.confirm(queue.ready()[0].files[0])
    assert [file.read_bytes() for file in Queue(queue.folder).ready()[0].files] == [b"b"]


def test_an_answer_that_did_not_count_leaves_nothing(queue, monkeypatch):
    add(queue, "1")
    (study,) = queue.due(0)
    monkeypatch.setattr(module, "write_atomic", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError):
        queue.answer(study, [b"a"], "1/2")
    monkeypatch.undo()
    again = Queue(queue.folder)
    again.tidy()
    assert list((queue.folder / "results").iterdir()) == [] and again.ready() == []
    again.answer(again.due(0)[0], [b"a"], "1/2")
    again.tidy()
    assert len(again.ready()[0].files) == 1


def test_files_are_kept_for_so_long_after_their_end(queue, clock):
    add(queue, "1")
    queue.answer(queue.due(0)[0], [b"a"], "1/2")
    clock(9 * DAY)
    queue.clean(1)  # nobody has taken the results yet
    assert len(queue.ready()[0].files) == 1
    deliver(queue)
    clock(0.5 * DAY)
    queue.clean(1)
    assert len(list(queue.folder.rglob("*.dcm"))) == 1
    clock(0.6 * DAY)
    queue.clean(1)
    assert not [path for path in queue.folder.rglob("*") if path.suffix in (".dcm", ".sent")]


def test_a_resend_is_known_after_its_files_are_gone_and_whole_with_a_late_image(queue, clock):
    add(queue, "1", "2")
    queue.answer(queue.due(0)[0], [b"a"], "1/2")
    deliver(queue)
    clock(1)
    queue.clean(0)
    add(queue, "1", "2")
    assert queue.due(0) == []
    add(queue, "3")
    (study,) = queue.due(0)
    assert len(study.images) == 3 and study.before == "1/2"
    queue.answer(study, [b"b"], "1/3")
    deliver(queue)
    clock(1)
    queue.clean(0)
    add(queue, "4")
    (alone,) = queue.due(0)
    assert contents(alone) == ["pixels of 4"] and alone.before == ""


def test_what_is_long_over_is_forgotten(queue, clock):
    add(queue, "1")
    queue.answer(queue.due(0)[0], [b"a"], "1/2")
    deliver(queue)
    clock(10)
    queue.clean(0)
    clock(399 * DAY)
    queue.tidy()
    add(queue, "1")
    assert queue.due(0) == []
    clock(1)
    queue.clean(0)
    clock(401 * DAY)
    queue.tidy()
    add(queue, "1")
    assert len(queue.due(0)) == 1


def test_who_sends_what_was_refused_again_asks_again(queue):
    add(queue, "1", "2")
    queue.answer(queue.due(0)[0], [b"refusal"], "1/2", is_refusal=True)
    assert queue.due(0) == []
    add(queue, "1", "2")
    (study,) = queue.due(0)
    assert contents(study) == ["pixels of 1", "pixels of 2"] and (study.before, study.refusal) == ("", "1/2")
    queue.answer(study, [b"found"], "1/3")
    add(queue, "1", "2")
    assert queue.due(0) == []


def test_files_are_deleted_once_the_rows_say_so(queue, clock, monkeypatch):
    """However a node is killed, a late image is asked about, and what is left goes at the next start."""
    add(queue, "1")
    queue.answer(queue.due(0)[0], [b"a"], "1/2")
    deliver(queue)
    clock(1)
    with monkeypatch.context() as patch:
        patch.setattr(module.shutil, "rmtree", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            queue.clean(0)
    again = Queue(queue.folder)
    again.tidy()
    assert [list((queue.folder / name).iterdir()) for name in ("images", "results")] == [[], []]
    add(again, "2")
    (late,) = again.due(0)
    assert contents(late) == ["pixels of 2"]
    again.tidy()
    assert contents(again.due(0)[0]) == ["pixels of 2"]


def test_an_answered_image_whose_file_is_gone_holds_no_later_one_up(queue):
    add(queue, "1")
    (study,) = queue.due(0)
    queue.answer(study, [b"a"], "1/2")
    study.images.popitem()[1].unlink()
    add(queue, "2")
    (late,) = queue.due(0)
    assert contents(late) == ["pixels of 2"] and late.before == ""


def test_a_clock_that_is_set_back_holds_no_study_up(queue, clock):
    add(queue, "1")
    clock(-DAY)
    assert len(queue.due(5)) == 1
    add(queue, "1")
    assert queue.due(5) == []


def test_nobody_else_reads_the_folder(tmp_path):
    mask = os.umask(0)
    try:
        assert stat.S_IMODE(Queue(tmp_path / "new").folder.stat().st_mode) == 0o700
        (tmp_path / "there").mkdir(mode=0o755)
        assert stat.S_IMODE(Queue(tmp_path / "there").folder.stat().st_mode) == 0o700
    finally:
        os.umask(mask)


def test_names_on_disk_are_pseudonyms(queue):
    queue.add("../../study", "/etc/image", "PACS1", b"x")
    (path,) = queue.folder.rglob("*.dcm")
    assert path.parent.parent == queue.folder / "images" and len(path.stem) == len(path.parent.name) == 32
