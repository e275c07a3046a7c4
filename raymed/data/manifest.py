"""The manifest: a table with one row an image, and the config that says what its columns mean.

CSV, TSV, Parquet or a MedMNIST npz. It may lie in a bucket (s3://BUCKET/KEY), and so may its images. Everything in it
is text: identifiers keep their leading zeros. Rows are counted from 1, as in the file.
"""

import difflib
import functools
import re
import shlex
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pandas as pd

from raymed.config import UserError, check_choice, check_range
from raymed.data.locations import Location, as_location, below, ending, folder_of, near
from raymed.data.medmnist import read_archive
from raymed.data.preprocess import Preprocess
from raymed.data.problems import Problem, settle
from raymed.data.readers import ImageFile, Source
from raymed.data.regions import BOX_FORMAT, parse_boxes
from raymed.storage import exists

SPLITS = ("train", "val", "test")
_SPLIT_NAMES = {"train": "train", "training": "train", "test": "test", "testing": "test"} | dict.fromkeys(
    ("val", "valid", "validation", "dev"), "val"
)
_OPTIONAL = ("patient", "case", "view", "side", "frame", "split", "mask", "box", "blank", "right")
_OTHER_NAMES = {"patient": ("patientid",), "box": ("boxes",), "blank": ("blankboxes",)}
_PICTURE = re.compile(r"\.(png|jpe?g|tiff?|bmp|dcm|dicom|nii(\.gz)?)$", re.IGNORECASE)


@dataclass(frozen=True)
class DataConfig:
    """Which images, which column means what, and what is to be found."""

    manifest: str = "phantoms"
    """A table with one row an image (CSV, TSV, Parquet) or a MedMNIST npz: a file, or s3://BUCKET/KEY; or "phantoms":
    drawn HSG X-rays."""
    root: str | None = None
    """The folder that image paths are relative to, s3:// included; None = that of the manifest."""
    image: str = "image"
    """Column with the image's path, or its s3:// address."""
    label: str = "label"
    """Column with the name of the class."""
    patient: str | None = None
    """Column that tells patients apart; None = a column called patient, patient_id or patientid; "" = not used."""
    case: str | None = None
    """Column with the case (study) of a patient; None = a column of that name; "" = not used."""
    view: str | None = None
    """Column with the view (AP, early, ...); None = a column of that name; "" = not used."""
    side: str | None = None
    """Column with the side of the finding; None = a column of that name; "" = not used."""
    frame: str | None = None
    """Column with the frame of a multi-frame DICOM object or the slice of a NIfTI volume, from 1; None = a column of
    that name; "" = not used."""
    split: str | None = None
    """Column with train, val or test; None = a column of that name; "" = split afresh."""
    mask: str | None = None
    """Column with the path of an image of the image's own size, not 0 (black) where the finding lies, for the report on
    where the network looks; an empty cell = none; None = a column of that name; "" = not used."""
    box: str | None = None
    """Column with boxes around the finding, used where there is no mask: "x0 y0 x1 y1" in pixels of the image, from its
    top left corner, several separated by ";"; an empty cell = none; None = a column called box or boxes; "" = not
    used."""
    blank: str | None = None
    """Column with boxes, written as those of `box`, that are painted black before anything sees the image: names that
    are burned into it; None = a column called blank or blank_boxes; "" = not used."""
    right: str | None = None
    """Column that says at which edge of the picture, "left" or "right", the patient's right side is: then `side` is the
    patient's; None = a column of that name; "" = not used, and `side` is that of the picture."""
    groups: tuple[str, ...] = ("site", "scanner", "year", "age", "sex")
    """Columns that are kept, where there are such, for figures by subgroup; what they hold is not looked at."""
    readers: str = "label_reader"
    """Columns whose names begin so hold what single readers said, as `label` does."""
    positive: str | None = None
    """The class to be found, against all others. It must be stated."""
    classes: tuple[str, ...] = ()
    """The classes there may be (for an npz: their names, by label number); empty = those in the table."""
    on_problem: Literal["error", "skip"] = "error"
    """A row that cannot be used: stop and list all of them, or leave them out and count them."""
    val_fraction: float = 0.15
    """Part of the images for validation, where no split is given."""
    test_fraction: float = 0.2
    """Part of the images for the final test, where no split is given."""
    split_seed: int = 0
    """Another number gives another split."""
    split_how: Literal["random", "by_time", "by_site"] = "random"
    """Where no split is given: whole patients at random; or the test set is the latest years, by the column year; or
    the named sites, by the column site."""
    test_from: str = ""
    """by_time: the year or date from which on studies are the test set; "" = chosen by test_fraction."""
    test_sites: tuple[str, ...] = ()
    """by_site: the sites that are the test set."""
    split_file: str | None = None
    """A file that keeps who is in which split (JSON, s3:// too), written where there is none: when the manifest grows,
    everybody stays and only new patients are divided."""
    deidentified: bool = False
    """The images are known to show nobody's identity, and may be logged."""
    modality: str = "not stated"
    """How the images were taken (CR, US, HSG, ...), for the model's card."""
    body_part: str = "not stated"
    """What they show, for the model's card."""
    licence: str = "not stated"
    """Terms under which the images may be used, for the model's card."""
    source: str = "not stated"
    """Where the images come from and how to cite them, for the model's card."""
    preprocess: Preprocess = Preprocess()
    """From pixels to the network's input."""

    def __post_init__(self) -> None:
        for field in ("val_fraction", "test_fraction"):
            check_range(f"data.{field}", getattr(self, field), 0, 1, low_open=True, high_open=True)
        held_out = self.val_fraction + self.test_fraction
        check_range("data.val_fraction + data.test_fraction", held_out, high=1, high_open=True)
        check_choice("data.on_problem", self.on_problem, ("error", "skip"))
        check_choice("data.split_how", self.split_how, ("random", "by_time", "by_site"))
        if len(set(self.classes)) != len(self.classes):
            raise UserError(f"data.classes names a class twice: {', '.join(self.classes)}")


