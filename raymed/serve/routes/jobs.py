"""Work that takes longer than a request: /v1/jobs.

curl --json '{"model": "hsg", "source": "2026/manifest.csv"}' HOST/v1/jobs      # 202, Location: /v1/jobs/ID
curl -N HOST/v1/jobs/ID/events                                                  # progress, as it comes
curl HOST/v1/jobs/ID/result > predictions.csv
curl -X DELETE HOST/v1/jobs/ID

Sources are folders and manifests on the server, inside --batch-roots. Only whoever asked for a job sees it.
"""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Annotated, Literal

from fastapi import APIRouter, Path, Request, Response
from fastapi.responses import FileResponse, StreamingResponse
from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from starlette.concurrency import run_in_threadpool

from raymed.serve.jobs import KINDS, Job
from raymed.serve.jobs.store import UNFINISHED
from raymed.serve.problems import Problem, documented
from raymed.serve.service import Service

_LOOK_S = 0.5
"""Between two looks at a job whose events somebody follows."""
_ALIVE_S = 15.0
"""Between two signs of life on a silent stream, which proxies would close."""
Number = Annotated[str, Path(pattern="^[0-9a-f]{32}$")]


def _known(kind: str) -> str:
    if kind not in KINDS:
        raise ValueError(f"{' or '.join(KINDS)} is expected")
    return kind


class JobRequest(BaseModel):
    """What is to be done."""

    model_config = ConfigDict(extra="forbid")

    model: str = Field(max_length=64)
    kind: Annotated[str, AfterValidator(_known), Field(json_schema_extra={"enum": [*KINDS]})] = "predict"
    source: str = Field(min_length=1, max_length=4096)
    """A folder of images or a manifest on the server: an absolute path, or one below a root."""


def router(service: Service) -> APIRouter:
    """/v1/jobs, /v1/jobs/ID, its result and events."""
    routes = APIRouter(prefix="/v1/jobs", tags=["jobs"])
    jobs = service.jobs

    @routes.post("", status_code=202, responses=documented(403, 404, 422, 429, 503))
    async def add(asked: JobRequest, request: Request, response: Response) -> Job:
        """Queue a job."""
        job = await run_in_threadpool(jobs.add, _caller(request), asked.kind, asked.model, asked.source)
        response.headers["Location"] = f"{request.scope.get('root_path', '')}/v1/jobs/{job.id}"
        return job

    @routes.get("", responses=documented(403))
    async def every(request: Request) -> list[Job]:
        """One's own, the newest first."""
        return await run_in_threadpool(jobs.rows.all, _caller(request))

    @routes.get("/{id}", responses=documented(403, 404, 422))
    async def one(id: Number, request: Request) -> Job:
        """How far it is."""
        return await run_in_threadpool(jobs.get, id, _caller(request))

    @routes.get(
        "/{id}/result",
        response_class=FileResponse,
        responses={200: {"content": {"text/csv": {"schema": {"type": "string"}}}}} | documented(403, 404, 409, 422),
    )
    async def result(id: Number, request: Request, table: Literal["cases", "images"] = "cases") -> Response:
        """The table of cases, or that of images."""
        job = await run_in_threadpool(jobs.get, id, _caller(request))
        path = jobs.result(job, table)
        if not path.is_file():
            raise Problem(404, "the result was deleted", field="id")
        return FileResponse(path, media_type="text/csv", filename=path.name)

    @routes.get(
        "/{id}/events",
        response_class=StreamingResponse,
        responses={200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}}} | documented(403, 404, 422),
    )
    async def events(id: Number, request: Request) -> Response:
        """Server-sent events, one whenever the job gets further, until it ends."""
        job = await run_in_threadpool(jobs.get, id, _caller(request))
        return StreamingResponse(_followed(service, job, _caller(request)), media_type="text/event-stream")

    @routes.delete("/{id}", status_code=204, responses=documented(403, 404, 422))
    async def end(id: Number, request: Request) -> None:
        """Cancel it or, where it has ended, forget it and its result."""
        await run_in_threadpool(jobs.end, id, _caller(request))

    return routes


def _caller(request: Request) -> str:
    """The name of the token; "" where nobody needs one."""
    return request.scope.get("caller", "")


async def _followed(service: Service, job: Job, owner: str) -> AsyncIterator[str]:
    told, silent = None, 0.0
    while True:
        if job != told:
            yield f"event: {job.state}\ndata: {json.dumps(job.model_dump(mode='json'))}\n\n"
            told, silent = job, 0.0
        if job.state not in UNFINISHED or service.draining:
            return
        await asyncio.sleep(_LOOK_S)
        silent += _LOOK_S
        if silent >= _ALIVE_S:
            yield ": still there\n\n"
            silent = 0.0
        try:
            job = await run_in_threadpool(service.jobs.get, job.id, owner)
        except Problem:  # forgotten meanwhile
            return
