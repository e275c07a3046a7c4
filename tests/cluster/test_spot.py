"""The watcher of spot notices, against a local copy of each cloud's metadata service and a real Ray of two nodes."""

import json
import subprocess
import sys
import threading
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from nodes import Nodes, wait_for

from raymed.cluster.spot import Aws, Gcp, Notice, watch

ACTION = "/latest/meta-data/spot/instance-action"
REBALANCE = "/latest/meta-data/events/recommendations/rebalance"
PREEMPTED = "/computeMetadata/v1/instance/preempted"
MAINTENANCE = "/computeMetadata/v1/instance/maintenance-event"


class Metadata:
    """A metadata service. AWS: a token by PUT, and 401 without one that holds; GCP: the header or 403."""

    def __init__(self) -> None:
        self.documents: dict[str, str] = {}
        self.token, self.tokens = "", 0
        service = self

        class Handler(BaseHTTPRequestHandler):
            def do_PUT(self):
                allowed = self.path == "/latest/api/token" and self.headers["X-aws-ec2-metadata-token-ttl-seconds"]
                if allowed:
                    service.tokens += 1
                    service.token = f"token-{service.tokens}"
                self._answer(200 if allowed else 400, service.token)

            def do_GET(self):
                if self.path.startswith("/latest/") and self.headers["X-aws-ec2-metadata-token"] != service.token:
                    self._answer(401, "")
                elif self.path.startswith("/computeMetadata/") and self.headers["Metadata-Flavor"] != "Google":
                    self._answer(403, "")
                elif self.path in service.documents:
                    self._answer(200, service.documents[self.path])
                else:
                    self._answer(404, "")

            def _answer(self, status: int, text: str):
                self.send_response(status)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, format: str, *args: object):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.host = f"127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def metadata(monkeypatch):
    """A running one, where the watcher looks for it; a proxy that swallows everything is not asked."""
    service = Metadata()
    monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", f"http://{service.host}")
    monkeypatch.setenv("GCE_METADATA_HOST", service.host)
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("NO_PROXY", "")
    yield service
    service.stop()


def terminated_in(seconds: float) -> str:
    moment = datetime.now(UTC) + timedelta(seconds=seconds)
    return json.dumps({"action": "terminate", "time": moment.strftime("%Y-%m-%dT%H:%M:%SZ")})


def test_what_ec2_says(metadata):
    source = Aws()
    assert source.notice() is None
    metadata.documents[REBALANCE] = '{"noticeTime": "2030-01-01T00:00:00Z"}'
    assert source.notice() is None, "a recommendation is not a notice"
    early = Aws(rebalance=True).notice()
    assert early is not None and "rebalance" in early.reason and early.seconds > 120

    metadata.documents[ACTION] = terminated_in(120)
    notice = source.notice()
    assert notice is not None and notice.reason == "spot: terminate" and 110 <= notice.seconds <= 120
    metadata.documents[ACTION] = terminated_in(-5)
    assert (late := source.notice()) is not None and late.seconds == 0


def test_a_token_of_ec2_that_has_run_out_is_exchanged(metadata):
    source = Aws()
    source.notice()
    source.notice()
    assert metadata.tokens == 1
    metadata.token = "another"
    assert source.notice() is None
    assert metadata.tokens == 2


def test_what_compute_engine_says(metadata):
    metadata.documents |= {PREEMPTED: "FALSE", MAINTENANCE: "MIGRATE_ON_HOST_MAINTENANCE"}
    source = Gcp()
    assert source.notice() is None, "a machine that moves while it runs needs no draining"
    metadata.documents[MAINTENANCE] = "TERMINATE_ON_HOST_MAINTENANCE"
    maintenance = source.notice()
    assert maintenance is not None and maintenance.seconds > 1800
    metadata.documents[PREEMPTED] = "TRUE"
    preempted = source.notice()
    assert preempted is not None and "preempted" in preempted.reason and preempted.seconds <= 30


