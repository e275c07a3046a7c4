"""What a run's config and a clinical evaluation give a publication pack."""

import dataclasses
import json

import clinical_example
import numpy as np
import pytest

from raymed.config import to_dict, to_json
from raymed.report.paper import PaperRecord, config_facts, evaluation_facts
from raymed.report.paper.methods import methods
from raymed.report.paper.tables import tables_of
from raymed.tasks.classifier import ClassifierRecipe


def facts(**changes):
    recipe = dataclasses.replace(ClassifierRecipe(), **changes)
    return config_facts(json.loads(to_json({"recipe": recipe, "seeds": [7, 8]})))


def test_two_phases_of_a_config():
    recipe = ClassifierRecipe()
    training = facts(method="supcon_asl")["training"]
    contrastive, head = training.phases
    assert (contrastive.name, contrastive.loss) == ("supcon", "supervised contrastive loss")
    assert contrastive.settings["temperature"] == recipe.supcon.loss.temperature
    assert contrastive.steps == recipe.supcon.steps and contrastive.learning_rate == recipe.supcon.optim.lr
    assert contrastive.ema_decay == recipe.supcon.ema_decay and contrastive.frozen is None
    assert (head.loss, head.frozen, head.steps) == ("asymmetric loss", "encoder", recipe.head.steps)
    assert head.settings["gamma_neg"] == recipe.losses.asl.gamma_neg
    assert not any(isinstance(value, bool) for value in head.settings.values())
    assert training.augmentation == to_dict(recipe.augment) and training.seeds == (7, 8)


def test_one_phase_of_a_config():
    (phase,) = facts(method="focal")["training"].phases
    assert (phase.name, phase.loss, phase.balanced) == ("single", "focal loss", ClassifierRecipe().single.balanced)
    assert (phase.optimiser, phase.schedule) == ("AdamW", "one_cycle")


def test_weights_are_told_without_their_folder():
    def weights(value):
        model = dataclasses.replace(ClassifierRecipe().model, backbone="efficientnet_b0", weights=value)
        return facts(model=model)["model"].weights

    assert weights("none") == "none" and "timm" in weights("pretrained")
    assert weights("/home/kim/w.safetensors") == "the file w.safetensors"


def test_a_config_without_its_fields_gives_blanks():
    text = methods(PaperRecord(**config_facts({})), "en")
    assert "[TO FILL: architecture]" in text and "[TO FILL: random seeds]" in text


@pytest.fixture(scope="module")
def found():
    return clinical_example.record(n_boot=20, num_cards=1)


def test_evaluation_counts_and_curves(found):
    from sklearn.metrics import average_precision_score, roc_auc_score

    given = evaluation_facts(found)
    case = found.levels[0]
    c = given["confusion"]
    assert (c.tp + c.fn, c.tp + c.fp + c.fn + c.tn) == (case.num_positive, len(case.scores))
    assert c.tp == np.sum((case.scores >= case.threshold) & (case.targets == 1))
    assert c.tp / (c.tp + c.fn) == pytest.approx(given["performance"]["Case"]["sensitivity"]["mean"])
    roc, pr = given["curves"].roc["Case"], given["curves"].precision_recall["Case"]
    assert np.trapezoid(roc.y, roc.x) == pytest.approx(roc_auc_score(case.targets, case.scores))
    assert np.trapezoid(pr.y, pr.x) == pytest.approx(average_precision_score(case.targets, case.scores))
    steps = np.unique(pr.x, return_counts=True)[1]
    assert pr.x[0] == 0 and steps.max() == 2 and len(pr.x) == 2 * case.num_positive  # no line down and up again
    assert given["curves"].decision["Treat none"].y == (0.0,) * len(found.decision["thresholds"])
    assert len(given["curves"].calibration["After"].x) == len(found.calibration["after"].bins)


def test_intervals_are_never_narrower_than_either(found):
    """Several cases a patient: the wider of both."""
    told = evaluation_facts(found)["performance"]["Case"]
    for metric in ("sensitivity", "specificity", "ppv", "npv", "lr_positive"):
        figure = found.levels[0].figures[metric]
        assert told[metric]["ci_low"] == min(figure["ci_low"], figure["analytic_low"])
        assert told[metric]["ci_high"] == max(figure["ci_high"], figure["analytic_high"])
    assert told["auroc"] == found.levels[0].figures["auroc"]


def test_readers_intervals_are_those_of_decisions(found):
    """A reader who was always right of few cases: the bootstrap's interval has no width, Wilson's has."""
    told = evaluation_facts(found)["readers"]
    assert set(told) == set(found.readers)
    for reader, figures in told.items():
        for metric in ("sensitivity", "specificity"):
            figure = found.readers[reader]["reference"][metric]
            assert figures[metric]["ci_low"] == min(figure["ci_low"], figure["analytic_low"])
            assert figures[metric]["ci_high"] == max(figure["ci_high"], figure["analytic_high"])


def test_one_unit_a_patient_has_the_analytic_interval(found):
    level = dataclasses.replace(found.levels[0], num_patients=len(found.levels[0].scores))
    told = evaluation_facts(dataclasses.replace(found, levels=[level]))["performance"]["Case"]
    figure = level.figures["sensitivity"]
    assert (told["sensitivity"]["ci_low"], told["sensitivity"]["ci_high"]) == (
        figure["analytic_low"],
        figure["analytic_high"],
    )


def test_too_few_stays_too_few(found):
    groups = {(g.attribute, g.value): g for g in evaluation_facts(found)["subgroups"]}
    for group in found.subgroups:
        assert bool(groups[group["attribute"], group["group"]].figures) == (not group["too_few"])


def test_an_evaluation_makes_all_its_tables(found):
    names = {table.name for table in tables_of(PaperRecord(**evaluation_facts(found)))}
    assert names == {"table_performance", "table_confusion", "table_subgroups", "table_readers", "table_agreement"}
