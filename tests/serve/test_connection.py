"""Real sockets: slow and endless clients, those that hang up, TLS with certificates on both sides, and the end."""

import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from fastapi.responses import Response, StreamingResponse
from waiting import until

from raymed.config import UserError
from raymed.serve.access.connection import Connection
from raymed.serve.config import Access, ServeConfig
from raymed.serve.run import serve

JOB = str(Path(__file__).resolve().parents[2] / "jobs" / "serve_models.py")
PREDICT = "/v1/models/hsg:predict"


def dialled(address: str) -> socket.socket:
    """A connection to a server."""
    host, port = address.removeprefix("http://").split(":")
    made = socket.create_connection((host, int(port)), timeout=20)
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return made


def head(length: int, path: str = PREDICT) -> bytes:
    return f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {length}\r\n\r\n".encode()


def to_the_end(connection: socket.socket) -> bytes:
    """What it still says before it closes."""
    found = b""
    try:
        while piece := connection.recv(65536):
            found += piece
    except ConnectionResetError:
        pass
    return found


def drip(connection: socket.socket, content: bytes, every_s: float) -> float:
    """Send byte by byte until the other side hangs up; returns how long it took."""
    started = time.monotonic()
    for place in range(len(content)):
        try:
            connection.sendall(content[place : place + 1])
            connection.settimeout(every_s)
            if connection.recv(1, socket.MSG_PEEK) is not None:
                break
        except TimeoutError:
            pass
        except OSError:
            break
    connection.settimeout(20)
    return time.monotonic() - started


def test_a_slow_client_is_cut_off_while_others_are_answered(served, app_config, png):
    address, _ = served(app_config(**{"limits.read_s": 0.5}))
    with dialled(address) as slow, httpx.Client(base_url=address) as other:
        slow.sendall(head(len(png)))
        answers: list[int] = []
        done = threading.Event()

        def ask():
            while not done.is_set():
                answers.append(other.post(PREDICT, content=png).status_code)

        asking = threading.Thread(target=ask)
        asking.start()
        took = drip(slow, png, 0.02)
        done.set()
        asking.join(20)
        said = to_the_end(slow)
    assert said.startswith(b"HTTP/1.1 408") and b"connection: close" in said.lower()
    assert 0.4 < took < 5
    assert len(answers) > 3 and set(answers) == {200}


def test_heads_that_do_not_end(served, app_config, monkeypatch):
    monkeypatch.setattr(Connection, "head_s", 0.5)
    address, _ = served(app_config())
    with dialled(address) as silent, dialled(address) as slow:
        assert drip(slow, head(4), 0.05) < 3
        assert to_the_end(silent) == b""
    assert httpx.get(f"{address}/healthz").status_code == 200


def test_a_head_without_end(served, app_config):
    address, _ = served(app_config())
    with dialled(address) as endless:
        sent = 0
        with pytest.raises(OSError):
            endless.sendall(b"GET /healthz HTTP/1.1\r\nHost: ")
            while sent < 2**26:
                endless.sendall(b"x" * 2**16)
                sent += 2**16
        assert sent < 2**24
    assert httpx.get(f"{address}/healthz").status_code == 200


def test_a_kept_connection_outlives_the_time_of_a_head(served, app_config, monkeypatch):
    monkeypatch.setattr(Connection, "head_s", 0.2)
    address, _ = served(app_config())
    with dialled(address) as connection:
        for _ in range(2):
            connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
            assert connection.recv(65536).startswith(b"HTTP/1.1 200")
            connection.settimeout(0.5)
            with pytest.raises(TimeoutError):
                connection.recv(1)


def test_too_large_a_body_is_answered_and_then_thrown_away(served, app_config, monkeypatch):
    monkeypatch.setattr(Connection, "head_s", 0.5)
    address, _ = served(app_config(**{"limits.body_bytes": 2**20}))
    found = httpx.post(f"{address}{PREDICT}", content=b"x" * 2**23)
    assert found.status_code == 413 and found.json()["field"] == "body"
    found = httpx.post(f"{address}{PREDICT}", content=(b"x" * 2**16 for _ in range(128)))
    assert found.status_code == 413
    with dialled(address) as connection:
        connection.sendall(head(2**30) + b"x")
        assert connection.recv(65536).startswith(b"HTTP/1.1 413")
        assert drip(connection, b"x" * 1000, 0.05) < 3


