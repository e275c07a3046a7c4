"""The Open Inference Protocol, version 2, as KServe and Triton speak it, with tensors in JSON or binary.

    GET  /v2   /v2/health/live   /v2/health/ready   /v2/models/NAME[/versions/V][/ready]
    POST /v2/models/NAME[/versions/V]/infer

One request is one case, as in every other protocol here, and answers what `:predict` answers. Inputs:

    image    BYTES (N): files, in JSON as base64; or pixels UINT8, UINT16 or FP32 (N, H, W), (N, H, W, 1) or
             (N, H, W, 3). FP32 is from 0 to 1, and counted in 16 bits.
    others   whatever else a request may say: a tensor of that name or, of one value, a parameter of the request

Inputs and outputs follow from the `Fields` and the `Result` of a kind's handler (`raymed.serve.tensor_forms`): a kind
that is added needs nothing here. A request that names no outputs gets those that hold something.
"""

import json
import math
from collections.abc import Sequence
from importlib.metadata import version as installed
from typing import Any

import numpy as np
from fastapi import APIRouter, Request, Response
from pydantic import ConfigDict, Field, StrictBool, ValidationError
from starlette.concurrency import run_in_threadpool

from raymed.serve.described import Described
from raymed.serve.handlers import Handler, Upload
from raymed.serve.live import Live
from raymed.serve.problems import OIP, OipError, Problem, busy, of_validation
from raymed.serve.routes.predict import PATIENT, no_constant, plain_fields
from raymed.serve.service import Answer, Service
from raymed.serve.tensor_forms import Form, input_forms, output_forms
from raymed.serve.tensors import SIZE, TensorIn, TensorOut, content_of, read_tensors, text_of, written
from raymed.serve.uploads import File

OPEN = ("/v2/health/live", "/v2/health/ready")
HEADER_LENGTH = "Inference-Header-Content-Length"
"""Of requests and answers with binary data: bytes of the JSON that they begin with."""
IMAGE, IMAGE_DATATYPES = "image", ("BYTES", "UINT8", "UINT16", "FP32")
_IMAGE_FORMS = "BYTES (N): files; or UINT8, UINT16 or FP32 (N, H, W), (N, H, W, 1) or (N, H, W, 3): pixels"
_BINARY = "binary_data_output"
_HINTS = (_BINARY, "priority", "timeout")
"""Parameters of a request that are no fields of a model; only the first is heeded."""
_VALUES, _OBJECTS = 2048 * 2048 + 100_000, 100_000
"""Of a request in JSON: as many values as an image of 2048 x 2048 pixels has, which are numbers; objects cost more."""


class OutputParameters(Described):
    """How an output comes."""

    model_config = ConfigDict(extra="forbid")

    binary_data: StrictBool | None = None
    """As bytes after the JSON; null: as binary_data_output says."""


class OutputAsked(Described):
    """An output that a request wants."""

    name: str
    parameters: OutputParameters = OutputParameters()


class InferRequest(Described):
    """The JSON of a request."""

    id: str | None = Field(default=None, max_length=1024)
    """Stands in the answer again."""
    parameters: dict[str, Any] = {}
    """binary_data_output: whether outputs come as bytes; fields of the model that have one value."""
    inputs: list[TensorIn] = Field(max_length=64)
    outputs: list[OutputAsked] = Field(default=[], max_length=256)
    """Those that are wanted; none = all that hold something."""


class InferResponse(Described):
    """The JSON of an answer."""

    model_name: str
    model_version: str
    id: str | None = None
    parameters: dict[str, Any]
    """Run, bundle, preprocessing, intended use and whether the model is for research only."""
    outputs: list[TensorOut]


