"""The cases that a model is asked about: of a manifest, or of a folder as it comes off a share.

A manifest names cases and patients, and they are called as it calls them. A folder's DICOM objects are put together by
their study, its pictures by the folder they lie in, and every name is a pseudonym under the key of `import_data`, so
that the answers name nobody and `whois` takes them back.
"""

import fnmatch
import functools
import hashlib
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Literal

import numpy as np

from raymed.config import UserError, check_choice
from raymed.data.intake.header import DAMAGED, EMPTY, Found, describe, normal
from raymed.data.intake.pseudonyms import Pseudonyms, default_key_file, load_key, vault_of
from raymed.data.intake.scan import CLOSED, Silent, is_foreign, patiently, scan
from raymed.data.intake.text_regions import text_boxes
from raymed.data.locations import Location, Version, as_location, versions
from raymed.data.manifest import DataConfig, check_there, read_table, usable_rows
from raymed.data.problems import rows_text
from raymed.data.readers import ImageFile, ImageProblem, Source, Window, blanked, check_varies
from raymed.data.regions import BOX_FORMAT, parse_boxes
from raymed.metrics.levels import Level
from raymed.storage import storage_folder

_PLAIN_REASONS = ("truncated or damaged", "cannot be decoded")


@dataclass(frozen=True)
class ImageFolder:
    """Images without a manifest."""

    images: Path | None = None
    """Folder of images (DICOM, PNG, JPEG, TIFF, NIfTI), with all folders below it, in place of a manifest."""
    key: str = "StudyInstanceUID"
    """What the images of one case have in common: a keyword of DICOM, or path, name or stem of the file. With the --key
    of an import, cases get the pseudonyms that the import gave them. An image without it belongs to its folder."""
    files: tuple[str, ...] = ("*",)
    """Only files whose path matches one of these."""
    modalities: tuple[str, ...] = ()
    """Images of other modalities are listed, but not used; none = all are used."""
    frames: Literal["first", "middle", "last", "all"] = "middle"
    """Which frames of an object with several are used, as in the import of the training images."""
    blank: str = "found"
    """What is painted black, as in the import of the training images: found (what looks like text), none, or
    "x0 y0 x1 y1;..." in pixels."""
    key_file: Path | None = None
    """The key of the pseudonyms; None = ~/.config/raymed/pseudonyms.key. It is made where there is none."""

    def __post_init__(self) -> None:
        check_choice("frames", self.frames, ("first", "middle", "last", "all"))
        if self.blank not in ("found", "none") and not parse_boxes(self.blank):
            raise UserError(f"blank must be found, none or {BOX_FORMAT}, got {self.blank!r}")


@dataclass(frozen=True)
class CaseImage:
    """One image to be scored. name: what it is called in the answers. problem: why it is not used, "" where it is.
    without_text: what looks like text is painted black. state: tells the file as it is now, and what is painted black
    in it, from what had its name before."""

    name: str
    source: Source
    problem: str = ""
    without_text: bool = False
    state: str = ""

    def read(self, window: Window | None) -> np.ndarray:
        """The pixels, as `raymed.data.readers.read` gives them.

        Raises ImageProblem, with a reason that repeats nothing of the file; OSError where it cannot be read now.
        """
        if self.problem:
            raise ImageProblem(self.problem)
        try:
            pixels = self.source.read(window)
        except PermissionError as error:
            raise ImageProblem(CLOSED) from error
        except ImageProblem as problem:
            plain = (why for why in _PLAIN_REASONS if str(problem).startswith(why))
            raise ImageProblem(next(plain, str(problem))) from problem
        return check_varies(blanked(pixels, text_boxes(_grey(pixels)))) if self.without_text else pixels


@dataclass(frozen=True)
class Case:
    """The images that one decision is about. case, side, patient: their names, "" where the decision is not about such,
    or nobody states it. image: of a model that decides about images, its name."""

    case: str
    side: str
    image: str
    patient: str
    images: tuple[CaseImage, ...]

    @property
    def key(self) -> tuple[str, str, str, str]:
        """Tells cases apart."""
        return self.case, self.side, self.image, self.patient


