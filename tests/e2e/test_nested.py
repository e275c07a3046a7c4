"""Nested cross-validation from the command line: every image is scored by models that never saw its patient."""

import json
from pathlib import Path

import numpy as np
import pytest
from home import TINY

pytestmark = pytest.mark.ray
COMMAND = (*TINY, "--sweep.num-trials=4", "--nested.outer=2", "--nested.inner=2", "--name=nested")


@pytest.fixture(scope="module")
def nested(home):
    """The summary."""
    output = home.run("tune_asl", *COMMAND)
    return json.loads(Path(output.strip().splitlines()[-1].removeprefix("summary: ")).read_text())


def _tested(home, outer: int, inner: int) -> dict[str, np.ndarray]:
    folder = home.storage / "runs" / "nested" / f"outer-{outer}" / "chosen-on-inner-folds"
    with np.load(folder / f"outer-{outer}-inner-{inner}" / "predictions.npz") as arrays:
        return dict(arrays)


def test_every_image_is_tested_in_one_outer_fold(home, nested):
    tested = [_tested(home, outer, 0) for outer in range(2)]
    rows = np.concatenate([arrays["test_rows"] for arrays in tested])
    assert sorted(rows) == list(range(1, 481))
    assert not set(tested[0]["test_patients"]) & set(tested[1]["test_patients"])
    for outer in range(2):
        assert np.array_equal(_tested(home, outer, 1)["test_rows"], tested[outer]["test_rows"])
        assert not set(_tested(home, outer, 0)["val_rows"]) & set(_tested(home, outer, 1)["val_rows"])


def test_each_outer_fold_chooses_on_its_inner_folds(home, nested):
    assert nested["nested"]["finished"] == 2
    for choice in nested["nested"]["choices"]:
        path = home.storage / "runs" / "nested" / f"outer-{choice['outer']}" / "sweep.jsonl"
        events = [json.loads(line) for line in path.read_text().splitlines()]
        finished = {e["trial"]: e for e in events if e.get("status") == "finished"}
        best = max(finished.values(), key=lambda e: e["value"])
        assert choice["trial"] == best["trial"] and choice["inner_value"] == best["value"]
        assert len(best["values"]) == 2


def test_the_figures_are_over_all_folds(nested):
    assert set(nested["figures"]) == {"default", "chosen on inner folds"}
    auroc = nested["figures"]["chosen on inner folds"]["test"]["auroc"]
    assert auroc["n"] == 4 and auroc["num_patients"] == 240
    assert nested["differences"]["baseline"] == "default"
