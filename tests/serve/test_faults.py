"""What befalls a server with real sockets: a device that hangs, a crowd, clients that are slow or leave, and its own
death. Whoever can be answered is, and whoever cannot is told when to come again."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import pytest
from waiting import until

JOBS = Path(__file__).resolve().parents[2] / "jobs"
PREDICT = "/v1/models/hsg:predict"
CROWD = 200


@contextmanager
def hanging(app):
    """The device's thread does something that does not end before the block does."""
    go = threading.Event()
    running = app.state.service.engine._thread.submit(go.wait)
    until(running.running)
    try:
        yield
    finally:
        go.set()


def is_at_rest(app) -> bool:
    """Nothing waits, and no pixels are held."""
    service = app.state.service
    return not any(service.engine.waiting.values()) and service.room.free == service.room.pixels


def head(length: int) -> bytes:
    return f"POST {PREDICT} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {length}\r\n\r\n".encode()


def dialled(address: str) -> socket.socket:
    """A connection to a server."""
    host, port = address.removeprefix("http://").split(":")
    made = socket.create_connection((host, int(port)), timeout=20)
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return made


def test_a_device_that_hangs_is_told_of_in_time_and_the_rest_of_the_server_goes_on(served, app_config, png):
    address, app = served(app_config(**{"limits.timeout_s": 0.5}))
    with httpx.Client(base_url=address, timeout=20) as client:
        with hanging(app), ThreadPoolExecutor(8) as others:
            asked = [others.submit(client.post, PREDICT, content=png) for _ in range(8)]
            assert client.get("/healthz").status_code == client.get("/v1/models/hsg").status_code == 200
            for answer in (each.result() for each in asked):
                assert answer.status_code == 503 and answer.headers["retry-after"] == "2"
                assert "0.5 s" in answer.json()["detail"]
            until(lambda: is_at_rest(app))
        assert client.post(PREDICT, content=png).status_code == 200


def test_a_server_whose_device_hangs_or_fails_is_not_ready_until_it_computes_again(
    served, app_config, monkeypatch, capfd
):
    monkeypatch.setattr("raymed.serve.service._CHECK_S", 0.01)
    address, app = served(app_config(**{"limits.timeout_s": 0.2}))
    engine, paths = app.state.service.engine, ("/readyz", "/v2/health/ready", "/v2/models/hsg/ready")
    with httpx.Client(base_url=address, timeout=20) as client:

        def all_are(status: int) -> bool:
            return [client.get(path).status_code for path in paths] == [status] * 3

        until(lambda: all_are(200))
        with hanging(app):
            until(lambda: all_are(503))
            assert client.get("/healthz").status_code == client.get("/v1/models/hsg").status_code == 200
            found = client.get("/readyz").json()["hsg"]
            assert not found["ready"] and found["versions"]
            assert not client.get("/statusz").json()["hsg"]["ready"]
            assert 'raymed_ready{model="hsg"} 0.0' in client.get("/metrics").text
        until(lambda: all_are(200))
        device, engine.device = engine.device, "cuda:99"
        until(lambda: all_are(503))
        engine.device = device
        until(lambda: all_are(200))
    events = [event for event in capfd.readouterr().err.splitlines() if '"event": "the device' in event]
    assert len(events) == 4 and '"error": "TimeoutError"' in events[0]


def test_of_a_crowd_as_many_are_answered_as_may_wait_and_the_others_told_to_come_again(served, app_config, png):
    places = 16
    address, app = served(app_config(**{"limits.queue": places}))
    answers: list[httpx.Response] = []

    async def crowd():
        limits = httpx.Limits(max_connections=CROWD)
        async with httpx.AsyncClient(base_url=address, timeout=60, limits=limits) as client:
            for coming in asyncio.as_completed([client.post(PREDICT, content=png) for _ in range(CROWD)]):
                answers.append(await coming)

    with ThreadPoolExecutor(1) as other:
        with hanging(app):
            crowded = other.submit(asyncio.run, crowd())
            until(lambda: len(answers) == CROWD - places or crowded.done(), 60)
            assert app.state.service.engine.waiting == {"hsg": places}
            assert all(answer.status_code == 503 and answer.headers["retry-after"] == "1" for answer in answers)
        crowded.result()
    assert Counter(answer.status_code for answer in answers) == {200: places, 503: CROWD - places}
    found = [answer.json()["result"]["probability"] for answer in answers if answer.status_code == 200]
    assert max(found) - min(found) < 1e-6
    assert is_at_rest(app)


