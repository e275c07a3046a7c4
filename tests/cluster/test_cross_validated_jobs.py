"""--cv of a comparison and of a sweep: the same folds for all, nobody of whom a network or a choice has seen, and
figures that are those of the held-out cases."""

import json
import runpy
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from sklearn.metrics import roc_auc_score
from small import write_images

from raymed.bundle import Bundle
from raymed.metrics.calibration import Calibration, logit_of
from raymed.metrics.classification import tune_threshold
from raymed.train.unit import TRAINED_ON

pytestmark = [pytest.mark.ray, pytest.mark.slow]
JOBS = Path(__file__).resolve().parents[2] / "jobs"
SMALL = (
    "--data.positive=patch --data.case=patient --data.preprocess.size=16 --data.deidentified --supcon.batch-size=12 "
    "--supcon.steps=6 --supcon.evaluations=1 --supcon.accumulate=1 --head.batch-size=12 --head.steps=40 "
    "--head.evaluations=4 --single.batch-size=12 --single.steps=30 --single.evaluations=2 --single.accumulate=1"
).split()
RUNS = {
    "compared": ("compare_losses", "--compared ce asl --seeds 3 --cv 2x1".split()),
    "tuned": ("tune_asl", "--sweep.num-trials 4 --seeds 3 4 --cv 2x1 --inner-folds 2".split()),
}


@pytest.fixture(scope="module")
def runs(ray_cluster, tmp_path_factory) -> Path:
    """Folder of the runs "compared" and "tuned", on 48 cases of two images each."""
    folder = tmp_path_factory.mktemp("cv")
    (folder / "images").mkdir()
    given = [f"--data.manifest={write_images(folder / 'images')}", *SMALL, f"--storage={folder}"]
    for name, (job, arguments) in RUNS.items():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", [f"{job}.py", *given, *arguments, f"--name={name}"])
            runpy.run_path(str(JOBS / f"{job}.py"), run_name="__main__")
    return folder / "runs"


def summary(run: Path) -> dict:
    return json.loads((run / "summary.json").read_text())


def predicted(unit: Path) -> dict[str, np.ndarray]:
    with np.load(unit / "predictions.npz") as arrays:
        return dict(arrays)


