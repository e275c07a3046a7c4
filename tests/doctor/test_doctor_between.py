"""What the all-reduce and the versions of nodes come to, told of answers that nodes give; real nodes are in
test_doctor_cluster.py."""

from contextlib import contextmanager
from types import SimpleNamespace

import psutil
import pytest

from raymed.doctor import there
from raymed.doctor.checks import between
from raymed.doctor.checks.versions import differences
from raymed.doctor.place import Place

MINE = {"python": "3.12.3", "torch": "2.13.0+cpu", "ray": "2.50.0", "raymed": "files 1234"}
BUSY, DEAD = "no answer within 60 s", "The actor died because its node has died."


def node(interface: str = "eth0", problem: str = "", late: str = "") -> SimpleNamespace:
    """A probe. late: why it does not even start."""
    meeting = late or ("10.0.0.1", 4000, interface)
    told = {"interface": interface, "problem": problem}
    return SimpleNamespace(
        rendezvous=SimpleNamespace(remote=lambda: meeting),
        reduced=SimpleNamespace(remote=lambda backend, rank, size, where, seconds: told),
    )


@pytest.fixture
def cluster(monkeypatch):
    """cluster(nodes with CPUs, nodes with GPUs): what the check finds there."""

    def look(with_cpus: dict, with_gpus: dict | None = None):
        @contextmanager
        def probes(gpus: float = 0, **options):
            yield (with_gpus or {}) if gpus else with_cpus

        def answers(asked, seconds=60):
            late = {name: answer for name, answer in asked.items() if isinstance(answer, str)}
            return {name: answer for name, answer in asked.items() if name not in late}, late

        monkeypatch.setattr(between, "probes", probes)
        monkeypatch.setattr(between, "answers", answers)
        return between.reduced(Place())

    return look


def test_a_cluster_at_rest(cluster):
    found = cluster({})
    assert found.level == "ok" and "no node has CPUs for work now" in found.found


@pytest.mark.parametrize("busy", ["a", "b"])
def test_gpus_that_are_in_use(busy, cluster):
    """Whichever of the nodes it is."""
    gpus = {name: node(late=BUSY if name == busy else "") for name in "ab"}
    found = cluster({"a": node(), "b": node()}, gpus)
    assert found.level == "warning" and "run the doctor again" in found.remedy
    assert found.found == f"gloo: 2 processes over eth0; nccl: in use, so not tried: {busy}"


def test_a_warning_of_gloo_is_not_lost(cluster):
    found = cluster({"a": node(), "b": node(late=BUSY)}, {"a": node()})
    assert found.level == "warning" and found.found.startswith("gloo: in use, so not tried: b; nccl: 1 processes")


def test_a_node_that_dies_is_no_fault_of_an_interface(cluster):
    found = cluster({"a": node(), "b": node(late=DEAD)})
    assert found.level == "failure" and f"b: {DEAD}" in found.found
    assert "IFNAME" not in found.remedy


@pytest.mark.parametrize(
    ("interfaces", "said"),
    [
        (("eth0", "eth0"), "(eth0)"),
        (("ens5", "eno1"), "(ens5 on a, eno1 on b)"),
        (("ens5", ""), "(`ip -br address` lists them)"),
    ],
)
def test_the_remedy_names_the_right_interface(interfaces, said, cluster):
    nodes = {name: node(interface, "timed out") for name, interface in zip("ab", interfaces, strict=True)}
    found = cluster(nodes)
    assert found.level == "failure" and said in found.remedy
    found = cluster({"a": node()}, nodes)
    assert found.level == "failure" and said in found.remedy and "NCCL_SOCKET_IFNAME" in found.remedy


def test_the_interface_of_a_nodes_address():
    addresses = {one.address: name for name, several in psutil.net_if_addrs().items() for one in several}
    assert there.interface_of("127.0.0.1") == addresses["127.0.0.1"]
    assert there.interface_of("203.0.113.77") == ""


@pytest.mark.parametrize(
    ("theirs", "said"),
    [
        ({"torch": "2.13.0"}, []),
        ({"torch": "2.13.0+cu130"}, []),
        ({"torch": "2.12.0"}, ["torch 2.12.0 on w, 2.13.0+cpu here"]),
        ({"torch": "none"}, ["torch none on w, 2.13.0+cpu here"]),
        ({"ray": "2.51.0", "raymed": "none"}, ["ray 2.51.0 on w, 2.50.0 here", "raymed none on w, files 1234 here"]),
    ],
)
def test_builds_of_one_torch_are_the_same(theirs, said):
    assert differences("w", MINE | theirs, MINE) == said
