"""POST /v1/models/NAME:predict: the files of one case, and one answer.

curl --data-binary @case.png -H "Content-Type: image/png" HOST/v1/models/hsg:predict
curl -F file=@early.dcm -F file=@late.dcm -F explain=gradcam HOST/v1/models/hsg:predict
curl --json '{"files": ["BASE64"], "explain": "gradcam"}' HOST/v1/models/hsg:predict
curl -d task=embed -d texts="a normal uterus" HOST/v1/models/pairs:predict
"""

import base64
import json
import re
from collections.abc import Iterable
from typing import Any
from urllib.parse import parse_qsl

from fastapi import APIRouter, Request, Response
from python_multipart.multipart import parse_options_header
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser

from raymed.serve.config import Limits
from raymed.serve.problems import Problem, documented
from raymed.serve.service import Answer, Service
from raymed.serve.uploads import File

PATIENT = "X-Patient"
"""Header with whatever names the patient to the sender, so that he is always answered by one version; it is hashed."""
FIELDS, FIELD_BYTES = 64, 2**18
"""Of a request: how many, and how long one may be."""
_PLAIN_FORM, _PLAIN_BYTES = "application/x-www-form-urlencoded", 2**20
"""What is escaped there is slow to read: JSON and multipart take more."""
_VALUES = 100_000
"""Of a request in JSON, files included."""
_NO_FILE = "a file is expected: as the body, or several as parts of multipart/form-data, or in base64 in JSON's files"
_FIELD = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")
"""What a field may be called: problems repeat it."""


def router(service: Service) -> APIRouter:
    """/v1/models, /v1/models/NAME and its :predict."""
    routes = APIRouter(prefix="/v1/models", tags=["models"])

    @routes.get("")
    async def models() -> list[dict[str, Any]]:
        """Every model that is loaded: where it comes from and what it answers."""
        return [about(service, name) for name, state in service.models.state().items() if state["ready"]]

    @routes.post("/{name}:predict", response_model=Answer, responses=documented(404, 408, 413, 415, 422, 429, 503))
    async def predict(name: str, request: Request) -> Response:
        """One answer for the files of one case."""
        files, fields = await read_request(request, service.config.limits)
        if not files and service.models.get(name).handler.needs_image:
            raise Problem(422, _NO_FILE, field="files")
        answer = await service.predict(name, files, fields, request.headers.get(PATIENT, ""))
        return Response(answer.model_dump_json(), media_type="application/json")

    @routes.get("/{name}:predict", include_in_schema=False)
    async def unread(name: str) -> None:
        """Told apart from the model NAME:predict, which there is not."""
        raise HTTPException(405, headers={"Allow": "POST"})

    @routes.get("/{name}", responses=documented(404, 503))
    async def model(name: str) -> dict[str, Any]:
        """One of them."""
        return about(service, name)

    return routes


def about(service: Service, name: str) -> dict[str, Any]:
    """Of a model in use: identity, kind, contract, and what its handler says."""
    live = service.models.get(name)
    bundle = live.handler.bundle
    described = {"kind": bundle.kind, "contract": bundle.contract, "fields": live.handler.Fields.model_json_schema()}
    return live.identity | described | live.handler.about()


