"""The app under Ray Serve: the answers of one process, and what a lost replica, a crowd and an end cost who asks."""

import asyncio
import importlib.util
import io
import os
import threading
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import httpx
import psutil
import pytest
import yaml
from fastapi.testclient import TestClient
from nodes import free_port, wait_for
from PIL import Image

from raymed.config import UserError, from_dict
from raymed.serve.access.tokens import add_token
from raymed.serve.app import create_app
from raymed.serve.config import Access, Hardware, ServeConfig
from raymed.serve.engine import Engine
from raymed.serve.on_ray import ComeAgain, build

REPO = Path(__file__).resolve().parents[2]
_spec = importlib.util.spec_from_file_location("registry_fixtures", REPO / "tests" / "registry" / "conftest.py")
_registry = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_registry)
images, bundle = _registry.images, _registry.bundle

# Serve's proxies read it when they start, from the environment in which the session's cluster was started.
os.environ["RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"] = "raymed.serve.on_ray:around_proxy"
REPLICA = "ServeReplica:raymed:models"


@pytest.mark.parametrize("name", ["serve.yaml", "kuberay/serve/rayservice.yaml"])
def test_the_files_of_the_cluster_are_what_serve_and_raymed_expect(name):
    from ray.serve.schema import ServeDeploySchema

    told = yaml.safe_load((REPO / "cluster" / name).read_text())
    if name != "serve.yaml":
        assert (told["apiVersion"], told["kind"]) == ("ray.io/v1", "RayService")
        told = yaml.safe_load(told["spec"]["serveConfigV2"])
    (application,) = ServeDeploySchema.model_validate(told).applications
    config = from_dict(ServeConfig, application.args)
    assert application.import_path == "raymed.serve.on_ray:build" and not config.access.open
    (deployment,) = application.deployments
    assert deployment.name == "models" and deployment.graceful_shutdown_timeout_s > config.limits.timeout_s
    assert told["http_options"]["request_timeout_s"] > config.limits.timeout_s


def test_what_is_asked_for_reaches_serve():
    replicas = {"least": 0, "most": 3, "requests": 5, "idle_s": 60, "cpus": 2, "gpus": 0.25}
    app = build({"models": '["hsg=/some/folder"]', "replicas": replicas, "limits": {"queue": 7}})
    deployment = app._bound_deployment
    scaling = deployment._deployment_config.autoscaling_config
    assert (scaling.min_replicas, scaling.max_replicas, scaling.target_ongoing_requests) == (0, 3, 5)
    assert scaling.downscale_delay_s == 60
    options = deployment.ray_actor_options
    assert options["num_cpus"] == 2 and options["num_gpus"] == 0.25
    assert deployment.max_ongoing_requests == deployment.max_queued_requests == 7
    assert deployment.backpressure_config.status_code == 503 and deployment.backpressure_config.retry_after_s > 0


def test_a_replica_whose_device_has_failed_is_found_by_its_check():
    """Serve asks and awaits `check_health` by its name."""
    engine = Engine(Hardware(device="cpu", threads=1), 1)
    deployed = build({"models": ["hsg=/some/folder"], "limits": {"timeout_s": 0.2}})._bound_deployment.func_or_class
    replica = SimpleNamespace(app=SimpleNamespace(state=SimpleNamespace(service=SimpleNamespace(engine=engine))))
    asyncio.run(deployed.check_health(replica))
    engine.device = "cuda:99"
    with pytest.raises(Exception, match="(?i)cuda"):
        asyncio.run(deployed.check_health(replica))
    engine.device, go = "cpu", threading.Event()
    engine._thread.submit(go.wait, 10)
    with pytest.raises(TimeoutError):
        asyncio.run(deployed.check_health(replica))
    go.set()
    engine.close()


@pytest.mark.parametrize(
    ("args", "named"),
    [
        ({"access": {"open": True}}, "token"),
        ({"access": {"cert": "x", "key": "y"}}, "ssl_certfile"),
        ({"replicas": {"least": 2, "most": 1}}, "replicas.most"),
        ({"replicas": {"least": -1}}, "replicas.least"),
        ({"replica": {}}, "replica"),
    ],
)
def test_what_serve_decides_or_nobody_knows_is_refused(args, named):
    with pytest.raises(UserError, match=named):
        build({"models": ["hsg=/some/folder"]} | args)


def around(app):
    async def ask():
        transport = httpx.ASGITransport(ComeAgain(app), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            return await client.get("/")

    return asyncio.run(ask())


def test_who_is_not_answered_is_told_to_come_again():
    async def silent(scope, receive, send):
        pass

    async def failing(scope, receive, send):
        raise RuntimeError("broken")

    async def busy(scope, receive, send):
        await send({"type": "http.response.start", "status": 503, "headers": []})
        await send({"type": "http.response.body", "body": b"busy"})

    async def fine(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"fine"})

    for app in (silent, failing, busy):
        answer = around(app)
        assert answer.status_code == 503 and answer.headers["Retry-After"] == "2"
    assert around(fine).status_code == 200 and "Retry-After" not in around(fine).headers