def test_it_asks_and_drains_again_where_that_failed(metadata, capsys):
    """Silence, nonsense and a Ray that does not listen are told once each, and outlived."""
    metadata.documents[ACTION] = "not JSON"
    told: list[Notice] = []

    def drain(notice: Notice) -> bool:
        told.append(notice)
        return len(told) == 3

    watcher = threading.Thread(target=watch, args=(Aws(), drain, 0.01))
    watcher.start()
    wait_for(lambda: metadata.tokens, 10, "the first question")
    assert not told
    metadata.documents[ACTION] = terminated_in(120)
    watcher.join(20)
    assert not watcher.is_alive() and len(told) == 3
    said = capsys.readouterr().err
    assert said.count("do not answer") == 1 and said.count("trying again") == 1


WORK = """
import json, sys, time, ray
ray.init(logging_level="ERROR", log_to_driver=False)

@ray.remote(num_cpus=1, max_retries=-1)
def where():
    time.sleep(0.2)
    return ray.get_runtime_context().get_node_id()

while True:
    print(json.dumps(sorted(set(ray.get([where.remote() for _ in range(4)])))), flush=True)
"""


@pytest.mark.ray
@pytest.mark.slow
def test_a_notice_ends_the_node_and_its_work_goes_to_the_other(tmp_path, metadata):
    script = tmp_path / "work.py"
    script.write_text(WORK)
    with Nodes(tmp_path / "cluster") as nodes:
        nodes.add_node()
        [leaving] = [n["NodeID"] for n in nodes.alive() if "node:__internal_head__" not in n["Resources"]]
        driver = nodes.driver(script)
        wait_for(lambda: leaving in driver.said(), 60, f"work on both nodes\n{driver.said()}")

        words = [sys.executable, "-m", "raymed.cluster.spot", "--cloud", "aws", "--poll-s", "0.1"]
        words += ["--node-id", leaving, "--address", nodes.address]
        environment = nodes.environment | {"AWS_EC2_METADATA_SERVICE_ENDPOINT": f"http://{metadata.host}"}
        watcher = subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        try:
            wait_for(lambda: metadata.tokens, 60, "the first question")
            assert watcher.poll() is None and len(nodes.alive()) == 2, "no notice, nothing drained"
            metadata.documents[ACTION] = terminated_in(60)
            said, _ = watcher.communicate(timeout=60)
        finally:
            watcher.kill()
        assert watcher.returncode == 0, said
        assert f"node {leaving} is being drained (spot: terminate)" in said

        wait_for(lambda: len(nodes.alive()) == 1, 60, "the drained node goes")
        before = driver.said().count("\n")
        wait_for(lambda: driver.said().count("\n") >= before + 3, 60, "work goes on")
        assert leaving not in driver.said().splitlines()[-1]
        assert driver.process.poll() is None


@pytest.mark.ray
@pytest.mark.slow
def test_the_watcher_finds_its_own_node(tmp_path, metadata):
    """The only one with this machine's address."""
    metadata.documents[PREEMPTED] = "TRUE"
    with Nodes(tmp_path / "cluster") as nodes:
        [only] = [n["NodeID"] for n in nodes.alive()]
        words = [sys.executable, "-m", "raymed.cluster.spot", "--cloud", "gcp", "--poll-s", "0.1"]
        environment = nodes.environment | {"GCE_METADATA_HOST": metadata.host}
        done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=120)
        assert f"watching for notices of gcp for node {only} of" in done.stdout, done.stdout + done.stderr
        assert done.returncode == 0 and f"node {only} is being drained (spot: preempted)" in done.stdout


def test_no_ray_at_that_address(tmp_path):
    words = [sys.executable, "-m", "raymed.cluster.spot", "--address", "127.0.0.1:9"]
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    done = subprocess.run(words, capture_output=True, text=True, timeout=100, env=environment)
    assert done.returncode == 2 and "no Ray answers at 127.0.0.1:9" in done.stderr, done.stdout + done.stderr
