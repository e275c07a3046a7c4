"""Where versions come from: folders, MLflow's registry, and what is kept on disk of it."""

import json
import socket
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fastapi.testclient import TestClient
from registries import weights_of

from raymed.bundle import Bundle
from raymed.config import UserError
from raymed.registry.config import check_name
from raymed.registry.promote import promote, promotions, release, restrict
from raymed.registry.register import identity
from raymed.registry.store import version_of, versions_of
from raymed.serve.app import create_app
from raymed.serve.config import Follow, ServeConfig, Wanted
from raymed.serve.kept import Kept, kept_of
from raymed.serve.live import Origin, identity_of
from raymed.serve.models import Unreachable
from raymed.serve.sources import Folder, Registry, registered, served_name, source_of
from raymed.tracking import connect

NOBODY = "http://127.0.0.1:9"
PREDICT = "/v1/models/hsg:predict"


@pytest.fixture
def storage(registry_home) -> Path:
    return registry_home


@pytest.fixture
def client(storage):
    """Of its MLflow."""
    return connect(None, storage)


@pytest.fixture
def source(client, storage):
    """Of the champion."""
    return Registry("models:/hsg@champion", None, storage)


def flip(file: Path) -> None:
    """A bit in the middle of a file."""
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 1
    file.write_bytes(raw)


def test_the_registry_tells_which_version_and_gives_it(source, client, tmp_path):
    origin = source.newest("champion")
    assert (origin.where, origin.version) == ("models:/hsg/1", "1")
    assert origin.digest == identity(tmp_path / "bundle1") == identity(weights_of(client, 1).parent)
    assert source.fetch(origin).operating_point["threshold"] == 0.25
    assert source.newest("challenger") is None
    client.set_registered_model_alias("hsg", "challenger", "2")
    client.set_registered_model_alias("hsg", "champion", "2")
    assert source.newest("challenger") == source.newest("champion") != origin
    assert source.fetch(source.newest("champion")).operating_point["threshold"] == 0.5


def test_a_version_by_number_stays(client, storage):
    source = Registry("models:/hsg/1", None, storage)
    client.set_registered_model_alias("hsg", "champion", "2")
    assert source.newest("champion").version == "1" and source.newest("challenger") is None


def test_who_starts_a_server_without_a_champion_is_told_once_who_answers(client, storage, capsys):
    source = Registry("models:/hsg", None, storage)
    assert source.newest("champion").version == "1" and capsys.readouterr().out == ""
    client.delete_registered_model_alias("hsg", "champion")
    assert [source.newest("champion").version for _ in range(2)] == ["2", "2"]
    assert capsys.readouterr().out == "hsg: no champion yet, the newest candidate answers, version 2\n"


def test_a_release_is_another_origin_whose_answers_are_not_for_research_only(source, client):
    promote(client, version_of(client, "hsg", 1), "triage")
    before = source.newest("champion")
    release(client, version_of(client, "hsg", 1), by="the board", why="study 12")
    after, bundle = source.newest("champion"), source.fetch(source.newest("champion"))
    assert (before.research_only, after.research_only) == (True, False) and before.digest == after.digest
    assert before != after and identity_of("hsg", bundle, after)["research_only"] is False
    restrict(client, version_of(client, "hsg", 1))
    assert source.newest("champion") == before


def test_a_bundle_that_says_so_without_a_decision_is_for_research_only(source, client):
    described = weights_of(client, 1).with_name("bundle.json")
    said = json.loads(described.read_text())
    said["contract"] |= {"research_only": False}
    described.write_text(json.dumps(said))
    origin = source.newest("champion")
    assert identity_of("hsg", source.fetch(origin), origin)["research_only"] is True
    assert Folder(str(described.parent)).newest("champion").research_only is False


def test_another_intended_use_is_another_origin_of_the_same_weights(source, client):
    before = source.newest("champion")
    promote(client, version_of(client, "hsg", 1), "triage of HSG")
    after = source.newest("champion")
    assert after != before and (after.version, after.digest) == (before.version, before.digest)
    assert source.fetch(after).intended_use == "triage of HSG"


