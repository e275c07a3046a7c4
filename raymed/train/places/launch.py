"""Units of a job to where they run: this process, Ray Train workers, or side by side as Ray tasks."""

import dataclasses
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from raymed.config import UserError, replace
from raymed.data.folds import RepeatedFold
from raymed.storage import address
from raymed.tasks.recipe import Recipe
from raymed.tasks.task import Phase
from raymed.train.loop import Interrupted
from raymed.train.nets import check_network_stages
from raymed.train.places.cluster import connected, cpus_for, fetched, free_cpus, gpus_of, is_submitted, require
from raymed.train.places.nodes import check_nodes, check_tracking, check_versions
from raymed.train.places.processes import launched, together, train_together
from raymed.train.plans.estimate import Plan, StepCost, Trainings, gpu_bytes, measure, trials_per_gpu
from raymed.train.plans.plan import PlanReport, check_fits, measurable, plan
from raymed.train.progress import show_progress
from raymed.train.runs.job import Job
from raymed.train.runs.sheet import write_sheet
from raymed.train.unit import Unit, phases_of, train_unit, unit_data

T = TypeVar("T")
ADVICE = "lower --compute.cpus-per-worker, use --compute.device cpu or, for memory, raise the stage's accumulate"


def run_one_by_one(job: Job, units: Sequence[Unit]) -> bool:
    """Train units in order: in this process, together with those that torchrun or srun started beside it, or each on
    Ray Train workers, where the job asks for several or was submitted to a cluster.

    Returns whether all are finished: False when the job's budget is used up before.
    """
    if launched():
        announce(job, [units])
        job.go_on()
        with together(job.config.compute):
            return all(_train_here(job, unit, train_together) for unit in units)
    if job.config.compute.workers == 1 and not is_submitted():
        announce(job, [units])
        job.go_on()
        return all(_train_here(job, unit) for unit in units)
    from raymed.train.places.ray_train import train_with_workers

    with connected():
        check_cluster(job)
        announce(job, [units], in_turn=True)
        job.go_on()
        return all(unit.result() is not None or train_with_workers(unit, job.budget, job.interrupted) for unit in units)


def check_cluster(job: Job) -> None:
    """Raise UserError where a node of the connected cluster cannot do its part: versions, MLflow, storage, data."""
    check_versions()
    check_tracking(job.config.run.tracking, job.storage)
    check_nodes(job.storage, job.recipe.resolved_data)


def _train_here(job: Job, unit: Unit, train: Callable[..., dict] = train_unit) -> bool:
    gpus = unit.compute.workers * int(unit.compute.resolved_device().type == "cuda")
    try:
        with job.budget.running(unit.name, gpus):
            train(unit, job.over, show_progress(unit.name, unit.recipe.shown))
    except Interrupted:
        if job.interrupted() or not job.budget.exhausted():  # the second: another process was asked to stop
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
    check_cluster(job)
    return all(_run_wave(job, [unit for unit in wave if unit.result() is None]) for wave in waves)


def announce(job: Job, waves: Sequence[Sequence[Unit]], *, in_turn: bool = False) -> None:
    """Print how long these units will take, and how much memory and disk, from a few measured steps of each kind.

    in_turn: they never run side by side, wherever they run. With `run.plan` print the plan of each kind instead, and
    end. Raises UserError where disk or memory does not suffice. Finished units count nothing.
    """
    _tell_data(job)
    kinds = [(kind, units) for wave in waves for kind, units in _kinds(wave).items()]
    if job.config.run.plan:
        _show_plans(dict(reversed(kinds)), in_turn)
    trainings: list[Trainings] = []
    costs: dict[str, list] = {}
    for kind, units in kinds:
        costs[kind] = costs.get(kind) or _where_it_runs(units, _measure, in_turn)
        job.keep_costs({phase.name: cost for phase, cost in costs[kind]})
        if costs[kind]:
            trainings.append(Trainings(kind, len(units), costs[kind], _at_once(units, costs[kind], in_turn)))
    if trainings:
        Plan(trainings).announce(job.folder)


