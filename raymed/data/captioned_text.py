"""Facts of a captioned phantom in English: a caption, a paraphrase of it in other words, a report of some sentences.

All state every fact and nothing else. A wording is a number that picks templates and synonyms, whatever the facts are:
false captions read like true ones.
"""

from typing import TypeVar

from raymed.data.captioned_facts import VALUES, Facts, Lesion
from raymed.random import derive

T = TypeVar("T")

_VIEWS = {
    "lung": ("chest radiograph", "chest X-ray"),
    "breast": ("mammogram", "breast X-ray"),
    "brain": ("head CT", "CT of the head"),
    "uterus": ("hysterosalpingogram", "HSG image"),
}
_PLACES = {
    "lung": "{side} lung",
    "breast": "{side} breast",
    "brain": "{side} side of the brain",
    "uterus": "{side} side of the uterus",
}
_WHOLE = {"lung": "the lungs", "breast": "the breasts", "brain": "the brain", "uterus": "the uterus"}

_COUNT = {"1": "one", "2": "two", "3": "three"}
_PHRASES = (
    "{count} {size} {severity} {noun} in the {place}",
    "{count} {severity}, {size} {noun} in the {place}",
    "{count} {noun} in the {place} ({size}, {severity})",
)
_CAPTIONS = (
    "{view} showing {what}.",
    "{view} with {what}.",
    "{what} on {view}.",
    "{view}: {what}.",
    "This {view} demonstrates {what}.",
    "There {are} {what} on this {view}.",
)
_NORMAL = (
    "Normal {view}, no finding in {whole}.",
    "{view} without any finding in {whole}.",
    "No finding on this {view}: {whole} normal.",
)

# What a paraphrase says instead. Equally many for every value, so that a wording picks alike.
_SYNONYMS = {
    "count": {
        "1": ("a single", "one isolated"),
        "2": ("a pair of", "two separate"),
        "3": ("a group of three", "three separate"),
    },
    "size": {"small": ("tiny", "little"), "large": ("big", "sizeable")},
    "severity": {"mild": ("faint", "subtle"), "severe": ("dense", "conspicuous")},
    "finding": {
        "nodule": ("round nodule", "solid nodule"),
        "mass": ("spiculated mass", "star-shaped mass"),
        "cyst": ("thin-walled cyst", "hollow cyst"),
        "calcification": ("speckled calcification", "clustered calcification"),
    },
}
_CLAUSES = (
    ("On this {view}, ", "the {place} contains {what}"),
    ("{view}: ", "in the {place} there {are} {what}"),
    ("What this {view} shows: ", "{what} within the {place}"),
)
_NORMAL_2 = (
    "Unremarkable {view}; nothing abnormal is seen in {whole}.",
    "{view} of a healthy patient, {whole} clear.",
    "On this {view}, {whole} without abnormality.",
)


def caption(facts: Facts, wording: int) -> str:
    """One sentence that names the attributes' values.

    "Chest radiograph with two small severe nodules in the left lung."
    """
    view = _pick(wording, "view", _VIEWS[facts.organ])
    if not facts.lesions:
        return _sentence(_pick(wording, "normal", _NORMAL), view=view, whole=_WHOLE[facts.organ])
    phrase = _pick(wording, "phrase", _PHRASES)
    what = " and ".join(phrase.format(**_words(lesion, facts.organ)) for lesion in facts.lesions)
    return _sentence(_pick(wording, "caption", _CAPTIONS), view=view, what=what, are=_are(facts.lesions[0]))


def paraphrase(facts: Facts, wording: int) -> str:
    """The same in other words.

    "On this chest X-ray, the left lung contains a pair of tiny dense round nodules."
    """
    view = _pick(wording, "view of paraphrase", _VIEWS[facts.organ])
    if not facts.lesions:
        return _sentence(_pick(wording, "normal of paraphrase", _NORMAL_2), view=view, whole=_WHOLE[facts.organ])
    opening, clause = _pick(wording, "clause", _CLAUSES)
    clauses = [
        clause.format(place=_place(lesion, facts.organ), what=_in_synonyms(lesion, wording), are=_are(lesion))
        for lesion in facts.lesions
    ]
    return _sentence(opening + "; ".join(clauses) + ".", view=view)


