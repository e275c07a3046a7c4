"""Objects and transfers on a real S3 server, and what a person is told when something is wrong."""

import contextlib
import os
import pickle
import random
import threading
import time

import pytest

from raymed.config import UserError
from raymed.storage import client, resolve_storage
from raymed.storage import s3 as objects

MIB = 2**20


def content(size: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(size)


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr(objects, "PART", 5 * MIB)


def test_a_large_file_goes_in_parts_and_comes_back_equal(s3, tmp_path, small_parts):
    data = content(12 * MIB + 3)
    (tmp_path / "a").write_bytes(data)
    sent = objects.upload(tmp_path / "a", f"{s3.url}/deep/a b+ä.bin")
    assert sent.size == len(data) and sent.etag.endswith("-3")  # parts of 5 MiB
    assert s3.get("deep/a b+ä.bin") == data
    got = objects.download(sent.url, tmp_path / "new" / "b")
    assert (tmp_path / "new" / "b").read_bytes() == data and got.etag == sent.etag
    assert os.listdir(tmp_path / "new") == ["b"]
    assert objects.matches(tmp_path / "a", sent.size, sent.etag)
    (tmp_path / "a").write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert not objects.matches(tmp_path / "a", sent.size, sent.etag)


def test_many_files_keep_their_order(s3, tmp_path):
    paths = [tmp_path / f"{i}.bin" for i in range(60)]
    for i, path in enumerate(paths):
        path.write_bytes(content(i * 100, seed=i))
    sent = objects.upload_many([(path, f"{s3.url}/many/{path.name}") for path in paths])
    assert [found.size for found in sent] == [i * 100 for i in range(60)]
    assert {found.url: found.etag for found in objects.listing(f"{s3.url}/many")} == {o.url: o.etag for o in sent}
    got = objects.download_many([(found.url, tmp_path / "back" / str(i)) for i, found in enumerate(sent)])
    assert [o.etag for o in got] == [o.etag for o in sent]
    assert all((tmp_path / "back" / str(i)).read_bytes() == content(i * 100, seed=i) for i in range(60))


def test_objects(s3):
    url = f"{s3.url}/folder/x.json"
    assert objects.stat(url) is None and objects.listing(f"{s3.url}/folder") == []
    etag = objects.put_bytes(url, b"one")
    found = objects.stat(url)
    assert (found.size, found.etag) == (3, etag) and abs(found.modified - time.time()) < 60
    assert objects.get_bytes(url) == b"one"
    objects.put_bytes(f"{s3.url}/folder-of-others/y", b"")
    assert [o.url for o in objects.listing(f"{s3.url}/folder")] == [url]
    objects.delete([url, f"{s3.url}/never-was"])
    assert s3.keys() == ["folder-of-others/y"]
    with pytest.raises(UserError, match=f"there is nothing at {url}"):
        objects.get_bytes(url)


def test_a_file_that_grows_or_is_replaced_meanwhile(s3, tmp_path, small_parts, monkeypatch):
    path, old = tmp_path / "a.jsonl", content(11 * MIB)
    run = objects._tried

    def grow_first(transfer, file=None):
        with path.open("ab") as end:
            end.write(b"more")
        return run(transfer, file)

    def replace_first(transfer, file=None):
        (tmp_path / "new").write_bytes(content(13 * MIB, seed=1))
        os.replace(tmp_path / "new", path)
        return run(transfer, file)

    for change, expected in [(grow_first, old + b"more"), (replace_first, old)]:
        path.write_bytes(old)
        monkeypatch.setattr(objects, "_tried", change)
        objects.upload(path, f"{s3.url}/a")
        assert s3.get("a") == expected


def test_an_upload_goes_on_when_the_server_comes_back(s3, tmp_path, small_parts, monkeypatch, capfd):
    """SIGKILL when the first parts are on their way; the same upload ends well, and no part is left behind."""
    data = content(40 * MIB)
    (tmp_path / "a").write_bytes(data)
    gone, is_begun, is_killed, done = [], threading.Event(), threading.Event(), []

    def stop_half_way(count):
        gone.append(count)
        if sum(gone) > 12 * MIB:
            is_begun.set()
            is_killed.wait(60)

    monkeypatch.setattr(objects, "_progress", lambda *_: contextlib.nullcontext(stop_half_way))
    thread = threading.Thread(target=lambda: done.append(objects.upload(tmp_path / "a", f"{s3.url}/a")))
    thread.start()
    assert is_begun.wait(60)
    uploads = s3.client.list_multipart_uploads(Bucket=s3.bucket)["Uploads"]
    assert [upload["Key"] for upload in uploads] == [f"{s3.prefix}/a"]
    s3.kill()
    is_killed.set()
    s3.restart()
    thread.join(120)
    assert done[0].size == len(data) and s3.get("a") == data
    assert not s3.client.list_multipart_uploads(Bucket=s3.bucket).get("Uploads")
    err = capfd.readouterr().err
    assert err.count("does not answer") == err.count("answers again") == 1
    assert "trying for 10 minutes more" in err


def test_a_frozen_server_is_waited_for(s3, monkeypatch, capfd):
    monkeypatch.setattr(client, "READ_TIMEOUT", 0.5)
    monkeypatch.setenv("AWS_SDK_UA_APP_ID", "frozen")  # other variables, so a client of its own
    s3.put("a", b"1")
    s3.pause()
    done = []
    thread = threading.Thread(target=lambda: done.append(objects.get_bytes(f"{s3.url}/a")))
    thread.start()
    deadline, said = time.monotonic() + 60, ""
    while "does not answer (ReadTimeout): trying for 10 minutes more" not in said:
        assert time.monotonic() < deadline
        said += capfd.readouterr().err
    s3.resume()
    thread.join(60)
    assert done == [b"1"]


def test_an_endpoint_that_stays_down_ends_with_a_message(s3, monkeypatch, capfd):
    """Who asks next does not wait as long again: boto3 alone takes up to 3 s for its three attempts."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("RAYMED_S3_PATIENCE", "4")
    message = r"S3 does not answer, s3://b/c is out of reach .*127.0.0.1:9.*AWS_ENDPOINT_URL"
    waited = []
    for _ in range(2):
        start = time.monotonic()
        with pytest.raises(UserError, match=message):
            objects.put_bytes("s3://b/c", b"")
        waited.append(time.monotonic() - start)
    assert 4 <= waited[0] < 15 and waited[1] < 3.8
    assert "S3 at 127.0.0.1:9 does not answer (EndpointConnection): trying for " in capfd.readouterr().err


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"AWS_SECRET_ACCESS_KEY": "wrong"}, "refuses the secret key: check .*AWS_SECRET_ACCESS_KEY"),
        ({"AWS_ACCESS_KEY_ID": "nobody"}, "does not know this access key: check AWS_ACCESS_KEY_ID"),
        ({"AWS_PROFILE": "none-such"}, "none-such"),
        ({"AWS_ENDPOINT_URL": "nonsense"}, "nonsense"),
    ],
)
def test_wrong_credentials(s3, monkeypatch, variables, message):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    calls = (objects.get_bytes, objects.listing, objects.stat, lambda url: objects.put_bytes(url, b""), resolve_storage)
    for call in calls:
        with pytest.raises(UserError, match=message):
            call(f"{s3.url}/x")


def test_no_credentials(s3, monkeypatch):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(UserError, match=f"no credentials for {s3.url}.*AWS_ACCESS_KEY_ID"):
        objects.put_bytes(f"{s3.url}/x", b"")


def test_no_permission_to_write(s3, monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "reader")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "reader-secret")
    s3.put("x", b"1")
    assert objects.get_bytes(f"{s3.url}/x") == b"1"
    with pytest.raises(UserError, match=f"no permission for PutObject on {s3.url}/.*write"):
        resolve_storage(s3.url)


@pytest.mark.parametrize(
    "url", ["s3:/bucket/x", "s3://", "s3:///x", "gs://bucket/x", "bucket/x", "s3://b//x", "s3://b/../x"]
)
def test_not_an_s3_url(url):
    with pytest.raises(UserError, match="expected s3://BUCKET/PATH, got "):
        objects.split(url)


def test_storage_in_s3_is_checked_and_leaves_nothing_there(s3):
    folder = resolve_storage(f"{s3.url}/")
    assert folder == s3.local / "s3" / s3.bucket / s3.prefix and folder.is_dir()
    assert s3.keys() == []
    with pytest.raises(UserError, match="no bucket 'none-such' at 127.0.0.1:.*aws s3 mb s3://none-such"):
        resolve_storage("s3://none-such/x")
    assert "none-such" not in [bucket["Name"] for bucket in s3.client.list_buckets()["Buckets"]]
    assert not (s3.local / "s3" / "none-such").exists()


def test_two_servers_do_not_share_a_working_copy(s3, monkeypatch):
    folder = resolve_storage(f"{s3.url}/storage")
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3.endpoint.replace("127.0.0.1", "localhost"))
    with pytest.raises(UserError, match=f"copy of a bucket at {s3.endpoint[7:]}.*leads to localhost:.*LOCAL"):
        resolve_storage(f"{s3.url}/other")
    (s3.local / "s3" / s3.bucket / ".endpoint").unlink()  # it is the same server
    assert resolve_storage(f"{s3.url}/storage") == folder


def test_a_conditional_put(s3):
    url = f"{s3.url}/x"
    first = objects.put_if(url, b"1", "")
    assert first and objects.put_if(url, b"2", "") == ""
    second = objects.put_if(url, b"3", first)
    assert second not in ("", first) and objects.put_if(url, b"4", first) == "" and s3.get("x") == b"3"
    objects.delete([url])
    assert objects.put_if(url, b"5", second) == "" and s3.keys() == []


def test_threads_share_a_client_and_a_forked_child_has_its_own(s3):
    mine = client.client()
    assert client.client() is mine
    seen = []
    thread = threading.Thread(target=lambda: seen.append(client.client()))
    thread.start()
    thread.join()
    assert seen == [mine]
    s3.put("x", b"from the child")
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:
        own = client._state["client"] is None
        os.write(writer, pickle.dumps((own, objects.get_bytes(f"{s3.url}/x"))))
        os._exit(0)
    assert pickle.loads(os.read(reader, 1000)) == (True, b"from the child")
    os.waitpid(child, 0)
    assert client.client() is mine
