"""What stands above the workers is killed: Ray Train's controller, and the driver of the job, also with its cluster."""

import os
import shutil
import tempfile
import uuid
from pathlib import Path

import psutil
import pytest
from faults import (
    JOB,
    MARK,
    PATIENCE,
    Training,
    at_work,
    check_survived,
    check_tracked,
    fault_step,
    images,
    kill,
    marked,
)
from nodes import Nodes, wait_for

pytestmark = [pytest.mark.ray, pytest.mark.slow]
GONE = 60.0  # seconds after which nothing of a dead driver may be left


@pytest.fixture(scope="module")
def nodes(tmp_path_factory):
    """A cluster of one node with two CPUs."""
    with Nodes(tmp_path_factory.mktemp("cluster"), cpus=2) as nodes:
        yield nodes


def test_the_controller_is_killed(nodes, tmp_path, tmp_path_factory):
    """The job goes on by itself."""
    training = Training(tmp_path / "storage", images(tmp_path_factory))
    driver = nodes.driver(JOB, *training.arguments)

    training.reaches(fault_step("controller"), driver)
    [controller], saved = nodes.head.workers("TrainController"), training.saved()
    kill(controller)

    assert driver.wait(PATIENCE) == 0, driver.said()
    assert driver.said().count("it goes on from the last checkpoint") == 1 and "Traceback" not in driver.said()
    wait_for(lambda: not at_work(nodes.head), GONE, "the actors go")
    check_survived(training, tmp_path_factory, 1, saved)
    check_tracked(training)


def test_the_driver_is_killed_on_a_cluster_that_stays(nodes, tmp_path, tmp_path_factory):
    """Its workers end without it; the same command goes on."""
    training = Training(tmp_path / "storage", images(tmp_path_factory))
    driver = nodes.driver(JOB, *training.arguments)

    training.reaches(fault_step("driver"), driver)
    saved = training.saved()
    kill(psutil.Process(driver.process.pid))
    wait_for(lambda: not at_work(nodes.head), GONE, "the actors go")
    assert not (training.unit / "result.json").exists(), "it was too late"
    again = nodes.driver(JOB, *training.arguments)

    assert again.wait(PATIENCE) == 0, again.said()
    assert "Traceback" not in again.said()
    check_survived(training, tmp_path_factory, 1, saved)
    check_tracked(training)


@pytest.fixture
def temporary():
    """A folder with a short path, as Ray's sockets need."""
    folder = Path(tempfile.mkdtemp(prefix="rf-"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def test_the_driver_is_killed_with_a_cluster_of_its_own(temporary, tmp_path, tmp_path_factory):
    """Nothing of it is left; the same command goes on."""
    training = Training(tmp_path / "storage", images(tmp_path_factory))
    mark = uuid.uuid4().hex
    own = {MARK: mark, "TMPDIR": str(temporary), "HOME": str(tmp_path)}
    driver = training.start(tmp_path, **own)

    training.reaches(fault_step("cluster"), driver)
    saved = training.saved()
    assert len(marked(mark)) > 5, "raylet, GCS, controller and workers have inherited the mark"
    kill(psutil.Process(driver.process.pid))
    driver.wait(10)
    wait_for(lambda: not marked(mark), GONE, f"end of {[p.cmdline()[:3] for p in marked(mark)]}")
    assert not (training.unit / "result.json").exists(), "it was too late"
    again = training.start(tmp_path, **own)

    assert again.wait(PATIENCE) == 0, again.said()
    assert "Traceback" not in again.said()
    wait_for(lambda: not marked(mark), GONE, "the end of all")
    check_survived(training, tmp_path_factory, 1, saved)
    check_tracked(training)
    assert os.listdir(training.storage / "outboxes") == []
