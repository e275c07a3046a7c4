"""Nodes that share nothing but a bucket, as rented machines do: each has a home and a disk of its own.

The driver is on the head, which has no CPU to train on; two nodes of one CPU have a worker each. Data and storage are
in the bucket.
"""

import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from faults import (
    JOB,
    PATIENCE,
    TWO,
    Training,
    at_work,
    check_survived,
    check_tracked,
    fault_step,
    images,
)
from nodes import Driver, Node, Nodes, wait_for

from raymed.storage import Mirror, working_copy
from raymed.train.checkpoints.checkpoint import Checkpoints
from raymed.train.checkpoints.index import Index

pytestmark = [pytest.mark.ray, pytest.mark.slow]
STEPS = 240
PLAIN = "--compute.engine=torch"  # which starts fastest; the other tests of faults have DeepSpeed


@dataclass(frozen=True)
class Machine:
    """A node and its disk."""

    node: Node
    disk: Path

    def sees(self, training: Training) -> Training:
        """The same training, in the working copy of this machine."""
        return replace(training, storage=self.disk / "local" / "s3" / str(training.url).removeprefix("s3://"))


class Apart:
    """Machines in one cluster. The disk of the head is that of the test."""

    def __init__(self, nodes: Nodes, folder: Path):
        self.nodes, self.folder = nodes, folder
        self.machines: list[Machine] = []

    def add(self) -> Machine:
        """A machine with an empty disk."""
        disk = Path(tempfile.mkdtemp(prefix="machine-", dir=self.folder))
        (disk / "home").mkdir()
        node = self.nodes.add_node(HOME=str(disk / "home"), RAYMED_LOCAL=str(disk / "local"))
        self.machines.append(Machine(node, disk))
        return self.machines[-1]

    def lose(self, machine: Machine) -> None:
        """A machine is gone, with its disk."""
        self.nodes.kill_node(machine.node)
        self.machines.remove(machine)
        for file in machine.disk.rglob("*"):
            assert not file.is_file() or file.stat().st_nlink == 1, "it shared a file"
        shutil.rmtree(machine.disk)

    def first(self, training: Training) -> Machine:
        """The one with the worker of rank 0, which alone takes the lock and writes what the tracker is told."""
        [machine] = [m for m in self.machines if (m.sees(training).unit / "lock.pid").exists()]
        return machine


@pytest.fixture(scope="module")
def apart(tmp_path_factory) -> Iterator[Apart]:
    """The cluster."""
    with Nodes(tmp_path_factory.mktemp("cluster"), cpus=0) as nodes:
        cluster = Apart(nodes, tmp_path_factory.mktemp("machines"))
        cluster.add()
        cluster.add()
        yield cluster


@pytest.fixture
def training(s3, tmp_path_factory) -> Training:
    """What is trained, with its images in the bucket."""
    manifest = images(tmp_path_factory)
    for path in (path for path in manifest.parent.rglob("*") if path.is_file()):
        s3.put(f"images/{path.relative_to(manifest.parent)}", path.read_bytes())
    url = f"{s3.url}/storage"
    return Training(working_copy(url), f"{s3.url}/images/{manifest.name}", url, (TWO, PLAIN), STEPS)


def start(apart: Apart, training: Training, s3) -> Driver:
    """The driver has started, and each machine has a worker."""
    driver = apart.nodes.driver(JOB, *training.arguments, **s3.env)
    both = [machine.node for machine in apart.machines]
    wait_for(
        lambda: all(len(node.workers()) == 1 for node in both) or driver.process.poll() is not None,
        PATIENCE,
        "a worker on each machine",
    )
    assert driver.process.poll() is None, driver.said()
    return driver


def there(training: Training, s3) -> Index:
    """The checkpoints that are whole in the bucket."""
    name = f"storage/{(training.checkpoints / 'index.json').relative_to(training.storage)}"
    return (name in s3.keys() and Index.parse(s3.get(name))) or Index()


def check_ended(apart: Apart, training: Training, factory: pytest.TempPathFactory, s3, **survived: int) -> None:
    """What is in the bucket is what an undisturbed run leaves, and so is what MLflow has. Every machine has the last
    checkpoint; the head, which trained nothing, fetches it now."""
    wait_for(lambda: not any(at_work(node) for node in apart.nodes.nodes), PATIENCE, "the actors go")
    assert not training.checkpoints.exists()
    names = sorted(there(training, s3).names())
    for machine in apart.machines:
        seen = machine.sees(training)
        assert seen.saved() == training.steps
        assert sorted(path.name for path in seen.checkpoints.glob("step-*")) == names
    written = [machine for machine in apart.machines if machine.sees(training).outbox.exists()]
    assert len(written) == 1, "rank 0 alone writes"
    mirror = Mirror.of(training.unit)
    assert mirror
    assert mirror.pull() == [], "the driver ended before it had all"
    Checkpoints(training.checkpoints).refresh()
    check_survived(training, factory, **survived)
    check_tracked(training)
    kept = {name for name in s3.keys() if "/checkpoints/" in name}
    files = (path for path in training.checkpoints.rglob("*") if path.is_file())
    assert kept == {f"storage/{path.relative_to(training.storage)}" for path in files}


def test_two_nodes_that_share_only_a_bucket(apart, training, s3, tmp_path_factory):
    driver = start(apart, training, s3)
    assert driver.wait(PATIENCE) == 0, driver.said()
    assert "Traceback" not in driver.said() and "goes on from" not in driver.said()
    check_ended(apart, training, tmp_path_factory, s3)


def test_the_node_of_rank_0_is_lost_with_its_disk(apart, training, s3, tmp_path_factory):
    """Another one comes with an empty disk."""
    driver = start(apart, training, s3)
    wait_for(lambda: any((m.sees(training).unit / "lock.pid").exists() for m in apart.machines), PATIENCE, "rank 0")
    first = apart.first(training)
    first.sees(training).reaches(fault_step("apart", STEPS), driver)
    saved = there(training, s3).step
    apart.lose(first)
    apart.add()

    assert driver.wait(PATIENCE) == 0, driver.said()
    assert driver.said().count("it goes on from the last checkpoint") == 1 and "Traceback" not in driver.said()
    assert "node lost: " in driver.said()
    check_ended(apart, training, tmp_path_factory, s3, beginnings=1, saved=saved)