def report(facts: Facts, wording: int) -> str:
    """Three to five sentences: what was taken, each group of lesions, what is clear, an impression."""
    organ = facts.organ
    opening = _sentence("{view} of a digital phantom.", view=_pick(wording, "view of report", _VIEWS[organ]))
    if not facts.lesions:
        return f"{opening} No finding is seen in {_WHOLE[organ]}. Impression: normal study."
    sentences = [opening, *(sentence for lesion in facts.lesions for sentence in _described(lesion, organ))]
    if len(facts.lesions) == 1:
        (lesion,) = facts.lesions
        other = "left" if lesion.side == "right" else "right"
        sentences.append(f"The {_PLACES[organ].format(side=other)} is clear.")
        sentences.append(f"Impression: {_in_synonyms(lesion, wording)}.")
    return " ".join(sentences)


def prompts(attribute: str) -> dict[str, tuple[str, ...]]:
    """Captions for every value of an attribute: 16 contexts, the same for every value, in which the others vary."""
    contexts = list(enumerate(_contexts()))
    return {
        value: tuple(caption(facts.with_value(attribute, value), wording) for wording, facts in contexts)
        for value in VALUES[attribute]
    }


def normal_prompts() -> tuple[str, ...]:
    """16 captions of images without a finding, over all organs."""
    return tuple(caption(Facts(organ), wording) for wording in range(4) for organ in VALUES["organ"])


def _contexts() -> list[Facts]:
    """Every organ with every finding, the other attributes balanced over them."""
    organs_findings = [(organ, finding) for organ in VALUES["organ"] for finding in VALUES["finding"]]
    sides, counts, sizes, severities = (VALUES[name] for name in ("side", "count", "size", "severity"))
    lesions = [
        Lesion(finding, sides[(i + i // 4) % 2], counts[i % 3], sizes[i // 2 % 2], severities[(i // 2 + i // 4) % 2])
        for i, (_, finding) in enumerate(organs_findings)
    ]
    return [Facts(organ, (lesion,)) for (organ, _), lesion in zip(organs_findings, lesions, strict=True)]


def _pick(wording: int, slot: str, options: tuple[T, ...]) -> T:
    return options[derive(wording, slot) % len(options)]


def _described(lesion: Lesion, organ: str) -> tuple[str, str]:
    words = _words(lesion, organ) | {"are": _are(lesion), "they": "It" if lesion.count == "1" else "They"}
    where, what = "In the {place} there {are} {count} {noun}.", "{they} {are} {size} in extent, {severity} in contrast."
    return where.format(**words), what.format(**words)


def _words(lesion: Lesion, organ: str) -> dict[str, str]:
    return {
        "count": _COUNT[lesion.count],
        "size": lesion.size,
        "severity": lesion.severity,
        "noun": _noun(lesion.finding, lesion.count),
        "place": _place(lesion, organ),
    }


def _in_synonyms(lesion: Lesion, wording: int) -> str:
    """a pair of tiny dense round nodules"""
    count, size, severity, finding = (
        _pick(wording, slot, options[getattr(lesion, slot)]) for slot, options in _SYNONYMS.items()
    )
    return f"{count} {size} {severity} {_noun(finding, lesion.count)}"


def _noun(finding: str, count: str) -> str:
    plural = "es" if finding.endswith("s") else "s"
    return finding if count == "1" else finding + plural


def _place(lesion: Lesion, organ: str) -> str:
    return _PLACES[organ].format(side=lesion.side)


def _are(lesion: Lesion) -> str:
    return "is" if lesion.count == "1" else "are"


def _sentence(template: str, **words: str) -> str:
    text = template.format(**words)
    return text[0].upper() + text[1:]
