"""What checkpoints are kept in fails: an S3 server in the middle of an upload, and a disk that is full."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from faults import (
    JOB,
    PATIENCE,
    Training,
    at_work,
    check_survived,
    check_tracked,
    check_whole,
    fault_step,
    images,
)
from nodes import Nodes, wait_for

from raymed.storage import working_copy
from raymed.train.checkpoints.index import Index

pytestmark = [pytest.mark.ray, pytest.mark.slow]
CHECKPOINTS = "runs/run/seed-2023/checkpoints/single"


@pytest.fixture(scope="module")
def nodes(tmp_path_factory):
    """A cluster of one node with two CPUs."""
    with Nodes(tmp_path_factory.mktemp("cluster"), cpus=2) as nodes:
        yield nodes


def test_the_s3_server_is_killed_in_an_upload(nodes, s3, tmp_path_factory):
    """It is frozen, so that the next upload does not end, then killed, and restarted when training has gone on."""
    training = Training(working_copy(s3.url), images(tmp_path_factory), s3.url)
    driver = nodes.driver(JOB, *training.arguments, **s3.env)

    def there() -> Index:
        return Index.parse(s3.get(f"{CHECKPOINTS}/index.json")) or Index()

    training.reaches(fault_step("s3"), driver)
    wait_for(lambda: there().step == training.saved(), PATIENCE, "a checkpoint in the bucket")
    before = training.saved()
    s3.pause()
    assert training.saved() == before, "the next checkpoint came before the server was frozen"
    wait_for(lambda: training.saved() > before, PATIENCE, "the next checkpoint")
    during = training.saved()
    s3.kill()
    training.reaches(during + training.every // 2, driver)  # it does not wait for the upload
    s3.restart()

    assert driver.wait(PATIENCE) == 0, driver.said()
    assert "does not answer" in driver.said() and "Traceback" not in driver.said()
    wait_for(lambda: not at_work(nodes.head), PATIENCE, "the actors go")
    check_survived(training, tmp_path_factory)
    check_tracked(training)
    kept = {name for name in s3.keys() if name.startswith(CHECKPOINTS)}
    here = {f"{CHECKPOINTS}/{path.relative_to(training.checkpoints)}" for path in training.checkpoints.glob("**/*.*")}
    here = {name for name in here if Path(name).suffix in (".json", ".safetensors")}
    assert kept == here and there().step == training.saved()
    for name in kept:
        assert s3.get(name) == (training.storage / name).read_bytes()


@pytest.fixture
def small_disk(tmp_path):
    """A storage in which the folder of the unit is a disk of 64 MB."""
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("mounting a small disk needs root")
    unit = tmp_path / "storage" / "runs" / "run" / "seed-2023"
    unit.mkdir(parents=True)
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "none", unit]).returncode:
        pytest.skip("this root may not mount a file system")
    yield tmp_path / "storage"
    subprocess.run(["umount", "-l", unit], check=True)


def test_the_disk_is_full(nodes, small_disk, tmp_path_factory):
    """First with room for half a checkpoint, then with none: each time one message, and nothing half-written. The same
    command finishes when there is room again."""
    training = Training(small_disk, images(tmp_path_factory))
    checkpoints, outbox = re.escape(str(training.checkpoints)), re.escape(str(training.outbox))

    saved = _fill_at(
        fault_step("disk"), training, nodes, 0.5, rf"the checkpoint of step \d+ cannot be written to {checkpoints}: it "
    )
    step = max(training.losses()) + training.every // 2
    _fill_at(step, training, nodes, 0, f"the disk of {outbox} is full: make room; the same command ")

    again = nodes.driver(JOB, *training.arguments)
    assert again.wait(PATIENCE) == 0, again.said()
    check_survived(training, tmp_path_factory, 2, saved)
    check_tracked(training)


def _fill_at(step: int, training: Training, nodes: Nodes, left: float, expected: str) -> int:
    """Start the job, fill the disk when it has done so many steps, and see how it ends; then make room again.

    left: what stays free, in sizes of a checkpoint. Returns the step of the last checkpoint before.
    """
    driver = nodes.driver(JOB, *training.arguments)
    training.reaches(step, driver)
    saved, ballast = training.saved(), training.unit / "ballast"
    size = sum(path.stat().st_size for path in (training.checkpoints / f"step-{saved:06d}").iterdir())
    with ballast.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(training.unit).free - int(left * size))

    assert driver.wait(PATIENCE) == 2, driver.said()
    [message] = [line for line in driver.said().splitlines() if line.startswith("error: ")]
    assert re.match(f"error: {expected}", message), message
    assert "Traceback" not in driver.said()
    wait_for(lambda: not at_work(nodes.head), PATIENCE, "the actors go")
    check_whole(training)
    assert training.saved() >= saved
    ballast.unlink()
    return saved
