"""Where images lie, and by what a change of a file is told."""

import hashlib
import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from raymed.data.locations import below, ending, fetch, folder_of, near, versions
from raymed.storage import working_copy
from raymed.storage.client import client


@pytest.fixture
def requests(s3):
    """Names of the operations that are asked of S3 from now on."""
    asked: list[str] = []
    client().meta.events.register("before-call.s3", lambda model, **_: asked.append(model.name))
    return asked


@pytest.mark.parametrize(
    ("folder", "name", "place"),
    [
        (Path("/set"), "a/1.png", Path("/set/a/1.png")),
        (Path("/set"), "/other/1.png", Path("/other/1.png")),
        (Path("/set"), "s3://b/1.png", "s3://b/1.png"),
        ("s3://b/set", "a/1.png", "s3://b/set/a/1.png"),
        ("s3://b/set/", "./1.png", "s3://b/set/1.png"),
        ("s3://b/set", "../images/1.png", "s3://b/images/1.png"),
        ("s3://b/set", "/other/1.png", Path("/other/1.png")),
        ("s3://b/set", "s3://c/1.png", "s3://c/1.png"),
    ],
)
def test_a_name_below_a_folder(folder, name, place):
    assert below(folder, name) == place and isinstance(below(folder, name), type(place))


def test_folder_and_ending():
    assert folder_of("s3://b/set/m.csv") == "s3://b/set" and folder_of(Path("/set/m.csv")) == Path("/set")
    assert ending("s3://b/set/m.CSV") == ending(Path("/x/m.csv")) == ".csv"


def test_the_version_of_a_file_changes_with_it(tmp_path):
    path = tmp_path / "a"
    assert versions([path])[path] == (None, None)
    path.write_text("one")
    os.utime(path, ns=(1, 1))
    assert versions([path, path]) == {path: (3, 1)}
    os.utime(path, ns=(2, 2))
    assert versions([path])[path] == (3, 2)
    assert fetch([path]) == {} and near(path) == path


def test_the_version_of_an_object_is_known_without_fetching_it(s3):
    for name in ("set/a.png", "set/deep/b.png", "set2/c.png"):
        s3.put(name, name.encode())
    urls = [f"{s3.url}/{name}" for name in ("set/a.png", "set/deep/b.png", "set2/c.png", "set/none.png")]
    first = versions(urls)
    assert [first[url][0] for url in urls] == [9, 14, 10, None] and len({first[url] for url in urls}) == 4
    assert not list(s3.local.rglob("*.png"))
    s3.put("set/a.png", b"set/A.png")
    second = versions(urls)
    assert [url for url in urls if first[url] != second[url]] == urls[:1] and second[urls[0]][0] == 9


@pytest.mark.parametrize(("wanted", "others", "lists", "heads"), [(8, 0, 0, 8), (40, 0, 1, 0), (40, 2500, 2, 40)])
def test_a_folder_is_listed_where_that_takes_fewer_rounds(s3, requests, wanted, others, lists, heads):
    """16 objects at a time against 1000 of the folder, whatever is in it; what is wanted comes last in its order."""
    with ThreadPoolExecutor(32) as pool:
        list(pool.map(lambda i: s3.put(f"set/a-{i}.png", b"other"), range(others)))
    for i in range(wanted):
        s3.put(f"set/deep/z-{i}.png", b"x" * (i + 1))
    urls = [f"{s3.url}/set/deep/z-{i}.png" for i in range(wanted)]
    s3.put("set/own.png", b"")

    found = versions([*urls, f"{s3.url}/set/own.png"])
    assert [found[url][0] for url in urls] == list(range(1, wanted + 1))
    assert found[f"{s3.url}/set/own.png"] == (0, hashlib.md5(b"").hexdigest())
    assert Counter(requests) == Counter(ListObjectsV2=lists, HeadObject=heads + bool(heads))


def test_what_is_fetched(s3):
    s3.put("set/a.txt", b"a")
    s3.put("run/b.txt", b"b")
    inside, gone = working_copy(f"{s3.url}/run/b.txt"), working_copy(f"{s3.url}/run/c.txt")
    assert versions([inside, gone])[gone] == (None, None)
    assert inside.read_text() == "b", "its time is that of the file here, so it was brought"
    copies = fetch([f"{s3.url}/set/a.txt", inside])
    assert {location: path.read_text() for location, path in copies.items()} == {f"{s3.url}/set/a.txt": "a"}