@dataclass(frozen=True)
class Asked:
    """cases: in the order of the manifest, or of the files. notes: what the user is to know, without identifiers.
    settings: what beside the model decides the scores."""

    cases: list[Case]
    notes: list[str] = field(default_factory=list)
    settings: str = ""


@dataclass(frozen=True)
class _Named:
    """An image, and what it is of."""

    case: str
    side: str
    patient: str
    image: CaseImage


def manifest_cases(config: DataConfig, level: Level) -> Asked:
    """The cases of a manifest; it needs no labels.

    Args:
        level: what a decision of the model is about.

    Raises:
        UserError: there is no such table; a column that the level needs is missing; rows without an image's path.
    """
    path, notes = as_location(config.manifest), []
    check_there(path)
    raw = read_table(path)
    # Neither splits nor regions matter here, and what is wrong with them is no reason to stop.
    table = usable_rows(raw, replace(config, split="", mask="", box=""), ("image",), notes)
    for name in {"case": ("case",), "case+side": ("case", "side"), "patient": ("patient",)}.get(level, ()):
        if name not in table:
            raise UserError(
                f"the model decides about a {level}, and {path} does not tell the {name}: name its column "
                f"(--data.{name} COLUMN)"
            )
    again = table["source"].duplicated()
    if again.any():
        notes.append(f"left out, the same image as an earlier row: {rows_text(table.loc[again, 'row'].tolist())}")
    named = [_of_row(row, level) for row in table.loc[~again, :].to_dict("records")]
    return Asked(_grouped(named, level), notes)


def _of_row(row: dict, level: Level) -> _Named:
    frame = f" frame {row['frame']}" if row.get("frame") else ""
    own = f"row {row['row']}"  # who is not stated is somebody else each time, or the case's own, as in training
    case = row["case"] or own if "case" in row else ""
    patient = row["patient"] or (f"case {row['case']}" if row.get("case") else own) if "patient" in row else ""
    problem = "no side is stated" if level == "case+side" and not row["side"] else ""
    return _Named(case, row.get("side", ""), patient, CaseImage(f"{row['image']}{frame}", row["source"], problem))


def folder_cases(config: ImageFolder, level: Level, most_frames: int | None = None) -> Asked:
    """The cases of a folder, under pseudonyms, which are remembered in the vault beside the key.

    Args:
        most_frames: a file that says it has more is one image, without a frame; None = any number is taken.

    Raises:
        UserError: there is no such folder, or no image in it; key is no such keyword; the share stopped answering; the
            key file cannot be used, or lies in the images' folder.
    """
    assert config.images is not None
    root = config.images.expanduser().absolute()
    key_file = (config.key_file or default_key_file()).expanduser().absolute()
    key = load_key(key_file, [root, storage_folder()])
    mark = hashlib.sha256(f"{root}\0{config.key}".encode()).hexdigest()[:8]
    scanned = scan(root, config.key, patterns=config.files, checkpoint=key_file.parent / f"predict-{mark}.jsonl")
    notes = [f"{num} files: {why}" for why, num in scanned.others.items()]
    if len({image.tags.get("modality", "") for image in scanned.found}) > 1 and not config.modalities:
        notes.append("the images are of several modalities, and all are used: --modalities states those to use")
    unusable = _unusable(root, config, {image.path for image in scanned.found})
    names = _Names(Pseudonyms(key))
    most = most_frames or math.inf
    images = (image if image.frames <= most else replace(image, frames=1) for image in scanned.found)
    found = [*((image, "") for image in images), *unusable]
    named = [one for image, why in found for one in _of_file(image, why, root, names, config, level)]
    if not named:
        raise UserError(f"{root} holds no image, but {'; '.join(notes) or 'nothing'}: give the images' folder")
    vault_of(key_file, key).add(names.known)
    return Asked(_grouped(named, level), notes, f"frames={config.frames} blank={config.blank}")


