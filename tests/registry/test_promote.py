"""Champion, rollback, what is refused, and the record that is left. The job runs as users run it."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from mlflow.exceptions import MlflowException

from raymed.bundle import Bundle
from raymed.config import UserError
from raymed.registry import RegisterConfig, register
from raymed.registry.audit import Audit
from raymed.registry.card import write_card
from raymed.registry.decisions import INTENDED_USE
from raymed.registry.gates import Gate
from raymed.registry.promote import anchors, is_released, promote, promotions, release, restrict, roll_back
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


def test_champion_and_back(registered, command, place):
    code, out, _ = command(["--model", "m", "--version", "1", "--intended-use", "triage"])
    assert code == 0 and out.startswith("champion: m version 1 (was none)\n    golden inputs: passed")
    assert aliases(registered) == {"candidate": 2, "champion": 1}
    second = ["--model", "m", "--intended-use", "triage of HSG", "--by", "the board", "--why", "better"]
    code, out, error = command(second)
    assert code == 2 and "m version 2 does not become champion" in error and '--force --why "..."' in error
    assert "comparison: not looked at (not compared: no images were named (--gate.manifest))" in error
    assert aliases(registered) == {"candidate": 2, "champion": 1}
    code, out, _ = command([*second, "--force"])
    assert code == 0 and out.startswith("champion: m version 2 (was 1)\n") and "not compared" in out
    assert Audit(place["storage"]).entries("m")[-1]["forced"]
    assert aliases(registered) == {"candidate": 2, "champion": 2, "rollback": 1}
    code, out, _ = command(["--model", "m", "--rollback", "--why", "worse"])
    assert (code, out) == (0, "champion: m version 1 (was 2)\n")
    assert aliases(registered) == {"candidate": 2, "champion": 1}
    code, _, error = command(["--model", "m", "--rollback"])
    assert code == 2 and "no version with the alias rollback" in error
    code, out, _ = command(["--model", "m", "--verify"])
    assert code == 0 and out.startswith("4 recorded decisions, each as it was written")


def test_the_champion_is_promoted_again_without_force(registered, command, place):
    of_one = ["--model", "m", "--version", "1", "--intended-use"]
    assert command([*of_one, "triage"])[0] == 0
    code, out, _ = command([*of_one, "screening"])
    assert code == 0 and "there is no other champion" in out
    assert [entry["forced"] for entry in Audit(place["storage"]).entries("m")] == [False, False]


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
        assert command(["--model", "m", "--intended-use", "triage", "--gate.slower", "50", *flags])[0] == 0
    assert aliases(registered) == {"candidate": 2, "champion": 1, "challenger": 2}
    code, out, _ = command(["--model", "m", "--withdraw", "--why", "slow"])
    assert (code, out) == (0, "challenger: none (was m version 2)\n")
    command(["--model", "m", "--to", "challenger", "--gate.slower", "50"])
    command(["--model", "m", "--force", "--why", "no false alarm in a month"])
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


@pytest.mark.parametrize("flags", [[], ["--to", "challenger"], ["--force", "--why", "better"]])
def test_a_champion_that_came_during_the_comparison_is_not_replaced(registered, command, monkeypatch, flags):
    assert command(["--model", "m", "--version", "1", "--intended-use", "triage"])[0] == 0

    def meanwhile(*args):
        registered.set_registered_model_alias("m", "champion", "2")
        return []

    monkeypatch.setattr("raymed.results.gates._gates", meanwhile)
    code, _, error = command(["--model", "m", "--version", "2", "--intended-use", "triage", *flags])
    assert code == 2 and "compare again" in error
    assert "version 2 of m is champion now, and version 1 was when it was compared" in " ".join(error.split())
    assert aliases(registered) == {"candidate": 2, "champion": 2}


def test_a_refusal_names_the_champion_that_it_was_about(registered, command, monkeypatch, place):
    assert command(["--model", "m", "--version", "1", "--intended-use", "triage"])[0] == 0

    def meanwhile(*args):
        registered.set_registered_model_alias("m", "champion", "2")
        return [Gate("AUROC", False, "worse")]

    monkeypatch.setattr("raymed.results.gates._gates", meanwhile)
    code, _, error = command(["--model", "m", "--version", "2", "--intended-use", "triage"])
    assert code == 2 and "AUROC: not passed" in error
    last = Audit(place["storage"]).entries("m")[-1]
    assert (last["action"], last["from_version"], last["to_version"]) == ("refuse", 1, 2)


def test_a_version_is_released_for_its_use_and_restricted_again(registered, command, place, tmp_path):
    def card():
        folder = fetch_bundle(registered, "models:/m/1", tmp_path / "fetched")
        assert identity(folder) == version_of(registered, "m", 1).tags[IDENTITY]
        assert version_of(registered, "m", 1).description.split("## ")[1] in (folder / "card.md").read_text()
        return (folder / "card.md").read_text()

    promote(registered, version_of(registered, "m", 1), "triage")
    assert "For research use only" in card() and not is_released(version_of(registered, "m", 1))
    of_one = ["--model", "m", "--version", "1"]
    code, out, _ = command([*of_one, "--release", "--by", "the board", "--why", "study 12"])
    assert (code, out) == (0, "released from research use: m version 1\n")
    assert "Released from research use by the board." in card() and is_released(version_of(registered, "m", 1))
    assert not is_released(version_of(registered, "m", 2))
    promote(registered, version_of(registered, "m", 1), "triage")
    assert is_released(version_of(registered, "m", 1)), "for the same use"
    promote(registered, version_of(registered, "m", 1), "screening")
    assert "For research use only" in card() and not is_released(version_of(registered, "m", 1))
    for flags, told in (
        (["--release", "--by", "the board", "--why", "study 13"], "released from research use"),
        (["--restrict", "--why", "false alarms"], "for research use only"),
    ):
        assert command([*of_one, *flags])[:2] == (0, f"{told}: m version 1\n")
    assert "For research use only" in card() and "screening" in card()
    assert not is_released(version_of(registered, "m", 1))
    found = [(e["action"], e["to_version"], e["by"], e["why"]) for e in Audit(place["storage"]).entries()]
    assert found == [
        ("release", 1, "the board", "study 12"),
        ("release", 1, "the board", "study 13"),
        ("restrict", 1, "not stated", "false alarms"),
    ]
    assert aliases(registered) == {"candidate": 2, "champion": 1}


def test_a_version_that_cannot_be_fetched_is_restricted_all_the_same(registered, command, place):
    released = ["--intended-use", "triage", "--release", "--by", "the board", "--why", "study 12"]
    assert command(["--model", "m", "--version", "1", *released])[0] == 0
    place_of = registered.get_model_version_download_uri("m", "1").removeprefix("file://")
    Path(place_of, "artifacts", "bundle", "model.safetensors").unlink()
    code, _, error = command(["--model", "m", "--version", "1", "--restrict"])
    assert code == 2 and "model.safetensors is missing" in " ".join(error.split())
    assert "restrict of m: it was done in part: version 1 has the mark" in " ".join(error.split())
    assert not is_released(version_of(registered, "m", 1)), "servers go by the version's tag"
    *_, decision, outcome = Audit(place["storage"]).entries("m")
    assert (decision["action"], outcome["action"]) == ("restrict", "done in part")
    assert outcome["decision"] == decision["sha256"] and outcome["now"]["released_by"] == "not stated"


@pytest.mark.parametrize("call", ["fetch_bundle", "shutil.copytree"])
@pytest.mark.parametrize("error", [OSError(28, "No space left"), MlflowException("https://user:password@host")])
def test_restricting_again_does_the_rest(registered, place, tmp_path, monkeypatch, call, error):
    audit = Audit(place["storage"])
    release(registered, version_of(registered, "m", 1), "triage", by="the board", why="study 12", audit=audit)

    def broken(*args, **options):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(f"raymed.registry.promote.{call}", broken)
        with pytest.raises(UserError, match="done in part: .*The same command does the rest") as raised:
            restrict(registered, version_of(registered, "m", 1), audit=audit)
    assert "password" not in str(raised.value) and not is_released(version_of(registered, "m", 1))
    last = audit.entries()[-1]
    assert (last["action"], last["why"]) == ("done in part", type(error).__name__)
    restrict(registered, version_of(registered, "m", 1), audit=audit)
    folder = fetch_bundle(registered, "models:/m/1", tmp_path / "fetched")
    assert "For research use only" in (folder / "card.md").read_text()
    assert [e["action"] for e in audit.entries()] == ["release", "restrict", "done in part", "restrict"]
    assert audit.verify(anchors(registered)) == 4


def test_servers_restrict_a_version_before_its_bundle_is_fetched_and_a_release_meanwhile_stays(registered, monkeypatch):
    def released():
        return is_released(version_of(registered, "m", 1))

    def release_it():
        release(registered, version_of(registered, "m", 1), "triage", by="the board", why="study 12")

    release_it()
    seen = []

    def fetch(client, uri, into):
        seen.append(released())
        monkeypatch.undo()
        release_it()
        return fetch_bundle(client, uri, into)

    monkeypatch.setattr("raymed.registry.promote.fetch_bundle", fetch)
    restrict(registered, version_of(registered, "m", 1))
    assert seen == [False] and released(), "the later decision"


def test_a_use_that_changed_at_this_moment_is_decided_about_again(registered):
    promote(registered, version_of(registered, "m", 1), "triage")
    seen = version_of(registered, "m", 1)
    promote(registered, version_of(registered, "m", 1), "screening")
    with pytest.raises(UserError, match="another use of m version 1 at this moment: do it again"):
        promote(registered, seen, "triage")
    assert promote(registered, version_of(registered, "m", 1), "triage")["intended_use"] == "triage"


def test_nothing_is_released_for_a_use_that_somebody_has_replaced(registered, place, monkeypatch):
    promote(registered, version_of(registered, "m", 1), "triage")
    audit, who = Audit(place["storage"]), {"by": "the board", "why": "study 12"}

    def fetch(client, uri, into):
        monkeypatch.undo()
        promote(registered, version_of(registered, "m", 1), "screening")
        return fetch_bundle(client, uri, into)

    monkeypatch.setattr("raymed.registry.promote.fetch_bundle", fetch)
    with pytest.raises(UserError, match="another use of m version 1 at this moment: do it again"):
        release(registered, version_of(registered, "m", 1), **who, audit=audit)
    found = version_of(registered, "m", 1)
    assert found.tags[INTENDED_USE] == "screening" and not is_released(found) and audit.entries() == []
    release(registered, found, "triage", **who, audit=audit)
    found = version_of(registered, "m", 1)
    assert found.tags[INTENDED_USE] == "triage" and is_released(found), "who says the use means it"


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
        (["--model", "m", "--release", "--by", "me", "--why", "x"], "is about one --version"),
        (["--model", "m", "--restrict", "--release", "--version", "1"], "others of its kind"),
        (["--model", "m", "--restrict", "--rollback"], "others of its kind"),
        (["--model", "m", "--version", "1", "--release", "--by", "me", "--intended-use", "x"], "say who and why"),
        (["--model", "m", "--version", "1", "--release", "--by", "me", "--why", "x"], "needs an intended use"),
        (["--model", "m", "--version", "1", "--restrict"], "was never released"),
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


def test_who_answers_until_there_is_a_champion_is_on_record(registered, command, client, bundle, place, tmp_path):
    def registered_later(number):
        folder = replace(bundle, operating_point={"threshold": number / 10}).save(tmp_path / f"later{number}")
        return register(folder, RegisterConfig(), "m", **place)

    def told():
        entries = Audit(place["storage"]).entries("m")
        return [(e["action"], e["from_version"], e["to_version"], e["by"], e["why"]) for e in entries]

    assert registered_later(3).version == registered_later(3).version == 3
    back = ["--model", "m", "--to", "candidate", "--version", "1", "--by", "Kim", "--why", "better"]
    assert [command(back)[0] for _ in range(2)] == [0, 0]
    moves = [("nominate", 2, 3, "not stated", "registered"), ("nominate", 3, 1, "Kim", "better")]
    assert told() == moves
    promote(client, version_of(client, "m", 1), "triage")
    registered_later(4)
    assert aliases(client) == {"candidate": 4, "champion": 1} and told() == moves, "the champion answers"
    code, out, _ = command(["--model", "m", "--verify"])
    assert code == 0 and out.startswith("2 recorded decisions, each as it was written")


def test_a_log_that_cannot_be_written_costs_the_alias_and_not_the_model(registered, bundle, place, tmp_path, capsys):
    folder = replace(bundle, operating_point={"threshold": 0.9}).save(tmp_path / "later")
    log = Audit(place["storage"]).path
    log.mkdir(parents=True)
    assert register(folder, RegisterConfig(), "m", **place) is None
    assert f"--bundle '{folder}' --to candidate" in capsys.readouterr().out
    assert aliases(registered) == {"candidate": 2}
    log.rmdir()
    assert register(folder, RegisterConfig(), "m", **place).version == 3
    assert aliases(registered) == {"candidate": 3}


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
