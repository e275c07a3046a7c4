"""Jobs: the tables of `jobs/predict.py`, who sees them, and what may be asked for."""

import json
import shutil
import socket
import sqlite3
from contextlib import closing
from dataclasses import replace
from types import SimpleNamespace

import pytest
from batch_example import JOBS, ask, case_bundle, config, ended, expected, held, root, same_numbers, started, store_of
from clip_bundles import clip_bundle
from predict_example import write_images
from waiting import until

from raymed.config import UserError
from raymed.serve.access.tokens import add_token
from raymed.serve.app import create_app
from raymed.serve.config import Access, Limits
from raymed.serve.jobs import KINDS, predict
from raymed.serve.jobs.store import Store

__all__ = ["case_bundle", "config", "expected", "held", "root"]


def test_a_manifest_is_answered_as_the_job_predict_answers_it(config, expected, case_bundle):
    with started(config) as client:
        asked = ask(client)
        assert asked.status_code == 202
        job = asked.json()
        assert asked.headers["Location"] == f"{JOBS}/{job['id']}" and job["state"] in ("queued", "running")
        done = ended(client, job["id"])
        assert (done["state"], done["done"], done["total"], done["problem"]) == ("succeeded", 12, 12, None)
        assert done["bundle"] and done["created"] <= done["started"] <= done["finished"]
        cases, images = (client.get(f"{asked.headers['Location']}/result?table={t}") for t in ("cases", "images"))
        assert cases.headers["content-type"].startswith("text/csv")
        assert same_numbers(cases.content, expected[0]) and same_numbers(images.content, expected[1])
        told = [line for line in images.text.splitlines() if "the file is empty" in line]
        assert len(told) == 1 and "not used: 004_left.png (the file is empty" in cases.text
        assert client.get(f"{JOBS}/{job['id']}/result").content == cases.content
        assert [each["id"] for each in client.get(JOBS).json()] == [job["id"]]


