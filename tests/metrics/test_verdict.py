"""Verdicts on simulated sweeps with and without an effect, the test statistic by hand, and what cannot be judged."""

import math
from dataclasses import dataclass

import numpy as np
import pytest
from scipy import stats
from scipy.special import expit

from raymed.config import UserError
from raymed.metrics import summarise_difference
from raymed.metrics.verdict import _compare, best_finalist, holm, judge, overall

NUM_CONFIGURATIONS, SEARCH_SEEDS, FRESH_SEEDS, NUM_FINALISTS = 24, 2, 5, 3
SEED_SPREAD = 0.15
"""Standard deviation over seeds of the distance between the classes, in logits; that of AUROC becomes about 0.024."""
SHARED = 0.75
"""Part of that variance that heads of a seed share through its encoder. SupCon heads on PneumoniaMNIST share 0.8 and
more of the variance of AUROC and AUPRC over seeds; less is harder to judge."""


@dataclass
class Split:
    """Binormal scores of one split: the patients' difficulty is the same for every seed and configuration."""

    random: np.random.Generator
    num_patients: int
    own_view: float
    """Standard deviation of what a configuration makes of an image under every seed: better here, worse there."""

    def __post_init__(self) -> None:
        self.patients = np.repeat(np.arange(self.num_patients), 2)
        num_images = len(self.patients)
        self.targets = (self.patients % 3 == 0).astype(int)
        difficulty = 0.6 * self.random.normal(size=self.num_patients)[self.patients]
        self.difficulty = difficulty + 0.6 * self.random.normal(size=num_images)
        self.views = self.own_view * self.random.normal(size=(NUM_CONFIGURATIONS + 1, num_images))

    def logits(self, configurations, distance):
        """(K, S, N) for distances (K, S) between the classes; the encoder's noise on an image is the seed's."""
        num_seeds, num_images = distance.shape[1], len(self.targets)
        of_encoder = 0.3 * self.random.normal(size=(num_seeds, num_images))
        of_head = 0.1 * self.random.normal(size=(*distance.shape, num_images))
        signal = (1.6 + distance)[:, :, None] * self.targets
        return signal + self.difficulty + of_encoder + of_head + self.views[configurations][:, None]

    def predictions(self, logits):
        return [(expit(of_seed), self.targets, self.patients, 0.5) for of_seed in logits]


def auroc(logits, targets):
    """(...,) of logits (..., N) without ties."""
    ranks = logits.argsort(axis=-1).argsort(axis=-1) + 1
    num_positive, num_negative = targets.sum(), (1 - targets).sum()
    ordered = (ranks * targets).sum(axis=-1) - num_positive * (num_positive + 1) / 2
    return ordered / (num_positive * num_negative)


def distances(random, quality, num_seeds):
    """(K, S): how far apart configurations of that quality (K,) put the classes, by seed."""
    of_encoder = math.sqrt(SHARED) * random.normal(size=num_seeds)
    of_head = math.sqrt(1 - SHARED) * random.normal(size=(len(quality), num_seeds))
    return quality[:, None] + SEED_SPREAD * (of_encoder + of_head)


def sweep(random, quality, own_view=0.0):
    """A whole sweep; configuration 0 is the default. Returns finalists, and {split: {configuration: predictions}}."""
    splits = {"val": Split(random, 80, own_view), "test": Split(random, 100, own_view)}
    validation = splits["val"]
    tried = np.arange(1, len(quality))
    searched = validation.logits(tried, distances(random, quality[1:], SEARCH_SEEDS))
    order = auroc(searched, validation.targets).mean(axis=1).argsort()[::-1]
    finalists = tried[order[:NUM_FINALISTS]]
    retrained = np.append(0, finalists)
    distance = distances(random, quality[retrained], FRESH_SEEDS)
    found = {}
    for name, split in splits.items():
        logits = split.logits(retrained, distance)
        found[name] = {int(k): split.predictions(of_k) for k, of_k in zip(retrained, logits, strict=True)}
    return [int(k) for k in finalists], found


def judged(predictions, finalists):
    verdicts = judge({str(k): predictions[k] for k in finalists}, predictions[0], "auroc", n_boot=50)
    return {name for name, verdict in verdicts.items() if verdict["verdict"] == "above seed noise"}


