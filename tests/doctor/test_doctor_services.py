"""S3, MLflow and clocks, each with the fault that is to be found."""

import os
import re
import socket
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import psutil
import pytest
import requests

from raymed.config import UserError
from raymed.doctor.checks import CHECKS, clocks, storage, tracking
from raymed.doctor.place import Place
from raymed.doctor.runner import run

PASSWORD = "a-password-of-this-test"


def test_s3_takes_gives_and_forgets(s3):
    finding = storage.tried(Place(storage=s3.url))
    assert finding.level == "ok" and s3.endpoint.removeprefix("http://") in finding.found
    assert s3.keys() == []


@pytest.mark.parametrize(
    ("key", "secret", "said"),
    [
        ("raymed", "wrong", "refuses the secret key"),
        ("nobody", "raymed-secret", "does not know this access key"),
        ("reader", "reader-secret", "no permission for PutObject"),
    ],
)
def test_s3_keys_that_are_wrong(key, secret, said, s3, doctor):
    keys = {"AWS_ACCESS_KEY_ID": key, "AWS_SECRET_ACCESS_KEY": secret}
    code, found = doctor("--only", "storage", "--storage", s3.url, **keys)
    assert code == 1 and said in found["storage"]["found"] and found["storage"]["remedy"]
    assert s3.keys() == []


def test_s3_is_down(s3, doctor):
    code, found = doctor("--only", "storage", "--storage", s3.url, AWS_ENDPOINT_URL="http://127.0.0.1:9")
    assert code == 1 and "S3 does not answer" in found["storage"]["found"]
    assert "AWS_ENDPOINT_URL" in found["storage"]["remedy"]


def test_s3_is_frozen(s3):
    """The check ends all the same."""
    s3.pause()
    check = next(check for check in CHECKS if check.name == "storage")
    finding = run(replace(check, seconds=4), Place(storage=s3.url), os.environ)
    s3.resume()
    assert finding.level == "failure" and "no answer within 4 s" in finding.found and finding.seconds < 8


@pytest.fixture(scope="module")
def mlflow_server(tmp_path_factory) -> Iterator[str]:
    """A real MLflow server that asks for a password."""
    pytest.importorskip("flask_wtf", reason="MLflow asks for no password without mlflow[auth]")
    folder: Path = tmp_path_factory.mktemp("mlflow")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    (folder / "auth.ini").write_text(
        f"[mlflow]\ndefault_permission = READ\ndatabase_uri = sqlite:///{folder}/auth.db\nadmin_username = admin\n"
        f"admin_password = {PASSWORD}\nauthorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
    )
    words = [sys.executable, "-m", "mlflow", "server", "--host=127.0.0.1", f"--port={port}", "--workers=1"]
    words += [
        f"--backend-store-uri=sqlite:///{folder}/db",
        f"--artifacts-destination={folder}/a",
        "--app-name=basic-auth",
    ]
    own = {"MLFLOW_AUTH_CONFIG_PATH": str(folder / "auth.ini"), "MLFLOW_FLASK_SERVER_SECRET_KEY": "of this test"}
    own |= {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    with open(folder / "log", "w") as log:
        process = psutil.Popen(words, cwd=folder, env=os.environ | own, stdout=log, stderr=log)
    url, until = f"http://127.0.0.1:{port}", time.monotonic() + 120
    while not _answers(url):
        assert process.poll() is None and time.monotonic() < until, (folder / "log").read_text()
        time.sleep(0.2)
    yield url
    for child in [process, *process.children(recursive=True)]:
        child.kill()
    process.wait()


def _answers(url: str) -> bool:
    try:
        return requests.get(f"{url}/health", timeout=2).ok
    except requests.RequestException:
        return False


def test_mlflow_and_its_password(mlflow_server, doctor):
    named = {"MLFLOW_TRACKING_URI": mlflow_server, "MLFLOW_TRACKING_USERNAME": "admin"}
    code, found = doctor("--only", "MLflow", **named, MLFLOW_TRACKING_PASSWORD=PASSWORD)
    assert code == 0, found
    admin = ("admin", PASSWORD)
    runs = f"{mlflow_server}/api/2.0/mlflow/runs/search"
    name = {"experiment_name": tracking.EXPERIMENT}
    got = requests.get(f"{mlflow_server}/api/2.0/mlflow/experiments/get-by-name", name, auth=admin, timeout=20).json()
    query = {"experiment_ids": [got["experiment"]["experiment_id"]]}
    assert requests.post(runs, json=query, auth=admin, timeout=20).json() == {}, "no run is left"

    code, found = doctor("--only", "MLflow", **named, MLFLOW_TRACKING_PASSWORD="wrong")
    assert code == 1 and "MLFLOW_TRACKING_PASSWORD" in found["MLflow"]["remedy"], found
    code, found = doctor("--only", "MLflow", MLFLOW_TRACKING_URI=f"http://me:{PASSWORD}@127.0.0.1:9")
    assert code == 1 and "MLflow does not answer at http://127.0.0.1:9" in found["MLflow"]["found"], found
    assert PASSWORD not in str(found)


def test_a_store_without_a_server(tmp_path, monkeypatch):
    """Nothing is left where the command was given."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    finding = tracking.written(Place(storage=str(tmp_path / "storage")))
    assert finding.level == "ok", finding
    assert list((tmp_path / "here").iterdir()) == []
    assert not [path for path in (tmp_path / "storage/mlartifacts").rglob("*") if path.is_file()]


@pytest.fixture
def late_server(request) -> Iterator[str]:
    """A server whose clock is as many seconds off as the test says."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(403)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def date_time_string(self, timestamp=None):
            return formatdate(time.time() + request.param, usegmt=True)

        def log_message(self, format, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("late_server", "level", "said"),
    [
        (0, "ok", "within 5 s of S3"),
        (20, "warning", r"S3 is \d\d s ahead of this machine's"),
        (-1000, "failure", r"S3 is \d+ s behind this machine's"),
        (1000, "failure", r"S3 is \d+ s ahead of this machine's"),
    ],
    indirect=["late_server"],
)
def test_clocks_that_disagree(late_server, level, said):
    finding = clocks.of_services(Place(s3=late_server))
    assert finding.level == level and re.match(said, finding.found)
    assert ("NTP" in finding.remedy) is (level != "ok")


def test_a_service_without_a_time():
    finding = clocks.of_services(Place(mlflow="http://127.0.0.1:9"))
    assert finding.level == "ok" and "no time from MLflow" in finding.found


def test_a_bucket_that_is_not_there(s3):
    with pytest.raises(UserError, match="there is no bucket 'nowhere'"):
        storage.tried(Place(storage="s3://nowhere/x"))
