"""What an import leaves in the project: the manifest's table, the flow of exclusions, notes, the training command."""

import shlex
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import pandas as pd

from raymed.data.intake.header import PATH_KEYS, Found, normal
from raymed.data.intake.pictures import FOLDER, Picture, boxes_text
from raymed.data.intake.pseudonyms import Pseudonyms
from raymed.data.intake.rows import FIXED, Finding
from raymed.data.intake.scan import Scan
from raymed.data.intake.selection import Item, Selection
from raymed.data.intake.settings import ImportConfig
from raymed.data.intake.sheet import clean
from raymed.data.intake.telling import Telling

Used = Sequence[tuple[Item, Picture]]
_LISTED = 10
_SIZE = 224
_FREE_TEXT = ("view", "site", "scanner", "series")


def manifest_table(
    used: Used, found: Sequence[Found], pseudonyms: Pseudonyms, config: ImportConfig
) -> tuple[pd.DataFrame, dict[str, set[str]]]:
    """One row an image in the order of their paths, as text; and what each pseudonym in it stands for.

    Labels that are none are "". An image without a patient counts as the case's patient; where no image has one, and
    every case one image, nothing would follow from that, and there is no column patient.
    """
    identities: dict[str, set[str]] = {}
    records = []
    for item, picture in sorted(used, key=lambda pair: (found[pair[0].image].path, pair[0].frame or 0)):
        image = found[item.image]
        case = item.row.stated.get("case") or item.row.key
        patient = item.patient or f"the patient of case {case}"
        names = {"patient": pseudonyms.of("patient", patient), "case": pseudonyms.of("case", case)}
        frame = f" frame {item.frame}" if item.frame else ""
        said = {image.patient, item.row.stated.get("patient", ""), patient} - {""}
        for name, identifiers in ((names["patient"], said), (names["case"], {case})):
            identities.setdefault(name, set()).update(identifiers)
        identities[picture.name] = {normal(image.path) + frame}
        records.append(_record(item, image, picture, config) | names)
    readers = [f"label_reader{number}" for number in range(1, len(config.columns.readers) + 1)]
    columns = [*FIXED[:-3], *readers, *FIXED[-3:], *config.columns.keep]
    table = pd.DataFrame(records, columns=columns, dtype=object).fillna("")
    if not any(item.patient for item, _ in used) and table["case"].is_unique:
        table = table.drop(columns="patient")
    return table, identities


def _record(item: Item, image: Found, picture: Picture, config: ImportConfig) -> dict[str, str]:
    stated = {name: text for name, text in item.row.stated.items() if text}
    tags = {"right": config.right} | image.tags
    where = {"image": f"{FOLDER}/{picture.name}.png"}
    if not config.copy:
        where = {"image": image.path, "frame": str(item.frame or "")}
    label = item.row.label.name if item.row.label.kind == "class" else ""
    boxes = {"blank_boxes": boxes_text(picture.boxes), "burned_in": image.burned_in}
    return tags | stated | {"frame": ""} | where | boxes | {"label": label}


def without_identifiers(table: pd.DataFrame, telling: Telling, keep: Sequence[str]) -> dict[str, int]:
    """Empty the cells of free text that name a patient, in place; returns how many, by column.

    Args:
        keep: further columns of free text.
    """
    emptied = {}
    for column in [name for name in (*_FREE_TEXT, *keep) if name in table]:
        known = {text: telling.within(text) for text in set(table[column])}
        found = [known[text] for text in table[column]]
        table.loc[found, column] = ""
        emptied[column] = sum(found)
    return {column: num for column, num in emptied.items() if num}


def image_identifiers(found: Iterable[Found], key: str) -> set[str]:
    """Every identifier that the images' headers gave."""
    found = list(found)
    return {image.patient for image in found} | (set() if key in PATH_KEYS else {image.key for image in found}) - {""}


def flow(scanned: Scan, chosen: Selection) -> list[tuple[str, int]]:
    """(text, number of files): those in the folder, those left out by reason, those in the manifest."""
    others = sorted(scanned.others.items())
    unlabelled = {item.image: item.row.label.name for item in chosen.items if item.row.label.kind == "unlabelled"}
    labelled = {item.image for item in chosen.items if item.row.label.kind == "class"}
    reasons = Counter(chosen.left_out.values())
    reasons.update(f"unlabelled: {name}" for image, name in unlabelled.items() if image not in labelled)
    total = len(scanned.found) + sum(scanned.others.values())
    return [("files", total), *others, *reasons.most_common(), ("in the manifest", len(labelled))]


