"""Splits that last: how patients are divided, and the file that holds each of them to the split they once got.

    random    whole patients at random, classes in proportion (`splits.assign`)
    by_time   the latest years are the test set, the others are divided at random into train and val
    by_site   the named sites are the test set, likewise

Whoever is in the file stays where the file says, whatever the manifest has become since; patients who are new are
divided so that the whole comes as near to the wanted fractions as it can. The file is JSON. It names a patient by a
hash of the identifier that the manifest has, an image without a patient by a hash of its pixels. A hash hides no
identifier that can be guessed, such as a hospital's running number: pseudonyms should be in the manifest already.

What is called a patient here are all images of one, and exact duplicates of any of them (`splits.linked`).
"""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import date
from itertools import compress
from typing import Literal

import pandas as pd

from raymed.config import UserError, check_choice, check_range, from_dict, to_dict, to_json
from raymed.data.locations import Location
from raymed.data.manifest import SPLITS
from raymed.data.problems import Problem, rows_text
from raymed.data.splits import assign, check_enough, check_filled, linked
from raymed.storage import exists, read_bytes, write_bytes
from raymed.storage.paths import not_written

_FORMAT = 1
_NEEDS = {"by_time": ("year", "the year or date of each study"), "by_site": ("site", "the site of each study")}
_DATE = re.compile(r"(\d{4})(?:[-/](\d\d?)(?:[-/](\d\d?)(?:[ T].*)?)?)?|(\d{4})(\d\d)(\d\d)")


@dataclass(frozen=True)
class SplitRule:
    """How patients are divided among train, val and test."""

    how: Literal["random", "by_time", "by_site"] = "random"
    val_fraction: float = 0.15
    """Part of the images for validation; by time and by site of those that are not in the test set."""
    test_fraction: float = 0.2
    """Part of the images for the test; by time the years are chosen that come nearest to it."""
    seed: int = 0
    """Another number gives another split."""
    test_from: str = ""
    """by_time: the year or date from which on studies are the test set; "" = chosen by test_fraction."""
    test_sites: tuple[str, ...] = ()
    """by_site: the sites that are the test set."""

    def __post_init__(self) -> None:
        check_choice("data.split_how", self.how, ("random", *_NEEDS))
        check_range("data.val_fraction", self.val_fraction, 0, 1, low_open=True, high_open=True)
        check_range("data.test_fraction", self.test_fraction, 0, 1, low_open=True, high_open=True)
        held_out = self.val_fraction + self.test_fraction
        check_range("data.val_fraction + data.test_fraction", held_out, high=1, high_open=True)
        for field, value, how in (("test_from", self.test_from, "by_time"), ("test_sites", self.test_sites, "by_site")):
            if value and self.how != how:
                raise UserError(f"data.{field} has no effect with data.split_how {self.how!r}: it belongs to {how!r}")
        if self.test_from and normal_date(self.test_from) != self.test_from:
            raise UserError(f"data.test_from must be a year or a date such as 2023-09-01, got {self.test_from!r}")


@dataclass(frozen=True)
class SplitFile:
    """A split as it is kept. assigned: hash of a patient (or of an image without one) -> train, val or test."""

    rule: SplitRule
    assigned: dict[str, str]


def normal_date(text: str) -> str | None:
    """ "2023", "2023-05" or "2023-05-17" of a year or a date: ISO 8601, also with a time, or DICOM's YYYYMMDD.

    Such texts sort by time. None where it is none.
    """
    match = _DATE.fullmatch(text.strip())
    if match is None:
        return None
    year, month, day = match.group(1, 2, 3) if match[1] else match.group(4, 5, 6)
    try:
        found = date(int(year), int(month or 1), int(day or 1)).isoformat()
    except ValueError:
        return None
    return found if day else found[:7] if month else found[:4]


def read_split_file(path: Location) -> SplitFile:
    """A split file. Raises UserError where there is none, or it is no split file."""
    try:
        values = json.loads(read_bytes(path))
        version, assigned = values["format"], values["assigned"]
        if version != _FORMAT:
            raise UserError(
                f"the split file {path} has format {version}, this program reads {_FORMAT}: use a newer one"
            )
        for split in assigned.values():
            check_choice("split", split, SPLITS)
        return SplitFile(from_dict(SplitRule, values["rule"]), assigned)
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is no split file, or damaged: give another --data.split-file") from error


def write_split_file(path: Location, file: SplitFile) -> None:
    """Write it whole or not at all, in an order that does not depend on the manifest's.

    Raises UserError where the disk does not take it.
    """
    values = {"format": _FORMAT, "rule": to_dict(file.rule), "assigned": dict(sorted(file.assigned.items()))}
    try:
        write_bytes(path, to_json(values).encode())
    except OSError as error:
        raise not_written(str(path), error) from error


