"""What a node is asked for, in one process; the nodes themselves are in tests/cluster/test_nodes.py."""

import ast
import subprocess
import sys
from pathlib import Path

import cloudpickle
import pytest

from raymed.data.manifest import DataConfig
from raymed.train.places import nodes


@pytest.fixture
def data(tmp_path):
    """A manifest of 101 images, which are not looked into."""
    (tmp_path / "set").mkdir()
    names = [f"{i:03d}.png" for i in range(101)]
    for name in names:
        (tmp_path / "set" / name).write_text("x")
    rows = [f"{name},{'sick' if i % 2 else 'well'}" for i, name in enumerate(names)]
    (tmp_path / "set" / "manifest.csv").write_text("\n".join(["image,label", *rows]))
    return DataConfig(manifest=str(tmp_path / "set" / "manifest.csv"), positive="sick")


@pytest.fixture
def seen(data, tmp_path, monkeypatch):
    """What the driver sees of it, and of a storage."""
    monkeypatch.setattr(nodes, "_SHARE_SECONDS", 0.0)
    manifest = tmp_path / "set" / "manifest.csv"
    (tmp_path / "token").touch()
    return nodes._Seen(tmp_path, None, tmp_path / "token", manifest, nodes._digest(manifest), nodes._sample(data))


def test_the_sample_is_spread_evenly(data, tmp_path):
    names = [path.name for path in nodes._sample(data)]
    assert len(names) == nodes.SAMPLE == 20 and names[0] == "000.png" and names[-1] == "100.png"
    steps = [int(b[:3]) - int(a[:3]) for a, b in zip(names, names[1:], strict=False)]
    assert set(steps) == {5, 6}
    (tmp_path / "set" / "000.png").write_text("")
    assert len(nodes._sample(data)) == 19, "what the driver lacks is no node's fault"


def test_nothing_is_amiss_where_the_driver_is(seen):
    assert nodes._look(seen) == {"data": [], "storage": []}


def test_what_is_amiss(seen, tmp_path):
    (tmp_path / "set" / "100.png").write_text("")
    (tmp_path / "set" / "000.png").unlink()
    (tmp_path / "token").unlink()
    first = tmp_path / "set" / "000.png"
    assert nodes._look(seen) == {
        "data": [f"2 of 20 sampled images are missing or empty, such as {first}"],
        "storage": [f"the storage {tmp_path} is not this one's"],
    }
    seen.manifest.write_text(seen.manifest.read_text() + "\n")
    assert nodes._look(seen)["data"] == [f"the manifest {seen.manifest} is another one"]
    seen.manifest.unlink()
    assert nodes._look(seen)["data"] == [f"there is no manifest {seen.manifest}"]


def test_images_and_storage_in_a_bucket(s3, tmp_path):
    s3.put("a.png", b"x")
    s3.put("empty.png", b"")
    assert nodes._is_there(f"{s3.url}/a.png")
    assert not nodes._is_there(f"{s3.url}/empty.png") and not nodes._is_there(f"{s3.url}/none.png")
    there = nodes.resolve_storage(f"{s3.url}/storage")
    s3.put("storage/phantoms/b.png", b"x")
    assert nodes._is_there(there / "phantoms" / "b.png") and not nodes._is_there(there / "phantoms" / "c.png")
    s3.put("m.csv", b"image,label\n")
    seen = nodes._Seen(there, f"{s3.url}/storage", there / "x", f"{s3.url}/m.csv", nodes._digest(f"{s3.url}/m.csv"), ())
    assert nodes._look(seen) == {"data": [], "storage": []}


BARE = """
import pickle, sys
sys.path = [place for place in sys.path if place not in ("", sys.argv[1])]
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder)]
print(pickle.loads(bytes.fromhex(sys.argv[2]))())
"""


def test_versions_are_told_also_where_raymed_is_missing():
    here = nodes._described()()
    assert set(here) == {"python", "torch", "ray", "raymed"} and "none" not in here.values()
    packed = cloudpickle.dumps(nodes._described()).hex()
    root = str(Path(nodes.__file__).parents[3])
    done = subprocess.run([sys.executable, "-c", BARE, root, packed], capture_output=True, text=True, cwd="/")
    assert ast.literal_eval(done.stdout) == here | {"raymed": "none"}, done.stderr
