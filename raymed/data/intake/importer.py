"""Images from a hospital's share and a sheet of labels -> a manifest of pseudonyms, ready to train on.

    scan, sheet -> rows -> select -> pictures -> manifest.csv, unlabelled.csv, import.json
                                                 beside the key: the vault, problems.csv, text_regions.png

What lies in the project names nobody. What may (the vault, the list of problems, pictures of text that was blanked)
lies beside the key, readable by its owner only. The same command goes on where an interrupted import was, and takes in
what has been added since: pseudonyms stay the same.
"""

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd

from raymed.config import UserError, check_choice, to_json
from raymed.data.intake import outputs
from raymed.data.intake.matching import match, one_person
from raymed.data.intake.pictures import make_pictures, remove_others, show_boxes
from raymed.data.intake.pseudonyms import Pseudonyms, default_key_file, load_key, vault_of
from raymed.data.intake.rows import (
    Finding,
    Row,
    column_notes,
    identifier_columns,
    read_rows,
    sheet_identifiers,
    used_columns,
)
from raymed.data.intake.scan import Scan, scan
from raymed.data.intake.selection import Selection, select
from raymed.data.intake.settings import ImportConfig
from raymed.data.intake.sheet import clean, read_sheet
from raymed.data.intake.telling import Telling
from raymed.storage import storage_folder, write_atomic, write_private
from raymed.storage.paths import not_written

RECORD = "import.json"
_SHOWN = 20


@dataclass(frozen=True)
class ImportReport:
    """What an import has done.

    manifest: where it lies. classes: name -> images. flow: (text, number of files): those found, those left out by
    reason, those used. counts: of images, cases, patients, rows, by name. notes: what the user is to know. private:
    folder beside the key, for what may name patients. command: trains on the manifest.
    """

    manifest: Path
    classes: dict[str, int]
    flow: list[tuple[str, int]]
    counts: dict[str, int]
    notes: list[str]
    private: Path
    command: str

    def text(self) -> str:
        """For the terminal."""
        width = max(len(text) for text, _ in self.flow)
        lines = [f"{text:{width}}  {num:6d}" for text, num in self.flow]
        lines.append("classes: " + ", ".join(f"{name} {num}" for name, num in self.classes.items()))
        lines += [", ".join(f"{name.replace('_', ' ')}: {num}" for name, num in self.counts.items()), *self.notes]
        lines.append(f"what was left out, with identifiers, not to be shared: {self.private / 'problems.csv'}")
        return "\n".join([*lines, f"manifest: {self.manifest}", "train with:", f"  {self.command}"])


def import_data(config: ImportConfig) -> ImportReport:
    """Import images and labels.

    Returns:
        What was done. It and everything in `config.to` hold no identifiers.

    Raises:
        UserError: a folder, the sheet or a column is not there; nothing matches; with on_problem "error", rows or
            images that cannot be used (all are counted, and listed beside the key); the share stopped answering.
    """
    places = _places(config)
    key = load_key(places.key_file, [places.to, places.root, storage_folder()])
    pseudonyms = Pseudonyms(key)
    _check_same_key(places.to, pseudonyms)
    places.private.mkdir(mode=0o700, exist_ok=True)
    rows, findings, config, told = _sheet(config)
    persons = one_person(read_sheet(config.patients, keys=None)) if config.patients else {}
    scanned = _scan(places, persons, config)
    told += _strangers(persons, scanned, rows, config)
    telling = _telling(scanned, rows, config)
    chosen = _choose(scanned, rows, findings, persons, places, config)
    if not config.copy:
        _check_paths(scanned, chosen, telling)
    used = _pictures(scanned, chosen, pseudonyms, places, config)

    table, identities = outputs.manifest_table(used, scanned.found, pseudonyms, config)
    emptied = outputs.without_identifiers(table, telling, config.columns.keep)
    labelled, flow = table.loc[table["label"] != "", :], outputs.flow(scanned, chosen)
    if labelled.empty:
        raise UserError("\n".join(["no image with a label is left:", *(f"  {text}: {num}" for text, num in flow)]))
    vault_of(places.key_file, key).add(identities)
    notes = told + outputs.notes(scanned.found, used, chosen, config)
    notes += [f"column {name}: {num} cells named a patient and are empty" for name, num in emptied.items()]
    if config.positive is None:
        notes.append("the command takes the rarest class for the one to be found: --positive NAME states another")
    manifest = places.to / "manifest.csv"
    report = ImportReport(
        manifest=manifest,
        classes={str(name): int(num) for name, num in labelled["label"].value_counts().items()},
        flow=flow,
        counts=_counts(table, labelled, rows),
        notes=notes,
        private=places.private,
        command=outputs.training_command(manifest, places.root, labelled, used, config),
    )
    _write(table, labelled, report, pseudonyms)
    remove_others(places.to, {Path(name).stem for name in table["image"]})
    return report