def notes(found: Sequence[Found], used: Used, chosen: Selection, config: ImportConfig) -> list[str]:
    """What the user is to know, one line each, without identifiers."""
    images = {item.image: found[item.image] for item, _ in used}
    return [
        *_of_findings(chosen.findings),
        *_of_frames(images, used, config),
        *_of_text(images, used, config),
        *_of_tags(images, used),
    ]


def _of_findings(findings: Sequence[Finding]) -> Iterable[str]:
    misses: dict[str, dict[int, None]] = {}
    for finding in findings:
        if finding.kind == "near miss":
            misses.setdefault(finding.text.rpartition(" but for ")[2], {})[finding.row or 0] = None
    for trifle, numbers in misses.items():
        yield f"would match an image but for {trifle}, not joined: {_listed('row', list(numbers))} of the sheet"
    for kind in ("label without an image", "repeated row", "not understood, left empty"):
        numbers = [finding.row or 0 for finding in findings if finding.kind == kind]
        if numbers:
            yield f"{kind}: {_listed('row', numbers)} of the sheet"
    stopped = Counter(finding.kind for finding in findings if finding.stops)
    for kind, _ in stopped.most_common():
        numbers = sorted({finding.row or 0 for finding in findings if finding.stops and finding.kind == kind})
        yield f"left out, {kind}: {_listed('row', numbers)} of the sheet"


def _of_frames(images: Mapping[int, Found], used: Used, config: ImportConfig) -> Iterable[str]:
    several = {i for i, image in images.items() if image.frames > 1}
    named = {item.image for item, _ in used if item.row.stated.get("frame")}
    if chosen := several - named:
        which = "all frames" if config.frames == "all" else f"the {config.frames} frame"
        yield f"{_files(chosen)} with several frames: {which} of each (--frames, or --columns.frame)"


def _of_text(images: Mapping[int, Found], used: Used, config: ImportConfig) -> Iterable[str]:
    with_boxes = {item.image for item, picture in used if picture.boxes}
    stating = {i for i, image in images.items() if image.burned_in == "yes"}
    if with_boxes:
        what = "something like text was found and is" if config.blank == "found" else "the stated boxes are"
        yield f"{_files(with_boxes)}: {what} blanked; look at text_regions.png beside the list below"
    if stating - with_boxes:
        names = [picture.name for item, picture in used if item.image in stating - with_boxes]
        yield f"text in the image is stated, but none blanked: look at {_listed('image', names)}"


def _of_tags(images: Mapping[int, Found], used: Used) -> Iterable[str]:
    edges = Counter(image.tags.get("right", "") for image in images.values())
    if len(edges) > 1:
        listing = ", ".join(f"{edge or 'not stated'} {num}" for edge, num in sorted(edges.items()))
        yield f"the patient's right lies at different edges of the images (column right): {listing}"
    telling = [i for i, image in images.items() if set(image.telling) - {"path"}]
    if telling:
        yield f"{_files(telling)}: a description that names the patient, or that nobody else has, is left out"
    unknown = {item.image for item, _ in used if not item.patient}
    if unknown == images.keys():
        yield "no image has a patient: one with several cases may be in two splits (--columns.patient NAME)"
    elif unknown:
        yield f"{_files(unknown)} without a patient: each case counts as a patient of its own"


def _files(images: Iterable[int]) -> str:
    num = len(list(images))
    return f"{num} image file{'s' * (num != 1)}"


def _listed(what: str, values: Sequence[object]) -> str:
    shown = ", ".join(map(str, values[:_LISTED])) + ", ..." * (len(values) > _LISTED)
    return f"{len(values)} {what}{'s' * (len(values) != 1)} ({shown})"


def training_command(manifest: Path, root: Path, labelled: pd.DataFrame, used: Used, config: ImportConfig) -> str:
    """The command line that trains on the manifest.

    The positive class is the stated one, else the rarest.
    """
    counts = labelled["label"].value_counts()
    positive = clean(config.positive or "") or min(counts.index, key=lambda name: (counts[name], name))
    flags: dict[str, object] = {"manifest": manifest, "positive": positive}
    if not config.copy:
        flags["root"] = root.absolute()
    sizes = {picture.size for _, picture in used}
    if len(sizes) > 1 or any(height != width or height > _SIZE for height, width in sizes):
        flags["preprocess.size"] = _SIZE
    modalities = set(labelled["modality"])
    if len(modalities) == 1 and "" not in modalities:
        flags["modality"] = modalities.pop()
    return shlex.join(["python", "jobs/train_classifier.py", *(f"--data.{name}={flags[name]}" for name in flags)])
