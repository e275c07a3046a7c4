"""Champion, rollback, what is refused, and the record that is left. The job runs as users run it."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from raymed.bundle import Bundle
from raymed.config import UserError
from raymed.registry.audit import Audit
from raymed.registry.card import write_card
from raymed.registry.promote import promote, promotions, roll_back
from raymed.registry.register import IDENTITY, add, identity
from raymed.registry.store import fetch_bundle, version_of


@pytest.fixture
def registered(bundle, client, tmp_path):
    """Versions 1 and 2 of the model m, the second the candidate."""
    for number in (1, 2):
        folder = replace(bundle, operating_point={"threshold": number / 4}).save(tmp_path / f"bundle{number}")
        write_card(folder, "m")
        add(client, folder, "m")
    return client


def aliases(client):
    return client.get_registered_model("m").aliases


def test_champion_and_back(registered, command):
    code, out, _ = command(["--model", "m", "--version", "1", "--intended-use", "triage"])
    assert code == 0 and out.startswith("champion: m version 1 (was none)\n    golden inputs: passed")
    assert aliases(registered) == {"candidate": 2, "champion": 1}
    code, out, _ = command(["--model", "m", "--intended-use", "triage of HSG", "--by", "the board", "--why", "better"])
    assert code == 0 and out.startswith("champion: m version 2 (was 1)\n") and "not compared" in out
    assert aliases(registered) == {"candidate": 2, "champion": 2, "rollback": 1}
    code, out, _ = command(["--model", "m", "--rollback", "--why", "worse"])
    assert (code, out) == (0, "champion: m version 1 (was 2)\n")
    assert aliases(registered) == {"candidate": 2, "champion": 1}
    code, _, error = command(["--model", "m", "--rollback"])
    assert code == 2 and "no version with the alias rollback" in error
    code, out, _ = command(["--model", "m", "--verify"])
    assert code == 0 and out.startswith("3 recorded decisions, each as it was written")


def test_the_record_is_only_added_to(registered):
    versions = {number: version_of(registered, "m", number) for number in (1, 2)}
    promote(registered, versions[1], "triage")
    promote(registered, versions[2], "triage of HSG", by="the board", why="better")
    before = promotions(registered, "m")
    roll_back(registered, "m", why="worse")
    records = promotions(registered, "m")
    assert records[:2] == before
    moves = [(r["number"], r["action"], r["from_version"], r["to_version"], r["by"], r["why"]) for r in records]
    assert moves == [
        (1, "promote", None, 1, "not stated", "not stated"),
        (2, "promote", 1, 2, "the board", "better"),
        (3, "roll back", 2, 1, "not stated", "worse"),
    ]
    assert [r["intended_use"] for r in records] == ["triage", "triage of HSG", "triage"]
    assert records[1]["figures"]["from"]["test"]["auroc"] == records[1]["figures"]["to"]["test"]["auroc"] > 0.5
    assert all(r["time"].endswith("+00:00") for r in records)
    run_id = versions[1].run_id
    file = registered.download_artifacts(run_id, "registry/m/promotions.jsonl")
    assert [json.loads(line) for line in Path(file).read_text().splitlines()] == records


def test_the_card_says_what_it_is_for(registered, tmp_path):
    version = version_of(registered, "m", 2)
    assert "Nobody has said yet" in version.description
    promote(registered, version, "triage of HSG")
    assert "triage of HSG" in version_of(registered, "m", 2).description
    folder = fetch_bundle(registered, "models:/m@champion", tmp_path / "fetched")
    assert Bundle.load(folder).intended_use == "triage of HSG"
    assert "triage of HSG" in (folder / "card.md").read_text()
    assert json.loads((folder / "metadata.json").read_text())["intended_use"] == "triage of HSG"


def test_promoting_the_champion_again_keeps_the_rollback(registered):
    for number in (1, 2, 2):
        promote(registered, version_of(registered, "m", number), "triage")
    assert aliases(registered) == {"candidate": 2, "champion": 2, "rollback": 1}


def test_a_challenger_that_wins_is_no_challenger_any_more(registered, command):
    for flags in (["--version", "1"], ["--to", "challenger", "--version", "2"]):
        assert command(["--model", "m", "--intended-use", "triage", *flags])[0] == 0
    assert aliases(registered) == {"candidate": 2, "champion": 1, "challenger": 2}
    code, out, _ = command(["--model", "m", "--withdraw", "--why", "slow"])
    assert (code, out) == (0, "challenger: none (was m version 2)\n")
    command(["--model", "m", "--to", "challenger"])
    command(["--model", "m"])
    assert aliases(registered) == {"candidate": 2, "champion": 2, "rollback": 1}


def test_stating_a_use_leaves_what_was_registered(registered, tmp_path):
    before = fetch_bundle(registered, "models:/m/1", tmp_path / "before")
    weights = (before / "model.safetensors").read_bytes()
    promote(registered, version_of(registered, "m", 1), "triage of HSG")
    version = version_of(registered, "m", 1)
    after = fetch_bundle(registered, "models:/m/1", tmp_path / "after")
    assert identity(after) == identity(before) == version.tags[IDENTITY]
    assert (after / "model.safetensors").read_bytes() == weights
    assert Bundle.load(after).intended_use == "triage of HSG"


def test_a_stated_use_need_not_be_said_twice(registered):
    promote(registered, version_of(registered, "m", 1), "triage")
    promote(registered, version_of(registered, "m", 2), "triage")
    assert promote(registered, version_of(registered, "m", 1), "not stated")["intended_use"] == "triage"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model", "m"], "needs an intended use"),
        (["--model", "m", "--intended-use", " Not stated "], "needs an intended use"),
        (["--model", "n", "--intended-use", "x"], "no registered model 'n': there are m"),
        (["--model", "m", "--version", "7", "--intended-use", "x"], "m has no version 7: it has 1, 2"),
        (["--model", "m", "--rollback"], "no version with the alias rollback"),
        (["--model", "m", "--rollback", "--version", "1"], "leave out version"),
        (["--model", "m", "--rollback", "--withdraw"], "others of its kind"),
        (["--model", "m", "--withdraw"], "no version with the alias challenger"),
        (["--model", "m", "--to", "challenger"], "needs an intended use"),
        (["--model", "m", "--intended-use", "x", "--force"], "say why"),
        (["--model", "m", "--bundle", "/nowhere"], "there is no /nowhere"),
        (["--model", "a/b", "--bundle", "/nowhere"], "must begin with a letter"),
    ],
)
def test_refusals_change_nothing(flags, message, registered, command, place):
    code, _, error = command(flags)
    assert code == 2 and message in " ".join(error.split())
    assert aliases(registered) == {"candidate": 2} and promotions(registered, "m") == []
    assert Audit(place["storage"]).entries() == []


def test_a_server_that_does_not_answer(command):
    code, _, error = command(["--model", "m", "--tracking", "http://127.0.0.1:9", "--intended-use", "x"])
    assert code == 2 and "MLflow does not answer" in error


def test_a_bundle_is_registered_later(registered, command, bundle, tmp_path):
    folder = str(replace(bundle, operating_point={"threshold": 0.9}).save(tmp_path / "later"))
    code, out, _ = command(["--model", "m", "--bundle", folder, "--to", "candidate"])
    assert (code, out) == (0, "candidate: m version 3\n")
    code, out, _ = command(["--model", "m", "--to", "candidate", "--version", "2"])
    assert (code, out) == (0, "candidate: m version 2\n")
    assert aliases(registered) == {"candidate": 2}


@pytest.mark.parametrize("uri", ["models:/m", "m@champion", "runs:/1/model", "models:/m@champion", "models:/m/9"])
def test_fetching_what_is_not_there(uri, registered, tmp_path):
    with pytest.raises(UserError, match="is named models:/NAME@ALIAS|no version"):
        fetch_bundle(registered, uri, tmp_path / "fetched")


def test_a_registered_model_is_exported(registered, command, tmp_path):
    flags = ["--model", "models:/m@candidate", "--format", "torch", "--to", str(tmp_path / "out")]
    code, out, _ = command(flags, "export_model", "ExportModel", "write")
    assert code == 0 and f"exported: {tmp_path / 'out.pt2'}" in out
    assert (tmp_path / "out.pt2").is_file() and (tmp_path / "out.pt2.json").is_file()
    code, _, error = command(["--format", "onnx"], "export_model", "ExportModel", "write")
    assert code == 2 and "either --bundle FOLDER or --model" in error
