"""What goes wrong, as RFC 9457 problem details: {"type", "title", "status", "detail", "field", "request"}; below /v2 as
{"error"}, since clients of the Open Inference Protocol read nothing else.

Nothing that a client sent stands in one, but the names of fields and places of files: what is wrong with an image may
not name its patient.
"""

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from raymed.config import UserError
from raymed.serve.described import Described

MEDIA_TYPE = "application/problem+json"
OIP = "/v2"
"""What the addresses of the Open Inference Protocol begin with."""
_TITLES = {
    400: "bad request",
    401: "who asks?",
    403: "not allowed",
    404: "not found",
    405: "no such method here",
    406: "no such form of answer",
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


class ProblemBody(Described):
    """RFC 9457."""

    type: str = "about:blank"
    title: str
    status: int
    detail: str
    field: str | None = None
    """Of the request, that the problem is about, such as files[1] or frames."""
    request: str | None = None
    """Number of the request, as in the log."""


class OipError(Described):
    """A problem, as the Open Inference Protocol has it."""

    error: str


class Problem(Exception):
    """An answer that is no answer. field: of the request, that it is about. retry_after: seconds."""

    def __init__(self, status: int, detail: str, *, field: str | None = None, retry_after: float | None = None):
        super().__init__(detail)
        self.status, self.detail, self.field = status, detail, field
        self.headers = {} if retry_after is None else {"Retry-After": str(max(1, round(retry_after)))}

    def body(self, request: str | None = None) -> dict[str, Any]:
        """As JSON."""
        title = _TITLES.get(self.status, "problem")
        body = ProblemBody(title=title, status=self.status, detail=self.detail, field=self.field, request=request)
        return body.model_dump(exclude_none=True)


class TooLarge(Problem):
    """422 of a case that takes longer, or more work, than may be spent on what is asked."""

    def __init__(self, detail: str, *, field: str):
        super().__init__(422, detail, field=field)


class OutOfMemory(Problem):
    """503 of a device that is full."""

    def __init__(self, what: str = "this", *, field: str | None = None):
        super().__init__(
            503, f"the device has no memory left for {what}; other requests go on", field=field, retry_after=5
        )


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
        return _of_routing(error)
    return Problem(500, "the server failed; its log says more under the number of the request")


def _of_routing(error: HTTPException) -> Problem:
    """What was raised before any route saw the request, in words that help."""
    headers = dict(error.headers or {})
    allowed = headers.get("Allow", "another").replace(", ", " or ")
    words = {
        404: "there is nothing at this address: GET /openapi.json says what there is",
        405: f"this method is not answered here: {allowed} is",
    }
    problem = Problem(error.status_code, words.get(error.status_code, str(error.detail)))
    problem.headers = headers
    return problem


class _Response(JSONResponse):
    """A problem, told as the protocol of the address does."""

    def __init__(self, problem: Problem, request_id: str | None):
        super().__init__(problem.body(request_id), problem.status, problem.headers, MEDIA_TYPE)
        self.problem = problem

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        if path != OIP and not path.startswith(f"{OIP}/"):
            return await super().__call__(scope, receive, send)
        error = OipError(error=self.problem.detail).model_dump()
        await JSONResponse(error, self.status_code, self.problem.headers)(scope, receive, send)


def response_of(problem: Problem, request_id: str | None = None) -> JSONResponse:
    """The problem on the wire."""
    return _Response(problem, request_id)


def documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """`responses` of a route that may answer so."""
    content = {MEDIA_TYPE: {"schema": {"$ref": f"#/components/schemas/{ProblemBody.__name__}"}}}
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
