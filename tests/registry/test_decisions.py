"""What the log and MLflow say of a decision where MLflow breaks at any place, and where the log's end is cut."""

import shutil
from dataclasses import replace

import pytest

from raymed.config import UserError
from raymed.registry.audit import Audit
from raymed.registry.card import write_card
from raymed.registry.decisions import RELEASED, put_on_record
from raymed.registry.gates import Examination, Gate
from raymed.registry.promote import (
    INTENDED_USE,
    anchors,
    challenge,
    nominate,
    promote,
    promotions,
    refuse,
    release,
    roll_back,
    withdraw,
)
from raymed.registry.register import add
from raymed.registry.store import version_of
from raymed.tracking import connect

CALLS = 60  # more than any decision makes


class Breaking:
    """An MLflow client that raises at its n-th call, or the n-th of one kind: "before" or "after" it is done, or before
    it and everything that follows ("for good")."""

    def __init__(self, client, call: int, how: str, only: str = ""):
        self._client, self._left, self._how, self._only = client, call, how, only
        self.failed = False

    def __getattr__(self, name):
        real = getattr(self._client, name)
        if not callable(real) or self._only not in ("", name):
            return real

        def call(*args, **options):
            self._left -= 1
            breaks = self._left == 0 or (self._left < 0 and self._how == "for good")
            if not breaks or self._how == "after":
                done = real(*args, **options)
            if breaks:
                self.failed = True
                raise ConnectionError("https://user:password@host")
            return done

        return call


@pytest.fixture
def audit(tmp_path):
    return Audit(tmp_path / "storage")


@pytest.fixture(scope="module")
def registered(tracked, bundle, tmp_path_factory):
    """A storage whose store has versions 1 and 2 of m, and 1 of n."""
    home = tmp_path_factory.mktemp("registered")
    shutil.copytree(tracked / "mlflow", home / "mlflow")
    for number, name in ((1, "m"), (2, "m"), (3, "n")):
        folder = replace(bundle, operating_point={"threshold": number / 4}).save(home / f"b{number}")
        write_card(folder, name)
        add(connect(None, home), folder, name)
    return home


@pytest.fixture
def place(registered, tmp_path):
    """A copy of it."""
    shutil.copytree(registered / "mlflow", tmp_path / "home" / "mlflow")
    return {"tracking": None, "storage": tmp_path / "home"}


@pytest.fixture
def versions(client):
    """Both of m."""
    return [version_of(client, "m", number) for number in (1, 2)]


def state(client):
    model, version = client.get_registered_model("m"), client.get_model_version("m", "2")
    aliases = {alias: int(number) for alias, number in model.aliases.items()}
    tags = {"intended_use": INTENDED_USE, "released_by": RELEASED}
    return {"aliases": aliases} | {name: version.tags.get(tag, "not stated") for name, tag in tags.items()}


def reset(client, **aliases):
    client.set_registered_model_alias("m", "candidate", "2")
    for alias in ("champion", "rollback", "challenger"):
        client.delete_registered_model_alias("m", alias)
    for alias, number in aliases.items():
        client.set_registered_model_alias("m", alias, number)
    for tag in {INTENDED_USE, RELEASED} & set(client.get_model_version("m", "2").tags):
        client.delete_model_version_tag("m", "2", tag)


def promoted(client, versions, audit):
    promote(client, versions[1], "triage", audit=audit)


def rolled_back(client, versions, audit):
    roll_back(client, "m", audit=audit)


def challenged(client, versions, audit):
    challenge(client, versions[1], "triage", audit=audit)


def nominated(client, versions, audit):
    nominate(client, versions[0], audit=audit)


def withdrawn(client, versions, audit):
    withdraw(client, "m", audit=audit)


def released(client, versions, audit):
    release(client, versions[1], "triage", by="the board", why="studied", audit=audit)


@pytest.mark.parametrize(
    ("decide", "aliases"),
    [
        (released, {"champion": "1"}),
        (promoted, {"champion": "1", "challenger": "2"}),
        (promoted, {"champion": "2", "rollback": "1"}),
        (rolled_back, {"champion": "1", "rollback": "2"}),
        (challenged, {"champion": "1"}),
        (withdrawn, {"champion": "1", "challenger": "2"}),
        (nominated, {}),
    ],
)
@pytest.mark.parametrize("how", ["before", "after", "for good"])
def test_the_log_says_what_is_true_wherever_mlflow_breaks(client, versions, audit, decide, aliases, how):
    outcomes = set()
    for call in range(1, CALLS):
        reset(client, **aliases)
        known, before = len(audit.entries()), state(client)
        broken = Breaking(client, call, how)
        try:
            decide(broken, versions, audit)
        except ConnectionError:
            assert len(audit.entries()) == known, "what is on record ends with words for people"
        except UserError as error:
            assert "of m: MLflow" in str(error) and "password" not in str(error)
        lines, now = audit.entries()[known:], state(client)
        if not broken.failed:
            break
        outcomes.add(outcome_of(lines, before, now))
    assert not broken.failed and len(lines) == 1, "the last time nothing broke"
    assert outcomes >= {"nothing", "not known" if how == "for good" else "not done"}
    assert "done in part" in outcomes or how == "for good" or (decide in (withdrawn, nominated) and how == "before")
    assert audit.verify(anchors(client)) == len(audit.entries())