def by_case(unit: Path, split: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(patients, scores, targets), a case a patient; scores as probabilities by what the unit's own val cases are."""
    (_, val, labels), (patients, scores, targets) = (means(unit, name) for name in ("val", split))
    return patients, Calibration.fit(logit_of(val), labels.astype(float))(logit_of(scores)), targets


def means(unit: Path, split: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(patients, mean scores, targets)."""
    arrays = predicted(unit)
    patients = np.unique(arrays[f"{split}_patients"])
    inside = [arrays[f"{split}_patients"] == patient for patient in patients]
    return (
        patients,
        np.array([arrays[f"{split}_scores"][i].mean() for i in inside]),
        np.array([arrays[f"{split}_targets"][i].max() for i in inside]),
    )


def fold_of(folder: Path) -> tuple[int, int]:
    """(repeat, fold) of a training, by its name."""
    words = folder.name.split("-")
    return int(words[1]), int(words[3])


@pytest.mark.parametrize("name", RUNS)
def test_nobody_who_is_held_out_has_been_seen(runs, name):
    data = json.loads((runs / name / "data.json").read_text())
    patient_of = {int(content, 16): patient for content, patient in zip(data["content"], data["patient"], strict=True)}
    held_out = defaultdict(list)
    for path in (runs / name).rglob("predictions.npz"):
        if "test_patients" in (arrays := predicted(path.parent)):
            held_out[fold_of(path.parent)].append(set(arrays["test_patients"].tolist()))
    for repeat in {repeat for repeat, _ in held_out}:
        one, other = held_out[repeat, 0], held_out[repeat, 1]
        assert all(patients == one[0] for patients in one) and all(patients == other[0] for patients in other)
        assert one[0] | other[0] == set(data["patient"]) and not one[0] & other[0]

    trained = [path.parent for path in (runs / name).rglob("trained_on.npy")]
    for folder in trained:  # encoders, heads and whole networks, those of inner folds too
        contents = np.load(folder / "trained_on.npy").tolist()
        if (folder / "bundle").is_dir():  # validation chooses checkpoint and threshold
            contents = Bundle.load(folder / "bundle").extras[TRAINED_ON].numpy().view(np.uint64).tolist()
        seen = {patient_of[content] for content in contents if content in patient_of}
        assert len(seen) >= 8 and not seen & held_out[fold_of(folder)][0]
    assert len(trained) == {"compared": 2 * 5, "tuned": 2 * (3 + 2 * 3)}[name]


def test_figures_of_a_method_are_those_of_its_held_out_cases(runs):
    told = summary(runs / "compared")
    assert list(told["figures"]) == ["ce", "asl", "supcon_ce", "supcon_asl"] and told["level"] == "case"
    for method, figures in told["figures"].items():
        folds = [by_case(runs / "compared" / method / f"repeat-0-fold-{k}-seed-3", "test") for k in (0, 1)]
        scores, targets = (np.concatenate([fold[i] for fold in folds]) for i in (1, 2))
        decided = [own[1] >= tune_threshold(other[1], other[2], "youden") for own, other in (folds, folds[::-1])]
        recall = np.concatenate(decided)[targets == 1].mean()
        assert figures["test"]["auroc"]["mean"] == pytest.approx(roc_auc_score(targets, scores))
        assert figures["test"]["recall"]["mean"] == pytest.approx(recall)
        assert figures["test"]["auroc"]["num_patients"] == 48
    auroc = told["figures"]["ce"]["test"]["auroc"]
    assert auroc["mean"] > 0.6 and auroc["ci_low"] < auroc["mean"] < auroc["ci_high"]  # there is something to learn


def test_methods_are_compared_and_the_best_is_named_on_validation(runs):
    told = summary(runs / "compared")
    val = {name: of["val"]["auprc"]["mean"] for name, of in told["figures"].items()}
    assert told["best"] == max(val, key=val.__getitem__) and "a little too good" in told["note"]
    assert told["differences"]["baseline"] == "ce"
    test = {name: of["test"]["auroc"]["mean"] for name, of in told["figures"].items()}
    for name in ("asl", "supcon_ce", "supcon_asl"):
        difference = told["differences"][name]["test"]["auroc"]
        assert difference["mean"] == pytest.approx(test[name] - test["ce"])
        assert difference["ci_low"] <= difference["mean"] <= difference["ci_high"]
    assert all((runs / "compared" / name / "out_of_fold.npz").is_file() for name in test)


def test_the_heads_of_a_fold_share_its_encoder(runs):
    name, of = "encoder.net.stem.0.weight", "bundle/model.safetensors"
    stems = {
        (method, fold): load_file(runs / "compared" / method / f"{fold}-seed-3" / of)[name]
        for method in ("supcon_ce", "supcon_asl")
        for fold in ("repeat-0-fold-0", "repeat-0-fold-1")
    }
    for fold in ("repeat-0-fold-0", "repeat-0-fold-1"):
        assert np.array_equal(stems["supcon_ce", fold], stems["supcon_asl", fold])
    assert not np.array_equal(stems["supcon_ce", "repeat-0-fold-0"], stems["supcon_ce", "repeat-0-fold-1"])


def test_each_fold_chooses_on_its_inner_folds(runs):
    told = summary(runs / "tuned")
    assert [(c["repeat"], c["fold"]) for c in told["nested"]["choices"]] == [(0, 0), (0, 1)]
    for choice in told["nested"]["choices"]:
        path = runs / "tuned" / f"repeat-0-fold-{choice['fold']}" / "sweep.jsonl"
        events = [json.loads(line) for line in path.read_text().splitlines()]
        best = max((e for e in events if e.get("status") == "finished"), key=lambda e: e["value"])
        assert (choice["trial"], choice["inner_value"]) == (best["trial"], best["value"])
        assert len(best["values"]) == 2
    assert set(told["figures"]) == {"default", "chosen on inner folds"} and told["best"] == "chosen on inner folds"


def test_thresholds_of_a_sweep_come_from_inside(runs):
    run = runs / "tuned"
    with np.load(run / "chosen-on-inner-folds" / "out_of_fold.npz") as arrays:
        found = dict(arrays)
    for fold in (0, 1):
        name = f"repeat-0-fold-{fold}"
        inner = [by_case(run / name / "chosen-on-inner-folds" / f"{name}-inner-{k}", "val") for k in (0, 1)]
        patients, scores, targets = (np.concatenate([of[i] for of in inner]) for i in range(3))
        held_out, own, _ = by_case(run / "chosen-on-inner-folds" / name, "test")
        assert sorted([*patients, *held_out]) == list(range(48))
        at = np.searchsorted(found["patients"], held_out)
        np.testing.assert_allclose(found["scores"][0, at], own)
        assert np.array_equal(found["decided"][0, at], own >= tune_threshold(scores, targets, "youden"))
