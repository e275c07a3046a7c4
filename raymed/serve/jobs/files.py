"""Images of a job, read as those of a request are: within the same limits, by the same decoders, and of what the model
was made for. What a request would be refused for is a problem of the image.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from raymed.bundle import Bundle
from raymed.data.locations import Location
from raymed.data.readers import ImageFile, ImageProblem, Source, Window, blanked, check_varies
from raymed.results.predict_cases import Case
from raymed.serve.config import Limits
from raymed.serve.contract import check_contract
from raymed.serve.handlers import Upload
from raymed.serve.problems import Problem
from raymed.serve.uploads import File, decode
from raymed.serve.uploads.room import Case as Counted
from raymed.serve.uploads.room import Room


def as_uploads(case: Case, bundle: Bundle, limits: Limits) -> Case:
    """The case with images that are read so; all of them together may have no more pixels than the server holds."""
    counted = Room(limits.held_pixels).case()

    def of(source: Source) -> _Image:
        assert isinstance(source, ImageFile)  # folders and manifests name no others
        return _Image(source, bundle, limits, counted)

    return replace(case, images=tuple(replace(image, source=of(image.source)) for image in case.images))


@dataclass(frozen=True)
class _Image:
    """See `raymed.data.readers.Source`."""

    file: ImageFile
    bundle: Bundle
    limits: Limits
    counted: Counted

    @property
    def path(self) -> Location:
        return self.file.path

    def identity(self) -> tuple[str | int | None, ...]:
        return self.file.identity()

    def at(self, path: Path) -> "_Image":
        return replace(self, file=self.file.at(path))

    def read(self, window: Window | None = None) -> np.ndarray:
        """The pixels. Raises ImageProblem; OSError where the file cannot be read now; Problem (503) where there is no
        memory for it, since an image that is left out may change what is decided about its case."""
        content = _content(self.file.near(), self.limits.body_bytes)
        try:
            pixels = self._upload(content, window).pixels
        except Problem as problem:
            if problem.status == 503:
                raise
            raise ImageProblem(_reason(problem, self.file.frame, self.limits.frames)) from None
        return check_varies(blanked(pixels, self.file.blank)) if self.file.blank else pixels

    def _upload(self, content: bytes, window: Window | None) -> Upload:
        """Of the one frame: where none is named, a file that holds several is refused."""
        frame = self.file.frame
        (upload,) = decode(File(content), 0, self.limits, window, [] if frame is None else [frame], self.counted)
        if upload.frame is None and frame not in (None, 1):
            raise ImageProblem(f"has no frame {frame}")
        check_contract(self.bundle, [upload])
        return upload


def _content(path: Path, most: int) -> bytes:
    if path.is_dir():
        raise ImageProblem("is a folder")
    if not path.is_file():
        raise ImageProblem("there is no such file")
    with path.open("rb") as file:
        content = file.read(most + 1)
    if not content:
        raise ImageProblem("the file is empty (0 bytes)")
    if len(content) > most:
        raise ImageProblem(f"a file of at most {most} bytes is expected")
    return content


def _reason(problem: Problem, frame: int | None, most: int) -> str:
    """Without the place in a request."""
    if problem.field == "frames" and frame is None:
        return f"holds several frames: name one, from 1, in the column frame; of a folder's file up to {most} are taken"
    if problem.field == "frames":
        return f"has no frame {frame}"
    return problem.detail.removeprefix("files[0]").lstrip(".: ")
