"""One Ray cluster of two CPUs for all tests here, which keeps everything in temporary folders. A second one in the same
process would not start: Ray reads its token only once."""

from collections.abc import Callable

import pytest

from raymed.cluster import backup
from raymed.train.places.cluster import connected


@pytest.fixture(scope="session")
def ray_cluster(tmp_path_factory):
    """Ray is up."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(tmp_path_factory.mktemp("ray-home")))
        patch.delenv("RAY_ADDRESS", raising=False)
        with connected(num_cpus=2):
            yield


@pytest.fixture
def meanwhile(monkeypatch):
    """Let something happen right after the first listing of a place."""

    def happen(place: str, what: Callable[[], object]) -> None:
        listed, left = backup._below, [what]

        def listing(location):
            found = listed(location)
            if str(location) == place and left:
                left.pop()()
            return found

        monkeypatch.setattr(backup, "_below", listing)

    return happen
