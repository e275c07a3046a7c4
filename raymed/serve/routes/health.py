"""Whether the server lives, which of its models are ready, and what it measures of itself."""

from typing import Any

from fastapi import APIRouter, Response

from raymed.serve.service import Service

OPEN = ("/healthz", "/readyz")


def router(service: Service) -> APIRouter:
    """GET /healthz, /readyz, /statusz, /metrics."""
    routes = APIRouter(tags=["health"])

    @routes.get("/healthz")
    async def alive() -> dict[str, str]:
        """The process answers."""
        return {"status": "alive"}

    @routes.get("/readyz", responses={503: {"description": "a model cannot answer, or the server is ending"}})
    async def ready(response: Response) -> dict[str, Any]:
        """Every model is loaded, and the device computes; which versions, and by which alias one was refused."""
        response.status_code = 200 if service.is_ready else 503
        return {name: _without_places(model) for name, model in service.state().items()}

    @routes.get("/statusz")
    async def status() -> dict[str, Any]:
        """The same of every model, with where it comes from, and why a version was refused."""
        return service.state()

    @routes.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def metrics() -> Response:
        """For Prometheus."""
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    return routes


def _without_places(model: dict[str, Any]) -> dict[str, Any]:
    """What anybody may know: neither paths nor messages, which may name some."""
    return {"ready": model["ready"], "versions": model["versions"], "refused": list(model["refused"])}
