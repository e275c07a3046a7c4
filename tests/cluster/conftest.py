"""One Ray cluster of two CPUs for all tests here, which keeps everything in temporary folders. A second one in the same
process would not start: Ray reads its token only once."""

import pytest

from raymed.train.places.cluster import connected


@pytest.fixture(scope="session")
def ray_cluster(tmp_path_factory):
    """Ray is up."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(tmp_path_factory.mktemp("ray-home")))
        patch.delenv("RAY_ADDRESS", raising=False)
        with connected(num_cpus=2):
            yield
