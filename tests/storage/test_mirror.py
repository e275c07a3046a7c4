"""A folder and its place in S3. `there` is another machine: the same URL with a LOCAL of its own."""

import os
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest

from raymed.config import UserError
from raymed.storage import Mirror, client, in_step, mirror, remote_of, working_copy
from raymed.storage import s3 as objects


@pytest.fixture
def here(s3):
    """A mirror on this machine."""
    return Mirror.of(working_copy(f"{s3.url}/runs/r"))


@pytest.fixture
def there(s3, tmp_path, monkeypatch):
    """A mirror on another machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAYMED_LOCAL", str(tmp_path / "there"))
        return Mirror.of(working_copy(f"{s3.url}/runs/r"))


def write(mirror, name, text):
    path = mirror.folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def files(mirror):
    paths = (path for path in mirror.folder.rglob("*") if path.is_file())
    return {path.relative_to(mirror.folder).as_posix(): path.read_text() for path in paths}


@pytest.fixture
def traffic(monkeypatch):
    """Names of objects in the order in which they were put (+) and fetched (-)."""
    seen = []

    def noted(sign, function, url_at):
        def call(*arguments):
            seen.append(sign + arguments[url_at].rpartition("/runs/r/")[2])
            return function(*arguments)

        return call

    monkeypatch.setattr(objects, "_upload", noted("+", objects._upload, 1))
    monkeypatch.setattr(objects, "_download", noted("-", objects._download, 0))
    return seen


def test_only_working_copies_have_one(s3, tmp_path, here):
    assert Mirror.of(tmp_path) is None
    assert here.url == f"{s3.url}/runs/r" == remote_of(here.folder)


def test_what_one_pushes_the_other_pulls_once(here, there, traffic):
    write(here, "result.json", "1")
    write(here, "u/deep/x.npz", "2")
    assert sorted(here.push()) == ["result.json", "u/deep/x.npz"] and here.push() == []
    assert sorted(there.pull()) == ["result.json", "u/deep/x.npz"] and there.pull() == []
    assert files(there) == files(here) == {"result.json": "1", "u/deep/x.npz": "2"}
    assert there.push() == [] and here.pull() == []
    write(there, "result.json", "changed")
    assert there.push() == ["result.json"] and here.pull() == ["result.json"]
    assert files(here)["result.json"] == "changed"
    assert sorted(traffic[:2]) == ["+result.json", "+u/deep/x.npz"] and len(traffic) == 6


def test_what_belongs_to_this_machine_stays(s3, here, there):
    private = [
        "lock",
        "lock.pid",
        "u/lock",
        "a.lock",
        "tracking.cursor.json",
        "tracking.cursor.lock",
        ".hidden",
        "x.tmp",
    ]
    private += ["cache/x", "u/cache/x", "ray/y", ".d/x", "checkpoints/p/index.json", "u/checkpoints/p/step/w"]
    for name in [*private, "locked.json", "tracking.jsonl", "rays/x"]:
        write(here, name, "x")
    assert sorted(here.push()) == ["locked.json", "rays/x", "tracking.jsonl"]
    assert sorted(s3.keys()) == [f"runs/r/{name}" for name in ["locked.json", "rays/x", "tracking.jsonl"]]
    for name in private:
        s3.put(f"runs/r/{name}", b"from elsewhere")
    assert there.pull(["rays/*"]) == ["rays/x"]
    assert sorted(there.pull()) == ["locked.json", "tracking.jsonl"]
    assert there.pull(only=["checkpoints/p/index.json"]) == ["checkpoints/p/index.json"]
    assert there.pull(only=["**/w"]) == ["u/checkpoints/p/step/w"]


@pytest.mark.parametrize(
    ("name", "only", "expected"),
    [
        ("tracking.jsonl", ["**/tracking.jsonl"], True),
        ("u/v/tracking.jsonl", ["**/tracking.jsonl"], True),
        ("u/x.json", ["**/tracking.jsonl"], False),
        ("checkpoints/p/index.json", ["checkpoints/*/index.json"], True),
        ("checkpoints/p/index.json", None, False),
        ("u/tracking.cursor.json", ["*"], False),
    ],
)
def test_patterns(name, only, expected):
    assert mirror.is_synced(name, only) is expected


def test_files_that_say_something_of_others_come_after_them(here, there, traffic):
    for age, name in [(9, "result.json"), (8, "tracking.jsonl"), (1, "predictions.npz"), (7, "bundle/bundle.json")]:
        write(here, name, "x")
        os.utime(here.folder / name, (1000 - 100 * (10 - age), 1000 - 100 * (10 - age)))
    here.push()
    assert traffic == ["+predictions.npz", "+bundle/bundle.json", "+tracking.jsonl", "+result.json"]
    traffic.clear()
    there.pull()
    assert traffic[:2] == ["-predictions.npz", "-bundle/bundle.json"] and len(traffic) == 4


def test_both_sides_changed(s3, here, there):
    for name in ("a.json", "longer.jsonl", "shorter.jsonl", "same.txt"):
        write(here, name, "0\n")
    here.push()
    there.pull()
    for name, mine, theirs in [
        ("a.json", "mine, and long", "theirs"),
        ("longer.jsonl", "0\n1\n2\n", "0\n1\n"),
        ("shorter.jsonl", "0\n1\n", "0\n1\n2\n"),
        ("same.txt", "equal", "equal"),
    ]:
        write(there, name, theirs)
        write(here, name, mine)
    there.push()
    assert sorted(here.pull()) == ["a.json", "shorter.jsonl"]
    assert files(here) == {
        "a.json": "theirs",
        "longer.jsonl": "0\n1\n2\n",
        "shorter.jsonl": "0\n1\n2\n",
        "same.txt": "equal",
    }
    assert here.push() == ["longer.jsonl"]
    assert s3.get("runs/r/longer.jsonl") == b"0\n1\n2\n"


def test_a_shorter_jsonl_never_wins(s3, here):
    """Also where only the remote has changed: an old push may arrive late."""
    write(here, "t.jsonl", "0\n1\n")
    here.push()
    s3.put("runs/r/t.jsonl", b"0\n")
    assert here.pull() == [] and files(here) == {"t.jsonl": "0\n1\n"}
    assert here.push() == ["t.jsonl"] and s3.get("runs/r/t.jsonl") == b"0\n1\n"


def test_a_shorter_jsonl_is_never_put_over_one_from_elsewhere(s3, here, there):
    write(here, "t.jsonl", "0\n1\n")
    here.push()
    there.pull()
    write(there, "t.jsonl", "0\n1\n2\n3\n")
    there.push()
    write(here, "t.jsonl", "0\n1\n2\n")
    assert here.push() == [] and s3.get("runs/r/t.jsonl") == b"0\n1\n2\n3\n"
    assert here.pull() == ["t.jsonl"]
    write(here, "t.jsonl", "0\n1\n2\n")  # its own: a torn line was cut off
    assert here.push() == ["t.jsonl"] and s3.get("runs/r/t.jsonl") == b"0\n1\n2\n"


def test_what_the_disk_does_not_take_is_told(s3, here):
    s3.put("runs/r/u/x", b"1")
    write(here, "u", "a file where a folder has to be")
    with pytest.raises(UserError, match=rf"{here.folder}/u/x cannot be written"):
        here.pull()
    record = working_copy("s3://b").parent / ".in_step.db"
    record.unlink()
    record.mkdir()
    with pytest.raises(UserError, match=rf"{record} cannot be written .*RAYMED_LOCAL"):
        here.pull()


def test_long_names(s3, here):
    """255 bytes are allowed, whatever the letters."""
    name = "肺" * 80
    s3.put(f"runs/r/{name}", b"1")
    assert here.pull() == [name] and files(here) == {name: "1"}


def test_removing(s3, here, there):
    for name in ("a", "u/b", "u/c", "keep", "changed"):
        write(here, name, "0")
    here.push()
    there.pull()
    objects.delete([f"{here.url}/{name}" for name in ("a", "u/b", "u/c", "changed")])
    write(there, "changed", "since then")
    assert sorted(there.pull()) == ["a", "u/b", "u/c"]
    assert files(there) == {"keep": "0", "changed": "since then"}
    assert there.push() == ["changed"]
    (here.folder / "keep").unlink()
    assert sorted(here.pull()) == ["a", "changed", "keep", "u/b", "u/c"]
    assert files(here) == {"keep": "0", "changed": "since then"}  # removing a file only here does not remove it


def test_nested_mirrors_and_other_processes_know_the_same(s3, here, traffic):
    inner = Mirror.of(here.folder / "u")
    write(inner, "x.json", "1")
    assert inner.push() == ["x.json"]
    assert here.push() == here.pull() == []
    write(inner, "x.json", "22")
    assert here.push() == ["u/x.json"] and inner.push() == []
    code = f"from raymed.storage import *; m = Mirror.of(working_copy('{here.url}')); print(m.push(), m.pull())"
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | s3.env, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("[] []\n", "")


def test_without_the_record_contents_are_compared(here, traffic, monkeypatch):
    monkeypatch.setattr(objects, "PART", 5 * 2**20)
    write(here, "big.txt", "x" * 11 * 2**20)
    write(here, "small.txt", "y")
    here.push()
    (working_copy("s3://b").parent / ".in_step.db").unlink()
    assert here.pull() == [] and here.push() == []
    assert sorted(traffic) == ["+big.txt", "+small.txt"]


def test_a_file_that_another_process_is_putting_is_left_to_it(s3, here):
    """What is new there is its doing, though not yet on record: it must not come back over what is newer here."""
    sleeper = subprocess.Popen(["sleep", "60"])
    try:
        write(here, "a.json", "1")
        here.push()
        record = in_step.InStep(client.host())
        url = f"{here.url}/a.json"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(in_step, "this_process", lambda: f"{sleeper.pid}@{psutil.Process(sleeper.pid).create_time()}")
            assert record.claim([url]) == [url]
        s3.put("runs/r/a.json", b"22")
        write(here, "a.json", "333")
        assert here.pull() == [] and record.claim([url]) == []
    finally:
        sleeper.kill()
        sleeper.wait()
    assert here.pull() == ["a.json"] and files(here) == {"a.json": "22"}  # it died at it: the remote wins


def test_two_threads_never_put_one_file_at_once(here, monkeypatch):
    """The file changes all the time while two mirrors push it; in the end the last content is there."""
    at_it, most = [], []
    upload = objects._upload

    def watched(*arguments):
        at_it.append(1)
        most.append(len(at_it))
        try:
            return upload(*arguments)
        finally:
            at_it.pop()

    monkeypatch.setattr(objects, "_upload", watched)
    write(here, "t.jsonl", "0\n")
    mirrors = [here, Mirror(here.folder, here.url)]
    over = threading.Event()

    def push(one):
        while not over.is_set():
            one.push()

    threads = [threading.Thread(target=push, args=(one,)) for one in mirrors]
    for thread in threads:
        thread.start()
    for i in range(200):
        write(here, "t.jsonl", "0\n" * i)
        time.sleep(0.002)
    over.set()
    for thread in threads:
        thread.join(60)
    here.push()
    assert set(most) == {1} and len(most) > 3
    assert objects.get_bytes(f"{here.url}/t.jsonl") == b"0\n" * 199


def test_following(s3, here):
    with here:
        here.follow(period=0.05)
        write(here, "a", "1")
        _until(lambda: "runs/r/a" in s3.keys())
        write(here, "last", "2")
    assert sorted(s3.keys()) == ["runs/r/a", "runs/r/last"]


def test_an_error_of_the_thread_reaches_the_next_call_and_it_goes_on(s3, here, monkeypatch, capfd):
    here.follow(period=0.05)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    write(here, "a", "1")
    _until(lambda: here._error is not None)
    with pytest.raises(UserError, match="refuses the secret key"):
        here.pull()
    _until(lambda: here._error is not None)
    kept = f"The results are kept in {here.folder}: the same command brings them to {here.url}"
    with pytest.raises(UserError, match=f"refuses the secret key.*{kept}"):
        here.close()
    assert capfd.readouterr().err.count(f"{here.folder} does not get to {here.url}") >= 1
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", s3.env["AWS_SECRET_ACCESS_KEY"])
    here.close()
    assert s3.keys() == ["runs/r/a"]


def test_what_was_wrong_before_the_end_does_not_keep_the_last_push_from_being_tried(s3, here, monkeypatch):
    here.follow(period=0.05)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    write(here, "a", "1")
    _until(lambda: here._error is not None)
    here._over.set()
    here._thread.join()
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", s3.env["AWS_SECRET_ACCESS_KEY"])
    here.close()
    assert s3.keys() == ["runs/r/a"]


def test_following_never_puts_an_old_copy_over_what_another_node_wrote(s3, here, there):
    """A line of its own has made the old copy another file, and it is not shorter."""
    write(here, "t.jsonl", "0\n")
    here.push()
    there.pull()
    write(there, "t.jsonl", "0\n1\n2\n")
    there.push()
    write(here, "t.jsonl", "0\n9\n")
    with here:
        here.follow(period=0.05, pulled=["**/*.jsonl"])
        _until(lambda: (here.folder / "t.jsonl").read_text() == "0\n1\n2\n")
    assert s3.get("runs/r/t.jsonl") == b"0\n1\n2\n"


def _until(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


PULL = "from raymed.storage import *; m = Mirror.of(working_copy('{}')); print('go', flush=True); m.pull()"


def test_a_killed_pull_leaves_whole_files_or_none(s3, here):
    contents = {f"{i}.bin": bytes([i]) * 8 * 2**20 for i in range(12)}
    for name, data in contents.items():
        s3.put(f"runs/r/{name}", data)
    with subprocess.Popen([sys.executable, "-c", PULL.format(here.url)], env=os.environ | s3.env, stdout=-1) as process:
        _until(lambda: list(here.folder.glob(".*.tmp*")))
        process.kill()
    assert process.returncode == -signal.SIGKILL
    arrived = list(here.folder.glob("*.bin"))
    assert len(arrived) < 12 and all(path.read_bytes() == contents[path.name] for path in arrived)
    here.pull()
    assert all((here.folder / name).read_bytes() == data for name, data in contents.items())
    assert sorted(os.listdir(here.folder)) == sorted(contents)  # what the killed process left is gone
    assert here.push() == []
