"""The verdict on a repeated run: equal, within seed noise, or different."""

import numpy as np
import pytest

from raymed.train.runs.record import Record
from raymed.train.runs.repeat import judge, seed_noise, verdict_lines


def figure(mean: float, std: float | None = 0.02, n: int = 3) -> dict:
    return {"mean": mean, "std": std, "n": n, "ci_low": mean - 0.1, "ci_high": mean + 0.1, "num_patients": 10}


def figures_of(auroc: float = 0.8, auprc: float = 0.6, ece: float = 0.1, **more) -> dict:
    values = {"auroc": figure(auroc, **more), "auprc": figure(auprc, **more), "ece": figure(ece, **more)}
    return {"asl": {"test": values}}


def judged(was: dict, now: dict, **differences):
    """The verdict on these figures, from the same data."""
    first, second = (Record("train_classifier", "first", {}, {"fingerprint": "f"}, f, {}, [], {}) for f in (was, now))
    return judge(first, second, differences)


def noise_of(*arguments) -> float:
    noise = seed_noise(*arguments)
    assert noise is not None
    return noise


def test_equal_to_the_bit_and_within_the_tolerance():
    assert judged(figures_of(), figures_of()) == ("equal", "to the bit", [])
    word, why, rows = judged(figures_of(), figures_of(0.8 + 9e-7))
    assert (word, why) == ("equal", "every figure within 1e-06")
    assert rows[0]["figure"] == "asl/test/auroc" and rows[0]["difference"] == pytest.approx(9e-7)
    assert judged(figures_of(), figures_of(0.8 + 2e-6))[0] == "within seed noise"


def test_an_undefined_figure_must_stay_undefined():
    was, now = figures_of(std=None, n=1), figures_of(std=None, n=1)
    assert judged(was, now)[0] == "equal"
    now["asl"]["test"]["auroc"]["ci_low"] = None
    assert judged(was, now)[0] == "different"


def test_seed_noise_decides_by_auroc_and_auprc():
    noise = noise_of(0.02, 3, 3, 2)
    assert noise == pytest.approx(6.2053 * 0.02 * np.sqrt(2 / 3), rel=1e-4)  # t(0.9875, 2 degrees of freedom)
    word, _, rows = judged(figures_of(), figures_of(0.8 + 0.99 * noise, ece=0.9))
    assert word == "within seed noise"
    assert [row["figure"] for row in rows] == ["asl/test/ece", "asl/test/auroc"]
    assert rows[1]["noise"] == pytest.approx(noise) and rows[1]["in_interval"] is (0.99 * noise <= 0.1)
    word, why, _ = judged(figures_of(), figures_of(auprc=0.6 - 1.01 * noise))
    assert (word, why) == ("different", "asl/test/auprc: by more than other seeds would explain")


def test_one_seed_cannot_tell():
    word, why, rows = judged(figures_of(std=None, n=1), figures_of(0.801, std=None, n=1))
    assert word == "different" and "cannot be told from seed noise" in why and rows[0]["noise"] is None


def test_another_experiment_is_different_whatever_its_figures():
    same = figures_of(), figures_of()
    word, why, _ = judged(*same, data={"labels": [3]}, config={"recipe.method": ["ce", "asl"]})
    assert (word, why) == ("different", "the config (recipe.method) and the data (labels) differ")
    assert judged(*same, data={"moved": 4}, config={"seeds": [[1], [2]]})[0] == "equal"
    assert judged(figures_of(), {"ce": figures_of()["asl"]})[:2] == ("different", "not in both: asl, ce")
    assert judged({}, figures_of())[0] == "no comparison"


def test_seed_noise_covers_95_percent_of_repeats():
    rng = np.random.default_rng(0)
    first, second = rng.normal(0, 1, (20000, 4)), rng.normal(0, 1, (20000, 7))
    for num, coverage in ((1, 0.95), (5, 0.99)):
        noise = noise_of(1.0, 4, 7, num)
        inside = np.abs(first.mean(1) - second.mean(1)) <= noise * first.std(1, ddof=1)
        assert inside.mean() == pytest.approx(coverage, abs=0.005)
    assert seed_noise(None, 1, 1) is None


def test_a_verdict_in_words():
    words = {
        "of": "first",
        "verdict": "different",
        "because": "why",
        "figures": judged(figures_of(), figures_of(0.9))[2],
    }
    differences = {"data": {"labels": [3, 8]}, "packages": {"torch": ["2.4", "2.5"]}}

    assert verdict_lines(words | {"differences": differences}) == [
        "repeat of first: different (why)",
        "  asl/test/auroc was 0.800000, is 0.900000; seed noise 0.1",
        "  data: another label: 2 rows (3, 8)",
        "  packages: torch was 2.4, is 2.5",
    ]
