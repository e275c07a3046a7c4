"""A server that takes jobs, and a folder for them: what the tests of jobs share."""

import threading
from contextlib import contextmanager
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from predict_example import make_bundle, write_images
from waiting import until

from raymed.bundle import Bundle
from raymed.data.manifest import DataConfig
from raymed.results.predict import asked_cases, load_origin, predict
from raymed.results.predict_cases import ImageFolder
from raymed.serve.app import create_app
from raymed.serve.config import Access, Hardware, ServeConfig
from raymed.serve.jobs import predict as work
from raymed.serve.jobs.store import Store

JOBS = "/v1/jobs"


@pytest.fixture(scope="module")
def case_bundle() -> Bundle:
    """Of a model that decides about cases of two images."""
    return make_bundle()


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder of 12 cases with a manifest, one image of which is damaged."""
    folder = tmp_path_factory.mktemp("root")
    write_images(folder / "set", 12)
    (folder / "set" / "004_left.png").write_bytes(b"")
    return folder


@pytest.fixture(scope="module")
def expected(case_bundle, root, tmp_path_factory):
    """(cases, images) as jobs/predict.py writes them."""
    asked = asked_cases(case_bundle, ImageFolder(), DataConfig(manifest=str(root / "set" / "manifest.csv")))
    folder = tmp_path_factory.mktemp("by-hand")
    _, origin = load_origin(str(case_bundle.save(folder / "model")), None, None)
    done = predict(case_bundle, origin, asked.cases, folder / "p.csv")
    return done.path.read_bytes(), done.image_path.read_bytes()


@pytest.fixture
def config(case_bundle, root, tmp_path):
    """Of a server of the model that takes jobs from the folder."""
    return ServeConfig(
        models=(f"hsg={case_bundle.save(tmp_path / 'model')}",),
        access=Access(open=True, hosts=("testserver",)),
        hardware=Hardware(device="cpu", threads=1, max_batch=1),
        batch_roots=(str(root),),
        storage=str(tmp_path / "home"),
    )


@contextmanager
def started(config):
    app = create_app(config)
    with TestClient(app) as client:
        client.jobs = app.state.service.jobs
        yield client


def store_of(config) -> Store:
    """As a server with the config opens it."""
    jobs = create_app(config).state.service.jobs
    return Store(Path(config.storage) / "serve" / "jobs" / "jobs.sqlite", jobs.served)


def ask(client, source="set/manifest.csv", **more):
    return client.post(JOBS, json={"model": "hsg", "source": source} | more)


def ended(client, number, seconds=20.0, **headers):
    def look():
        job = client.get(f"{JOBS}/{number}", headers=headers).json()
        return job if job["state"] not in ("queued", "running") else None

    return until(look, seconds)


def lines_of(content: bytes) -> list[list[str]]:
    return [line.split(",") for line in content.decode("utf-8-sig").splitlines()]


def same_numbers(found: bytes, wanted: bytes) -> bool:
    """Equal but for the last of six digits."""
    for one, other in zip(lines_of(found), lines_of(wanted), strict=True):
        for a, b in zip(one, other, strict=True):
            if a != b and not (a[:2] in ("0.", "1.") and abs(float(a) - float(b)) < 2e-6):
                return False
    return True


@pytest.fixture
def held(monkeypatch):
    """Let the next job stop at its fourth case until it is let go."""
    reached, go, real, cases = threading.Event(), threading.Event(), work.answer_case, []

    def answer(*arguments):
        cases.append(arguments)
        if len(cases) > 3:
            reached.set()
            assert go.wait(20)
        return real(*arguments)

    monkeypatch.setattr(work, "answer_case", answer)
    yield reached, go
    go.set()
