"""Who is let in, how often and with how much; what is written down of it, and what is not."""

import asyncio
import json
import threading
import uuid

import pytest
from fastapi import Response
from fastapi.testclient import TestClient
from waiting import until

from raymed.config import UserError
from raymed.serve.access import tokens as tokens_module
from raymed.serve.access.body import Body
from raymed.serve.access.limits import Rates
from raymed.serve.access.tokens import add_token, revoke_token
from raymed.serve.app import create_app
from raymed.serve.config import Limits
from raymed.serve.problems import Problem

NAME = "MUSTER^ANNA"
PREDICT = "/v1/models/hsg:predict"


@pytest.fixture
def lines(capfd):
    """lines() -> what the server has written since it was asked last, one dictionary a line, and the text itself."""

    def read():
        text = capfd.readouterr().err
        return [json.loads(line) for line in text.splitlines() if line.startswith("{")], text

    return read


@pytest.fixture
def guarded(app_config, tmp_path, monkeypatch):
    """guarded(**changes) -> a started server, and headers with the token of pacs, and with that of ward."""
    monkeypatch.setattr(tokens_module, "_LOOK_S", 0.0)
    file = tmp_path / "tokens.json"
    bearers = [{"Authorization": f"Bearer {add_token(file, name, 3)}"} for name in ("pacs", "ward")]
    clients = []

    def start(**changes):
        changes = {"access.open": False, "access.tokens": str(file)} | changes
        clients.append(TestClient(create_app(app_config(**changes))).__enter__())
        return clients[-1], *bearers

    start.file = file
    yield start
    for client in clients:
        client.__exit__(None, None, None)


def test_a_request_has_a_number(client):
    made = {client.get("/healthz").headers["X-Request-Id"] for _ in range(3)}
    assert len(made) == 3 and all(len(number) == 32 for number in made)
    given = str(uuid.uuid4())
    found = client.get("/v1/models/none", headers={"X-Request-Id": given})
    assert found.headers["X-Request-Id"] == given == found.json()["request"]
    for foreign in ("ACC-1234567", "4711", "x" * 36, f"{given}\t1", ""):
        assert client.get("/healthz", headers={"X-Request-Id": foreign}).headers["X-Request-Id"] not in ("", foreign)


def test_a_line_of_the_log_names_route_and_caller_but_no_patient(guarded, png, lines):
    client, pacs, _ = guarded()
    lines()
    sent = client.post(
        f"{PREDICT}?explain=",
        files={"file": (f"{NAME}.png", png, "image/png")},
        data={f"{NAME}": NAME},
        headers=pacs | {"X-Patient": NAME, "User-Agent": NAME, "Referer": f"http://x/{NAME}"},
    )
    assert sent.status_code == 422
    good = client.post(PREDICT, content=png, headers=pacs | {"X-Patient": NAME})
    client.get(f"/{NAME}", headers=pacs)
    client.get(f"/v1/models/{NAME}", headers=pacs)
    found, text = lines()
    assert NAME not in text and pacs["Authorization"][-20:] not in text
    assert [(line["status"], line["route"]) for line in found] == [
        (422, "/v1/models/{name}:predict"),
        (200, "/v1/models/{name}:predict"),
        (404, ""),
        (404, "/v1/models/{name}"),
    ]
    line = found[1]
    assert line["id"] == good.headers["X-Request-Id"] and line["method"] == "POST"
    assert (line["caller"], line["model"]) == ("pacs", "hsg")
    assert (line["received"], line["sent"]) == (len(png), len(good.content))
    assert 0 < line["ms"] < 10_000
    assert "decision" not in line and "probability" not in text


def test_an_unexpected_exception_leaves_without_its_text(app_config, lines):
    app = create_app(app_config())

    @app.get("/fails")
    async def fails() -> None:
        raise ValueError(NAME)

    with TestClient(app) as client:
        found = client.get("/fails")
    assert found.status_code == 500 and found.headers["content-type"] == "application/problem+json"
    assert NAME not in found.text and found.json()["request"] == found.headers["X-Request-Id"]
    told, text = lines()
    failed = next(line for line in told if line.get("event") == "failed")
    assert NAME not in text and "Traceback" not in text
    assert failed["error"] == "ValueError" and failed["id"] == found.headers["X-Request-Id"]
    assert "test_access.py" in failed["where"][-1] and failed["where"][-1].endswith(" fails")