def router(service: Service) -> APIRouter:
    """/v2/..."""
    errors: dict[int | str, dict[str, Any]] = {status: {"model": OipError} for status in (404, 503)}
    refusals: dict[int | str, dict[str, Any]] = errors | {s: {"model": OipError} for s in (413, 415, 422, 429)}
    routes = APIRouter(prefix=OIP, tags=["open inference protocol"])

    @routes.get("")
    async def server() -> dict[str, Any]:
        """Name, version and extensions."""
        return {"name": "raymed", "version": installed("raymed"), "extensions": ["binary_tensor_data", "parameters"]}

    @routes.get("/health/live")
    async def live() -> dict[str, bool]:
        """The process answers."""
        return {"live": True}

    @routes.get("/health/ready", responses={503: {"description": "not ready"}})
    async def ready(response: Response) -> dict[str, bool]:
        """Every model is loaded, and the device computes."""
        is_ready = service.is_ready
        response.status_code = 200 if is_ready else 503
        return {"ready": is_ready}

    @routes.get("/models/{name}", responses=errors)
    @routes.get("/models/{name}/versions/{version}", responses=errors)
    async def model(name: str, version: str = "") -> dict[str, Any]:
        """Inputs and outputs."""
        return metadata(_live(service, name, version))

    @routes.get("/models/{name}/ready", responses=errors)
    @routes.get("/models/{name}/versions/{version}/ready", responses=errors)
    async def model_ready(name: str, version: str = "") -> dict[str, Any]:
        """The model is loaded, and the device computes."""
        live = _live(service, name, version)
        if not service.engine.computes:
            raise busy("the device does not compute", retry_after=10)
        return {"name": live.name, "ready": True}

    @routes.post("/models/{name}/infer", response_model=InferResponse, responses=refusals)
    @routes.post("/models/{name}/versions/{version}/infer", response_model=InferResponse, responses=refusals)
    async def infer(name: str, request: Request, version: str = "") -> Response:
        """One answer for one case."""
        patient = "" if version else request.headers.get(PATIENT, "")
        handler = _live(service, name, version, patient).handler
        body, length = await request.body(), request.headers.get(HEADER_LENGTH)
        asked, files, fields = await run_in_threadpool(_read, body, length, handler, service)
        answer = await service.predict(name, files, fields, patient, champion=bool(version))
        if version and answer.version != version:
            raise Problem(404, f"this version of {name} is no longer in use", field="version")
        return await run_in_threadpool(_response, asked, answer, output_forms(handler.Result))

    return routes


def metadata(live: Live) -> dict[str, Any]:
    """Of a model in use, as the protocol has it. Inputs have the parameter optional."""
    handler = live.handler
    image = {
        "name": IMAGE,
        "datatype": "BYTES",
        "shape": [-1],
        "parameters": {
            "optional": not handler.needs_image,
            "pixels": "or UINT8, UINT16 or FP32 (0 to 1) of shape [-1, -1, -1] or [-1, -1, -1, 3]",
        },
    }
    fields = [
        form.described(optional=True, **({"content": "JSON"} if form.is_json else {}))
        for form in input_forms(handler.Fields).values()
    ]
    return {
        "name": live.name,
        "versions": [live.origin.version] if live.origin.version else [],
        "platform": f"raymed_{handler.bundle.kind}",
        "inputs": [image, *fields],
        "outputs": [form.described() for form in output_forms(handler.Result).values()],
        "parameters": _identity(live.identity),
    }


def _identity(described: dict[str, Any]) -> dict[str, Any]:
    names = ("run_id", "bundle", "preprocessing", "intended_use", "research_only")
    return {name: described[name] for name in names}


def _live(service: Service, name: str, version: str, patient: str = "") -> Live:
    """What answers. Raises Problem (404) for a version that is not in use."""
    live = service.models.get(name, patient)
    if version and version != live.origin.version:
        which = f"version {live.origin.version}" if live.origin.version else "one without a number"
        raise Problem(404, f"this version of {name} is not in use: {which} is", field="version")
    return live


def _read(
    body: bytes, length: str | None, handler: Handler, service: Service
) -> tuple[InferRequest, list[File | Upload], dict[str, Any]]:
    """What is asked, the images of the case, and the handler's fields. In a thread: bodies may be long. Raises Problem
    (413, 422)."""
    asked, binary = _parsed(body, length)
    tensors = read_tensors(asked.inputs, binary)
    forms = input_forms(handler.Fields)
    for place, tensor in enumerate(asked.inputs):
        if tensor.name != IMAGE and tensor.name not in forms:
            where = f"inputs.{place}.name"
            raise Problem(422, f"{where}: one of {', '.join([IMAGE, *forms])} is expected", field=where)
    if set(asked.parameters) - {*forms, *_HINTS}:
        raise Problem(422, f"parameters: at most {', '.join([*forms, *_HINTS])} are expected", field="parameters")
    known = output_forms(handler.Result)
    if any(output.name not in known for output in asked.outputs):
        raise Problem(422, f"outputs: names among {', '.join(known)} are expected", field="outputs")
    if not isinstance(asked.parameters.get(_BINARY, False), bool):
        raise Problem(422, f"parameters: {_BINARY} is expected to be true or false", field="parameters")
    datatype = next((tensor.datatype for tensor in asked.inputs if tensor.name == IMAGE), "BYTES")
    images = _images(tensors.pop(IMAGE), datatype, service) if IMAGE in tensors else []
    if not images and handler.needs_image:
        raise Problem(422, f"inputs: {IMAGE} is expected, of {_IMAGE_FORMS}", field="inputs")
    fields = {name: _plain_value(name, array) for name, array in tensors.items()}
    return asked, images, _parameters(asked.parameters) | fields


