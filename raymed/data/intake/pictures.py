"""The images of an import: pixels without anything around them, and without what looks like text in them.

    file -> read (8 or 16 bits, window of the header) -> boxes of text -> blanked -> PNG under a pseudonym

A PNG written here holds pixels only. Its name follows from the file, its time, the frame and what is blanked, so an
interrupted import goes on where it was: pictures.jsonl says which are done, and holds no identifiers.
"""

import functools
import io
import json
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from raymed.config import UserError
from raymed.data.cache import on_threads
from raymed.data.intake.pseudonyms import Pseudonyms
from raymed.data.intake.scan import CLOSED, PATIENCE, answers, patiently
from raymed.data.intake.settings import Box
from raymed.data.intake.text_regions import blank, text_boxes
from raymed.data.readers import ImageProblem, read
from raymed.data.regions import parse_boxes
from raymed.storage import write_atomic, write_private
from raymed.storage.paths import not_written

FOLDER, RECORD = "images", "pictures.jsonl"
_VERSION = 1  # counts up when the same file gives another picture
_SHOWN, _TILE = 24, 320


@dataclass(frozen=True)
class Picture:
    """One image of the import. name: its pseudonym. size: height and width. boxes: what is blanked. problem: why there
    is none, "" where it is."""

    name: str
    size: tuple[int, ...] = ()
    boxes: tuple[Box, ...] = ()
    problem: str = ""


def make_pictures(
    root: Path,
    wanted: Sequence[tuple[str, int | None]],
    to: Path,
    pseudonyms: Pseudonyms,
    *,
    blanked: str = "found",
    copy: bool = True,
    patience: Sequence[float] = PATIENCE,
) -> list[Picture]:
    """Read images, find what is to be blanked, and write those that are not there yet to `to`/images/NAME.png.

    Args:
        root: the images' folder.
        wanted: path below it, and frame (None = the only one), of each image.
        blanked: "found", "none", or boxes.
        copy: False = only look at them.

    Raises:
        UserError: the share stopped answering, or the disk takes no more; the same call goes on.
    """
    (to / FOLDER if copy else to).mkdir(parents=True, exist_ok=True)
    done = _done(to)
    silent, writing = threading.Event(), threading.Lock()

    def one(position: int) -> Picture:
        path, frame = wanted[position]
        if silent.is_set():
            return Picture("")
        try:
            name = _name(pseudonyms, root, path, frame, f"{blanked} {copy}", patience)
            if name in done and (not copy or (to / FOLDER / f"{name}.png").is_file()):
                return done[name]
            picture = _make(root / path, frame, to / FOLDER / f"{name}.png", blanked, copy, patience)
        except OSError:
            if answers(root):
                return Picture("", problem=CLOSED)
            silent.set()
            return Picture("")
        if not picture.problem:  # it may be read another time: with a decoder, with permission
            with writing:
                _note(picture, to / RECORD)
        return picture

    pictures = on_threads(one, len(wanted), "Copying" if copy else "Looking for text")
    if silent.is_set():
        raise _silent(root, f"after {sum(1 for picture in pictures if picture.name)} of {len(wanted)} images")
    return pictures


def _silent(root: Path, reached: str) -> UserError:
    return UserError(
        f"{root} stopped answering {reached}: check the share or the network; then the same command goes on from there"
    )


def _note(picture: Picture, file: Path) -> None:
    try:
        with file.open("a") as record:
            record.write(json.dumps(asdict(picture)) + "\n")
    except OSError as error:
        raise not_written(file, error) from error


def remove_others(to: Path, names: set[str]) -> None:
    """Remove the pictures of former imports: they may show what is blanked now."""
    for file in (to / FOLDER).glob("I-*.png"):
        if file.stem not in names:
            file.unlink()