def test_security_headers_stand_on_every_answer(guarded):
    client, pacs, _ = guarded()
    client.app.add_api_route("/cached", lambda: Response(headers={"Cache-Control": "max-age=60"}))
    answers = [client.get("/healthz"), client.get("/v1/models"), client.get("/nothing", headers=pacs)]
    assert [found.status_code for found in answers] == [200, 401, 404]
    for found in answers:
        policy = found.headers["Content-Security-Policy"]
        assert "default-src 'self'" in policy and "frame-ancestors 'none'" in policy and "unsafe" not in policy
        assert found.headers["X-Content-Type-Options"] == "nosniff"
        assert found.headers["Referrer-Policy"] == "no-referrer"
        assert found.headers["Cache-Control"] == "no-store"
        assert "server" not in found.headers
    assert client.get("/cached", headers=pacs).headers.get_list("Cache-Control") == ["max-age=60"]


def test_pages_of_other_origins_get_nothing(client, png):
    there = {"Origin": "https://elsewhere.example"}
    asked = there | {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    for found in (client.options(PREDICT, headers=asked), client.get("/healthz", headers=there)):
        assert not [name for name in found.headers if name.startswith("access-control")]
    assert client.post(PREDICT, content=png, headers=there).status_code == 403
    for site in ("cross-site", "same-site"):
        assert client.post(PREDICT, content=png, headers={"Sec-Fetch-Site": site}).status_code == 403
    for own in ({"Sec-Fetch-Site": "same-origin"} | there, {"Origin": "http://testserver"}, {"Sec-Fetch-Site": "none"}):
        assert client.post(PREDICT, content=png, headers=own).status_code == 200


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:8000", 200),
        ("[::1]:8000", 200),
        ("localhost", 200),
        ("TESTSERVER:80", 200),
        ("192.168.4.7", 200),
        ("elsewhere.example", 400),
        ("testserver.elsewhere.example", 400),
        ("elsewhere.testserver", 400),
        ("elsewheretestserver", 400),
        ("127.0.0.1.elsewhere.example", 400),
        ("elsewhere.example@testserver.x", 400),
        ("[::1", 400),
        ("", 400),
        ("t\xe4st", 400),
    ],
)
def test_other_hosts_are_refused(client, host, status):
    found = client.get("/healthz", headers={"Host": host.encode("latin-1")})
    assert found.status_code == status
    assert status == 200 or ("--access.hosts" in found.json()["detail"] and "elsewhere" not in found.text)


def test_a_token_opens_what_is_closed(guarded, png):
    client, pacs, _ = guarded()
    assert [client.get(path).status_code for path in ("/healthz", "/readyz")] == [200, 200]
    closed = ["/v1/models", "/metrics", "/statusz", "/openapi.json", "/nothing", "/healthz/", "/healthzz", "/pages"]
    for path in closed:
        found = client.get(path, follow_redirects=False)
        assert found.status_code == 401 and found.headers["WWW-Authenticate"] == "Bearer", path
        assert found.json()["field"] == "Authorization"
    for path in ("/page/../v1/models", "/page/..%2fv1/models", "/page/%2e%2e/%2e%2e/v1/models", "/page//v1/models"):
        assert client.get(path, follow_redirects=False).status_code in (401, 404), path
    assert client.post(PREDICT, content=png).status_code == 401
    assert client.post(PREDICT, content=png, headers=pacs).status_code == 200
    right = pacs["Authorization"].split()[1]
    for wrong in ("Bearer", "Bearer x", f"Basic {right}", right, f"Bearer {right[:-1]}", f"Bearer {right} {right}"):
        assert client.get("/v1/models", headers={"Authorization": wrong}).status_code == 401, wrong
    again = client.get("/v1/models", headers={"Authorization": "Bearer x"})
    assert again.headers["WWW-Authenticate"] == 'Bearer error="invalid_token"'
    assert client.get("/v1/models", headers={"Authorization": f"bearer  {right}"}).status_code == 200
    assert client.get(f"/v1/models?token={right}").status_code == 401