def _parsed(body: bytes, length: str | None) -> tuple[InferRequest, memoryview]:
    """The JSON and what comes after it. Raises Problem (413, 422)."""
    end = len(body)
    if length is not None:
        if not (length.isascii() and length.isdigit() and len(length) < 16 and int(length) <= len(body)):
            detail = f"{HEADER_LENGTH}: the number of bytes of the JSON is expected"
            raise Problem(422, detail, field=HEADER_LENGTH)
        end = int(length)
    if body.count(b",", 0, end) > _VALUES or body.count(b"{", 0, end) > _OBJECTS:
        most = f"JSON of at most {_VALUES} values is expected, {_OBJECTS} of them objects"
        raise Problem(413, f"{most}; pixels may come as binary data", field="body")
    try:
        return InferRequest.model_validate(json.loads(body[:end], parse_constant=no_constant)), memoryview(body)[end:]
    except ValidationError as error:
        raise of_validation(error.errors()) from None
    except (ValueError, RecursionError):
        raise Problem(422, 'JSON is expected, {"inputs": [...], ...}', field="body") from None


def _images(tensor: np.ndarray, datatype: str, service: Service) -> list[File | Upload]:
    """Files, or images that need no decoding. Raises Problem (413, 422, 503)."""
    limits = service.config.limits
    if datatype not in IMAGE_DATATYPES:
        raise Problem(422, f"{IMAGE}: one of {', '.join(IMAGE_DATATYPES)} is expected", field=IMAGE)
    if len(tensor.shape) and len(tensor) > limits.files:
        raise Problem(413, f"{IMAGE}: at most {limits.files} make a case", field=IMAGE)
    if datatype == "BYTES":
        return [File(content_of(element, IMAGE)) for element in tensor.ravel()]
    if tensor.ndim not in (3, 4) or (tensor.ndim == 4 and tensor.shape[3] not in (1, 3)) or not tensor.size:
        raise Problem(422, f"{IMAGE}: shape (N, H, W), (N, H, W, 1) or (N, H, W, 3) is expected", field=IMAGE)
    if tensor.shape[1] * tensor.shape[2] > limits.pixels:
        raise Problem(413, f"{IMAGE}: at most {limits.pixels} pixels (height x width) are expected", field=IMAGE)
    if tensor.ndim == 4 and tensor.shape[3] == 1:
        tensor = tensor[..., 0]
    service.room.case().count(math.prod(tensor.shape[:3]))
    return [_held(pixels, place, service) for place, pixels in enumerate(tensor)]


def _held(pixels: np.ndarray, place: int, service: Service) -> Upload:
    """One image, whose pixels are counted as those of decoded ones are."""
    with service.room.taken(pixels.shape[0] * pixels.shape[1]) as hold:
        if pixels.dtype == np.float32:
            if not (np.isfinite(pixels).all() and pixels.min() >= 0 and pixels.max() <= 1):
                raise Problem(422, f"{IMAGE}: FP32 from 0 to 1 is expected", field=IMAGE)
            pixels = np.round(65535 * pixels.astype(np.float64)).astype(np.uint16)
        return Upload(hold(pixels.copy()), place)


def _parameters(given: dict[str, Any]) -> dict[str, Any]:
    """Fields among the parameters; text that is JSON is what it says, as in a form."""
    fields = {name: value for name, value in given.items() if name not in _HINTS}
    return fields | plain_fields((name, value) for name, value in fields.items() if isinstance(value, str))


def _plain_value(name: str, array: np.ndarray) -> Any:
    """As a form would have brought it: one value, or a list of several."""
    if array.dtype == object:
        return plain_fields((name, text_of(element, name)) for element in array.ravel()).get(name, [])
    values = array.ravel().tolist()
    return values[0] if len(values) == 1 else values


def _response(asked: InferRequest, answer: Answer, forms: dict[str, Form]) -> Response:
    said = answer.result | {"decision": answer.decision, "reasons": answer.reasons}
    by_default = asked.parameters.get(_BINARY, False)
    if asked.outputs:
        wanted = [(forms[each.name], each.parameters.binary_data) for each in asked.outputs]
        arrays = [(form, form.array(said), by_default if binary is None else binary) for form, binary in wanted]
    else:
        arrays = [(form, form.array(said), by_default) for form in forms.values()]
        arrays = [(form, array, binary) for form, array, binary in arrays if not form.is_missing(array)]
    outputs = [written(form.name, form.datatype, array, binary) for form, array, binary in arrays]
    described = {
        "model_name": answer.model,
        "model_version": answer.version,
        **({} if asked.id is None else {"id": asked.id}),
        "parameters": _identity(answer.model_dump()),
        "outputs": [tensor for tensor, _ in outputs],
    }
    return _on_the_wire(json.dumps(described).encode(), [content for _, content in outputs], outputs)


def _on_the_wire(head: bytes, contents: Sequence[bytes], outputs: Sequence[tuple[dict[str, Any], bytes]]) -> Response:
    if not any(SIZE in tensor.get("parameters", {}) for tensor, _ in outputs):
        return Response(head, media_type="application/json")
    headers = {HEADER_LENGTH: str(len(head))}
    return Response(b"".join([head, *contents]), media_type="application/octet-stream", headers=headers)
