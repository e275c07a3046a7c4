"""Which frame of which image goes with which row, and why the others are left out.

Every image file has one fate: it is in `items`, or in `left_out` with a reason. So the flow of exclusions adds up.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from raymed.config import UserError
from raymed.data.intake.header import Found
from raymed.data.intake.matching import Matches, difference, match
from raymed.data.intake.rows import Finding, Row, told_apart_by
from raymed.data.intake.settings import ImportConfig


@dataclass(frozen=True)
class Item:
    """One row of the manifest to be: a frame of an image (None where it has one) and its row. patient: identifier of
    the person, "" where nobody states it."""

    image: int
    frame: int | None
    row: Row
    patient: str


@dataclass
class Selection:
    """left_out: number of an image -> why it is not used. findings: for the list of problems."""

    left_out: dict[int, str] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    _linked: list[Item] = field(default_factory=list)

    @property
    def items(self) -> list[Item]:
        """What is used."""
        return [item for item in self._linked if item.image not in self.left_out]

    def use(self, image: int, frames: Sequence[int | None], row: Row, patient: str) -> None:
        """Use these frames of the image, unless it is left out."""
        self._linked += [Item(image, frame, row, patient) for frame in frames]

    def leave_out(self, image: int, why: str) -> None:
        """The image is not used, for the first reason that was found."""
        self.left_out.setdefault(image, why)

    def stop(self, image: int, path: str, row: Row, kind: str, why: str) -> None:
        """The image is not used, which ends an import that does not skip."""
        text = f"row {row.number}: {why}"
        self.findings.append(Finding(kind, text, row.number, row.key, path, stops=True))
        self.leave_out(image, kind)


def select(found: Sequence[Found], rows: Sequence[Row], persons: Mapping[str, str], config: ImportConfig) -> Selection:
    """Link images and rows.

    Args:
        persons: identifier -> the one that stands for the person, for those with several.

    Raises:
        UserError: nothing matches; labelled images have several modalities and none is stated.
    """
    chosen = Selection()
    by_number = {row.number: row for row in rows}
    matches = match([image.key for image in found], {row.number: row.key for row in rows if row.key})
    _report_unmatched(chosen, found, by_number, matches, config)
    for key, numbers in matches.rows.items():
        same, images = [by_number[number] for number in numbers], matches.images[key]
        patients = {persons.get(name, name) for i in images if (name := found[i].patient)}
        patients |= {persons.get(name, name) for row in same if (name := row.stated.get("patient", ""))}
        if len(patients) > 1:
            _several_patients(chosen, same, images, sorted(patients), config.columns.patient)
            continue
        for i in images:
            _link(chosen, i, found, [*images], same, next(iter(patients), ""), config)
    _only_modalities(chosen, found, config.modalities)
    return chosen


def _report_unmatched(
    chosen: Selection, found: Sequence[Found], by_number: Mapping[int, Row], matches: Matches, config: ImportConfig
) -> None:
    for i in matches.without_label:
        why = "no row in the sheet" if found[i].key else f"no {config.key} in its header"
        chosen.leave_out(i, why)
        chosen.findings.append(Finding("image without a label", why, None, found[i].key, found[i].path))
    for number in matches.without_image:
        text = f"row {number}: no image has its key"
        chosen.findings.append(Finding("label without an image", text, number, by_number[number].key))
    for near in matches.near_misses:
        text = f"row {near.row} and an image would match but for {near.difference}"
        image = found[near.image]
        chosen.findings.append(Finding("near miss", text, near.row, by_number[near.row].key, image.path))
    if not matches.rows:
        alike = Counter(near.difference for near in matches.near_misses).most_common(1)
        hint = f" {alike[0][1]} pairs differ only in {alike[0][0]}: mend that in the sheet." if alike else ""
        files = {_file_name(image.path) for image in found}
        named = sum(1 for row in by_number.values() if _file_name(row.key) in files)
        if config.key == "path" and named:
            hint += f" {named} rows end in the name of an image: --images must be where the sheet's paths begin."
        raise UserError(
            f"no {config.key} of an image stands in the sheet ({len(found)} images, {len(by_number)} rows).{hint} "
            "Check --key and --columns.key"
        )


def _file_name(path: str) -> str:
    return path.replace("\\", "/").rpartition("/")[2]


def _several_patients(
    chosen: Selection, rows: Sequence[Row], images: Sequence[int], patients: Sequence[str], column: str | None
) -> None:
    kind, numbers = "several patients with one key", ", ".join(str(row.number) for row in rows)
    alike = difference(patients[0], patients[1])
    hint = f", which differ only in {alike}" if alike else ""
    who = f"{len(images)} image{'s' * (len(images) != 1)} with its key" + f" and the column {column!r}" * bool(column)
    text = f"row {numbers}: {who} name {len(patients)} patients{hint}"
    chosen.findings.append(Finding(kind, text, rows[0].number, rows[0].key, stops=True))
    for i in images:
        chosen.leave_out(i, kind)


def _link(
    chosen: Selection,
    i: int,
    found: Sequence[Found],
    together: Sequence[int],
    rows: Sequence[Row],
    patient: str,
    config: ImportConfig,
) -> None:
    """Add what one image gives with the rows of its key. together: all images of that key."""
    image, apart = found[i], told_apart_by(rows)
    usable = [row for row in rows if not row.problem]
    if not usable:
        return chosen.leave_out(i, f"its row cannot be used: {rows[0].problem}")
    sided = [row for row in usable if _one_side(row.stated.get("side", ""), image.tags.get("side", ""))]
    if len(rows) > 1 and apart == "side":
        sided = [row for row in usable if row.stated["side"] == image.tags.get("side", "")]
    if not sided:
        return chosen.stop(i, image.path, usable[0], "another side", "the image's header does not name the row's side")
    several = [k for k in together if found[k].frames > 1]
    if apart == "frame" and len(rows) > 1 and (image.frames == 1 or len(several) > 1):
        why = "its key has several rows, which name frames of several objects"
        return chosen.stop(i, image.path, usable[0], "frame of which object", why)
    kept = [row for row in sided if row.label.kind != "excluded"]
    if not kept:
        return chosen.leave_out(i, f"excluded: {sided[0].label.name}")
    for row in kept:
        named = row.stated.get("frame", "")
        if image.frames > 1 and named and int(named) > image.frames:
            return chosen.stop(i, image.path, row, "no such frame", f"the image has {image.frames} frames")
        chosen.use(i, _frames(image.frames, named, config.frames), row, patient)


def _one_side(row: str, image: str) -> bool:
    return "" in (row, image) or row == image or "both" in (row, image)


def _frames(num: int, named: str, which: str) -> Sequence[int | None]:
    if num == 1:
        return [None]
    if named:
        return [int(named)]
    return {"first": [1], "middle": [(num + 1) // 2], "last": [num], "all": range(1, num + 1)}[which]


def _only_modalities(chosen: Selection, found: Sequence[Found], wanted: Sequence[str]) -> None:
    """Leave out images of other modalities."""
    stated = {item.image: found[item.image].tags.get("modality", "") for item in chosen.items}
    counts = Counter(stated.values())
    listing = ", ".join(f"{name or 'not stated'} ({num})" for name, num in counts.most_common())
    if not wanted and len(counts) > 1:
        first = counts.most_common(1)[0][0]
        raise UserError(f"the labelled images have several modalities: {listing}. State yours: --modalities {first}")
    if wanted and counts and counts.keys().isdisjoint(wanted):
        raise UserError(f"no labelled image has the modality {' or '.join(wanted)} (--modalities); there are {listing}")
    for i, modality in stated.items():
        if wanted and modality not in wanted:
            chosen.leave_out(i, f"modality {modality or 'not stated'}")
