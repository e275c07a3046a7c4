"""The HTTP app: FastAPI alone, whatever runs it (uvicorn, Ray Serve, a test).

Each file of `routes` is one protocol; all of them end in `Service`. Its OPEN, if it has one, holds the paths that are
answered without a token.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI

from raymed.serve.access import guard
from raymed.serve.config import ServeConfig
from raymed.serve.openapi import describe
from raymed.serve.problems import handle_problems
from raymed.serve.routes import dicomweb, health, jobs, oip, page, predict, webhook
from raymed.serve.service import Service

ROUTES = (health, predict, oip, jobs, dicomweb, page, webhook)


def create_app(config: ServeConfig) -> FastAPI:
    """The app of a server. Its models are loaded when it starts."""
    service = Service(config)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await service.start()
        try:
            yield
        finally:
            await service.stop()

    # FastAPI's own spans and logs would hold queries and the texts of exceptions; see `raymed.serve.spans`.
    silent: Any = {"tracing": False, "metrics": False, "logs": False, "auto_configure": False}
    app = FastAPI(title="raymed", lifespan=lifespan, docs_url=None, redoc_url=None, telemetry=silent)
    app.state.service = service
    handle_problems(app)
    for part in ROUTES:
        app.include_router(part.router(service))
    open_paths = [path for part in ROUTES for path in getattr(part, "OPEN", ())]
    describe(app, config, open_paths)
    guard(app, config, open_paths, service.metrics.counted)
    return app
