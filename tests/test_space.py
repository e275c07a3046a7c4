"""Dimensions, their reading from text, and Optuna drawing from them."""

import optuna
import pytest

from raymed.config import UserError
from raymed.space import Choice, Float, Int, parse

optuna.logging.set_verbosity(optuna.logging.WARNING)


@pytest.mark.parametrize(
    ("text", "dimension"),
    [
        ("0..8", Float(0, 8)),
        ("-1.5..2", Float(-1.5, 2)),
        ("1e-4..1e-1:log", Float(1e-4, 1e-1, log=True)),
        ("1..5:int", Int(1, 5)),
        ("int 1..5", Int(1, 5)),
        ("1..64:int:log", Int(1, 64, log=True)),
        ("int 1..64:log", Int(1, 64, log=True)),
        (".5...75", Float(0.5, 0.75)),
        ("none|0.25|0.5", Choice((None, 0.25, 0.5))),
        ("2|4 | 8", Choice((2, 4, 8))),
        ("adamw|sgd", Choice(("adamw", "sgd"))),
        ("true|False", Choice((True, False))),
    ],
)
def test_parse(text, dimension):
    parsed = parse(text)
    assert parsed == dimension and type(parsed) is type(dimension)
    if isinstance(parsed, Choice):
        assert [type(option) for option in parsed.options] == [type(option) for option in dimension.options]


@pytest.mark.parametrize("text", ["", "8", "0..", "a..b", "0.5..2:int", "0..8:lin", "a||b", "0-8", "0..8:log:x"])
def test_unreadable_text_names_itself_and_the_forms(text):
    with pytest.raises(UserError) as error:
        parse(text)
    message = str(error.value)
    assert repr(text) in message
    assert all(form in message for form in ("0..8", "1e-4..1e-1:log", "1..5:int", "none|0.25|0.5"))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("8..0", "low must be below high"),
        ("0..inf", "finite"),
        ("0..1:log", "a logarithmic range needs low > 0, got 0"),
        ("a|a", "must differ"),
    ],
)
def test_impossible_ranges_say_why(text, reason):
    with pytest.raises(UserError, match=reason) as error:
        parse(text)
    assert repr(text) in str(error.value)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Float(1, 1),
        lambda: Float(float("nan"), 1),
        lambda: Float(-1, 1, log=True),
        lambda: Int(0.5, 3),
        lambda: Int(3, 1),
        lambda: Choice(()),
        lambda: Choice("abc"),
        lambda: Choice((1, 1.0)),
    ],
)
def test_bad_dimensions_fail_at_construction(make):
    with pytest.raises(UserError):
        make()


def test_contains():
    assert Float(0, 1).contains(0) and Float(0, 1).contains(1.0) and not Float(0, 1).contains(1.01)
    assert not Float(0, 1).contains(None) and not Float(0, 1).contains(True) and not Float(0, 1).contains("0.5")
    assert Int(1, 5).contains(5) and not Int(1, 5).contains(2.5) and not Int(1, 5).contains(0)
    assert Choice((None, 0.25)).contains(None) and not Choice((None, 0.25)).contains(0.5)


@pytest.mark.parametrize(
    "dimension", [Float(0, 5), Float(1e-4, 1e-1, log=True), Int(1, 64, log=True), Choice((None, "a", 2))]
)
def test_optuna_draws_inside(dimension):
    """Both ways into Optuna see the same distribution, and every draw lies inside; a log range reaches all decades."""
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    asked = [study.ask({"x": dimension.distribution()}).params["x"] for _ in range(100)]
    assert all(dimension.contains(value) for value in asked)
    trial = study.ask()
    assert dimension.contains(dimension.suggest(trial, "x"))
    assert trial.distributions["x"] == dimension.distribution()
    if isinstance(dimension, Choice):
        assert set(asked) == set(dimension.options)
    elif isinstance(dimension, Float) and dimension.log:
        assert sum(value < 1e-2 for value in asked) == pytest.approx(67, abs=12)