def test_readiness_tells_nobody_where_anything_lies(guarded, tmp_path, lines):
    client, pacs, _ = guarded(models=(f"hsg={tmp_path}/secret/place",))
    told, _ = lines()
    ready = client.get("/readyz")
    assert ready.status_code == 503
    assert ready.json() == {"hsg": {"ready": False, "versions": {}, "refused": ["champion"]}}
    assert client.get("/statusz").status_code == 401
    (reason,) = client.get("/statusz", headers=pacs).json()["hsg"]["refused"].values()
    assert reason == f"there is no {tmp_path}/secret/place"
    assert reason in [line.get("reason") for line in told]


def test_a_revoked_token_is_refused_without_a_restart(guarded):
    client, pacs, ward = guarded()
    assert client.get("/v1/models", headers=pacs).status_code == 200
    revoke_token(guarded.file, "pacs")
    assert client.get("/v1/models", headers=pacs).status_code == 401
    assert client.get("/v1/models", headers=ward).status_code == 200


def test_no_server_without_tokens(app_config, tmp_path):
    with pytest.raises(UserError, match=r"serve_tokens.py add NAME.*--access.open"):
        create_app(app_config(**{"access.open": False, "storage": str(tmp_path)}))


def test_a_rate_refills(monkeypatch):
    now = [0.0]
    rates = Rates(per_minute=6, at_once=9, clock=lambda: now[0])

    def ask(name="pacs"):
        with rates.place(name):
            pass

    for _ in range(6):
        ask()
    with pytest.raises(Problem) as refused:
        ask()
    assert refused.value.status == 429 and refused.value.headers == {"Retry-After": "10"}
    ask("ward")
    now[0] = 9.9
    with pytest.raises(Problem) as refused:
        ask()
    assert refused.value.headers == {"Retry-After": "1"}
    now[0] = 10.1
    ask()
    now[0] = 1000.0
    for _ in range(6):
        ask()
    with pytest.raises(Problem):
        ask()


def test_a_caller_has_so_many_places(monkeypatch):
    rates = Rates(per_minute=100, at_once=2)
    with rates.place("pacs"), rates.place("pacs"), rates.place("ward"):
        with pytest.raises(Problem, match="2 requests of yours"):
            rates.place("pacs").__enter__()
    with pytest.raises(KeyError), rates.place("pacs"):
        raise KeyError
    with rates.place("pacs"), rates.place("pacs"):
        pass


def test_who_asks_too_often_waits_and_others_do_not(guarded):
    client, pacs, ward = guarded(**{"limits.per_minute": 2})
    found = [client.get("/v1/models", headers=pacs) for _ in range(3)]
    assert [each.status_code for each in found] == [200, 200, 429]
    assert 1 <= int(found[-1].headers["Retry-After"]) <= 31
    assert found[-1].json()["title"] == "too many requests"
    assert client.get("/v1/models", headers=ward).status_code == 200
    assert client.get("/healthz").status_code == 200


def test_who_asks_too_much_at_once_waits(guarded, png):
    client, pacs, ward = guarded(**{"limits.at_once": 1})
    engine, go = client.app.state.service.engine, threading.Event()
    engine._thread.submit(go.wait, 20)
    first: list[int] = []
    asking = threading.Thread(target=lambda: first.append(client.post(PREDICT, content=png, headers=pacs).status_code))
    asking.start()
    until(lambda: engine.waiting.get("hsg"))
    second = client.get("/v1/models", headers=pacs)
    other = client.get("/v1/models", headers=ward)
    go.set()
    asking.join(20)
    assert (second.status_code, other.status_code, first) == (429, 200, [200])
    assert client.get("/v1/models", headers=pacs).status_code == 200


def test_who_fills_his_part_of_the_queue_waits_and_others_do_not(guarded, png):
    client, pacs, ward = guarded(**{"limits.queue": 64})
    engine, go = client.app.state.service.engine, threading.Event()
    engine._thread.submit(go.wait, 20)
    found: dict[str, int] = {}

    def ask(name, headers, images):
        found[name] = client.post(PREDICT, files=[("file", png)] * images, headers=headers).status_code

    asking = [threading.Thread(target=ask, args=each) for each in (("large", pacs, 32), ("small", ward, 2))]
    for count, thread in zip((32, 34), asking, strict=True):
        thread.start()
        until(lambda count=count: engine.waiting.get("hsg") == count)
    refused = client.post(PREDICT, content=png, headers=pacs)
    assert refused.status_code == 429 and refused.headers["Retry-After"] == "1"
    go.set()
    for thread in asking:
        thread.join(20)
    assert found == {"large": 200, "small": 200}
    assert client.post(PREDICT, content=png, headers=pacs).status_code == 200