def two_seed_standard_deviations():
    """The gain in distance that raises AUROC by two of its standard deviations over seeds."""
    random = np.random.default_rng(5)
    split, none = Split(random, 2000, 0.0), np.zeros(1)
    spread = auroc(split.logits([0], distances(random, none, 200)), split.targets).std(ddof=1)
    base, raised = (auroc(split.logits([0], np.full((1, 50), d)), split.targets).mean() for d in (0.0, 0.2))
    return 2 * spread / (raised - base) * 0.2


@pytest.mark.parametrize("own_view", [0.0, 0.3])
def test_sweeps_without_an_effect_are_seldom_above_seed_noise(own_view):
    """own_view 0.3: configurations are equally good, but not of the same opinion on these patients."""
    random, none = np.random.default_rng(1), np.zeros(NUM_CONFIGURATIONS + 1)
    above = 0
    for _ in range(200):
        finalists, found = sweep(random, none, own_view)
        above += bool(judged(found["test"], finalists))
    assert above <= 14, f"{above} of 200 sweeps without an effect"


def test_an_effect_of_two_seed_standard_deviations_is_found():
    random, gain = np.random.default_rng(2), two_seed_standard_deviations()
    found_it = 0
    for _ in range(100):
        planted = int(random.integers(1, NUM_CONFIGURATIONS + 1))
        quality = gain * (np.arange(NUM_CONFIGURATIONS + 1) == planted)
        finalists, found = sweep(random, quality)
        found_it += str(planted) in judged(found["test"], finalists)
    assert found_it >= 80, f"{found_it} of 100 sweeps with an effect"


def decided(right, targets, patients=None):
    """Predictions that are right at 0.5 where told, (S, N)."""
    scores = np.where(right == targets.astype(bool), 0.9, 0.1)
    return [(of_seed, targets, patients, 0.5) for of_seed in scores]


def accuracies(seed, num_seeds=5, gain=0.1, spread=0.02, num_patients=300):
    """Finalist and default that are right on about 0.7 + gain and 0.7 of the images, two a patient; and who is."""
    random = np.random.default_rng(seed)
    patients = np.repeat(np.arange(num_patients), 2)
    targets = random.integers(2, size=2 * num_patients)
    easy = random.random(num_patients)[patients]  # so that seeds have patients in common
    luck = 0.2 * random.random((2, num_seeds, 2 * num_patients))
    bar = np.stack([0.7 + gain + spread * random.normal(size=num_seeds), np.full(num_seeds, 0.7)])
    right = easy + luck < bar[:, :, None]
    return (*(decided(of_one, targets, patients) for of_one in right), right)


def by_hand(right):
    """(t, degrees of freedom) where the covariance by patients has a closed form: accuracy is a mean over patients."""
    num_seeds = right.shape[1]
    of_patient = (right[0].astype(float) - right[1]).reshape(num_seeds, -1, 2).mean(axis=2)
    differences, covariance = of_patient.mean(axis=1), np.cov(of_patient, ddof=0) / of_patient.shape[1]
    by_seeds = np.var(differences, ddof=1) / num_seeds
    by_patients = covariance[~np.eye(num_seeds, dtype=bool)].mean()
    variance = by_seeds + max(0, by_patients)
    return differences.mean() / math.sqrt(variance), (num_seeds - 1) * (variance / by_seeds) ** 2


@pytest.mark.parametrize(("gain", "num_seeds"), [(0.02, 5), (0.01, 8), (-0.02, 5), (0.03, 3)])
def test_p_is_that_of_seeds_and_patients_by_hand(gain, num_seeds):
    finalist, default, right = accuracies(3, num_seeds, gain)
    verdict = judge({"a": finalist}, default, "accuracy_at_0.5", n_boot=4000)["a"]
    t, freedom = by_hand(right)
    low, high = (2 * stats.t.sf(abs(t) * x, freedom) for x in (1.04, 0.96))  # what 4000 resamples leave open
    assert 1e-4 < low < verdict["p"] < high < 0.9
    assert verdict["p_holm"] == verdict["p"]


def test_without_patients_in_common_p_is_of_a_t_test_over_seeds():
    finalist, default, right = accuracies(4, gain=0.02)
    apart = [
        [(scores, targets, patients + 1000 * number, 0.5) for number, (scores, targets, patients, _) in enumerate(run)]
        for run in (finalist, default)
    ]
    verdict = judge({"a": apart[0]}, apart[1], "accuracy_at_0.5", n_boot=4000)["a"]
    expected = stats.ttest_rel(*right.mean(axis=2)).pvalue
    assert verdict["p"] == pytest.approx(expected, rel=0.05)
    assert verdict["difference"]["num_patients"] == 1500