@dataclass(frozen=True)
class _Places:
    """root: the images' folder. to: what is shared. private: beside the key, for what may name patients; one key may
    serve several imports."""

    root: Path
    to: Path
    key_file: Path
    private: Path


def _places(config: ImportConfig) -> _Places:
    to, root = config.to.expanduser().absolute(), config.images.expanduser()
    if to.resolve().is_relative_to(root.resolve()):
        raise UserError(f"--to {to} lies in the images' folder, where its copies would be images too: give another")
    key_file = (config.key_file or default_key_file()).expanduser().absolute()
    private = key_file.parent / f"{to.name}-{hashlib.sha256(str(to).encode()).hexdigest()[:6]}"
    return _Places(root, to, key_file, private)


def _sheet(config: ImportConfig) -> tuple[list[Row], list[Finding], ImportConfig, list[str]]:
    """The rows, what is wrong with them, the config with the columns that go by their name, and notes on the sheet."""
    sheet = read_sheet(
        config.labels, config.sheet, config.encoding, header=config.header_row, keys=identifier_columns(config)
    )
    columns = used_columns(sheet, config, config.labels)
    notes = column_notes(sheet, config.columns, columns)
    notes += ["the sheet was read as cp949: where letters look wrong, state --encoding"] * (sheet.encoding == "cp949")
    return *read_rows(sheet, columns, config.label_map()), replace(config, columns=columns), notes


def _scan(places: _Places, persons: Mapping[str, str], config: ImportConfig) -> Scan:
    from rich.console import Console
    from rich.progress import Progress

    console = Console()
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("Scanning", total=None)
        return scan(
            places.root,
            config.key,
            patterns=config.files,
            site=config.site,
            persons=persons,
            checkpoint=places.private / "scan.jsonl",
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )


def _strangers(persons: Mapping[str, str], scanned: Scan, rows: Sequence[Row], config: ImportConfig) -> list[str]:
    """A note on identifiers in the file of patients that are nobody's here. Raises UserError where some are somebody's
    but for a trifle, such as zeros that Excel has dropped: patients that are one would be two, in two splits."""
    known = {image.patient for image in scanned.found} | {row.stated.get("patient", "") for row in rows}
    nobodys, there = sorted(set(persons) - known), sorted(known - {""})
    near = [
        miss
        for miss in match(there, dict(enumerate(nobodys))).near_misses
        if persons[nobodys[miss.row]] != persons.get(there[miss.image])
    ]
    if near:
        trifles = " or ".join(sorted({miss.difference for miss in near}))
        raise UserError(
            f"--patients {config.patients}: {len({miss.row for miss in near})} of its identifiers differ from those of "
            f"images and sheet only in {trifles}, and would join nobody: format its cells as text and type them again, "
            "or take their rows out"
        )
    return [f"--patients: {len(nobodys)} of its identifiers stand in no image and no row"] * bool(nobodys)


def _telling(scanned: Scan, rows: Sequence[Row], config: ImportConfig) -> Telling:
    """What must stand nowhere in the project."""
    identifiers = outputs.image_identifiers(scanned.found, config.key) | sheet_identifiers(rows, config)
    return Telling(identifiers, {image.name for image in scanned.found})


def _choose(
    scanned: Scan,
    rows: Sequence[Row],
    findings: Sequence[Finding],
    persons: Mapping[str, str],
    places: _Places,
    config: ImportConfig,
) -> Selection:
    """What goes with what."""
    chosen = select(scanned.found, rows, persons, config)
    chosen.findings[:0] = findings
    _settle(chosen.findings, places.private, config)
    if config.positive is not None:
        labels = (item.row.label for item in chosen.items)
        check_choice(
            "positive", clean(config.positive), sorted({label.name for label in labels if label.kind == "class"})
        )
    return chosen


def _check_paths(scanned: Scan, chosen: Selection, telling: Telling) -> None:
    """A manifest without copies repeats the images' paths."""
    images = [scanned.found[i] for i in {item.image for item in chosen.items}]
    num = sum("path" in image.telling or telling.within(image.path) for image in images)
    if num:
        raise UserError(
            f"the paths of {num} images hold a name or number of a patient or case, and the manifest would repeat "
            "them: leave out --no-copy"
        )


