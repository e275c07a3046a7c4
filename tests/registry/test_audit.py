"""The log of decisions: what stands in it, and that nobody changes a line unseen."""

import hashlib
import json
import os
import resource
import threading
from dataclasses import replace

import pytest

from raymed.config import UserError
from raymed.registry.audit import Anchor, Audit
from raymed.registry.card import write_card
from raymed.registry.gates import Examination, Gate
from raymed.registry.promote import anchors, challenge, promote, promotions, refuse, roll_back, withdraw
from raymed.registry.register import add
from raymed.registry.store import version_of


@pytest.fixture
def audit(tmp_path):
    return Audit(tmp_path / "storage")


@pytest.fixture
def three(audit):
    for number in range(3):
        audit.add(action="promote", model="m", to_version=number, why="좋다\u2028\n\x85 'so'")
    return audit


def test_a_decision_says_who_and_when_and_holds_the_one_before(three):
    entries = three.entries()
    assert [e["number"] for e in entries] == [1, 2, 3] and three.verify() == 3
    raw = [line.rstrip(b"\n") for line in three.path.read_bytes().split(b"\n")[:-1]]
    assert [json.loads(line)["before"] for line in raw[1:]] == [hashlib.sha256(line).hexdigest() for line in raw[:-1]]
    assert entries[0]["before"] == "0" * 64 and entries[2]["why"] == "좋다\u2028\n\x85 'so'"
    assert all(e["time"].endswith("+00:00") and "@" in e["account"] for e in entries)
    assert three.entries("another") == [] and len(three.entries("m")) == 3


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda old: [old[0].replace(b'"to_version": 0', b'"to_version": 7'), *old[1:]], 2),
        (lambda old: [old[0], old[1].replace(b"so", b"no"), old[2]], 3),
        (lambda old: [old[0], old[2]], 2),
        (lambda old: old[1:], 1),
        (lambda old: [old[0], old[2], old[1]], 2),
        (lambda old: [old[0], old[0], *old[1:]], 2),
        (lambda old: [*old[:2], old[2][:-20]], 3),
        (lambda old: [*old, b"\n"], 4),
        (lambda old: [*old, b"\xff{}\n"], 4),
    ],
)
def test_a_line_that_was_changed_or_taken_out_is_found(three, change, line):
    raw = three.path.read_bytes().split(b"\n")[:-1]
    three.path.write_bytes(b"".join(change([each + b"\n" for each in raw])))
    with pytest.raises(UserError, match=f"line {line}: it, or a line before it, is not what was written"):
        three.verify()


def test_the_last_line_is_held_by_what_names_it(three):
    last = three.entries()[-1]["sha256"]
    anchors = {last: Anchor("promotion 3", **three.origin())}
    assert three.verify(anchors) == 3
    raw = three.path.read_bytes()
    for changed in (raw.replace(b'"to_version": 2', b'"to_version": 5'), b"\n".join(raw.split(b"\n")[:2]) + b"\n"):
        three.path.write_bytes(changed)
        three.verify()  # the chain alone cannot know
        with pytest.raises(UserError, match="the line of promotion 3, as MLflow has it, is missing or was changed"):
            three.verify(anchors)


@pytest.mark.parametrize("whole", [0, 1, 2])
def test_a_line_that_a_crash_has_cut_stays_and_the_next_one_holds_it(three, whole):
    lines = three.path.read_bytes().splitlines(keepends=True)
    three.path.write_bytes(b"".join(lines[: whole + 1])[:-30])
    with pytest.raises(UserError, match=f"line {whole + 1}"):
        three.verify()
    for number in (7, 8):
        three.add(action="promote", model="m", to_version=number)
    assert json.loads(three.path.read_bytes().split(b"\n")[whole + 1])["to_version"] == 7
    assert three.verify() == whole + 2
    assert [e["number"] for e in three.entries()] == [*range(1, whole + 1), whole + 2, whole + 3]


def test_several_pieces_are_held_with_the_line_before_them(three):
    for _ in range(2):
        three.path.write_bytes(three.path.read_bytes()[:-30])
        three.path.write_bytes(three.path.read_bytes() + b"\n" + b'{"number": 4, "ti')
    three.add(action="promote", model="m", to_version=9)
    assert three.verify() == 3
    raw = three.path.read_bytes().split(b"\n")
    for at in range(len(raw) - 2):
        changed = [line.replace(b'"', b"'", 1) if i == at else line for i, line in enumerate(raw)]
        gone = [line for i, line in enumerate(raw) if i != at]
        for lines in (changed, gone):
            three.path.write_bytes(b"\n".join(lines))
            with pytest.raises(UserError, match="is not what was written"):
                three.verify()


