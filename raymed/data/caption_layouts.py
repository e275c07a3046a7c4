"""Public sets of images and captions, read as they are published, as one table with one row an image.

Each reader is given the file that the user names and finds the others beside it. Paths of images are relative to that
file, as in any manifest; rows are counted through all files, and the notes say which rows came from which.

MedPix 2.0 (Siragusa et al., 2025; github.com/CHILab1/MedPix-2.0): `Descriptions.json`, or its parts
`splitted_dataset/descriptions_{train,dev,test}.jsonl`; `splitted_dataset/uid_list.json`, `Case_topic.json`, `images/`.

ROCO (Pelka et al., 2018; github.com/razorx89/roco-dataset): `data/{train,validation,test}/radiology/` with
`captions.txt`, `licences.txt` or `dlinks.txt`, and `images/`, where its script puts ROCO_00020.jpg, and once put
PMC3970251_CRIONM2014-931546.003.jpg.

ROCOv2 (Rueckert et al., 2024; zenodo.org/records/10821435): `{train,valid,test}_captions.csv`, `*_concepts.csv`,
`*_concepts_manual.csv`, `cui_mapping.csv`, `license_information.csv`, and the unpacked images in `{train,valid,test}/`.
"""

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pandas as pd

from raymed.config import UserError
from raymed.data.locations import Location, below, folder_of
from raymed.data.manifest import check_there, read_table, read_text
from raymed.storage import exists

Published = tuple[pd.DataFrame, list[str]]
"""A table as text, with the columns image and caption at least, and what the user is to know."""
_ROCO_1 = ("train", "validation", "test")
_TRIED = 20  # images of which some could be fetched, where many could not
_ROCO_2 = {f"{split}_captions.csv": split for split in ("train", "valid", "test")}


def read_medpix(path: Location) -> Published:
    """MedPix 2.0. A patient is a clinical case, and the split that of uid_list.json or of the parts.

    Columns: image, caption, patient, case, split, modality (CT or MR), protocol, plane, location, location_category,
    age, sex; with Case_topic.json also title, history, case_findings, diagnosis, category, discussion.

    Raises:
        UserError: not JSON, or not of this kind.
    """
    check_there(path)
    files = _medpix_parts(path)
    records = [(record, split) for file, split in files.items() for record in _records(file)]
    if not records:
        raise UserError(f"{path} is empty: Descriptions.json of MedPix 2.0 is expected")
    here, above = (exists(below(folder_of(path), images)) for images in ("images", "../images"))
    up = "../" if above and not here else ""
    about = _by_case(_first_there(path, f"{up}Case_topic.json", f"{up}Case_topic.jsonl"))
    listed = _splits_by_case(_first_there(path, "uid_list.json", "splitted_dataset/uid_list.json"))
    rows = [_medpix_row(path, number, record, up) for number, (record, _) in enumerate(records, start=1)]
    table = pd.DataFrame([row | about.get(row["case"], {}) for row in rows]).fillna("")
    if len(files) > 1:
        table["split"] = [split for _, split in records]
    elif listed:
        table["split"] = [listed.get(case, "") for case in table["case"]]
    return table, _uncaptioned(path, table["image"].tolist())


def read_roco(path: Location) -> Published:
    """ROCO by one of its captions.txt, ROCOv2 by one of its *_captions.csv.

    Columns: image, caption, split, id, and where the files that state them are there: article (its number in PubMed
    Central), licence, concepts and concepts_manual (names separated by |). Nothing tells patients apart; by article is
    the next best.

    Raises:
        UserError: the file is neither, or what it needs is not beside it.
    """
    check_there(path)
    name = PurePosixPath(str(path)).name
    if name == "captions.txt":
        parts = _read_roco_1(path)
    elif name in _ROCO_2:
        parts = _read_roco_2(path)
    else:
        raise UserError(f"{path}: layout roco expects captions.txt (ROCO) or train_captions.csv (ROCOv2), got {name}")
    table = pd.concat(parts.values(), ignore_index=True).fillna("")
    ends = np.cumsum([len(part) for part in parts.values()])
    notes = [f"rows to {end}: {file}" for file, end in zip(parts, ends, strict=True)]
    return table, notes + _shared_articles(table) + _uncaptioned(path, table["image"].tolist())


LAYOUTS: dict[str, Callable[[Location], Published]] = {"medpix": read_medpix, "roco": read_roco}


def _first_there(path: Location, *names: str) -> Location | None:
    """The first of the files beside `path` that exists."""
    return next((file for name in names if exists(file := below(folder_of(path), name))), None)


