"""The sweep's journal survives a kill at any byte."""

import json

import pytest

from raymed.tune.journal import Journal


@pytest.fixture
def path(tmp_path):
    """A journal with a finished, a stopped, a failed and a running trial."""
    journal = Journal(tmp_path / "run" / "sweep.jsonl")
    for number in range(4):
        journal.choose(number, {"gamma_neg": float(number), "alpha": None})
        journal.reach(number, 1, 0.5 + number / 10)
    journal.reach(0, 2, 0.9)
    journal.end(0, "finished", 0.91)
    journal.end(1, "stopped", 0.6)
    journal.end(2, "failed", None)
    return journal.path


def test_what_was_written_is_read_again(path):
    journal = Journal(path)

    assert journal.unfinished() == [3]
    assert [(t.number, t.value) for t in journal.ended()] == [(0, 0.91), (1, 0.6)]
    assert journal.trials[0].rungs == {1: 0.5, 2: 0.9}
    assert journal.trials[3].params == {"gamma_neg": 3.0, "alpha": None}


def test_a_journal_cut_at_any_byte_is_read_up_to_its_last_whole_line_and_goes_on(path):
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])

        journal = Journal(path)
        complete = whole[: whole.rfind(b"\n", 0, length) + 1]
        assert path.read_bytes() == complete

        journal.choose(99, {"gamma_neg": 1.0})
        lines = path.read_bytes().splitlines()
        assert [json.loads(line) for line in lines[:-1]] == [json.loads(line) for line in complete.splitlines()]
        assert Journal(path).trials == journal.trials


def test_an_evaluation_that_is_repeated_after_a_restart_stands_once(path):
    before = path.read_bytes()

    Journal(path).reach(3, 1, 0.123)

    assert path.read_bytes() == before
    assert Journal(path).trials[3].rungs == {1: 0.8}


@pytest.mark.parametrize(("mode", "best"), [("max", 5), ("min", 4)])
def test_the_best_trial_is_a_finished_one(path, mode, best):
    journal = Journal(path)
    ends = [("finished", 0.2), ("finished", 0.95), ("stopped", 0.99), ("stopped", 0.1)]
    for number, (status, value) in enumerate(ends, start=4):
        journal.choose(number, {})
        journal.end(number, status, value)

    assert journal.best(mode).number == best


def test_without_a_finished_trial_there_is_no_best_one(tmp_path):
    assert Journal(tmp_path / "sweep.jsonl").best("max") is None
