"""POST /v1/models/NAME/studies: a study as STOW-RS sends it (PS3.18, 10.5), and what the model makes of it as DICOM.

A STOW-RS client stores instances at BASE/studies; BASE is /v1/models/NAME here, since which model is asked belongs to
the address and not into the standard's query. Nothing is stored: the answer is the response, in the form that `Accept`
names:

    multipart/related; type="application/dicom"   the results, report first, as WADO-RS would return them (the default)
    application/dicom+json                        STOW-RS's own response: which instances were accepted, which were not
                                                  and why, and the answer as JSON in the private element (0099,xx01) of
                                                  the creator RAYMED; for clients that know no other
    application/json                              the answer, as :predict gives it

?results=report&results=overlay&results=segmentation chooses objects (report and overlay unless told otherwise),
?before=SERIES/INSTANCE, once or more, names earlier reports that the new one takes the place of; what else stands in
the query are fields of the model. Instances that are no images, that this server made itself, or that the model was
not made for, where there are others, are left out: a study holds more than a model is asked about. For one that cannot
be read, or an image without its UIDs, the study is refused, since nobody would know that the answer is about the others
alone; only application/dicom+json, which names it as not accepted, answers all the same.
"""

import asyncio
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from fastapi import APIRouter, Request, Response

from raymed.config import UserError, check_choice
from raymed.serve.contract import check_contract
from raymed.serve.dicom.classes import image_classes
from raymed.serve.dicom.multipart import DICOM, read_related, write_related
from raymed.serve.dicom.objects import KINDS, Kind, objects, pictures_size, predecessor, regions_of, to_bytes
from raymed.serve.dicom.provenance import Case, damaged, is_own, sound
from raymed.serve.handlers import Handler, Upload
from raymed.serve.problems import OutOfMemory, Problem, TooLarge, documented
from raymed.serve.routes.predict import plain_fields
from raymed.serve.service import Answer, Answered, Service
from raymed.serve.uploads import File
from raymed.serve.uploads.dicom import Counted, check_transfer_syntax
from raymed.serve.uploads.room import Room

if TYPE_CHECKING:
    from pydicom import Dataset

_DICOM_JSON = "application/dicom+json"
_RELATED = f'multipart/related; type="{DICOM}"'
_REFUSED, _NOT_UNDERSTOOD = 0x0122, 0xC000
"""Failure reasons of instances (PS3.18, table I.2-2): no class that is taken here, and cannot be understood."""
_NO_MAPS = "no heat maps: the case is too large to be explained in the time or memory that there is"
_UIDS = ("SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID")
_TAGS = (
    "SOPClassUID",
    *_UIDS,
    "PatientID",
    "Modality",
    "BodyPartExamined",
    "Manufacturer",
)


def router(service: Service) -> APIRouter:
    """/v1/models/NAME/studies, and the same with the UID of the study."""
    routes = APIRouter(prefix="/v1/models", tags=["dicomweb"])
    refused = documented(404, 409, 413, 415, 422, 429, 503)
    refused[406] = refused[404] | {"description": "no such form of answer"}
    answers = {"description": "the results", "content": dict.fromkeys((_RELATED, _DICOM_JSON, "application/json"), {})}
    binary = {"schema": {"type": "string", "format": "binary"}}
    taken = {"requestBody": {"required": True, "content": dict.fromkeys((_RELATED, DICOM), binary)}}
    about: dict[str, Any] = {
        "response_class": Response,
        "responses": refused | {200: answers, 202: answers | {"description": "some instances were left out"}},
        "openapi_extra": taken,
    }

    @routes.post("/{name}/studies", **about)
    async def studies(name: str, request: Request) -> Response:
        """The results for a study."""
        return await _answer(service, name, request)

    @routes.post("/{name}/studies/{study}", **about)
    async def one_study(name: str, study: str, request: Request) -> Response:
        """The same, for instances of that study alone (409 for others)."""
        return await _answer(service, name, request, study)

    return routes


@dataclass(frozen=True)
class _Instance:
    """What came. header: empty where it cannot be read. failure: reason why it is left out, or 0. lacks: the UID that
    an image is not named by. problem: why it cannot be read."""

    content: bytes
    header: "Dataset"
    failure: int
    lacks: str = ""
    problem: Problem | None = None


