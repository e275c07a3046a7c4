"""POST /admin/registry: MLflow says that an alias has moved, and the models that follow it are looked at now.

    client.create_webhook("raymed", "https://HOST:8000/admin/registry",
                          ["model_version_alias.created", "model_version_alias.deleted"], secret=SECRET)

There is such a route only where the server knows SECRET (follow.secret, or $RAYMED_WEBHOOK_SECRET). A request that
MLflow has not signed with it, or not lately, is refused; one that is sent twice does no harm, since nothing but the
registry says which version is used. Of several servers, or replicas, behind one address one is told; the others find
it out at their next look at the registry (follow.every_s).

MLflow sends to https and to public addresses unless MLFLOW_WEBHOOK_ALLOWED_SCHEMES=http,https and
MLFLOW_WEBHOOK_ALLOW_PRIVATE_IPS=true, and keeps secrets that all its workers can read, also after it was started again,
only with MLFLOW_WEBHOOK_SECRET_ENCRYPTION_KEY set.
"""

import base64
import hashlib
import hmac
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request

from raymed.config import UserError
from raymed.serve.access import log
from raymed.serve.config import ServeConfig
from raymed.serve.problems import Problem
from raymed.serve.service import Service

OPEN = ("/admin/registry",)
ENVIRONMENT = "RAYMED_WEBHOOK_SECRET"
_SHORTEST = 16
_FRESH_S = 300
"""How far MLflow's clock and this one's may be apart, its retries included."""
_BODY_BYTES = 64 * 1024


def router(service: Service) -> APIRouter:
    """/admin/registry, where there is a secret."""
    routes = APIRouter()
    secret = secret_of(service.config)
    if secret is None:
        return routes

    @routes.post("/admin/registry", status_code=202, include_in_schema=False)
    async def moved(request: Request) -> dict[str, Any]:
        """Which models are looked at now."""
        body = await request.body()
        check_signature(secret, request.headers, body, time.time())
        found = service.models.look(_registered(body))
        log.note(looked_at=found)
        return {"models": found}

    return routes


def secret_of(config: ServeConfig) -> bytes | None:
    """What MLflow signs with; None where there is no webhook. Raises UserError for a file that cannot be read, and for
    what can be guessed."""
    file = config.follow.secret
    try:
        text = Path(file).expanduser().read_text().strip() if file else os.environ.get(ENVIRONMENT, "")
    except (OSError, ValueError):
        raise UserError(f"follow.secret: {file} cannot be read") from None
    if not text and not file:
        return None
    if len(text) < _SHORTEST:
        raise UserError(f"the secret of the webhook can be guessed: at least {_SHORTEST} characters are expected")
    return text.encode()


def check_signature(secret: bytes, headers: Mapping[str, str], body: bytes, now: float) -> None:
    """Whether MLflow has sent this, and lately: HMAC-SHA256 of DELIVERY.TIMESTAMP.BODY as "v1,BASE64", which is what
    mlflow.webhooks.delivery sends after Standard Webhooks. Raises Problem (401, 413)."""
    if len(body) > _BODY_BYTES:
        raise Problem(413, f"at most {_BODY_BYTES} bytes are expected", field="body")
    sent = {name: headers.get(f"X-MLflow-{name}", "") for name in ("Signature", "Timestamp", "Delivery-Id")}
    signed = f"{sent['Delivery-Id']}.{sent['Timestamp']}.".encode() + body
    expected = b"v1," + base64.b64encode(hmac.digest(secret, signed, hashlib.sha256))
    if not hmac.compare_digest(expected, sent["Signature"].encode()):
        raise Problem(401, "a signature of MLflow's webhook is expected", field="X-MLflow-Signature")
    if not sent["Timestamp"].isdecimal() or abs(now - int(sent["Timestamp"])) > _FRESH_S:
        raise Problem(401, f"it was signed more than {_FRESH_S} s ago", field="X-MLflow-Timestamp")


def _registered(body: bytes) -> str:
    """The name of the registered model that a message is about; "" where it is about something else."""
    try:
        message = json.loads(body)
        return str(message["data"]["name"]) if message["entity"] == "model_version_alias" else ""
    except (ValueError, KeyError, TypeError):
        raise Problem(422, "a message of MLflow's webhook is expected", field="body") from None
