"""The methods section: every number in it is a fact of the record, and every fact that is missing is a blank."""

import dataclasses
import json
import re

import pytest
from paper_example import STUDY, record

from raymed.config import to_json
from raymed.report.paper import Flow, OperatingPoint, PaperRecord, Phase, Recalibration, Training
from raymed.report.paper.from_config import _LOSSES
from raymed.report.paper.korean import korean
from raymed.report.paper.methods import fact, methods, sections, sentence
from raymed.report.paper.word import BLANK
from raymed.results.paper import _INNER, _KINDS, _OUT_OF_FOLD, _PLACES
from raymed.results.paper_facts import _CHECKED, _HEAT_MAPS

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


@pytest.mark.parametrize(
    ("rule", "english", "korean"),
    [
        ("attention", "combined to one by learned attention.", "방법: 학습된 주의 가중치."),
        ("mean_of_logits", "combined to one by the mean of their logits.", "방법: 로짓의 평균."),
        (
            "attention_or_mean",
            "learned attention where it helped on the validation part of a fold",
            "그렇지 않으면 로짓의",
        ),
    ],
)
def test_what_became_of_attention(rule, english, korean):
    told = record(model=dataclasses.replace(record().model, aggregate=rule))
    assert english in methods(told, "en") and korean in methods(told, "ko")


def test_korean_for_what_is_recorded_in_english():
    flow = Flow(
        "file", 9, {"unlabelled: equivocal": 2, "its row cannot be used: duplicate key": 1, "modality CT": 1}, 5
    )
    told = record(
        flow=flow,
        operating_point=OperatingPoint("youden", 0.4, "the validation set"),
        recalibration=Recalibration("Platt scaling", "the validation set"),
        explanation="Heat maps were made by Grad-CAM.",
        hardware="2 CPU cores",
    )
    text = methods(told, "ko")
    assert "파일 9개 중 포함된 것은 5개이다" in text and "판정하지 않음: equivocal (n = 2)" in text
    assert "시트의 행을 쓸 수 없음: 중복된 번호 (n = 1); 영상 종류 CT (n = 1)" in text
    assert "기준에 따라 검증 자료에서" in text and "Platt 보정(Platt scaling)이며, 검증 자료에서" in text
    assert "비대칭 손실" in text and "2 CPU 코어" in text and "Grad-CAM으로 만들었다." in text
    assert "Scores were calibrated by Platt scaling, fitted on the validation set." in methods(told, "en")


def test_every_word_of_a_run_has_korean():
    """What `raymed.report.paper.from_config` and `raymed.results` write down."""
    for word in (*_LOSSES.values(), *_KINDS.values(), *_PLACES.values(), _CHECKED, _HEAT_MAPS, _INNER, _OUT_OF_FOLD):
        assert re.search("[가-힣]", str(korean(word))), word


def test_one_seed_is_no_repetition():
    def told(seeds):
        return methods(record(training=dataclasses.replace(record().training, seeds=seeds)), "en")

    assert "The random seed of training was 7." in told((7,))
    assert "Training was repeated with the random seeds 7, 8." in told((7, 8))


def test_fact_and_sentence():
    assert fact(0, "a number") == "0" and fact(1234567, "") == "1,234,567" and fact(0.0001, "") == "0.0001"
    assert fact(None, "the seed") == fact("", "the seed") == fact((), "the seed") == "[TO FILL: the seed]"
    with pytest.raises(TypeError, match="whether"):
        fact(True, "whether")
    assert sentence("One.") == "One." and sentence("one ") == "one."
