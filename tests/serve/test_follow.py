"""Promotion and rollback under load, with a real MLflow, a real server, and clients that never stop."""

import http.client
import json
import signal
import subprocess
import sys
import threading
import urllib.request
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from registries import MLflow, register_two
from waiting import until

from raymed.registry.promote import promote, roll_back
from raymed.registry.store import version_of
from raymed.tracking import Outbox, Tracker, connect

REPO = Path(__file__).resolve().parents[2]
SECRET = "a secret of the webhook"
EVENTS = ["model_version_alias.created", "model_version_alias.deleted"]
MOVES, CLIENTS = 4, 3


@pytest.fixture(scope="module")
def mlflow(tmp_path_factory):
    server = MLflow(tmp_path_factory.mktemp("mlflow"))
    server.start()
    yield server
    server.kill()


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("home")
    (folder / "secret").write_text(SECRET)
    return folder


@pytest.fixture(scope="module")
def registry(mlflow, home, bundle):
    """A client; hsg has two versions there."""
    outbox = Outbox(home / "tracking.jsonl")
    outbox.open("tune-1/final", "final")
    outbox.close()
    with Tracker(mlflow.uri, "raymed", home) as tracker:
        tracker.follow(outbox.path)
    client = connect(mlflow.uri, home)
    register_two(client, bundle, home)
    return client


@contextmanager
def serving(uri: str, home: Path):
    """A server in a process of its own, which hears of promotions by the webhook alone; its address."""
    words = [sys.executable, "jobs/serve_models.py", "--models", "hsg=models:/hsg@champion", "--port", "0"]
    words += ["--access.open", "--tracking", uri, "--storage", str(home), "--follow.every-s", "3600"]
    words += ["--follow.secret", str(home / "secret"), "--hardware.device", "cpu", "--hardware.threads", "1"]
    with (home / "serve.log").open("a") as log:
        process = subprocess.Popen(words, cwd=REPO, stdout=subprocess.PIPE, stderr=log, text=True)
    try:
        assert process.stdout is not None
        line = next((line for line in process.stdout if line.startswith("serving on ")), "")
        assert line, (home / "serve.log").read_text()[-2000:]
        yield line.split()[-1]
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(60)


class Load:
    """Clients that send an image again and again, each on one connection."""

    def __init__(self, address: str, body: bytes):
        self.host, self.body = urlsplit(address).netloc, body
        self.answers: list[tuple[int, str]] = []
        self.over = threading.Event()
        self.threads = [threading.Thread(target=self._send) for _ in range(CLIENTS)]

    def __enter__(self):
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self.over.set()
        for thread in self.threads:
            thread.join()

    def _send(self):
        connection = http.client.HTTPConnection(self.host, timeout=60)
        while not self.over.is_set():
            try:
                connection.request("POST", "/v1/models/hsg:predict", self.body, {"Content-Type": "image/png"})
                response = connection.getresponse()
                found = json.loads(response.read())
                self.answers.append((response.status, found.get("version", "")))
            except (OSError, http.client.HTTPException, ValueError) as error:
                self.answers.append((0, repr(error)))
                return
        connection.close()

    def reaches(self, version: str) -> None:
        """Wait until a new version has answered often, and no other one among the last answers."""
        until(lambda: [found for _, found in self.answers[-20:]] == [version] * 20 or self.failed(), 60)

    def failed(self) -> list[tuple[int, str]]:
        return [answer for answer in self.answers if answer[0] != 200]


def state_of(address: str):
    with urllib.request.urlopen(f"{address}/statusz", timeout=20) as response:
        return json.load(response)["hsg"]


@pytest.mark.slow
def test_promotion_and_rollback_lose_no_request(mlflow, registry, home, png):
    with serving(mlflow.uri, home) as address:
        registry.create_webhook("raymed", f"{address}/admin/registry", EVENTS, secret=SECRET)
        with Load(address, png) as load:
            load.reaches("1")
            for _ in range(MOVES // 2):
                promote(registry, version_of(registry, "hsg", 2), "triage of HSG")
                load.reaches("2")
                roll_back(registry, "hsg", why="worse")
                load.reaches("1")
            mlflow.kill()
            sent = len(load.answers)
            until(lambda: len(load.answers) > sent + 50 or load.failed(), 60)
        state = state_of(address)
    changes = [a != b for (_, a), (_, b) in zip(load.answers, load.answers[1:], strict=False)]
    print(f"{len(load.answers)} answers, {sum(changes)} changes of version between answers that followed each other")
    assert load.failed() == [] and len(load.answers) > 200
    assert {version for _, version in load.answers} == {"1", "2"} and sum(changes) >= MOVES
    assert state["versions"] == {"champion": "1"} and "disk" not in state["from"]
    with serving(mlflow.uri, home) as address, Load(address, png) as load:
        load.reaches("1")
        state = state_of(address)
    assert load.failed() == [] and "disk" in state["from"]
    assert "MLflow does not answer" in state["refused"]["champion"]
