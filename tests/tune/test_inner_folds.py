"""Folds inside a fold: they divide what it does not hold out, by patient, and nothing else."""

import numpy as np
import pytest

from raymed.config import UserError
from raymed.data.folds import CrossValidation, RepeatedFold
from raymed.tune.nested import InnerFold

CV = CrossValidation(3, 2)
PATIENTS = np.repeat(np.arange(48), 2)
GROUPS = [f"p{number}" for number in PATIENTS]
LABELS = np.where(PATIENTS % 4 == 0, "ill", "well").tolist()


@pytest.mark.parametrize(("repeat", "fold"), [(0, 0), (0, 2), (1, 1)])
def test_inner_folds_divide_what_the_outer_one_leaves(repeat, fold):
    train, val, held_out = RepeatedFold(CV, repeat, fold).parts(LABELS, GROUPS, "ill")
    inner = [InnerFold(CV, repeat, fold, k, 3).parts(LABELS, GROUPS, "ill") for k in range(3)]
    validated = np.concatenate([of_val for _, of_val, _ in inner])
    assert sorted(validated) == sorted([*train, *val])  # each once
    for of_train, of_val, of_test in inner:
        assert np.array_equal(of_test, held_out)
        parts = [set(PATIENTS[indices]) for indices in (of_train, of_val, of_test)]
        assert not (parts[0] & parts[1] or parts[0] & parts[2] or parts[1] & parts[2])
        assert len(set().union(*parts)) == 48
        assert np.mean([LABELS[i] == "ill" for i in of_val]) == pytest.approx(0.25, abs=0.1)


def test_inner_folds_of_other_repeats_and_folds_are_dealt_anew():
    def validated(repeat: int, fold: int) -> set[int]:
        return set(InnerFold(CV, repeat, fold, 0, 2).parts(LABELS, GROUPS, "ill")[1].tolist())

    assert validated(0, 0) == validated(0, 0)
    assert validated(0, 0) != validated(1, 0) and validated(0, 0) != validated(0, 1)
    assert InnerFold(CV, 1, 2, 0, 3).name == "repeat-1-fold-2-inner-0"


def test_too_many_inner_folds_are_refused():
    with pytest.raises(
        UserError, match="repeat-0-fold-0-inner-8 lacks a class in val: use fewer folds, or fewer inner"
    ):
        InnerFold(CV, 0, 0, 8, 9).parts(LABELS, GROUPS, "ill")
