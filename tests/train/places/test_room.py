"""How many trainings fit on a cluster's nodes."""

import pytest

from raymed.train.places.cluster import DRIVER, _room, gpu_share

GB = 10**9


def room(nodes, workers=1, driver=0.0, **needs):
    return _room(nodes, {"CPU": 1, "GPU": 0, "memory": 0} | needs, workers, driver)


def test_a_worker_is_on_one_node():
    nodes = [{"CPU": 4.0}, {"CPU": 3.0}]
    assert [room(nodes, CPU=cpus) for cpus in (1, 2, 3, 4, 5)] == [7, 3, 2, 1, 0]
    assert room(nodes, workers=2, CPU=1) == 3  # two workers of one training may be on two nodes
    assert room([]) == 0


def test_the_scarcest_kind_decides():
    node = {"CPU": 8.0, "GPU": 2.0, "memory": 10.0 * GB}
    assert room([node]) == 8
    assert room([node], GPU=1) == 2
    assert room([node], memory=3 * GB) == 3
    assert room([node], memory=11 * GB) == 0
    assert room([{"CPU": 8.0}], GPU=1) == 0


@pytest.mark.parametrize("sharing", range(1, 41))
def test_as_many_share_a_gpu_as_are_meant_to(sharing):
    """By Ray's arithmetic in ten thousandths too."""
    share = gpu_share(sharing)
    assert room([{"CPU": 100.0, "GPU": 1.0}], GPU=share) == sharing
    assert sharing * round(share * 10_000) <= 10_000


def test_drivers_take_cpus_where_nothing_else_is_there_for_them():
    """Two workers and a driver do not fit on two CPUs, however little the driver takes."""
    assert room([{"CPU": 2.0}], workers=2) == 1
    assert room([{"CPU": 2.0}], workers=2, driver=0.01) == 0
    assert room([{"CPU": 2.0, DRIVER: 1.0}], workers=2, driver=0.01) == 1
    assert room([{"CPU": 8.0, DRIVER: 0.02}], workers=2, driver=0.01) == 2
    assert room([{"CPU": 6.0}], workers=2, driver=1) == 2
    assert room([{"CPU": 8.0}], workers=2, driver=1) == 2
    assert room([{"CPU": 9.0}], workers=2, driver=1) == 3


def test_drivers_go_where_they_cost_no_worker():
    """A head node without room for a worker holds them; a node's remainder does too."""
    assert room([{"CPU": 1.0}, {"CPU": 4.0}], CPU=2, workers=2, driver=1) == 1
    assert room([{"CPU": 5.0}], CPU=2, workers=2, driver=1) == 1
    assert room([{"CPU": 4.0}], CPU=2, workers=2, driver=1) == 0
    assert room([{"GPU": 1.0}, {"CPU": 2.0}], workers=2, driver=0.5) == 0
