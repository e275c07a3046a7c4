"""Google Cloud: what is said before a machine is started, and of machines that are left."""

import os
from importlib.util import find_spec

import pytest

from raymed.cluster import state
from raymed.cluster.providers import gcp, launcher
from raymed.cluster.state import Cluster
from raymed.config import UserError

pytestmark = pytest.mark.usefixtures("nobody")


def test_google_without_credentials():
    with pytest.raises(UserError, match="no credentials of this machine.*gcloud auth application-default login"):
        gcp.up(gcp.Config(bucket="bucket", zone="europe-west4-a"))
    assert state.load() is None


def test_google_with_credentials_that_are_none(tmp_path, monkeypatch):
    (tmp_path / "key.json").write_text('{"type": "service_account"}')
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "key.json"))
    with pytest.raises(UserError, match="no credentials of this machine"):
        gcp.up(gcp.Config(bucket="bucket", zone="europe-west4-a"))


@pytest.mark.parametrize(
    ("changes", "said"),
    [({"bucket": "gs://b"}, "plain name"), ({"zone": "europe-west4"}, "--zone must be one such as")],
)
def test_flags_of_google_that_cannot_be(changes, said):
    with pytest.raises(UserError, match=said):
        gcp.up(gcp.Config(**({"bucket": "bucket", "zone": "europe-west4-a"} | changes)))


@pytest.mark.skipif(find_spec("googleapiclient") is not None, reason="the package is there")
def test_google_needs_a_package(monkeypatch):
    monkeypatch.setattr(gcp, "_project", lambda given: "project")
    with pytest.raises(UserError, match=r"pip install --editable '.\[gcp\]'"):
        gcp.prepare(gcp.Config(bucket="bucket", zone="europe-west4-a"))


@pytest.fixture
def gcloud(tmp_path, monkeypatch):
    """Google's command line: writes down its words, and answers with the file `left`, or fails where there is none."""
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "gcloud").write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > {tmp_path}/asked\nexec cat {tmp_path}/left\n')
    (programs / "gcloud").chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    return tmp_path


def test_machines_that_are_left_on_google_are_remembered(gcloud, monkeypatch):
    """Ray's launcher says that it is done, and machines still run."""
    monkeypatch.setattr(launcher, "ray", lambda words: 0)
    place = {"project": "ours", "zone": "europe-west4-a"}
    cluster = Cluster("gcp", facts={"file": "gcp.yaml", "place": place})
    state.save(cluster)
    with pytest.raises(UserError, match="gcloud could not look for the cluster's machines .*No such file.*try again"):
        gcp.down(cluster)
    assert state.load() == cluster, "nobody could look"

    (gcloud / "left").write_text("ray-raymed-head-1\nray-raymed-worker-2\n")
    with pytest.raises(
        UserError, match="left, and cost: gcloud compute instances delete ray-raymed-head-1 ray-raymed-w"
    ):
        gcp.down(cluster)
    assert state.load() == cluster
    asked = (gcloud / "asked").read_text().splitlines()
    assert asked[1:4] == ["compute", "instances", "list"] and "--project=ours" in asked
    assert "--filter=labels.ray-cluster-name=raymed AND status!=STOPPING" in asked and "--zones=europe-west4-a" in asked

    (gcloud / "left").write_text("")
    gcp.down(cluster)
    assert state.load() is None


def test_a_google_cluster_of_somebody_else_is_left_alone(gcloud, monkeypatch):
    monkeypatch.setattr(gcp, "_project", lambda given: "ours")
    monkeypatch.setattr(gcp, "find_spec", lambda name: True)
    monkeypatch.setattr(launcher, "need", lambda *programs, by: None)
    monkeypatch.setattr(launcher, "ray", lambda words: pytest.fail("nothing is started"))
    (gcloud / "left").write_text("ray-raymed-head-1\n")
    said = r"runs in project ours, zone europe-west4-a already \(ray-raymed-head-1\).* nothing was started: .*"
    with pytest.raises(UserError, match=f"{said}instances delete ray-raymed-head-1 --project=ours --zone=europe-w"):
        gcp.up(gcp.Config("bucket", "europe-west4-a"))
    assert state.load() is None and not launcher.last("gcp")
    (gcloud / "left").unlink()
    with pytest.raises(UserError, match="gcloud could not look for the cluster's machines"):
        gcp.up(gcp.Config("bucket", "europe-west4-a"))
    assert state.load() is None


def test_a_google_cluster_of_an_earlier_version_is_looked_for_where_its_file_says(gcloud, monkeypatch):
    monkeypatch.setattr(launcher, "ray", lambda words: 0)
    file = gcloud / "gcp.yaml"
    file.write_text("provider: {type: gcp, project_id: ours, availability_zone: europe-west4-a}")
    cluster = Cluster("gcp", facts={"file": str(file)})
    state.save(cluster)
    (gcloud / "left").write_text("ray-raymed-head-1\n")
    with pytest.raises(UserError, match="ray-raymed-head-1 --project=ours --zone=europe-west4-a"):
        gcp.down(cluster)
    (gcloud / "left").write_text("")
    gcp.down(cluster)
    assert state.load() is None
