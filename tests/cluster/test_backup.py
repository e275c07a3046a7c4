"""Backups: what is in them, that they give the same models and answers elsewhere, and what is refused."""

import json
import os
import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
from bright_bundle import bright_bundle
from registries import MLflow, register_two

from raymed.cluster import backup, state, sums
from raymed.cluster.backup import Place, restore, save
from raymed.cluster.state import Cluster
from raymed.config import UserError
from raymed.registry.audit import Audit
from raymed.registry.promote import anchors, promote
from raymed.registry.store import load_model, version_of
from raymed.storage import resolve_storage, write_bytes
from raymed.storage.s3 import delete as s3_delete
from raymed.storage.s3 import listing as s3_listing
from raymed.tasks.predictor import Predictor
from raymed.tracking import Outbox, Tracker, connect

IMAGES = [np.random.default_rng(seed).integers(0, 255, (64, 64), dtype=np.uint8) for seed in range(3)]
RUN = "tune-1/final"


def fill(storage: Path) -> None:
    """A run with figures and a file, its bundle in two registered versions, decisions, and what is left out."""
    folder = storage / "runs/tune-1/final"
    bundle = replace(bright_bundle(), provenance={"run_key": RUN}, metrics={"val": {"auroc": 0.9}})
    bundle.save(folder / "bundle")
    (folder / "figure.svg").write_text("<svg/>")
    outbox = Outbox(folder / "tracking.jsonl")
    outbox.open(RUN, "final", params={"where": f"{storage}/phantoms"})
    outbox.metrics({"loss": 0.5}, step=3)
    outbox.artifact(folder / "figure.svg", "figures")
    outbox.close()
    with Tracker(None, "exp", storage) as tracker:
        tracker.follow(outbox.path)
    client, audit = connect(None, storage), Audit(storage)
    register_two(client, bundle, storage / "runs/tune-1")
    for number in (1, 2):
        promote(client, version_of(client, "hsg", number), "research", by="me", why="it is better", audit=audit)
    of_servers = ("serve/tokens.json", "serve/jobs/jobs.sqlite", "dicom/RAYMED/images/1.dcm")
    for name in ("cache/decoded.npy", "runs/tune-1/checkpoints/step_1.safetensors", "runs/tune-1/lock", *of_servers):
        (storage / name).parent.mkdir(parents=True, exist_ok=True)
        (storage / name).write_bytes(b"1")


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A storage that nobody changes."""
    storage = tmp_path_factory.mktemp("original") / "home"
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        fill(storage)
    return storage


@pytest.fixture(scope="module")
def saved(original, tmp_path_factory):
    """Its backup."""
    folder = tmp_path_factory.mktemp("backups") / "monday"
    save(folder, at(original))
    return folder


@pytest.fixture(autouse=True)
def no_server(monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def at(storage, **place) -> Place:
    return Place(storage=str(storage), **place)


def told(client) -> dict:
    """What MLflow knows, without the places of files."""
    experiments = [e.experiment_id for e in client.search_experiments() if e.name == "exp"]
    runs = {
        run.info.run_id: (run.data.metrics, run.data.params, run.data.tags, run.info.status)
        for run in client.search_runs(experiments)
    }
    versions = {
        int(v.version): (v.tags, v.aliases, v.run_id, v.description, v.model_id)
        for v in client.search_model_versions("name = 'hsg'")
    }
    aliases = {name: int(number) for name, number in client.get_registered_model("hsg").aliases.items()}
    return {"runs": runs, "versions": versions, "aliases": aliases}


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def answers(uri: str, tracking: str | None, storage: str) -> list:
    return [prediction.row() for prediction in Predictor.from_bundle(load_model(uri, tracking, storage))(IMAGES)]


def check_same(before, client, original: Path, storage, tracking=None) -> None:
    """All that a registry is asked for is as it was."""
    assert told(client) == before and len(before["runs"]) == 1 and before["aliases"]["champion"] == 2
    audit = Audit(resolve_storage(str(storage)))
    assert audit.verify(anchors(client)) == 2 and len(anchors(client)) == 2
    for uri in ("models:/hsg@champion", "models:/hsg/1"):
        assert answers(uri, tracking, str(storage)) == answers(uri, None, str(original))
    (run,) = before["runs"]
    assert Path(client.download_artifacts(run, "figures/figure.svg")).read_text() == "<svg/>"


def test_a_restored_storage_knows_and_answers_the_same(original, saved, tmp_path):
    before, place = told(connect(None, original)), tmp_path / "new home"
    restore(saved, at(place))
    client = connect(None, place)
    check_same(before, client, original, place)
    kept, here = files(original / "runs"), files(place / "runs")
    here = {name: data for name, data in here.items() if not name.endswith((".lock", ".pid"))}
    left_out = {"tune-1/checkpoints/step_1.safetensors", "tune-1/lock"}
    left_out |= {name for name in kept if name.endswith((".lock", ".cursor.json", ".pid"))}
    assert here == {name: data for name, data in kept.items() if name not in left_out}
    assert not any((place / name).exists() for name in ("cache", "serve", "dicom"))
    assert (saved.stat().st_mode & 0o777) == 0o700
    with closing(sqlite3.connect(place / "mlflow/mlflow.db")) as database:
        assert not [line for line in database.iterdump() if original.as_uri() in line]


def test_work_goes_on_in_a_restored_storage(saved, tmp_path):
    restore(saved, at(tmp_path / "home"))
    outbox = Outbox(tmp_path / "home/runs/tune-2/tracking.jsonl")
    outbox.path.parent.mkdir()
    outbox.open("tune-2", "next")
    outbox.close()
    with Tracker(None, "exp", tmp_path / "home") as tracker:
        tracker.follow(outbox.path)
    run = connect(None, tmp_path / "home").get_run(tracker.run_id("tune-2"))
    assert run.info.artifact_uri.startswith((tmp_path / "home/mlartifacts").as_uri())


def test_checkpoints_come_along_where_they_are_asked_for(original, tmp_path):
    save(tmp_path / "backup", at(original), checkpoints=True)
    restore(tmp_path / "backup", at(tmp_path / "home"))
    assert (tmp_path / "home/runs/tune-1/checkpoints/step_1.safetensors").read_bytes() == b"1"
    assert not (tmp_path / "home/runs/tune-1/lock").exists()


def test_what_is_committed_is_saved_while_others_hold_the_database(original, tmp_path):
    """In write-ahead mode that is not in the database's own file yet."""
    copy = tmp_path / "home/mlflow/mlflow.db"
    copy.parent.mkdir(parents=True)
    copy.write_bytes((original / "mlflow/mlflow.db").read_bytes())
    with closing(sqlite3.connect(copy)) as writer, closing(sqlite3.connect(copy)) as other:
        writer.execute("PRAGMA journal_mode=WAL")
        writer.execute("UPDATE runs SET name = 'committed'")
        writer.commit()
        other.execute("UPDATE runs SET name = 'not yet'")
        save(tmp_path / "backup", at(tmp_path / "home"))
    with closing(sqlite3.connect(tmp_path / "backup/mlflow.db")) as database:
        assert database.execute("SELECT DISTINCT name FROM runs").fetchall() == [("committed",)]


