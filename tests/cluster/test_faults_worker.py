"""One of two Ray Train workers is killed: the job goes on by itself and learns what it would have learned."""

import random
from collections.abc import Callable

import psutil
import pytest
from faults import TWO, Training, beside, check_survived, check_tracked, fault_step, images, kill
from nodes import wait_for

pytestmark = [pytest.mark.ray, pytest.mark.slow]
STEPS = 240
PLAIN = "--compute.engine=torch"  # which starts fastest; the other tests of faults have DeepSpeed


def _workers() -> list[psutil.Process]:
    """Of the cluster of this process, in the order in which they were started."""
    below = psutil.Process().children(recursive=True)
    return sorted((p for p in below if "RayTrainWorker" in " ".join(p.cmdline())), key=psutil.Process.create_time)


def test_a_worker_is_killed(ray_cluster, tmp_path, tmp_path_factory, capsys):
    training = Training(tmp_path / "storage", images(tmp_path_factory), None, (TWO, PLAIN), STEPS)

    def strike(over: Callable[[], bool]) -> tuple[int, int]:
        """Returns the step of the last whole checkpoint, and the PID of who died."""
        training.reaches(fault_step("worker", STEPS), over=over)
        worker, saved = random.Random("worker").choice(_workers()), training.saved()
        kill(worker)
        return saved, worker.pid

    saved, pid = beside(training.here, strike)

    said = capsys.readouterr().out
    assert said.count("it goes on from the last checkpoint") == 1 and "Traceback" not in said
    assert not psutil.pid_exists(pid)
    wait_for(lambda: not _workers(), 60, "the workers go")
    check_survived(training, tmp_path_factory, 1, saved)
    check_tracked(training)
