"""One machine at a time on a run in S3. Another machine is a process with a LOCAL of its own."""

import json
import os
import subprocess
import sys
import threading
import time
import uuid
from contextlib import contextmanager

import pytest

from raymed.config import UserError
from raymed.storage import lock, remote_lock, working_copy
from raymed.storage import s3 as objects

HOLD = """
import sys
from raymed.storage import lock, remote_lock, working_copy
remote_lock.HEARTBEAT, remote_lock.LOST = 1, 4
with lock(working_copy(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
print("over", flush=True)
"""


@pytest.fixture
def url(s3, monkeypatch):
    monkeypatch.setattr(remote_lock, "HEARTBEAT", 1)
    monkeypatch.setattr(remote_lock, "LOST", 4)
    return f"{s3.url}/runs/r/lock"


@contextmanager
def holder(s3, url, local):
    """A process of another machine that holds the lock."""
    env = os.environ | s3.env | {"RAYMED_LOCAL": str(local)}
    with subprocess.Popen([sys.executable, "-c", HOLD, url], stdin=-1, stdout=-1, text=True, env=env) as process:
        assert process.stdout.readline() == "held\n"
        try:
            yield process
        finally:
            process.kill()


def test_it_is_there_while_it_is_held(s3, url):
    with lock(working_copy(url)):
        first = objects.stat(url).etag
        deadline = time.monotonic() + 30
        while objects.stat(url).etag == first:  # the heartbeat
            assert time.monotonic() < deadline
        assert s3.keys() == ["runs/r/lock"]
    assert s3.keys() == []


def test_a_bucket_or_folder_may_have_any_name(s3):
    with lock(working_copy(f"{s3.url}/cache/images/lock")):
        assert s3.keys() == ["cache/images/lock"]


def test_another_machine_is_refused_and_told_who_holds_it(s3, url, tmp_path):
    with holder(s3, url, tmp_path / "other") as process:
        with pytest.raises(UserError, match=rf"{s3.url}/runs/r is in use by process {process.pid} on "):
            with lock(working_copy(url)):
                pytest.fail("two machines hold one lock")
        process.stdin.close()
        assert process.stdout.readline() == "over\n"
    with lock(working_copy(url)):
        pass


def test_what_a_killed_process_held_is_free_at_once_here_and_soon_elsewhere(s3, url, tmp_path, capfd):
    with holder(s3, url, s3.local) as process:
        process.kill()
        process.wait()
    start = time.monotonic()
    with lock(working_copy(url)):
        assert "waiting" not in capfd.readouterr().err
    with holder(s3, url, tmp_path / "other") as process:
        process.kill()
        process.wait()
    start = time.monotonic()
    with lock(working_copy(url)):
        assert 1 < time.monotonic() - start < 30
    assert "is locked on" in capfd.readouterr().err


def test_a_lease_is_the_holders(s3, url, monkeypatch):
    """Whoever comes goes by what the object says."""
    monkeypatch.setattr(remote_lock, "LOST", 600)
    with lock(working_copy(url), lease=30):
        assert json.loads(s3.get("runs/r/lock"))["lease"] == 30
    objects.put_bytes(url, b'{"host": "gone", "process": 1, "place": "elsewhere", "lease": 2}')
    start = time.monotonic()
    with lock(working_copy(url)):
        assert 1 < time.monotonic() - start < 60


def test_of_many_that_wait_one_gets_it(s3, url, monkeypatch):
    objects.put_bytes(url, b'{"host": "gone", "process": 1, "place": "elsewhere"}')
    monkeypatch.setattr(remote_lock, "_place", lambda: uuid.uuid4().hex)  # each on a machine of its own
    got, over, refused = [], threading.Event(), threading.Semaphore(0)

    def take(i):
        try:
            with remote_lock.remote_lock(url):
                got.append(i)
                over.wait(60)
        except UserError:
            refused.release()

    threads = [threading.Thread(target=take, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    try:
        assert [refused.acquire(timeout=60) for _ in range(3)] == [True] * 3
    finally:
        over.set()
        for thread in threads:
            thread.join(60)
    assert len(got) == 1 and s3.keys() == []


def test_a_put_whose_answer_was_lost_and_an_object_that_was_removed_end_nothing(s3, url):
    with lock(working_copy(url)):
        body = json.loads(objects.get_bytes(url))
        mine = objects.put_bytes(url, json.dumps(body | {"time": 0}).encode())
        wait_for_another(url, mine)
        objects.delete([url])
        wait_for_another(url, "")
    assert s3.keys() == []


def wait_for_another(url, etag):
    deadline = time.monotonic() + 30
    while (found := objects.stat(url)) is None or found.etag == etag:
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow  # by the clock: heartbeats of a second
def test_whoever_was_away_for_long_does_not_make_the_object_again(s3, url, monkeypatch):
    """Another machine may have had it meanwhile, and be done."""
    with pytest.raises(KeyboardInterrupt):
        with lock(working_copy(url)):
            monkeypatch.setattr(remote_lock, "LOST", 0)
            objects.delete([url])
            time.sleep(60)
    assert s3.keys() == []


def test_a_copy_of_the_whole_disk_is_another_machine(s3, url, capfd):
    body = {"host": "the first", "process": 1, "place": remote_lock._place()}
    objects.put_bytes(url, json.dumps(body).encode())
    with lock(working_copy(url)):
        assert "is locked on the first: waiting for a sign of life" in capfd.readouterr().err


@pytest.mark.slow  # by the clock: heartbeats of a second
def test_who_is_taken_over_stops(s3, url, monkeypatch):
    with pytest.raises(KeyboardInterrupt):
        with lock(working_copy(url)):
            objects.put_bytes(url, b'{"host": "other", "process": 1, "place": "elsewhere"}')
            time.sleep(60)
    assert s3.keys() == ["runs/r/lock"]  # it is the other's
