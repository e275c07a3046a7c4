"""/openapi.json says what the server does: asked at random by schemathesis, and by real requests of every kind."""

import base64
import io
import json
from collections import Counter
from itertools import cycle, product
from unittest import SkipTest

import pytest
import requests
import schemathesis
from clip_bundles import clip_bundle
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis.errors import Unsatisfiable
from PIL import Image
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from raymed.config import replace
from raymed.serve.access.tokens import add_token
from raymed.serve.app import create_app
from raymed.serve.config import Access

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    response_headers_conformance,
]
CHECKED = settings(
    max_examples=20,
    deadline=None,
    derandomize=True,
    database=None,
    phases=(Phase.explicit, Phase.generate),
    suppress_health_check=list(HealthCheck),
)


@schemathesis.serializer("image/png", "image/jpeg", "image/tiff", "application/dicom", "multipart/related")
def as_it_is(context, value):
    return value if isinstance(value, bytes) else json.dumps(value).encode()


@pytest.fixture
def asked(app_config, served, tmp_path):
    """(address, description) of a server of a classifier and a CLIP that takes jobs."""
    config = app_config(**{"limits.per_minute": 100_000, "storage": str(tmp_path / "home")})
    models = (*config.models, f"pairs={clip_bundle().save(tmp_path / 'pairs')}")
    (tmp_path / "root").mkdir()
    address, _ = served(replace(config, {"models": models, "batch_roots": (str(tmp_path / "root"),)}))
    return address, schemathesis.openapi.from_url(f"{address}/openapi.json")


def test_whatever_is_asked_no_error_of_the_server_and_answers_as_described(asked):
    address, described = asked
    names, seen = cycle(["hsg", "pairs", "hsg", "x"]), Counter()
    operations = [found.ok() for found in described.get_all_operations()]

    def asks(operation, mode):
        @CHECKED
        @given(case=operation.as_strategy(generation_mode=mode))
        def ask(case):
            assume(len(str(case.query)) < 20_000)  # a longer address is refused before the app sees it
            if mode == GenerationMode.POSITIVE and "name" in case.path_parameters:
                case.path_parameters["name"] = next(names)
            answer = case.call_and_validate(base_url=address, checks=CHECKS)
            seen[case.operation.label, answer.status_code] += 1

        return ask

    for operation, mode in product(operations, GenerationMode):
        try:
            asks(operation, mode)()
        except (Unsatisfiable, SkipTest):  # of what takes nothing, nothing is wrong
            assert mode == GenerationMode.NEGATIVE
    assert {label for label, _ in seen} == {operation.label for operation in operations} and len(operations) > 20
    predict = {status for label, status in seen if label == "POST /v1/models/{name}:predict"}
    assert seen["GET /v1/models/{name}", 200] > 3 and predict >= {404, 415, 422}, seen


def test_real_answers_are_as_described(asked, png):
    address, described = asked
    grey = Image.open(io.BytesIO(png))
    text = base64.b64encode(png).decode()
    pixels = {"name": "image", "datatype": "UINT8", "shape": [1, grey.height, grey.width], "data": [*grey.getdata()]}
    case = {"inputs": [pixels], "id": "7"}
    prompts = {"task": "zero_shot", "prompts": {"a": ["x"], "b": ["y", "z"]}}
    for path, method, filled, request, expected in (
        ("/v1/models/{name}:predict", "POST", "hsg", {"data": png, "headers": {"Content-Type": "image/png"}}, 200),
        ("/v1/models/{name}:predict", "POST", "hsg", {"files": [("file", png)] * 2, "data": {"explain": "ig"}}, 200),
        ("/v1/models/{name}:predict", "POST", "hsg", {"json": {"files": [text], "explain": "occlusion",
                                                               "deletion": True, "explain_as": "array"}}, 200),
        ("/v1/models/{name}:predict", "POST", "pairs", {"json": {"files": [text], "texts": ["one", "two"]}}, 200),
        ("/v1/models/{name}:predict", "POST", "pairs", {"json": {"files": [text], **prompts}}, 200),
        ("/v1/models/{name}:predict", "POST", "hsg", {"data": b"x"}, 415),
        ("/v1/models/{name}:predict", "POST", "hsg", {"json": {"files": [text], "frames": ["x"]}}, 422),
        ("/v2/models/{name}/infer", "POST", "hsg", {"json": case}, 200),
        ("/v2/models/{name}/infer", "POST", "hsg", {"json": case | {"parameters": {"binary_data_output": True}}}, 200),
        ("/v2/models/{name}/infer", "POST", "hsg", {"json": case | {"inputs": []}}, 422),
        ("/v1/jobs", "POST", "", {"json": {"model": "hsg", "source": "."}}, 202),
        ("/v1/jobs", "POST", "", {"json": {"model": "hsg", "source": "/"}}, 403),
        ("/v1/jobs", "GET", "", {}, 200),
        ("/readyz", "GET", "", {}, 200),
    ):  # fmt: skip
        answer = requests.request(method, address + path.replace("{name}", filled), **request)
        assert answer.status_code == expected, (path, answer.text)
        described[path][method].validate_response(answer)


def test_a_wrong_answer_would_be_found(asked, png):
    address, described = asked
    answer = requests.post(f"{address}/v1/models/hsg:predict", data=png)
    wrong = answer.json()
    wrong["result"]["probability"] = "high"
    answer._content = json.dumps(wrong).encode()
    with pytest.raises(AssertionError):
        described["/v1/models/{name}:predict"]["POST"].validate_response(answer)


def test_the_union_of_all_kinds_and_the_token_stand_in_it(app_config, tmp_path):
    tokens = tmp_path / "tokens.json"
    add_token(tokens, "me", 1)
    schema = create_app(replace(app_config(), {"access": Access(tokens=str(tokens))})).openapi()
    parts = schema["components"]["schemas"]
    kinds = {entry["$ref"].rpartition("/")[2] for entry in parts["Answer"]["properties"]["result"]["anyOf"]}
    assert {"ClassifierResult", "ClipResult"} <= kinds
    assert (
        "decision" not in parts["ClassifierResult"]["properties"]
        and "threshold" in parts["ClassifierResult"]["required"]
    )
    predict = schema["paths"]["/v1/models/{name}:predict"]["post"]
    bodies = predict["requestBody"]["content"]
    assert {"image/png", "application/dicom", "multipart/form-data", "application/json"} <= bodies.keys()
    for kind in ("multipart/form-data", "application/x-www-form-urlencoded", "application/json"):
        assert {"explain", "prompts"} <= bodies[kind]["schema"]["properties"].keys()
    assert predict["security"] == [{"bearer": []}] and "security" not in schema["paths"]["/healthz"]["get"]
    for path, methods in schema["paths"].items():
        told = ["application/json" if path.startswith("/v2") else "application/problem+json"]
        assert all([*operation["responses"]["default"]["content"]] == told for operation in methods.values())
    fields, answer = parts["Fields"]["properties"], parts["ClassifierResult"]["properties"]
    assert "frames that count" in fields["frames"]["description"]
    assert fields["prompts"]["description"] and "calibrated" in answer["probability"]["description"]
    references = set(part.partition(chr(34))[0] for part in json.dumps(schema).split("#/components/schemas/")[1:])
    assert references <= parts.keys()
