"""What an autoscaler could add to the nodes that are there."""

import pytest
import yaml

from raymed.config import UserError
from raymed.train.places import growth as module
from raymed.train.places.growth import Growth, _beyond, described, read
from raymed.train.places.room import Nodes

HEAD = {"CPU": 0.0, "raymed_driver": 1000.0, "memory": 1e9}
GPU = {"CPU": 8.0, "GPU": 1.0, "memory": 3e10, "node:10.0.0.2": 1.0}
CONFIG = {
    "max_workers": 3,
    "head_node_type": "head",
    "available_node_types": {
        "head": {"resources": {"CPU": 0, "raymed_driver": 1000}, "max_workers": 0},
        "gpu": {"resources": {"CPU": 8, "GPU": 1, "memory": 32 * 2**30}, "max_workers": 2},
        "cpu": {"resources": {"CPU": 8}, "max_workers": 4},
    },
}


def after(*live, config=CONFIG):
    found = _beyond(described(config), live)
    return [(int(node.get("GPU", 0)), node["memory"]) for node in found.nodes], found.most


def test_what_is_there_is_not_added_again():
    """A node with a GPU is one of its own kind only, whatever it says of its memory."""
    gpu, cpu = (1, 32 * 2**30), (0, module.sys.maxsize)
    assert after(HEAD) == ([gpu, gpu, cpu, cpu, cpu], 3)
    assert after(HEAD, GPU) == ([gpu, cpu, cpu, cpu], 2)
    assert after(HEAD, GPU, GPU, {"CPU": 8.0}) == ([cpu, cpu], 0)
    assert after(HEAD, {"CPU": 4.0}) == ([gpu, gpu, cpu, cpu, cpu], 3)  # of none of its kinds


def test_no_more_come_than_all_together_may():
    found = _beyond(described(CONFIG), [HEAD])
    assert [node.get("GPU", 0) for node in found.best(lambda node: node.get("GPU", 0))] == [1, 1, 0]
    assert [node.get("GPU", 0) for node in found.best(lambda node: node["memory"])] == [0, 0, 0]
    assert after(HEAD, config=CONFIG | {"max_workers": 0}) == ([], 0)


def test_without_an_autoscaler_nothing_comes():
    assert _beyond(None, [HEAD]) == Growth()
    assert Growth().best(len) == []


@pytest.mark.parametrize(("config", "said"), [(None, False), (CONFIG, True), (CONFIG | {"max_workers": 0}, False)])
def test_who_waits_is_told_where_it_is_said_why_no_node_comes(config, said, monkeypatch):
    """Only where one may come: elsewhere there is no autoscaler to ask."""
    import ray
    from ray._private.state import state

    head = {"Alive": True, "NodeID": "0" * 56, "NodeName": "head", "Resources": HEAD}
    monkeypatch.setattr(ray, "nodes", lambda: [head])
    monkeypatch.setattr(ray, "available_resources", lambda: HEAD)
    monkeypatch.setattr(state, "get_draining_nodes", dict)
    monkeypatch.setattr(state, "get_cluster_config", lambda: config and described(config))
    line = Nodes().shortage({"CPU": 1.0, "GPU": 1.0}, 2)
    assert line.startswith("this needs 2 x 1 CPU, 1 GPU; the cluster has 0 CPU (0 free), 0 GPU (0 free) on 1 node(s)")
    command = "; it may start 3 more node(s): `python -m raymed.cluster logs autoscaler` tells why none comes"
    assert line.endswith(command) == said and ("autoscaler" in line) == said


@pytest.mark.parametrize("config", [None, "a word", {}, CONFIG | {"max_workers": "many"}, {"max_workers": 2}])
def test_another_file_is_refused(config, tmp_path):
    path = tmp_path / "cluster.yaml"
    path.write_text(yaml.safe_dump(config))
    with pytest.raises(UserError, match="this is no configuration of an autoscaler"):
        described(read(str(path)))
    with pytest.raises(UserError, match="cannot be read"):
        read(str(tmp_path / "absent.yaml"))


def test_outside_kubernetes_it_is_said(monkeypatch):
    monkeypatch.delenv("RAY_CLUSTER_NAME", raising=False)
    with pytest.raises(UserError, match="this is no pod of KubeRay's"):
        read("kuberay")


def test_a_raycluster_is_read_as_rays_autoscaler_reads_it():
    """What `_of_kubernetes` gets, of a cluster of this project's."""
    from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr

    container = {"name": "ray", "resources": {"limits": {"cpu": "4", "memory": "16Gi", "nvidia.com/gpu": 1}}}
    group = {"rayStartParams": {}, "template": {"spec": {"containers": [container]}}}
    head = group | {"rayStartParams": {"num-cpus": "0", "num-gpus": "0", "resources": '"{\\"raymed_driver\\": 1000}"'}}
    workers = group | {"groupName": "gpu", "minReplicas": 0, "maxReplicas": 2}
    cluster = {
        "metadata": {"name": "raymed", "namespace": "default"},
        "spec": {"headGroupSpec": head, "workerGroupSpecs": [workers]},
    }
    found = _beyond(described(_derive_autoscaling_config_from_ray_cr(cluster)), [HEAD])
    assert found.most == 2 and found.nodes == ({"CPU": 4, "GPU": 1, "memory": 16 * 2**30},) * 2
