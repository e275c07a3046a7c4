"""Proxies that swallow what is meant for this machine, and services that do not answer."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from raymed.doctor.checks.network import this_machine
from raymed.doctor.place import Place
from raymed.doctor.there import Answering, swallowed


@contextmanager
def proxy() -> Iterator[str]:
    """A proxy that lets nothing through, as one for the internet does with addresses of the house."""

    class Refuses(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_error(503, "no way to that host")

        def log_message(self, format, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Refuses)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def test_without_a_proxy():
    assert this_machine(Place()).level == "ok"


@pytest.mark.parametrize("variable", ["http_proxy", "HTTP_PROXY"])
def test_a_proxy_that_swallows_the_loopback(variable, monkeypatch):
    with proxy() as address:
        monkeypatch.setenv(variable, address)
        finding = this_machine(Place())
        assert finding.level == "failure" and "by the proxy variables requests gets: status 503" in finding.found
        assert "NO_PROXY=localhost,127.0.0.1;" in finding.remedy
        monkeypatch.setenv("NO_PROXY", "localhost,127.0.0.1")
        assert this_machine(Place()).level == "ok"


def test_a_range_in_no_proxy_is_read_by_one_client_only(monkeypatch):
    with proxy() as address:
        monkeypatch.setenv("http_proxy", address)
        monkeypatch.setenv("no_proxy", "localhost,127.0.0.0/8")
        finding = this_machine(Place())
    assert finding.level == "failure" and "urllib gets: status 503" in finding.found
    assert "requests gets" not in finding.found


def test_a_service_behind_the_proxy(monkeypatch):
    """It is named in the remedy."""
    server = Answering("127.0.0.2")
    url = f"http://127.0.0.2:{server.port}"
    with proxy() as address:
        monkeypatch.setenv("http_proxy", address)
        monkeypatch.setenv("no_proxy", "localhost,127.0.0.1")
        finding = this_machine(Place(mlflow=url))
    server.close()
    assert finding.level == "failure" and url in finding.found and "127.0.0.2" in finding.remedy


def test_a_proxy_that_is_needed_is_no_fault(monkeypatch):
    with proxy() as address:
        answering = Answering("127.0.0.1")  # in the proxy's place: it answers whatever it is asked
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{answering.port}")
        assert swallowed("http://far.invalid/") == ""
        monkeypatch.setenv("http_proxy", address)
        assert "no answer from http://far.invalid/" in swallowed("http://far.invalid/")
        answering.close()


def test_a_service_that_does_not_answer():
    finding = this_machine(Place(s3="http://127.0.0.1:9"))
    assert finding.level == "failure" and "no answer from http://127.0.0.1:9" in finding.found
    assert finding.remedy.startswith("start what does not answer")