def _uncaptioned(path: Location, images: Sequence[str]) -> list[str]:
    """A note on images that no caption names, in the folders of those that are named. Folders in a bucket are not
    listed."""
    named = {os.path.normpath(below(folder_of(path), image)) for image in images if image}
    folders = {os.path.dirname(image) for image in named} if isinstance(path, Path) else set()
    lonely = [file for folder in sorted(folders) for file in _pictures(folder) if file not in named]
    if not lonely:
        return []
    return [f"images without a caption, not used: {len(lonely)}, for example {os.path.basename(lonely[0])}"]


def _pictures(folder: str) -> list[str]:
    endings = (".png", ".jpg", ".jpeg")
    names = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
    return [os.path.join(folder, name) for name in names if name.lower().endswith(endings)]


# MedPix


def _medpix_parts(path: Location) -> dict[Location, str]:
    """The file itself, or all parts it is one of, with their splits."""
    named = re.fullmatch(r"(descriptions_)(?:train|dev|test)(\.jsonl?)", PurePosixPath(str(path)).name)
    if not named:
        return {path: ""}
    parts = {split: below(folder_of(path), f"{named[1]}{split}{named[2]}") for split in ("train", "dev", "test")}
    return {file: split for split, file in parts.items() if exists(file)}


def _records(path: Location) -> list[dict[str, Any]]:
    """Objects of a JSON list, or of a file with one a line."""
    text = read_text(path)
    try:
        if text.lstrip().startswith("["):
            return json.loads(text)
        return [json.loads(line) for line in text.split("\n") if line.strip()]
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not JSON, nor one JSON object a line: {error}") from error


def _medpix_row(path: Location, number: int, record: Any, up: str) -> dict[str, str]:
    try:
        image, case, about = record["image"], record["U_id"], record["Description"]
        caption, name = about["Caption"], image if PurePosixPath(image).suffix else f"{image}.png"
    except (KeyError, TypeError) as error:
        what = f"has no {error}" if isinstance(error, KeyError) else "is no object"
        raise UserError(f"{path} is not Descriptions.json of MedPix 2.0: record {number} {what}") from error
    values = {
        "image": f"{up}images/{name}",
        "caption": caption,
        "patient": case,
        "case": case,
        "modality": record.get("Type"),
        "protocol": about.get("Modality"),
        "plane": about.get("Plane"),
        "location": record.get("Location"),
        "location_category": record.get("Location Category"),
        "age": about.get("Age"),
        "sex": about.get("Sex"),
    }
    return {column: _stated(value) for column, value in values.items()}


def _stated(value: Any) -> str:
    return "" if value in (None, "N/A") else str(value).strip()


def _by_case(path: Location | None) -> dict[str, dict[str, str]]:
    """What Case_topic.json says of each case."""
    columns = {
        "title": ("Case", "Title"),
        "history": ("Case", "History"),
        "case_findings": ("Case", "Findings"),
        "diagnosis": ("Case", "Case Diagnosis"),
        "category": ("Topic", "Category"),
        "discussion": ("Topic", "Disease Discussion"),
    }
    return {
        str(record.get("U_id")): {name: _stated((record.get(a) or {}).get(b)) for name, (a, b) in columns.items()}
        for record in (_records(path) if path else [])
    }


def _splits_by_case(path: Location | None) -> dict[str, str]:
    """Case -> train, dev or test. The halves train_1 and train_2 are parts of train."""
    listed = json.loads(read_text(path)) if path else {}
    return {case: split for split in ("train", "dev", "test") for case in listed.get(split, ())}


# ROCO


def _shared_articles(table: pd.DataFrame) -> list[str]:
    """A note on test images whose article is in train too."""
    if not {"article", "split"} <= set(table):
        return []
    test = table.loc[table["split"] == "test", "article"]
    shared = test.isin(set(table.loc[table["split"] == "train", "article"]) - {""}).sum()
    advice = "--data.patient article --data.split '' splits by article"
    return [f"of {len(test)} test images, {shared} are from an article that train has too: {advice}"] * bool(shared)


def _read_roco_1(path: Location) -> dict[str, pd.DataFrame]:
    """Split files -> tables, for all splits that are there."""
    split, kind = ("", "", *PurePosixPath(str(path)).parts)[-3:-1]
    if split not in _ROCO_1:
        raise UserError(f"{path}: ROCO is expected as train/radiology/captions.txt, validation/... and test/...")
    files = {name: below(folder_of(path), f"../../{name}/{kind}/captions.txt") for name in _ROCO_1}
    there = {name: file for name, file in files.items() if exists(file)}
    return {f"{name}/{kind}/captions.txt": _roco_1_part(file, name, kind) for name, file in there.items()}


