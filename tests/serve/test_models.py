"""Versions of a model: which one answers for whom, how one takes another's place, and what is refused."""

import asyncio
import gc
import threading
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch

from raymed.bundle import Bundle
from raymed.config import UserError
from raymed.serve.canary import is_in_share
from raymed.serve.config import Hardware, Wanted
from raymed.serve.engine import Engine
from raymed.serve.handlers import Upload
from raymed.serve.live import Origin
from raymed.serve.models import CHALLENGER, CHAMPION, Models, Served, Unreachable
from raymed.serve.problems import Problem
from raymed.tasks.golden import with_golden


class Shelf:
    """A source whose aliases a test moves. bundles: by version."""

    name = "shelf"

    def __init__(self, bundles: dict[str, Bundle], **aliases: str):
        self.bundles, self.aliases, self.fetched = bundles, aliases, []
        self.down = False

    def newest(self, alias):
        if self.down:
            raise ConnectionError("https://user:password@host is gone")
        version = self.aliases.get(alias)
        return version and Origin(f"shelf/{version}", version, f"digest of {version}")

    def fetch(self, origin):
        self.fetched.append(origin.version)
        found = self.bundles[origin.version]
        if isinstance(found, Exception):
            raise found
        return found


@pytest.fixture(scope="module")
def bundles(bundle) -> dict[str, Bundle]:
    """Versions 1 and 2, which differ by their threshold, and 3, whose weights are not those that made its golden
    values."""
    good = with_golden(bundle)
    weights = dict(good.weights)
    weights["head.linear.bias"] = weights["head.linear.bias"] + 1
    return {
        "1": good,
        "2": replace(good, operating_point={**good.operating_point, "threshold": 0.7}),
        "3": replace(good, weights=weights),
    }


@pytest.fixture
def engine():
    made = Engine(Hardware(device="cpu", threads=1, max_batch=4), queue=64)
    yield made
    made.close()


@pytest.fixture
def server(engine, bundles):
    """server(champion="1", ...) -> (models, its shelf); canary: share of the challenger."""

    def make(canary=0.0, told=lambda *_, **__: None, **aliases):
        shelf = Shelf(dict(bundles), **aliases)
        return Models({"m": Served(Wanted("m", "shelf"), shelf)}, engine, canary, told), shelf

    return make


def versions(models):
    return models.state()["m"]["versions"]


def test_an_alias_is_followed(server):
    models, shelf = server(champion="1")

    async def follow():
        with pytest.raises(Problem) as early:
            models.get("m")
        first = await models.refresh("m"), models.get("m").origin.version
        same = await models.refresh("m")
        shelf.aliases[CHAMPION] = "2"
        return early.value, first, same, await models.refresh("m")

    early, first, same, moved = asyncio.run(follow())
    assert early.status == 503 and early.headers["Retry-After"] == "5"
    assert (first, same, moved) == ((True, "1"), False, True)
    assert versions(models) == {"champion": "2"} and shelf.fetched == ["1", "2"]
    assert models.get("m").identity["version"] == "2" and models.get("m").identity["bundle"] == "digest of 2"


def test_threads_that_read_the_champion_find_one_while_it_is_exchanged(server):
    models, shelf = server(champion="1")
    removed = []

    class Versions(dict):
        def pop(self, alias, *default):
            removed.append(alias)
            return super().pop(alias, *default)

        def __delitem__(self, alias):
            removed.append(alias)
            super().__delitem__(alias)

    async def swap():
        await models.refresh("m")
        models.served["m"].versions = Versions(models.served["m"].versions)
        shelf.aliases[CHAMPION] = "2"
        await models.refresh("m")

    asyncio.run(swap())
    assert versions(models) == {"champion": "2"} and removed == []


