"""A contest of losses: what is searched for each, and what is refused before anything is trained."""

import pytest

from raymed.config import UserError, replace
from raymed.losses import PAIR_LOSSES
from raymed.space import Float
from raymed.tasks.clip import ClipRecipe
from raymed.tune.config import FinalSeeds, SweepConfig, search_space
from raymed.tune.contest import check_contest, sweep_of

SWEEP = SweepConfig(num_trials=4, metric="mean_recall")
COMPARED = ("info_nce", "dhn_nce")


def space(method: str, *added: str):
    recipe = replace(ClipRecipe(), {"method": method})
    sweep = SweepConfig(metric="mean_recall", space=added)
    return search_space(recipe, sweep_of(sweep, method, COMPARED))


def test_every_loss_brings_its_own_space_and_the_learning_rate():
    assert set(space("info_nce")) == {"losses.info_nce.temperature", "stage.optim.lr"}
    own = {f"losses.dhn_nce.{name}" for name in PAIR_LOSSES["dhn_nce"].space}
    assert set(space("dhn_nce")) == own | {"stage.optim.lr"}
    assert {"losses.dhn_nce.temperature", "losses.dhn_nce.beta1", "losses.dhn_nce.beta2"} <= own


def test_a_dimension_of_one_loss_is_added_to_that_loss_alone():
    added = ("losses.dhn_nce.beta1=0.1..0.2", "stage.optim.lr=1e-4..1e-3:log")

    assert set(space("info_nce", *added)) == {"losses.info_nce.temperature", "stage.optim.lr"}
    assert space("dhn_nce", *added)["losses.dhn_nce.beta1"] == Float(0.1, 0.2)
    assert all(space(method, *added)["stage.optim.lr"] == Float(1e-4, 1e-3, log=True) for method in COMPARED)


@pytest.mark.parametrize(
    ("compared", "sweep", "seeds", "finals", "said"),
    [
        (("dhn_nce",), SWEEP, (1,), FinalSeeds(), "compared must be two different losses or more"),
        (("dcl", "dcl"), SWEEP, (1,), FinalSeeds(), "compared must be two different losses or more"),
        (("dcl", "dhn_ncee"), SWEEP, (1,), FinalSeeds(), "did you mean 'dhn_nce'?"),
        (COMPARED, SweepConfig(), (1,), FinalSeeds(), "sweep.metric must be one of"),
        (COMPARED, SWEEP, (3001,), FinalSeeds(), "finals.seeds must not be seeds of the search"),
        (
            COMPARED,
            SweepConfig(metric="mean_recall", space=("losses.dcl.temperature=0.1..0.2",)),
            (1,),
            FinalSeeds(),
            "losses.dcl.temperature changes nothing",
        ),
    ],
)
def test_a_contest_that_cannot_be_is_refused(compared, sweep, seeds, finals, said):
    with pytest.raises(UserError) as error:
        check_contest(ClipRecipe(), compared, sweep, seeds, finals)
    assert said in str(error.value)


def test_the_contest_of_the_job_can_be():
    check_contest(ClipRecipe(), COMPARED, SWEEP, (1,), FinalSeeds())