def through_body(messages, headers=(), path=PREDICT, most=100):
    """What the app behind `Body` was given of a request whose pieces are these; how many of them were taken."""
    got, taken = [], []
    limits = Limits(body_bytes=most, read_s=0.2)

    async def app(scope, receive, send):
        got.append((await receive())["body"])

    async def receive():
        if not messages:
            await asyncio.sleep(60)
        taken.append(messages.pop(0))
        return taken[-1]

    async def send(message):
        raise AssertionError

    scope = {"type": "http", "method": "POST", "path": path, "headers": list(headers)}
    try:
        asyncio.run(Body(app, limits)(scope, receive, send))
        return got, len(taken)
    except Problem as problem:
        return problem.status, len(taken)


def piece(size, more=True):
    return {"type": "http.request", "body": b"x" * size, "more_body": more}


def test_a_body_that_says_it_is_too_large_is_not_read():
    assert through_body([piece(101, False)], headers=[(b"content-length", b"101")]) == (413, 0)
    assert through_body([piece(100, False)], headers=[(b"content-length", b"100")]) == ([b"x" * 100], 1)


def test_a_body_that_does_not_say_is_read_up_to_its_limit():
    streamed = [(b"transfer-encoding", b"chunked")]
    assert through_body([piece(60), piece(60), piece(60), piece(1, False)], headers=streamed) == (413, 2)
    assert through_body([piece(60), piece(0), piece(40, False)], headers=streamed) == ([b"x" * 100], 3)


def test_what_only_says_what_is_to_be_done_is_short():
    size, streamed = 2**16 + 1, [(b"transfer-encoding", b"chunked")]
    declared = [(b"content-length", str(size).encode())]
    for path in ("/v1/jobs", "/v1/jobs/"):
        assert through_body([piece(size, False)], declared, path, 2**20) == (413, 0), "none of it is read"
        assert through_body([piece(2**16), piece(1), piece(1)], streamed, path, 2**20) == (413, 2)
        assert through_body([piece(2**16, False)], streamed, path, 2**20)[0] == [b"x" * 2**16]
    assert through_body([piece(size, False)], declared, PREDICT, 2**20)[0] == [b"x" * size]


def test_a_body_that_pauses_or_a_client_that_leaves():
    streamed = [(b"transfer-encoding", b"chunked")]
    assert through_body([piece(60)], headers=streamed) == (408, 1)
    assert through_body([piece(60), {"type": "http.disconnect"}], headers=streamed) == ([], 2)


def test_a_get_is_not_held_up():
    async def app(scope, receive, send):
        assert receive is given

    async def given():
        raise AssertionError

    asyncio.run(Body(app, Limits())({"type": "http", "method": "GET", "path": "/", "headers": []}, given, given))


def test_who_needs_no_token_brings_little(guarded, app_config):
    client, pacs, _ = guarded()
    much = b"x" * 2**17
    assert client.post("/healthz", content=much).status_code == 413
    assert client.post("/healthz", content=much[:100]).status_code == 405
    assert client.post(PREDICT, content=much, headers=pacs).status_code == 415


def test_all_bodies_together_are_bounded():
    streamed = {"type": "http", "method": "POST", "path": PREDICT, "headers": [(b"transfer-encoding", b"chunked")]}
    body = Body(lambda *_: asyncio.sleep(0), Limits(body_bytes=100, read_s=10))

    async def ask(pieces):
        await body(streamed, pieces.get, lambda message: asyncio.sleep(0))

    async def all_of_them():
        waiting: list[asyncio.Queue] = [asyncio.Queue() for _ in range(17)]
        asking = [asyncio.create_task(ask(pieces)) for pieces in waiting]
        for pieces in waiting:
            pieces.put_nowait(piece(99))
        (refused,), others = await asyncio.wait(asking, return_when=asyncio.FIRST_COMPLETED)
        for pieces in waiting:
            pieces.put_nowait(piece(1, False))
        await asyncio.wait(others)
        await ask(waiting[-1])
        return refused.exception(), [task.exception() for task in others]

    refused, others = asyncio.run(all_of_them())
    assert refused.status == 503 and "Retry-After" in refused.headers
    assert others == [None] * 16
