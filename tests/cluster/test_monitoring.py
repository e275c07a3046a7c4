"""What Prometheus and Grafana are given: the board is whole, and a real Prometheus finds data for every query of it."""

import io
import json
import os
import re
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
import yaml
from bright_bundle import bright_bundle
from PIL import Image

from raymed.cluster import ports, processes, state
from raymed.cluster.autoscaled import Autoscaled
from raymed.cluster.monitoring import SOURCE, TOKEN, Monitoring, write
from raymed.cluster.providers import kuberay
from raymed.cluster.state import Cluster
from raymed.config import UserError
from raymed.storage import write_private

REPO = Path(__file__).resolve().parents[2]
BOARD = json.loads((SOURCE / "boards" / "raymed.json").read_text())
GPUS = re.compile(r"ray_node_g|Name=\"GPU\"")
"""Of queries whose data are there where a node has a GPU."""
SMALL = (
    "--data.preprocess.size=32 --supcon.batch-size=32 --supcon.steps=12 --supcon.evaluations=2 --supcon.accumulate=1 "
    "--head.batch-size=32 --head.steps=40 --head.evaluations=8 --sweep.no-batched --sweep.num-trials=8 "
    "--compute.threads=1 --name=watched"
).split()


def queries() -> Iterator[tuple[str, str]]:
    """(panel, query) of the board."""
    for panel in BOARD["panels"]:
        for target in panel.get("targets", ()):
            yield panel["title"], target["expr"]


def filled(query: str) -> str:
    """A query as Grafana sends it, for all runs and models."""
    return query.replace("$run", ".*").replace("$model", ".*").replace("$__rate_interval", "5m")


def program(name: str) -> str:
    """Of Prometheus; the test is skipped where it is missing."""
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"no {name} on the PATH: apt install prometheus")
    return found


@pytest.fixture
def cluster(tmp_path):
    """What is remembered of one that is up."""
    write_private(tmp_path / "token", "ray")
    addresses = {"dashboard": "http://127.0.0.1:7265", "serve": "http://127.0.0.1:7000"}
    return Cluster("local", addresses, {"RAY_AUTH_TOKEN_PATH": str(tmp_path / "token")})


def test_the_board_is_whole():
    panels, source = BOARD["panels"], yaml.safe_load((SOURCE / "grafana/datasources/raymed.yaml").read_text())
    assert {panel["datasource"]["uid"] for panel in panels if panel["type"] != "row"} == {
        source["datasources"][0]["uid"]
    }
    ids = [panel["id"] for panel in panels]
    assert len(set(ids)) == len(ids) > 15
    taken = set()
    for panel in panels:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert at["x"] + at["w"] <= 24 and not cells & taken, panel["title"]
        taken |= cells
        refs = [target["refId"] for target in panel.get("targets", ())]
        assert len(set(refs)) == len(refs) and (refs or panel["type"] == "row")
    names = {variable["name"] for variable in BOARD["templating"]["list"]} | {"__rate_interval"}
    assert {name for _, query in queries() for name in re.findall(r"\$(\w+)", query)} == names


def test_the_folder_is_of_this_cluster(cluster, tmp_path, monkeypatch):
    monkeypatch.setenv(TOKEN, "of the server")
    folder = tmp_path / "monitoring"
    commands = write(Monitoring(folder, "http://127.0.0.1:7000", prometheus_port=7090), cluster)
    ray, serve = yaml.safe_load((folder / "prometheus.yml").read_text())["scrape_configs"]
    [discovery] = ray["http_sd_configs"]
    assert discovery["url"] == "http://127.0.0.1:7265/api/prometheus/sd"
    assert discovery["authorization"] == {"type": "Bearer", "credentials_file": str(tmp_path / "token")}
    assert serve["static_configs"] == [{"targets": ["127.0.0.1:7000"]}] and serve["scheme"] == "http"
    assert (folder / "serve.token").read_text() == "of the server"
    assert (folder / "serve.token").stat().st_mode & 0o777 == 0o600
    [source] = yaml.safe_load((folder / "grafana/datasources/raymed.yaml").read_text())["datasources"]
    [boards] = yaml.safe_load((folder / "grafana/dashboards/raymed.yaml").read_text())["providers"]
    assert source["url"] == "http://127.0.0.1:7090" and boards["options"]["path"] == str(folder / "boards")
    assert "--web.listen-address=127.0.0.1:7090" in commands[0] and "GF_SERVER_HTTP_ADDR=127.0.0.1" in commands[1]

    monkeypatch.delenv(TOKEN)
    write(Monitoring(folder, "https://models.example"), cluster)
    assert (folder / "serve.token").read_text() == "of the server"


