"""What a contest concludes of retrieval that was planted: who is better, who is worse, who is neither."""

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("ray.tune")
from raymed.results.model import median_unit
from raymed.tasks.clip import ClipRecipe
from raymed.train.unit import Unit
from raymed.tune import contest_report
from raymed.tune.contest_report import judge_contest

SHARPNESS = {"info_nce": 1.0, "dcl": 1.0, "hn_nce": 0.55, "dhn_nce": 1.8}
"""How far a pair's image and text stand out of the noise."""
NUM_PAIRS, NUM_SEEDS = 160, 5


def finished_unit(folder, method: str, seed: int) -> Unit:
    """A unit with embeddings of which retrieval is the better, the sharper the method; the pairs' noise is shared."""
    unit = Unit(dataclasses.replace(ClipRecipe(), method=method), seed, folder, "key", method, None, folder)
    folder.mkdir(parents=True)
    arrays, figures = {}, {}
    for salt, split in enumerate(("val", "test")):
        shared = np.random.default_rng(salt)
        concept, difficulty = shared.normal(size=(NUM_PAIRS, 24)), shared.uniform(0.5, 1.5, (NUM_PAIRS, 1))
        own = np.random.default_rng((salt, seed, list(SHARPNESS).index(method)))
        image, text = (SHARPNESS[method] * concept + difficulty * own.normal(size=concept.shape) for _ in range(2))
        rows = np.arange(NUM_PAIRS)
        own_arrays = {"image": image, "text": text, "groups": rows[:, None], "rows": rows, "patients": rows // 2}
        arrays |= {f"{split}_{name}": value for name, value in own_arrays.items()}
        figures[split] = {"mean_recall": float(seed % 7)}
    np.savez(folder / "predictions.npz", **arrays)
    (folder / "result.json").write_text(json.dumps(figures))
    return unit


@pytest.fixture(scope="module")
def methods(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finals")
    return {
        method: [finished_unit(folder / method / str(seed), method, seed) for seed in range(NUM_SEEDS)]
        for method in SHARPNESS
    }


@pytest.fixture(autouse=True)
def patients(monkeypatch):
    """The data name patients, and the test split is opened for the second time."""
    monkeypatch.setattr(contest_report, "unit_data", lambda unit: SimpleNamespace(has_patients=True))
    monkeypatch.setattr(contest_report, "open_test", lambda *of: 2)


def judged(methods, metric="mean_recall"):
    job = SimpleNamespace(recipe=ClipRecipe(), storage=None, key="key")
    return judge_contest(job, methods, "info_nce", metric, num_configurations=12)


@pytest.fixture(scope="module")
def outcome(methods):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(contest_report, "unit_data", lambda unit: SimpleNamespace(has_patients=True))
        patch.setattr(contest_report, "open_test", lambda *of: 2)
        return judged(methods)


def test_the_sharper_loss_is_above_the_baseline_and_its_equal_is_not(outcome):
    for split in ("val", "test"):
        verdicts = outcome.verdicts[split]
        assert set(verdicts) == {"dcl", "hn_nce", "dhn_nce"}
        assert verdicts["dhn_nce"]["verdict"] == "above seed noise" and verdicts["dhn_nce"]["difference"]["mean"] > 0.1
        assert verdicts["dcl"]["verdict"] == "not above seed noise" and verdicts["dcl"]["p_holm"] > 0.05
        assert verdicts["hn_nce"]["verdict"] == "not above seed noise" and verdicts["hn_nce"]["p_holm"] < 0.05
        assert "than info_nce" in verdicts["dhn_nce"]["sentence"]
    assert outcome.chosen == "dhn_nce"


def test_the_sentence_tells_all_three_apart(outcome):
    test, val = outcome.sentence.split(". On validation")
    assert test.startswith("On test, of 3 differences in mean recall from info_nce, 2 exceed noise: ")
    hn = abs(outcome.verdicts["test"]["hn_nce"]["difference"]["mean"])
    assert f"hn_nce is {hn:.4f} lower (p" in test and "dhn_nce is " in test and " higher (p" in test
    assert "; not so dcl (" in test and "hn_nce is" in val
    assert outcome.sentence.endswith("12 configurations of each were tried; this test split has been opened 2 times.")


def test_figures_are_those_of_the_whole_split_over_all_seeds(methods, outcome):
    figure = outcome.figures["dcl"]["test"]["i2t_recall_1"]
    found = []
    for unit in methods["dcl"]:
        with np.load(unit.folder / "predictions.npz") as arrays:
            image, text = (arrays[f"test_{kind}"] for kind in ("image", "text"))
        image, text = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (image, text))
        found.append(np.mean((image @ text.T).argmax(axis=1) == np.arange(NUM_PAIRS)))
    assert figure["mean"] == pytest.approx(np.mean(found), abs=1e-6) and figure["n"] == NUM_SEEDS
    assert figure["num_patients"] == NUM_PAIRS // 2 and figure["ci_low"] < figure["mean"] < figure["ci_high"]


def test_with_fewer_than_five_seeds_nothing_is_concluded(methods):
    few = judged({method: units[:2] for method, units in methods.items()})
    assert few.sentence.startswith("On test, of 3 differences in mean recall from info_nce, it cannot be told")
    assert {v["verdict"] for v in few.verdicts["test"].values()} == {"cannot tell"}


def test_the_model_is_that_of_the_median_seed(methods):
    assert median_unit(methods["dhn_nce"], "mean_recall").seed == 2