async def _answer(service: Service, name: str, request: Request, study: str = "") -> Response:
    accept = _accepted(request.headers.get("accept", ""))
    fields = plain_fields(request.query_params.multi_items())
    kinds = _kinds(fields.pop("results", list(KINDS[:2])))
    before = [text for text in request.query_params.getlist("before") if text]
    fields.pop("before", None)
    parts = await asyncio.to_thread(read_related, await request.body(), request.headers.get("content-type", ""))
    found = await asyncio.to_thread(lambda: [_instance(part) for part in parts])
    patient = _patient(found)
    handler = service.models.get(name, patient).handler
    instances = await asyncio.to_thread(_fitting, found, handler)
    if study and any(each.header.get("StudyInstanceUID", study) != study for each in instances):
        raise Problem(409, "the instances are of another study than the address says", field="study")
    used = [each for each in instances if not each.failure]
    if not used:
        raise _nameless(instances) or Problem(422, "DICOM images are expected: no instance is one", field="body")
    if accept != _DICOM_JSON and (problem := _unreadable(instances) or _nameless(instances)):
        raise problem
    if len({each.header.StudyInstanceUID for each in used}) > 1:
        raise Problem(422, "the instances are of several studies: send each study by itself", field="body")
    notes: list[str] = []
    if accept == DICOM and set(kinds) != {"report"}:
        answered, notes = await _explained(service, name, used, fields, patient, kinds)
    else:
        answered = await _asked(service, name, used, fields, patient)
    if accept == "application/json":
        return Response(answered.answer.model_dump_json(), media_type=accept)
    if accept == _DICOM_JSON:
        status = 202 if len(used) < len(instances) else 200
        return Response(_store_response(instances, answered.answer), status, media_type=accept)
    if answered.answer.decision is None and not hasattr(answered.handler, "regions"):
        raise Problem(422, f"{name} decides nothing that a report could say: ask for application/json", field="Accept")
    try:
        return await asyncio.to_thread(_results, service.room, answered, kinds, before, notes)
    except UserError:
        raise
    except (AttributeError, IndexError, KeyError, TypeError, ValueError):  # whose text may hold what a header says
        detail = "no DICOM can be written: a header lacks, or damages, what a result takes over"
        raise Problem(422, detail, field="body") from None


def _unreadable(instances: Sequence[_Instance]) -> Problem | None:
    """Why the first instance that cannot be read is not, which may be an image of the case."""
    for place, each in enumerate(instances):
        if each.problem is not None:
            field = f"files[{place}]"
            return Problem(each.problem.status, f"{field}: {each.problem.detail}", field=field)
    return None


def _nameless(instances: Sequence[_Instance]) -> Problem | None:
    """What the first image that lacks a UID lacks."""
    for place, each in enumerate(instances):
        if each.lacks:
            field = f"files[{place}].{each.lacks}"
            return Problem(422, f"{field}: a UID is expected, since results name their images", field=field)
    return None


def _patient(instances: Sequence[_Instance]) -> str:
    """Who the first image is of; "" where there is none."""
    first = next((each.header for each in instances if not each.failure), None)
    return "" if first is None else str(first.get("PatientID") or first.StudyInstanceUID)


async def _asked(
    service: Service, name: str, used: Sequence[_Instance], fields: dict[str, Any], patient: str
) -> Answered:
    return await service.answered(name, [File(each.content) for each in used], fields, patient)


async def _explained(
    service: Service,
    name: str,
    used: Sequence[_Instance],
    fields: dict[str, Any],
    patient: str,
    kinds: Sequence[Kind],
) -> tuple[Answered, list[str]]:
    """With heat maps by the first method that the patient's model knows, unless the request names one. A case that is
    too large to be explained, in the time or memory that there is, is asked about once more, without, and the report,
    where there is one, says so. A server that is busy is to be asked again by the sender, who then gets the maps."""
    methods = service.models.get(name, patient).handler.about().get("explain") or []
    if "explain" in fields or not methods:
        more = {"explain_as": "array"} if "explain" in fields else {}
        return await _asked(service, name, used, fields | more, patient), []
    more = {"explain": methods[0], "explain_as": "array"}
    try:
        return await _asked(service, name, used, fields | more, patient), []
    except (TooLarge, OutOfMemory) as problem:
        if problem.field != "explain" or "report" not in kinds:
            raise
    return await _asked(service, name, used, fields, patient), [_NO_MAPS]


class _Results(Response):
    """DICOM files. taken: the room for them, which is given back with the response, once it is sent."""

    def __init__(self, files: Iterable[bytes], taken: np.ndarray):
        body, kind = write_related(files)
        super().__init__(body, headers={"Content-Type": kind})
        self.taken = taken