@dataclass(frozen=True)
class Manifest:
    """A manifest that has been read and checked, but for its images.

    table: row (from 1), image (as in the file), source (`readers.Source`), label (name of the class); of patient, case,
    view, side, split (train, val, test), mask (`readers.ImageFile` or None), box (a tuple of boxes, see
    `regions.parse_boxes`) those there are; "group NAME" and "reader NAME": text, of `DataConfig.groups` and `readers`.
    classes: in the order of `DataConfig.classes`, else sorted.
    positive: "" where there are no labels, and then all have one class. notes: what the user is to know.
    """

    table: pd.DataFrame
    classes: tuple[str, ...]
    positive: str
    notes: list[str]


@functools.singledispatch
def read_manifest(config: DataConfig) -> Manifest:
    """Read and check the table. A kind of config with more to read registers a function of its own.

    Raises:
        UserError: file missing, empty or damaged; a mapped column missing; rows that cannot be used (all of them are
            listed); one class only; the positive class not stated or unknown.
    """
    path = as_location(config.manifest)
    raw, names, sources = _read(path, config.classes)
    notes: list[str] = []
    table = usable_rows(raw, config, ("image", "label"), notes, names=names, sources=sources)
    table = settle(table, _duplicate_rows(table), config.on_problem, notes)
    return Manifest(table, *check_labels(table, config, notes, names), notes)


def usable_rows(
    raw: pd.DataFrame,
    config: DataConfig,
    needed: Sequence[str],
    notes: list[str],
    *,
    names: tuple[str, ...] = (),
    sources: Sequence[Source] = (),
    problems: Iterable[Problem] = (),
) -> pd.DataFrame:
    """The rows of a table that can be used, as in `Manifest.table`, with the index of `raw`.

    Args:
        raw: the table as text.
        needed: fields of the config whose columns there must be.
        names: the classes, where they are known; another label is a problem.
        sources: where the images lie; empty = as the column `image` says.
        problems: what else is wrong with which row.

    Raises:
        UserError: the table is empty; a mapped column missing; rows that cannot be used (all of them are listed).
    """
    path = as_location(config.manifest)
    if raw.empty:
        raise UserError(f"{path} is empty: a header and one row an image are expected")
    table = _map_columns(raw, config, needed, path, notes)
    problems = [*_cell_problems(table, names, config), *_split_problems(table), *problems]
    good = settle(table, problems, config.on_problem, notes)
    root = as_location(config.root) if config.root else folder_of(path)
    return _normal_form(good, root, [sources[row - 1] for row in good["row"]] if sources else None)


def check_labels(
    table: pd.DataFrame, config: DataConfig, notes: list[str], names: tuple[str, ...] = ()
) -> tuple[tuple[str, ...], str]:
    """The classes and the positive one. Raises UserError for one class only, or a positive class that is not stated
    or unknown."""
    classes = names or tuple(sorted(set(table["label"])))
    _check_classes(table, classes, config, notes)
    return classes, _positive(table["label"].tolist(), config.positive)


def _read(path: Location, classes: tuple[str, ...]) -> tuple[pd.DataFrame, tuple[str, ...], Sequence[Source]]:
    """The table as text; the class names that are known without it; for an archive, where its images lie."""
    check_there(path)
    if ending(path) == ".npz":
        return read_archive(path, classes)
    check_choice("data.manifest: the file's ending", ending(path), (".csv", ".tsv", ".parquet", ".npz"))
    return read_table(path), classes, ()


