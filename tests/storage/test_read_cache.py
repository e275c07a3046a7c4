"""The read cache: one download a version, the least recently used goes first, several processes at a time."""

import os
import subprocess
import sys
import time

import pytest

from raymed.config import UserError
from raymed.storage import fetch_all, local_copy, local_folder_copy, read_cache
from raymed.storage import s3 as objects

KB = 1000


@pytest.fixture
def downloads(s3, monkeypatch):
    """URLs that were downloaded, one after another."""
    seen = []
    fetch = objects._download

    def counted(url, *rest):
        seen.append(url.removeprefix(f"{s3.url}/"))
        return fetch(url, *rest)

    monkeypatch.setattr(objects, "_download", counted)
    monkeypatch.setattr(read_cache, "GRACE", 0)
    monkeypatch.setattr(read_cache, "_seen", {})
    return seen


def used(path, seconds_ago: float) -> None:
    """Let an entry have been used then."""
    then = time.time() - seconds_ago
    os.utime(path.parent, (then, then))


def test_an_object_is_fetched_once_a_version(s3, downloads):
    s3.put("a/image.nii.gz", b"one")
    url = f"{s3.url}/a/image.nii.gz"
    first = local_copy(url)
    assert first.name == "image.nii.gz" and first.read_bytes() == b"one" and first.is_relative_to(s3.local / "read")
    assert local_copy(url) == first
    assert downloads == ["a/image.nii.gz"]
    s3.put("a/image.nii.gz", b"two")
    assert local_copy(url).read_bytes() == b"two" and first.read_bytes() == b"one"
    assert downloads == ["a/image.nii.gz"] * 2


def test_equal_names_elsewhere_are_other_files(s3, downloads):
    for folder in "ab":
        s3.put(f"{folder}/x", b"the same")
    one, two = fetch_all([f"{s3.url}/a/x", f"{s3.url}/b/x"])
    assert one != two and len(downloads) == 2


def test_what_was_not_used_for_longest_goes_first(s3, downloads, monkeypatch):
    monkeypatch.setenv("RAYMED_CACHE_GB", str(250 * KB / 1e9))  # two and a half of the files
    for name in "abcd":
        s3.put(name, name.encode() * 100 * KB)
    a, b = fetch_all([f"{s3.url}/a", f"{s3.url}/b"])
    used(a, 50)
    used(b, 100)
    with b.open("rb") as reader:
        c = local_copy(f"{s3.url}/c")
        assert a.exists() and c.exists() and not b.exists()
        assert reader.read() == b"b" * 100 * KB  # it reads on
    local_copy(f"{s3.url}/a")  # and is used again
    used(c, 10)
    local_copy(f"{s3.url}/d")
    assert a.exists() and not c.exists()
    assert downloads == ["a", "b", "c", "d"] and sorted(os.listdir(s3.local / "read"))[0][0] != "."


def test_one_call_keeps_all_it_returns(s3, downloads, monkeypatch):
    """More than the limit at once comes in all the same; the next call brings the cache back below it."""
    monkeypatch.setenv("RAYMED_CACHE_GB", str(250 * KB / 1e9))
    for name in "abcd":
        s3.put(name, name.encode() * 100 * KB)
    first = local_copy(f"{s3.url}/a")
    used(first, 100)
    paths = fetch_all([f"{s3.url}/{name}" for name in "abcd"])
    assert [path.read_bytes()[:1] for path in paths] == [b"a", b"b", b"c", b"d"] and paths[0] == first
    s3.put("e", b"e" * 10 * KB)
    local_copy(f"{s3.url}/e")
    assert sum(path.exists() for path in paths) == 2


def test_what_another_process_is_about_to_read_stays(s3, downloads, monkeypatch):
    monkeypatch.setattr(read_cache, "GRACE", 60)
    monkeypatch.setenv("RAYMED_CACHE_GB", "0")
    for name in "ab":
        s3.put(name, b"1")
    a = local_copy(f"{s3.url}/a")
    local_copy(f"{s3.url}/b")
    assert a.exists()


def test_what_is_used_while_room_is_made_stays(s3, downloads, monkeypatch):
    """Another process uses it after the folder was looked through."""
    monkeypatch.setenv("RAYMED_CACHE_GB", "0")
    for name in "ab":
        s3.put(name, b"1")
    a = local_copy(f"{s3.url}/a")
    used(a, 100)
    entries = read_cache._entries

    def looked_through():
        found = entries()
        used(a, 0)
        return found

    monkeypatch.setattr(read_cache, "_entries", looked_through)
    local_copy(f"{s3.url}/b")
    assert a.exists()


def test_a_folder_is_one_entry(s3, downloads):
    s3.put("runs/bundle/bundle.json", b"{}")
    s3.put("runs/bundle/deep/weights", b"w")
    folder = local_folder_copy(f"{s3.url}/runs/bundle/")
    assert folder.name == "bundle" and (folder / "deep" / "weights").read_bytes() == b"w"
    assert local_folder_copy(f"{s3.url}/runs/bundle") == folder and len(downloads) == 2
    s3.put("runs/bundle/more", b"m")
    again = local_folder_copy(f"{s3.url}/runs/bundle")
    assert again != folder and sorted(os.listdir(again)) == ["bundle.json", "deep", "more"]
    with pytest.raises(UserError, match=f"there is nothing below {s3.url}/none/"):
        local_folder_copy(f"{s3.url}/none")


def test_a_limit_that_is_no_number(s3, downloads, monkeypatch):
    monkeypatch.setenv("RAYMED_CACHE_GB", "plenty")
    s3.put("a", b"1")
    with pytest.raises(UserError, match="RAYMED_CACHE_GB must be a number >= 0, got 'plenty'"):
        local_copy(f"{s3.url}/a")


READ = """
import sys
from raymed.storage import fetch_all, read_cache
read_cache.GRACE = 5
print("ready", flush=True)
sys.stdin.readline()
for _ in range(3):
    for path in fetch_all(sys.argv[1:]):
        assert path.read_bytes() == path.name.encode() * 1000, path
"""


def test_several_processes_at_a_time(s3, monkeypatch):
    """They fetch the same objects into a cache that is too small, and all of them read all of them."""
    names = [f"{i:02d}" for i in range(20)]
    for name in names:
        s3.put(name, name.encode() * 1000)
    urls = [f"{s3.url}/{name}" for name in names]
    env = os.environ | s3.env | {"RAYMED_CACHE_GB": str(20 * KB / 1e9)}
    command = [sys.executable, "-c", READ, *urls]
    readers = [subprocess.Popen(command, env=env, text=True, stdin=-1, stdout=-1, stderr=-1) for _ in range(3)]
    for reader in readers:
        assert reader.stdout.readline() == "ready\n"
    for reader in readers:
        reader.stdin.write("go\n")
        reader.stdin.flush()
    for reader in readers:
        assert (reader.communicate(timeout=120)[1], reader.returncode) == ("", 0)
    assert not list((s3.local / "read").glob(".*"))