def unplaced(table: pd.DataFrame, rule: SplitRule) -> list[Problem]:
    """Rows that the rule cannot place: no date of a study, or no site, of any image of the patient; a date that cannot
    be read, or is too coarse to tell on which side of `test_from` it lies.

    Args:
        table: as `divide`.

    Raises:
        UserError: there is no such column.
    """
    if rule.how == "random":
        return []
    column, what = _NEEDS[rule.how]
    if column not in table:
        raise UserError(f"data.split_how {rule.how!r} needs a column with {what}: --data.{column} COLUMN")
    values = table[column].tolist()
    wrong = {i: why for i, text in enumerate(values) if text and (why := _wrong_date(text, rule))}
    groups = _groups(table)
    placed = {group for i, group in enumerate(groups) if values[i] and i not in wrong}
    missing = f"no {column} is stated, neither here nor for another image of the patient"
    lost = {i: missing for i, group in enumerate(groups) if not values[i] and group not in placed}
    rows = table["row"].tolist()
    return [Problem(rows[i], f"no {column}", why) for i, why in sorted((wrong | lost).items())]


def _wrong_date(text: str, rule: SplitRule) -> str | None:
    if rule.how != "by_time":
        return None
    found = normal_date(text)
    if found is None:
        return f"{text!r} is no year or date such as 2023 or 2023-05-17"
    coarse = len(found) < len(rule.test_from) and rule.test_from.startswith(found)
    return f"{text!r} may be before or after {rule.test_from}: state the date" if coarse else None


def divide(
    table: pd.DataFrame, positive: str, rule: SplitRule, notes: list[str], path: Location | None = None
) -> list[str]:
    """A split for every row: train, val or test.

    The split file is made where there is none, and extended by who is new. A new patient who shares an image with one
    in the file goes to the same split (with several, to the last of theirs). Of those in the file each stays, so that
    duplicates of an image may lie in two splits: see `splits.crossing`.

    Args:
        table: with the columns row, label, pixels (hash of the image); patient ("" = not known); stratum, which is
            divided in proportion instead of the label; year or site. `unplaced` must have found nothing in it.
        positive: the class that each split must have; "" = there are none.
        notes: gets what the user is to know.
        path: of the split file; None = nothing is kept.

    Raises:
        UserError: too few patients; a test set without positives, or with nothing else; years or sites that leave no
            test set or nothing to train on; the file was made by another rule, or for other patients.
    """
    keys, groups = _keys(table), _groups(table)
    before = read_split_file(path) if path is not None and exists(path) else None
    old = before.assigned if before else {}
    if before:
        _check_same(before, rule, keys, f"the split file {path}")
        rule = before.rule
    if rule.how == "by_time" and not rule.test_from:
        rule = replace(rule, test_from=_first_test_year(table, groups, rule))
    kept = _kept(groups, [old.get(key, "") for key in keys])
    if rule.how != "random":
        kept = _hold_out(table, groups, kept, rule, notes)
    split = _assign_rest(table, groups, kept, positive, rule)
    check_filled(table.assign(split=split), positive, _advice(rule))
    assigned = dict(zip(keys, split, strict=True))
    if before:
        notes.append(_extension(old, assigned, _what(table)))
    if path is not None and assigned.items() - old.items():
        write_split_file(path, SplitFile(rule, old | assigned))
    return split


def _what(table: pd.DataFrame) -> str:
    return "patient" if "patient" in table else "image"


def _groups(table: pd.DataFrame) -> list[str]:
    return linked(table["patient"].tolist() if "patient" in table else None, table["pixels"].tolist())


def _keys(table: pd.DataFrame) -> list[str]:
    patients = table["patient"].tolist() if "patient" in table else [""] * len(table)
    names = [
        f"patient {patient}" if patient else f"image {pixels}"
        for patient, pixels in zip(patients, table["pixels"].tolist(), strict=True)
    ]
    return [hashlib.sha256(f"raymed split: {name}".encode()).hexdigest()[:24] for name in names]


def _check_same(before: SplitFile, rule: SplitRule, keys: Sequence[str], file: str) -> None:
    """Raise UserError where the file was made by another rule, or knows none of these patients."""
    made, asked = to_dict(before.rule), to_dict(rule)
    if not rule.test_from and len(made["test_from"]) == len("2023"):  # it was chosen then
        asked["test_from"] = made["test_from"]
    for name, value in made.items():
        if asked[name] != value:
            raise UserError(
                f"{file} was made with {name} {value!r}, not {asked[name]!r}: state the same, or name another file, "
                "which divides all patients afresh"
            )
    if before.assigned.keys().isdisjoint(keys):
        raise UserError(
            f"{file} knows no patient of this manifest: it belongs to another one, or the pseudonyms were made with "
            "another key. Name another file to divide all patients afresh"
        )


def _kept(groups: Sequence[str], old: Sequence[str]) -> list[str]:
    """For each image the split that is decided by the file, its own or the last of its group's; "" = none."""
    last: dict[str, str] = {}
    for group, split in zip(groups, old, strict=True):
        last[group] = max(split, last.get(group, ""), key=("", *SPLITS).index)
    return [split or last[group] for group, split in zip(groups, old, strict=True)]