def check_there(path: Location) -> None:
    """Raise UserError where there is no such file."""
    if exists(path) and near(path).is_file():
        return
    if isinstance(path, str):
        raise UserError(f"data.manifest: there is no object {path}")
    siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    alike = difflib.get_close_matches(path.name, siblings, n=1)
    hint = f" (did you mean {path.parent / alike[0]}?)" if alike else ""
    where = "" if path.is_absolute() else f" in {Path.cwd()} (a job on a cluster needs an absolute path)"
    raise UserError(f"data.manifest: there is no file {path}{where}{hint}")


def read_table(path: Location) -> pd.DataFrame:
    """A CSV, TSV or Parquet file with every cell as text; what is empty is "".

    Raises:
        UserError: empty, damaged, or not UTF-8.
    """
    file = near(path)
    try:
        table = _read_cells(file, ending(path))
    except pd.errors.EmptyDataError as error:
        raise UserError(f"{path} is empty: a header and one row an image are expected") from error
    except UnicodeDecodeError:
        read_text(path)  # says in which line
        raise
    except (ValueError, OSError) as error:  # includes pandas' ParserError, pyarrow's ArrowInvalid
        raise UserError(f"{path} cannot be read as {ending(path)[1:]}: {error}") from error
    text = table.astype("string").fillna("").astype(object)
    return text.rename(columns=lambda name: str(name).strip()).map(str.strip)


def _read_cells(file: Path, kind: str) -> pd.DataFrame:
    if kind == ".parquet":
        # convert_dtypes: whole numbers beside empty cells come as floats, and "17.0" is no identifier.
        return pd.read_parquet(file).convert_dtypes()
    separator = "\t" if kind == ".tsv" else ","
    return pd.read_csv(file, sep=separator, dtype=str, keep_default_na=False, index_col=False, encoding="utf-8-sig")


def read_text(path: Location) -> str:
    """A text file. Raises UserError where it is not UTF-8."""
    content = near(path).read_bytes()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        kind = ending(path)[1:] or "text"
        raise UserError(f"{path} cannot be read as {kind}: line {line} is not UTF-8. Save the file as UTF-8") from error


def _map_columns(
    raw: pd.DataFrame, config: DataConfig, needed: Sequence[str], path: Location, notes: list[str]
) -> pd.DataFrame:
    """The columns that are used, under the names of their fields."""
    columns = {field: required_column(raw, field, getattr(config, field), path) for field in needed}
    for field in _OPTIONAL:
        wanted = getattr(config, field)
        if wanted:
            columns[field] = required_column(raw, field, wanted, path)
        elif wanted is None and (found := _column_called(raw, field)):
            columns[field] = found
            if ending(path) != ".npz":
                notes.append(f"{field}: column {found!r}, by its name (--data.{field} '' to leave it unused)")
    if "mask" in columns and "box" in columns:
        notes.append("box has no effect where there is a mask")
    columns |= {f"group {name}": name for name in config.groups if name in raw}
    columns |= {f"reader {name}": name for name in raw if config.readers and name.startswith(config.readers)}
    table = pd.DataFrame({field: raw[name] for field, name in columns.items()})
    table["row"] = range(1, len(table) + 1)
    return table


def required_column(raw: pd.DataFrame, field: str, name: str, path: Location) -> str:
    """`name`, the column for a field of the config. Raises UserError where there is none."""
    columns = list(raw.columns)
    if name in columns:
        return name
    folded = {column.casefold(): column for column in columns}
    near = [folded[match] for match in difflib.get_close_matches(name.casefold(), folded, n=1)]
    if field == "image":
        near = [column for column in columns if _PICTURE.search(str(raw[column].iloc[0]))] or near
    hint = f"; did you mean --data.{field} {shlex.quote(near[0])}?" if near else ""
    raise UserError(f"{path} has no column {name!r} (--data.{field}); its columns are {', '.join(columns)}{hint}")


def _column_called(raw: pd.DataFrame, field: str) -> str | None:
    names = (field, *_OTHER_NAMES.get(field, ()))
    return next((column for column in raw.columns if re.sub(r"[\s_-]", "", column).casefold() in names), None)


