"""Configs: what they accept, how they print and come back, and the command line that sets them."""

import dataclasses
import hashlib
import json
import math
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from raymed.config import UserError, check_choice, check_range, config_hash, flatten, from_dict, replace, to_dict
from raymed.losses import LOSSES, AsymmetricLoss
from raymed.tasks.classifier import ClassifierRecipe
from raymed.tasks.task import Optim

JOB = Path(__file__).resolve().parents[1] / "jobs" / "train_classifier.py"
RECIPE = replace(
    ClassifierRecipe(),
    {
        "data.classes": ("a", "b"),
        "data.preprocess.window": (40.0, 80.0),
        "losses.asl": AsymmetricLoss(gamma_neg=2.5, clamp=1e-8),
        "supcon.optim.clip": None,
        "supcon.ema_decay": None,
        "head.patience": 3,
    },
)


@pytest.mark.parametrize(
    ("value", "bounds", "message"),
    [
        (-1, {"low": 0}, "x must be >= 0, got -1"),
        (0, {"low": 0, "low_open": True}, "x must be > 0, got 0"),
        (1.5, {"low": 0, "high": 1, "high_open": True}, "x must be >= 0 and < 1, got 1.5"),
        (1.0, {"high": 1, "high_open": True}, "x must be < 1, got 1"),
        (math.nan, {"low": 0}, "x must be >= 0, got nan"),
        (math.nan, {"low": 0, "low_open": True}, "x must be > 0, got nan"),
        (math.nan, {"high": 0, "high_open": True}, "x must be < 0, got nan"),
        (torch.tensor([0.5, -2.0, 3.0]), {"low": 0}, "x must be >= 0, got -2"),
        (torch.tensor([0.5, 3.0]), {"low": 0, "high": 1}, "x must be >= 0 and <= 1, got 3"),
    ],
)
def test_out_of_range(value, bounds, message):
    with pytest.raises(UserError) as error:
        check_range("x", value, **bounds)
    assert str(error.value) == message


def test_in_range():
    check_range("x", 0, 0, 1)
    check_range("x", 1, 0, 1)
    check_range("x", torch.tensor([0.0, 1.0]), 0, 1)
    check_range("x", -5.0, high=0)


def test_choice_names_the_nearest():
    check_choice("method", "asl", ["ce", "asl"])
    with pytest.raises(UserError, match=r"^method must be one of 'ce', 'asl', got 'als' \(did you mean 'asl'\?\)$"):
        check_choice("method", "als", ["ce", "asl"])
    with pytest.raises(UserError, match=r"got 'zzz'$"):
        check_choice("method", "zzz", ["ce", "asl"])


def test_a_recipe_comes_back_from_json_and_from_pickle():
    assert from_dict(ClassifierRecipe, json.loads(json.dumps(to_dict(RECIPE)))) == RECIPE
    assert from_dict(ClassifierRecipe, {}) == ClassifierRecipe()
    assert pickle.loads(pickle.dumps(RECIPE)) == RECIPE  # Ray sends it to workers
    assert to_dict(RECIPE)["data"]["classes"] == ["a", "b"] and to_dict(RECIPE)["supcon"]["ema_decay"] is None


def test_unknown_field_is_refused():
    with pytest.raises(UserError, match="field of Optim must be one of .* got 'learning'"):
        from_dict(Optim, {"learning": 1.0})
    values = to_dict(RECIPE)
    values["head"]["optim"]["wamup"] = 0.1
    with pytest.raises(UserError, match="got 'wamup' .did you mean 'warmup'"):
        from_dict(ClassifierRecipe, values)


def test_replace_by_dotted_name():
    changed = replace(RECIPE, {"losses.asl.gamma_neg": 1.0, "method": "asl"})
    assert (changed.losses.asl.gamma_neg, changed.losses.asl.clamp, changed.method) == (1.0, 1e-8, "asl")
    assert RECIPE.losses.asl.gamma_neg == 2.5 and changed.losses.focal == RECIPE.losses.focal
    with pytest.raises(UserError, match="losses.asl.gama_neg: field of AsymmetricLoss .*did you mean 'gamma_neg'"):
        replace(RECIPE, {"losses.asl.gama_neg": 1.0})
    with pytest.raises(UserError, match="gamma_neg must be >= 0, got -1"):
        replace(RECIPE, {"losses.asl.gamma_neg": -1.0})
    with pytest.raises(UserError, match="method.name: 'supcon_asl' has no fields"):
        replace(RECIPE, {"method.name": 1.0})


