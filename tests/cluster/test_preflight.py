"""What a real cluster of two CPUs has room for, and what is said of it."""

import pytest
import ray

from raymed.config import UserError
from raymed.train.places.cluster import require

pytestmark = pytest.mark.ray


def test_room_of_a_real_cluster(ray_cluster, capsys):
    memory = next(node["Resources"]["memory"] for node in ray.nodes())
    assert require(1, advice="") == 2
    assert require(1, at_most=1, advice="") == 1
    assert require(1, memory=int(0.4 * memory), advice="") == 2
    assert require(1, memory=int(0.6 * memory), advice="") == 1
    assert require(1, workers=2, advice="") == 1
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("needs", "said"),
    [
        ({"cpus": 3}, r"needs 1 x 3 CPUs, 0 GPUs .* has 2 CPUs, 0 GPUs on 1 node\(s\) \(its CPU is enough for 0\)"),
        ({"cpus": 1, "gpus": 1}, r"needs 1 x 1 CPUs, 1 GPUs .* \(its GPU is enough for 0\)"),
        ({"cpus": 1, "at_least": 3}, r"needs 3 x 1 CPUs, 0 GPUs .* \(its CPU is enough for 2\)"),
        ({"cpus": 1, "memory": 10**15}, r"1000000.0 GB memory at a time, .* \(its memory is enough for 0\)"),
        ({"cpus": 1, "workers": 3}, r"needs 1 x 3 x \(1 CPUs, 0 GPUs\) .*\(its CPU is enough for 0\)"),
        (
            {"cpus": 1, "workers": 2, "driver": 0.01},
            r"1 x \(2 x \(1 CPUs, 0 GPUs\) and 0.01 raymed_driver or CPUs for its driver\) at a time, and the cluster "
            r"has 2 CPUs, 0 GPUs, 0 raymed_driver on 1 node\(s\) \(no node has enough of all at once\)",
        ),
    ],
)
def test_what_would_starve_is_refused(ray_cluster, needs, said):
    with pytest.raises(UserError, match=said + ": lower --this"):
        require(**needs, advice="lower --this")


def test_what_has_to_be_waited_for_is_said(ray_cluster, capsys):
    """Counted as free all the same: it will be."""

    @ray.remote(num_cpus=2)
    class Holder:
        def hold(self):
            return True

    holder = Holder.remote()
    assert ray.get(holder.hold.remote())
    assert require(1, advice="") == 2
    assert "waiting: only 0 of 2 CPU is free now" in capsys.readouterr().out
    ray.kill(holder)
    assert require(1, at_least=2, advice="") == 2  # within its patience for what has just ended
    assert capsys.readouterr().out == ""
