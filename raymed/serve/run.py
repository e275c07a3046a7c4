"""One process on one machine: the app under uvicorn. Enough for a hospital's department; see `raymed.serve.on_ray` for
more."""

import asyncio
import signal
import socket
import ssl
from pathlib import Path
from types import FrameType

import uvicorn
from fastapi import FastAPI

from raymed.config import UserError
from raymed.serve.access.connection import Connection
from raymed.serve.app import create_app
from raymed.serve.config import LOOPBACK, ServeConfig
from raymed.serve.models import CHAMPION, Models, Served
from raymed.serve.service import Service

_NOTICE_S = 3.0
"""After SIGTERM: readiness says no and all is still answered, until whoever spreads the load has looked elsewhere."""
_DRAIN_S = 30
"""For what is being answered then."""


def serve(config: ServeConfig) -> str:
    """Serve until SIGTERM or SIGINT; what is being answered then is still answered. Raises UserError where the address
    is taken, a certificate cannot be used, or nobody could ask."""
    _check_tls(config)
    app = create_app(config)
    with bound(config.host, config.port) as listening:
        settings = uvicorn_config(config, app)
        with asyncio.Runner(loop_factory=settings.get_loop_factory()) as runner:
            runner.run(_serve(Draining(settings, app.state.service), config, listening))
    return "stopped"


async def _serve(server: "Draining", config: ServeConfig, listening: socket.socket) -> None:
    running = asyncio.create_task(server.serve([listening]))
    while not server.started and not running.done():
        await asyncio.sleep(0.05)
    if server.started:
        lines = [*refusals(server.service.models), f"serving on {address(config, listening)}", page(config, listening)]
        print("\n".join(lines), flush=True)
    await running


def refusals(models: Models) -> list[str]:
    """Which versions are not used, why, and what follows from it: two lines each."""
    lines = []
    for name, served in models.served.items():
        for alias, refusal in served.refused.items():
            lines += _refusal(name, served, alias, refusal.reason)
    return lines


def _refusal(name: str, served: Served, alias: str, reason: str) -> list[str]:
    live = served.versions.get(CHAMPION)
    mend = "mend that" + " or promote another version" * bool(served.source.name) + "; it is tried again by itself"
    if live is None:
        return [f"{name} is NOT SERVED: {reason}", f"    requests for it are told to come later (503): {mend}"]
    answers = "the champion" if alias != CHAMPION else f"the last good one here, version {live.origin.version},"
    return [f"{name}: the {alias} is not used: {reason}", f"    {answers} answers everybody: {mend}"]


class Draining(uvicorn.Server):
    """Gives notice by its readiness before it stops listening."""

    def __init__(self, config: uvicorn.Config, service: Service):
        super().__init__(config)
        self.service = service

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first SIGTERM gives notice; a second one, or SIGINT, stops listening at once."""
        is_first, self.service.draining = not self.service.draining, True
        if sig == signal.SIGTERM:
            asyncio.get_running_loop().call_later(_NOTICE_S if is_first else 0, self._stop_listening)
        else:
            super().handle_exit(sig, frame)

    def _stop_listening(self) -> None:
        self.should_exit = True


def uvicorn_config(config: ServeConfig, app: FastAPI) -> uvicorn.Config:
    """Of the app, with TLS where there is a certificate, and client certificates demanded where there is an authority
    for them. The app writes its own access log. Raises UserError for a certificate that cannot be used."""
    access = config.access
    made = uvicorn.Config(
        app,
        http=Connection,
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=75,
        timeout_graceful_shutdown=_DRAIN_S,
        ssl_certfile=access.cert,
        ssl_keyfile=access.key,
        ssl_ca_certs=access.client_ca,
        ssl_cert_reqs=ssl.CERT_REQUIRED if access.client_ca else ssl.CERT_NONE,
    )
    try:
        made.load()
    except OSError as error:  # SSLError is one
        raise UserError(f"access.cert, key and client_ca cannot be used: {error.strerror or error}") from None
    return made


def _check_tls(config: ServeConfig) -> None:
    access = config.access
    if (access.cert is None) != (access.key is None):
        raise UserError("access.cert and access.key are one thing: give both")
    if access.client_ca and not access.cert:
        raise UserError("access.client_ca needs TLS: give access.cert and access.key too")
    for name in ("cert", "key", "client_ca"):
        path = getattr(access, name)
        if path is not None and not Path(path).is_file():
            raise UserError(f"access.{name}: there is no file {path}")
    if access.cert is None and config.host not in LOOPBACK:
        print(
            "images and tokens cross the network unencrypted: give --access.cert and --access.key, unless something "
            "in front of this server does TLS",
            flush=True,
        )


def page(config: ServeConfig, listening: socket.socket) -> str:
    """What to open in a browser. A server that listens on every address is asked by a name."""
    host, port = listening.getsockname()[:2]
    name = next(iter(config.access.hosts), socket.gethostname()) if host in ("0.0.0.0", "::") else host
    token = "" if config.access.open else ", with a token: python jobs/serve_tokens.py add NAME"
    return f"Open {_url(config, name, port)}/ in a browser{token}"


def address(config: ServeConfig, listening: socket.socket) -> str:
    """Where it answers, with the port that it got."""
    host, port = listening.getsockname()[:2]
    return _url(config, host, port)


def _url(config: ServeConfig, host: str, port: int) -> str:
    scheme = "https" if config.access.cert else "http"
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"


def bound(host: str, port: int) -> socket.socket:
    """A socket to listen on. Raises UserError where the address is taken."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
    except OSError as error:
        listening.close()
        raise UserError(f"port {port} of {host} cannot be had ({error.strerror}): --port 0 takes a free one") from None
    return listening
