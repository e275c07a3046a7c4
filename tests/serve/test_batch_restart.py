"""Jobs outlive the server that began them, by the version of the model that they began with."""

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import httpx
from batch_example import JOBS, ask, case_bundle, config, ended, expected, held, root, same_numbers, started, store_of
from predict_example import read_rows, write_images
from waiting import until

from raymed.config import to_dict
from raymed.serve.config import Access, Hardware, ServeConfig
from raymed.serve.live import Origin

REPO = Path(__file__).resolve().parents[2]
__all__ = ["case_bundle", "config", "expected", "held", "root"]


def test_a_server_that_stops_goes_on_when_it_starts_again(config, held, expected, monkeypatch):
    reached, go = held
    with started(config) as client:
        first, second = (ask(client).json()["id"] for _ in range(2))
        assert reached.wait(20)
        client.jobs._ending.set()  # as when the server is told to end
        go.set()
        until(lambda: not client.jobs._thread.is_alive())
        assert client.get(f"{JOBS}/{first}").json()["state"] == "running"
        table = client.jobs.folder / first / "predictions.csv"
        written = table.read_bytes()
        assert len(written.splitlines()) == 1 + 3
    with started(config) as client:
        assert ended(client, first)["state"] == ended(client, second)["state"] == "succeeded"
        assert table.read_bytes().startswith(written), "what stood there is not done again"
        assert same_numbers(table.read_bytes(), expected[0])


def begun(config):
    """The store, and the number of a job that a server began and died."""
    store = store_of(config)
    job = store.add("", "predict", "hsg", str(Path(config.batch_roots[0]) / "set" / "manifest.csv"), 9)
    assert job and store.claim(job.id)
    return store, job.id


def test_a_model_that_has_changed_in_between_fails_the_job(config):
    store, number = begun(config)
    store.begin(number, Origin(config.models[0], "", "a" * 64), 12)
    with started(config) as client:
        done = ended(client, number)
        assert done["state"] == "failed" and "hsg has changed" in done["problem"]
        assert ended(client, ask(client).json()["id"])["state"] == "succeeded", "the next one is worked on"


def test_a_job_goes_on_with_the_version_it_began_with(bundle, root, tmp_path):
    """Also when the alias has moved meanwhile: that version still is in the registry."""
    from raymed.registry.register import IDENTITY, RegisterConfig, register
    from raymed.tracking import Outbox, Tracker, connect

    storage = tmp_path / "home"
    outbox = Outbox(tmp_path / "tracking.jsonl")
    outbox.open("tune-1/final", "final")
    outbox.close()
    with Tracker(None, "raymed", storage) as tracker:
        tracker.follow(outbox.path)
    place = {"tracking": None, "storage": storage}
    first = register(bundle.save(tmp_path / "1" / "bundle"), RegisterConfig(), "hsg", **place)
    changed = replace(bundle, operating_point=bundle.operating_point | {"threshold": 0.6})
    second = register(changed.save(tmp_path / "2" / "bundle"), RegisterConfig(), "hsg", **place)
    client = connect(None, storage)
    client.set_registered_model_alias("hsg", "champion", str(second.version))
    config = ServeConfig(
        models=("hsg=models:/hsg@champion",), access=Access(open=True, hosts=("testserver",)),
        hardware=Hardware(device="cpu", threads=1, max_batch=1), batch_roots=(str(root),), storage=str(storage),
    )  # fmt: skip
    store, number = begun(config)
    digest = client.get_model_version("hsg", str(first.version)).tags[IDENTITY]
    store.begin(number, Origin(f"models:/hsg/{first.version}", str(first.version), digest), 24)
    with started(config) as http:
        done = ended(http, number, 60)
        assert (done["state"], done["version"], done["problem"]) == ("succeeded", str(first.version), None)
        rows = read_rows(http.jobs.folder / number / "predictions.csv")
        assert set(rows["version"]) == {str(first.version)} and len(rows) == 24, "it decides about images"
        fresh = ended(http, ask(http).json()["id"])
        assert fresh["version"] == str(second.version)


def test_a_job_that_kills_the_server_is_given_up(config):
    store, number = begun(config)
    for _ in range(2):
        assert store.claim(number)
    with started(config) as client:
        done = ended(client, number)
        assert done["state"] == "failed" and "3 times" in done["problem"]


def test_a_killed_server_loses_no_job(config, root, tmp_path, expected):
    """A real process, killed in the middle of a job, and started again."""
    big = root / "big"
    write_images(big, 400)
    code = (
        "import json, sys; from raymed.config import from_dict; from raymed.serve.config import ServeConfig; "
        "from raymed.serve.run import serve; serve(from_dict(ServeConfig, json.loads(sys.argv[1])))"
    )
    told = json.dumps(to_dict(config) | {"port": 0, "models": list(config.models)})
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(REPO), "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}

    def start(log: Path):
        with log.open("w") as file:
            process = subprocess.Popen([sys.executable, "-c", code, told], cwd=REPO, env=environment, stdout=file,
                                       stderr=subprocess.DEVNULL)  # fmt: skip
        return process, until(lambda: log.read_text().partition("serving on ")[2].partition("\n")[0], 60)

    process, url = start(tmp_path / "first.log")
    try:
        asked = httpx.post(f"{url}{JOBS}", json={"model": "hsg", "source": "big/manifest.csv"})
        number = asked.json()["id"]
        table = Path(config.storage) / "serve" / "jobs" / number / "predictions.csv"
        until(lambda: table.is_file() and len(table.read_bytes().splitlines()) > 20, 30)
        process.send_signal(signal.SIGKILL)
        process.wait(10)
        written = table.read_bytes()
        assert len(written.splitlines()) < 400, "it was in the middle"
        process, url = start(tmp_path / "second.log")
        with httpx.stream("GET", f"{url}{JOBS}/{number}/events", timeout=60) as stream:
            events = "".join(stream.iter_text())
        assert "event: succeeded" in events and '"done": 400, "total": 400' in events
        whole = table.read_bytes()
        assert whole.startswith(written[: written.rfind(b"\n") + 1])
        assert read_rows(table)["case"].nunique() == len(read_rows(table)) == 400
    finally:
        process.kill()
        process.wait(10)
        shutil.rmtree(big)