def _roco_1_part(path: Location, split: str, kind: str) -> pd.DataFrame:
    names, licences = _roco_1_names(path)
    lines = [line.partition("\t") for line in read_text(path).split("\n") if line.strip()]
    ids = [line[0].strip() for line in lines]
    by_id = any(exists(below(folder_of(path), f"images/{one}.jpg")) for one in ids[:_TRIED])
    if not (names or by_id):
        raise UserError(f"{folder_of(path)} has neither licences.txt nor dlinks.txt, which name the images")
    images = [f"{one}.jpg" if by_id and line[1] else names.get(one, "") for one, line in zip(ids, lines, strict=True)]
    columns = {
        "image": [f"../../{split}/{kind}/images/{name}" if name else "" for name in images],
        "caption": [line[2].strip() for line in lines],
        "split": split,
        "id": ids,
        "article": [names.get(one, "").partition("_")[0] for one in ids],
        "licence": [licences.get(one, "") for one in ids],
    }
    return pd.DataFrame(columns)


def _roco_1_names(path: Location) -> tuple[dict[str, str], dict[str, str]]:
    """Identifier -> PMC<article>_<figure>.jpg, which was the name of its image, and -> its licence."""
    if licences := _first_there(path, "licences.txt"):
        rows = [line.strip().split(",") for line in read_text(licences).split("\n") if line.startswith("ROCO_")]
        rows = [row for row in rows if row[0] != "ROCO_ID"]
        return {row[0]: ",".join(row[1:-1]) for row in rows}, {row[0]: row[-1] for row in rows}
    if links := _first_there(path, "dlinks.txt"):
        found = re.findall(r"^(ROCO_\d+)\t.*?(PMC\d+)\.tar\.gz.*\t(.+?)\s*$", read_text(links), re.MULTILINE)
        return {one: f"{article}_{figure}" for one, article, figure in found}, {}
    return {}, {}


def _read_roco_2(path: Location) -> dict[str, pd.DataFrame]:
    """Split files -> tables, for all splits that are there."""
    files = {name: below(folder_of(path), name) for name in _ROCO_2}
    return {name: _roco_2_part(file, _ROCO_2[name]) for name, file in files.items() if exists(file)}


def _roco_2_part(path: Location, split: str) -> pd.DataFrame:
    raw = read_table(path)
    if raw.empty or not {"ID", "Caption"} <= set(raw):
        raise UserError(f"{path} is not of ROCOv2: rows with ID and Caption are expected, got {', '.join(raw)}")
    ids = raw["ID"].tolist()
    folder = _image_folder(path, split, ids)
    table = pd.DataFrame({"image": [f"{folder}/{one}.jpg" for one in ids], "caption": raw["Caption"], "split": split})
    table["id"] = ids
    for name, column in (("article", "PMCID"), ("licence", "Attribution")):
        if (stated := _lookup(path, "license_information.csv", "ID", column)) is not None:
            table[name] = [stated.get(one, "") for one in ids]
    names = _lookup(path, "cui_mapping.csv", "CUI", "Canonical name") or {}
    for name in ("concepts", "concepts_manual"):
        if (codes := _lookup(path, f"{split}_{name}.csv", "ID", "CUIs")) is not None:
            table[name] = [_concepts(codes.get(one, ""), names) for one in ids]
    return table


def _image_folder(path: Location, split: str, ids: Sequence[str]) -> str:
    """Where the images were unpacked to, by the first of them that is there."""
    places = (split, f"{split}_images/{split}", f"{split}_images", "images")
    return next((place for place in places if exists(below(folder_of(path), f"{place}/{ids[0]}.jpg"))), split)


def _lookup(path: Location, file: str, key: str, column: str) -> dict[str, str] | None:
    """key -> column of a table beside `path`; None where there is no such table or column."""
    there = _first_there(path, file)
    table = read_table(there) if there else pd.DataFrame()
    return dict(zip(table[key], table[column], strict=True)) if {key, column} <= set(table) else None


def _concepts(codes: str, names: Mapping[str, str]) -> str:
    """UMLS codes separated by ; -> their names separated by |."""
    return "|".join(names.get(code, code).replace("|", "/") for code in filter(None, map(str.strip, codes.split(";"))))