def test_to_and_from_a_bucket(original, s3, saved, tmp_path, monkeypatch):
    url = f"{s3.url}/first"
    restore(saved, at(url))
    before, storage = told(connect(None, original)), resolve_storage(url)
    check_same(before, connect(None, storage), original, url)
    runs = connect(None, storage).search_runs(["1"])
    assert all(run.info.artifact_uri.startswith(f"{url}/mlflow/artifacts/") for run in runs)

    save(tmp_path / "again", at(url))
    monkeypatch.setenv("RAYMED_LOCAL", str(tmp_path / "another machine"))
    restore(tmp_path / "again", at(f"{s3.url}/second"))
    check_same(before, connect(None, resolve_storage(f"{s3.url}/second")), original, f"{s3.url}/second")
    sizes = [len([key for key in s3.keys() if key.startswith(f"{name}/runs/")]) for name in ("first", "second")]
    assert sizes[0] == sizes[1] > 5
    with pytest.raises(UserError, match="goes into an empty storage"):
        restore(tmp_path / "again", at(url))


def test_a_registered_bundle_that_goes_meanwhile_is_an_error(original, saved, s3, meanwhile, tmp_path):
    restore(saved, at(s3.url))
    artifacts = f"{s3.url}/mlflow/artifacts"
    [first, *_] = [found.url for found in s3_listing(artifacts) if found.url.endswith("bundle/model.safetensors")]
    meanwhile(artifacts, lambda: s3_delete([first]))
    with pytest.raises(UserError, match=f"there is nothing at {first}"):
        save(tmp_path / "backup", at(s3.url))
    assert not (tmp_path / "backup").exists()


