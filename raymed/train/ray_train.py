"""A unit on several Ray Train workers. Ray places and restarts them; checkpoints and records are the loop's own."""

from raymed.config import UserError
from raymed.train.cluster import require
from raymed.train.unit import Unit, UnitRun


def train_with_workers(unit: Unit) -> None:
    """Train and finish a unit on `unit.compute.workers` workers, each with its share of every batch.

    A lost worker restarts the group at the last checkpoint, three times at most. Raises UserError where the cluster is
    too small.
    """
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    workers, cpus, gpu = unit.compute.workers, unit.compute.cpus_per_worker, unit.compute.device == "cuda"
    require(workers * cpus, workers * gpu, advice="lower --compute.workers or --compute.cpus-per-worker")
    TorchTrainer(
        _worker,
        train_loop_config={"unit": unit},
        torch_config=TorchConfig(backend="nccl" if gpu else "gloo"),
        scaling_config=ScalingConfig(num_workers=workers, use_gpu=gpu, resources_per_worker={"CPU": cpus}),
        run_config=RunConfig(
            storage_path=str(unit.folder / "ray"),
            failure_config=FailureConfig(max_failures=3, controller_failure_limit=3),
        ),
    ).fit()
    if unit.result() is None:
        raise UserError(f"the workers of {unit.name} ended without a result: see {unit.folder / 'ray'}")


def _worker(config: dict) -> None:
    import ray.train

    run = UnitRun(config["unit"])
    for evaluation in run.evaluations():
        ray.train.report({"step": evaluation.step, "loss": evaluation.loss, **evaluation.metrics})
    run.finish()