def test_models_on_ray_serve_are_asked_of_ray_alone(cluster, tmp_path):
    """Its proxy is no target: any replica would answer, and one would be started to do so."""
    write(Monitoring(tmp_path / "monitoring"), cluster)
    text = (tmp_path / "monitoring" / "prometheus.yml").read_text()
    [ray] = yaml.safe_load(text)["scrape_configs"]
    assert ray["job_name"] == "ray" and "7000" not in text
    [renamed] = [each for each in ray["metric_relabel_configs"] if each.get("target_label") == "__name__"]
    told = re.fullmatch(renamed["regex"], "ray_raymed_serve_stage_seconds_bucket")
    assert told and renamed["replacement"].replace("$1", told[1]) == "raymed_stage_seconds_bucket"
    assert not re.fullmatch(renamed["regex"], "ray_raymed_runs"), "of trainings"


def test_what_cannot_be_is_refused(cluster, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file.* cannot be written \(.*\): give another folder"):
        write(Monitoring(tmp_path / "file"), cluster)
    with pytest.raises(UserError, match="has no dashboard here"):
        write(Monitoring(tmp_path / "new"), Cluster("onprem"))
    with pytest.raises(UserError, match="prometheus_port must be"):
        Monitoring(tmp_path, prometheus_port=0)
    with pytest.raises(UserError, match="server: an address such as"):
        Monitoring(tmp_path, "127.0.0.1:8000")
    monkeypatch.setenv("RAYMED_CLUSTER", str(tmp_path / "none"))
    words = [sys.executable, "-m", "raymed.cluster.monitoring", str(tmp_path / "new")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "error: no cluster is up" in done.stderr


@pytest.mark.parametrize(
    ("provider", "facts", "said"),
    [
        ("aws", {}, "start Prometheus on the head"),
        ("gcp", {}, "start Prometheus on the head"),
        ("kuberay", {}, "start Prometheus in a pod of its namespace"),
        ("local", {"isolated": True}, "bring it up without --isolated"),
    ],
)
def test_nodes_that_are_not_reached_from_here(cluster, tmp_path, provider, facts, said):
    with pytest.raises(UserError, match=rf"would not reach the nodes of this cluster \({provider}\): .*{said}"):
        write(Monitoring(tmp_path / "new"), replace(cluster, provider=provider, facts=facts))
    assert not (tmp_path / "new").exists()


def test_what_is_said_of_a_head_and_of_kubernetes_is_so():
    [ray, _] = yaml.safe_load((SOURCE / "prometheus.yml").read_text())["scrape_configs"]
    [discovery] = ray["http_sd_configs"]
    assert discovery["url"].startswith("http://127.0.0.1:8265/")
    assert discovery["authorization"]["credentials_file"] == "ray.token"
    machines = SOURCE.parent / "aws.yaml", SOURCE.parent / "gcp.yaml"
    assert all('"~/.ray/auth_token": "<token>"' in path.read_text() for path in machines)
    assert kuberay._FAR["dashboard"] == ("service/raymed-head-svc", 8265)


@pytest.mark.parametrize("facts", [{}, {"isolated": False}])
def test_nodes_that_are(cluster, tmp_path, facts):
    for provider in ("local", "onprem"):
        assert write(Monitoring(tmp_path / provider), replace(cluster, provider=provider, facts=facts))


def test_prometheus_takes_its_file(cluster, tmp_path):
    promtool = program("promtool")
    write(Monitoring(tmp_path / "monitoring", "http://127.0.0.1:7000"), cluster)
    words = [promtool, "check", "config", str(tmp_path / "monitoring" / "prometheus.yml")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "is valid" in done.stdout, done.stdout + done.stderr


@pytest.mark.ray
@pytest.mark.slow
def test_every_query_of_the_board_finds_data(tmp_path, monkeypatch):
    """A sweep, on a cluster that grows for it, and a server that is asked, with tokens, as Prometheus sees them."""
    program("prometheus")
    monkeypatch.setenv("RAYMED_CLUSTER", str(tmp_path / "state"))
    monkeypatch.setenv(TOKEN, secrets.token_hex(32))
    started = []
    with Autoscaled(tmp_path / "cluster", dashboard=True, idle_seconds=60) as cluster:
        try:
            serve = f"http://127.0.0.1:{ports.choose('', 0, [])}"
            started += [_server(tmp_path, serve), _sweep(tmp_path, cluster)]
            environment = {"RAY_AUTH_TOKEN_PATH": cluster.environment["RAY_AUTH_TOKEN_PATH"]}
            state.save(Cluster("local", {"dashboard": cluster.dashboard_url}, environment))
            prometheus, url = _prometheus(tmp_path, serve)
            started.append(prometheus)
            missing = {query: title for title, query in queries() if not GPUS.search(query)}
            sweep, lasts = started[1], True
            while missing and lasts:
                lasts = processes.running(sweep) is not None
                _ask_the_server(serve)
                missing = {query: title for query, title in missing.items() if not _found(url, query)}
                time.sleep(0.5)
            targets = httpx.get(f"{url}/api/v1/targets").json()["data"]["activeTargets"]
            unwell = [target for target in targets if target["health"] != "up"]
            assert not missing, (missing, unwell, processes.last_lines(tmp_path / "sweep.log"))
            runs = _found(url, 'sum by (status) (ray_raymed_runs{kind="trial",run="watched"})')
            assert sum(float(series["value"][1]) for series in runs) > 0
        finally:
            processes.end(started, "")


def _server(folder: Path, url: str) -> state.Process:
    """A server of a model whose weights are set by hand, ready, that wants a token."""
    bright_bundle().save(folder / "bundle")
    words = [sys.executable, str(REPO / "jobs" / "serve_models.py"), "--models", f"hsg={folder / 'bundle'}"]
    words += ["--port", url.rpartition(":")[2], "--hardware.device", "cpu"]
    server = processes.start("server", words, os.environ | {"RAYMED_HOME": str(folder)}, folder / "server.log")
    _until(lambda: httpx.get(f"{url}/readyz").status_code == 200, server, folder / "server.log")
    assert httpx.get(f"{url}/metrics").status_code == 401
    return server


def _ask_the_server(url: str) -> None:
    image = io.BytesIO()
    Image.linear_gradient("L").save(image, "PNG")
    bearer = {"Authorization": f"Bearer {os.environ[TOKEN]}"}
    done = httpx.post(f"{url}/v1/models/hsg:predict", content=image.getvalue(), headers=bearer, timeout=60)
    assert done.status_code == 200, done.text


def _sweep(folder: Path, cluster: Autoscaled) -> state.Process:
    words = [sys.executable, str(REPO / "jobs" / "tune_asl.py"), *SMALL]
    return processes.start("sweep", words, cluster.environment, folder / "sweep.log", REPO)


def _prometheus(folder: Path, serve: str) -> tuple[state.Process, str]:
    """Started by the command that is told, but asking more often; and its address."""
    port = ports.choose("", 0, [])
    words = [sys.executable, "-m", "raymed.cluster.monitoring", "monitoring", "--server", serve]
    words += [f"--prometheus-port={port}"]
    said = subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=120, check=True).stdout
    path = folder / "monitoring" / "prometheus.yml"
    path.write_text(path.read_text().replace("15s", "2s").replace("scrape_timeout: 10s", "scrape_timeout: 2s"))
    [command] = [line for line in said.splitlines() if line.startswith("prometheus ")]
    url = f"http://127.0.0.1:{port}"
    server = processes.start("prometheus", command.split(), os.environ, folder / "prometheus.log")
    _until(lambda: httpx.get(f"{url}/-/ready").status_code == 200, server, folder / "prometheus.log")
    return server, url


def _until(ready, process: state.Process, log: Path) -> None:
    until = time.monotonic() + 120
    while True:
        try:
            if ready():
                return
        except httpx.HTTPError:
            assert processes.running(process) and time.monotonic() < until, log.read_text()
        time.sleep(0.1)


def _found(url: str, query: str) -> list[dict]:
    """The series of a query that have a value now, other than NaN."""
    answer = httpx.get(f"{url}/api/v1/query", params={"query": filled(query)}, timeout=30).json()
    assert answer["status"] == "success", (query, answer)
    return [series for series in answer["data"]["result"] if series["value"][1] != "NaN"]