def test_a_line_that_was_replaced_by_a_piece_is_found(three):
    last = three.entries()[-1]["sha256"]
    anchors = {last: Anchor("promotion 3", **three.origin())}
    three.path.write_bytes(three.path.read_bytes()[:-30])
    three.add(action="promote", model="m", to_version=9)
    assert three.verify() == 3
    with pytest.raises(UserError, match="promotion 3"):
        three.verify(anchors)


def test_a_line_that_the_disk_does_not_take_leaves_nothing(three, monkeypatch):
    before = three.path.read_bytes()

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="full"):
        three._append(b"{}")
    assert three.path.read_bytes() == before


def test_a_line_of_which_the_disk_takes_a_part_leaves_nothing(three):
    before = three.path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 10, hard))
    try:
        with pytest.raises(UserError, match="is full"):
            three.add(action="promote", model="m", to_version=9)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert three.path.read_bytes() == before and three.verify() == 3
    assert three.add(action="promote", model="m", to_version=9)["number"] == 4


def test_decisions_at_the_same_time_all_stand_there(audit):
    def decide(number):
        Audit(audit.storage).add(action="promote", model="m", to_version=number)

    threads = [threading.Thread(target=decide, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert audit.verify() == 8 and {e["to_version"] for e in audit.entries()} == set(range(8))


@pytest.fixture
def versions(bundle, client, tmp_path):
    """Versions 1 and 2 of m."""
    for number in (1, 2):
        write_card(replace(bundle, operating_point={"threshold": number / 4}).save(tmp_path / f"b{number}"), "m")
        add(client, tmp_path / f"b{number}", "m")
    return [version_of(client, "m", number) for number in (1, 2)]


def test_every_decision_about_a_model_stands_there_and_in_mlflow(client, versions, audit):
    worse = Gate("AUROC", False, "worse", {"mean": -0.1, "ci_low": float("nan")})
    examined = Examination((Gate("golden inputs", True, "fine"), worse), champion=1)
    promote(client, versions[0], "triage", by="the board", audit=audit)
    challenge(client, versions[1], "triage", audit=audit)
    withdraw(client, "m", why="slow", audit=audit)
    with pytest.raises(UserError, match="does not become champion:\n.*\n.*AUROC: not passed .worse.\nTake the"):
        refuse(client, versions[1], examined, by="the board", why="not stated", audit=audit)
    promote(client, versions[1], "triage", why="we know better", examined=examined, audit=audit)
    roll_back(client, "m", why="worse indeed", audit=audit)
    entries = audit.entries("m")
    moves = [(e["action"], e["from_version"], e["to_version"], e["by"], e["why"]) for e in entries]
    assert moves == [
        ("promote", None, 1, "the board", "not stated"),
        ("challenge", None, 2, "not stated", "not stated"),
        ("withdraw", 2, None, "not stated", "slow"),
        ("refuse", 1, 2, "the board", "not stated"),
        ("promote", 1, 2, "not stated", "we know better"),
        ("roll back", 2, 1, "not stated", "worse indeed"),
    ]
    assert (entries[3]["forced"], entries[4]["forced"]) == (False, True)
    assert entries[4]["gates"][1]["figures"] == {"mean": -0.1, "ci_low": None}
    assert entries[4]["figures"]["to"]["test"]["auroc"] > 0.5
    records = promotions(client, "m")
    assert [r["audit"] for r in records] == [entries[i]["sha256"] for i in (0, 4, 5)]
    assert records[1]["forced"] and audit.verify(anchors(client)) == 6
    raw = audit.path.read_bytes()
    audit.path.write_bytes(raw.replace(b"worse indeed", b"better, indeed"))
    with pytest.raises(UserError, match="the line of decision 6, about m, as MLflow has it, is missing or was changed"):
        audit.verify(anchors(client))


def test_storages_that_share_an_mlflow_verify_their_own_lines(client, versions, audit, tmp_path):
    another = Audit(tmp_path / "another")
    promote(client, versions[0], "triage", audit=audit)
    promote(client, versions[1], "triage", audit=another)
    challenge(client, versions[0], "triage", audit=another)
    held = anchors(client)
    assert (audit.verify(held), len(audit.others(held))) == (1, 2)
    assert (another.verify(held), len(another.others(held))) == (2, 1)
    nobody = Audit(tmp_path / "nobody")
    assert (nobody.verify(held), len(nobody.others(held))) == (0, 3)
    raw = another.path.read_bytes().splitlines(keepends=True)
    another.path.write_bytes(raw[0])
    with pytest.raises(UserError, match="decision 2, about m"):
        another.verify(held)
    another.path.write_bytes(raw[0].replace(b"triage", b"no use"))
    with pytest.raises(UserError, match="decision 1, about m"):
        another.verify(held)
    assert audit.verify(held) == 1


def test_a_log_that_was_begun_anew_is_found_in_its_place_and_told_apart_elsewhere(client, versions, audit, tmp_path):
    promote(client, versions[0], "triage", audit=audit)
    held, raw = anchors(client), audit.path.read_bytes()
    moved = Audit(tmp_path / "moved")
    moved.path.parent.mkdir(parents=True)
    moved.path.write_bytes(raw)
    assert (moved.verify(held), moved.others(held)) == (1, set())
    audit.path.unlink()
    challenge(client, versions[1], "triage", audit=audit)
    held = anchors(client)
    with pytest.raises(UserError, match="decision 1, about m"):
        audit.verify(held)
    assert (moved.verify(held), len(moved.others(held))) == (1, 1)


def test_others_are_counted_on_the_command_line(client, versions, audit, command):
    promote(client, versions[0], "triage", audit=audit)
    code, out, _ = command(["--model", "m", "--verify"])
    assert code == 0 and out.startswith("0 recorded decisions, each as it was written: ")
    assert out.endswith("\n1 more stand in the logs of other storages: verify them there\n")


def test_of_one_storage_one_decides_from_looking_to_moving(client, versions, audit, monkeypatch):
    monkeypatch.setattr("raymed.registry.audit._PATIENCE_S", 0)
    refused, let_in = [], []

    class Meanwhile:
        """A client at whose every call somebody else wants to decide."""

        def __getattr__(self, name):
            try:
                Audit(audit.storage).add(action="promote", model="m")
                let_in.append(name)
            except UserError as error:
                assert "is in use by process" in str(error)
                refused.append(name)
            return getattr(client, name)

    promote(Meanwhile(), versions[0], "triage", audit=audit)
    challenge(Meanwhile(), versions[1], "triage", audit=audit)
    withdraw(Meanwhile(), "m", audit=audit)
    promote(Meanwhile(), versions[1], "triage", audit=audit)
    roll_back(Meanwhile(), "m", audit=audit)
    assert refused.count("get_registered_model") > 5 and refused.count("log_model_artifacts") == 2
    fetching = ["get_registered_model", "search_model_versions", "get_model_version_download_uri", "tracking_uri"]
    assert let_in == 3 * fetching, "nobody waits while weights come, of versions that nobody has said the use of"
    Audit(audit.storage).add(action="promote", model="m")
    assert audit.verify() == 6 + len(let_in)


def test_nothing_is_done_that_cannot_be_put_on_record(client, versions, audit, monkeypatch):
    audit.path.mkdir(parents=True)
    with pytest.raises(UserError):
        promote(client, versions[0], "triage", audit=audit)
    assert set(client.get_registered_model("m").aliases) == {"candidate"} and promotions(client, "m") == []


def test_a_decision_that_the_bucket_does_not_get_is_not_done_and_leaves_no_line(client, versions, audit, monkeypatch):
    promote(client, versions[0], "triage", audit=audit)
    before, records = audit.path.read_bytes(), promotions(client, "m")

    def out_of_reach(path):
        assert path == audit.path
        raise UserError("http://s3:8333 does not answer")

    with monkeypatch.context() as patch:
        patch.setattr("raymed.registry.audit.push_file", out_of_reach)
        with pytest.raises(UserError, match="does not answer"):
            promote(client, versions[1], "triage", audit=audit)
    assert audit.path.read_bytes() == before and promotions(client, "m") == records
    promote(client, versions[1], "triage", audit=audit)
    assert [e["to_version"] for e in audit.entries()] == [1, 2] and audit.verify(anchors(client)) == 2


def test_a_log_in_a_bucket_goes_on_from_another_machine(s3, monkeypatch, tmp_path):
    from raymed.storage import resolve_storage

    first = Audit(resolve_storage(f"{s3.url}/storage"))
    first.add(action="promote", model="m")
    monkeypatch.setenv("RAYMED_LOCAL", str(tmp_path / "elsewhere"))
    second = Audit(resolve_storage(f"{s3.url}/storage"))
    assert second.path != first.path
    second.add(action="roll back", model="m")
    assert [e["action"] for e in second.entries()] == ["promote", "roll back"]
    assert s3.get("storage/registry/audit.jsonl") == second.path.read_bytes()