def _tell_data(job: Job) -> None:
    """Write the data sheet; with `run.preview`, end there."""
    path = write_sheet(job)
    if path:
        print(f"data sheet: {path}", flush=True)
    if job.config.run.preview:
        sys.exit(0)


def _show_plans(kinds: Mapping[str, Sequence[Unit]], in_turn: bool) -> None:
    """What each kind of training would take. Ends the process; raises UserError where one cannot be started so."""
    if not kinds:
        print("everything is trained already: there is nothing to plan", flush=True)
    for units in kinds.values():
        planned = _where_it_runs(units, _plan, in_turn)
        planned.render()
        if planned.refusal:
            raise UserError(planned.refusal)
    sys.exit(0)


def _kinds(wave: Sequence[Unit]) -> dict[str, list[Unit]]:
    kinds: dict[str, list[Unit]] = {}
    for unit in wave:
        if unit.result() is None:
            kinds.setdefault(_kind(unit), []).append(unit)
    return kinds


def _where_it_runs(units: Sequence[Unit], look: Callable[[Unit, int | None], T], in_turn: bool) -> T:
    """`look` at the first unit, with the threads it will have, in this process or where Ray will run it."""
    import ray

    if not ray.is_initialized():
        return look(units[0], None)
    cpus, gpus = _resources(units[0], _side_by_side(units, in_turn), in_turn)
    require(cpus, gpus, advice=ADVICE)
    return fetched(ray.remote(num_cpus=cpus, num_gpus=gpus)(look).remote(units[0], cpus))


def _plan(unit: Unit, threads: int | None) -> PlanReport:
    data = unit_data(unit)
    return plan(phases_of(unit, data), data, unit.seed, unit.compute, threads=threads)


def _measure(unit: Unit, threads: int | None) -> list[tuple[Phase, StepCost]]:
    """Each phase of a unit with what it costs; nothing where this machine cannot hold its networks."""
    data = unit_data(unit)
    check_network_stages(unit.recipe.phases(data), unit.compute)
    phases = phases_of(unit, data)
    for warning in check_fits(phases, unit.compute):
        print(warning, flush=True)
    if not measurable(phases, unit.compute):
        print("no estimate: the networks are too large for one process of this machine (--plan says more)", flush=True)
        return []
    return [(phase, measure(phase, data, unit.seed, unit.compute, threads)) for phase in phases]


def _at_once(units: Sequence[Unit], costs: Sequence[tuple[Phase, StepCost]], in_turn: bool) -> int:
    """How many of them run side by side. Raises UserError where the memory of no node suffices for one."""
    import ray

    if not ray.is_initialized():
        return 1
    memory = max(cost.peak_bytes if cost.device == "cpu" else 0 for _, cost in costs)
    most = _side_by_side(units, in_turn)
    cpus, gpus = _resources(units[0], most, in_turn)
    return require(cpus, gpus, memory=memory, at_most=most, advice=ADVICE)


def _kind(unit: Unit) -> str:
    if unit.part == "encoder":
        return "encoders"
    if unit.recipe.two_stage:
        return "heads" if unit.recipe.encoder_from else "two-stage trainings"
    return "trainings"


def _run_wave(job: Job, todo: Sequence[Unit]) -> bool:
    import ray

    if not todo:
        return True
    cpus, gpus = _resources(todo[0], len(todo))
    room = require(job.config.compute.cpus_per_worker, gpus, advice=ADVICE)
    train = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=2)(_train)
    job.go_on()
    running = {train.remote(unit): unit for unit in todo}
    began = time.monotonic()
    # Ray starts them in order: those it has room for count as running.
    with job.budget.running(todo[0].name, gpus * min(room, len(todo))):
        while running:
            done, _ = ray.wait(list(running), timeout=1.0)
            if job.interrupted():
                raise KeyboardInterrupt
            for reference in done:
                _announce(running.pop(reference), fetched(reference), len(todo) - len(running), len(todo), began)
            if running and job.budget.exhausted():
                for reference in running:
                    ray.cancel(reference, force=True)
                return False
    return True


