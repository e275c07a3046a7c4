"""The outbox of a worker on another node comes through a bucket: its file is replaced, by longer ones and by others."""

import json
import time

import pytest

from raymed.config import UserError
from raymed.storage import s3 as objects
from raymed.storage import working_copy
from raymed.tracking import Outbox, upload
from raymed.tracking.upload import Store, Upload


@pytest.fixture
def store(storage):
    """The default store."""
    return Store(f"sqlite:///{storage}/mlflow/mlflow.db", (storage / "mlartifacts").as_uri())


@pytest.fixture
def worker(tmp_path):
    """The outbox as the worker writes it; `replace(worker)` brings it to the driver."""
    outbox = Outbox(tmp_path / "worker/tracking.jsonl")
    outbox.open("key", "name", params={"lr": 0.1})
    return outbox


@pytest.fixture
def bring(store, storage, worker):
    """bring(text of another outbox | None): the driver's file is replaced and uploaded, by a new process's uploader if
    asked; returns the run's points."""
    path = storage / "runs/tracking.jsonl"
    path.parent.mkdir()
    uploads = []

    def replace(text=None, anew=False):
        new = path.with_name("new")
        new.write_text(worker.path.read_text() if text is None else text)
        new.rename(path)
        if anew or not uploads:
            uploads.append(Upload(path, "uri", "exp"))
        while uploads[-1].is_pending():
            if not uploads[-1].ship(store):
                break
        runs = store.client.search_runs([store.experiment_id("exp")])
        assert len(runs) == 1
        history = store.client.get_metric_history(runs[0].info.run_id, "loss")
        return sorted((point.step, point.value) for point in history)

    return replace


def metrics(outbox, steps, factor=1.0):
    for step in steps:
        outbox.metrics({"loss": factor * step}, step)
    return outbox.path.read_text()


@pytest.mark.parametrize("anew", [False, True])
def test_longer_ones(worker, bring, anew):
    for end in (5, 6, 30):
        metrics(worker, range(end - 4, end + 1))
        points = bring(anew=anew)
    assert points == [(step, float(step)) for step in (*range(1, 7), *range(26, 31))]


@pytest.mark.parametrize("anew", [False, True])
def test_a_shorter_one_that_goes_on_otherwise(worker, bring, anew):
    """The node was lost with its last lines: the bucket has fewer, and the next worker repeats the steps."""
    short = metrics(worker, range(1, 7))
    metrics(worker, range(7, 11))
    assert len(bring()) == 10
    worker.path.write_text(short)
    assert bring(anew=anew) == [(step, float(step)) for step in range(1, 11)], "nothing double, nothing lost"
    worker.open("key", "name")
    worker.rewind(4)
    time.sleep(0.002)  # the repeated steps get other times
    metrics(worker, range(5, 13), factor=2.0)
    assert bring(anew=anew) == [(step, float(step)) for step in range(1, 11)] + [(11, 22.0), (12, 24.0)]


@pytest.mark.parametrize("anew", [False, True])
def test_one_that_has_become_longer_meanwhile_but_does_not_continue_the_first(worker, bring, anew):
    short = metrics(worker, range(1, 7))
    metrics(worker, range(7, 11))
    bring()
    worker.path.write_text(short)
    worker.rewind(4)
    time.sleep(0.002)
    metrics(worker, range(5, 40), factor=2.0)
    points = bring(anew=anew)
    assert points == [(s, float(s)) for s in range(1, 11)] + [(s, 2.0 * s) for s in range(11, 40)]


def test_a_machine_without_the_cursor_goes_on_where_the_server_is(worker, bring, storage):
    """The job continues elsewhere: the outbox comes from the bucket, how far it was uploaded does not."""
    metrics(worker, range(1, 11))
    bring()
    (storage / "runs/tracking.cursor.json").unlink()
    worker.rewind(4)
    time.sleep(0.002)
    metrics(worker, range(5, 13), factor=2.0)
    points = bring(anew=True)
    assert points == [(step, float(step)) for step in range(1, 11)] + [(11, 22.0), (12, 24.0)]


def test_a_process_that_died_before_its_cursor_was_written(worker, bring, storage):
    metrics(worker, range(1, 4))
    bring()
    cursor = storage / "runs/tracking.cursor.json"
    old = cursor.read_text()
    metrics(worker, range(4, 11))
    bring()
    cursor.write_text(old)
    worker.rewind(4)
    time.sleep(0.002)
    metrics(worker, range(5, 13), factor=2.0)
    points = bring(anew=True)
    assert points == [(step, float(step)) for step in range(1, 11)] + [(11, 22.0), (12, 24.0)]


