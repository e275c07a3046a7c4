"""Units of a job to where they run: this process, Ray Train workers, or side by side as Ray tasks."""

from collections.abc import Sequence

from raymed.config import UserError
from raymed.train.cluster import connected, require
from raymed.train.job import Job, show_progress
from raymed.train.unit import Unit, train_unit


def run_one_by_one(job: Job, units: Sequence[Unit]) -> None:
    """Train units in order: in this process, or each on Ray Train workers where it asks for several."""
    for unit in units:
        if unit.compute.workers == 1:
            train_unit(unit, job.interrupted, show_progress(unit.name))
        elif unit.result() is None:
            from raymed.train.ray_train import train_with_workers

            with connected():
                train_with_workers(unit)


def run_side_by_side(job: Job, waves: Sequence[Sequence[Unit]]) -> None:
    """Train units as Ray tasks, as many at a time as the cluster has room for; a wave begins when the one before it has
    ended. The first failure ends the job; finished units are not trained again by the next one.
    """
    import ray

    for wave in waves:
        todo = [unit for unit in wave if unit.result() is None]
        if not todo:
            continue
        cpus, gpus = _share(todo), float(todo[0].compute.device == "cuda")
        require(cpus, gpus, advice="lower --compute.cpus-per-worker, or use --compute.device cpu")
        train = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=2)(_train)
        running = {train.remote(unit): unit for unit in todo}
        while running:
            done, _ = ray.wait(list(running), timeout=1.0)
            if job.interrupted():
                raise KeyboardInterrupt
            for reference in done:
                _announce(running.pop(reference), ray.get(reference), len(running))


def _share(units: Sequence[Unit]) -> int:
    """CPUs of one unit: what it asks for, or more where a node has more than enough for all of them."""
    import ray

    nodes = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
    return max(units[0].compute.cpus_per_worker, min(filter(None, nodes), default=1) // len(units))


def _train(unit: Unit) -> dict:
    return train_unit(unit, report=show_progress(unit.name))


def _announce(unit: Unit, result: dict, left: int) -> None:
    shown = "".join(f"  val {name} {result['val'][name]:.4f}" for name in ("auroc", "auprc")) if "val" in result else ""
    print(f"{unit.name} done{shown}  ({left} to go)", flush=True)


def check_single_worker(units: Sequence[Unit], what: str) -> None:
    """Raise UserError where several workers are asked for by something whose trainings each run on one."""
    if any(unit.compute.workers > 1 for unit in units):
        raise UserError(f"{what} trains many models side by side, each on one worker: leave --compute.workers at 1")
