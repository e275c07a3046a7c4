"""The last words of a job: its commands work as they are printed."""

import json
import shlex

import pytest

from raymed.config import to_dict
from raymed.registry.config import RegisterConfig, is_stated
from raymed.registry.next_steps import tell_next_steps
from raymed.registry.register import register


@pytest.fixture
def told(folder, place, tmp_path, capsys):
    """told(**fields of the config) -> what a job says that has registered the bundle."""

    def tell(storage=None, tracking=None, **fields):
        config = RegisterConfig(**fields)
        registered = register(folder, config, "m", **place)
        summary = tmp_path / "summary.json"
        summary.write_text(json.dumps({"registered": registered and to_dict(registered)}))
        tell_next_steps(summary, config, storage, tracking)
        return capsys.readouterr().out

    return tell


def promoting(out: str) -> list[str]:
    line = next(line for line in out.splitlines() if "promote_model.py" in line)
    return shlex.split(line)[2:]


def test_a_candidate_is_put_into_use_by_the_command(told, command, client):
    out = told(name="the m")
    assert "\nregistered: the m version 1, candidate\n" in out
    code, _, error = command(promoting(out))
    assert code == 2 and "a champion needs an intended use: say on whom" in error
    code, out, _ = command([word.replace("...", "triage") for word in promoting(out)])
    assert code == 0 and out.startswith("champion: the m version 1")
    assert told(name="the m", intended_use="triage").count("python jobs/") == 1


def test_a_stated_use_stands_in_the_command(told, client):
    told(name="m", intended_use="triage")
    client.delete_registered_model_alias("m", "champion")
    client.set_registered_model_alias("m", "candidate", "1")
    client.create_model_version("m", "/elsewhere", tags={})
    client.set_registered_model_alias("m", "champion", "2")
    out = told(name="m", intended_use="triage of Ann's")
    of_one = ["--model", "m", "--version", "1", "--intended-use", "triage of Ann's"]
    assert promoting(out) == [*of_one, "--gate.manifest", "TEST.csv"]
    assert "where it is no worse than version 2 on images that neither has seen:\n" in out


def test_what_is_champion_at_once_is_only_served(told):
    out = told("s3://a/b c", "http://mlflow", name="m", intended_use="triage")
    assert out == (
        "\nregistered: m version 1, champion\nserve it on this machine, at http://127.0.0.1:8000/:\n"
        "    python jobs/serve_models.py --access.open --storage 's3://a/b c' --tracking http://mlflow\n"
    )


def test_nothing_is_said_of_what_is_not_registered(told):
    assert told(register=False) == ""


@pytest.mark.parametrize(("text", "stated"), [("triage.", True), ("...", False), (" ", False), ("Not stated.", False)])
def test_dots_say_nothing(text, stated):
    assert is_stated(text) is stated
