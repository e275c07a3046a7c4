"""What the server measures of itself: Prometheus's figures, and spans where somebody collects them."""

import io

import numpy as np
import pytest
from fastapi.testclient import TestClient
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.util._once import Once
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from raymed.serve.app import create_app

NAME = "MUSTER^ANNA"
PREDICT = "/v1/models/hsg:predict"


def read(client) -> dict[tuple[str, tuple[str, ...]], float]:
    """(name, labels' values, sorted by label) -> value."""
    found = client.get("/metrics")
    assert found.headers["content-type"].startswith("text/plain")
    families = text_string_to_metric_families(found.text)
    return {
        (sample.name, tuple(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in families
        for sample in family.samples
    }


def foreign_image() -> bytes:
    """Like nothing that the classifier was trained on."""
    file = io.BytesIO()
    Image.fromarray(np.kron(np.eye(2), np.full((8, 8), 255)).astype(np.uint8)).save(file, "PNG")
    return file.getvalue()


def test_every_stage_of_a_request_is_measured(client, png):
    answers = [client.post(PREDICT, content=png) for _ in range(2)]
    two = client.post(PREDICT, files=[("file", png), ("file", png)])
    answers.append(two)
    client.post(PREDICT, content=b"no image")
    client.post("/v1/models/other:predict", content=png)
    client.get(f"/{NAME}")
    found = read(client)

    def count(stage):
        return found["raymed_stage_seconds_count", ("hsg", stage)]

    assert [count(stage) for stage in ("decode", "prepare", "queue", "total")] == [4, 4, 4, 3]
    assert found["raymed_batch_images_sum", ("hsg",)] == 4
    total = found["raymed_stage_seconds_sum", ("hsg", "total")]
    assert 0 < found["raymed_stage_seconds_sum", ("hsg", "network")] < total < 20
    decisions = {key[1][1]: value for key, value in found.items() if key[0] == "raymed_decisions_total"}
    expected: dict[str, int] = {}
    for answer in answers:
        expected[answer.json()["decision"]] = expected.get(answer.json()["decision"], 0) + 1
    assert decisions == expected
    assert found["raymed_score_sum", ("champion", "hsg")] == pytest.approx(
        sum(answer.json()["result"]["probability"] for answer in answers)
    )
    route = "/v1/models/{name}:predict"
    requests = {key[1]: value for key, value in found.items() if key[0] == "raymed_requests_total"}
    assert requests["POST", route, "200"] == 3 and requests["POST", route, "404"] == 1
    assert requests["", "", "404"] == 1
    (errors,) = [key[1] for key in found if key[0] == "raymed_decode_errors_total"]
    assert errors == ("hsg", "415")
    assert NAME not in client.get("/metrics").text


def test_a_method_that_somebody_made_up_is_no_label(client):
    for method in ("GET", "BREW", f"X{NAME}"):
        client.request(method, "/healthz")
    labels = {key[1] for key in read(client) if key[0] == "raymed_requests_total"}
    assert {("GET", "/healthz", "200"), ("", "/healthz", "405")} <= labels and "BREW" not in str(labels)


def test_an_image_unlike_the_training_data_counts_as_an_abstention(client):
    decision = client.post(PREDICT, content=foreign_image()).json()["decision"]
    assert decision == "abstain"
    assert read(client)["raymed_decisions_total", ("champion", "abstain", "hsg")] == 1


def test_versions_in_use_and_refused(app_config, bundle_folder, tmp_path):
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "bundle.json").write_text("{}")
    models = (f"hsg={bundle_folder}", f"other={broken}")
    with TestClient(create_app(app_config(models=models))) as client:
        found = read(client)
        digest = client.get("/v1/models/hsg").json()["bundle"][:12]
    assert found["raymed_model_info", ("champion", digest, "hsg", "")] == 1
    assert [value for (name, _), value in found.items() if name == "raymed_model_info"] == [1]
    assert (found["raymed_ready", ("hsg",)], found["raymed_ready", ("other",)]) == (1, 0)
    assert found["raymed_refused_versions_total", ("champion", "other")] == 1
    assert found["raymed_refused", ("champion", "other")] == 1
    assert found["raymed_queue_images", ("hsg",)] == 0


def test_servers_do_not_share_figures(app_config, png):
    with TestClient(create_app(app_config())) as one, TestClient(create_app(app_config())) as other:
        one.post(PREDICT, content=png)
        assert ("raymed_stage_seconds_count", ("hsg", "total")) not in read(other)


@pytest.fixture
def spans(monkeypatch):
    """What a configured tracer provider collects."""
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(trace, "_TRACER_PROVIDER", None)
    monkeypatch.setattr(trace, "_TRACER_PROVIDER_SET_ONCE", Once())
    trace.set_tracer_provider(provider)
    return exporter


def test_spans_of_a_request_and_its_stages(spans, client, png):
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    headers = {"traceparent": parent, "X-Patient": NAME}
    answer = client.post(f"{PREDICT}?explain={NAME}", content=png, headers=headers)
    assert answer.status_code == 422
    spans.clear()
    answer = client.post(PREDICT, files={"file": (NAME, png)}, headers=headers)
    assert answer.status_code == 200
    found = {span.name: span for span in spans.get_finished_spans()}
    request = found["POST /v1/models/{name}:predict"]
    assert set(found) == {request.name, "prepare", "answer"}
    assert request.context.trace_id == 0x0AF7651916CD43DD8448EB211C80319C
    assert request.parent.span_id == 0xB7AD6B7169203331
    assert request.attributes["http.response.status_code"] == 200
    assert request.attributes["raymed.request_id"] == answer.headers["X-Request-Id"]
    for stage in ("prepare", "answer"):
        assert found[stage].parent.span_id == request.context.span_id
        assert request.start_time <= found[stage].start_time <= found[stage].end_time <= request.end_time
    assert NAME not in "".join(span.to_json() for span in spans.get_finished_spans())


def test_a_failure_stands_in_its_span_without_its_text(spans, client, png, monkeypatch):
    async def fails(*_):
        raise ValueError(NAME)

    handler = client.app.state.service.models.get("hsg").handler
    monkeypatch.setattr(handler, "answer", fails)
    assert client.post(f"{PREDICT}?{NAME}=", content=png).status_code == 422
    spans.clear()
    assert client.post(PREDICT, content=png).status_code == 500
    found = {span.name: span for span in spans.get_finished_spans()}
    assert set(found) == {"POST /v1/models/{name}:predict", "prepare", "answer"}
    assert not found["POST /v1/models/{name}:predict"].status.is_ok
    assert all(NAME not in span.to_json() and span.events == () for span in found.values())
