"""What a server says in the terminal when it starts: what is refused, and where its page is."""

import asyncio
import re
import shutil
import threading
import urllib.request
from contextlib import contextmanager

import pytest
from fastapi.testclient import TestClient
from registries import weights_of
from waiting import until

from raymed.serve.app import create_app
from raymed.serve.config import Access, ServeConfig
from raymed.serve.run import Draining, _serve, bound, page, refusals, uvicorn_config
from raymed.tracking import connect


@contextmanager
def started(config):
    """The models of a server that has started."""
    app = create_app(config)
    with TestClient(app):
        yield app.state.service.models


def break_version(home, version):
    file = weights_of(connect(None, home), version)
    file.write_bytes(file.read_bytes()[:-1])


def test_nothing_is_said_of_models_that_are_served(app_config):
    with started(app_config()) as models:
        assert refusals(models) == []


def test_a_model_that_cannot_be_loaded_is_named_with_the_reason(app_config, bundle_folder, tmp_path):
    broken = shutil.copytree(bundle_folder, tmp_path / "broken")
    (broken / "bundle.json").unlink()
    with started(app_config(models=(f"hsg={bundle_folder}", f"cxr={broken}"))) as models:
        told, then = refusals(models)
    assert told == f"cxr is NOT SERVED: {broken} is no bundle: bundle.json is missing or damaged"
    assert then == "    requests for it are told to come later (503): mend that; it is tried again by itself"


def test_who_answers_in_the_place_of_a_refused_version_is_said(app_config, registry_home):
    config = app_config(models=("hsg=models:/hsg",), storage=str(registry_home), **{"follow.canary": 0.5})
    client = connect(None, registry_home)
    client.set_registered_model_alias("hsg", "challenger", "2")
    break_version(registry_home, 2)
    with started(config) as models:
        told, then = refusals(models)
    assert told.startswith("hsg: the challenger is not used: models:/hsg/2/bundle/model.safetensors is damaged")
    assert then.startswith("    the champion answers everybody: mend that or promote another version; ")
    client.delete_registered_model_alias("hsg", "challenger")
    client.set_registered_model_alias("hsg", "champion", "2")
    with started(config) as models:
        told, then = refusals(models)
    assert told.startswith("hsg: the champion is not used: ")
    assert then.startswith("    the last good one here, version 1, answers everybody: ")


@pytest.mark.parametrize(
    ("host", "access", "url"),
    [
        ("127.0.0.1", Access(open=True), r"http://127\.0\.0\.1:\d+/"),
        ("0.0.0.0", Access(hosts=("ai.hospital",)), r"http://ai\.hospital:\d+/"),
        ("0.0.0.0", Access(cert="cert"), r"https://[^0].*:\d+/"),
        ("::1", Access(), r"http://\[::1\]:\d+/"),
    ],
)
def test_the_page_is_named_by_what_a_browser_can_open(host, access, url):
    config = ServeConfig(host=host, access=access)
    with bound(host, 0) as listening:
        told = page(config, listening)
    assert re.fullmatch(f"Open {url} in a browser(, with a token: .*)?", told)
    assert ("serve_tokens.py add NAME" in told) == (not access.open)


def test_a_server_that_listens_says_all_of_it(app_config, tmp_path, capsys):
    config = app_config(models=(f"hsg={tmp_path}",))
    app = create_app(config)
    with bound("127.0.0.1", 0) as listening:
        server = Draining(uvicorn_config(config, app), app.state.service)
        thread = threading.Thread(target=lambda: asyncio.run(_serve(server, config, listening)))
        thread.start()
        try:
            said: list[str] = []
            until(lambda: said.append(capsys.readouterr().out) or "Open" in "".join(said), 30)
            refused, _, serving, opened = "".join(said).splitlines()
            url = opened.split()[1]
            with urllib.request.urlopen(url, timeout=10) as response:
                assert response.headers["Content-Type"].startswith("text/html")
        finally:
            server.should_exit = True
            thread.join(20)
    assert refused.startswith("hsg is NOT SERVED") and serving == f"serving on {url.rstrip('/')}"
