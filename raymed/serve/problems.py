"""What goes wrong, as RFC 9457 problem details: {"type", "title", "status", "detail", "field", "request"}.

Nothing that a client sent stands in one, but the names of fields and places of files: what is wrong with an image may
not name its patient.
"""

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from raymed.config import UserError

MEDIA_TYPE = "application/problem+json"
_TITLES = {
    400: "bad request",
    401: "who asks?",
    403: "not allowed",
    404: "not found",
    405: "no such method here",
    408: "the request came too slowly",
    409: "conflict",
    413: "too much at once",
    415: "unknown kind of content",
    422: "the input cannot be used",
    429: "too many requests",
    500: "an error of the server",
    503: "not now",
    504: "it took too long",
}


class ProblemBody(BaseModel):
    """RFC 9457."""

    type: str = "about:blank"
    title: str
    status: int
    detail: str
    field: str | None = None
    """Of the request, that the problem is about, such as files[1] or frames."""
    request: str | None = None
    """Number of the request, as in the log."""


class Problem(Exception):
    """An answer that is no answer."""

    def __init__(self, status: int, detail: str, *, field: str | None = None, retry_after: float | None = None):
        super().__init__(detail)
        self.status, self.detail, self.field = status, detail, field
        self.headers = {} if retry_after is None else {"Retry-After": str(max(1, round(retry_after)))}

    def body(self, request: str | None = None) -> dict[str, Any]:
        """As JSON."""
        title = _TITLES.get(self.status, "problem")
        body = ProblemBody(title=title, status=self.status, detail=self.detail, field=self.field, request=request)
        return body.model_dump(exclude_none=True)


def busy(detail: str, retry_after: float = 1.0) -> Problem:
    """503: come later."""
    return Problem(503, detail, retry_after=retry_after)


def problem_of(error: Exception) -> Problem:
    """The problem that an exception is; 500, without its text, for one that nobody expected."""
    if isinstance(error, Problem):
        return error
    if isinstance(error, UserError):
        return Problem(422, str(error))
    if isinstance(error, HTTPException):
        known = Problem(error.status_code, str(error.detail))
        known.headers = dict(error.headers or {})
        return known
    return Problem(500, "the server failed; its log says more under the number of the request")


def response_of(problem: Problem, request_id: str | None = None) -> JSONResponse:
    """The problem on the wire."""
    return JSONResponse(problem.body(request_id), problem.status, headers=problem.headers, media_type=MEDIA_TYPE)


def documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """`responses` of a route that may answer so."""
    content = {MEDIA_TYPE: {"schema": ProblemBody.model_json_schema()}}
    return {status: {"description": _TITLES[status], "content": content} for status in statuses}


def handle_problems(app: FastAPI) -> None:
    """Let every exception leave as a problem."""

    def respond(request: Request, error: Exception) -> JSONResponse:
        return response_of(problem_of(error), request.scope.get("request_id"))

    def invalid(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        return response_of(of_validation(error.errors()), request.scope.get("request_id"))

    for kind in (Problem, UserError, HTTPException, Exception):
        app.add_exception_handler(kind, respond)
    app.add_exception_handler(RequestValidationError, invalid)


def of_validation(errors: Any, detail: str = "") -> Problem:
    """422 for what pydantic found, naming the first field, and never what it held. detail: instead of its words."""
    first: Mapping[str, Any] = errors[0]
    place = ".".join(str(part) for part in first["loc"] if part not in ("body", "query", "path")) or "body"
    return Problem(422, f"{place}: {detail or first['msg']}", field=place)
