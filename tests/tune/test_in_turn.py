"""Trials on several workers, one after the other: the journal of any search, and what failures and budgets do to it."""

import json
import math
from types import SimpleNamespace

import pytest

pytest.importorskip("ray.tune")
from raymed.config import UserError
from raymed.tasks.classifier import ClassifierRecipe
from raymed.train.places.room import NoRoom
from raymed.train.unit import Unit
from raymed.tune import in_turn
from raymed.tune.config import SweepConfig, default_params, search_space
from raymed.tune.journal import Journal
from raymed.tune.search import JournalSearcher
from raymed.tune.trials import Replicate, Trials

SWEEP = SweepConfig(num_trials=4)
RECIPE = ClassifierRecipe(method="focal")
SPACE = search_space(RECIPE, SWEEP)


class Cluster:
    """Stands in for Ray Train: trains at once, and remembers what. The value follows from the seed and parameters."""

    def __init__(self, broken: tuple[int, ...] = (), num_trainings: float = math.inf, crowded: tuple[int, ...] = ()):
        self.broken, self.num_trainings, self.crowded, self.trained = broken, num_trainings, crowded, []

    def train(self, unit: Unit, budget, interrupted) -> bool:
        name = f"{unit.folder.parent.name}/{unit.folder.name}"
        if len(self.trained) >= self.num_trainings:
            return False
        if any(name.startswith(f"trial-{number:04d}") for number in self.broken):
            raise UserError("the loss is not finite")
        if any(name.startswith(f"trial-{number:04d}") for number in self.crowded):
            raise NoRoom("waited 600 s; the same command continues")
        self.trained.append(name)
        unit.outbox.open(unit.key, unit.name, unit.parent)
        for rung in (1, 2):
            unit.outbox.metrics({"val/auprc": value_of(unit) * rung / 2}, rung)
        unit.outbox.close("FINISHED")
        (unit.folder / "result.json").write_text(json.dumps({"val": {"auprc": value_of(unit)}}))
        return True


def value_of(unit: Unit) -> float:
    return unit.recipe.losses.focal.gamma / 10 + unit.seed / 100


@pytest.fixture
def search(tmp_path, monkeypatch):
    """search(cluster) runs the search there, as a new process would; returns its journal."""
    template = Unit(RECIPE, 0, tmp_path, "key", "sweep", None, tmp_path / "cache")
    trials = Trials(template, (Replicate("seed-1", 1), Replicate("seed-2", 2)), "auprc")

    def run(cluster: Cluster) -> Journal:
        monkeypatch.setattr(in_turn, "train_with_workers", cluster.train)
        journal = Journal(tmp_path / "sweep.jsonl")
        job = SimpleNamespace(follow=lambda outbox: None, budget=None, interrupted=lambda: False)
        in_turn.run_in_turn(job, SWEEP, SPACE, default_params(RECIPE, SPACE), journal, trials)
        return Journal(journal.path)

    run.trials = trials
    return run


def test_every_trial_is_trained_on_every_seed_and_scored_by_the_mean(search):
    cluster = Cluster()
    journal = search(cluster)

    assert cluster.trained == [f"trial-{number:04d}/seed-{seed}" for number in range(4) for seed in (1, 2)]
    for trial in journal.trials.values():
        expected = trial.params["losses.focal.gamma"] / 10 + 0.015
        assert trial.status == "finished" and trial.value == pytest.approx(expected)
        assert trial.rungs == pytest.approx({1: expected / 2, 2: expected})
        assert trial.values == pytest.approx([expected - 0.005, expected + 0.005])
        records = search.trials.outbox(trial.number).records()
        assert records[0]["op"] == "open" and records[-1] == records[-1] | {"op": "close", "status": "FINISHED"}


def test_it_tries_what_ray_tune_one_by_one_would_try(search, tmp_path):
    journal = search(Cluster())

    other = Journal(tmp_path / "other.jsonl")
    searcher = JournalSearcher(other, SPACE, default_params(RECIPE, SPACE), 4, SWEEP.seed, "max")
    for number in range(4):
        assert searcher.suggest("id") == {"number": number, "params": journal.trials[number].params}
        other.end(number, "finished", journal.trials[number].value)


@pytest.mark.parametrize("first", [0, 1, 3, 6])
def test_a_search_whose_budget_was_used_up_goes_on_where_it_was(search, first):
    left = search(Cluster(num_trainings=first))
    assert sum(trial.status == "finished" for trial in left.trials.values()) == first // 2

    cluster = Cluster()
    journal = search(cluster)
    assert len(cluster.trained) == 8 - first
    assert [trial.status for trial in journal.trials.values()] == ["finished"] * 4
    again = Cluster()
    search(again)
    assert again.trained == []


def test_a_trial_that_fails_is_journaled_and_the_search_goes_on(search):
    journal = search(Cluster(broken=(2,)))

    assert [trial.status for trial in journal.trials.values()] == ["finished", "finished", "failed", "finished"]
    assert search.trials.outbox(2).records()[-1]["status"] == "FAILED"


def test_a_default_that_fails_ends_the_search_and_is_tried_again(search):
    with pytest.raises(UserError, match="not finite"):
        search(Cluster(broken=(0,)))

    assert search(Cluster()).trials[0].status == "finished"


def test_a_trial_that_finds_no_room_has_not_failed_and_the_same_command_continues(search):
    with pytest.raises(UserError, match="the same command continues"):
        search(Cluster(crowded=(2,)))

    again = Cluster()
    assert [trial.status for trial in search(again).trials.values()] == ["finished"] * 4
    assert again.trained == [f"trial-000{number}/seed-{seed}" for number in (2, 3) for seed in (1, 2)]
