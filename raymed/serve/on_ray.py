"""The same app as replicas of a Ray Serve deployment: for more requests than one process answers, or several GPUs.

    serve run raymed.serve.on_ray:build models='["hsg=models:/hsg-asl@champion"]' replicas='{"most": 4}'
    serve deploy cluster/serve.yaml

Each replica holds every model, so that a request crosses one process only. Tokens' rates count in each replica alone.
Its figures are told to Ray (`raymed.serve.on_ray_metrics`): Prometheus asks Ray, never the proxy.

What Serve's proxy cannot answer, since a replica has died with the request, it leaves without a word (500). With
RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=raymed.serve.on_ray:around_proxy in the environment of `ray start`, on every
node, it is 503 with Retry-After.
"""

import asyncio
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from raymed.config import UserError, check_range, from_dict
from raymed.serve.app import create_app
from raymed.serve.config import ServeConfig
from raymed.serve.on_ray_metrics import Mirror
from raymed.serve.problems import busy, response_of
from raymed.serve.sources import registered

if TYPE_CHECKING:
    from ray.serve import Application

_AGAIN_S = 2.0
_DRAIN_S = 10.0
"""Beside limits.timeout_s, for a replica that is to end."""


@dataclass(frozen=True)
class Replicas:
    """How many processes answer, and what each takes. A deployment of Serve's own config overrides it."""

    least: int = 1
    """0: none, while nobody asks; who asks then waits until one has started."""
    most: int = 1
    requests: float = 16
    """Of each, answered or waiting, that are aimed at: with more there are more replicas."""
    idle_s: float = 600
    """Before there are fewer."""
    cpus: float = 1
    """Torch gets as many threads, unless hardware.threads says otherwise."""
    gpus: float = 0
    """A fraction lets several share a GPU."""

    def __post_init__(self) -> None:
        check_range("replicas.least", self.least, 0)
        check_range("replicas.most", self.most, max(1, self.least))
        check_range("replicas.requests", self.requests, 0, low_open=True)
        check_range("replicas.idle_s", self.idle_s, 0)
        check_range("replicas.cpus", self.cpus, 0)
        check_range("replicas.gpus", self.gpus, 0)


def build(args: Mapping[str, Any]) -> "Application":
    """The application. args: fields of `ServeConfig`, and replicas, those of `Replicas`; text may be JSON. Raises
    UserError for a field that is none, or that is Serve's to decide."""
    from ray import serve

    given = {name: _plain(value) for name, value in args.items()}
    replicas = from_dict(Replicas, given.pop("replicas", {}))
    config = registered(_checked(from_dict(ServeConfig, given)))

    @serve.deployment(
        name="models",
        autoscaling_config={
            "min_replicas": replicas.least,
            "max_replicas": replicas.most,
            "target_ongoing_requests": replicas.requests,
            "upscale_delay_s": 5,
            "downscale_delay_s": replicas.idle_s,
        },
        ray_actor_options={"num_cpus": replicas.cpus, "num_gpus": replicas.gpus},
        max_ongoing_requests=config.limits.queue,
        max_queued_requests=config.limits.queue,
        backpressure_config={"status_code": 503, "retry_after_s": _AGAIN_S},
        health_check_period_s=10,
        health_check_timeout_s=config.limits.timeout_s,
        graceful_shutdown_timeout_s=config.limits.timeout_s + _DRAIN_S,
        logging_config={"enable_access_log": False},
    )
    @serve.ingress(lambda: _app(config))
    class Models:
        """A replica."""

        app: FastAPI

        async def check_health(self) -> None:
            """See `Engine.check`: Serve replaces a replica that fails it."""
            await self.app.state.service.engine.check(config.limits.timeout_s)

    return Models.bind()  # type: ignore[attr-defined]


def _plain(value: Any) -> Any:
    """The command line brings text alone."""
    return json.loads(value) if isinstance(value, str) and value[:1] in ("{", "[") else value


def _checked(config: ServeConfig) -> ServeConfig:
    if config.access.open:
        raise UserError("access.open: on Ray Serve others may reach the proxy: make a token, jobs/serve_tokens.py")
    if config.access.cert or config.access.client_ca:
        raise UserError("access.cert: on Ray Serve TLS is the proxy's: http_options of Serve's config, ssl_certfile")
    return config


def _app(config: ServeConfig) -> FastAPI:
    """Of this replica."""
    import ray

    app = create_app(_in_replica(config))
    Mirror(app.state.service.metrics.registry, ray.get_runtime_context().get_actor_id() or "").start()
    return app


def _in_replica(config: ServeConfig) -> ServeConfig:
    """With as many threads as the replica has CPUs."""
    import ray

    if config.hardware.threads:
        return config
    cpus = ray.get_runtime_context().get_assigned_resources().get("CPU", 1)
    return replace(config, hardware=replace(config.hardware, threads=max(1, int(cpus))))


def around_proxy() -> list[Middleware]:
    """For Serve's proxies."""
    return [Middleware(ComeAgain)]


class ComeAgain:
    """Plain ASGI: a request that nothing answers is told to come again (503), and so is one that is told so without
    being told when."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        started = False

        async def sent(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                message = _with_time(message)
            await send(message)

        try:
            await self.app(scope, receive, sent)
        finally:
            if not started and not _is_cancelled():
                await response_of(busy("the replica that answered has ended", _AGAIN_S))(scope, receive, send)


def _with_time(message: Message) -> Message:
    headers = list(message.get("headers", ()))
    if message["status"] != 503 or any(name.lower() == b"retry-after" for name, _ in headers):
        return message
    return {**message, "headers": [*headers, (b"retry-after", str(round(_AGAIN_S)).encode())]}


def _is_cancelled() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
