"""The network between two nodes is cut and healed. Each node has a network namespace of its own; a cable joins them.

Needs root and iproute2.
"""

import os
import random
import shutil
import subprocess
import time

import pytest
from faults import (
    JOB,
    PATIENCE,
    TWO,
    Training,
    at_work,
    check_survived,
    fault_step,
    images,
)
from nodes import Nodes, wait_for

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.skipif(os.geteuid() != 0 or shutil.which("ip") is None, reason="network namespaces need root and ip"),
]
NOWHERE = (
    "--tracking=http://127.0.0.1:9"  # several machines may not have an sqlite store, and a server is not the matter
)


class Cable:
    """Two network namespaces, "head" and "far", and what joins their only interfaces. A context manager."""

    def __init__(self, name: str):
        self.spaces = {"head": f"{name}-head", "far": f"{name}-far"}

    def __enter__(self) -> "Cable":
        head, far = self.spaces.values()
        for space in (head, far):
            _ip("netns", "add", space)
            _ip("-n", space, "link", "set", "lo", "up")
        _ip("link", "add", "eth0", "netns", head, "type", "veth", "peer", "name", "eth0", "netns", far)
        for end, space in self.spaces.items():
            _ip("-n", space, "addr", "add", f"{self.address(end)}/24", "dev", "eth0")
            _ip("-n", space, "link", "set", "eth0", "up")
        return self

    def __exit__(self, *error: object) -> None:
        for space in self.spaces.values():
            _ip("netns", "del", space)

    def address(self, node: str) -> str:
        """Of the head, or of any other node."""
        return "10.77.0.1" if node == "head" else "10.77.0.2"

    def inside(self, node: str) -> list[str]:
        """Words before a command."""
        return ["ip", "netns", "exec", self.spaces["head" if node == "head" else "far"]]

    def cut(self) -> None:
        """Nothing goes through, and nobody is told."""
        _ip("-n", self.spaces["far"], "link", "set", "eth0", "down")

    def heal(self) -> None:
        """Everything goes through again."""
        _ip("-n", self.spaces["far"], "link", "set", "eth0", "up")


def _ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True)
    if done.returncode and words[:2] == ("netns", "add"):
        pytest.skip(f"no network namespaces here: {done.stderr.strip()}")
    assert done.returncode == 0, f"ip {' '.join(words)}: {done.stderr}"


def test_the_network_is_cut_and_healed(tmp_path, tmp_path_factory):
    """For a moment, which nobody need notice; then until the far node is declared dead, and joins anew when healed."""
    training = Training(tmp_path / "storage", images(tmp_path_factory), flags=(TWO, NOWHERE))
    moment = random.Random("moment").randrange(10, training.every)
    with Cable(f"rf{os.getpid()}") as cable, Nodes(tmp_path, 1, cable.inside, cable.address) as nodes:
        far = nodes.add_node(name="far")
        driver = nodes.driver(JOB, *training.arguments)
        training.reaches(moment, driver)
        assert len(far.workers()) == len(nodes.head.workers()) == 1
        cable.cut()
        time.sleep(0.5)  # how long the fault lasts
        cable.heal()

        training.reaches(fault_step("network"), driver)
        saved = training.saved()
        cable.cut()
        driver.says("node lost: ", PATIENCE)
        driver.says("waiting, 600 s at most: this needs 2 x 1 CPU", PATIENCE)
        assert far.workers(), "the worker that was cut off has not noticed yet"
        cable.heal()
        wait_for(lambda: not far.processes(), PATIENCE, "the node that was declared dead ends by itself")
        nodes.add_node(name="far-again")
        driver.says("room for 2 workers", PATIENCE)
        assert driver.wait(PATIENCE) == 0, driver.said()
        wait_for(lambda: not [p for node in nodes.nodes for p in at_work(node)], PATIENCE, "the actors go")

    assert "Traceback" not in driver.said()
    check_survived(training, tmp_path_factory, 1, saved)
