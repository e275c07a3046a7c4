"""A small classifier's bundle that is served, the config of its server, and a client of one that has started."""

import importlib.util
import io
import shutil
import threading
from pathlib import Path

import pytest
import uvicorn
from fastapi.testclient import TestClient
from PIL import Image
from registries import register_two
from waiting import until

from raymed.config import replace
from raymed.serve.app import create_app
from raymed.serve.config import Access, Hardware, ServeConfig
from raymed.serve.run import address, bound, uvicorn_config
from raymed.tracking import connect

_spec = importlib.util.spec_from_file_location(
    "registry_fixtures", Path(__file__).resolve().parents[1] / "registry" / "conftest.py"
)
_registry = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_registry)
images, bundle, tracked = _registry.images, _registry.bundle, _registry.tracked


@pytest.fixture(scope="session")
def bundle_folder(bundle, tmp_path_factory) -> Path:
    """The classifier's bundle, saved."""
    return bundle.save(tmp_path_factory.mktemp("served") / "bundle")


@pytest.fixture
def app_config(bundle_folder):
    """app_config(**{"limits.queue": 3}) -> config of a server of the classifier, named hsg, that lets anybody in."""

    def make(**changes) -> ServeConfig:
        open_to_all = Access(open=True, hosts=("testserver",))
        small = Hardware(device="cpu", threads=1, max_batch=4)
        config = ServeConfig(models=(f"hsg={bundle_folder}",), access=open_to_all, hardware=small)
        return replace(config, changes)

    return make


@pytest.fixture
def client(app_config):
    """Of a started server that lets anybody in."""
    with TestClient(create_app(app_config())) as started:
        yield started


@pytest.fixture
def png(images) -> bytes:
    """An image that the classifier was made for."""
    file = io.BytesIO()
    Image.fromarray(images[0]).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def registry_home(tracked, bundle, tmp_path) -> Path:
    """A storage whose MLflow has the model hsg, versions 1, the champion, and 2."""
    shutil.copytree(tracked / "mlflow", tmp_path / "home" / "mlflow")
    register_two(connect(None, tmp_path / "home"), bundle, tmp_path)
    return tmp_path / "home"


@pytest.fixture
def served():
    """served(config) -> (address, app) of a server with real sockets, in a thread of this process."""
    running = []

    def start(config: ServeConfig):
        app, listening = create_app(config), bound(config.host, 0)
        server = uvicorn.Server(uvicorn_config(config, app))
        thread = threading.Thread(target=server.run, args=([listening],))
        thread.start()
        running.append((server, thread))
        until(lambda: server.started or not thread.is_alive())
        return address(config, listening), app

    yield start
    for server, thread in running:
        server.should_exit = True
        thread.join(20)


@pytest.fixture(scope="session")
def tab(tmp_path_factory):
    """Of a browser."""
    from browser import browser

    with browser(tmp_path_factory.mktemp("chromium")) as page:
        yield page


@pytest.fixture
def on_page(tab, served, app_config):
    """on_page(**changes) -> (the page of a server with such a config, opened; its address)."""

    def start(**changes):
        address, _ = served(app_config(**changes))
        tab.size(1280, 900)
        tab.open(f"{address}/")
        return tab, address

    return start


@pytest.fixture
def pictures(images, tmp_path) -> list[Path]:
    """Files of images that the classifier was made for, as PNG."""
    paths = [tmp_path / f"HONG-GILDONG-{i}.png" for i in range(40)]
    for path, image in zip(paths, images, strict=False):
        Image.fromarray(image).save(path)
    return paths


@pytest.fixture(scope="module")
def sent(tmp_path_factory):
    """DICOM studies, as they come; see `dicom_helpers.studies`."""
    from dicom_helpers import studies

    return studies(tmp_path_factory.mktemp("hospital") / "of_phantoms")


@pytest.fixture
def server(app_config):
    """Address of a running server, for a DICOM node."""
    from dicom_helpers import serving

    with serving(app_config(**{"access.hosts": ("127.0.0.1",)})) as address:
        yield address