class _Names:
    """Gives pseudonyms and remembers whom they stand for."""

    def __init__(self, pseudonyms: Pseudonyms):
        self._pseudonyms = pseudonyms
        self.known: dict[str, set[str]] = {}

    def of(self, kind: str, identifier: str, told: str | None = None) -> str:
        """The pseudonym. told: what `whois` is to say, where that is not the identifier."""
        name = self._pseudonyms.of(kind, identifier)
        self.known.setdefault(name, set()).add(identifier if told is None else told)
        return name


def _of_file(
    image: Found, problem: str, root: Path, names: _Names, config: ImageFolder, level: Level
) -> Iterator[_Named]:
    folder = str(PurePosixPath(image.path).parent)
    # Pictures that lie in the folder itself are no one's: each is a case of its own, and so is what cannot be read.
    case = image.key or (image.path if problem or folder == "." else folder)
    patient = image.patient or f"the patient of case {case}"
    side, modality = image.tags.get("side", ""), image.tags.get("modality", "")
    if config.modalities and modality not in config.modalities and not problem:
        problem = f"modality {modality or 'not stated'}"
    if level == "case+side" and not side:
        problem = problem or "no side is stated"
    boxes = () if config.blank in ("found", "none") else parse_boxes(config.blank) or ()
    for frame in _frames(image.frames, config.frames):
        told = normal(image.path) + (f" frame {frame}" if frame else "")
        name = names.of("image", f"{image.path}\0{frame}", told)
        source = ImageFile(root / image.path, frame, boxes)
        shown = CaseImage(name, source, problem, config.blank == "found")
        yield _Named(names.of("case", case), side, names.of("patient", patient), shown)


def _frames(num: int, which: str) -> Sequence[int | None]:
    if num == 1:
        return [None]
    return {"first": [1], "middle": [(num + 1) // 2], "last": [num], "all": range(1, num + 1)}[which]


def _unusable(root: Path, config: ImageFolder, found: set[str]) -> Iterator[tuple[Found, str]]:
    """Files that may have been images, with why they cannot be read."""
    for file in sorted(root.rglob("*")):
        path = file.relative_to(root).as_posix()
        matches = any(fnmatch.fnmatch(path.casefold(), pattern.casefold()) for pattern in config.files)
        if path in found or not matches or is_foreign(path) or not file.is_file():
            continue
        try:
            why = describe(file, path, config.key)
        except OSError:
            why = CLOSED
        if why in (EMPTY, DAMAGED, CLOSED):
            yield Found(path, 1, "", ""), str(why)


def _grouped(named: Iterable[_Named], level: Level) -> list[Case]:
    """Images put together as the model decides about them, in order of appearance, with their state."""
    named = list(named)
    there = _versions([one.image.source.path for one in named])
    groups: dict[tuple[str, str, str, str], list[CaseImage]] = {}
    for one in named:
        # Images of one case that name two patients are two cases: which of the patients is right, nobody knows.
        key = {
            "image": (one.case, one.side, one.image.name, one.patient),
            "case+side": (one.case, one.side, "", one.patient),
            "case": (one.case, "", "", one.patient),
            "patient": ("", "", "", one.patient),
        }[level]
        _, *which = one.image.source.identity()
        state = hashlib.sha256(repr((there[one.image.source.path], which)).encode()).hexdigest()[:12]
        groups.setdefault(key, []).append(replace(one.image, state=state))
    return [Case(*key, images=tuple(images)) for key, images in groups.items()]


def _versions(paths: Sequence[Location]) -> dict[Location, Version]:
    try:
        return patiently(functools.partial(versions, paths))
    except OSError as error:
        raise Silent(
            f"the images' share stopped answering ({error.strerror or type(error).__name__}): check it or the network; "
            "then start the same command again"
        ) from error


def _grey(pixels: np.ndarray) -> np.ndarray:
    """(H, W) uint8, in which an import looks for text."""
    pixels = pixels if pixels.dtype == np.uint8 else (pixels >> 8).astype(np.uint8)
    return pixels if pixels.ndim == 2 else pixels[..., :3].max(axis=2)