@pytest.fixture(scope="module")
def deployed(ray_cluster, bundle, tmp_path_factory):
    """(address, headers with a token, folder of the bundle) of an application without a replica until somebody asks."""
    from ray import serve

    home, port = tmp_path_factory.mktemp("deployed"), free_port()
    folder, tokens = bundle.save(home / "bundle"), home / "tokens.json"
    headers = {"Authorization": f"Bearer {add_token(tokens, 'tests', 1)}"}
    args = {
        "models": [f"hsg={folder}"],
        "access": {"tokens": str(tokens)},
        "hardware": {"max_batch": 1},
        "limits": {"queue": 4, "per_minute": 100_000},
        "replicas": {"least": 0, "most": 1, "requests": 2},
        "storage": str(home),
    }
    serve.start(http_options={"host": "127.0.0.1", "port": port, "request_timeout_s": 60})
    serve.run(build(args), name="raymed", route_prefix="/")
    yield f"http://127.0.0.1:{port}", headers, folder
    serve.shutdown()


@pytest.fixture(scope="module")
def content(images) -> bytes:
    file = io.BytesIO()
    Image.fromarray(images[0]).save(file, "PNG")
    return file.getvalue()


def replicas() -> list[psutil.Process]:
    """Of this session's cluster."""
    return [child for child in psutil.Process().children(recursive=True) if _is_replica(child)]


def _is_replica(process: psutil.Process) -> bool:
    try:
        return REPLICA in " ".join(process.cmdline())
    except psutil.Error:  # it has just ended
        return False


def post(deployed, *contents, **fields):
    address, headers, _ = deployed
    files = [("file", ("x", content)) for content in contents]
    return httpx.post(f"{address}/v1/models/hsg:predict", files=files, data=fields, headers=headers, timeout=90)


@pytest.mark.ray
@pytest.mark.slow
def test_the_first_who_asks_starts_a_replica_that_answers_as_one_process_does(deployed, content):
    address, _, folder = deployed
    assert not replicas()
    found = post(deployed, content)
    assert found.status_code == 200 and len(replicas()) == 1
    hardware = Hardware(device="cpu", threads=1, max_batch=1)
    alone = ServeConfig(models=(f"hsg={folder}",), access=Access(open=True, hosts=("testserver",)), hardware=hardware)
    with TestClient(create_app(alone)) as client:
        assert found.json() == client.post("/v1/models/hsg:predict", files={"file": ("x", content)}).json()
    assert httpx.post(f"{address}/v1/models/hsg:predict", content=content).status_code == 401
    assert httpx.get(f"{address}/healthz").status_code == 200
    bad = post(deployed, b"no image")
    assert bad.status_code == 415 and bad.headers["content-type"] == "application/problem+json"


@pytest.mark.ray
@pytest.mark.slow
def test_a_replica_that_is_killed_under_load_costs_503_and_nothing_else(deployed, content):
    """More ask than there is room for: some are told to come again by Serve's queue, some by its proxy."""
    assert post(deployed, content).status_code == 200
    seen: Counter = Counter()
    ending, broken, (victim,) = threading.Event(), [], replicas()

    def ask():
        while not ending.is_set():
            started = time.monotonic()
            answer = post(deployed, content)
            seen[answer.status_code] += 1
            told = "Retry-After" in answer.headers or answer.status_code == 200
            if answer.status_code not in (200, 503) or not told or time.monotonic() - started > 60:
                broken.append((answer.status_code, answer.text))

    threads = [threading.Thread(target=ask) for _ in range(6)]
    for thread in threads:
        thread.start()
    try:
        wait_for(lambda: seen[200] > 20, 30, "answers before the kill")
        victim.kill()
        before = seen[200]
        wait_for(lambda: victim not in replicas() and seen[200] > before + 20, 60, "answers of another replica")
    finally:
        ending.set()
        for thread in threads:
            thread.join(90)
    assert broken == [] and seen[503] > 0
    assert post(deployed, content).status_code == 200


@pytest.mark.ray
@pytest.mark.slow
def test_an_application_that_ends_still_answers_what_it_has_begun(deployed, content):
    from ray import serve

    answers = []
    long = {"explain": "occlusion", "deletion": "1"}
    asking = threading.Thread(target=lambda: answers.append(post(deployed, *[content] * 4, **long)))
    assert post(deployed, content).status_code == 200
    asking.start()
    address, headers, _ = deployed
    wait_for(lambda: ongoing(address, headers), 20, "the request has begun")
    serve.delete("raymed")
    asking.join(60)
    assert answers[0].status_code == 200 and answers[0].json()["result"]["images"][0]["explanation"]["deletion"]
    assert not replicas()


def ongoing(address, headers) -> bool:
    """Whether something waits for a network, or for work in its thread."""
    text = httpx.get(f"{address}/metrics", headers=headers).text
    return 'raymed_queue_images{model="hsg"} 0.0' not in text
