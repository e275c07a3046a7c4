"""Manifest, images and split together: what training and evaluation see of the data.

    read_manifest -> patients on one side -> decode once -> duplicates on one side -> DataSet -> Batch, regions

Patients and cases are numbers here, in order of appearance; their identifiers go no further than the table.
"""

import functools
import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from raymed.config import UserError
from raymed.data import splits
from raymed.data.cache import Decoded, decode
from raymed.data.intake.pseudonyms import PSEUDONYM
from raymed.data.locations import as_location
from raymed.data.manifest import SPLITS, DataConfig, Manifest, read_manifest
from raymed.data.preprocess import Preprocess
from raymed.data.problems import Problem, rows_text, settle
from raymed.data.readers import ImageProblem
from raymed.data.regions import Region, check_regions, load_regions


@dataclass(frozen=True)
class Batch:
    """Some images of a data set.

    image: (B, C, H, W) uint8 or uint16, None where `cached` holds what is made of it. label: (B,) int64, 1 = positive.
    index: (B,) int64, row numbers in the manifest, from 1: what the randomness of a sample hangs on. cached: what a
    frozen network makes of the images, each (B, ...).
    """

    image: Tensor | None
    label: Tensor
    index: Tensor
    cached: dict[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.label)

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on a device."""
        image = None if self.image is None else self.image.to(device)
        cached = {name: tensor.to(device) for name, tensor in self.cached.items()}
        return Batch(image, self.label.to(device), self.index.to(device), cached)

    def slice(self, start: int, stop: int) -> "Batch":
        """The samples start, ..., stop - 1."""
        image = None if self.image is None else self.image[start:stop]
        cached = {name: tensor[start:stop] for name, tensor in self.cached.items()}
        return Batch(image, self.label[start:stop], self.index[start:stop], cached)

    def unit_image(self) -> Tensor:
        """The images as float32 in [0, 1] (B, C, H, W)."""
        assert self.image is not None
        return self.image.to(torch.float32) / torch.iinfo(self.image.dtype).max


@dataclass
class DataSet:
    """N images with their labels and splits. Arrays have one entry an image; "index" below means 0, ..., N - 1.

    classes: names of all classes. positive: the one to be found; "" where there are no labels, and then all images have
    one class and the label 0. labels: (N,) int64, 1 = positive. class_codes: (N,) int64, index into classes. patients:
    (N,) int64 codes; where the manifest states no patient each case counts as one, and without cases every image
    (`grouped_by`); has_patients: whether it states any. cases: codes, views: text, or None. sides: of the patient,
    text, or None. seen_sides: where in the picture those are, "left", "right", or something else where that is not
    known; None without sides. groups: name of a column -> (N,) text, of `DataConfig.groups`, those there are. readers:
    the same of `DataConfig.readers`. rows: (N,) int64 row numbers in the manifest, from 1, ascending.
    splits: train, val, test -> indices (ascending). fingerprint: sha256 of pixels, labels, splits; masks and boxes do
    not count, since nothing is trained or scored with them. preprocess: with size, mean and std filled in. notes: what
    the user is to know, one line each.
    """

    classes: tuple[str, ...]
    positive: str
    labels: np.ndarray
    class_codes: np.ndarray
    patients: np.ndarray
    has_patients: bool
    cases: np.ndarray | None
    views: np.ndarray | None
    sides: np.ndarray | None
    rows: np.ndarray
    splits: dict[str, np.ndarray]
    fingerprint: str
    preprocess: Preprocess
    notes: list[str]
    measured: bool
    """Whether the normalisation was measured on the training split."""
    pixels_path: Path
    positions: np.ndarray
    """(N,) rows of the array at pixels_path."""
    content: np.ndarray
    """(N,) uint64, the first half of a hash of each image's pixels: tells images apart across manifests."""
    patient_keys: np.ndarray
    """(N,) uint64, the same of each patient's pseudonym, which an import made with its key so that it means the same
    person in every manifest of that key; 0 of other names, which may be anybody's elsewhere."""
    seen_sides: np.ndarray | None = None
    groups: dict[str, np.ndarray] = field(default_factory=dict)
    readers: dict[str, np.ndarray] = field(default_factory=dict)
    regions_path: Path | None = None
    """Where masks and boxes are written down, in the order of the array; None where the manifest has neither."""

    def __post_init__(self) -> None:
        self._pixels: np.ndarray = np.load(self.pixels_path, mmap_mode="r")

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def grouped_by(self) -> Literal["patient", "case", "image"]:
        """What `patients` are codes of: within one, images are not independent; two are never resampled as one."""
        return "patient" if self.has_patients else "image" if self.cases is None else "case"

    def __getstate__(self) -> dict[str, Any]:
        # Pickle would copy the whole memory map; the other side opens the file.
        return {name: value for name, value in vars(self).items() if name != "_pixels"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.__post_init__()

    def batch(self, indices: np.ndarray) -> Batch:
        """The images at `indices` (B,), on the CPU."""
        image = self._pixels[self.positions[indices]].transpose(0, 3, 1, 2)
        label, index = self.labels[indices], self.rows[indices]
        return Batch(torch.from_numpy(np.ascontiguousarray(image)), torch.from_numpy(label), torch.from_numpy(index))

    def regions(self, indices: np.ndarray) -> list[np.ndarray | None]:
        """Where the finding lies in the images at `indices`, as the network sees them: (size, size) bool, by the mask
        or else the boxes; None where neither is stated, or nothing of it is left (an empty mask, a lesion that `fit`
        crops away). Masks are read now; UserError for one that has changed since `load` and cannot be used.
        """
        if self.regions_path is None:
            return [None] * len(indices)
        regions = load_regions(self.regions_path)
        return [self._region(regions[self.positions[i]], int(self.rows[i])) for i in indices]

    def _region(self, region: Region, row: int) -> np.ndarray | None:
        try:
            pixels = region.read()
        except ImageProblem as problem:
            raise UserError(f"row {row} of the manifest: {problem}") from problem
        inside = None if pixels is None else self.preprocess.to_region(pixels)
        return None if inside is None or not inside.any() else inside

    def with_splits(self, splits: dict[str, np.ndarray]) -> "DataSet":
        """The same images split otherwise (name -> ascending indices), for cross-validation; means and deviations that
        belong to the training split are measured again."""
        digest = hashlib.sha256(self.fingerprint.encode())
        for name in sorted(splits):
            digest.update(name.encode() + self.content[splits[name]].tobytes())
        data = replace(self, splits=splits, fingerprint=digest.hexdigest())
        if self.measured:
            data.preprocess = replace(data.preprocess, **_measure(data))
        return data

    def summary(self) -> str:
        """Images by split and class, patients by split, fingerprint and notes, as text."""
        counts = pd.DataFrame(
            {
                split: {name: int((self.class_codes[i] == k).sum()) for k, name in enumerate(self.classes)}
                | {"images": len(i), "patients": len(np.unique(self.patients[i])) if self.has_patients else "unknown"}
                for split, i in self.splits.items()
            }
        ).rename(index={self.positive: f"{self.positive} (positive)"})
        return "\n".join([counts.T.to_string(), f"data fingerprint {self.fingerprint}", *self.notes])


@functools.singledispatch
def load(config: DataConfig, cache_dir: Path) -> DataSet:
    """Read, check, decode and split a data set. A kind of config with more to read registers a function of its own.

    Args:
        cache_dir: where decoded images are kept; the second call with the same data decodes nothing.

    Raises:
        UserError: whatever `read_manifest` and `decode` raise; images that cannot be read; a patient in two of the
            given splits; a mask or box that cannot be used; too few patients to split; a split without positives or
            without others. Rows are named, and with `config.on_problem = "skip"` left out where that helps.
    """
    return assemble(read_manifest(config), config, cache_dir)[0]


def assemble(
    manifest: Manifest,
    config: DataConfig,
    cache_dir: Path,
    choose: Callable[[pd.DataFrame], pd.DataFrame] = lambda table: table,
    divide: Callable[[pd.DataFrame, str, DataConfig, list[str]], pd.DataFrame] | None = None,
) -> tuple[DataSet, pd.DataFrame]:
    """Decode and split what a manifest names: the data set, and its table.

    Args:
        divide: (table, positive, config, notes) -> the table with its column `split`; None = by the config.
        choose: which of the decoded rows are to be divided among the splits, by their hash in the column `pixels`; a
            column `stratum` tells what to divide in proportion, instead of the label.

    Raises:
        UserError: as `load`.
    """
    notes = manifest.notes
    table = _with_patients(manifest.table, notes)
    divide = divide or _split_of_config
    if "split" in table and "patient" in table:
        problems = splits.crossing(table, "patient", "patient in a later split too")
        advice = ", split afresh by patient (--data.split '')"
        table = settle(table, problems, config.on_problem, notes, advice)
    decoded = decode(list(table["source"]), config.preprocess, cache_dir)
    table = table.assign(position=range(len(table)), pixels=decoded.hashes)
    regions_path, misplaced = _regions(table, decoded, cache_dir)
    advice = ", leave the column unused (--data.mask '' or --data.box '')" * bool(misplaced)
    table = settle(table, [*_unreadable(table, decoded), *misplaced], config.on_problem, notes, advice)
    table = divide(choose(table), manifest.positive, config, notes)
    notes += splits.duplicate_notes(table)
    return _data_set(table, manifest, config.preprocess, decoded, regions_path), table


def load_external(config: DataConfig, cache_dir: Path) -> DataSet:
    """An external test set: every usable image is in the split test, and nothing is ever learned of it.

    A column with splits is not looked at. Raises UserError as `load` does, less what is about splits.
    """

    def all_test(table: pd.DataFrame, positive: str, config: DataConfig, notes: list[str]) -> pd.DataFrame:
        _note_patients(table.assign(split="test"), notes)
        return table.assign(split="test")

    config = replace(config, split="")
    return assemble(read_manifest(config), config, cache_dir, divide=all_test)[0]


def _unreadable(table: pd.DataFrame, decoded: Decoded) -> list[Problem]:
    rows, images = table["row"].tolist(), table["image"].tolist()
    return [Problem(rows[i], "unreadable image", f"{images[i]}: {why}") for i, why in decoded.problems.items()]


def _regions(table: pd.DataFrame, decoded: Decoded, cache_dir: Path) -> tuple[Path | None, list[Problem]]:
    """The file of masks and boxes, in the order of the decoded images, and what is wrong with which."""
    if "mask" not in table and "box" not in table:
        return None, []
    masks = table["mask"] if "mask" in table else [None] * len(table)
    boxes = table["box"] if "box" in table else [()] * len(table)
    parts = zip(decoded.shapes, masks, boxes, strict=True)
    nothing = Region((), None, ())  # where there is no image to compare them with
    path, problems = check_regions([Region(*part) if part[0] else nothing for part in parts], cache_dir)
    rows = table["row"].tolist()
    return path, [Problem(rows[i], "unusable mask or box", why) for i, why in problems.items()]


def _split_of_config(table: pd.DataFrame, positive: str, config: DataConfig, notes: list[str]) -> pd.DataFrame:
    table = _split(table, positive, config, notes)
    splits.check_filled(table, positive)
    return table


def _split(table: pd.DataFrame, positive: str, config: DataConfig, notes: list[str]) -> pd.DataFrame:
    """The table with its column `split`: the given one without duplicates across it, or a new one."""
    _note_patients(table, notes)
    if "split" not in table:
        return _without_crossing(_divided(table, positive, config, notes), notes)
    if config.split_file or config.split_how != "random":
        notes.append("the manifest has a column split: data.split_file and data.split_how have no effect")
    table = _without_crossing(table, notes)
    present = set(table["split"])
    if "val" in present or "train" not in present:
        return table
    notes.append(f"no val split is given: {config.val_fraction:.0%} of train is used")
    train = table["split"] == "train"
    fractions = (1 - config.val_fraction, config.val_fraction, 0)
    table.loc[train, "split"] = _assigned(table.loc[train, :], positive, fractions, config.split_seed)
    return table


def _divided(table: pd.DataFrame, positive: str, config: DataConfig, notes: list[str]) -> pd.DataFrame:
    """The table with a split by the config's rule; patients whom its file knows stay where they were."""
    from raymed.data.split_file import SplitRule, divide, unplaced

    fractions = config.val_fraction, config.test_fraction
    rule = SplitRule(config.split_how, *fractions, config.split_seed, config.test_from, config.test_sites)
    names = {"group year": "year", "group site": "site"}
    table = settle(table, unplaced(table.rename(columns=names), rule), config.on_problem, notes)
    path = as_location(config.split_file) if config.split_file else None
    return table.assign(split=divide(table.rename(columns=names), positive, rule, notes, path))


def _without_crossing(table: pd.DataFrame, notes: list[str]) -> pd.DataFrame:
    across = splits.crossing(table, "pixels", "exact duplicate of an image in a later split")
    return settle(table, across, "skip", notes)


def _assigned(table: pd.DataFrame, positive: str, fractions: tuple[float, float, float], seed: int) -> list[str]:
    labels, hashes = table["label"].tolist(), table["pixels"].tolist()
    patients = table["patient"].tolist() if "patient" in table else None
    groups = splits.linked(patients, hashes)
    wanted = [name for name, fraction in zip(SPLITS, fractions, strict=True) if fraction]
    splits.check_enough(groups, labels, positive, wanted, "patient" if patients else "image")
    strata = table["stratum"].tolist() if "stratum" in table else labels
    return splits.assign(groups, strata, positive, fractions, seed)


def _with_patients(table: pd.DataFrame, notes: list[str]) -> pd.DataFrame:
    """Where the patient is not stated, each case counts as a patient of its own: its images stay together."""
    stated = table["patient"] if "patient" in table else pd.Series("", index=table.index)
    if "case" not in table or bool((stated != "").all()):
        return table
    unknown = table["row"][(stated == "") & (table["case"] != "")].tolist()
    which = rows_text(unknown) if "patient" in table else "no patient column"
    notes.append(
        f"{which}: each case counts as a patient of its own, and figures may be too good where one has several "
        "(--data.patient COLUMN)"
    )
    case = table["case"].where(table["case"] == "", "case " + table["case"])
    return table.assign(patient=stated.where(stated != "", case))


def _note_patients(table: pd.DataFrame, notes: list[str]) -> None:
    if "patient" not in table:
        what = "images of one patient may be in two splits" if "split" in table else "the split is by image"
        notes.append(f"no patient column: {what}, and figures may be too good (--data.patient COLUMN)")
    elif unknown := table.loc[table["patient"] == "", "row"].tolist():
        notes.append(f"no patient is stated, each counts as one of its own: {rows_text(unknown)}")


def _data_set(
    table: pd.DataFrame, manifest: Manifest, preprocess: Preprocess, decoded: Decoded, regions_path: Path | None
) -> DataSet:
    split = table["split"].to_numpy()
    data = DataSet(
        classes=manifest.classes,
        positive=manifest.positive,
        labels=(table["label"] == manifest.positive).to_numpy(np.int64),
        class_codes=np.array([manifest.classes.index(label) for label in table["label"]], np.int64),
        patients=_codes(table, "patient"),
        has_patients="patient" in manifest.table,
        cases=_codes(table, "case") if "case" in table else None,
        views=table["view"].to_numpy(str) if "view" in table else None,
        sides=table["side"].to_numpy(str) if "side" in table else None,
        rows=table["row"].to_numpy(np.int64),
        splits={name: np.flatnonzero(split == name) for name in SPLITS},
        fingerprint=_fingerprint(table),
        preprocess=replace(preprocess, size=decoded.size),
        notes=manifest.notes,
        measured=preprocess.normalisation == "dataset" and (preprocess.mean is None or preprocess.std is None),
        pixels_path=decoded.path,
        positions=table["position"].to_numpy(np.int64),
        content=np.array([int(found[:16], 16) for found in table["pixels"]], np.uint64),
        patient_keys=_patient_keys(table),
        seen_sides=_seen_sides(table) if "side" in table else None,
        groups=_texts(table, "group "),
        readers=_texts(table, "reader "),
        regions_path=regions_path,
    )
    if data.measured:
        data.preprocess = replace(data.preprocess, **_measure(data))
    return data


def _codes(table: pd.DataFrame, column: str) -> np.ndarray:
    """(N,) int64 numbers in order of appearance; an empty cell, or no such column, gets a number of its own."""
    names = table[column] if column in table else pd.Series("", index=table.index)
    own = "row " + table["row"].astype(str)
    keys = pd.Series(list(zip(names, own.where(names == "", ""), strict=True)))
    return pd.factorize(keys)[0].astype(np.int64)


def _patient_keys(table: pd.DataFrame) -> np.ndarray:
    names = table["patient"].tolist() if "patient" in table else [""] * len(table)
    hashes = {name: hashlib.sha256(f"raymed patient: {name}".encode()).hexdigest()[:16] for name in set(names)}
    return np.array([int(hashes[name], 16) if PSEUDONYM.fullmatch(name) else 0 for name in names], np.uint64)


def _seen_sides(table: pd.DataFrame) -> np.ndarray:
    """Where in the picture the side lies: as the column says, or at the edge that `right` names for the patient's."""
    if "right" not in table:
        return table["side"].to_numpy(str)
    edges = ("left", "right")
    seen = {(side, right): right if side == "right" else edges[right == "left"] for side in edges for right in edges}
    return np.array([seen.get(pair, "") for pair in zip(table["side"].str.casefold(), table["right"], strict=True)])


def _texts(table: pd.DataFrame, prefix: str) -> dict[str, np.ndarray]:
    """The columns whose names begin so, as text, by the rest of their names."""
    return {str(name).removeprefix(prefix): table[name].to_numpy(str) for name in table if str(name).startswith(prefix)}


def _fingerprint(table: pd.DataFrame) -> str:
    """sha256 of the images' content, class and split in the order of the manifest. File names do not count."""
    digest = hashlib.sha256()
    for values in zip(table["pixels"], table["label"], table["split"], strict=True):
        digest.update("\0".join(values).encode() + b"\n")
    return digest.hexdigest()


def _measure(data: DataSet) -> dict[str, tuple[float, ...]]:
    """Mean and standard deviation of each channel over the training split, of values in [0, 1]."""
    total, squares, num = torch.zeros(data.preprocess.channels, dtype=torch.float64), 0, 0
    for indices in np.array_split(data.splits["train"], max(1, len(data.splits["train"]) // 256)):
        image = data.batch(indices).unit_image().double()
        total, squares = total + image.sum((0, 2, 3)), squares + (image**2).sum((0, 2, 3))
        num += image[:, 0].numel()
    mean = total / num
    std = (squares / num - mean**2).sqrt()
    return {"mean": tuple(mean.tolist()), "std": tuple(std.tolist())}
