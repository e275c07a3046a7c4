"""Two models on the same cases: paired differences, the right sign, and no verdict without evidence."""

import numpy as np
import pytest
from external_hospital import CASES, make_bundle
from sklearn.metrics import roc_auc_score

from raymed.results.compare import METRICS, compared, short_names, verdict
from raymed.results.scores import answer
from raymed.tasks.predictor import Predictor

NAMES = ("good", "poor")


@pytest.fixture(scope="module")
def answers(hospital):
    data = hospital.data()
    models = [hospital.bundle, make_bundle(7)]
    return [answer(Predictor.from_bundle(model), data, data.splits["test"]) for model in models]


def test_differences_are_those_of_both_figures_and_narrower_than_of_two_apart(hospital, answers):
    found, differences = compared(NAMES, answers)
    assert list(found) == list(differences) == ["case", "image"]
    scores = [of.levels[0].table.scores for of in answers]
    expected = [roc_auc_score(hospital.targets, score) for score in scores]
    of = differences["case"]["auroc"]
    assert of["mean"] == pytest.approx(expected[0] - expected[1])
    assert of["ci_low"] < of["mean"] < of["ci_high"] and of["num_patients"] == 56
    for name, auroc in zip(NAMES, expected, strict=True):
        assert found["case"][name]["auroc"]["mean"] == pytest.approx(auroc)
    assert set(METRICS) <= set(of_case := differences["case"])
    decided = [scored.decided for scored in (of.levels[0] for of in answers)]
    sensitivity = [d[hospital.targets == 1].mean() for d in decided]
    assert of_case["sensitivity"]["mean"] == pytest.approx(sensitivity[0] - sensitivity[1])


def test_a_model_and_itself_differ_by_nothing(answers):
    _, differences = compared(NAMES, [answers[0], answers[0]])
    assert all(of["mean"] == of["ci_low"] == of["ci_high"] == 0 for of in differences["case"].values())
    assert verdict(NAMES, differences["case"], "auroc", answers[0].levels[0]).startswith("Cannot tell which is better")


def test_the_better_one_is_named_whichever_comes_first(answers):
    _, forth = compared(NAMES, answers)
    _, back = compared(NAMES[::-1], answers[::-1])
    said = [
        verdict(NAMES, forth["case"], "auroc", answers[0].levels[0]),
        verdict(NAMES[::-1], back["case"], "auroc", answers[1].levels[0]),
    ]
    assert all(sentence.startswith("good is better: AUROC differs by ") for sentence in said)
    assert said[0].endswith(f"over {CASES} cases, good minus poor.") and "differs by +" in said[0]
    assert "differs by -" in said[1]


@pytest.mark.parametrize(
    ("metric", "low", "high", "better"),
    [
        ("auroc", 0.01, 0.2, "good"), ("auroc", -0.2, -0.01, "poor"), ("auroc", -0.01, 0.2, None),
        ("brier", 0.01, 0.2, "poor"), ("ece", -0.2, -0.01, "good"), ("auroc", 0.0, 0.2, None),
        ("ppv", np.nan, np.nan, None),
    ],
)  # fmt: skip
def test_less_is_better_of_errors_and_an_interval_that_holds_0_decides_nothing(answers, metric, low, high, better):
    of = {metric: {"mean": 0.05, "ci_low": low, "ci_high": high}}
    sentence = verdict(NAMES, of, metric, answers[0].levels[0])  # type: ignore[arg-type]
    assert sentence.startswith(f"{better} is better" if better else "Cannot tell")


@pytest.mark.parametrize(
    ("models", "names"),
    [
        (("runs/a/seed-1/bundle", "runs/a/seed-2/bundle/"), ["seed-1", "seed-2"]),
        (("models:/hsg@champion", "models:/hsg@candidate"), ["hsg@champion", "hsg@candidate"]),
        (("/x/one", "models:/hsg/2"), ["/x/one", "models:/hsg/2"]),
        (("/x/bundle", "/x/y/bundle"), ["/x/bundle", "/x/y/bundle"]),
    ],
)
def test_models_are_called_by_what_tells_them_apart(models, names):
    assert short_names(models) == names