def test_a_flipped_byte_is_found_and_said_alike_every_time(source, client):
    flip(weights_of(client, 1))
    messages = set()
    for _ in range(2):
        with pytest.raises(UserError, match="models:/hsg/1.* is damaged: its sha256 is not the one") as error:
            source.fetch(source.newest("champion"))
        messages.add(str(error.value))
        assert not isinstance(error.value, Unreachable)
    assert len(messages) == 1


def test_a_store_that_is_gone_says_nothing_of_the_bundle(source, storage, monkeypatch):
    origin = source.newest("champion")
    with pytest.raises(Unreachable, match="MLflow does not answer"):
        Registry("models:/hsg@champion", NOBODY, storage).fetch(origin)
    for name, value in {"RAYMED_S3_PATIENCE": "0", "AWS_ENDPOINT_URL": NOBODY, "AWS_REGION": "us-east-1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
    with pytest.raises(Unreachable, match="S3 does not answer"):
        Folder("s3://bucket/hsg").fetch(origin)


def test_a_version_that_is_gone_from_the_registry_is_not_waited_for(source, client):
    origin = source.newest("champion")
    with pytest.raises(UserError, match="hsg has no version 7: it has 1") as error:
        source.fetch(replace(origin, where="models:/hsg/7"))
    assert not isinstance(error.value, Unreachable)


def test_a_bundle_that_was_exchanged_with_its_hashes_is_found(source, client):
    folder = weights_of(client, 1).parent
    bundle = Bundle.load(folder)
    bundle.weights = {name: tensor * 1.01 for name, tensor in bundle.weights.items()}
    bundle.save(folder)
    with pytest.raises(UserError, match="models:/hsg/1 is not the bundle that was registered"):
        source.fetch(source.newest("champion"))


def test_a_folder_has_the_digest_of_the_registered_bundle(source, tmp_path):
    folder = Folder(str(tmp_path / "bundle1"))
    assert folder.newest("champion").digest == source.newest("champion").digest
    assert folder.newest("challenger") is None
    before = folder.newest("champion")
    replace(Bundle.load(tmp_path / "bundle1"), intended_use="triage").save(tmp_path / "bundle1")
    assert folder.newest("champion") != before
    (tmp_path / "bundle1" / "bundle.json").write_text("[]")
    with pytest.raises(UserError, match="is no bundle"):
        folder.newest("champion")


@pytest.mark.parametrize("where", ["models:/", "models:/hsg@", "models:/a/b/c", "models:/hsg@x@y"])
def test_other_names_of_registered_models_are_refused(where, tmp_path):
    with pytest.raises(UserError, match="models:/NAME@ALIAS"):
        source_of(Wanted("m", where), ServeConfig(storage=str(tmp_path)))


def test_a_registry_that_accepts_and_never_answers_is_given_up_soon(tmp_path, monkeypatch):
    """Its health is good, its answers never come."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    listening = socket.create_server(("127.0.0.1", 0))
    held = []

    def hang():
        while True:
            try:
                connection, _ = listening.accept()
            except OSError:
                return
            held.append(connection)
            if connection.recv(4096).startswith(b"GET /health"):
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nOK")

    threading.Thread(target=hang, daemon=True).start()
    source = Registry("models:/hsg@champion", f"http://127.0.0.1:{listening.getsockname()[1]}", tmp_path)
    started = time.monotonic()
    with pytest.raises(Exception, match="(?i)timed out|failed"):
        source.newest("champion")
    taken = time.monotonic() - started
    listening.shutdown(socket.SHUT_RDWR)
    listening.close()
    for connection in held:
        connection.close()
    assert len(held) >= 2 and taken < 10


@pytest.fixture
def config(app_config, storage, client):
    """config(tracking) of a server that follows the champion."""

    def make(tracking=None, **changes):
        changes = {"models": ("hsg=models:/hsg@champion",), "storage": str(storage), "tracking": tracking} | changes
        return app_config(**changes)

    return make


def test_what_was_served_is_served_where_the_registry_is_gone(config, png):
    with TestClient(create_app(config())) as first:
        answer = first.post(PREDICT, content=png).json()
        assert first.get("/statusz").json()["hsg"]["from"] == "models:/hsg@champion"
    with TestClient(create_app(config(NOBODY))) as alone:
        ready, state = alone.get("/readyz"), alone.get("/statusz").json()["hsg"]
        assert alone.post(PREDICT, content=png).json() == answer and answer["version"] == "1"
    assert ready.status_code == 200 and state["versions"] == {"champion": "1"}
    assert state["from"] == "the last good version on this server's disk"
    assert "MLflow does not answer" in state["refused"]["champion"]


def test_a_broken_champion_at_start_leaves_the_last_good_one(config, client, png):
    with TestClient(create_app(config())) as first:
        assert first.post(PREDICT, content=png).json()["version"] == "1"
    flip(weights_of(client, 2))
    client.set_registered_model_alias("hsg", "champion", "2")
    with TestClient(create_app(config())) as again:
        state = again.get("/statusz").json()["hsg"]
        assert again.post(PREDICT, content=png).json()["version"] == "1"
        refused = [line for line in again.get("/metrics").text.splitlines() if line.startswith("raymed_refused{")]
    assert "models:/hsg/2" in state["refused"]["champion"] and "is damaged" in state["refused"]["champion"]
    assert refused == ['raymed_refused{alias="champion",model="hsg"} 1.0']


def test_a_model_that_was_withdrawn_is_not_served_by_a_new_server(config, client, png):
    with TestClient(create_app(config())) as first:
        assert first.post(PREDICT, content=png).status_code == 200
        client.delete_registered_model_alias("hsg", "champion")
        models = first.app.state.service.models
        first.portal.call(models.refresh, "hsg")
        assert first.post(PREDICT, content=png).json()["version"] == "1"  # a server that runs goes on
        assert "no such version" in first.get("/statusz").json()["hsg"]["refused"]["champion"]
    with TestClient(create_app(config())) as again:
        ready, state = again.get("/readyz"), again.get("/statusz").json()["hsg"]
        assert again.post(PREDICT, content=png).status_code == 503
    assert ready.status_code == 503 and "no such version" in state["refused"]["champion"]


def test_nothing_kept_and_nothing_there(config, png):
    with TestClient(create_app(config(NOBODY))) as client:
        assert client.get("/readyz").status_code == 503
        answer = client.post(PREDICT, content=png)
    assert answer.status_code == 503 and answer.headers["Retry-After"] == "5"


def test_models_that_nobody_names_are_those_of_the_registry_or_those_served_before(client, storage, tmp_path, capsys):
    asked = ServeConfig(storage=str(storage))
    assert registered(asked).models == ("hsg=models:/hsg",)
    away = ServeConfig(storage=str(storage), tracking=NOBODY)
    with pytest.raises(UserError, match="MLflow does not answer"):
        registered(away)
    wanted = Wanted.parse(registered(asked).models[0])
    kept_of(wanted, asked).put(Bundle.load(tmp_path / "bundle1"), Origin("models:/hsg/1", "1", "d"))
    assert registered(away).models == ("hsg=models:/hsg",)


NAMES = ("hsg v1", "hsg-v1", "자궁난관조영", "난관 hsg", "c" * 68, "-".join(["a1"] * 33) + "x")


@pytest.fixture
def candidate(client, tmp_path):
    """candidate(name) -> a registered model of that name with a candidate."""

    def make(name):
        client.create_registered_model(name)
        client.create_model_version(name, str(tmp_path / "bundle1"))
        client.set_registered_model_alias(name, "candidate", "1")

    return make


def served_names(storage) -> dict[str, str]:
    """Registered model -> what it is served as."""
    found = [Wanted.parse(text) for text in registered(ServeConfig(storage=str(storage))).models]
    return {wanted.where.removeprefix("models:/"): wanted.name for wanted in found}


def test_whatever_a_model_is_called_it_has_a_name_of_its_own(candidate, storage, capsys):
    for name in NAMES:
        check_name(name)
        candidate(name)
    told = served_names(storage)
    assert told.keys() == {"hsg", *NAMES} and len(set(told.values())) == len(told)
    assert (told["hsg"], told["hsg-v1"]) == ("hsg", "hsg-v1"), "what can stand in an address does"
    assert told["hsg v1"].startswith("hsg-v1-") and told["난관 hsg"].startswith("hsg-")
    said = capsys.readouterr().out
    assert f"(the registered model '자궁난관조영' is asked for as {told['자궁난관조영']})" in said
    assert "found hsg-v1=models:/hsg-v1\n" in said


def test_a_name_does_not_depend_on_what_else_is_registered(candidate, storage):
    candidate("hsg v1")
    before = served_names(storage)
    candidate("hsg-v1")
    assert served_names(storage) == before | {"hsg-v1": "hsg-v1"}
    assert before["hsg v1"] == served_name("hsg v1") == "hsg-v1-5f86373d"


def test_a_model_that_cannot_be_named_is_said_and_stops_no_other(candidate, storage, capsys):
    candidate("two, of us")
    candidate("me@home")
    assert served_names(storage) == {"hsg": "hsg"}
    said = capsys.readouterr().out
    assert "'two, of us' is NOT SERVED" in said and "'me@home' is NOT SERVED" in said


@pytest.mark.parametrize("name", ["O'Brien", "5\" it's", 'the "best"'])
def test_a_name_with_quotes_is_served_as_any_other(candidate, client, storage, name):
    for each in {name, name.replace("'", "_")}:  # the second is what a filter without quotes would find too
        candidate(each)
    assert [version.name for version in versions_of(client, name)] == [name]
    assert version_of(client, name, 1).name == name and promotions(client, name) == []


def test_every_page_of_the_registry_is_read(candidate, client, storage, monkeypatch):
    for name in ("a", "b", "c", "d"):
        candidate(name)
    asked, real = [], type(client).search_registered_models

    def small(self, **how):
        asked.append(how)
        return real(self, **how, max_results=2)

    monkeypatch.setattr(type(client), "search_registered_models", small)
    assert served_names(storage).keys() == {"a", "b", "c", "d", "hsg"} and len(asked) == 3


@pytest.fixture
def kept(tmp_path):
    return Kept(tmp_path / "kept", "models:/hsg@champion")


ORIGINS = [Origin(f"models:/hsg/{n}", str(n), f"d{n}", "triage") for n in (1, 2)]


def test_one_version_is_kept_and_comes_back_whole(kept, bundle):
    assert kept.get() is None
    for number, origin in enumerate(ORIGINS):
        kept.put(replace(bundle, operating_point={"threshold": number / 4}), origin)
        kept.put(replace(bundle, operating_point={"threshold": number / 4}), origin)
        found, where = kept.get()
        assert where == origin and found.operating_point == {"threshold": number / 4}
        assert all(torch.equal(found.weights[name], tensor) for name, tensor in bundle.weights.items())
    assert len([path for path in kept.folder.iterdir() if path.is_dir()]) == 1


def test_a_crash_while_it_is_written_leaves_the_one_before(kept, bundle, monkeypatch):
    kept.put(bundle, ORIGINS[0])

    def full(*_):
        raise OSError(28, "No space left on device")

    for step in ("raymed.bundle.write_bytes", "raymed.serve.kept.write_atomic"):
        with monkeypatch.context() as patch:
            patch.setattr(step, full)
            with pytest.raises(OSError, match="No space"):
                kept.put(replace(bundle, operating_point={"threshold": 0.9}), ORIGINS[1])
        assert kept.get()[1] == ORIGINS[0]


def test_what_is_kept_of_another_place_or_damaged_is_not_served(kept, bundle):
    kept.put(bundle, ORIGINS[0])
    assert Kept(kept.folder, "models:/hsg@candidate").get() is None
    (weights,) = kept.folder.glob("*/model.safetensors")
    flip(weights)
    with pytest.raises(UserError, match="is damaged"):
        kept.get()
    (kept.folder / "origin.json").write_text(json.dumps({"where": kept.where}))
    with pytest.raises(UserError, match="is damaged"):
        kept.get()


def test_only_what_comes_from_elsewhere_is_kept(tmp_path):
    config = ServeConfig(storage=str(tmp_path), follow=Follow())
    assert kept_of(Wanted("m", "/a/folder"), config) is None
    for where in ("models:/m@champion", "s3://bucket/m"):
        assert kept_of(Wanted("m", where), config).folder == tmp_path / "serve" / "models" / "m"
