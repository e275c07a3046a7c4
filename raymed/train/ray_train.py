"""A unit on several Ray Train workers. Ray places and restarts them; checkpoints and records are the loop's own."""

import signal
import time

from raymed.config import UserError
from raymed.distributed import all_gather_object, rank
from raymed.train.budget import Budget
from raymed.train.cluster import gpus_of, require
from raymed.train.job import show_progress
from raymed.train.unit import Unit, UnitRun


def train_with_workers(unit: Unit, budget: Budget) -> bool:
    """Train and finish a unit on `unit.compute.workers` workers, each with its share of every batch.

    A lost worker restarts the group at the last checkpoint, three times at most. Returns whether the unit is finished:
    False when the budget is used up, which is looked at after every evaluation. Raises UserError where the cluster is
    too small, KeyboardInterrupt after Ctrl-C: the next run continues at the last evaluation.
    """
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    workers, cpus, gpus = unit.compute.workers, unit.compute.cpus_per_worker, gpus_of(unit.compute.device)
    require(cpus, gpus, at_least=workers, advice="lower --compute.workers or --compute.cpus-per-worker")
    trainer = TorchTrainer(
        _worker,
        train_loop_config={"unit": unit, "seconds": budget.seconds_left(workers * gpus)},
        torch_config=TorchConfig(backend="nccl" if gpus else "gloo"),
        scaling_config=ScalingConfig(num_workers=workers, use_gpu=bool(gpus), resources_per_worker={"CPU": cpus}),
        run_config=RunConfig(
            storage_path=str(unit.folder / "ray"),
            failure_config=FailureConfig(max_failures=3, controller_failure_limit=3),
        ),
    )
    ours = signal.getsignal(signal.SIGINT)
    try:
        with budget.running(unit.name, workers * gpus):
            trainer.fit()
    except SystemExit:  # Ray Train's handler of Ctrl-C ends the workers, and this process as if all were well
        raise KeyboardInterrupt from None
    finally:
        signal.signal(signal.SIGINT, ours)
    if unit.result() is None and budget.exhausted():
        return False
    if unit.result() is None:
        raise UserError(f"the workers of {unit.name} ended without a result: see {unit.folder / 'ray'}")
    return True


def _worker(config: dict) -> None:
    import ray.train

    run, deadline = UnitRun(config["unit"]), time.monotonic() + config["seconds"]
    show = show_progress(config["unit"].name)
    for evaluation in run.evaluations():
        if rank() == 0:
            show(evaluation)
        ray.train.report({"step": evaluation.step, "loss": evaluation.loss, **evaluation.metrics})
        if all_gather_object(time.monotonic() > deadline)[0]:  # the first worker's clock decides for all
            return
    run.finish()