def _pictures(
    scanned: Scan, chosen: Selection, pseudonyms: Pseudonyms, places: _Places, config: ImportConfig
) -> outputs.Used:
    """The images that can be read, with their rows."""
    items = chosen.items
    wanted = [(scanned.found[item.image].path, item.frame) for item in items]
    pictures = make_pictures(places.root, wanted, places.to, pseudonyms, blanked=config.blank, copy=config.copy)
    for item, picture in zip(items, pictures, strict=True):
        if picture.problem:
            path = scanned.found[item.image].path
            chosen.stop(item.image, path, item.row, "unreadable image", f"an image with its key: {picture.problem}")
    _settle(chosen.findings, places.private, config)
    show_boxes(places.root, wanted, pictures, places.private / "text_regions.png")
    return [(item, p) for item, p in zip(items, pictures, strict=True) if item.image not in chosen.left_out]


def _settle(findings: Sequence[Finding], private: Path, config: ImportConfig) -> None:
    """Write the list of problems; raise UserError where one of them ends the import."""
    columns = ["kind", "row", "key", "image", "text"]
    table = pd.DataFrame([[getattr(finding, name) for name in columns] for finding in findings], columns=columns)
    table["row"] = table["row"].astype("Int64")
    # With a byte order mark: Excel takes the file for cp949 otherwise, and Hangul for something else.
    write_private(private / "problems.csv", table.to_csv(index=False).encode("utf-8-sig"))
    stopping = [finding for finding in findings if finding.stops]
    if config.on_problem == "skip" or not stopping:
        return
    lines = [f"  {finding.kind}: {finding.text}" for finding in stopping[:_SHOWN]]
    lines += [f"  ... and {len(stopping) - _SHOWN} more"] * (len(stopping) > _SHOWN)
    raise UserError(
        "\n".join(
            [
                "rows or images cannot be used:",
                *lines,
                f"With identifiers, not to be shared: {private / 'problems.csv'}",
                "Mend them, or leave them out, counted: --on-problem skip",
            ]
        )
    )


def _check_same_key(to: Path, pseudonyms: Pseudonyms) -> None:
    record = to / RECORD
    if record.is_file() and json.loads(record.read_text())["key"] != _key_mark(pseudonyms):
        raise UserError(
            f"{to} was imported with another key, which would give every patient a new pseudonym: name that key "
            "(--key-file), or import into another folder (--to)"
        )


def _key_mark(pseudonyms: Pseudonyms) -> str:
    """Tells keys apart, and nothing about them."""
    return pseudonyms.of("image", "the key itself")


def _counts(table: pd.DataFrame, labelled: pd.DataFrame, rows: Sequence[Row]) -> dict[str, int]:
    people = {f"{what}s": len(set(labelled[what])) for what in ("case", "patient") if what in labelled}
    rest = {"unlabelled_images": len(table) - len(labelled), "rows_of_the_sheet": len(rows)}
    return {"images": len(labelled)} | people | rest


def _history(file: Path, counted: dict[str, Any]) -> dict[str, Any]:
    """What was counted, since when that is so (seconds since 1970), and "earlier" the same of former imports: a paper
    tells the flow of the data that its training saw, though the set has grown."""
    told = json.loads(file.read_text()) if file.is_file() else {}
    earlier, former = (
        told.get("earlier", []),
        {"time": told.get("time", 0), **{name: told.get(name) for name in counted}},
    )
    if former == former | counted:
        return former | {"earlier": earlier}
    return counted | {"time": time.time(), "earlier": [*earlier, *[former] * bool(told)]}


def _write(table: pd.DataFrame, labelled: pd.DataFrame, report: ImportReport, pseudonyms: Pseudonyms) -> None:
    """The manifest comes last: it is there only with all it needs."""
    to = report.manifest.parent
    record = {"key": _key_mark(pseudonyms), "classes": report.classes, "notes": report.notes}
    record |= _history(to / RECORD, {"counts": report.counts, "flow": [list(step) for step in report.flow]})
    try:
        write_atomic(to / "unlabelled.csv", table.loc[table["label"] == "", :].to_csv(index=False))
        write_atomic(to / RECORD, to_json(record))
        write_atomic(report.manifest, labelled.to_csv(index=False))
    except OSError as error:
        raise not_written(to, error) from error