@pytest.mark.parametrize("of_patients", [0.0, 0.5])
def test_the_interval_covers_and_agrees_with_p(of_patients):
    """Seeds scatter by 1; the percentile interval of the same resamples covers too seldom."""
    random = np.random.default_rng(6)
    covered = agree = covered_by_percentiles = 0
    for trial in range(400):
        observed = random.normal(size=5) + of_patients * random.normal()
        resampled = observed + of_patients * random.normal(size=(200, 1))
        figure, p = _compare(np.vstack([observed, resampled]), trial, 0.95, num_patients=None, unit="image")
        covers = figure["ci_low"] <= 0 <= figure["ci_high"]
        covered += covers
        agree += covers == (p > 0.05)
        drawn = np.take_along_axis(resampled, random.integers(5, size=(200, 5)), axis=1).mean(axis=1)
        low, high = np.quantile(drawn, [0.025, 0.975])
        covered_by_percentiles += low <= 0 <= high
    assert 368 <= covered <= 392 and agree >= 384
    assert covered_by_percentiles < covered and (of_patients or covered_by_percentiles < 350)


def test_difference_is_the_figure_of_the_tables_with_an_interval_for_few_seeds():
    finalist, default, _ = accuracies(12, spread=0.1)
    figure = judge({"a": finalist}, default, "auroc")["a"]["difference"]
    table = summarise_difference(finalist, default)["auroc"]
    assert {name: figure[name] for name in figure if "ci" not in name} == pytest.approx(
        {name: table[name] for name in figure if "ci" not in name}
    )
    widths = [f["ci_high"] - f["ci_low"] for f in (figure, table)]
    assert 1.4 < widths[0] / widths[1] < 1.75  # sqrt(5 / 4) 2.78 / 1.96 = 1.58 of seeds alone


@pytest.mark.parametrize("metric", ["auroc", "auprc", "accuracy_at_0.5", "brier", "ece"])
def test_better_is_higher_or_lower_by_metric(metric):
    good, bad, _ = accuracies(8, gain=0.2)
    verdicts = judge({"good": good}, bad, metric, n_boot=200), judge({"bad": bad}, good, metric, n_boot=200)
    better, worse = verdicts[0]["good"], verdicts[1]["bad"]
    assert better["verdict"] == "above seed noise" and worse["verdict"] == "not above seed noise"
    assert better["p"] == pytest.approx(worse["p"], rel=1e-6) and better["p"] < 0.001
    assert (better["difference"]["mean"] < 0) == (metric in ("brier", "ece"))
    assert better["difference"]["mean"] == pytest.approx(-worse["difference"]["mean"])
    both = judge({"bad": bad, "good": good}, bad, metric, n_boot=50)
    assert best_finalist(both, metric) == "good"


@pytest.mark.parametrize("num_seeds", [1, 2, 4])
def test_fewer_than_five_seeds_cannot_tell(num_seeds):
    finalist, default, _ = accuracies(9, num_seeds, gain=0.25, spread=0.001)
    verdict = judge({"a": finalist}, default, "accuracy_at_0.5", n_boot=200)["a"]
    assert verdict["verdict"] == "cannot tell"
    assert math.isnan(verdict["p"]) if num_seeds == 1 else verdict["p"] < 0.05
    assert verdict["difference"]["ci_low"] > 0 or num_seeds == 2
    seeds = "1 seed" if num_seeds == 1 else f"{num_seeds} seeds"
    assert verdict["sentence"].endswith(f"{seeds}, 300 patients, at least 5 seeds are needed): cannot tell.")


@pytest.mark.parametrize("metric", ["auroc", "brier"])
def test_the_default_itself_is_not_above(metric):
    _, default, _ = accuracies(10)
    verdict = judge({"twin": default, "copy": list(default)}, default, metric, n_boot=100)["twin"]
    assert verdict["verdict"] == "not above seed noise" and verdict["p"] == verdict["p_holm"] == 1
    assert [verdict["difference"][name] for name in ("mean", "std", "ci_low", "ci_high")] == [0, 0, 0, 0]
    assert verdict["sentence"].startswith(f"twin has the same {'AUROC' if metric == 'auroc' else 'Brier score'} as")