def test_a_cursor_of_before_still_counts(worker, bring, storage):
    metrics(worker, range(1, 4))
    bring()
    cursor = storage / "runs/tracking.cursor.json"
    cursor.write_text(json.dumps({k: v for k, v in json.loads(cursor.read_text()).items() if k != "tail"}))
    metrics(worker, range(4, 6))
    assert len(bring(anew=True)) == 5


def test_an_artifact_comes_after_the_outbox_that_names_it(store, s3, monkeypatch):
    """What was written on another node is fetched from the bucket; it may be there only a moment later."""
    folder = working_copy(f"{s3.url}/runs/one")
    outbox = Outbox(folder / "tracking.jsonl")
    outbox.open("key", "name")
    outbox.artifact(folder / "file.txt")
    outbox.artifact(folder / "bundle", "bundle")
    outbox.metrics({"loss": 1.0}, 1)
    each = Upload(outbox.path, "uri", "exp")
    each.ship(store)
    assert each.is_pending() and each.cursor.run_id
    s3.put("runs/one/bundle/model", b"m")
    s3.put("runs/one/bundle/deep/bundle.json", b"{}")
    s3.put("runs/one/file.txt", b"f")
    each.ship(store)
    assert not each.is_pending()
    client, run = store.client, each.cursor.run_id
    with open(client.download_artifacts(run, "bundle/deep/bundle.json")) as file:
        assert file.read() == "{}"
    assert [entry.path for entry in client.list_artifacts(run)] == ["bundle", "file.txt"]

    monkeypatch.setattr(upload, "ARTIFACT_PATIENCE", 0.0)
    outbox.artifact(folder / "never.txt")
    outbox.metrics({"loss": 2.0}, 2)
    each.ship(store)
    assert not each.is_pending(), "it is not waited for for ever"
    assert [m.step for m in client.get_metric_history(run, "loss")] == [1, 2]


def test_a_folder_of_which_only_a_part_is_here_comes_whole(store, s3):
    folder = working_copy(f"{s3.url}/runs/one")
    outbox = Outbox(folder / "tracking.jsonl")
    outbox.open("key", "name")
    outbox.artifact(folder / "bundle", "bundle")
    for name in ("model", "bundle.json"):
        s3.put(f"runs/one/bundle/{name}", b"{}")
    (folder / "bundle").mkdir()
    (folder / "bundle" / "model").write_text("{}")
    each = Upload(outbox.path, "uri", "exp")
    each.ship(store)
    entries = store.client.list_artifacts(each.cursor.run_id, "bundle")
    assert [entry.path for entry in entries] == ["bundle/bundle.json", "bundle/model"]


def test_an_artifact_that_may_not_be_read_says_so(store, s3, monkeypatch):
    folder = working_copy(f"{s3.url}/runs/one")
    outbox = Outbox(folder / "tracking.jsonl")
    outbox.open("key", "name")
    outbox.artifact(folder / "file.txt")
    s3.put("runs/one/file.txt", b"f")

    def refused(url, *rest):
        raise UserError(f"no permission for GetObject on {url}")

    monkeypatch.setattr(objects, "_download", refused)
    with pytest.raises(UserError, match=f"no permission for GetObject on {s3.url}/runs/one/file.txt"):
        Upload(outbox.path, "uri", "exp").ship(store)


def test_an_outbox_that_has_moved_and_one_of_before(store, tmp_path):
    """What it names is beside it; of before are those that name files by their whole path."""
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "file.txt").write_text(folder)
    outbox = Outbox(tmp_path / "a/tracking.jsonl")
    outbox.open("key", "name")
    outbox.artifact(tmp_path / "a/file.txt")
    (tmp_path / "b/old.txt").write_text("old")
    line = {"op": "artifact", "time": 1, "path": str(tmp_path / "b/old.txt"), "folder": ""}
    (tmp_path / "b/tracking.jsonl").write_text(outbox.path.read_text() + json.dumps(line) + "\n")
    each = Upload(tmp_path / "b/tracking.jsonl", "uri", "exp")
    each.ship(store)
    texts = {}
    for name in ("file.txt", "old.txt"):
        with open(store.client.download_artifacts(each.cursor.run_id, name)) as file:
            texts[name] = file.read()
    assert texts == {"file.txt": "b", "old.txt": "old"}