def test_a_folder_is_answered_under_pseudonyms(config, root, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    with started(config) as client:
        done = ended(client, ask(client, str(root / "set")).json()["id"])
        assert done["state"] == "succeeded"
        text = client.get(f"{JOBS}/{done['id']}/result").text
    assert len(text.splitlines()) > 1 and "004_left" not in text and "/set" not in text
    assert (tmp_path / ".config" / "raymed" / "pseudonyms.key").is_file()


@pytest.mark.parametrize(
    "source",
    [
        "/etc/passwd",
        "..",
        "../other",
        "set/../../x",
        "/",
        "~",
        "\0",
        "s3://bucket/m.csv",
        "http://127.0.0.1/x",
        "a" * 4000,
    ],
)
def test_what_lies_outside_is_nobodys_business(config, source):
    """What looks like a URL is a name below the root, where nothing is."""
    is_name = "://" in source or source[0] in "a~"
    with started(config) as client:
        refused = ask(client, source)
        assert refused.status_code == (422 if is_name else 403) and refused.json()["field"] == "source"
        assert len(source) < 3 or source not in refused.text


def test_links_and_manifests_do_not_lead_outside(config, root, tmp_path, monkeypatch):
    secret = tmp_path / "secret"
    write_images(secret, 2)
    link = root / "link"
    link.symlink_to(secret, target_is_directory=True)
    named = root / "named.csv"
    named.write_text(f"image,case,patient,side\n{secret}/000_left.png,C,P,left\nset/000_left.png,C,P,left\n")
    remote = root / "remote.csv"
    remote.write_text("image,case,patient,side\ns3://bucket/x.png,C,P,left\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    bucket = socket.create_server(("127.0.0.1", 0))
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{bucket.getsockname()[1]}")
    linked = root / "linked"
    linked.mkdir()
    (linked / "own.png").write_bytes((root / "set" / "000_left.png").read_bytes())
    (linked / "other.png").symlink_to(secret / "000_left.png")
    through = root / "through.csv"
    through.write_text("image,case,patient,side\nlink/000_left.png,C,P,left\n")
    try:
        with started(config) as client:
            assert ask(client, "link").status_code == 403
            assert ask(client, "link/manifest.csv").status_code == 403
            for source in ("named.csv", "remote.csv", "through.csv", "linked"):
                done = ended(client, ask(client, source).json()["id"])
                assert done["state"] == "failed" and "1 images do not lie in a folder" in done["problem"]
                assert client.get(f"{JOBS}/{done['id']}/result").status_code == 409
        bucket.setblocking(False)
        with pytest.raises(BlockingIOError):  # nobody has called
            bucket.accept()
    finally:
        bucket.close()
        shutil.rmtree(linked)
        for path in (link, named, remote, through):
            path.unlink()


def test_what_cannot_be_asked(config, tmp_path):
    two = (*config.models, f"pairs={clip_bundle().save(tmp_path / 'pairs')}")
    with started(replace(config, models=two)) as client:
        assert ask(client, "nothing/there.csv").status_code == 422
        assert ask(client, model="pairs").json()["field"] == "model"
        assert ask(client, model="other").status_code == 404
        assert ask(client, kind="train").status_code == 422
        assert ask(client, more=1).status_code == 422
        assert client.get(f"{JOBS}/{'0' * 32}").status_code == 404
        assert client.get(f"{JOBS}/..%2f..%2fx").status_code in (404, 422)
    with started(replace(config, batch_roots=(), storage=str(tmp_path / "other"))) as client:
        assert ask(client).status_code == 403 and client.get(JOBS).status_code == 403
        assert not (tmp_path / "other" / "serve" / "jobs").exists()
    with pytest.raises(UserError, match="batch_roots"):
        create_app(replace(config, batch_roots=("s3://bucket/x",)))


def test_jobs_need_a_storage_that_servers_share(config, tmp_path, monkeypatch):
    """A bucket's working copy is the machine's own."""
    monkeypatch.setenv("RAYMED_LOCAL", str(tmp_path / "local"))
    monkeypatch.setenv("RAYMED_HOME", "s3://bucket/raymed")
    for storage in (None, "s3://bucket/raymed"):
        with pytest.raises(UserError, match=r"batch_roots: .*s3://bucket/raymed/.*--storage DIR"):
            create_app(replace(config, storage=storage))
    create_app(replace(config, storage=None, batch_roots=()))
    create_app(config)
    assert not (tmp_path / "local").exists()


def test_a_kind_that_is_not_known_here_is_left_to_those_who_know_it(config):
    """A newer server that shares the storage."""
    source = f"{config.batch_roots[0]}/set/manifest.csv"
    other = store_of(config).add("", "segment", "hsg", source, 9).id
    with started(config) as client:
        kind = client.get("/openapi.json").json()["components"]["schemas"]["JobRequest"]["properties"]["kind"]
        assert kind["enum"] == [*KINDS] and kind["default"] == "predict"
        refused = ask(client, kind="segment")
        assert refused.status_code == 422 and refused.json()["field"] == "kind"
        assert ended(client, ask(client).json()["id"])["state"] == "succeeded"
        assert client.get(f"{JOBS}/{other}").json()["state"] == "queued"


def test_what_a_kind_does_is_found_by_its_name(config, monkeypatch):
    def answers(live, asked, folder, limits, ask):
        (folder / "counted.txt").write_text(str(len(asked.cases)))
        yield len(asked.cases)

    work = SimpleNamespace(check=predict.check, cases_of=predict.cases_of, answers=answers)
    work.TABLES = {"cases": "counted.txt"}
    monkeypatch.setitem(KINDS, "count", work)
    with started(config) as client:
        job = ended(client, ask(client, kind="count").json()["id"])
        assert (job["kind"], job["state"], job["done"]) == ("count", "succeeded", 12)
        assert client.get(f"{JOBS}/{job['id']}/result").text == "12"
        assert client.get(f"{JOBS}/{job['id']}/result?table=images").status_code == 404


def test_only_the_owner_sees_a_job(config, tmp_path):
    tokens = tmp_path / "tokens.json"
    mine, other = ({"Authorization": f"Bearer {add_token(tokens, name, 1)}"} for name in ("mine", "other"))
    access = Access(tokens=str(tokens), hosts=("testserver",))
    with started(replace(config, access=access)) as client:
        job = client.post(JOBS, json={"model": "hsg", "source": "set/manifest.csv"}, headers=mine).json()
        assert ended(client, job["id"], **mine)["state"] == "succeeded"
        path = f"{JOBS}/{job['id']}"
        assert client.get(path).status_code == 401
        for answer in (client.get(path, headers=other), client.get(f"{path}/result", headers=other),
                       client.get(f"{path}/events", headers=other), client.delete(path, headers=other)):  # fmt: skip
            assert answer.status_code == 404
        assert client.get(JOBS, headers=other).json() == []
        assert client.get(f"{path}/result", headers=mine).status_code == 200


def test_so_many_wait_and_no_more(config, held):
    reached, go = held
    with started(replace(config, limits=Limits(jobs=2))) as client:
        numbers = [ask(client).json()["id"]]
        assert reached.wait(20)
        numbers += [ask(client).json()["id"] for _ in range(2)]
        refused = ask(client)
        assert refused.status_code == 429 and int(refused.headers["Retry-After"]) > 0
        go.set()
        assert {ended(client, number)["state"] for number in numbers} == {"succeeded"}
        finished = [client.get(f"{JOBS}/{number}").json()["finished"] for number in numbers]
        assert finished == sorted(finished), "the first to come is the first to be done"


def test_a_job_is_cancelled_and_then_forgotten(config, held):
    reached, go = held
    with started(config) as client:
        running, waiting = (ask(client).json()["id"] for _ in range(2))
        assert reached.wait(20)
        for number in (waiting, running):
            assert client.delete(f"{JOBS}/{number}").status_code == 204
            assert client.get(f"{JOBS}/{number}").json()["state"] == "cancelled"
        go.set()
        third = ask(client).json()["id"]  # begins when the cancelled one has been left
        assert ended(client, third)["state"] == "succeeded"
        assert not (client.jobs.folder / running).exists() and (client.jobs.folder / third).is_dir()
        assert client.get(f"{JOBS}/{running}").json()["state"] == "cancelled"
        for number in (running, third):
            assert client.delete(f"{JOBS}/{number}").status_code == 204
            assert client.get(f"{JOBS}/{number}").status_code == 404
        assert not (client.jobs.folder / third).exists()


def test_events_tell_of_progress_until_the_end(config, held):
    reached, go = held
    with started(config) as client:
        number = ask(client).json()["id"]
        assert reached.wait(20)
        go.set()
        with client.stream("GET", f"{JOBS}/{number}/events") as stream:
            assert stream.headers["content-type"].startswith("text/event-stream")
            events = "".join(stream.iter_text()).strip().split("\n\n")
    told = [json.loads(event.partition("data: ")[2]) for event in events if "data: " in event]
    assert events[-1].startswith("event: succeeded\n") and told[-1]["done"] == told[-1]["total"] == 12
    assert [job["done"] for job in told] == sorted(job["done"] for job in told)


def test_results_are_kept_for_so_many_days(config):
    with started(config) as client:
        old, new = (ended(client, ask(client).json()["id"])["id"] for _ in range(2))
        path = client.jobs.folder
        with closing(sqlite3.connect(path / "jobs.sqlite")) as rows, rows:
            rows.execute("UPDATE jobs SET finished = finished - ? WHERE id = ?", (7 * 86400, old))
        until(lambda: client.get(f"{JOBS}/{old}").status_code == 404 and not (path / old).exists())
        assert client.get(f"{JOBS}/{new}/result").status_code == 200


def test_requests_are_answered_while_a_job_runs(config, held, root):
    reached, go = held
    with started(config) as client:
        number = ask(client).json()["id"]
        assert reached.wait(20)
        content = (root / "set" / "000_left.png").read_bytes()
        answer = client.post("/v1/models/hsg:predict", content=content, headers={"Content-Type": "image/png"})
        assert answer.status_code == 200
        go.set()
        assert ended(client, number)["state"] == "succeeded"


def test_the_store_has_no_log_beside_it(tmp_path):
    """Whose memory machines that mount the folder do not share; one of before is put back, when nobody has it open."""
    path = tmp_path / "jobs.sqlite"
    with closing(sqlite3.connect(path, isolation_level=None)) as before:
        before.execute("PRAGMA journal_mode=WAL")
        before.execute("CREATE TABLE other (x)")
        before.execute("BEGIN")
        before.execute("SELECT * FROM other")
        assert Store(path, {"hsg": "x"}).add("me", "predict", "hsg", "/x", 1), "it works all the same"
    store = Store(path, {"hsg": "x"})
    assert store.all("me")[0].source == "/x" and sorted(p.name for p in tmp_path.iterdir()) == ["jobs.sqlite"]
    with closing(sqlite3.connect(path)) as rows:
        assert rows.execute("PRAGMA journal_mode").fetchone() == ("delete",)


def test_the_store_is_for_its_owner_alone_and_shared_by_processes(tmp_path):
    path = tmp_path / "jobs" / "jobs.sqlite"
    one, other = Store(path, {"hsg": "x", "more": "y"}), Store(path, {"hsg": "x"})
    assert path.stat().st_mode & 0o077 == 0
    job = one.add("me", "predict", "hsg", "/x", 1)
    assert one.add("me", "predict", "hsg", "/x", 1) is None and other.get(job.id, "me").state == "queued"
    assert other.add("me", "predict", "hsg", "/x", 1) is None and Store(path, {"hsg": "z"}).unfinished() == []
    assert [row.job.id for row in other.unfinished()] == [job.id] and one.claim("else") is None
    assert other.claim(job.id).job.state == "running"
    assert one.finish(job.id, "cancelled") and not other.progress(job.id, 3) and not other.finish(job.id, "failed")
    assert one.get(job.id, "me").finished is not None and one.claim(job.id) is None
