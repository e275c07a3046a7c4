"""What every test may use: the optional real images and golden vectors, and a home of its own."""

import os
from pathlib import Path

import numpy as np
import pytest

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