def test_the_old_version_answers_to_the_end_and_then_its_memory_goes(server, images):
    models, shelf = server(champion="1")
    upload = Upload(images[0])

    async def answered(live):
        item = live.handler.prepare(upload)
        return (await live("image", item)).threshold

    async def swap():
        await models.refresh("m")
        network = weakref.ref(models.get("m").handler.networks["image"].__self__)
        weights = weakref.ref(next(network().network.parameters()))
        gc.collect()
        gc.disable()
        try:
            old = models.get("m")
            shelf.aliases[CHAMPION] = "2"
            await models.refresh("m")
            found, alive = (await answered(old), await answered(models.get("m"))), network() is not None
            del old
            await asyncio.sleep(0)
            return found, alive, network() is None and weights() is None
        finally:
            gc.enable()

    (before, after), alive, is_gone = asyncio.run(swap())
    assert before != after and alive and is_gone


def test_a_version_that_refers_to_itself_goes_at_the_next_look(server):
    models, shelf = server(champion="1")

    async def swap():
        await models.refresh("m")
        live = models.get("m")
        live.handler.itself = live.handler
        handler, live = weakref.ref(live.handler), None
        shelf.aliases[CHAMPION] = "2"
        gc.collect()
        gc.disable()
        try:
            await models.refresh("m")
            before = handler() is not None
            await models.refresh("m")
            return before, handler() is None
        finally:
            gc.enable()

    assert asyncio.run(swap()) == (True, True)


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        ("3", "does not answer as it did when it was made"),
        ("4", "is damaged"),
        ("5", "RuntimeError"),
        (None, "there is no such version"),
    ],
)
def test_the_old_version_stays_where_the_new_one_cannot_be_used(server, broken, reason):
    told = []
    models, shelf = server(champion="1", told=lambda event, model, **what: told.append((event, what.get("reason", ""))))
    shelf.bundles |= {"4": UserError("model.safetensors is damaged"), "5": RuntimeError("of patient Kim")}

    async def move():
        await models.refresh("m")
        shelf.aliases[CHAMPION] = broken
        return [await models.refresh("m") for _ in range(3)]

    assert asyncio.run(move()) == [False] * 3
    state = models.state()["m"]
    assert state["ready"] and state["versions"] == {"champion": "1"} and reason in state["refused"]["champion"]
    assert "Kim" not in str(state) and [event for event, _ in told] == ["loaded", "refused"] and reason in told[1][1]


def test_what_was_refused_is_tried_again_later_or_when_somebody_asks(server, bundles, monkeypatch):
    models, shelf = server(champion="1")
    shelf.bundles["2"] = UserError("damaged")

    async def move():
        await models.refresh("m")
        shelf.aliases[CHAMPION] = "2"
        for _ in range(3):
            await models.refresh("m")
        once = list(shelf.fetched)
        assert models.look("another") == [] and models.look("shelf") == ["m"]
        await models.refresh("m")
        again = list(shelf.fetched)
        monkeypatch.setattr("time.monotonic", lambda: 1e9)
        shelf.bundles["2"] = bundles["2"]
        return once, again, await models.refresh("m")

    once, again, later = asyncio.run(move())
    assert once == ["1", "2"] and again == ["1", "2", "2"] and later
    assert versions(models) == {"champion": "2"} and models.state()["m"]["refused"] == {}


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (UserError("damaged"), [30, 60, 120, 240, 480, 960, 1920, 3600, 3600]),
        (Unreachable("the store does not answer"), [30] * 9),
        (ConnectionError("the store does not answer"), [30] * 9),
        (torch.OutOfMemoryError("the device is full"), [30] * 9),
    ],
)
def test_pauses_grow_where_the_bundle_is_bad_itself(server, error, expected):
    models, shelf = server(champion="9")
    shelf.bundles["9"] = error

    async def tries():
        pauses = []
        for _ in expected:
            await models.refresh("m")
            refusal = models.served["m"].refused[CHAMPION]
            pauses.append(refusal.pause)
            models.served["m"].refused[CHAMPION] = replace(refusal, until=0.0)
        return pauses

    assert asyncio.run(tries()) == expected


def test_a_registry_that_is_gone_changes_nothing_and_tells_no_password(server):
    models, shelf = server(champion="1")

    async def go():
        await models.refresh("m")
        shelf.down = True
        await models.refresh("m")
        refused = dict(models.state()["m"]["refused"])
        shelf.down = False
        await models.refresh("m")
        return refused

    assert asyncio.run(go()) == {"champion": "ConnectionError"}
    assert versions(models) == {"champion": "1"} and models.state()["m"]["refused"] == {}


