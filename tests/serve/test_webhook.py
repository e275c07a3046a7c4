"""MLflow's webhook: signed as MLflow signs, fresh, and about a model that is served; or it changes nothing."""

import base64
import hashlib
import hmac
import json
import time

import pytest
from fastapi.testclient import TestClient
from waiting import until

from raymed.config import UserError
from raymed.serve.app import create_app
from raymed.serve.models import CHAMPION
from raymed.serve.routes.webhook import ENVIRONMENT, secret_of

SECRET = "a secret of the webhook"
PLACE = "/admin/registry"


def message(name="shelf", entity="model_version_alias") -> bytes:
    data = {"name": name, "alias": "champion", "version": "2"}
    return json.dumps({"entity": entity, "action": "created", "timestamp": "now", "data": data}).encode()


def signed(body: bytes, secret=SECRET, at=None, delivery="6f1c") -> dict[str, str]:
    """As mlflow.webhooks.delivery does it."""
    from mlflow.webhooks.delivery import _generate_hmac_signature

    stamp = str(int(time.time() if at is None else at))
    signature = _generate_hmac_signature(secret, delivery, stamp, body.decode())
    return {"X-MLflow-Signature": signature, "X-MLflow-Timestamp": stamp, "X-MLflow-Delivery-Id": delivery}


@pytest.fixture
def secret(tmp_path):
    file = tmp_path / "secret"
    file.write_text(SECRET + "\n")
    return str(file)


@pytest.fixture
def client(app_config, secret):
    """Of a server whose model is called shelf in a registry."""
    app = create_app(app_config(**{"follow.secret": secret}))
    with TestClient(app) as started:
        app.state.service.models.served["hsg"].source.name = "shelf"
        yield started


def test_a_signed_message_has_the_model_looked_at_now(client, monkeypatch):
    source, looks = client.app.state.service.models.served["hsg"].source, []
    newest = source.newest
    monkeypatch.setattr(source, "newest", lambda alias: looks.append(alias) or newest(alias))
    body = message()
    answer = client.post(PLACE, content=body, headers=signed(body))
    assert (answer.status_code, answer.json()) == (202, {"models": ["hsg"]})
    assert until(lambda: looks) == [CHAMPION]


@pytest.mark.parametrize("entity", ["prompt_alias", "registered_model"])
def test_messages_about_other_things_change_nothing(client, entity):
    for body in (message("another"), message(entity=entity)):
        answer = client.post(PLACE, content=body, headers=signed(body))
        assert (answer.status_code, answer.json()) == (202, {"models": []})


def test_what_mlflow_did_not_sign_is_refused(client):
    body, other = message(), message("other")
    good = signed(body)
    wrong = [
        {},
        good | {"X-MLflow-Signature": ""},
        good | {"X-MLflow-Signature": good["X-MLflow-Signature"].removeprefix("v1,")},
        good | {"X-MLflow-Delivery-Id": "another"},
        good | {"X-MLflow-Timestamp": str(int(good["X-MLflow-Timestamp"]) + 1)},
        signed(other),
        signed(body, secret="another secret of a webhook"),
        signed(body, at=time.time() - 301),
        signed(body, at=time.time() + 310),
    ]
    for headers in wrong:
        answer = client.post(PLACE, content=body, headers=headers)
        assert answer.status_code == 401 and answer.headers["content-type"] == "application/problem+json"
    assert client.post(PLACE, content=body, headers=signed(body, at=time.time() - 290)).status_code == 202
    assert not client.app.state.service.models.served["hsg"].refused


@pytest.mark.parametrize("body", [b"", b"{}", b"[]", b"null", b"\xff", b'{"entity": 1}', message()[:-3]])
def test_what_is_signed_and_no_message_is_told_so(client, body):
    stamp = str(int(time.time()))
    digest = hmac.digest(SECRET.encode(), f"x.{stamp}.".encode() + body, hashlib.sha256)
    signature = "v1," + base64.b64encode(digest).decode()
    headers = {"X-MLflow-Signature": signature, "X-MLflow-Timestamp": stamp, "X-MLflow-Delivery-Id": "x"}
    assert client.post(PLACE, content=body, headers=headers).status_code in (202, 422)


def test_a_large_body_is_refused_before_it_is_hashed(client):
    assert client.post(PLACE, content=b"x" * 70_000).status_code == 413


def test_without_a_secret_there_is_no_such_route(app_config):
    body = message()
    with TestClient(create_app(app_config())) as client:
        assert client.post(PLACE, content=body, headers=signed(body)).status_code in (404, 405)
        assert PLACE not in client.get("/openapi.json").text


def test_it_needs_no_token_where_everything_else_does(app_config, secret, tmp_path, monkeypatch):
    monkeypatch.setenv("RAYMED_SERVE_TOKEN", "a token of twenty letters")
    body = message()
    config = app_config(**{"follow.secret": secret, "access.open": False, "storage": str(tmp_path)})
    with TestClient(create_app(config)) as client:
        assert client.get("/v1/models").status_code == 401
        assert client.post(PLACE, content=body).status_code == 401
        assert client.post(PLACE, content=body, headers=signed(body)).status_code == 202


def test_where_the_secret_comes_from(app_config, secret, tmp_path, monkeypatch):
    assert secret_of(app_config()) is None
    assert secret_of(app_config(**{"follow.secret": secret})) == SECRET.encode()
    monkeypatch.setenv(ENVIRONMENT, "another secret of the webhook")
    assert secret_of(app_config()) == b"another secret of the webhook"
    (tmp_path / "short").write_text("short")
    for file, wrong in (("short", "can be guessed"), ("nowhere", "cannot be read")):
        with pytest.raises(UserError, match=wrong):
            secret_of(app_config(**{"follow.secret": str(tmp_path / file)}))
