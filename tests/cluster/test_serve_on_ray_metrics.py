"""The figures of replicas under Ray Serve: each apart, as Prometheus reads them of Ray, without a request to any."""

import io
from collections import Counter

import httpx
import numpy as np
import pytest
from bright_bundle import bright_bundle
from nodes import free_port, wait_for
from PIL import Image
from prometheus_client import CollectorRegistry
from prometheus_client import Counter as Counted
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.parser import text_string_to_metric_families

from raymed.serve.access.tokens import add_token
from raymed.serve.on_ray import build
from raymed.serve.on_ray_metrics import Mirror

PREFIX = "ray_raymed_serve_"


class Versions:
    """A collector of what comes and goes."""

    def __init__(self):
        self.used = ["1"]

    def collect(self):
        family = GaugeMetricFamily("raymed_model_info", "", labels=["version"])
        for version in self.used:
            family.add_metric([version], 1)
        yield family


def test_all_that_a_registry_holds_is_told_and_what_has_gone_is_nought(monkeypatch):
    told = {}

    class Gauge:
        def __init__(self, name):
            self.name = name

        def set(self, value, tags):
            told[self.name, tuple(sorted(tags.items()))] = value

    monkeypatch.setattr(Mirror, "_gauge", lambda self, name, labels: Gauge(name))
    registry, versions = CollectorRegistry(), Versions()
    registry.register(versions)
    counter = Counted("raymed_decisions", "", ["decision"], registry=registry)
    mirror = Mirror(registry, "r1")
    counter.labels("abstain").inc(2)
    mirror.show()
    counter.labels("abstain").inc()
    versions.used = ["2"]
    mirror.show()
    assert told == {
        ("raymed_decisions_total", (("decision", "abstain"), ("replica", "r1"))): 3,
        ("raymed_model_info", (("replica", "r1"), ("version", "1"))): 0,
        ("raymed_model_info", (("replica", "r1"), ("version", "2"))): 1,
    }


@pytest.fixture
def two_replicas(ray_cluster, tmp_path):
    """(address, headers with a token) of an application of two replicas."""
    from ray import serve

    port, tokens = free_port(), tmp_path / "tokens.json"
    args = {
        "models": [f"bright={bright_bundle().save(tmp_path / 'bundle')}"],
        "access": {"tokens": str(tokens)},
        "hardware": {"max_batch": 1},
        "replicas": {"least": 2, "most": 2},
        "storage": str(tmp_path),
    }
    headers = {"Authorization": f"Bearer {add_token(tokens, 'tests', 1)}"}
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    serve.run(build(args), name="raymed", route_prefix="/")
    yield f"http://127.0.0.1:{port}", headers
    serve.shutdown()


def samples() -> list:
    """What Ray's agent on this node tells of the server."""
    import ray

    (node,) = ray.nodes()
    text = httpx.get(f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics", timeout=20).text
    families = text_string_to_metric_families(text)
    return [sample for family in families for sample in family.samples if sample.name.startswith(PREFIX)]


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_every_replica_counts_what_it_has_answered(two_replicas):
    address, headers = two_replicas
    file = io.BytesIO()
    Image.fromarray(np.eye(64, dtype=np.uint8) * 255).save(file, "PNG")
    for _ in range(30):
        done = httpx.post(f"{address}/v1/models/bright:predict", content=file.getvalue(), headers=headers, timeout=60)
        assert done.status_code == 200, done.text

    def answered() -> dict[str, float]:
        return {
            sample.labels["replica"]: sample.value
            for sample in samples()
            if sample.name == f"{PREFIX}stage_seconds_count" and sample.labels["stage"] == "total"
        }

    wait_for(lambda: sum(answered().values()) == 30, 90, "the figures of both")
    assert len(answered()) == 2 and min(answered().values()) > 0
    seen = Counter(sample.name.removeprefix(PREFIX) for sample in samples())
    assert {"stage_seconds_bucket", "decisions_total", "score_bucket", "ready", "queue_images", "model_info"} <= set(
        seen
    )
    ready = [sample for sample in samples() if sample.name == f"{PREFIX}ready"]
    assert [sample.value for sample in ready] == [1, 1] and {sample.labels["model"] for sample in ready} == {"bright"}
