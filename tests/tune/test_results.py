"""A sweep opens in Ray Tune's own tools."""

import json
import math

import pytest

pytest.importorskip("ray.tune")
from ray.tune import ExperimentAnalysis

from raymed.tune.journal import Journal
from raymed.tune.results import write_tune_results


@pytest.fixture
def journal(tmp_path):
    """Three trials: finished, cut, failed at once."""
    journal = Journal(tmp_path / "sweep.jsonl")
    for number, values in enumerate(([0.5, 0.7, 0.6], [0.4], [])):
        journal.choose(number, {"losses.asl.gamma_neg": float(number), "losses.focal.alpha": None})
        for rung, value in enumerate(values, start=1):
            journal.reach(number, rung, value)
    journal.end(0, "finished", 0.7, [0.6, 0.8])
    journal.end(1, "stopped", 0.4, [0.3, 0.5])
    journal.end(2, "failed", None)
    return journal


def test_rays_analysis_reads_it(journal, tmp_path):
    analysis = ExperimentAnalysis(str(write_tune_results(tmp_path / "tune", journal, "auprc")))

    assert [trial.trial_id for trial in analysis.trials] == ["trial-0000", "trial-0001", "trial-0002"]
    assert [trial.status for trial in analysis.trials] == ["TERMINATED", "TERMINATED", "ERROR"]
    assert analysis.get_best_config("auprc", "max", scope="last") == journal.trials[0].params
    frame = analysis.trial_dataframes["trial-0000"]
    assert frame["auprc"].tolist() == [0.5, 0.7, 0.6] and frame["training_iteration"].tolist() == [1, 2, 3]


def test_writing_again_replaces_it(journal, tmp_path):
    folder = write_tune_results(tmp_path / "tune", journal, "auprc")
    journal.choose(3, {"losses.asl.gamma_neg": 3.0})
    journal.reach(3, 1, math.pi)
    write_tune_results(folder, journal, "auprc")

    assert len(list(folder.glob("trial-*"))) == 4
    line = json.loads((folder / "trial-0003" / "result.json").read_text())
    assert line == {"training_iteration": 1, "auprc": math.pi, "trial_id": "trial-0003", "done": True}
