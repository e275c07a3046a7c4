"""Units of a job to where they run: this process, Ray Train workers, or side by side as Ray tasks."""

import time
from collections.abc import Mapping, Sequence

from raymed.config import UserError, replace
from raymed.tasks.task import Phase
from raymed.train.cluster import connected, gpus_of, require
from raymed.train.estimate import Plan, StepCost, Trainings, gpu_bytes, measure, trials_per_gpu
from raymed.train.job import Job, show_progress
from raymed.train.loop import Interrupted
from raymed.train.unit import Unit, phases_of, train_unit, unit_data

ADVICE = "lower --compute.cpus-per-worker, use --compute.device cpu or, for memory, raise the stage's accumulate"


def run_one_by_one(job: Job, units: Sequence[Unit]) -> bool:
    """Train units in order: in this process, or each on Ray Train workers where the job asks for several.

    Returns whether all are finished: False when the job's budget is used up before.
    """
    announce(job, [units])
    if job.config.compute.workers == 1:
        return all(_train_here(job, unit) for unit in units)
    from raymed.train.ray_train import train_with_workers

    with connected():
        return all(unit.result() is not None or train_with_workers(unit, job.budget) for unit in units)


def _train_here(job: Job, unit: Unit) -> bool:
    try:
        with job.budget.running(unit.name, int(unit.compute.resolved_device().type == "cuda")):
            train_unit(unit, job.over, show_progress(unit.name))
    except Interrupted:
        if job.interrupted():
            raise
        return False
    return True


def run_side_by_side(job: Job, waves: Sequence[Sequence[Unit]]) -> bool:
    """Train units as Ray tasks, as many at a time as the cluster has room for; a wave begins when the one before it has
    ended. The first failure ends the job; finished units are not trained again by the next one.

    Returns whether all are finished: False when the job's budget is used up before; what runs then is cut off at its
    last checkpoint.
    """
    check_single_worker(job)
    return all(_run_wave(job, [unit for unit in wave if unit.result() is None]) for wave in waves)


def announce(job: Job, waves: Sequence[Sequence[Unit]]) -> None:
    """Print how long these units will take, and how much memory and disk, from one measured step of each kind.

    Raises UserError where the disk does not suffice. Finished units count nothing.
    """
    trainings: list[Trainings] = []
    costs: dict[str, list] = {}
    for kind, units in ((kind, units) for wave in waves for kind, units in _kinds(wave).items()):
        costs[kind] = costs.get(kind) or _measured(units)
        trainings.append(Trainings(kind, len(units), costs[kind], _at_once(units, costs[kind])))
    if trainings:
        Plan(trainings).announce(job.folder)


def _kinds(wave: Sequence[Unit]) -> dict[str, list[Unit]]:
    kinds: dict[str, list[Unit]] = {}
    for unit in wave:
        if unit.result() is None:
            kinds.setdefault(_kind(unit), []).append(unit)
    return kinds


def _measured(units: Sequence[Unit]) -> list[tuple[Phase, StepCost]]:
    """Each phase of these units with what it costs where they will run."""
    import ray

    if not ray.is_initialized():
        return _measure(units[0], None)
    cpus, gpus = cpus_for(units[0], len(units)), gpus_of(units[0].compute.device)
    require(cpus, gpus, advice=ADVICE)
    return ray.get(ray.remote(num_cpus=cpus, num_gpus=gpus)(_measure).remote(units[0], cpus))


def _measure(unit: Unit, threads: int | None) -> list[tuple[Phase, StepCost]]:
    data = unit_data(unit)
    return [(phase, measure(phase, data, unit.seed, unit.compute, threads)) for phase in phases_of(unit, data)]


def _at_once(units: Sequence[Unit], costs: Sequence[tuple[Phase, StepCost]]) -> int:
    """How many of them run side by side. Raises UserError where the memory of no node suffices for one."""
    import ray

    if not ray.is_initialized():
        return 1
    memory = max(cost.peak_bytes if cost.device == "cpu" else 0 for _, cost in costs)
    cpus, gpus = cpus_for(units[0], len(units)), gpus_of(units[0].compute.device)
    return require(cpus, gpus, memory=memory, at_most=len(units), advice=ADVICE)


def _kind(unit: Unit) -> str:
    if unit.part == "encoder":
        return "encoders"
    if unit.recipe.two_stage:
        return "heads" if unit.recipe.supcon.encoder_from else "two-stage trainings"
    return "trainings"


def _run_wave(job: Job, todo: Sequence[Unit]) -> bool:
    import ray

    if not todo:
        return True
    gpus = gpus_of(job.config.compute.device)
    room = require(job.config.compute.cpus_per_worker, gpus, advice=ADVICE)
    train = ray.remote(num_cpus=cpus_for(todo[0], len(todo)), num_gpus=gpus, max_retries=2)(_train)
    running = {train.remote(unit): unit for unit in todo}
    began = time.monotonic()
    # Ray starts them in order: those it has room for count as running.
    with job.budget.running(todo[0].name, gpus * min(room, len(todo))):
        while running:
            done, _ = ray.wait(list(running), timeout=1.0)
            if job.interrupted():
                raise KeyboardInterrupt
            for reference in done:
                _announce(running.pop(reference), ray.get(reference), len(todo) - len(running), len(todo), began)
            if running and job.budget.exhausted():
                for reference in running:
                    ray.cancel(reference, force=True)
                return False
    return True


def cpus_for(unit: Unit, count: int = 1) -> int:
    """CPUs of one of `count` units: what it asks for, or more where a node has more than enough for all of them."""
    import ray

    nodes = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
    return max(unit.compute.cpus_per_worker, min(filter(None, nodes), default=1) // count)


def trials_on_a_gpu(unit: Unit, at_most: int) -> int:
    """How many such trainings fit into the memory of one GPU at a time, by the measured peak of one step."""
    import ray

    measured = ray.remote(num_cpus=1, num_gpus=1)(_peak_and_total).remote(unit)
    return trials_per_gpu(*ray.get(measured), at_most)


def _peak_and_total(unit: Unit) -> tuple[int, int]:
    return max(cost.peak_bytes for _, cost in _measure(unit, None)), gpu_bytes()


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