def test_somebody_who_says_that_an_alias_moved_is_believed_at_once(server):
    models, shelf = server(champion="1")

    async def follow():
        await models.refresh("m")
        following = asyncio.create_task(models.follow("m", 3600))
        await asyncio.sleep(0)
        shelf.aliases[CHAMPION] = "2"
        models.look("shelf")
        async with asyncio.timeout(20):
            while versions(models) != {"champion": "2"}:
                await asyncio.sleep(0.01)
        following.cancel()

    asyncio.run(follow())


def test_a_patient_is_always_answered_by_the_same_version_and_the_share_is_kept(server):
    models, _ = server(0.2, champion="1", challenger="2")
    asyncio.run(models.refresh("m"))
    assert versions(models) == {"champion": "1", "challenger": "2"} and models.is_shared("m")
    patients = [f"P{i}" for i in range(4000)]
    of = [models.get("m", patient).origin.version for patient in patients]
    assert of == [models.get("m", patient).origin.version for patient in patients]
    assert 0.2 == pytest.approx(of.count("2") / len(of), abs=3 * np.sqrt(0.2 * 0.8 / len(of)))
    assert {models.get("m").origin.version for _ in range(50)} == {"1"}


def test_a_larger_share_takes_patients_in_and_lets_none_go():
    patients = [f"P{i}" for i in range(2000)]
    shares = [{p for p in patients if is_in_share("m", p, share)} for share in (0, 0.1, 0.3, 1)]
    assert shares[0] == set() and shares[1] < shares[2] < shares[3] == set(patients)
    others = {p for p in patients if is_in_share("other", p, 0.3)}
    assert 0.3 == pytest.approx(len(others & shares[2]) / len(shares[2]), abs=0.06)  # models share out independently


def test_a_challenger_that_is_no_more_answers_nobody_and_one_that_wins_is_not_loaded_twice(server):
    models, shelf = server(1.0, champion="1", challenger="2")

    async def win():
        await models.refresh("m")
        challenger = models.get("m", "P1")
        shelf.aliases = {CHAMPION: "2"}
        await models.refresh("m")
        return challenger is models.get("m", "P1"), versions(models)

    assert asyncio.run(win()) == (True, {"champion": "2"})
    assert shelf.fetched == ["1", "2"] and not models.is_shared("m")


def test_a_challenger_that_cannot_be_used_leaves_all_to_the_champion(server):
    models, _ = server(1.0, champion="1", challenger="3")
    asyncio.run(models.refresh("m"))
    assert models.get("m", "P1").origin.version == "1"
    state = models.state()["m"]
    assert state["ready"] and list(state["refused"]) == [CHALLENGER]


def test_answers_go_on_while_a_version_is_fetched_and_loaded(server, images):
    models, shelf = server(champion="1")
    fetching, go = threading.Event(), threading.Event()
    fetch = shelf.fetch

    def slow(origin):
        fetching.set()
        assert go.wait(20)
        return fetch(origin)

    async def answer_during():
        await models.refresh("m")
        shelf.aliases[CHAMPION], shelf.fetch = "2", slow
        refreshing = asyncio.create_task(models.refresh("m"))
        await asyncio.to_thread(fetching.wait, 20)
        live = models.get("m")
        item = live.handler.prepare(Upload(images[0]))
        answers = [await live("image", item) for _ in range(3)]
        version = live.origin.version
        go.set()
        return answers, version, await refreshing

    answers, version, changed = asyncio.run(answer_during())
    assert len(answers) == 3 and version == "1" and changed and versions(models) == {"champion": "2"}


def test_a_full_device_refuses_the_new_version_only(server, monkeypatch):
    models, shelf = server(champion="1")

    async def move():
        await models.refresh("m")
        shelf.aliases[CHAMPION] = "2"

        def full(*_):
            raise torch.OutOfMemoryError

        monkeypatch.setattr("raymed.serve.models.load_live", full)
        return await models.refresh("m")

    assert asyncio.run(move()) is False
    assert versions(models) == {"champion": "1"}
    assert models.state()["m"]["refused"] == {"champion": "OutOfMemoryError"}