def _results(
    room: Room, answered: Answered, kinds: Sequence[Kind], before: Sequence[str], notes: Sequence[str]
) -> Response:
    """Its pictures get half the room for pixels, or what the images leave of it, so that what fits by itself does not
    wait for ever."""
    for image in answered.images:
        for keyword in damaged(image.header):
            field = f"files[{image.file}].{keyword}"
            raise Problem(422, f"{field}: a value as the standard has it is expected, for the results", field=field)
    handler = answered.handler
    case = Case(answered.answer, sound(answered.images), handler.about().get("positive"))
    regions = regions_of(case, handler)
    images = sum(image.pixels.shape[0] * image.pixels.shape[1] for image in case.images)
    most = min(room.pixels // 2, room.pixels - images)
    with room.taken(min(most, pictures_size(case, kinds, regions))) as hold:
        replaced = [predecessor(case.first, each) for each in before]
        made = objects(case, kinds, regions, replaced, most, notes)
        made.reverse()
        files = (to_bytes(made.pop()) for _ in range(len(made)))  # none stays in memory beside its file
        return _Results(files, hold(np.empty(0)))


def _fitting(found: list[_Instance], handler: Handler) -> list[_Instance]:
    """Each with why it is left out. One that the model was not made for is, where there are others."""
    fits = [not each.failure and _fits(each.header, handler) for each in found]
    if not any(fits):
        return found
    return [
        each if fit else replace(each, failure=each.failure or _REFUSED) for each, fit in zip(found, fits, strict=True)
    ]


def _instance(content: bytes) -> _Instance:
    from pydicom import Dataset, dcmread

    problem = Problem(422, "damaged or cut short, its header cannot be read")
    try:
        check_transfer_syntax(content)
        header = dcmread(Counted(content), stop_before_pixels=True, specific_tags=list(_TAGS))
        is_image = header.SOPClassUID in image_classes() and not is_own(header)
        lacks = next((name for name in _UIDS if not (header.get(name) and isinstance(header.get(name), str))), "")
    except Exception as error:  # a parser raises anything at all on damaged data
        if _states_no_image(content):
            return _Instance(content, Dataset(), _REFUSED)
        return _Instance(content, Dataset(), _NOT_UNDERSTOOD, problem=error if isinstance(error, Problem) else problem)
    return _Instance(content, header, 0 if is_image and not lacks else _REFUSED, lacks if is_image else "")


def _states_no_image(content: bytes) -> bool:
    """Whether a file whose data set cannot be read says before it that it holds something else, such as a report."""
    from pydicom.filereader import read_dataset

    file = Counted(content)
    file.seek(132)
    try:
        meta = read_dataset(file, False, True, stop_when=lambda tag, vr, length: tag >> 16 != 2)
        kind = meta.get("MediaStorageSOPClassUID")
    except Exception:  # as above
        return False
    return isinstance(kind, str) and bool(kind) and kind not in image_classes()


def _fits(header: "Dataset", handler: Handler) -> bool:
    try:
        check_contract(handler.bundle, [Upload(np.empty((0, 0)), kind="DICOM", header=header)])
    except Problem:
        return False
    return True


def _store_response(instances: Sequence[_Instance], answer: Answer) -> str:
    """Store Instances Response Module (PS3.18, table I.1-1), with the answer in a private element."""
    from pydicom import Dataset

    def item(instance: _Instance) -> Dataset:
        told = Dataset()
        told.ReferencedSOPClassUID = instance.header.get("SOPClassUID", "")
        told.ReferencedSOPInstanceUID = instance.header.get("SOPInstanceUID", "")
        if instance.failure:
            told.FailureReason = instance.failure
        else:
            told.RetrieveURL = ""
        return told

    response = Dataset()
    response.RetrieveURL = ""  # nothing is stored, so nothing can be retrieved
    response.ReferencedSOPSequence = [item(each) for each in instances if not each.failure]
    if failed := [item(each) for each in instances if each.failure]:
        response.FailedSOPSequence = failed
    response.private_block(0x0099, "RAYMED", create=True).add_new(0x01, "UT", answer.model_dump_json())
    return response.to_json()


def _accepted(accept: str) -> str:
    """Which of the three forms is asked for. Raises Problem (406)."""
    kinds = [part.partition(";")[0].strip().lower() for part in accept.split(",")]
    for kind in kinds:
        if kind in (_DICOM_JSON, "application/json"):
            return kind
        if kind in ("", "*/*", "multipart/*", "multipart/related", DICOM):
            return DICOM
    raise Problem(406, f"{_RELATED}, {_DICOM_JSON} or application/json is answered", field="Accept")


def _kinds(told: Any) -> list[Kind]:
    kinds = told if isinstance(told, list) else [told]
    for kind in kinds:
        check_choice("results", kind, KINDS)
    return kinds
