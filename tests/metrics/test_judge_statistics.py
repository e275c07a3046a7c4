"""Verdicts on any statistic: on retrieval, where lower is better, and as the binary case has them."""

import numpy as np
import pytest

from raymed.config import UserError
from raymed.metrics import binary_statistic, mean_statistic
from raymed.metrics.retrieval import retrieval_statistic
from raymed.metrics.verdict import judge, judge_statistics

PATIENTS = np.repeat(np.arange(60), 2)


def runs(noise, num_seeds=5, first=0):
    """Retrieval of the same 120 images by texts that are so noisy, one a seed."""
    image = np.random.default_rng(99).normal(size=(120, 16))
    found = []
    for seed in range(first, first + num_seeds):
        text = image + noise * np.random.default_rng(seed).normal(size=image.shape)
        found.append(retrieval_statistic(image, text, np.arange(120)))
    return found


def judged(finalists, default, metric="mean_recall", **options):
    return judge_statistics(
        finalists, default, [PATIENTS] * len(default), metric, unit="patient", **{"n_boot": 300} | options
    )


def test_retrieval_is_judged():
    verdicts = judged({"dhn_nce": runs(0.8), "twin": runs(1.4, first=50)}, runs(1.4), baseline="info_nce")
    better, twin = verdicts["dhn_nce"], verdicts["twin"]
    assert better["verdict"] == "above seed noise" and twin["verdict"] == "not above seed noise"
    assert better["p_holm"] == pytest.approx(2 * better["p"]) and better["difference"]["num_patients"] == 60
    assert better["sentence"].startswith(
        f"dhn_nce has a {better['difference']['mean']:.4f} higher mean recall than info_nce (95 % interval +"
    )
    assert "5 seeds, 60 patients, p" in better["sentence"]


def test_lower_may_be_better():
    ours, theirs = ([mean_statistic("median_rank", values) for values in of] for of in (ranks(3), ranks(5)))
    found = judged({"a": ours}, theirs, "median_rank", lower_is_better=True, label="median rank")["a"]
    assert found["verdict"] == "above seed noise" and found["difference"]["mean"] < 0
    assert "lower median rank than the default (lower is better)" in found["sentence"]
    assert judged({"a": ours}, theirs, "median_rank")["a"]["verdict"] == "not above seed noise"


def ranks(mean):
    return np.random.default_rng(mean).poisson(mean, (5, 120))


def test_the_binary_case_is_the_same():
    random = np.random.default_rng(0)
    targets = (PATIENTS % 3 == 0).astype(int)
    predictions = [
        [(1 / (1 + np.exp(-random.normal(signal * targets))), targets, PATIENTS, 0.5) for _ in range(5)]
        for signal in (2.0, 1.5)
    ]
    statistics = [[binary_statistic(s, t, at) for s, t, _, at in run] for run in predictions]
    for metric, lower in (("auroc", False), ("brier", True)):
        binary = judge({"a": predictions[0]}, predictions[1], metric, n_boot=300)
        assert judged({"a": statistics[0]}, statistics[1], metric, lower_is_better=lower) == binary


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(UserError, match="^a was trained on 4 seeds and info_nce on 5: "):
        judged({"a": runs(1.0, 4)}, runs(1.0), baseline="info_nce")
    undefined = [lambda counts: {"x": np.full(len(counts), np.nan)}] * 5
    with pytest.raises(UserError, match="x of the default is undefined under seed 1 of 5: its 120 rows must hold"):
        judged({}, undefined, "x")