def test_resamples_without_a_positive_are_left_out_and_counted():
    random, targets = np.random.default_rng(0), np.arange(12) < 2
    runs = [[(random.random(12), targets.astype(int), None, 0.5) for _ in range(5)] for _ in range(2)]
    figure = judge({"a": runs[0]}, runs[1], "auroc", n_boot=500)["a"]["difference"]
    assert figure["num_undefined"] == pytest.approx(500 * (10 / 12) ** 12, rel=0.3)
    assert figure["ci_low"] < figure["ci_high"] and figure["unit"] == "image" and figure["num_patients"] is None


@pytest.mark.parametrize(
    ("p", "corrected"),
    [
        ([0.01, 0.04, 0.03], [0.03, 0.06, 0.06]),
        ([0.05, 0.04, 0.03, 0.02, 0.01], [0.09, 0.09, 0.09, 0.08, 0.05]),
        ([0.4, 0.6], [0.8, 0.8]),
        ([0.9, 0.001, 0.7], [1.0, 0.003, 1.0]),
        ([0.02], [0.02]),
        ([], []),
    ],
)
def test_holm_by_hand(p, corrected):
    assert holm(p) == pytest.approx(corrected)


def test_finalists_are_corrected_together():
    finalist, default, _ = accuracies(3, gain=0.05)
    alone = judge({"a": finalist}, default, "accuracy_at_0.5", n_boot=300)["a"]
    among = judge({"a": finalist, "b": default, "c": default}, default, "accuracy_at_0.5", n_boot=300)
    assert among["a"]["p"] == alone["p"] and among["a"]["p_holm"] == pytest.approx(3 * alone["p"])
    assert [among[name]["p_holm"] for name in "bc"] == [1, 1]


def test_sentences():
    good, default, _ = accuracies(8, gain=0.2)
    near, _, _ = accuracies(8, gain=0.004)
    val = judge({"near": near, "good": good}, default, "accuracy_at_0.5", n_boot=200)
    test = judge({"near": near, "good": good}, default, "brier", n_boot=200)
    figure = val["good"]["difference"]
    assert val["good"]["sentence"] == (
        f"good has a {figure['mean']:.4f} higher accuracy at 0.5 than the default (95 % interval "
        f"{figure['ci_low']:+.4f} to {figure['ci_high']:+.4f}, 5 seeds, 300 patients, p < 0.001 after "
        "correction for 2 finalists): above seed noise."
    )
    assert "lower Brier score than the default (lower is better) (95 % interval -" in test["good"]["sentence"]
    assert f"p = {val['near']['p_holm']:.3f} after correction" in val["near"]["sentence"]
    text = overall(val, test, "good", num_configurations=96, num_openings=2)
    assert text.startswith(f"On test, {test['good']['sentence']} On validation, {val['good']['sentence']} ")
    assert text.endswith("96 configurations were tried; this test split has been opened 2 times.")
    assert overall(val, test, "near", num_configurations=1, num_openings=1).endswith(
        "1 configuration was tried; this test split has been opened once."
    )


def test_what_cannot_be_compared_is_refused():
    finalist, default, _ = accuracies(11)
    no_positive = [(scores, 0 * targets, *rest) for scores, targets, *rest in default]
    with pytest.raises(UserError, match="^a was trained on 4 seeds and the default on 5: .*on the same seeds$"):
        judge({"a": finalist[:4]}, default, "auroc")
    with pytest.raises(UserError, match="not scored on the same rows under seed 1"):
        judge({"a": no_positive}, default, "auroc", n_boot=10)
    with pytest.raises(UserError, match="AUROC of the default is undefined under seed 3 of 5: its 600 rows must hold"):
        broken = default[:2] + no_positive[2:]
        judge({"a": broken}, broken, "auroc", n_boot=10)
    with pytest.raises(UserError, match="metric must be one of 'auroc', .* got 'aurok' .did you mean 'auroc'"):
        judge({"a": finalist}, default, "aurok")
    one_patient = [
        [(scores[:2], np.array([0, 1]), np.zeros(2), 0.5) for scores, *_ in run] for run in (finalist, default)
    ]
    verdict = judge({"a": one_patient[0]}, one_patient[1], "auroc", n_boot=10)["a"]
    assert verdict["difference"]["num_patients"] == 1