def test_many_slow_clients_are_answered_and_cost_others_nothing(served, app_config, png):
    """Sixteen send their image in a hundred pieces, for a second, and read the answer byte by byte."""
    address, app = served(app_config())
    pieces = [png[start : start + len(png) // 100 + 1] for start in range(0, len(png), len(png) // 100 + 1)]

    def slowly() -> bytes:
        with dialled(address) as connection:
            connection.sendall(head(len(png)))
            for piece in pieces:
                connection.sendall(piece)
                time.sleep(0.01)
            found = b""
            while not found.endswith(b"}}"):
                found += connection.recv(1)
            return found

    with ThreadPoolExecutor(16) as others, httpx.Client(base_url=address) as client:
        slow = [others.submit(slowly) for _ in range(16)]
        num_fast = 0
        while not any(each.done() for each in slow):
            assert client.post(PREDICT, content=png).status_code == 200
            num_fast += 1
        assert all(each.result().startswith(b"HTTP/1.1 200") for each in slow)
    assert num_fast >= 5
    assert is_at_rest(app)


def test_clients_that_leave_in_the_middle_of_a_body_or_before_the_answer_leave_nothing_behind(served, app_config, png):
    address, app = served(app_config())
    engine, seen = app.state.service.engine, []
    engine.observe = lambda *what: seen.append(what)
    with httpx.Client(base_url=address) as client:
        with hanging(app):
            with ExitStack() as connections:
                for number in range(40):
                    connection = connections.enter_context(dialled(address))
                    connection.sendall(head(len(png)) + (png if number % 2 else png[: len(png) // 2]))
                until(lambda: engine.waiting.get("hsg") == 20)
            until(lambda: is_at_rest(app))
        assert client.post(PREDICT, content=png).status_code == 200
        assert 'status="499"} 40.0' in client.get("/metrics").text
    computed = [size for stage, _, _, size in seen if stage == "network"]
    assert computed == [1, 1], "the first, which the device had been given, and the last: nothing for those who left"
    assert is_at_rest(app)


STUCK = """
import asyncio, sys, threading
from raymed.serve import engine, run
from raymed.serve.config import Access, ServeConfig

create_app = run.create_app

def create_stuck_app(config):
    app = create_app(config)
    app.state.service.engine._thread.submit(threading.Event().wait)
    return app

run.create_app = create_stuck_app
run._NOTICE_S, engine._END_S = 0.1, 0.5
run.serve(ServeConfig(port=0, access=Access(open=True)))
"""


def test_a_process_whose_device_hangs_still_ends_when_it_is_told_to(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", STUCK], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None and process.stdout.readline().startswith("serving on http://")
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.communicate()


@pytest.mark.slow
def test_a_client_that_tries_again_loses_nothing_when_the_server_is_killed_and_started_again(
    bundle_folder, png, tmp_path
):
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    command = [sys.executable, str(JOBS / "serve_models.py"), "--models", f"hsg={bundle_folder}", "--access.open"]
    command += ["--port", str(port), "--hardware.device", "cpu"]

    def started() -> subprocess.Popen:
        return subprocess.Popen(command, env=os.environ | {"RAYMED_HOME": str(tmp_path)}, stderr=subprocess.DEVNULL)

    answers: list[float] = []
    failures: Counter[str] = Counter()
    enough = threading.Event()

    def ask_on() -> None:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=20) as client:
            while not enough.is_set():
                answers.append(persistent(client, png, failures))

    process = started()
    try:
        with ThreadPoolExecutor(4) as clients:
            asking = [clients.submit(ask_on) for _ in range(4)]
            until(lambda: len(answers) >= 40, 120)
            process.kill()
            process.wait()
            before = len(answers)
            process = started()
            until(lambda: len(answers) >= before + 40, 120)
            enough.set()
        assert all(each.exception() is None for each in asking)
    finally:
        enough.set()
        process.kill()
        process.wait()
    assert max(answers) - min(answers) < 1e-6 and failures["TransportError"] >= 4


def persistent(client: httpx.Client, png: bytes, failures: Counter) -> float:
    """As the README's client does: again after a while, where nobody answers or the server says so."""
    end = time.monotonic() + 120
    while time.monotonic() < end:
        try:
            answer = client.post(PREDICT, content=png)
        except httpx.TransportError:
            failures["TransportError"] += 1
            time.sleep(0.2)
            continue
        if answer.status_code == 503:
            failures["503"] += 1
            time.sleep(float(answer.headers["retry-after"]))
            continue
        return answer.raise_for_status().json()["result"]["probability"]
    raise TimeoutError
