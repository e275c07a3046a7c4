"""What an import is told: where images and sheet lie, which column means what, what is left out."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from raymed.config import UserError, check_choice, check_range
from raymed.data.intake.labels import LabelMap, parse_map
from raymed.data.intake.sheet import clean
from raymed.data.regions import BOX_FORMAT, parse_boxes

Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class SheetColumns:
    """Columns of the sheet. What it states goes before what the image's header states. None = not in the sheet; but
    patient, view, site, age and sex are then taken from a column of that name, unless they are ""."""

    key: str | None = None
    """What links a row to its images; None = the column called as --key."""
    label: str | None = None
    """The class; None = a column called label or result."""
    readers: tuple[str, ...] = ()
    """The class as several readers see it, a column each: label_reader1, label_reader2, ... of the manifest."""
    patient: str | None = None
    """The patient's identifier: compared with that in the image's header, used where there is none. None = a column
    called patient or patient_id."""
    case: str | None = None
    """The case's (study's) identifier; None = the key is."""
    side: str | None = None
    """The patient's side that the row is about. A key may have two rows that differ in it."""
    view: str | None = None
    frame: str | None = None
    """Number, from 1, of the frame to use of an object with several. A key may have several rows that differ in it."""
    site: str | None = None
    date: str | None = None
    """Of the examination; only the year is kept."""
    age: str | None = None
    """In years."""
    sex: str | None = None
    keep: tuple[str, ...] = ()
    """Further columns that go into the manifest as they are. Cells that hold an identifier are emptied."""

    def __post_init__(self) -> None:
        # The sheet's texts are NFC, and a name that is typed or copied on a Mac may be NFD.
        for field, value in vars(self).items():
            if value:
                object.__setattr__(self, field, clean(value) if isinstance(value, str) else tuple(map(clean, value)))


@dataclass(frozen=True)
class ImportConfig:
    """Images and their sheet, and what becomes of them."""

    images: Path
    """Folder of the images (DICOM, PNG, JPEG, TIFF, NIfTI), with all folders below it."""
    labels: Path
    """The sheet with the labels: .xlsx, .csv or .tsv."""
    key: str = "AccessionNumber"
    """What links an image to a row: a keyword of DICOM, or path (below the folder), name or stem (without its ending)
    of the file."""
    to: Path = Path("imported")
    """Folder for the manifest and the copies."""
    sheet: str | None = None
    """Name of the sheet in an Excel file; None = the only one with content."""
    encoding: str | None = None
    """Of a CSV file; None = UTF-8, else cp949."""
    header_row: int = 1
    """The row of the sheet that holds the names of the columns."""
    columns: SheetColumns = SheetColumns()
    map: tuple[str, ...] = ()
    """Classes and the texts that mean them, such as occluded=occ,blocked patent=open; none = every text is a class."""
    excluded: tuple[str, ...] = ()
    """Label texts whose images are left out, and counted."""
    unlabelled: tuple[str, ...] = ("equivocal",)
    """Label texts whose images have no label: they go to unlabelled.csv, and are counted."""
    patients: Path | None = None
    """Patients with two identifiers: a table of an identifier and the one that it is to be counted under."""
    files: tuple[str, ...] = ("*",)
    """Only files whose path matches one of these."""
    modalities: tuple[str, ...] = ()
    """Only images of these modalities, such as RF XA; it must be stated where labelled images have several."""
    frames: Literal["first", "middle", "last", "all"] = "middle"
    """Which frames of an object with several are used, where the sheet names none."""
    site: str = ""
    """A tag of DICOM that tells sites apart: InstitutionName, InstitutionalDepartmentName or StationName."""
    right: Literal["left", "right", ""] = ""
    """The edge of the picture where the patient's right is, for images that do not say; "" = not known."""
    blank: str = "found"
    """Parts of the images to be blanked: found (what looks like text), none, or "x0 y0 x1 y1;..." in pixels."""
    copy: bool = True
    """Write the images' pixels, and nothing else, to PNG files. Without it the manifest names the files themselves."""
    positive: str | None = None
    """The class to be found, for the training command; None = the rarest."""
    on_problem: Literal["error", "skip"] = "error"
    """Rows and images that cannot be used: stop and list them, or leave them out and count them."""
    key_file: Path | None = None
    """The key of the pseudonyms, outside the project; None = ~/.config/raymed/pseudonyms.key. It is made where there is
    none: keep a copy of it in a safe place."""

    def __post_init__(self) -> None:
        check_range("header_row", self.header_row, 1)
        for field, choices in (("frames", ("first", "middle", "last", "all")), ("right", ("left", "right", ""))):
            check_choice(field, getattr(self, field), choices)
        check_choice("on_problem", self.on_problem, ("error", "skip"))
        if self.blank not in ("found", "none") and not parse_boxes(self.blank):
            raise UserError(f"blank must be found, none or {BOX_FORMAT}, got {self.blank!r}")
        self.label_map()

    def label_map(self) -> LabelMap:
        """What the texts of labels mean. Raises UserError where one means two things."""
        return LabelMap(parse_map(self.map), self.excluded, self.unlabelled)
