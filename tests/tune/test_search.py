"""Suggestions and early stopping are functions of the journal: a killed sweep goes on as if it had not been."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("ray.tune")
from ray.tune.schedulers import TrialScheduler
from ray.tune.search import Searcher

from raymed.space import Choice, Float
from raymed.tune.journal import Journal
from raymed.tune.search import TIME, JournalAsha, JournalSearcher, cut, rungs, suggest

SPACE = {"x": Float(0, 1), "y": Float(1e-3, 1.0, log=True), "kind": Choice(("a", "b", None))}
DEFAULT = {"x": 0.5, "y": 0.1, "kind": "a"}


def objective(params: dict) -> float:
    """Highest, 0, at x = 0.8, y = 0.01, kind b."""
    distance = (params["x"] - 0.8) ** 2 + ((np.log10(params["y"]) + 2) / 3) ** 2
    return -float(distance) - (0.0 if params["kind"] == "b" else 0.1)


def searcher(journal: Journal, num_trials: int, seed: int = 0) -> JournalSearcher:
    return JournalSearcher(journal, SPACE, DEFAULT, num_trials, seed, "max")


def sweep(path, num_trials: int, seed: int = 0, kills: tuple[int, ...] = ()) -> Journal:
    """Trials one after the other; at the given numbers the process "dies" with the trial chosen and not ended."""
    journal = Journal(path)
    search = searcher(journal, num_trials, seed)
    while (trial := search.suggest("id")) != Searcher.FINISHED:
        if trial["number"] in kills:
            kills = tuple(k for k in kills if k != trial["number"])
            journal = Journal(path)
            search = searcher(journal, num_trials, seed)
            continue
        journal.end(trial["number"], "finished", objective(trial["params"]))
    return journal


def test_the_first_trial_is_the_default_and_all_lie_in_the_space(tmp_path):
    journal = sweep(tmp_path / "sweep.jsonl", 14)

    assert journal.trials[0].params == DEFAULT
    assert sorted(journal.trials) == list(range(14))
    for trial in journal.trials.values():
        assert all(SPACE[name].contains(value) for name, value in trial.params.items())
        assert set(trial.params) == set(SPACE)


def test_unfinished_trials_come_first_with_the_parameters_they_had(tmp_path):
    journal = Journal(tmp_path / "sweep.jsonl")
    for number in range(3):
        journal.choose(number, DEFAULT | {"x": number / 10})
    journal.end(1, "finished", 0.5)

    search = searcher(Journal(journal.path), 4)
    trials = [search.suggest("id") for _ in range(3)]

    assert [t["number"] for t in trials] == [0, 2, 3]
    assert trials[1]["params"] == DEFAULT | {"x": 0.2}
    assert search.suggest("id") == Searcher.FINISHED


def test_a_killed_sweep_tries_what_an_uninterrupted_one_tries(tmp_path):
    whole = sweep(tmp_path / "whole.jsonl", 16)
    killed = sweep(tmp_path / "killed.jsonl", 16, kills=(0, 1, 9, 15))

    assert killed.trials == whole.trials
    assert sweep(tmp_path / "other.jsonl", 16, seed=1).trials != whole.trials


def test_suggestions_find_a_planted_optimum_better_than_chance(tmp_path):
    num_trials, seeds = 30, range(5)
    found = [sweep(tmp_path / f"{seed}.jsonl", num_trials, seed).best("max").value for seed in seeds]
    late = [np.mean([t.value for t in Journal(tmp_path / f"{seed}.jsonl").ended()][-10:]) for seed in seeds]

    rng = np.random.default_rng(0)
    chance = [
        [
            objective({"x": rng.random(), "y": 10 ** rng.uniform(-3, 0), "kind": rng.choice(["a", "b", "c"])})
            for _ in range(num_trials)
        ]
        for _ in range(200)
    ]

    assert np.mean(found) > np.mean(np.max(chance, axis=1))
    assert np.mean(late) > np.mean(chance) + 3 * np.std(np.mean(np.array(chance)[:, :10], axis=1)) / np.sqrt(5)


class Bench:
    """Drives the scheduler as Ray Tune does: rung by rung, all trials side by side."""

    def __init__(self, journal: Journal, mode: str = "max"):
        self.journal = journal
        self.asha = JournalAsha(journal, "auprc", mode, evaluations=9, grace=1, reduction=3)

    def start(self, number: int) -> None:
        self.asha.on_trial_add(None, _trial(number))

    def result(self, number: int, rung: int, value: float) -> str:
        self.journal.reach(number, rung, value)
        return self.asha.on_trial_result(None, _trial(number), {TIME: rung, "auprc": value})


def _trial(number: int) -> SimpleNamespace:
    return SimpleNamespace(config={"number": number}, trial_id=f"ray-{number}")


def _run(path, restart_after: int | None, mode: str = "max") -> list[str]:
    """Decisions over 12 trials of 9 evaluations each; after so many results everything is rebuilt from the journal."""
    journal = Journal(path)
    bench = Bench(journal, mode)
    for number in range(12):
        journal.choose(number, {})
        bench.start(number)
    values = np.random.default_rng(3).random((10, 12))
    alive, decisions = set(range(12)), []
    for rung in range(1, 10):
        for number in sorted(alive):
            if len(decisions) == restart_after:
                bench = Bench(Journal(path), mode)
                for survivor in alive:
                    bench.start(survivor)
            decisions.append(bench.result(number, rung, values[rung, number]))
            if decisions[-1] == TrialScheduler.STOP:
                alive.remove(number)
                bench.journal.end(number, "stopped", values[rung, number])
    return decisions


@pytest.mark.parametrize("mode", ["max", "min"])
def test_rungs_rebuilt_from_the_journal_decide_as_if_never_interrupted(tmp_path, mode):
    whole = _run(tmp_path / "whole.jsonl", None, mode)

    assert 4 < whole.count(TrialScheduler.STOP) < 12
    for restart_after in range(1, len(whole), 3):
        assert _run(tmp_path / f"{restart_after}.jsonl", restart_after, mode) == whole


def test_the_default_is_never_stopped_and_bad_ones_are(tmp_path):
    journal = Journal(tmp_path / "sweep.jsonl")
    bench = Bench(journal)
    for number in range(5):
        journal.choose(number, {})
        bench.start(number)
    for number in range(1, 4):
        bench.result(number, 1, 0.9)

    assert bench.result(4, 1, 0.1) == TrialScheduler.STOP
    assert [bench.result(0, rung, 0.1) for rung in range(1, 11)] == [TrialScheduler.CONTINUE] * 10


def test_a_trial_that_is_continued_is_not_judged_twice_at_a_rung(tmp_path):
    journal = Journal(tmp_path / "sweep.jsonl")
    bench = Bench(journal)
    for number, value in enumerate((0.5, 0.1, 0.9, 0.8)):
        journal.choose(number, {})
        bench.start(number)
        bench.result(number, 1, value)

    again = Bench(Journal(journal.path))
    again.start(3)

    assert again.result(3, 1, 0.8) == TrialScheduler.CONTINUE
    assert len(again.asha._brackets[0]._rungs[-1][1]) == 4


def test_a_generation_is_a_function_of_those_before_it(tmp_path):
    journal = Journal(tmp_path / "sweep.jsonl")
    first = suggest(journal, SPACE, DEFAULT, 0, 8, 0, "max")
    assert first[0] == DEFAULT and len(first) == 8
    assert suggest(journal, SPACE, DEFAULT, 0, 8, 0, "max") == first
    for number, params in enumerate(first):
        journal.choose(number, params)
        journal.end(number, "finished", objective(params))
    second = suggest(journal, SPACE, DEFAULT, 8, 8, 0, "max")
    journal.choose(8, second[0])
    journal.end(8, "finished", objective(second[0]))  # of its own generation: not seen by the others
    assert suggest(journal, SPACE, DEFAULT, 8, 8, 0, "max") == second
    assert len({json.dumps(params) for params in first + second}) == 16
    assert all(SPACE[name].contains(value) for params in second for name, value in params.items())


def test_generations_come_closer_to_the_optimum(tmp_path):
    means = []
    for seed in range(4):
        journal = Journal(tmp_path / f"{seed}.jsonl")
        for start in range(0, 96, 32):
            asked = suggest(journal, SPACE, DEFAULT, start, 32, seed, "max")
            for number, params in enumerate(asked, start=start):
                journal.choose(number, params)
                journal.end(number, "finished", objective(params))
        values = [trial.value for trial in journal.ended()]
        means.append([np.mean(values[1:32]), np.mean(values[64:])])
    first, last = np.array(means).T
    assert (last - first).min() > 0.05


def test_rungs():
    assert rungs(10, 2, 3) == [2, 6]
    assert rungs(10, 1, 3) == [1, 3, 9]
    assert rungs(2, 2, 3) == []


@pytest.mark.parametrize(("mode", "kept"), [("max", {0, 7, 8, 9, 10}), ("min", {0, 1, 2, 3})])
def test_a_rung_keeps_one_in_three_and_the_default(mode, kept):
    values = {number: 0.5 + number / 100 for number in range(11)}
    assert set(range(11)) - set(cut(values, list(range(11)), 3, mode)) == kept


def test_a_rung_judges_by_all_that_ever_reached_it():
    earlier = {number: 0.9 for number in range(10)}
    assert cut(earlier | {10: 0.5, 11: 0.95, 12: float("nan")}, [10, 11, 12], 3, "max") == [10, 12]


def test_a_rung_cuts_below_rays_own_cutoff(tmp_path):
    bench = Bench(Journal(tmp_path / "sweep.jsonl"))
    values = dict(enumerate(np.random.default_rng(0).random(32).tolist()))
    for number, value in values.items():
        bench.journal.choose(number, {})
        bench.start(number)
        bench.result(number, 1, value)
    bracket = bench.asha._brackets[0]
    cutoff = bracket.cutoff(bracket._rungs[-1][1])
    assert cut(values, list(values), 3, "max") == [n for n, value in values.items() if value < cutoff and n]


def test_who_has_come_to_the_last_evaluation_is_not_stopped_there(tmp_path):
    journal = Journal(tmp_path / "sweep.jsonl")
    bench = Bench(journal)  # its rungs are 1, 3 and 9, and 9 is the last evaluation
    for number in range(4):
        journal.choose(number, {})
        bench.start(number)
    decisions = {rung: [bench.result(n, rung, 1 - 0.2 * n) for n in range(4)] for rung in (3, 9, 10)}

    assert decisions[3].count(TrialScheduler.STOP) > 0
    assert decisions[9] == decisions[10] == [TrialScheduler.CONTINUE] * 4
