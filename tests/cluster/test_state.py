"""What is remembered of a cluster: whole, private, and gone when it is forgotten."""

import os
import stat

import pytest

from raymed.cluster import state
from raymed.cluster.state import Cluster, Process
from raymed.config import UserError

CLUSTER = Cluster(
    "local",
    {"mlflow": "http://127.0.0.1:5000"},
    {"MLFLOW_TRACKING_PASSWORD": "x"},
    (Process("head", 7, 1.25),),
    {"a": [1]},
)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("RAYMED_CLUSTER", str(tmp_path / "some" / "cluster"))
    return state.folder()


def mode(path):
    return stat.S_IMODE(os.stat(path).st_mode)


def test_a_cluster_comes_back_as_it_was_saved(folder):
    assert state.load() is None
    state.save(CLUSTER)
    assert state.load() == CLUSTER == state.required()
    assert [path.name for path in folder.iterdir()] == [state.FILE]


def test_only_the_owner_can_read_it_whatever_the_mask(folder):
    before = os.umask(0)
    try:
        state.save(CLUSTER)
    finally:
        os.umask(before)
    assert mode(folder) == 0o700 and mode(folder / state.FILE) == 0o600


def test_what_is_forgotten_is_gone_and_may_be_forgotten_again():
    state.save(CLUSTER)
    state.forget()
    state.forget()
    assert state.load() is None
    with pytest.raises(UserError, match="no cluster is up.*make cluster-up"):
        state.required()


@pytest.mark.parametrize("text", ["{", "[]", '{"provider": 1, "color": 2}'])
def test_a_file_that_is_no_cluster_is_an_error_that_names_it(folder, text):
    folder.mkdir(parents=True)
    (folder / state.FILE).write_text(text)
    with pytest.raises(UserError, match="cluster.json cannot be read"):
        state.load()
