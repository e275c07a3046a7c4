"""A user's machine for the tests of a module."""

import shutil
import tempfile
from pathlib import Path

import pytest
from home import Home


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Whatever is started there and still runs at the end is killed."""
    temporary = Path(tempfile.mkdtemp(prefix="rm-"))
    machine = Home(tmp_path_factory.mktemp("user"), temporary)
    yield machine
    machine.end_all()
    shutil.rmtree(temporary, ignore_errors=True)