def outcome_of(lines, before, now):
    """What a decision that broke off came to, if its lines are true."""
    if not lines:
        assert now == before, "nothing is done that is not on record"
        return "nothing"
    decision, outcome = lines
    assert outcome["decision"] == decision["sha256"] and outcome["why"] == "ConnectionError"
    if outcome["action"] == "not known":
        assert outcome["now"] is None
    else:
        assert outcome["now"] == now and (outcome["action"] == "not done") == (now == before)
    return outcome["action"]


@pytest.mark.parametrize("call", ["set_model_version_tag", "delete_registered_model_alias", "log_text"])
@pytest.mark.parametrize(("decide", "was"), [(promoted, "1"), (rolled_back, "2")])
def test_deciding_the_same_again_does_the_rest(client, versions, audit, decide, was, call):
    for version in versions:
        client.set_model_version_tag("m", version.version, INTENDED_USE, "triage")
    versions = [version_of(client, "m", number) for number in (1, 2)]
    others = {"challenger": "2"} if decide is promoted else {"rollback": "1"}
    for alias, number in ({"champion": was} | others).items():
        client.set_registered_model_alias("m", alias, number)
    broken = Breaking(client, 1, "before", only=call)
    with pytest.raises(UserError, match="done in part: .*champion [12].* The same command does the rest"):
        decide(broken, versions, audit)
    decide(client, versions, audit)
    now = state(client)["aliases"]
    wanted = {"champion": 2, "rollback": 1} if decide is promoted else {"champion": 1}
    assert now == {"candidate": 2} | wanted
    assert promotions(client, "m")[-1]["audit"] == audit.entries()[-1]["sha256"]


def cut(audit, lines):
    raw = audit.path.read_bytes().splitlines(keepends=True)
    audit.path.write_bytes(b"".join(raw[:-lines]))


def refused(client, versions, audit):
    champion = client.get_registered_model("m").aliases.get("champion")
    examined = Examination((Gate("AUROC", False, "worse"),), champion and int(champion))
    with pytest.raises(UserError, match="does not become champion"):
        refuse(client, versions[1], examined, by="the board", why="not stated", audit=audit)


@pytest.mark.parametrize("decide", [promoted, rolled_back, challenged, nominated, withdrawn, refused, released])
def test_an_end_that_was_cut_is_found(client, versions, audit, decide):
    for alias, number in {"champion": "1", "rollback": "2", "challenger": "2"}.items():
        client.set_registered_model_alias("m", alias, number)
    put_on_record(client, audit, action="promote", model="n")
    decide(client, versions, audit)
    assert audit.verify(anchors(client)) == 2
    cut(audit, 1)
    with pytest.raises(UserError, match="the line of decision 2, about m, as MLflow has it, is missing"):
        audit.verify(anchors(client))
    put_on_record(client, audit, action="promote", model="n")
    with pytest.raises(UserError, match="decision 2, about m"):
        audit.verify(anchors(client))


def test_what_every_page_of_the_registry_holds_is_asked_for(client, versions, audit, monkeypatch):
    put_on_record(client, audit, action="promote", model="n")
    challenged(client, versions, audit)
    real = type(client).search_registered_models
    monkeypatch.setattr(
        type(client), "search_registered_models", lambda *a, **how: real(*a, **how | {"max_results": 1})
    )
    assert {anchor.what for anchor in anchors(client).values()} == {"decision 1, about n", "decision 2, about m"}


def test_a_log_that_is_gone_is_found(client, versions, audit):
    assert audit.verify(anchors(client)) == 0
    challenged(client, versions, audit)
    audit.path.unlink()
    with pytest.raises(UserError, match="decision 1, about m"):
        audit.verify(anchors(client))


def test_what_mlflow_cannot_hold_is_not_done_but_refused_all_the_same(client, versions, audit):
    with pytest.raises(
        UserError, match="promote of m: MLflow failed, and it was not done: candidate 2 now. Do it again"
    ):
        promoted(Breaking(client, 1, "before", only="set_registered_model_tag"), versions, audit)
    assert state(client)["aliases"] == {"candidate": 2}
    refused(Breaking(client, 1, "before", only="set_registered_model_tag"), versions, audit)
    assert [entry["action"] for entry in audit.entries()] == ["promote", "not done", "refuse"]


def test_a_log_with_one_line_says_so(client, versions, place, command):
    challenged(client, versions, Audit(place["storage"]))
    code, out, _ = command(["--model", "n", "--verify"])
    assert code == 0 and out.startswith("1 recorded decision, each as it was written: ")
    cut(Audit(place["storage"]), 1)
    code, _, error = command(["--model", "n", "--verify"])
    assert code == 2 and "decision 1, about m" in error
