"""The search space of a sweep: the loss's own and what the user adds, checked before anything is trained."""

import pytest

from raymed.config import UserError, replace
from raymed.losses import LOSSES
from raymed.space import Choice, Float
from raymed.tasks.classifier import ClassifierRecipe
from raymed.tune.config import Finals, SweepConfig, check_sweep, search_space

RECIPE = ClassifierRecipe(method="supcon_asl")


def test_the_loss_brings_its_space():
    space = search_space(RECIPE, SweepConfig())

    assert space == {f"losses.asl.{name}": dimension for name, dimension in LOSSES["asl"].space.items()}
    assert {"losses.asl.gamma_neg", "losses.asl.gamma_pos", "losses.asl.clip"} <= set(space)


def test_the_user_adds_to_it_and_narrows_it():
    added = ("head.optim.lr=1e-3..1e-1:log", "losses.asl.clip=0|0.05")

    space = search_space(RECIPE, SweepConfig(space=added))

    assert space["head.optim.lr"] == Float(1e-3, 1e-1, log=True)
    assert space["losses.asl.clip"] == Choice((0, 0.05))
    assert len(space) == len(LOSSES["asl"].space) + 1


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ("head.optim.rl=1e-3..1e-1", "no field 'head.optim.rl' (did you mean 'head.optim.lr'?)"),
        ("losses.asl.gamma_neg=-1..4", "gamma_neg must be >= 0, got -1"),
        ("losses.asl.clip=0|1.5", "clip must be"),
        ("losses.asl.gamma_neg=4..1", "low must be below high"),
        ("losses.asl.gamma_neg=0-4", "cannot read the search range '0-4': expected 0..8"),
        ("supcon.loss.temperature=0.05..0.5", "supcon.loss.temperature changes nothing in a trial of supcon_asl"),
        ("losses.focal.gamma=0..5", "losses.focal.gamma changes nothing"),
    ],
)
def test_a_dimension_that_cannot_be_swept_is_refused(entry, said):
    with pytest.raises(UserError) as error:
        search_space(RECIPE, SweepConfig(space=(entry,)))
    assert said in str(error.value)


def test_one_stage_methods_sweep_the_encoder_too():
    space = search_space(replace(RECIPE, {"method": "asl"}), SweepConfig(space=("augment.rotate=0..20",)))

    assert space["augment.rotate"] == Float(0, 20)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"space": ("head.optim.lr",)}, "sweep.space must be NAME=RANGE"),
        ({"num_trials": 0}, "sweep.num_trials must be >= 1"),
        ({"at_once": 0}, "sweep.at_once must be >= 1"),
        ({"reduction": 1}, "sweep.reduction must be >= 2"),
    ],
)
def test_a_sweep_config_that_cannot_be_fails_when_it_is_made(changes, said):
    with pytest.raises(UserError) as error:
        SweepConfig(**changes)
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("seeds", "finals", "sweep", "said"),
    [
        ((1, 2), Finals(seeds=(2, 3)), SweepConfig(), "finals.seeds must not be seeds of the search, got [2] in both"),
        ((1, 1), Finals(), SweepConfig(), "seeds must be different"),
        ((1,), Finals(), SweepConfig(space=("head.optim.name=adamw|sgd",)), "add --sweep.no-batched"),
        ((1,), Finals(), SweepConfig(grace=99), "sweep.grace must be >= 1 and <= 10, got 99"),
        ((1,), Finals(), SweepConfig(metric="auprcc"), "did you mean 'auprc'?"),
        ((1,), Finals(), SweepConfig(metric="mean_recall"), "sweep.metric must be one of 'auroc'"),
    ],
)
def test_a_sweep_that_cannot_be_is_refused_before_it_starts(seeds, finals, sweep, said):
    with pytest.raises(UserError) as error:
        check_sweep(RECIPE, sweep, seeds, finals)
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Finals(seeds=(5, 5)), "finals.seeds must be different seeds"),
        (lambda: Finals(seeds=()), "finals.seeds must be different seeds, at least one"),
        (lambda: Finals(finalists=0), "finals.finalists must be >= 1"),
    ],
)
def test_finals_that_cannot_be(make, said):
    with pytest.raises(UserError) as error:
        make()
    assert said in str(error.value)
