"""A cluster on this machine, really up: who is let in, what a job finds, what status tells, nothing left at the end.

The last tests kill its head and take it down, so their order matters.
"""

import importlib.util
import io
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
import yaml
from local_up import REPO, check_gone, command, needs_programs, own_ports, run_job, tree, wait_for
from PIL import Image

from raymed.cluster import ports, state
from raymed.cluster.providers import local
from raymed.cluster.services import Silent, mlflow, ray, s3
from raymed.config import UserError
from raymed.serve.access.tokens import add_token
from raymed.storage import server

pytestmark = [pytest.mark.ray, pytest.mark.slow, needs_programs]

_spec = importlib.util.spec_from_file_location("registry_fixtures", REPO / "tests" / "registry" / "conftest.py")
assert _spec and _spec.loader
_registry = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_registry)
images, bundle = _registry.images, _registry.bundle

JOB = """
import json, os, sys
import ray
from raymed.storage import locations, resolve_storage
from raymed.train.places.cluster import DRIVER, connected

with connected():
    @ray.remote(num_cpus=1)
    def where():
        return ray.get_runtime_context().get_node_id(), os.environ["RAYMED_LOCAL"], os.environ["AWS_ENDPOINT_URL"]
    workers = [ray.get(where.remote()) for _ in range(3)]
    nodes = {node["NodeName"]: node for node in ray.nodes() if node["Alive"]}

import mlflow
mlflow.set_experiment("job")
with mlflow.start_run():
    mlflow.log_metric("seen", 1)
    mlflow.log_text("words", "artifact.txt")
locations.write_bytes("s3://raymed/job/said", b"hello")
names = ("RAYMED_HOME", "RAYMED_LOCAL", "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH", "PATH")
print("FOUND " + json.dumps({
    "python": sys.executable, "storage": str(resolve_storage()), "workers": workers,
    "ids": {name: node["NodeID"] for name, node in nodes.items()},
    "resources": {name: node["Resources"] for name, node in nodes.items()},
    **{name: os.environ[name] for name in names},
}))
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAYMED_CLUSTER", str(tmp_path_factory.mktemp("local") / "cluster"))
        patch.setenv("MLFLOW_TRACKING_URI", "http://another.example")  # the user's own, which is not for the cluster
        up = local.up(own_ports())
        yield up
        local.down(up)


@pytest.fixture(scope="module")
def seen(cluster, tmp_path_factory):
    """What a job has found."""
    script = tmp_path_factory.mktemp("job") / "job.py"
    script.write_text(JOB)
    said = run_job(cluster, script)
    return json.loads(said.split("FOUND ")[1].splitlines()[0])


@pytest.fixture(scope="module")
def served(cluster, bundle, tmp_path_factory):
    """Headers with a token for raymed's app, deployed by the project's own file with a model and a port of its own."""
    home, told = tmp_path_factory.mktemp("served"), yaml.safe_load((REPO / "cluster/serve.yaml").read_text())
    token = add_token(home / "tokens.json", "tests", 1)
    (application,) = told["applications"]
    access = {"tokens": str(home / "tokens.json")}
    application["args"] = {"models": [f"hsg={bundle.save(home / 'bundle')}"], "access": access, "storage": str(home)}
    application["deployments"][0]["ray_actor_options"]["num_cpus"] = 0
    told["http_options"]["port"] = cluster.facts["ports"]["serve"]
    (home / "serve.yaml").write_text(yaml.safe_dump(told))
    words = [Path(sys.executable).with_name("serve"), "deploy", "--address", cluster.addresses["dashboard"]]
    environment = os.environ | cluster.environment
    done = subprocess.run([*words, home / "serve.yaml"], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    wait_for(lambda: _is_ready(cluster.addresses["serve"]), 120, "the app answers")
    return {"Authorization": f"Bearer {token}"}


def _is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/healthz", trust_env=False, timeout=30).status_code == 200
    except httpx.HTTPError:
        return False


def test_every_part_is_up(cluster):
    lines = {line.name: line for line in local.status(cluster)}
    assert all(line.is_up for line in lines.values())
    assert {"s3", "mlflow", "head", "worker-1", "serve"} <= set(lines)
    assert f"{os.cpu_count()} CPUs" in lines["worker-1"].detail
    assert local.up(local.Config()) == cluster == state.load()


def test_every_port_is_listed(cluster):
    """As `ss` sees them."""
    shown = subprocess.run(["ss", "-ltnpH"], capture_output=True, text=True, check=True).stdout
    pids = tree(cluster)
    listening = set()
    for line in shown.splitlines():
        if {int(pid) for pid in re.findall(r"pid=(\d+)", line)} & set(pids):
            listening.add(int(line.split()[3].rpartition(":")[2]))
    details = " ".join(line.detail for line in local.status(cluster) if line.name.startswith("port of"))
    assert len(listening) > 15 and listening <= {int(port) for port in re.findall(r":(\d+)\b", details)}


def test_nobody_gets_in_without_token_or_password(cluster):
    at = cluster.addresses
    for path in ("api/version", "api/jobs/", "api/v0/nodes", "nodes?view=summary", "api/serve/applications/"):
        assert httpx.get(f"{at['dashboard']}/{path}", trust_env=False).status_code == 401
    submitted = httpx.post(f"{at['dashboard']}/api/jobs/", json={"entrypoint": "touch /tmp/x"}, trust_env=False)
    assert submitted.status_code == 401
    for path in ("", "api/2.0/mlflow/experiments/search?max_results=1", "ajax-api/2.0/mlflow/runs/search", "graphql"):
        assert httpx.get(f"{at['mlflow']}/{path}", trust_env=False).status_code in (401, 405), path
    guessed = httpx.get(f"{at['mlflow']}/", auth=("raymed", "password1234"), trust_env=False)
    assert guessed.status_code == 401
    assert httpx.get(f"{at['s3']}/{s3.BUCKET}", trust_env=False).status_code == 403
    wrong = cluster.environment | {"AWS_SECRET_ACCESS_KEY": "x" * 40, "MLFLOW_TRACKING_PASSWORD": "x"}
    with pytest.raises(Silent, match="takes no object"):
        s3.ask(wrong)
    with pytest.raises(Silent, match="401"):
        mlflow.ask(wrong)


def test_a_wrong_token_is_refused(cluster, tmp_path):
    (tmp_path / "token").write_text("0" * 64)
    wrong = cluster.environment | {"RAY_AUTH_TOKEN_PATH": str(tmp_path / "token")}
    with pytest.raises(Silent, match="40[13]"):
        ray.ask_dashboard(cluster.addresses["dashboard"], wrong)


METHODS = (
    "NodeInfoGcsService/GetAllNodeInfo",
    "NodeManagerService/GetNodeStats",
    "ObjectManagerService/Pull",
    "ReporterService/HealthCheck",
    "CoreWorkerService/GetCoreWorkerStats",
    "RayletDriver/ListNamedActors",
)


def test_every_internal_port_demands_the_token(cluster):
    """Those of Ray that speak gRPC: GCS, client server, raylets, agents. The others are HTTP: agents, metrics."""
    grpc = pytest.importorskip("grpc")
    known = cluster.facts["ports"]
    refusing, metrics = 0, {port for name, port in known.items() if name.startswith("metrics")}
    for pid, places in ports.listening(tree(cluster)).items():
        if pid in (p.pid for p in cluster.processes if p.name in ("s3", "mlflow")):
            continue
        for place in places:
            port = int(place.rpartition(":")[2])
            codes = set()
            with grpc.insecure_channel(place) as channel:
                for method in METHODS:
                    with pytest.raises(grpc.RpcError) as refused:
                        channel.unary_unary(f"/ray.rpc.{method}")(b"", timeout=5)
                    codes.add(refused.value.code())
            if codes <= {grpc.StatusCode.UNAVAILABLE}:
                assert port in metrics or port in (known["dashboard"], known["mlflow"]) or _http_refuses(place), place
            else:
                assert grpc.StatusCode.UNAUTHENTICATED in codes, place
                refusing += 1
    assert refusing >= 8  # GCS, client server, and a raylet's two and an agent's one on each of two nodes


def _http_refuses(place: str) -> bool:
    return httpx.get(f"http://{place}/api/job_agent/jobs/", trust_env=False).status_code == 401


def test_ray_itself_lets_nobody_in_without_the_token(cluster):
    code = "import os, sys, ray; ray.init(sys.argv[1]); print('in', len(ray.nodes()))"
    for address in (cluster.addresses["ray"], f"ray://127.0.0.1:{cluster.facts['ports']['client']}"):
        for own, gets_in in ({"RAY_AUTH_MODE": "disabled"}, False), (cluster.environment, True):
            kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
            done = subprocess.run(
                ["timeout", "90", sys.executable, "-c", code, address],
                env=kept | own | {"RAY_ADDRESS": address},
                capture_output=True,
                text=True,
            )
            assert ("in 2" in done.stdout) is gets_in, done.stdout + done.stderr


def test_a_job_finds_storage_tracking_and_this_interpreter(cluster, seen):
    assert seen["RAYMED_HOME"] == "s3://raymed"
    assert seen["storage"].startswith(f"{state.folder()}/local/s3/raymed")
    assert seen["PATH"].split(":")[0] == str(Path(sys.executable).parent) == str(Path(seen["python"]).parent)
    assert seen["RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"] == "raymed.serve.on_ray:around_proxy"
    client = server.client_of(cluster.environment)
    assert client.get_object(Bucket=s3.BUCKET, Key="job/said")["Body"].read() == b"hello"
    user = (cluster.environment["MLFLOW_TRACKING_USERNAME"], cluster.environment["MLFLOW_TRACKING_PASSWORD"])
    url = f"{cluster.addresses['mlflow']}/api/2.0/mlflow/experiments/get-by-name"
    found = httpx.get(url, params={"experiment_name": "job"}, auth=user, trust_env=False)
    assert found.json()["experiment"]["name"] == "job"
    assert "words" in "".join(p.read_text() for p in state.folder().glob("data/mlflow/artifacts/**/artifact.txt"))


def test_drivers_have_the_head_and_work_has_the_worker(cluster, seen):
    head, worker = seen["resources"]["head"], seen["resources"]["worker-1"]
    assert head.get("CPU", 0) == 0 and head["raymed_driver"] == 1000
    assert worker["CPU"] == os.cpu_count() and "raymed_driver" not in worker
    assert {node for node, *_ in seen["workers"]} == {seen["ids"]["worker-1"]}
    assert {tuple(rest) for _, *rest in seen["workers"]} == {(seen["RAYMED_LOCAL"], cluster.addresses["s3"])}


def test_no_secret_is_in_a_command_line_a_log_or_an_open_file(cluster, seen):
    environment = cluster.environment
    secrets = [environment[name] for name in ("MLFLOW_TRACKING_PASSWORD", "AWS_SECRET_ACCESS_KEY")]
    secrets.append(Path(environment["RAY_AUTH_TOKEN_PATH"]).read_text())
    shown = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    logs = "".join(read() for read in local.logs(cluster).values())
    assert not [secret for secret in secrets if secret in shown or secret in logs]
    for path in [p for p in state.folder().rglob("*") if p.is_file() and p.stat().st_mode & 0o077]:
        content = path.read_bytes()
        assert not [secret for secret in secrets if secret.encode() in content], path


def test_serve_answers_where_its_address_says_and_wants_a_token(cluster, served, images):
    file, url = io.BytesIO(), f"{cluster.addresses['serve']}/v1/models/hsg:predict"
    Image.fromarray(images[0]).save(file, "PNG")
    for headers, status in ({}, 401), ({"Authorization": "Bearer guessed"}, 401), (served, 200):
        files = {"file": ("x", file.getvalue())}
        assert httpx.post(url, files=files, headers=headers, trust_env=False, timeout=60).status_code == status
    assert httpx.get(f"{cluster.addresses['serve']}/v1/models", trust_env=False).status_code == 401
    lines = {line.name: line for line in local.status(cluster)}
    assert lines["serve"].is_up and lines["serve"].detail == cluster.addresses["serve"]


def test_what_people_use_listens_on_this_machine_only(cluster, served):
    at = {place for places in ports.listening(tree(cluster)).values() for place in places}
    for name in ("dashboard", "mlflow", "s3", "serve"):
        own = {place for place in at if place.endswith(f":{cluster.facts['ports'][name]}")}
        assert own == {cluster.addresses[name].removeprefix("http://")}


def test_logs_are_those_of_every_part(cluster):
    logs = local.logs(cluster)
    assert {"s3", "mlflow", "head", "worker-1", "gcs_server.out"} <= set(logs) and logs["gcs_server.out"]()
    assert "Ray runtime started" in Path(state.folder(), "logs", "head.log").read_text()


def test_a_port_that_is_asked_for_and_taken_stops_another_cluster_before_it_starts(cluster, tmp_path):
    taken = cluster.facts["ports"]["mlflow"]
    attempt = f"try: local.up(local.Config(mlflow_port={taken}))"
    code = f"{attempt}\nexcept Exception as error: print(type(error).__name__, error)"
    said, _ = command(tmp_path, code).communicate(timeout=60)
    assert f"UserError --mlflow-port {taken} is taken by" in said
    assert not (tmp_path / state.FILE).exists()


def test_a_dead_head_is_told_and_down_leaves_nothing(cluster):
    head = next(p for p in cluster.processes if p.name == "head")
    before = tree(cluster)
    gcs = next(p for p in before.values() if p.name() == "gcs_server")
    gcs.kill()
    wait_for(lambda: not local.processes.running(head), 60, "the head ends with its GCS")
    lines = {line.name: line for line in local.status(cluster)}
    assert not lines["head"].is_up and "has ended" in lines["head"].detail and "cluster-down" in lines["head"].detail
    assert not lines["worker-1"].is_up and lines["mlflow"].is_up and lines["s3"].is_up
    with pytest.raises(UserError, match="not all of it(.|\n)*head: (.|\n)*cluster-down"):
        local.up(local.Config())
    local.down(cluster)
    check_gone(before, cluster)
    assert state.load() is None and (state.folder() / "data" / "mlflow" / "mlflow.db").is_file()
    local.down(cluster)
    with socket.create_server(("127.0.0.1", cluster.facts["ports"]["mlflow"])):
        pass  # what it listened on is free again