def _first_test_year(table: pd.DataFrame, groups: Sequence[str], rule: SplitRule) -> str:
    """The year for which the images of patients with a study from then on are nearest to the test fraction."""
    years = pd.Series([normal[:4] for normal in _latest(table, groups)])
    share = years.value_counts(normalize=True).sort_index(ascending=False).cumsum().iloc[:-1]
    if share.empty:
        raise UserError(
            f"every patient's latest study is of {years[0]}, so that no year can be the test set: state a date with "
            "--data.test-from, or --data.split-how random"
        )
    return str((share - rule.test_fraction).abs().idxmin())


def _latest(table: pd.DataFrame, groups: Sequence[str]) -> list[str]:
    """For each image when its patient was last studied."""
    dates = pd.Series([normal_date(text) or "" for text in table["year"]])
    return dates.groupby(list(groups)).transform("max").tolist()


def _hold_out(
    table: pd.DataFrame, groups: Sequence[str], kept: Sequence[str], rule: SplitRule, notes: list[str]
) -> list[str]:
    """`kept` with test for new patients who have a study in the test years or at the test sites."""
    inside = _inside(table, rule)
    wholly = pd.Series(inside).groupby(list(groups)).transform("any").tolist()
    decided = [split or ("test" if test else "") for split, test in zip(kept, wholly, strict=True)]
    where, rows = _where(rule), table["row"].tolist()
    notes.append(f"the test set is {where}: {decided.count('test') / len(decided):.0%} of the images")
    outside = [split == "test" and not here for split, here in zip(decided, inside, strict=True)]
    if any(outside):
        notes.append(f"not {where}, but of those in the test set: {rows_text([*compress(rows, outside)])}")
    early = [old in ("train", "val") and here for old, here in zip(kept, inside, strict=True)]
    if any(early):
        notes.append(f"{where}, but in train or val, as in the split file: {rows_text([*compress(rows, early)])}")
    return decided


def _inside(table: pd.DataFrame, rule: SplitRule) -> list[bool]:
    """For each image whether it is itself of the test years or sites."""
    if rule.how == "by_time":
        return [(normal_date(text) or "") >= rule.test_from for text in table["year"]]
    sites = sorted(set(table["site"]) - {""})
    if not rule.test_sites:
        raise UserError(f"which sites are the test set? State --data.test-sites; there are {', '.join(sites)}")
    for site in rule.test_sites:
        check_choice("data.test_sites", site, sites)
    return [site in rule.test_sites for site in table["site"]]


def _where(rule: SplitRule) -> str:
    return f"from {rule.test_from} on" if rule.how == "by_time" else f"at {', '.join(rule.test_sites)}"


def _assign_rest(
    table: pd.DataFrame, groups: Sequence[str], kept: Sequence[str], positive: str, rule: SplitRule
) -> list[str]:
    """The split of every image, where `kept` has those that are decided."""
    labels = table["label"].tolist()
    strata = table["stratum"].tolist() if "stratum" in table else labels
    val, test = rule.val_fraction, rule.test_fraction
    random = rule.how == "random"
    fractions = (1 - val - test, val, test) if random else (1 - val, val, 0)
    rest = [i for i, split in enumerate(kept) if random or split != "test"]
    _check_enough([groups[i] for i in rest], [labels[i] for i in rest], positive, rule, _what(table))
    # A group of which the file has two splits is in two pieces, and each stays.
    pieces = [f"{groups[i]}\0{kept[i]}" if kept[i] else groups[i] for i in rest]
    stay = {piece: kept[i] for piece, i in zip(pieces, rest, strict=True) if kept[i]}
    found = assign(pieces, [strata[i] for i in rest], positive, fractions, rule.seed, stay)
    split = list(kept)
    for i, side in zip(rest, found, strict=True):
        split[i] = side
    return split


def _check_enough(groups: list[str], labels: list[str], positive: str, rule: SplitRule, what: str) -> None:
    if rule.how == "random":
        return check_enough(groups, labels, positive, SPLITS, what)
    try:
        return check_enough(groups, labels, positive, ("train", "val"), what)
    except UserError as error:
        raise UserError(f"the test set is {_where(rule)}; of what is left, {error}. Choose another test set") from error


def _advice(rule: SplitRule) -> str:
    flag = {"random": "--data.split-seed", "by_time": "--data.test-from", "by_site": "--data.test-sites"}[rule.how]
    return f"choose another {flag}"


def _extension(old: dict[str, str], assigned: dict[str, str], what: str) -> str:
    new = [split for key, split in assigned.items() if key not in old]
    counts = ", ".join(f"{new.count(split)} {split}" for split in SPLITS)
    gone = len(old.keys() - assigned.keys())
    return (
        f"split file: {len(assigned) - len(new)} {what}s stay where they were"
        + (f", {len(new)} are new ({counts})" if new else "")
        + (f", {gone} are not in this manifest" if gone else "")
    )
