"""The answers as two CSV files, a row a case and a row an image, which grow case by case and outlive a killed process.

    predictions.csv          written last of a case: what stands here is done
    predictions_images.csv   the images of all cases, those too that could not be used

Rows go to the operating system at once and to the disk every few cases. Whoever opens the files again keeps the cases
that are there whole, drops what was cut off, and goes on. UTF-8 with a byte order mark, which Excel asks for.
"""

import csv
import io
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TextIO

from raymed.config import UserError
from raymed.data.intake.scan import CLOSED
from raymed.results.predict_cases import Case
from raymed.storage import lock, write_atomic

_KEY = ("case", "side", "image", "patient")
_ANSWER = ("num_images", "score", "threshold", "decision", "answer", "uncertain", "reasons")
_ORIGIN = ("model", "version", "bundle", "preprocessing", "run_id", "intended_use", "research_only")
_LATER = ("answer", "run_id", "intended_use", "research_only")  # files of before do not have them
CASE_COLUMNS = (*_KEY, *_ANSWER, *_ORIGIN)
"""num_images: those that the score is of. score: calibrated probability of the positive class, to be compared with
threshold, both to the last digit, which may decide; "" where no image can be used. decision: the class on its side of
the threshold. answer: positive, negative, or abstain where the case is foreign or uncertain, as a server answers
(`Predictor.answer`), or one of its images cannot be read; "" where there is no score. uncertain: yes, no, "" where the
model does not say. reasons: why not to trust the row, separated by "; "."""
IMAGE_COLUMNS = ("case", "side", "patient", "image", "raw_score", "foreign", "problem", "state", "bundle")
"""raw_score: the network's probability, not calibrated. foreign: yes, no, "". problem: why the image was not used.
state: which content of the file it was (`CaseImage.state`)."""
_SYNCED = 16  # cases between two waits for the disk
Row = dict[str, str]


@dataclass(frozen=True)
class Origin:
    """What the answers come from. bundle: sha256 of the model's bundle.json, which holds those of its tensors. run_id:
    of the training. research_only: nobody has released the version for anything else."""

    model: str
    version: str
    bundle: str
    preprocessing: str
    run_id: str
    intended_use: str
    research_only: bool

    def row(self) -> Row:
        """Its columns."""
        one_line = " ".join(self.intended_use.split())
        return asdict(self) | {"intended_use": one_line, "research_only": "yes" if self.research_only else "no"}


@dataclass(frozen=True)
class Answer:
    """Of one case: the columns of `CASE_COLUMNS` and, of each image, of `IMAGE_COLUMNS`, less those of the origin."""

    case: Row
    images: tuple[Row, ...]


class Tables:
    """The two files, open for more; `done`: keys of the cases that stand there (`Case.key`). A context manager."""

    def __init__(self, to: Path, cases: Sequence[Case], origin: Origin):
        """Open the files, or begin them.

        Args:
            to: the file of cases; that of images lies beside it.
            cases: all that are asked for. One that has other images now than when it was answered, or images that could
                not be opened then, is answered again.

        Raises:
            UserError: the file holds something else, or answers of another model or preprocessing; another process is
                at it.
        """
        self.path, self.image_path = to, to.with_name(f"{to.stem}_images{to.suffix}")
        self._origin = origin
        self._cases = cases
        self._unsynced = 0
        self._stack = ExitStack()
        self.done: set[tuple[str, ...]] = set()

    def __enter__(self) -> "Tables":
        with self._stack:
            self._stack.enter_context(lock(self.path.with_name(f".{self.path.name}.lock")))
            self._keep_whole_cases()
            self._case_file, self._image_file = map(self._opened, (self.path, self.image_path))
            self._stack = self._stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._sync()
        self._stack.close()

    def add(self, answer: Answer) -> None:
        """Write one case: its images first, so that a case that is there has them."""
        rows = [row | {"bundle": self._origin.bundle} for row in answer.images]
        for file, text in (
            (self._image_file, _csv(rows, IMAGE_COLUMNS)),
            (self._case_file, _csv([answer.case | self._origin.row()], CASE_COLUMNS)),
        ):
            file.write(text)
            file.flush()
        self._unsynced += 1
        if self._unsynced >= _SYNCED:
            self._sync()

    def _sync(self) -> None:
        for file in (self._image_file, self._case_file):
            os.fsync(file.fileno())
        self._unsynced = 0

    def _opened(self, path: Path) -> TextIO:
        return self._stack.enter_context(path.open("a", encoding="utf-8", newline=""))

    def _keep_whole_cases(self) -> None:
        """Write both files anew with what is whole in them."""
        rows, images = _read(self.path, CASE_COLUMNS), _read(self.image_path, IMAGE_COLUMNS)
        self._check_origin(rows)
        there: dict[tuple[str, ...], set[tuple[str, str]]] = defaultdict(set)
        about_images = any(row["image"] for row in rows)
        for row in images:
            there[_key_of_image(row, about_images)].add((row["image"], row["state"]))
        wanted: dict[tuple[str, ...], set[tuple[str, str]]]
        wanted = {case.key: {(image.name, image.state) for image in case.images} for case in self._cases}
        closed = {_key_of_image(row, about_images) for row in images if row["problem"] == CLOSED} & wanted.keys()
        kept = [row for row in rows if there[key := _key(row)] and there[key] == wanted.get(key, there[key])]
        kept = [row for row in kept if _key(row) not in closed]
        self.done = {_key(row) for row in kept}
        images = [row for row in images if _key_of_image(row, about_images) in self.done]
        write_atomic(self.image_path, _whole(images, IMAGE_COLUMNS))
        write_atomic(self.path, _whole(kept, CASE_COLUMNS))

    def _check_origin(self, rows: Sequence[Row]) -> None:
        for name, what in (("bundle", "another model"), ("preprocessing", "another preprocessing")):
            mine = getattr(self._origin, name)
            if others := {row[name] for row in rows} - {mine}:
                raise UserError(
                    f"{self.path} holds answers of {what} ({others.pop()}, and this is {mine}): name another file with "
                    "--to"
                )


def _key(row: Mapping[str, str]) -> tuple[str, ...]:
    return tuple(row[name] for name in _KEY)


def _key_of_image(row: Mapping[str, str], about_images: bool) -> tuple[str, ...]:
    return _key({**row, "image": row["image"] if about_images else ""})


def _read(path: Path, columns: Sequence[str]) -> list[Row]:
    """The whole rows of a file. Raises UserError where it has other columns."""
    if not path.exists():
        return []
    content = path.read_bytes()
    text = content[: content.rfind(b"\n") + 1].decode("utf-8-sig", errors="replace")  # less a row that was cut off
    header, *rows = [*csv.reader(io.StringIO(text, newline=""))] or [list(columns)]
    if tuple(header) != tuple(columns) and header == [name for name in columns if name not in _LATER]:
        raise UserError(f"{path} is of an earlier version, without {', '.join(_LATER)}: name another file with --to")
    if tuple(header) != tuple(columns) or (content and not text):
        raise UserError(f"{path} is no table of predictions: name another file with --to")
    return [dict(zip(columns, row, strict=True)) for row in rows if len(row) == len(columns)]


def _whole(rows: Sequence[Row], columns: Sequence[str]) -> bytes:
    return (_csv([dict(zip(columns, columns, strict=True))], columns) + _csv(rows, columns)).encode("utf-8-sig")


def _csv(rows: Sequence[Row], columns: Sequence[str]) -> str:
    text = io.StringIO()
    csv.DictWriter(text, columns, lineterminator="\n").writerows(rows)
    return text.getvalue()
