"""Whatever goes wrong is told in the words of the protocol that was asked, wherever it went wrong."""

import numpy as np
import pytest
import tritonclient.http as triton
from fastapi.testclient import TestClient
from tritonclient.utils import InferenceServerException

from raymed.config import UserError
from raymed.serve.access.tokens import add_token
from raymed.serve.app import create_app
from raymed.serve.problems import MEDIA_TYPE, Problem, documented, problem_of

PREDICT = "/v1/models/hsg:predict"


def told(answer, status: int) -> dict:
    """The problem that an answer is."""
    body = answer.json()
    assert answer.headers["content-type"] == MEDIA_TYPE and body["type"] == "about:blank"
    assert (answer.status_code, body["status"], body["request"]) == (status, status, answer.headers["X-Request-Id"])
    return body


def test_what_exceptions_are():
    problem = Problem(409, "later", field="id", retry_after=0.2)
    assert problem_of(problem) is problem and problem.headers == {"Retry-After": "1"}
    assert problem.body("7") == {"type": "about:blank", "title": "conflict", "status": 409, "detail": "later",
                                 "field": "id", "request": "7"}  # fmt: skip
    assert (problem_of(UserError("x")).status, problem_of(UserError("x")).detail) == (422, "x")
    unexpected = problem_of(ValueError("MUSTER^ANNA"))
    assert unexpected.status == 500 and "MUSTER" not in unexpected.detail


@pytest.mark.parametrize("status", [400, 401, 403, 404, 405, 406, 408, 409, 413, 415, 422, 429, 500, 503, 504])
def test_every_status_that_is_used_has_a_title(status):
    assert documented(status)[status]["description"] == Problem(status, "").body()["title"] != "problem"


@pytest.mark.parametrize("path", ["/nothing", "/v1", "/v1/models/hsg/nothing", "/v2nd"])
def test_an_address_that_there_is_not(client, path):
    assert "/openapi.json" in told(client.get(path), 404)["detail"]


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", PREDICT, "POST"),
        ("PUT", PREDICT, "POST"),
        ("POST", "/v1/models/hsg", "GET"),
        ("DELETE", "/", "GET"),
        ("PATCH", "/v1/models/hsg/card", "GET"),
    ],
)
def test_a_method_that_is_not_answered_names_the_one_that_is(client, method, path, allowed):
    answer = client.request(method, path)
    assert told(answer, 405)["detail"].endswith(f"{allowed} is") and answer.headers["Allow"] == allowed


def test_a_form_of_answer_that_there_is_not(client):
    answer = client.post("/v1/models/hsg/studies", content=b"x", headers={"Accept": "text/html"})
    assert told(answer, 406)["title"] == "no such form of answer"


@pytest.mark.parametrize(
    "body",
    [{}, {"json": {}}, {"json": {"files": []}}, {"headers": {"Content-Type": "multipart/form-data; boundary=x"}}],
    ids=["none", "object", "list", "form"],
)
def test_a_case_without_a_file_says_how_one_is_sent(client, body):
    problem = told(client.post(PREDICT, **body), 422)
    assert problem["field"] == "files" and "multipart/form-data" in problem["detail"]


def test_who_asks_for_no_such_model_is_told_so_first(client):
    assert told(client.post("/v1/models/other:predict"), 404)["field"] == "model"


@pytest.mark.parametrize("root", ["", "/models"])
def test_below_v2_every_problem_is_an_error_of_that_protocol(app_config, root):
    with TestClient(create_app(app_config()), root_path=root) as client:
        for method, path, status in (
            ("GET", "/v2/nothing", 404),
            ("GET", "/v2/models/hsg/infer", 405),
            ("GET", "/v2/models/other", 404),
            ("POST", "/v2/models/hsg/infer", 422),
        ):
            answer = client.request(method, root + path)
            assert answer.status_code == status and answer.json().keys() == {"error"}, path
            assert answer.headers["content-type"] == "application/json" and answer.headers["X-Request-Id"]


def test_tritons_client_reads_also_what_no_route_said(served, app_config, tmp_path):
    tokens = tmp_path / "tokens.json"
    bearer = {"Authorization": f"Bearer {add_token(tokens, 'pacs', 3)}"}
    address, _ = served(app_config(**{"access.open": False, "access.tokens": str(tokens), "limits.body_bytes": 2000}))
    large = triton.InferInput("image", [1, 64, 64], "UINT8").set_data_from_numpy(np.ones((1, 64, 64), np.uint8))
    with triton.InferenceServerClient(address.removeprefix("http://")) as client:
        for ask, status, words in (
            (lambda: client.get_model_metadata("hsg"), "401", "a token is needed"),
            (lambda: client.get_inference_statistics("hsg", headers=bearer), "404", "nothing at this address"),
            (lambda: client.infer("hsg", [large], headers=bearer), "413", "at most 2000 bytes"),
        ):
            with pytest.raises(InferenceServerException) as raised:
                ask()
            message = raised.value.message()
            assert raised.value.status() == status and words in message and "decoding the response" not in message
