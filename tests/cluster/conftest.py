"""One Ray cluster of two CPUs a test module, which keeps everything in temporary folders."""

import pytest

from raymed.train.cluster import connected


@pytest.fixture(scope="module")
def ray_cluster(tmp_path_factory):
    """Ray is up."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(tmp_path_factory.mktemp("ray-home")))
        patch.delenv("RAY_ADDRESS", raising=False)
        with connected(num_cpus=2):
            yield
