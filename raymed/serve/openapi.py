"""/openapi.json: what FastAPI finds in the routes, and what only all of them, or all kinds of models, know together.

:predict     what a request may say beside its files, and what an answer's `result` is: the union of all kinds
/v2          the JSON before binary tensors
everywhere   the token, and that whatever else goes wrong is told as a problem
"""

from collections.abc import Iterable
from pkgutil import iter_modules
from typing import Any

from fastapi import FastAPI
from pydantic.json_schema import models_json_schema

from raymed.serve import handlers
from raymed.serve.config import ServeConfig
from raymed.serve.handlers import Handler, Result, handler_class
from raymed.serve.problems import MEDIA_TYPE, OIP, OipError, ProblemBody
from raymed.serve.routes.oip import HEADER_LENGTH, InferRequest
from raymed.serve.routes.predict import PATIENT

Schema = dict[str, Any]
_REFERENCE = "#/components/schemas/"
_BINARY: Schema = {"type": "string", "format": "binary"}
_RAW = ("application/octet-stream", "application/dicom", "image/png", "image/jpeg", "image/tiff")


def describe(app: FastAPI, config: ServeConfig, open_paths: Iterable[str]) -> None:
    """Let an app describe itself so. open_paths: what is answered without a token."""
    found, without_token = app.openapi, None if config.access.open else frozenset(open_paths)

    def openapi() -> Schema:
        if app.openapi_schema is None:
            app.openapi_schema = _complete(found(), without_token)
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def _complete(schema: Schema, without_token: frozenset[str] | None) -> Schema:
    """without_token: paths; None = all of them."""
    kinds = [handler_class(module.name) for module in iter_modules(handlers.__path__)]
    models: list[Any] = [(kind.Fields, "validation") for kind in kinds]
    models += [(kind.Result, "serialization") for kind in kinds]
    models += [(InferRequest, "validation"), (OipError, "validation"), (ProblemBody, "serialization")]
    names, extra = models_json_schema(models, ref_template=_REFERENCE + "{model}")
    parts = schema.setdefault("components", {}).setdefault("schemas", {})
    parts |= extra["$defs"]
    results = [names[kind.Result, "serialization"] for kind in kinds]
    for result in results:
        _without(parts[result["$ref"].removeprefix(_REFERENCE)], Result.model_fields)
    parts["Answer"]["properties"]["result"] |= {"type": "object", "anyOf": results}
    parts["Answer"]["properties"]["result"].pop("additionalProperties", None)
    parts["Fields"] = _fields(kinds, parts, names)
    operations = [(path, operation) for path, methods in schema["paths"].items() for operation in methods.values()]
    for path, operation in operations:
        _tell_problems(operation, path.startswith(OIP))
        if without_token is not None and path not in without_token:
            operation["security"] = [{"bearer": []}]
        if path.endswith(":predict"):
            _tell_case(operation, parts["Fields"]["properties"])
        if path.endswith("/infer"):
            _tell_tensors(operation)
    for unused in ("HTTPValidationError", "ValidationError"):
        parts.pop(unused, None)
    if without_token is not None:
        schema["components"]["securitySchemes"] = {"bearer": {"type": "http", "scheme": "bearer"}}
    return schema


def _without(part: Schema, names: Iterable[str]) -> None:
    """An answer says these above its result."""
    for name in names:
        part["properties"].pop(name, None)
    part["required"] = [name for name in part.get("required", []) if name in part["properties"]]


def _fields(kinds: list[type[Handler]], parts: Schema, names: dict[Any, Schema]) -> Schema:
    """What a request to a model of any kind may say beside its files."""
    found: dict[str, list[Schema]] = {}
    for kind in kinds:
        told = parts[names[kind.Fields, "validation"]["$ref"].removeprefix(_REFERENCE)]
        for name, field in told["properties"].items():
            if field not in found.setdefault(name, []):
                found[name].append(field)
    properties = {name: several[0] if len(several) == 1 else {"anyOf": several} for name, several in found.items()}
    description = "Which of them a model knows: GET /v1/models/NAME, fields."
    return {"type": "object", "description": description, "properties": properties, "additionalProperties": False}


def _tell_case(operation: Schema, fields: Schema) -> None:
    """Bodies of :predict, and the fields of those that have no other place for them."""
    form = {"file": {"type": "array", "items": _BINARY}} | fields
    plain = {"files": {"type": "array", "items": {"type": "string", "format": "byte"}}} | fields
    raw = {kind: {"schema": _BINARY} for kind in _RAW}
    objects = {"multipart/form-data": form, "application/x-www-form-urlencoded": fields, "application/json": plain}
    described = {
        kind: {"schema": {"type": "object", "properties": properties, "additionalProperties": False}}
        for kind, properties in objects.items()
    }
    operation["requestBody"] = {"content": raw | described}
    operation["parameters"] = [
        *operation.get("parameters", []),
        *({"name": name, "in": "query", "required": False, "schema": field} for name, field in fields.items()),
        {
            "name": PATIENT,
            "in": "header",
            "required": False,
            "description": "Whatever names the patient to the sender: he is always answered by one version.",
            "schema": {"type": "string"},
        },
    ]


def _tell_tensors(operation: Schema) -> None:
    operation["requestBody"] = {
        "required": True,
        "content": {
            "application/json": {"schema": {"$ref": f"{_REFERENCE}InferRequest"}},
            "application/octet-stream": {"schema": _BINARY},
        },
    }
    length = {"name": HEADER_LENGTH, "in": "header", "required": False, "schema": {"type": "integer", "minimum": 0}}
    operation["parameters"] = [*operation.get("parameters", []), length]
    answer = operation["responses"]["200"]
    answer["content"]["application/octet-stream"] = {"schema": _BINARY}
    answer["headers"] = {HEADER_LENGTH: {"required": False, "schema": {"type": "integer"}}}


def _tell_problems(operation: Schema, is_oip: bool) -> None:
    kind, body = ("application/json", OipError) if is_oip else (MEDIA_TYPE, ProblemBody)
    responses = operation["responses"]
    if "HTTPValidationError" in str(responses.get("422")):  # what FastAPI would answer by itself
        del responses["422"]
    content = {kind: {"schema": {"$ref": f"{_REFERENCE}{body.__name__}"}}}
    responses["default"] = {"description": "A problem.", "content": content}
