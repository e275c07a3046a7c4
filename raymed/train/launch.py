"""Units of a job to where they run: this process, Ray Train workers, or side by side as Ray tasks."""

import time
from collections.abc import Mapping, Sequence

from raymed.config import UserError, replace
from raymed.train.cluster import connected, gpus_of, require
from raymed.train.job import Job, show_progress
from raymed.train.unit import Unit, train_unit

ADVICE = "lower --compute.cpus-per-worker, or use --compute.device cpu"


def run_one_by_one(job: Job, units: Sequence[Unit]) -> None:
    """Train units in order: in this process, or each on Ray Train workers where the job asks for several."""
    if job.config.compute.workers == 1:
        for unit in units:
            train_unit(unit, job.interrupted, show_progress(unit.name))
        return
    from raymed.train.ray_train import train_with_workers

    with connected():
        for unit in units:
            if unit.result() is None:
                train_with_workers(unit)


def run_side_by_side(job: Job, waves: Sequence[Sequence[Unit]]) -> None:
    """Train units as Ray tasks, as many at a time as the cluster has room for; a wave begins when the one before it has
    ended. The first failure ends the job; finished units are not trained again by the next one.
    """
    import ray

    check_single_worker(job)
    for wave in waves:
        todo = [unit for unit in wave if unit.result() is None]
        if not todo:
            continue
        gpus = gpus_of(job.config.compute.device)
        require(job.config.compute.cpus_per_worker, gpus, advice=ADVICE)
        cpus = _share(todo)
        train = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=2)(_train)
        running = {train.remote(unit): unit for unit in todo}
        began = time.monotonic()
        while running:
            done, _ = ray.wait(list(running), timeout=1.0)
            if job.interrupted():
                raise KeyboardInterrupt
            for reference in done:
                _announce(running.pop(reference), ray.get(reference), len(todo) - len(running), len(todo), began)


def _share(units: Sequence[Unit]) -> int:
    """CPUs of one unit: what it asks for, or more where a node has more than enough for all of them."""
    import ray

    nodes = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
    return max(units[0].compute.cpus_per_worker, min(filter(None, nodes), default=1) // len(units))


def _train(unit: Unit) -> dict:
    """An encoder, which everything waits for, says how far it is; of the others their end is news enough."""
    return train_unit(unit, report=show_progress(unit.name) if unit.part == "encoder" else lambda evaluation: None)


def _announce(unit: Unit, result: dict, done: int, total: int, began: float) -> None:
    shown = "".join(f"  val {name} {result['val'][name]:.4f}" for name in ("auroc", "auprc")) if "val" in result else ""
    left = round((time.monotonic() - began) / done * (total - done))
    print(f"{unit.name} done{shown}  ({done} of {total}, about {left // 60}:{left % 60:02d} left)", flush=True)


def encoder_units(job: Job, seeds: Sequence[int]) -> list[Unit]:
    """The SupCon encoders of a job, one a seed, for its heads to share."""
    return [job.unit(f"encoder/seed-{seed}", seed, job.recipe, part="encoder") for seed in seeds]


def head_unit(job: Job, method: str, encoder: Unit) -> Unit:
    """A two-stage method on a shared encoder."""
    changes = {"method": method, "supcon.encoder_from": str(encoder.folder / "checkpoints" / "supcon")}
    return job.unit(f"{method}/seed-{encoder.seed}", encoder.seed, replace(job.recipe, changes))


def single_unit(job: Job, method: str, seed: int) -> Unit:
    """A method with one phase."""
    return job.unit(f"{method}/seed-{seed}", seed, replace(job.recipe, {"method": method}))


def flat(methods: Mapping[str, Sequence[Unit]]) -> list[Unit]:
    """The units of all methods."""
    return [unit for units in methods.values() for unit in units]


def check_single_worker(job: Job) -> None:
    """Raise UserError where several workers are asked of a job whose trainings each run on one."""
    if job.config.compute.workers > 1:
        raise UserError(f"{job.kind} trains many models side by side, each on one worker: leave --compute.workers at 1")