def _cell_problems(table: pd.DataFrame, names: tuple[str, ...], config: DataConfig) -> Iterator[Problem]:
    for row, image in zip(table["row"], table["image"], strict=True):
        if not image:
            yield Problem(row, "no image path", f"the column {config.image!r} is empty")
    if "label" in table:
        for row, label in zip(table["row"], table["label"], strict=True):
            if not label:
                yield Problem(row, "no label", f"the column {config.label!r} is empty")
            elif names and label not in names:
                yield Problem(row, "unknown label", f"the label {label!r} is not one of {', '.join(map(repr, names))}")
    if "frame" in table:
        for row, frame in zip(table["row"], table["frame"], strict=True):
            if frame and not (frame.isdecimal() and int(frame) >= 1):
                yield Problem(row, "no frame number", f"the frame {frame!r} is no whole number from 1")
    if "right" in table:
        for row, edge in zip(table["row"], table["right"], strict=True):
            if edge not in ("", "left", "right"):
                yield Problem(row, "no edge", f"the edge {edge!r} of the patient's right is not left, right or empty")
    for field in {"box", "blank"} & set(table.columns):
        for row, text in zip(table["row"], table[field], strict=True):
            if parse_boxes(text) is None:
                yield Problem(row, "no box", f"the {field} {text!r} is not {BOX_FORMAT}")


def _split_problems(table: pd.DataFrame) -> Iterator[Problem]:
    if "split" in table:
        for row, name in zip(table["row"], table["split"], strict=True):
            if name.casefold() not in _SPLIT_NAMES:
                text = f"the split {name!r} is not train, val or test (--data.split '' splits afresh)"
                yield Problem(row, "unknown split", text)


def _files(table: pd.DataFrame, column: str, root: Location) -> list[ImageFile | None]:
    frames = table["frame"] if "frame" in table else [""] * len(table)
    # What is blank in an image says nothing about its mask.
    blank = table["blank"] if column == "image" and "blank" in table else [""] * len(table)
    return [
        ImageFile(below(root, name), int(frame) if frame else None, parse_boxes(boxes) or ()) if name else None
        for name, frame, boxes in zip(table[column], frames, blank, strict=True)
    ]


def _normal_form(table: pd.DataFrame, root: Location, sources: Sequence[Source] | None) -> pd.DataFrame:
    """Splits under their one name, a source for every image, and what masks and boxes there are."""
    columns: dict[str, Sequence] = {"source": sources or _files(table, "image", root)}
    if "mask" in table:
        columns["mask"] = _files(table, "mask", root)
    if "box" in table:
        columns["box"] = [parse_boxes(text) for text in table["box"]]
    if "split" in table:
        columns["split"] = [_SPLIT_NAMES[name.casefold()] for name in table["split"]]
    # As objects: a column of None and files, or of tuples, is taken for something else.
    return table.assign(**{n: pd.Series(list(v), index=table.index, dtype=object) for n, v in columns.items()})


def _duplicate_rows(table: pd.DataFrame) -> Iterator[Problem]:
    """Rows for the same image: the first is kept, of the last split (test before val before train). None is where
    their labels differ."""
    splits = table["split"] if "split" in table else ["train"] * len(table)
    copies: dict[Source, list[tuple[int, int, str]]] = {}
    for row, split, label, source in zip(table["row"], splits, table["label"], table["source"], strict=True):
        copies.setdefault(source, []).append((-SPLITS.index(split), row, label))
    for rows in copies.values():
        rows.sort()
        best, first, _ = rows[0]
        disputed = len({label for rank, _, label in rows if rank == best}) > 1
        for rank, row, _ in rows[0 if disputed else 1 :]:
            other = first if row != first else rows[1][1]
            why = ", in another split" if rank != best else ", with another label" if disputed else ""
            yield Problem(row, "duplicate row", f"the same image as row {other}{why}")


def _check_classes(table: pd.DataFrame, classes: tuple[str, ...], config: DataConfig, notes: list[str]) -> None:
    present = set(table["label"])
    if len(present) == 1:
        raise UserError(f"every image has the label {present.pop()!r}: a classifier needs two classes")
    empty = ", ".join(repr(name) for name in classes if name not in present)
    if empty and config.on_problem == "error":
        raise UserError(f"no image has the label {empty}: change --data.classes, or use --data.on-problem skip")
    if empty:
        notes.append(f"classes without an image: {empty}")


def _positive(labels: list[str], stated: str | None) -> str:
    counts = dict(sorted(Counter(labels).items()))
    if stated is not None:
        check_choice("data.positive", stated, counts)
        return stated
    listing = ", ".join(f"{name} {num} ({num / len(labels):.1%})" for name, num in counts.items())
    flags = {name: f"--data.positive {shlex.quote(name)}" for name in counts}
    if min(counts.values()) > 0.9 * max(counts.values()):
        way_out = f"They are balanced, so only you can tell: {' or '.join(flags.values())}"
    else:
        minority = min(counts, key=counts.__getitem__)
        way_out = f"It is usually the rarest, here {minority!r}: {flags[minority]}"
    raise UserError(f"data.positive is not stated: which class is to be found? The classes are {listing}. {way_out}")