async def read_request(request: Request, limits: Limits) -> tuple[list[File], dict[str, Any]]:
    """Files and fields of a multipart, plain form, JSON or raw body. Raises Problem (413, 422)."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    query = plain_fields(request.query_params.multi_items())
    if kind == "multipart/form-data":
        files, fields = await _of_form(request, limits)
    else:
        body = await request.body()
        if kind == _PLAIN_FORM:
            _check_charset(request, kind)
            files, fields = await run_in_threadpool(_of_plain_form, body)
        elif kind == "application/json":
            files, fields = await run_in_threadpool(_of_json, body)
        else:
            files, fields = ([File(body)] if body else []), {}
    return files, _checked(query | fields)


class _InMemory(MultiPartParser):
    """The parser of multipart bodies, without its temporary files: images of patients are not put on a disk."""

    spool_max_size = 2**62


def _check_charset(request: Request, kind: str) -> None:
    _, options = parse_options_header(request.headers.get("content-type", ""))
    if options.get(b"charset", b"utf-8").lower() not in (b"utf-8", b"utf8"):  # some decoders take for ever
        raise Problem(422, f"{kind} in UTF-8 is expected", field="body")


async def _of_form(request: Request, limits: Limits) -> tuple[list[File], dict[str, Any]]:
    _check_charset(request, "multipart/form-data")
    parser = _InMemory(
        request.headers,
        request.stream(),  # type: ignore[arg-type]
        max_files=limits.files,
        max_fields=FIELDS,
        max_part_size=FIELD_BYTES,
    )
    try:
        parts = (await parser.parse()).multi_items()
    except MultiPartException as error:
        too_much = error.message.startswith(("Too many", "Part exceeded"))
        most = f"at most {limits.files} files and {FIELDS} fields of {FIELD_BYTES // 1024} KiB"
        raise Problem(413 if too_much else 422, f"multipart/form-data of {most} is expected", field="body") from None
    except ValueError:  # a charset that cannot be used
        raise Problem(422, "multipart/form-data in UTF-8 is expected", field="body") from None
    files = [File(await part.read(), part.filename or "") for _, part in parts if isinstance(part, UploadFile)]
    return files, plain_fields((name, value) for name, value in parts if isinstance(value, str))


def _of_plain_form(body: bytes) -> tuple[list[File], dict[str, Any]]:
    """Fields, as clients send them where there are no files; or an image, which curl --data-binary says is such a form
    unless it is told otherwise: it has zeros, or bytes that are no UTF-8."""
    try:
        text = body.decode()
    except UnicodeDecodeError:
        return [File(body)], {}
    if "\0" in text:
        return [File(body)], {}
    if body.count(b"&") >= FIELDS or len(body) > _PLAIN_BYTES:
        most = f"at most {FIELDS} fields, all of them {_PLAIN_BYTES // 1024} KiB,"
        raise Problem(413, f"{_PLAIN_FORM} of {most} is expected", field="body")
    try:
        return [], plain_fields(parse_qsl(text, keep_blank_values=True, errors="strict"))
    except ValueError:  # what is escaped is no UTF-8
        raise Problem(422, f"{_PLAIN_FORM} in UTF-8 is expected", field="body") from None


def _of_json(body: bytes) -> tuple[list[File], dict[str, Any]]:
    if body.count(b",") > _VALUES:
        raise Problem(413, f"JSON of at most {_VALUES} values is expected", field="body")
    try:
        fields = json.loads(body, parse_constant=no_constant)
        contents = fields.pop("files", [])
        if not isinstance(contents, list):
            raise TypeError
        return [File(base64.b64decode(text, validate=True)) for text in contents], fields
    except (ValueError, AttributeError, TypeError, RecursionError):
        detail = 'JSON is expected, {"files": [base64, ...], ...}'
        raise Problem(422, detail, field="body") from None


def plain_fields(pairs: Iterable[tuple[str, str]]) -> dict[str, Any]:
    """Fields that came as texts: one that is named several times is a list, one that is JSON is what it says."""
    found: dict[str, list[Any]] = {}
    for name, text in pairs:
        found.setdefault(name, []).append(_plain(text))
    return {name: values if len(values) > 1 else values[0] for name, values in found.items()}


def _plain(text: str) -> Any:
    if text[:1] not in ("{", "["):
        return text
    try:
        return json.loads(text, parse_constant=no_constant)
    except (ValueError, RecursionError):
        return text


def no_constant(constant: str) -> Any:
    """For `json.loads`: NaN and Infinity are no JSON. Raises ValueError."""
    raise ValueError(constant)


def _checked(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields. Raises Problem (422) for text that is no Unicode, which JSON can hold and no answer can, for values
    within values without end, and for names that nobody would give; 413 for too many."""
    if len(fields) > FIELDS:
        raise Problem(413, f"at most {FIELDS} fields are expected", field="body")
    try:
        json.dumps(fields, ensure_ascii=False).encode()
    except (UnicodeEncodeError, RecursionError):
        raise Problem(422, "fields: plain Unicode text is expected", field="body") from None
    if not all(map(_FIELD.fullmatch, fields)):
        raise Problem(422, "fields: names of letters, digits and _ are expected, 64 at most", field="body")
    return fields