def test_a_registered_bundle_that_was_not_there_is_told_of(saved, tmp_path):
    home = tmp_path / "home"
    restore(saved, at(home))
    shutil.rmtree(connect(None, home).get_model_version_download_uri("hsg", "2").removeprefix("file://"))
    said = save(tmp_path / "backup", at(home))
    assert "registered, but without files in this backup: hsg 2\n" in said
    assert "files in this backup: hsg 2\n" in backup.work(backup.Check(str(tmp_path / "backup")))
    restore(tmp_path / "backup", at(tmp_path / "again"))
    assert "registered" not in backup.work(backup.Check(str(saved)))


def test_what_the_database_names_is_listed_after_it(saved, monkeypatch, tmp_path):
    home = tmp_path / "home"
    restore(saved, at(home))
    copied = backup._copy_database

    def copy(source: Path, target: Path) -> None:
        write_bytes(home / "runs/new/bundle.json", b"new")  # and then whatever names it
        copied(source, target)

    monkeypatch.setattr(backup, "_copy_database", copy)
    save(tmp_path / "backup", at(home))
    assert (tmp_path / "backup/storage/runs/new/bundle.json").read_bytes() == b"new"


@pytest.fixture
def server(tmp_path):
    """A real MLflow server that keeps mlflow.db and artifacts in `folder`."""
    folder = tmp_path / "server"
    (folder / "a").mkdir(parents=True)
    (folder / "mlflow.db").symlink_to("server.db")
    (folder / "artifacts").symlink_to("a")
    running = MLflow(folder)
    running.start()
    yield running
    running.kill()


@pytest.mark.slow
def test_to_a_server_that_runs_and_back(original, saved, server, tmp_path):
    before, home = told(connect(None, original)), tmp_path / "home"
    restore(saved, at(home, mlflow=str(server.folder)))
    client = connect(server.uri, home)
    check_same(before, client, original, home, server.uri)
    assert {e.artifact_location for e in client.search_experiments() if e.name == "exp"} == {"mlflow-artifacts:"}

    save(tmp_path / "of server", at(home, mlflow=str(server.folder)))
    restore(tmp_path / "of server", at(tmp_path / "third"))
    check_same(before, connect(None, tmp_path / "third"), original, tmp_path / "third")
    with pytest.raises(UserError, match="keeps its runs itself: name the folder"):
        save(tmp_path / "no", at(home, tracking=server.uri))
    with pytest.raises(UserError, match=r"mlflow.db has 1 runs|artifacts has "):
        restore(saved, at(tmp_path / "fourth", mlflow=str(server.folder)))
    assert not (tmp_path / "fourth").exists() and not (tmp_path / "no").exists()


@pytest.mark.parametrize("there", ["runs/other/config.json", "registry/audit.jsonl", "mlartifacts/models/x"])
def test_a_storage_that_is_not_empty_is_refused(there, saved, tmp_path):
    (tmp_path / "home" / there).parent.mkdir(parents=True)
    (tmp_path / "home" / there).write_text("mine")
    with pytest.raises(UserError, match=f"goes into an empty storage, and .* has .*{Path(there).name}"):
        restore(saved, at(tmp_path / "home"))
    assert files(tmp_path / "home") == {there: b"mine"}


def test_a_database_with_runs_is_refused(original, saved, tmp_path):
    (tmp_path / "home/mlflow").mkdir(parents=True)
    database = tmp_path / "home/mlflow/mlflow.db"
    database.write_bytes((original / "mlflow/mlflow.db").read_bytes())
    with pytest.raises(UserError, match=r"mlflow\.db has 1 runs"):
        restore(saved, at(tmp_path / "home"))
    assert files(tmp_path / "home") == {"mlflow/mlflow.db": (original / "mlflow/mlflow.db").read_bytes()}


