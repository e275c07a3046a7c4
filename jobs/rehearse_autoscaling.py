"""Rehearse autoscaling: a small sweep on a cluster of this machine that begins as a head without CPUs for work, gets
workers while trials wait, and loses them when nothing does.

    python jobs/rehearse_autoscaling.py                                   # at most two workers of one CPU
    python jobs/rehearse_autoscaling.py --workers 3 --trials 9

The autoscaler is the one that clouds have; its nodes are processes here.
"""

import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from raymed.cluster.autoscaled import Autoscaled
from raymed.command import command
from raymed.config import UserError, check_range

JOB = Path(__file__).with_name("tune_asl.py")
SMALL = (
    "--data.preprocess.size=32 --supcon.batch-size=32 --supcon.steps=12 --supcon.evaluations=2 --supcon.accumulate=1 "
    "--head.batch-size=32 --head.steps=40 --head.evaluations=8 --sweep.no-batched --compute.threads=1"
).split()
SHRINK = 120.0  # seconds, beside those that a worker may be idle, in which all must be gone
LOOK = 0.25  # seconds between two looks


@dataclass(frozen=True)
class Rehearsal:
    """What is rehearsed."""

    workers: int = 2
    """Nodes of one CPU that may be started."""
    trials: int = 6
    """Of the sweep, each a Ray Tune trial on one CPU."""
    idle_seconds: float = 15.0
    """After which an idle worker goes; on a cloud that is minutes."""


def rehearse(config: Rehearsal) -> list[tuple[float, int]]:
    """All of it. Returns (seconds, workers) of every change. Raises UserError where the sweep fails, or workers did not
    come or go."""
    check_range("workers", config.workers, 1)
    check_range("trials", config.trials, 2)
    check_range("idle_seconds", config.idle_seconds, 1)
    with tempfile.TemporaryDirectory(prefix="autoscaling-") as folder:
        with Autoscaled(Path(folder), config.workers, 1, config.idle_seconds) as cluster:
            os.environ.update(cluster.environment)  # before Ray is imported here
            changes = list(_tell(_watch(config, cluster)))
    if max(count for _, count in changes) < config.workers:
        raise UserError(f"no more than {max(count for _, count in changes)} of {config.workers} workers ever came")
    return changes


def _watch(config: Rehearsal, cluster: Autoscaled) -> Iterator[tuple[float, int]]:
    """(seconds, workers) again and again, while the sweep runs and until no worker is left."""
    import ray

    ray.init(log_to_driver=False, logging_level=logging.ERROR)
    began = time.monotonic()
    words = [sys.executable, str(JOB), *SMALL, f"--sweep.num-trials={config.trials}"]
    once = {"RAY_DEDUP_LOGS": "1"}  # each node has a log monitor, and all of them read the same folder
    sweep = subprocess.Popen(words, env=cluster.environment | once, start_new_session=True)
    try:
        while sweep.poll() is None:
            yield time.monotonic() - began, _workers()
            time.sleep(LOOK)
        if sweep.returncode:
            raise UserError(f"the sweep ended with exit code {sweep.returncode}: see its messages above")
        ended = time.monotonic()
        print(f"{ended - began:5.0f} s  the sweep has ended", flush=True)
        while count := _workers():
            if time.monotonic() > ended + config.idle_seconds + SHRINK:
                raise UserError(f"{count} idle worker(s) are still there after {time.monotonic() - ended:.0f} s")
            yield time.monotonic() - began, count
            time.sleep(LOOK)
        yield time.monotonic() - began, 0
    finally:
        sweep.kill()
        ray.shutdown()


def _tell(seen: Iterator[tuple[float, int]]) -> Iterator[tuple[float, int]]:
    """Print and pass on what is not as before."""
    for count, same in groupby(seen, key=lambda at: at[1]):
        seconds = next(same)[0]
        print(f"{seconds:5.0f} s  {count} worker(s)", flush=True)
        yield seconds, count


def _workers() -> int:
    import ray

    return sum(node["Alive"] and node["Resources"].get("CPU", 0) > 0 for node in ray.nodes())


def main(config: Rehearsal) -> str:
    """What there is to say at the end."""
    return f"{max(count for _, count in rehearse(config))} worker(s) came, and all of them went"


if __name__ == "__main__":
    command(Rehearsal, main)