def test_every_field_changes_the_hash():
    """Of a number, choice or flag anywhere in the recipe."""
    base = config_hash(RECIPE)
    assert base == config_hash(from_dict(ClassifierRecipe, to_dict(RECIPE))) and len(base) == 64
    numbers = {name: value for name, value in flatten(RECIPE).items() if isinstance(value, int | float)}
    assert len(numbers) > 50
    seen = {base}
    for name, value in numbers.items():
        other = (not value) if isinstance(value, bool) else value * 0.5 if isinstance(value, float) else value + 2
        if other == value:
            other = 0.25
        if name == "data.preprocess.channels":
            other = 3
        seen.add(config_hash(replace(RECIPE, {name: other})))
    assert len(seen) == len(numbers) + 1


def test_hash_leaves_out_what_it_is_told_to():
    other = replace(RECIPE, {"method": "asl"})
    assert config_hash(RECIPE, ["method"]) == config_hash(other, ["method"]) != config_hash(RECIPE)


@dataclasses.dataclass(frozen=True)
class Small:
    """A config whose hash is known."""

    rate: float = 0.1
    names: tuple[str, ...] = ("a", "b")
    inner: AsymmetricLoss | None = None


def test_hash_is_pinned():
    """Another hash would not recognise the runs that are there."""
    expected = hashlib.sha256(b'{"inner": null, "names": ["a", "b"], "rate": 0.1}').hexdigest()
    assert config_hash(Small()) == expected


def test_flatten_names_fields_as_the_command_line_does():
    flat = flatten(RECIPE)
    assert flat["losses.asl.gamma_neg"] == 2.5 and flat["data.classes"] == ["a", "b"] and flat["method"] == "supcon_asl"
    assert flat["supcon.optim.clip"] is None and "losses" not in flat
    assert {f"losses.{name}.{f.name}" for name, loss in LOSSES.items() for f in dataclasses.fields(loss)} <= set(flat)


def test_command_line_sets_any_field():
    tyro = pytest.importorskip("tyro")
    sys.path.insert(0, str(JOB.parent))
    try:
        from train_classifier import TrainClassifier
    finally:
        sys.path.remove(str(JOB.parent))
    config = tyro.cli(
        TrainClassifier,
        default=TrainClassifier(recipe=RECIPE),
        args="--data.positive x --losses.asl.gamma-neg 3 --seeds 1 2 --head.ema-decay 0.9 --head.patience None"
        " --data.classes x y --data.preprocess.window 1 2 --compute.zero-stage 0 --name r".split(),
    )
    wanted = {"data.positive": "x", "losses.asl.gamma_neg": 3.0, "head.ema_decay": 0.9, "head.patience": None}
    wanted |= {"data.classes": ("x", "y"), "data.preprocess.window": (1.0, 2.0)}
    assert config.recipe == replace(RECIPE, wanted)
    assert config.seeds == (1, 2) and config.run.name == "r"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--data.positve x", "--data.positive"),
        ("--losses.asl.gamma-neg -1", "gamma_neg must be >= 0, got -1"),
        ("--losses.asl.clip 1.5", "clip must be >= 0 and < 1, got 1.5"),
        ("--method supcon_als", "(did you mean 'supcon_asl'?)"),
        ("--head.steps 5.5", "5.5"),
        ("--head.ema-decay 2", "ema_decay must be >= 0 and < 1, got 2"),
    ],
)
def test_bad_command_line_ends_with_one_message(arguments, message, capfd, monkeypatch):
    """Through the job's own main: exit code 2, the message on stderr, no traceback, nothing begun."""
    import runpy

    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(sys, "argv", [str(JOB), *arguments.split()])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(JOB), run_name="__main__")
    out, err = capfd.readouterr()
    assert end.value.code == 2 and out == ""
    assert message in err and "Traceback" not in err


def test_a_job_is_a_process_that_exits_with_2():
    job = subprocess.run([sys.executable, str(JOB), "--losses.asl.clip", "1.5"], capture_output=True, text=True)
    assert job.returncode == 2 and job.stdout == ""
    assert "clip must be >= 0 and < 1, got 1.5" in job.stderr and "Traceback" not in job.stderr