def damaged(how: str, folder: Path) -> None:
    """Do to a backup what disks and people do."""
    facts = folder / "backup.json"
    if how == "mlflow.db is damaged":
        data = bytearray((folder / "mlflow.db").read_bytes())
        data[len(data) // 2] ^= 1
        (folder / "mlflow.db").write_bytes(data)
    elif how == "audit.jsonl is missing":
        (folder / "storage/registry/audit.jsonl").unlink()
    elif how == "storage/more was added":
        (folder / "storage/more").write_text("")
    elif how == "is no backup":
        (folder / sums.FILE).unlink()
    else:
        facts.write_text(json.dumps(json.loads(facts.read_text()) | {"format": 2}))
        sums.write(folder)


@pytest.mark.parametrize(
    "how",
    ["mlflow.db is damaged", "audit.jsonl is missing", "storage/more was added", "is no backup", "a newer raymed"],
)
def test_a_damaged_backup_is_refused_before_anything_is_written(how, original, tmp_path):
    save(tmp_path / "backup", at(original))
    damaged(how, tmp_path / "backup")
    with pytest.raises(UserError, match=how):
        restore(tmp_path / "backup", at(tmp_path / "home"))
    assert not (tmp_path / "home").exists()


def test_what_cannot_be_saved_leaves_nothing(original, saved, tmp_path):
    broken = tmp_path / "home/mlflow/mlflow.db"
    broken.parent.mkdir(parents=True)
    broken.write_text("no database at all" * 100)
    for place, folder, reason in [
        (at(tmp_path / "home"), tmp_path / "backups/a", "cannot be read as MLflow's database"),
        (at(tmp_path / "empty"), tmp_path / "backups/a", "there is nothing in"),
        (at(original), saved, "is there already: name a new folder"),
        (at(original), original / "runs/backup", "lies in the storage that it is to save"),
    ]:
        with pytest.raises(UserError, match=reason):
            save(folder, place)
    assert list((tmp_path / "backups").iterdir()) == [] and not (original / "runs/backup").exists()


def run(*words: str, **env: str) -> subprocess.CompletedProcess:
    """The command, in an environment that leads nowhere but where `env` says."""
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "RAYMED_", "MLFLOW_"))}
    command = [sys.executable, "-m", "raymed.cluster.backup", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=plain | env)


def test_as_commands(original, tmp_path):
    done = run("save", f"{tmp_path}/b", "--storage", str(original))
    assert done.returncode == 0 and "MB of" in done.stdout, done.stderr
    (tmp_path / "b/mlflow.db").write_bytes(b"")
    done = run("check", f"{tmp_path}/b")
    assert done.returncode == 2 and "mlflow.db is damaged" in done.stderr


def test_the_cluster_that_is_up(saved, s3, tmp_path, monkeypatch):
    kept = tmp_path / "cluster/data/mlflow"
    restore(saved, at(s3.url, mlflow=str(kept)))
    monkeypatch.setenv("RAYMED_CLUSTER", str(tmp_path / "cluster"))
    environment = s3.env | {"RAYMED_HOME": s3.url, "MLFLOW_TRACKING_URI": "http://127.0.0.1:1"}
    state.save(Cluster("local", environment=environment))
    done = run("save", f"{tmp_path}/b", "--cluster", RAYMED_CLUSTER=f"{tmp_path}/cluster")
    assert done.returncode == 0, done.stderr
    again, first = files(tmp_path / "b"), files(saved)
    assert {name for name in first if name.startswith(("storage/", "artifacts/"))} < again.keys()
    assert all(again[name] == first[name] for name in first if name.startswith(("storage/", "artifacts/")))
    assert json.loads(again["backup.json"])["root"] == "mlflow-artifacts:"

    for provider, storage, told in (("aws", s3.url, "s3://..."), ("gcp", "/mnt/raymed", "MOUNT")):
        state.save(Cluster(provider, environment=environment | {"RAYMED_HOME": storage}))
        said = f"restore before that cluster is up: --storage {told} --mlflow {told}/mlflow, then up"
        with patch.dict(os.environ), pytest.raises(UserError, match=said):
            restore(saved, Place(cluster=True))


def test_a_folder_of_the_clusters_machines_is_not_looked_for_here(original, tmp_path, monkeypatch):
    """Not even where one of that name is here too."""
    monkeypatch.setenv("RAYMED_CLUSTER", str(tmp_path / "cluster"))
    state.save(
        Cluster("onprem", environment={"RAYMED_HOME": str(original), "MLFLOW_TRACKING_URI": "http://127.0.0.1:1"})
    )
    said = f"start this on one that has it, with --storage {original} --mlflow {original}/mlflow"
    with patch.dict(os.environ), pytest.raises(UserError, match=said):
        save(tmp_path / "b", Place(cluster=True))
    assert not (tmp_path / "b").exists()
