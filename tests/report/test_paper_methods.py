"""The methods section: every number in it is a fact of the record, and every fact that is missing is a blank."""

import dataclasses
import json
import re

import pytest
from paper_example import STUDY, record

from raymed.config import to_json
from raymed.report.paper import PaperRecord, Phase, Training
from raymed.report.paper.methods import fact, methods, sections, sentence
from raymed.report.paper.word import BLANK

LANGUAGES = ("en", "ko")
NUMBER = re.compile(r"(?<![\w.])\d[\d,]*(?:\.\d+)?")


def numbers(text):
    """The numbers in a text as they stand there, thousands without their comma."""
    return {found.rstrip(",").replace(",", "") for found in NUMBER.findall(text)}


def recorded(of):
    """Every number of a record as text, also those within its words, and fractions as percentages."""
    found = numbers(to_json(of).replace("_", " "))

    def walk(value):
        if isinstance(value, dict | list):
            for inner in value.values() if isinstance(value, dict) else value:
                walk(inner)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found.update({f"{value:g}", str(value), f"{100 * value:g}"})

    walk(json.loads(to_json(of)))
    return found


def without(path):
    """The full record less one fact."""
    *above, last = path.split(".")
    whole = record()
    if not above:
        empty = PaperRecord()
        return dataclasses.replace(whole, **{last: getattr(empty, last)})
    part = getattr(whole, above[0])
    default = {field.name: field.default for field in dataclasses.fields(part)}[last]
    return dataclasses.replace(whole, **{above[0]: dataclasses.replace(part, **{last: default})})


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_number_is_recorded(language):
    told = numbers(methods(record(), language))
    assert told - recorded(record()) == set()
    assert {"437", "410", "4008829", "1357", "483", "0.0043", "4.5", "0.4321", "2002", "90", "15.5"} <= told


def test_both_languages_tell_the_same_numbers():
    english, korean = (numbers(methods(record(), language)) for language in LANGUAGES)
    assert english == korean


@pytest.mark.parametrize("language", LANGUAGES)
def test_nothing_known_is_nothing_told(language):
    text = methods(PaperRecord(), language)
    assert numbers(text) == set()
    assert len(BLANK.findall(text)) >= 40
    assert "None" not in text and "{" not in text


def test_both_languages_have_the_same_sections_and_blanks():
    for of in (record(), PaperRecord()):
        english, korean = (sections(methods(of, language)) for language in LANGUAGES)
        assert len(english) == len(korean) >= 10
        blanks = [[len(BLANK.findall(text)) for text in of_language.values()] for of_language in (english, korean)]
        assert blanks[0] == blanks[1]


@pytest.mark.parametrize("language", LANGUAGES)
def test_all_known_leaves_no_blank(language):
    assert BLANK.findall(methods(record(), language)) == []


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize(
    "path",
    [
        *(f"study.{name}" for name in STUDY if name != "target"),
        "positive", "cohort", "flow", "recalibration", "software", "hardware", "performance",
        "split.method", "split.unit", "split.repeats",
        "preprocessing.size", "preprocessing.fit", "preprocessing.channels", "preprocessing.normalisation",
        "model.architecture", "model.num_parameters", "model.weights", "model.aggregate",
        "training.phases", "training.augmentation", "training.selection", "training.seeds",
        "operating_point.rule", "operating_point.threshold", "operating_point.chosen_on",
        "statistics.level", "statistics.resamples",
    ],
)  # fmt: skip
def test_a_missing_fact_is_a_blank(path, language):
    assert len(BLANK.findall(methods(without(path), language))) >= 1


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(Phase)][4:-1])
def test_a_missing_fact_of_a_phase_is_a_blank(field):
    if field == "balanced":  # a sentence that is left out
        return
    first, *rest = record().training.phases
    phases = (dataclasses.replace(first, **{field: None}), *rest)
    for language in LANGUAGES:
        text = methods(record(training=dataclasses.replace(record().training, phases=phases)), language)
        assert len(BLANK.findall(text)) == 1


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_authors_words_stand_as_they_are(language):
    text = methods(record(), language)
    assert all(words in text for words in STUDY.values())


def test_one_phase_is_not_numbered():
    phase = Phase("single", "cross-entropy", {}, None, 100, 32, False, "AdamW", 0.01, 0.05, "cosine")
    text = sections(methods(record(training=Training((phase,), {}, "AUPRC", (1,))), "en"))["Training"]
    assert text.startswith(
        "The network was trained by minimising cross-entropy in 100 steps with batches of 32 images."
    )
    assert "not augmented" in text


def test_what_was_not_done_is_not_told():
    plain = record(subgroups=(), agreement={}, explanation=None, split=dataclasses.replace(record().split, folds=None))
    english = methods(plain, "en")
    assert "Heat maps" not in english and "kappa" not in english and "cross-validation" not in english
    assert "Heat maps" in methods(record(), "en")


def test_operating_points_in_words():
    def told(rule, language):
        point = dataclasses.replace(record().operating_point, rule=rule)
        return methods(record(operating_point=point), language)

    assert "a sensitivity of at least 0.96 on out-of-fold case scores and is 0.4321" in told("sensitivity=0.96", "en")
    assert "민감도 0.96 이상" in told("sensitivity=0.96", "ko")
    assert "the largest Youden index" in told("youden", "en")
    assert "Youden 지수 최대" in told("youden", "ko")


def test_fact_and_sentence():
    assert fact(0, "a number") == "0" and fact(1234567, "") == "1,234,567" and fact(0.0001, "") == "0.0001"
    assert fact(None, "the seed") == fact("", "the seed") == fact((), "the seed") == "[TO FILL: the seed]"
    with pytest.raises(TypeError, match="whether"):
        fact(True, "whether")
    assert sentence("One.") == "One." and sentence("one ") == "one."
