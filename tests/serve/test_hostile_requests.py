"""Small requests that would stop the server, or take its memory, if it let them."""

import json
import socket
import time

import pytest

from raymed.serve.config import Limits


def test_a_charset_that_is_slow_to_read_is_refused_at_once(client):
    body = b'--b\r\nContent-Disposition: form-data; name="x"\r\n\r\n' + b"a" * 200_000 + b"\r\n--b--\r\n"
    started = time.process_time()
    answer = client.post(
        "/v1/models/hsg:predict",
        content=body,
        headers={"Content-Type": "multipart/form-data; boundary=b; charset=punycode"},
    )
    assert answer.status_code == 422 and "UTF-8" in answer.json()["detail"]
    assert time.process_time() - started < 2


@pytest.mark.parametrize(
    "body",
    [{"frames": ["a"] * 90_000}, {f"x{i}": 0 for i in range(90_000)}, {"x": [[]] * 150_000}],
    ids=["frames", "fields", "values"],
)
def test_a_body_of_many_values_is_refused_before_each_is_told(client, body):
    started = time.process_time()
    answer = client.post(
        "/v1/models/hsg:predict", content=json.dumps(body), headers={"Content-Type": "application/json"}
    )
    assert answer.status_code in (413, 422) and len(answer.content) < 1000
    assert time.process_time() - started < 1


@pytest.mark.parametrize(
    ("body", "status", "why"),
    [
        (b"&".join(b"x%d=" % i for i in range(65)), 413, "at most 64 fields, all of them 1024 KiB"),
        (b"&" * 10**7, 413, "at most 64 fields"),
        (b"explain=" + b"%41" * 350_000, 413, "at most 64 fields, all of them 1024 KiB"),
        (b"&".join([b"explain=" + b"%41" * 5000] * 64), 422, "expected"),
        (b"explain=%ff%fe", 422, "application/x-www-form-urlencoded in UTF-8 is expected"),
        (b"explain=%ed%a0%80", 422, "application/x-www-form-urlencoded in UTF-8 is expected"),
        (b"%5F%5Fclass%5F%5F%00=1", 422, "names of letters, digits and _"),
        (b"=", 422, "names of letters, digits and _"),
        (b"a=%00&frames=" + b"[" * 10**5, 422, "expected"),
        (b"explain=ig", 422, "a file is expected"),
        (b"\xffexplain=ig", 415, "PNG"),
    ],
)
def test_a_plain_form_is_bounded_as_others_are(client, body, status, why):
    headers, started = {"Content-Type": "application/x-www-form-urlencoded"}, time.process_time()
    answer = client.post("/v1/models/hsg:predict", content=body, headers=headers)
    assert answer.status_code == status and why in answer.json()["detail"] and len(answer.content) < 1000
    assert time.process_time() - started < 1


def test_a_plain_form_is_read_in_utf_8_alone(client, png):
    """An image that is called one, as by curl --data-binary, is an image."""
    kind = "application/x-www-form-urlencoded"
    slow = client.post("/v1/models/hsg:predict", content=b"x=1", headers={"Content-Type": f"{kind}; charset=punycode"})
    assert slow.status_code == 422 and "UTF-8" in slow.json()["detail"]
    assert client.post("/v1/models/hsg:predict", content=png, headers={"Content-Type": kind}).status_code == 200


@pytest.mark.parametrize("origin", ["http://[", "http://\udcff".encode("utf-8", "surrogateescape")])
def test_an_origin_that_is_none_is_foreign(client, png, origin):
    answer = client.post("/v1/models/hsg:predict", content=png, headers={"Origin": origin})
    assert answer.status_code == 403


def test_a_shape_beyond_all_numbers_is_refused(client):
    tensor = {"name": "image", "datatype": "BYTES", "shape": [0, 2**64 - 1], "parameters": {"binary_data_size": 0}}
    head = json.dumps({"inputs": [tensor]}).encode()
    length = {"Inference-Header-Content-Length": str(len(head))}
    answer = client.post("/v2/models/hsg/infer", content=head, headers=length)
    assert answer.status_code == 422


def test_lines_after_a_chunked_body_have_an_end(served, app_config):
    """Without a token: they would all be kept."""
    address, _ = served(app_config())
    host, port = address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        connection.sendall(b"POST /v1/models HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n")
        sent = 0
        with pytest.raises(OSError):  # closed by the server
            while sent < 200_000_000:
                sent += connection.send(b"a:b\r\n" * 10_000)
    assert sent < 50_000_000


def test_bodies_of_one_caller_leave_room_for_others():
    """A quarter of what all may hold is for one."""
    from raymed.serve.access.body import _HELD, Body
    from raymed.serve.problems import Problem

    limits = Limits(body_bytes=1000, read_s=5)
    taken: list = []

    async def drive():
        import asyncio

        body = Body(lambda *_: asyncio.sleep(0), limits)  # type: ignore[arg-type]
        waiting = asyncio.Event()

        def client(name):
            first = True

            async def receive():
                nonlocal first
                if first:
                    first = False
                    return {"type": "http.request", "body": b"x" * 900, "more_body": True}
                await waiting.wait()
                return {"type": "http.disconnect"}

            chunked = [(b"transfer-encoding", b"chunked")]
            scope = {"type": "http", "path": "/v1/models/m:predict", "headers": chunked, "caller": name}
            return asyncio.create_task(body(scope, receive, None))  # type: ignore[arg-type]

        greedy = [client("greedy") for _ in range(_HELD)]
        other = client("ward")
        await asyncio.sleep(0.05)
        taken.extend(task.exception() for task in greedy if task.done())
        assert not other.done()
        waiting.set()
        await asyncio.gather(*greedy, other, return_exceptions=True)
        assert body._held == 0 and not body._of

    import asyncio

    asyncio.run(drive())
    assert len(taken) == _HELD - _HELD * 1000 // 4 // 900
    assert all(isinstance(problem, Problem) and problem.status == 429 for problem in taken)
