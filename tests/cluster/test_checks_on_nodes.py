"""What is amiss on a node is said before workers start: real nodes, some of which see other files or versions."""

import importlib.metadata
import json
import os
import shutil
from pathlib import Path

import pytest
from nodes import Nodes

from raymed.data.phantoms import write_hsg
from raymed.storage import working_copy

pytestmark = [pytest.mark.ray, pytest.mark.slow]

DRIVER = """
import json, sys
from pathlib import Path
import ray
from raymed.config import UserError
from raymed.data.manifest import DataConfig
from raymed.train.places import nodes

ray.init(log_to_driver=False, logging_level="ERROR")
answers = []
for name, given in json.loads(Path(sys.argv[1]).read_text()):
    given = {k: DataConfig(**v) if k == "data" else Path(v) if k == "storage" else v for k, v in given.items()}
    try:
        answers.append(getattr(nodes, name)(**given))
    except UserError as error:
        answers.append(str(error))
Path(sys.argv[2]).write_text(json.dumps(answers))
"""


def ask(cluster: Nodes, folder: Path, calls: list, **environment: str) -> list[str | None]:
    """What each call of a check of `raymed.train.places.nodes` says in a driver on the head; None where all is well."""
    script, asked, answers = folder / "driver.py", folder / "calls.json", folder / "answers.json"
    answers.unlink(missing_ok=True)
    script.write_text(DRIVER)
    asked.write_text(json.dumps(calls))
    cluster.driver(script, asked, answers, **environment).wait(240)
    assert answers.is_file(), script.with_suffix(".log").read_text()[-3000:]
    return json.loads(answers.read_text())


def data_of(manifest: object, **fields: str) -> dict[str, object]:
    return {"manifest": str(manifest), "positive": "occluded", **fields}


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("unshare") is None, reason="mounting needs root and unshare")
def test_a_node_that_does_not_see_the_data_or_the_storage(tmp_path):
    """Over some folders the second node has an empty file system of its own."""
    manifest = write_hsg(tmp_path / "hidden", num_patients=20, size=32)
    shared = shutil.copytree(tmp_path / "hidden", tmp_path / "shared") / "manifest.csv"
    for name in ("storage", "unshared"):
        (tmp_path / name).mkdir()
    hide = f'mount -t tmpfs none {tmp_path}/hidden && mount -t tmpfs none {tmp_path}/unshared && exec "$@"'
    prefix = ("unshare", "-m", "sh", "-c", hide, "sh")
    storage, unshared = str(tmp_path / "storage"), str(tmp_path / "unshared")
    calls = [
        ("check_versions", {}),
        ("check_tracking", {"tracking": None, "storage": storage}),
        ("check_nodes", {"storage": storage, "data": data_of(shared)}),
        ("check_nodes", {"storage": storage, "data": data_of(manifest)}),
        ("check_nodes", {"storage": storage, "data": data_of(shared, root=str(manifest.parent))}),
        ("check_nodes", {"storage": unshared, "data": data_of(shared)}),
        ("check_nodes", {"storage": storage, "data": data_of(shared), "patience": 0.001}),
    ]
    with Nodes(tmp_path / "cluster", prefix=lambda name: () if name == "head" else prefix) as cluster:
        alone = ask(cluster, tmp_path, [("check_nodes", {"storage": storage, "data": data_of(manifest)})])
        cluster.add_node()
        versions, tracking, good, no_manifest, no_images, no_storage, late = ask(cluster, tmp_path, calls)
    assert alone == [None]
    assert (versions, tracking, good) == (None, None, None), "two nodes of one machine may share an sqlite file"
    assert f": there is no manifest {manifest}\nput the data on a folder that every node sees" in no_manifest
    assert no_manifest.count("\n  node ") == 1 and "--storage" not in no_manifest
    assert f"20 of 20 sampled images are missing or empty, such as {manifest.parent}/" in no_images
    assert f": the storage {unshared} is not this one's\ngive a folder that every node sees" in no_storage
    assert "--storage s3://BUCKET/FOLDER" in no_storage and "manifest" not in no_storage
    assert "no answer within 0.001 s" in late
    assert not list(Path(storage).glob(".nodes-*"))


def test_other_versions_another_machine_and_a_bucket(tmp_path, s3):
    """One node has another torch, address and place for working copies, one another build of this torch; another has a
    wrong key of the bucket."""
    manifest = write_hsg(tmp_path / "hsg", num_patients=20, size=32)
    for path in (path for path in manifest.parent.rglob("*") if path.is_file()):
        s3.put(f"set/{path.relative_to(manifest.parent)}", path.read_bytes())
    build = importlib.metadata.version("torch").partition("+")[0] + "+cu999"
    for name, version in (("strange", "9.9.9"), ("twin", build)):
        info = tmp_path / name / f"torch-{version}.dist-info" / "METADATA"
        info.parent.mkdir(parents=True)
        info.write_text(f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n")
    strange = {"PYTHONPATH": str(tmp_path / "strange"), "RAYMED_LOCAL": str(tmp_path / "elsewhere")}
    twin, keyless = {"PYTHONPATH": str(tmp_path / "twin")}, {"AWS_SECRET_ACCESS_KEY": "wrong"}
    own = {"strange": strange, "twin": twin, "keyless": keyless}

    def prefix(name: str) -> list[str]:
        return ["env", *(f"{key}={value}" for key, value in (s3.env | own.get(name, {})).items())]

    storage = working_copy(f"{s3.url}/storage")
    storage.mkdir(parents=True)
    check = ("check_nodes", {"storage": str(storage), "data": data_of(f"{s3.url}/set/manifest.csv")})
    ip = {"strange": "127.0.0.2"}
    with Nodes(tmp_path / "cluster", prefix=prefix, ip=lambda name: ip.get(name, "127.0.0.1")) as cluster:
        cluster.add_node(name="twin")
        good = ask(cluster, tmp_path, [check], **s3.env)
        cluster.add_node(name="strange")
        cluster.add_node(name="keyless")
        sqlite = ("check_tracking", {"tracking": None, "storage": str(storage)})
        server = ("check_tracking", {"tracking": "http://127.0.0.1:1", "storage": str(storage)})
        versions, no_server, named, bucket = ask(cluster, tmp_path, [("check_versions", {}), sqlite, server, check])
    assert good == [None]
    assert "\n  torch: " in versions and "9.9.9 on 127.0.0.2 (" in versions and versions.count(" on 127.0.0.") == 1
    assert build not in versions
    assert not any(f"\n  {name}: " in versions for name in ("python", "ray", "raymed"))
    assert f"mlflow server --backend-store-uri sqlite:///{storage}/mlflow/mlflow.db" in no_server
    assert f"--artifacts-destination {s3.url}/storage/mlflow/artifacts --host 0.0.0.0" in no_server
    assert "a cluster of 2 machines" in no_server and "--tracking http://" in no_server and named is None
    refused = [line for line in bucket.splitlines() if line.startswith("  node ")]
    assert len(refused) == 2 and all("AWS_SECRET_ACCESS_KEY" in line for line in refused), bucket
    assert " 127.0.0.2 (" not in bucket, "a working copy in another place is no fault"
