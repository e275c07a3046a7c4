"""Paths, URLs and working copies."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from raymed.config import UserError
from raymed.storage import (
    address,
    exists,
    fetch_all,
    is_remote,
    join,
    local_copy,
    local_folder_copy,
    push_file,
    read_bytes,
    remote_of,
    working_copy,
    write_bytes,
)


def test_a_working_copy_and_its_url(tmp_path, monkeypatch):
    monkeypatch.setenv("RAYMED_LOCAL", str(tmp_path))
    assert working_copy("s3://bucket/a/b/") == tmp_path / "s3" / "bucket" / "a" / "b"
    for url in ("s3://bucket", "s3://bucket/a", "s3://bucket/a b/ü.x"):
        assert remote_of(working_copy(url)) == url
    monkeypatch.chdir(tmp_path / "..")
    assert remote_of(Path(tmp_path.name, "s3", "bucket", "x", "..", "y")) == "s3://bucket/y"
    for path in (tmp_path, tmp_path / "s3", tmp_path / "s30" / "b", Path("/elsewhere")):
        assert remote_of(path) is None
    with pytest.raises(UserError, match="s3://b/../../x"):
        working_copy("s3://b/../../x")


def test_an_address_holds_on_every_machine(tmp_path, monkeypatch):
    monkeypatch.setenv("RAYMED_LOCAL", str(tmp_path))
    assert address(tmp_path / "s3" / "bucket" / "a b" / "x") == "s3://bucket/a b/x"
    assert address(tmp_path / "x") == f"{tmp_path}/x"


def test_names(tmp_path):
    assert is_remote("s3://b/k") and is_remote("gs://b") and not is_remote("/a/b") and not is_remote(Path("s3"))
    assert join("s3://b/k/", "x", "y") == "s3://b/k/x/y"
    assert join("/a", "x") == "/a/x"
    assert join(Path("/a"), "x", "y") == Path("/a/x/y")


def test_paths_are_taken_as_they_are(tmp_path):
    path = tmp_path / "deep" / "x"
    assert not exists(path)
    write_bytes(path, b"1")
    assert exists(path) and exists(tmp_path / "deep") and read_bytes(str(path)) == b"1"
    assert local_copy(str(path)) == path and local_folder_copy(path.parent) == path.parent
    push_file(path)  # nothing to do, and nobody to ask
    for call in (local_copy, local_folder_copy, read_bytes):
        with pytest.raises(UserError, match=f"there is no {tmp_path}/none"):
            call(tmp_path / "none")


def test_urls(s3):
    url = f"{s3.url}/folder/x.bin"
    assert not exists(url) and not exists(f"{s3.url}/folder")
    write_bytes(url, b"\x00\x01")
    assert exists(url) and exists(f"{s3.url}/folder") and exists(f"{s3.url}/folder/") and not exists(f"{s3.url}/fold")
    assert read_bytes(url) == b"\x00\x01" == s3.get("folder/x.bin")
    with pytest.raises(UserError, match=f"there is nothing at {s3.url}/none"):
        local_copy(f"{s3.url}/none")
    with pytest.raises(UserError, match="expected s3://"):
        local_copy("http://host/x")


def test_what_a_working_copy_lacks_is_fetched_to_its_place(s3):
    folder = working_copy(s3.url)
    s3.put("bundle/a/x.bin", b"x")
    s3.put("bundle/y.bin", b"yy")
    assert exists(folder / "bundle") and exists(folder / "bundle" / "y.bin") and not exists(folder / "none")
    path = folder / "bundle" / "y.bin"
    assert local_copy(path) == path and path.read_bytes() == b"yy" == read_bytes(path)
    other = folder / "copy"
    for name in ("a/x.bin", "y.bin"):
        s3.put(f"copy/{name}", name.encode())
    assert local_folder_copy(other) == other
    assert (other / "a" / "x.bin").read_bytes() == b"a/x.bin" and (other / "y.bin").read_bytes() == b"y.bin"
    assert sorted(os.listdir(folder)) == ["bundle", "copy"]
    with pytest.raises(UserError, match=f"there is nothing at {folder}/none, nor at {s3.url}/none"):
        local_folder_copy(folder / "none")


def test_fetch_all_takes_every_kind(s3, tmp_path):
    (tmp_path / "here").write_bytes(b"0")
    s3.put("one", b"1")
    s3.put("runs/two", b"2")
    places = [f"{s3.url}/one", tmp_path / "here", working_copy(s3.url) / "runs" / "two", f"{s3.url}/one"]
    paths = fetch_all(places)
    assert [path.read_bytes() for path in paths] == [b"1", b"0", b"2", b"1"]
    assert paths[1:3] == places[1:3] and paths[0] == paths[3]
    with pytest.raises(UserError, match=f"there is nothing at {s3.url}/none"):
        fetch_all([*places, f"{s3.url}/none"])


FETCH = "import sys; from pathlib import Path; from raymed.storage import local_copy; local_copy(Path(sys.argv[1]))"


def test_a_killed_fetch_leaves_no_half_file(s3):
    """SIGKILL while a large file arrives; the file is not there, and fetching it again gives it whole."""
    data = random.Random(0).randbytes(100 * 2**20)
    s3.put("big.bin", data)
    path = working_copy(s3.url) / "big.bin"
    with subprocess.Popen([sys.executable, "-c", FETCH, str(path)], env=os.environ | s3.env) as process:
        deadline = time.monotonic() + 60
        while not any(part.stat().st_size for part in path.parent.glob(".big*")):
            assert process.poll() is None and time.monotonic() < deadline
        process.kill()
    assert process.returncode == -signal.SIGKILL
    assert not path.exists()
    assert local_copy(path).read_bytes() == data


def test_importing_costs_no_boto3():
    code = "import sys, raymed.storage; print({'boto3', 'botocore', 's3transfer', 'rich', 'psutil'} & {*sys.modules})"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"
