"""Whom a phantom hospital has examined: people, examinations, what was found, and how each was recorded.

Names, numbers and dates are drawn; they are nobody's. What is recorded how (site, bits, orientation, text in the
picture) is dealt out independently of what was found, so that nothing but the picture tells the classes apart.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from typing import TypeVar

import numpy as np
from numpy.random import Generator, default_rng

T = TypeVar("T")

_SURNAMES = {
    "김": "Kim",
    "이": "Lee",
    "박": "Park",
    "최": "Choi",
    "정": "Jung",
    "강": "Kang",
    "윤": "Yoon",
    "임": "Lim",
}
_GIVEN = {
    **{"민지": "Minji", "서연": "Seoyeon", "지은": "Jieun", "수진": "Sujin", "은정": "Eunjung", "혜진": "Hyejin"},
    **{"유나": "Yuna", "보라": "Bora", "하늘": "Haneul", "다은": "Daeun", "미경": "Mikyung", "영희": "Younghee"},
}
_FIRST_DAY, _NUM_DAYS = date(2021, 1, 4), 4 * 365 - 10
SITES = (
    ("Hanbit University Hospital", "Namsan Women's Clinic"),
    ("Saebyeok Medical Center", "Doran Women's Clinic"),
)
"""Where examinations are made with an even seed, and with an odd one."""
TEXTS: tuple[str, ...] = ("none", "none", "none", "denied", "stated", "unsaid")
"""Burned-in text and what BurnedInAnnotation says of it: no text and no tag, three times as often; no text, NO; text,
YES; text, no tag."""


@dataclass(frozen=True)
class Person:
    """number: counts people. name: Hangul, surname first. roman: "Surname^Given"."""

    number: int
    name: str
    roman: str
    born: date


@dataclass(frozen=True)
class Study:
    """One examination: two images, early and late view.

    side: of the occlusion in the patient, "left", "right" or "none". right: the edge of the picture ("left", "right")
    where the patient's right is. text: one of `TEXTS`, or "lie": text in the picture, NO in the tag. reported:
    "patent", "occluded" or "equivocal"; readers: what two readers said, "" where one did not read it.
    """

    number: int
    person: Person
    patient_id: str
    accession: str
    day: date
    site: int
    side: str
    reported: str
    readers: tuple[str, str]
    frames: int
    bits: int
    photometric: str
    charset: tuple[str, ...]
    right: str
    text: str
    telling: bool
    """Whether the name stands in the description of the series, too."""

    @property
    def label(self) -> str:
        """The truth: "occluded" or "patent"."""
        return "patent" if self.side == "none" else "occluded"

    @property
    def age(self) -> int:
        """Whole years on the day of the examination."""
        born = self.person.born
        return self.day.year - born.year - ((self.day.month, self.day.day) < (born.month, born.day))


REPEAT, TWO_IDS, NAMESAKE = 1, 3, 5
"""Studies of somebody who was there before: under her own number, under another; and of one with the name of the
person before."""
ZEROS_LOST, TWICE, MISTYPED = 6, 7, 8
"""Studies whose rows in the sheet are wrong."""
WITH_CT, TELLING, LIE = 9, 10, 11
"""Studies with a CT object among them, with the name in a description, and with text that the tag denies."""
SMALLEST = 12


def site_of(study: Study, seed: int) -> str:
    """The name of the place where a study was made."""
    return SITES[seed % len(SITES)][study.site]


def draw_register(num_studies: int, seed: int) -> list[Study]:
    """The studies 0, ..., num_studies - 1; the same arguments give the same studies. A quarter are occluded."""
    rng = default_rng([seed, num_studies, 1])
    people = _people(rng, num_studies)
    patient_ids = [f"{number:08d}" for number in _numbers(rng, num_studies, 10_000, 900_000)]
    patient_ids[REPEAT] = patient_ids[REPEAT - 1]
    patient_ids[TWO_IDS] = "N" + patient_ids[TWO_IDS][1:]
    accessions = [f"{number:08d}" for number in _numbers(rng, num_studies, 100_000, 9_000_000)]
    days = [_FIRST_DAY + timedelta(days=int(day)) for day in rng.integers(0, _NUM_DAYS, num_studies)]
    for later in (REPEAT, TWO_IDS):
        days[later - 1 : later + 1] = sorted(days[later - 1 : later + 1])
    sides = _dealt(rng, ("left", "none", "none", "none", "right", "none", "none", "none"), num_studies)
    # Even and odd numbers in turn, since the sheet writes them in two languages.
    in_turn = np.stack([2 * rng.permutation(num_studies // 2) + odd for odd in (0, 1)], axis=1).ravel()
    equivocal = set(in_turn[: max(2, num_studies // 20)].tolist())
    reported = [
        "equivocal" if i in equivocal else "patent" if side == "none" else "occluded" for i, side in enumerate(sides)
    ]
    readers = [_readers(rng, "patent" if side == "none" else "occluded") for side in sides]
    texts: list[str] = _dealt(rng, TEXTS, num_studies)
    texts[TELLING], texts[LIE] = "stated", "lie"
    recorded = zip(
        _dealt(rng, (0, 0, 0, 1, 1), num_studies),
        _dealt(rng, (1, 1, 3), num_studies),
        _dealt(rng, (8, 12), num_studies),
        _dealt(rng, ("MONOCHROME2", "MONOCHROME2", "MONOCHROME1"), num_studies),
        _dealt(rng, (("", "ISO 2022 IR 149"), ("ISO_IR 192",)), num_studies),
        _dealt(rng, ("left", "left", "right"), num_studies),
        strict=True,
    )
    return [
        Study(
            number=i,
            person=people[i],
            patient_id=patient_ids[i],
            accession=accessions[i],
            day=days[i],
            site=site,
            side=sides[i],
            reported=reported[i],
            readers=readers[i],
            frames=frames,
            bits=bits,
            photometric=photometric,
            charset=charset,
            right=right,
            text=texts[i],
            telling=i == TELLING,
        )
        for i, (site, frames, bits, photometric, charset, right) in enumerate(recorded)
    ]


def _dealt(rng: Generator, options: Sequence[T], num: int) -> list[T]:
    """`num` of the options, each as often as it stands there, in random order."""
    return [options[i % len(options)] for i in rng.permutation(num)]


def _numbers(rng: Generator, num: int, low: int, high: int) -> list[int]:
    """Different numbers below `high`."""
    step = (high - low) // num
    return [int(low + step * position + rng.integers(step)) for position in rng.permutation(num)]


def _people(rng: Generator, num_studies: int) -> list[Person]:
    """The person of each study."""
    names = [(s, g) for s in _SURNAMES for g in _GIVEN]
    order = rng.permutation(len(names))
    people = []
    for i in range(num_studies):
        surname, given = names[order[i % len(names)]]
        born = date(1980, 1, 1) + timedelta(days=int(rng.integers(0, 16 * 365)))
        people.append(Person(i, surname + given, f"{_SURNAMES[surname]}^{_GIVEN[given]}", born))
    people[REPEAT], people[TWO_IDS] = people[REPEAT - 1], people[TWO_IDS - 1]
    before, born = people[NAMESAKE - 1], people[NAMESAKE].born
    people[NAMESAKE] = Person(NAMESAKE, before.name, before.roman, born)
    return people


def _readers(rng: Generator, truth: str) -> tuple[str, str]:
    """Two readers who are right nine times in ten; the second has not read every study."""
    other = {"patent": "occluded", "occluded": "patent"}[truth]
    first, second = (truth if right else other for right in rng.random(2) < 0.9)
    return first, second if rng.random() < 0.9 else ""