def test_work_for_a_client_that_hangs_up_is_dropped(served, app_config, png):
    address, app = served(app_config())
    service = app.state.service
    engine, go = service.engine, threading.Event()
    engine._thread.submit(go.wait, 20)
    with dialled(address) as waits, dialled(address) as leaves:
        waits.sendall(head(len(png)) + png)
        until(lambda: engine.waiting.get("hsg") == 1)
        leaves.sendall(head(len(png)) + png)
        until(lambda: engine.waiting.get("hsg") == 2)
        leaves.close()
        until(lambda: engine.waiting.get("hsg") == 1)
        go.set()
        assert waits.recv(65536).startswith(b"HTTP/1.1 200")
    counted = {"method": "POST", "route": "/v1/models/{name}:predict"}
    value = service.metrics.registry.get_sample_value
    for status in ("200", "499"):
        labels = counted | {"status": status}
        assert until(lambda labels=labels: value("raymed_requests_total", labels)) == 1
    assert value("raymed_batch_images_sum", {"model": "hsg"}) == 1
    assert value("raymed_queue_images", {"model": "hsg"}) == 0


MUCH = 2**22


@pytest.fixture
def talkative(served, app_config, tmp_path, monkeypatch):
    """address and token of a server that answers one request of a caller at a time, and has much to say at
    /much, in pieces, and at /whole."""
    monkeypatch.setenv("RAYMED_SERVE_TOKEN", "s" * 32)
    monkeypatch.setattr(Connection, "take_s", 0.3)
    monkeypatch.setattr("raymed.serve.access.connection.SLOWEST", 2**24)
    config = app_config(**{"access.open": False, "limits.at_once": 1, "storage": str(tmp_path)})
    address, app = served(config)

    async def pieces():
        for _ in range(MUCH // 2**16):
            yield b"x" * 2**16

    app.add_api_route("/much", lambda: StreamingResponse(pieces()))
    app.add_api_route("/whole", lambda size=MUCH: Response(b"x" * int(size)))
    return address, {"Authorization": f"Bearer {'s' * 32}"}


def asked_for(address: str, path: str, bearer: dict[str, str], *lines: str) -> socket.socket:
    """A connection with little room for the answer to what it has asked for."""
    made = socket.socket()
    made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    made.settimeout(20)
    host, port = address.removeprefix("http://").split(":")
    made.connect((host, int(port)))
    said = [f"GET {path} HTTP/1.1", "Host: 127.0.0.1", f"Authorization: {bearer['Authorization']}", *lines]
    made.sendall("\r\n".join([*said, "", ""]).encode())
    return made


def test_who_takes_nothing_of_his_answer_loses_his_place(talkative):
    address, bearer = talkative
    with asked_for(address, "/much", bearer) as deaf:
        until(lambda: httpx.get(f"{address}/v1/models", headers=bearer).status_code == 429)
        until(lambda: httpx.get(f"{address}/v1/models", headers=bearer).status_code == 200, 10)
        assert len(to_the_end(deaf)) < MUCH


def test_answers_that_nobody_takes_are_not_kept(talkative, monkeypatch):
    """Of all sizes: of some only the end does not fit into what the kernel takes."""
    address, bearer = talkative
    lost, real = [], Connection.connection_lost
    monkeypatch.setattr(Connection, "connection_lost", lambda *arguments: (real(*arguments), lost.append(1)))
    deaf = [asked_for(address, "/whole", bearer)]
    until(lambda: lost, 10)
    assert len(to_the_end(deaf[0])) < MUCH
    for number, size in enumerate(range(2**16, 2**19, 2**15), start=2):
        deaf.append(asked_for(address, f"/whole?size={size}", bearer, "Connection: close"))
        until(lambda number=number: len(lost) == number, 10)
    for each in deaf:
        each.close()


def test_who_takes_his_answer_slowly_gets_all_of_it(talkative):
    address, bearer = talkative
    started = time.monotonic()
    with asked_for(address, "/much", bearer, "Connection: close") as slow:
        size = 0
        while piece := slow.recv(2**15):
            size += len(piece)
            time.sleep(0.004)  # the pace of the client
    assert size > MUCH and time.monotonic() - started > 2 * Connection.take_s


class Authority:
    """Makes certificates."""

    def __init__(self, folder, name="hospital"):
        self.folder, self.name = folder, name
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.file, _ = self._write(name, self._certificate(name, self.key, is_authority=True), self.key)

    def of(self, name: str):
        """Files of a certificate and its key."""
        key = ec.generate_private_key(ec.SECP256R1())
        return self._write(name, self._certificate(name, key), key)

    def _certificate(self, name, key, is_authority=False):
        now = datetime.now(UTC)
        made = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
            .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, self.name)]))
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(days=1))
            .not_valid_after(now + timedelta(days=1))
            .add_extension(x509.BasicConstraints(is_authority, None), critical=True)
            .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=False)
        )
        return made.sign(self.key, hashes.SHA256())

    def _write(self, name, certificate, key):
        pem = serialization.Encoding.PEM
        plain = (pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        files = self.folder / f"{self.name}-{name}.crt", self.folder / f"{self.name}-{name}.key"
        files[0].write_bytes(certificate.public_bytes(pem))
        files[1].write_bytes(key.private_bytes(*plain))
        return str(files[0]), str(files[1])


def test_certificates_on_both_sides(served, app_config, tmp_path, png, capfd):
    ours, theirs = Authority(tmp_path), Authority(tmp_path, "elsewhere")
    cert, key = ours.of("server")
    access = {"access.cert": cert, "access.key": key, "access.client_ca": ours.file, "access.open": False}
    address, _ = served(app_config(**access, storage=str(tmp_path)))
    assert address.startswith("https://")
    trusting = ssl.create_default_context(cafile=ours.file)
    with pytest.raises((httpx.RemoteProtocolError, httpx.ReadError, httpx.ConnectError)):
        httpx.get(f"{address}/v1/models", verify=trusting)

    def with_certificate(files):
        context = ssl.create_default_context(cafile=ours.file)
        context.load_cert_chain(*files)
        return httpx.post(f"{address}{PREDICT}", content=png, verify=context)

    capfd.readouterr()
    assert with_certificate(ours.of("reading-room")).status_code == 200
    with pytest.raises((httpx.RemoteProtocolError, httpx.ReadError, httpx.ConnectError)):
        with_certificate(theirs.of("reading-room"))
    (line,) = [json.loads(line) for line in capfd.readouterr().err.splitlines() if line.startswith("{")]
    assert line["caller"] == "reading-room" and line["status"] == 200


def test_tls_with_tokens(served, app_config, tmp_path, monkeypatch):
    monkeypatch.setenv("RAYMED_SERVE_TOKEN", "s" * 32)
    ours = Authority(tmp_path)
    cert, key = ours.of("server")
    address, _ = served(app_config(**{"access.cert": cert, "access.key": key, "access.open": False}))
    trusting = ssl.create_default_context(cafile=ours.file)
    assert httpx.get(f"{address}/v1/models", verify=trusting).status_code == 401
    bearer = {"Authorization": f"Bearer {'s' * 32}"}
    assert httpx.get(f"{address}/v1/models", verify=trusting, headers=bearer).status_code == 200
    with dialled(address.replace("https", "http")) as plain:
        plain.sendall(b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        assert b"200" not in to_the_end(plain)


def test_certificates_that_cannot_be_used(app_config, tmp_path):
    cert, key = Authority(tmp_path).of("server")
    other = Authority(tmp_path, "other").of("server")[1]
    (tmp_path / "empty").write_text("")
    for access, message in [
        (Access(open=True, cert=cert), "give both"),
        (Access(open=True, client_ca=cert), "needs TLS"),
        (Access(open=True, cert=cert, key=str(tmp_path / "none")), "there is no file"),
        (Access(open=True, cert=cert, key=other), "cannot be used"),
        (Access(open=True, cert=cert, key=key, client_ca=str(tmp_path / "empty")), "cannot be used"),
    ]:
        with pytest.raises(UserError, match=message):
            serve(ServeConfig(port=0, access=access, storage=str(tmp_path)))


def test_told_to_end_it_says_so_and_answers_what_it_has(bundle_folder, tmp_path, png):
    command = [sys.executable, JOB, "--models", f"hsg={bundle_folder}", "--port", "0"]
    command += ["--access.open", "--limits.read-s", "15", "--storage", str(tmp_path), "--hardware.device", "cpu"]
    log = (tmp_path / "log").open("w")
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=os.environ) as process:
        try:
            address = next(line for line in process.stdout if line.startswith("serving on")).split()[-1]
            assert httpx.get(f"{address}/readyz").status_code == 200
            with dialled(address) as halfway:
                halfway.sendall(head(len(png)) + png[:-1])
                process.send_signal(signal.SIGTERM)
                until(lambda: httpx.get(f"{address}/readyz").status_code == 503)
                assert httpx.post(f"{address}{PREDICT}", content=png).status_code == 200
                until(lambda: is_closed(address))
                halfway.sendall(png[-1:])
                said = to_the_end(halfway)
            assert said.startswith(b"HTTP/1.1 200") and b"connection: close" in said.lower()
            assert process.wait(10) == 0
            assert process.stdout.read().endswith("stopped\n")
        finally:
            process.kill()
    assert "Traceback" not in (tmp_path / "log").read_text()


def is_closed(address: str) -> bool:
    try:
        httpx.get(f"{address}/healthz")
    except httpx.TransportError:  # refused, or reset where it had just dialled
        return True
    return False
