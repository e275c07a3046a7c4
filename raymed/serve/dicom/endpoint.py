"""The HTTP server that a node asks, and what a study is told where it refuses."""

import ssl
from collections.abc import Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from raymed.serve.dicom.multipart import DICOM, read_related, related_of_files

if TYPE_CHECKING:
    import httpx
    from pydicom import Dataset

_STUDY = (400, 409, 413, 415, 422)
"""What is wrong with the study itself, however often it is sent."""
_WHOLE = (401, 403, 404, 429, 503)
"""What is wrong for every study."""
_STANDS = "An earlier report of this study, about fewer images, stands"
_NO_TOKEN = "a valid token is expected in --token-file or RAYMED_NODE_TOKEN; jobs/serve_tokens.py add NAME makes one"


class NotNow(Exception):
    """No answer yet. The text is for the log. after: seconds that the server asks for, if any. everybody: whether other
    studies would fare the same."""

    def __init__(self, reason: str, after: float | None = None, everybody: bool = True):
        super().__init__(reason)
        self.after, self.everybody = after, everybody


@dataclass(frozen=True)
class Results:
    """What a study is told, as files, the report first. is_refusal: it is that the study cannot be used."""

    files: "list[bytes]"
    is_refusal: bool = False


@dataclass
class Endpoint:
    """A model behind an HTTP server. results: which objects are wanted. ca: certificate of the authority that an https
    server is checked by; None = the system's."""

    url: str
    model: str
    token: str = ""
    results: Sequence[str] = ("report", "overlay")
    timeout_s: float = 120.0
    ca: Path | None = None
    _client: "httpx.Client | None" = field(default=None, repr=False)

    def ask(self, files: Sequence[Path], before: str = "", refusal: str = "") -> Results:
        """The results for the images of a study, which take the place of earlier ones (see `queue.Study`).

        A study that cannot be used gets a report that says so: in an archive, silence looks like a model that has not
        seen the study yet, and a reader would wait, or take it for a negative. It takes the place of a refusal alone:
        what the model has found in fewer images still holds. Raises NotNow, also where no such report can be made.
        """
        body, headers = related_of_files(files)
        replaced = [report for report in (before, refusal) if report]
        query: dict[str, Any] = {"results": list(self.results), "before": replaced}
        accept = f'multipart/related; type="{DICOM}"'
        found = self._send("POST", "/studies", content=body, params=query, headers=headers | {"Accept": accept})
        if found.status_code in _STUDY:
            try:
                return Results([self._refused(files, _detail(found), before, refusal)], is_refusal=True)
            except NotNow:
                raise
            except Exception as error:  # a log has to say what the archive is not told; whose text might name somebody
                why = f"HTTP {found.status_code}: {_detail(found)}; no report can say so ({type(error).__name__})"
                raise NotNow(why, everybody=False) from None
        return Results(read_related(found.content, found.headers["content-type"]))

    def _refused(self, files: Sequence[Path], why: str, before: str, refusal: str) -> bytes:
        from pydicom import dcmread

        from raymed.serve.dicom.objects import predecessor, to_bytes
        from raymed.serve.dicom.provenance import Case, sound
        from raymed.serve.dicom.report import report
        from raymed.serve.handlers import Upload
        from raymed.serve.service import Answer

        which = "the study with its later images" if before else "the images"
        reasons = [f"The model has not looked at {which}: {why}", *([_STANDS] if before else [])]
        about = self._send("GET", "").json()
        told = {name: about[name] for name in Answer.model_fields if name in about}
        answer = Answer(**told, decision=None, reasons=reasons, result={})
        nothing = np.zeros((1, 1), np.uint8)
        headers = [dcmread(file, stop_before_pixels=True) for file in files]
        case = Case(answer, sound([Upload(nothing, place, header=header) for place, header in enumerate(headers)]))
        return to_bytes(report(case, [predecessor(case.first, refusal)] if refusal else []))

    def _send(self, method: str, path: str, **what: Any) -> "httpx.Response":
        """A response that is an answer or says what is wrong with the study. Raises NotNow for any other."""
        import httpx

        if self._client is None:
            bearer = {"Authorization": f"Bearer {self.token}"} if self.token else {}
            trusted = True if self.ca is None else ssl.create_default_context(cafile=str(self.ca))
            self._client = httpx.Client(timeout=self.timeout_s, headers=bearer, trust_env=False, verify=trusted)
        try:
            found = self._client.request(method, f"{self.url.rstrip('/')}/v1/models/{self.model}{path}", **what)
        except httpx.TimeoutException:
            raise NotNow("no answer in time", everybody=False) from None
        except httpx.HTTPError as error:
            raise NotNow(f"the endpoint is not there ({type(error).__name__})") from None
        if found.is_success or (found.status_code in _STUDY and method == "POST"):
            return found
        after = found.headers.get("retry-after", "")
        seconds = float(after) if after.isdecimal() else None
        detail = _NO_TOKEN if found.status_code == 401 else _detail(found)
        raise NotNow(f"HTTP {found.status_code}: {detail}", seconds, found.status_code in _WHOLE)


def identity_of_report(content: bytes) -> str:
    """ "SERIES/INSTANCE" of an object."""
    header = header_of(content)
    return f"{header.SeriesInstanceUID}/{header.SOPInstanceUID}"


def header_of(content: bytes) -> "Dataset":
    """What a DICOM file says before its pixels."""
    from pydicom import dcmread

    return dcmread(BytesIO(content), stop_before_pixels=True)


def _detail(found: "httpx.Response") -> str:
    try:
        return str(found.json()["detail"])[:500]
    except (ValueError, KeyError, TypeError):
        return found.reason_phrase