def show_boxes(
    root: Path,
    wanted: Sequence[tuple[str, int | None]],
    pictures: Sequence[Picture],
    file: Path,
    patience: Sequence[float] = PATIENCE,
) -> int:
    """Draw the first images with boxes, the boxes framed in red, into one private PNG; returns how many it shows.

    It shows identities: it belongs beside the key. Raises UserError where the share stopped answering.
    """
    from PIL import Image, ImageDraw, ImageOps

    tiles = []
    for (path, frame), picture in zip(wanted, pictures, strict=True):
        if picture.boxes and len(tiles) < _SHOWN:
            pixels = _shown(root, path, frame, patience)
            if pixels is None:
                continue
            tile = ImageOps.contain(Image.fromarray(_grey(pixels)), (_TILE, _TILE)).convert("RGB")
            scale = tile.width / picture.size[1]
            for box in picture.boxes:
                x0, y0, x1, y1 = (round(scale * edge) for edge in box)
                ImageDraw.Draw(tile).rectangle((x0 - 1, y0 - 1, x1, y1), outline=(255, 0, 0))
            tiles.append(tile)
    if not tiles:
        file.unlink(missing_ok=True)
        return 0
    columns = min(6, len(tiles))
    sheet = Image.new("RGB", (columns * _TILE, -(-len(tiles) // columns) * _TILE), (40, 40, 40))
    for i, tile in enumerate(tiles):
        sheet.paste(tile, (i % columns * _TILE, i // columns * _TILE))
    write_private(file, _png(sheet))
    return len(tiles)


def _shown(root: Path, path: str, frame: int | None, patience: Sequence[float]) -> np.ndarray | None:
    """The pixels, or None where this one file cannot be read any more."""
    try:
        return _read(root / path, frame, patience)
    except (ImageProblem, OSError) as problem:
        if isinstance(problem, OSError) and not answers(root):
            raise _silent(root, "while what is blanked was drawn") from problem
        return None


def boxes_text(boxes: Sequence[Box]) -> str:
    """As the manifest has them: "x0 y0 x1 y1;..."."""
    return ";".join(" ".join(map(str, box)) for box in boxes)


def _done(to: Path) -> dict[str, Picture]:
    lines = (to / RECORD).read_text().splitlines() if (to / RECORD).is_file() else []
    pictures: dict[str, Picture] = {}
    for line in lines:
        try:
            plain = json.loads(line)
        except json.JSONDecodeError:  # cut off when the process was killed
            continue
        if plain["problem"]:
            continue
        boxes = tuple((x0, y0, x1, y1) for x0, y0, x1, y1 in plain["boxes"])
        pictures[plain["name"]] = Picture(plain["name"], tuple(plain["size"]), boxes)
    return pictures


def _name(pseudonyms: Pseudonyms, root: Path, path: str, frame: int | None, how: str, patience: Sequence[float]) -> str:
    status = patiently((root / path).stat, patience)
    return pseudonyms.of("image", "\0".join(map(str, (path, frame, status.st_size, status.st_mtime_ns, how, _VERSION))))


def _make(file: Path, frame: int | None, target: Path, blanked: str, copy: bool, patience: Sequence[float]) -> Picture:
    name = target.stem
    try:
        pixels = _read(file, frame, patience)
    except (ImageProblem, PermissionError) as problem:
        return Picture(name, problem=_reason(problem))
    boxes = _boxes(pixels, blanked)
    if copy:
        try:
            write_atomic(target, _as_png(blank(pixels, boxes)))
        except OSError as error:
            raise not_written(target, error) from error
    return Picture(name, pixels.shape[:2], tuple(boxes))


def _reason(problem: Exception) -> str:
    """Why, without the words of a decoder, which may repeat a path or a value."""
    told = str(problem) if isinstance(problem, ImageProblem) else "cannot be opened"
    return next((why for why in ("truncated or damaged", "cannot be decoded") if told.startswith(why)), told)


def _read(file: Path, frame: int | None, patience: Sequence[float]) -> np.ndarray:
    """The pixels. A file that cannot be read because its share is gone raises OSError, not ImageProblem."""
    try:
        return patiently(functools.partial(read, file, frame), patience)
    except ImageProblem:
        patiently(file.read_bytes, patience)
        return read(file, frame)


def _boxes(pixels: np.ndarray, blanked: str) -> list[Box]:
    if blanked == "none":
        return []
    if blanked == "found":
        return list(text_boxes(_grey(pixels)))
    height, width = pixels.shape[:2]
    stated = [(round(x0), round(y0), round(x1), round(y1)) for x0, y0, x1, y1 in parse_boxes(blanked) or ()]
    inside = [(max(x0, 0), max(y0, 0), min(x1, width), min(y1, height)) for x0, y0, x1, y1 in stated]
    return [box for box in inside if box[0] < box[2] and box[1] < box[3]]


def _eight_bits(pixels: np.ndarray) -> np.ndarray:
    return pixels if pixels.dtype == np.uint8 else (pixels >> 8).astype(np.uint8)


def _grey(pixels: np.ndarray) -> np.ndarray:
    """(H, W) uint8."""
    pixels = _eight_bits(pixels)
    return pixels if pixels.ndim == 2 else pixels[..., :3].max(axis=2)


def _as_png(pixels: np.ndarray) -> bytes:
    """Grey in 8 or 16 bits, colour in 8."""
    from PIL import Image

    return _png(Image.fromarray(pixels if pixels.ndim == 2 else _eight_bits(pixels)))


def _png(image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