def _side_by_side(units: Sequence[Unit], in_turn: bool) -> int:
    """How many there could be: those on several workers take turns."""
    return 1 if in_turn or units[0].compute.workers > 1 else len(units)


def _resources(unit: Unit, count: int, in_turn: bool = False) -> tuple[int, int]:
    """CPUs and GPUs of one of `count` units side by side; of each worker of one that has several; in_turn, of a lone
    one, which takes what is free (`train_with_workers`)."""
    stated, gpus = unit.compute.cpus_per_worker, gpus_of(unit.compute.device)
    if unit.compute.workers > 1:
        return stated, gpus
    free = free_cpus(stated, gpus) if in_turn else 0
    return free or cpus_for(stated, gpus, count), gpus


def trials_on_a_gpu(unit: Unit, at_most: int) -> int:
    """How many such trainings fit into the memory of one GPU at a time, by the measured peak of one step."""
    import ray

    measured = ray.remote(num_cpus=1, num_gpus=1)(_peak_and_total).remote(unit)
    peak, total = fetched(measured)
    return trials_per_gpu(peak, total, at_most)


def _peak_and_total(unit: Unit) -> tuple[int, int]:
    return max(cost.peak_bytes for _, cost in _measure(unit, None)), gpu_bytes()


def _train(unit: Unit) -> dict:
    """An encoder, which everything waits for, says how far it is; of the others their end is news enough."""
    show = show_progress(unit.name, unit.recipe.shown)
    return train_unit(unit, report=show if unit.part == "encoder" else lambda evaluation: None)


def _announce(unit: Unit, result: dict, done: int, total: int, began: float) -> None:
    metrics = unit.recipe.shown if "val" in result else ()
    shown = "".join(f"  val {name} {result['val'][name]:.4f}" for name in metrics)
    left = round((time.monotonic() - began) / done * (total - done))
    print(f"{unit.name} done{shown}  ({done} of {total}, about {left // 60}:{left % 60:02d} left)", flush=True)


def encoder_units(job: Job, seeds: Sequence[int], folds: Sequence[RepeatedFold | None] = (None,)) -> list[Unit]:
    """The SupCon encoders of a job, one a seed and fold, for its heads to share."""
    return [unit_of(job, "encoder/", seed, fold, part="encoder") for seed in seeds for fold in folds]


def head_unit(job: Job, method: str, encoder: Unit) -> Unit:
    """A two-stage method on a shared encoder, of its seed and fold."""
    changes = {"method": method, "supcon.encoder_from": address(encoder.folder / "checkpoints" / "supcon")}
    return unit_of(job, f"{method}/", encoder.seed, encoder.fold, replace(job.recipe, changes))


def single_unit(job: Job, method: str, seed: int, fold: RepeatedFold | None = None) -> Unit:
    """A method with one phase."""
    return unit_of(job, f"{method}/", seed, fold, replace(job.recipe, {"method": method}))


def unit_of(
    job: Job, place: str, seed: int, fold: RepeatedFold | None, recipe: Recipe | None = None, part: Any = "all"
) -> Unit:
    """A training of the run, in the folder `place` ("" or ending in /), named by its fold, if it has one, and seed."""
    name = f"seed-{seed}" if fold is None else f"{fold.name}-seed-{seed}"
    return dataclasses.replace(job.unit(f"{place}{name}", seed, recipe, part), fold=fold)


def flat(methods: Mapping[str, Sequence[Unit]]) -> list[Unit]:
    """The units of all methods."""
    return [unit for units in methods.values() for unit in units]


def check_single_worker(job: Job) -> None:
    """Raise UserError where several workers are asked of a job whose trainings each run on one."""
    if job.config.compute.workers > 1:
        raise UserError(
            f"{job.kind} trains many models side by side, each on one worker: leave --compute.workers at "
            "1, and start it without torchrun or srun"
        )
