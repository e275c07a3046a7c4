"""Captioned digital phantoms: pictures whose captions are exactly true, so that what a model reads can be counted.

Every picture shows one organ and none, one or two groups of lesions; every fact about it (organ, finding, side, count,
size, severity) stands in columns of the manifest and in its captions.

    write_captioned(folder)                            manifest.csv and pictures
    prompts("side"), answers(manifest, "side")         zero-shot accuracy of an attribute
    foils(manifest, "side")                            compositional accuracy: the part of images that are nearer
                                                       to their caption than to it with one fact changed

Facts are dealt like cards: each of the 96 groups of lesions comes once for an organ before any comes again, so that
attributes are balanced and independent of each other. Sides are the patient's: the patient's right is on the left of
the picture. Foils after Yuksekgonul et al., "When and why vision-language models behave like bags-of-words", ICLR 2023.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

from numpy.random import Generator, default_rng

from raymed.config import UserError, check_choice, check_range
from raymed.data import captioned_text as text
from raymed.data.captioned_facts import FOILS, NO_FINDING, VALUES, Facts, Lesion, all_lesions, changed
from raymed.data.captioned_picture import draw
from raymed.data.locations import as_location, ending
from raymed.data.manifest import read_table
from raymed.data.phantom_folder import drawn_once

__all__ = [
    "ATTRIBUTES",
    "FOILS",
    "NO_FINDING",
    "PROMPTS",
    "answers",
    "draw",
    "foils",
    "is_captioned",
    "prompts",
    "write_captioned",
]

ATTRIBUTES = tuple(VALUES)
_VAL_PART, _TEST_PART = 0.15, 0.2  # of the patients
_NORMAL_PART, _TWO_PART = 0.1, 0.3  # of the images: no finding, two groups of lesions
_COLUMNS = {"wording", *Facts("lung").columns()}
_VERSION = 1  # counts up when the same parameters give another set


@dataclass(frozen=True)
class _Image:
    patient: int
    number: int  # of the patient's images, from 0
    split: str
    facts: Facts
    wording: int


def write_captioned(
    folder: Path, *, num_patients: int = 400, images_per_patient: int = 2, size: int = 48, seed: int = 0
) -> Path:
    """Write a set of captioned phantoms. Returns the path of its manifest.csv.

    Columns: image (path relative to the manifest), patient, case (one an image), split (by patient: 65, 15, 20 %),
    caption and caption_2 (one sentence with every fact, in two wordings), caption_long (the same in three to five),
    findings (names separated by |, or "No Finding"), and the facts, empty where there are none: organ (one a patient);
    finding, side, count, size, severity of the first group of lesions; finding_2, ... of the second, which is of
    another finding and on the other side. wording: the number that chose the captions' words. One image in ten shows no
    finding, three in ten two groups.

    Within a split, images of the same facts have the same captions and all others have others: equal captions tell
    which pairs are no negatives of each other.

    The same arguments give the same bytes. A complete folder of the same arguments is kept as it is; one that is only
    half there, or was written by another version of this module, is written again.

    Raises:
        UserError: an argument is out of range, or the folder holds something else.
    """
    check_range("num_patients", num_patients, 4)
    check_range("images_per_patient", images_per_patient, 1)
    check_range("size", size, 32)
    check_range("seed", seed, 0)
    parameters = {"version": _VERSION, "num_patients": num_patients, "images_per_patient": images_per_patient}
    parameters |= {"size": size, "seed": seed}

    def write(unfinished: Path) -> None:
        import pandas as pd

        images = _plan(num_patients, images_per_patient, seed)
        rows = [_write_image(unfinished, image, size, seed) for image in images]
        pd.DataFrame(rows).to_csv(unfinished / "manifest.csv", index=False)

    return drawn_once(folder, parameters, num_patients * images_per_patient, write)


def prompts(attribute: str) -> dict[str, tuple[str, ...]]:
    """The values of an attribute, each with sentences that say it, an ensemble: the same contexts for every value.

    Values are written as in the manifest; "finding" has "No Finding" too.
    """
    check_choice("attribute", attribute, ATTRIBUTES)
    found = text.prompts(attribute)
    return found | {NO_FINDING: text.normal_prompts()} if attribute == "finding" else found


PROMPTS = {attribute: prompts(attribute) for attribute in ATTRIBUTES}
"""`prompts` of every attribute."""


def answers(manifest: Path | str, attribute: str) -> list[str | None]:
    """What is right for each row: one of the values that `prompts` names; None where the question has no single answer,
    as the side of two groups of lesions has none."""
    check_choice("attribute", attribute, ATTRIBUTES)
    return [_answer(facts, attribute) for facts, _ in _facts_of(manifest)]


def foils(manifest: Path | str, kind: str) -> list[str | None]:
    """For each row its caption with exactly one fact changed, in the same words otherwise; None where the image has no
    such fact.

    kind: an attribute, of the first group of lesions where there are two; or "swap", which exchanges the findings of
    two groups, so that the words stay and only their binding changes. Every foil might be the caption of another image:
    text alone does not tell it from a true one. For that reason "side" is asked of images with one group only.
    """
    check_choice("kind", kind, FOILS)
    false = [(_changed(facts, kind, wording), wording) for facts, wording in _facts_of(manifest)]
    return [facts and text.caption(facts, wording) for facts, wording in false]


def is_captioned(manifest: Path | str) -> bool:
    """Whether a manifest is one of captioned phantoms, by its columns."""
    location = as_location(str(manifest))
    return ending(location) == ".csv" and not _COLUMNS - set(read_table(location).columns)


def _plan(num_patients: int, images_per_patient: int, seed: int) -> list[_Image]:
    """Which patient is in which split and has which organ, and what every image shows, in the order of patients."""
    rng = default_rng([seed, 1])
    planned = []
    for split, patients in _split(num_patients, rng).items():
        wordings: dict[Facts, int] = {}
        for k, organ in enumerate(VALUES["organ"]):
            images = [(patient, number) for patient in patients[k::4] for number in range(images_per_patient)]
            for (patient, number), facts in zip(images, _deal(organ, len(images), rng), strict=True):
                wording = wordings.setdefault(facts, int(rng.integers(2**31)))
                planned.append(_Image(patient, number, split, facts, wording))
    return sorted(planned, key=lambda image: (image.patient, image.number))


def _split(num_patients: int, rng: Generator) -> dict[str, list[int]]:
    num_val, num_test = (max(1, round(part * num_patients)) for part in (_VAL_PART, _TEST_PART))
    order = rng.permutation(num_patients).tolist()
    held_out = num_val + num_test
    return {"train": order[held_out:], "val": order[:num_val], "test": order[num_val:held_out]}


def _deal(organ: str, num: int, rng: Generator) -> list[Facts]:
    """Facts for `num` images of an organ."""
    one = [(lesion,) for lesion in all_lesions()]
    two = [(a, b) for a, b in combinations(all_lesions(), 2) if a.finding != b.finding and a.side != b.side]
    two = [pair if rng.random() < 0.5 else pair[::-1] for pair in two]
    num_normal, num_two = round(_NORMAL_PART * num), round(_TWO_PART * num)
    groups: list[tuple[Lesion, ...]] = [()] * num_normal
    groups += _cards(two, num_two, rng) + _cards(one, num - num_normal - num_two, rng)
    return [Facts(organ, groups[i]) for i in rng.permutation(num)]


def _cards(deck: Sequence[tuple[Lesion, ...]], num: int, rng: Generator) -> list[tuple[Lesion, ...]]:
    """`num` cards of a shuffled deck, shuffled again whenever it is used up."""
    return [deck[i] for _ in range(-(-num // len(deck))) for i in rng.permutation(len(deck))][:num]


def _write_image(folder: Path, image: _Image, size: int, seed: int) -> dict[str, str | int]:
    """Draw and save a picture; its row of the manifest."""
    from PIL import Image

    facts, wording = image.facts, image.wording
    name = f"images/P{image.patient:04d}_{image.number}.png"
    pixels = draw(facts, patient=image.patient, image=image.number, seed=seed, size=size)
    Image.fromarray(pixels).save(folder / name)
    captions = {
        "caption": text.caption(facts, wording),
        "caption_2": text.paraphrase(facts, wording),
        "caption_long": text.report(facts, wording),
    }
    patient = f"P{image.patient:04d}"
    identity = {"image": name, "patient": patient, "case": f"{patient}-{image.number}", "split": image.split}
    return identity | captions | facts.columns() | {"wording": wording}


def _facts_of(manifest: Path | str) -> list[tuple[Facts, int]]:
    """Facts and wording of every row."""
    table = read_table(as_location(str(manifest)))
    missing = _COLUMNS - set(table.columns)
    if missing:
        raise UserError(f"{manifest} is no manifest of captioned phantoms: it has no column {min(missing)!r}")
    return [(Facts.from_columns(cells), int(cells["wording"])) for cells in table.to_dict("records")]


def _answer(facts: Facts, attribute: str) -> str | None:
    if attribute == "organ":
        return facts.organ
    if not facts.lesions:
        return NO_FINDING if attribute == "finding" else None
    return getattr(facts.lesions[0], attribute) if len(facts.lesions) == 1 else None


def _changed(facts: Facts, kind: str, wording: int) -> Facts | None:
    return changed(facts, kind, default_rng([wording, FOILS.index(kind) + 1]))
