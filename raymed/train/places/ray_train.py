"""A unit on Ray Train workers, whatever happens to them and their nodes.

One attempt is one fit of Ray Train with a fixed number of workers and no retries of Ray's own. It ends because the unit
is finished, because this process (the driver) asked the workers to stop after a checkpoint, or because something died.
What then happens is decided here: the next attempt begins as soon as there is room, with as many workers as there is
room for, from the last checkpoint. Ray Train's own retries know no limit for missing nodes, try again what cannot
succeed, and resize a group by killing it.
"""

import json
import os
import re
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from raymed.config import UserError
from raymed.distributed import rank
from raymed.storage import lock
from raymed.train.elastic import group_sizes
from raymed.train.loop import Interrupted
from raymed.train.places.cluster import fetched, free_cpus, gpus_of, require
from raymed.train.places.desk import open_desk
from raymed.train.places.peers import collective_timeout, is_loss, load_in_turn
from raymed.train.places.room import (
    Bundle,
    Nodes,
    await_room,
    draining,
    patience,
    place,
    placement_groups,
    remove_placement_groups,
)
from raymed.train.plans.plan import check_group_fits
from raymed.train.progress import show_progress
from raymed.train.runs.budget import Budget
from raymed.train.unit import Unit, UnitRun, phases_of, unit_data

_FAILURES = 3  # in a row and without an evaluation between them: then the training has failed
_LOOK = 1.0  # seconds between two looks at nodes and budget
_SOURCE = re.compile(r"\[?\S*/\S+\.(?:cc|cpp|cu|h|hpp):\d+\]?[,:]?\s*")  # where a message of torch's comes from
_LEASE = 20.0  # seconds after which one that a lost node has left in a bucket is over: a new first worker waits for it
_FENCE = 120.0  # seconds for which a new first worker waits for an old one to die; a lease of NFS is 90


def train_with_workers(unit: Unit, budget: Budget, interrupted: Callable[[], bool] = lambda: False) -> bool:
    """Train and finish a unit on `unit.compute.workers` workers, each with its share of every batch. A lone one takes
    the CPUs that are free (`free_cpus`).

    It goes on from the last checkpoint after a lost worker, node or Ray Train controller, and with fewer workers down
    to `unit.compute.min_workers` where nodes are missing; with more again when they are back. Before a node that is
    taken away goes, the state is saved.

    Returns whether the unit is finished: False when the budget is used up. Raises UserError where the cluster is too
    small and stays so, for what a worker found wrong with what the user gave, and where workers died three times in a
    row without an evaluation between; Interrupted when `interrupted` says so, after a checkpoint; the error of workers
    that failed so often for another reason.
    """
    import ray

    compute = unit.compute
    sizes = [compute.workers]
    phases = phases_of(unit, unit_data(unit)) if compute.min_workers is not None else ()
    if compute.min_workers is not None:
        sizes = group_sizes(phases, compute.workers, compute.min_workers)
    gpus = gpus_of(compute.device)
    require(
        compute.cpus_per_worker, gpus, at_least=sizes[-1], advice="lower --compute.workers or --compute.cpus-per-worker"
    )
    if len(sizes) > 1 and (compute.zero_stage or compute.network_stages):
        check = ray.remote(num_cpus=compute.cpus_per_worker, num_gpus=gpus)(check_group_fits)
        fetched(check.remote(phases, compute, sizes[-1]))
    bundle = {"CPU": float(compute.cpus_per_worker)} | ({"GPU": 1.0} if gpus else {})
    return _Training(unit, budget, interrupted, sizes, bundle).run()


@dataclass
class _Training:
    """The attempts at a unit."""

    unit: Unit
    budget: Budget
    interrupted: Callable[[], bool]
    sizes: list[int]
    bundle: Bundle
    nodes: Nodes = field(default_factory=Nodes)
    deaths: list[bool] = field(default_factory=list)
    """Of each failure in a row, without an evaluation or a lost node between: whether a worker died."""

    def run(self) -> bool:
        while self.unit.result() is None:
            longest = patience(self.unit.compute.node_patience)
            size = await_room(self.bundle, self.sizes, self.nodes, self._over, longest)
            if size is None or self._over():
                break
            bundle = self._bundle()
            if not bundle["CPU"]:  # somebody else was faster
                continue
            with self.budget.running(self.unit.name, 0):  # no GPU until the workers have their place
                self._attempt(size, bundle)
        if self.interrupted():
            raise Interrupted
        return self.unit.result() is not None

    def _over(self) -> bool:
        return self.interrupted() or self.budget.exhausted() is not None

    def _attempt(self, size: int, bundle: Bundle) -> None:
        reason = None
        with _Group(self.unit, size, bundle) as group, ExitStack() as stack:
            missing, has_begun = None, False
            while not group.wait(_LOOK):
                if not has_begun and group.has_arrived():
                    has_begun = True
                    self.budget.started(self.unit.name, size * self.bundle.get("GPU", 0))
                    missing = self._place_for_more(size, stack)  # not before, or it could take the group's own place
                reason = reason or self._reason(group, missing)
                if reason:
                    group.stop()
        self._account(group, reason)

    def _bundle(self) -> Bundle:
        """Of each worker of the next attempt; of a lone one without CPUs where its room has gone."""
        if self.unit.compute.workers > 1:
            return self.bundle
        cpus = free_cpus(self.unit.compute.cpus_per_worker, int(self.bundle.get("GPU", 0)))
        return self.bundle | {"CPU": float(cpus)}

    def _place_for_more(self, size: int, stack: ExitStack) -> Any:
        """A placement group that has its place when there is room for the next larger group; None for the largest."""
        larger = [other for other in self.sizes if other > size]
        return stack.enter_context(place(self.bundle, larger[-1] - size)) if larger else None

    def _reason(self, group: "_Group", missing: Any) -> str | None:
        """Why the workers are to stop now, if they are."""
        if self._over():
            return "over"
        if leaving := draining().intersection(group.node_ids()):
            return f"preempted: {len(leaving)} of its nodes will be taken away"
        if missing and group.seconds() > _grow_after() and missing.wait(0):
            return "there is room for more workers"
        return None

    def _account(self, group: "_Group", reason: str | None) -> None:
        """Say what ended an attempt and count it; raise what must not be tried again."""
        if self.unit.result() is not None or (group.error is None and reason == "over"):
            return
        lost = self.nodes.look()
        if group.error is None:
            if reason is None:
                raise UserError(f"the workers of {self.unit.name} ended without a result")
            self.deaths = []
            then = "" if self._over() else ", and it goes on"
            print(f"{self.unit.name}: {reason}; the state is saved at {group.ended}{then}", flush=True)
            return
        if isinstance(group.error, UserError):
            raise group.error
        if _found_no_place(group.error) and not lost:  # somebody else was faster: `await_room` waits, and tells of it
            return
        what = f"node lost: {', '.join(lost)}" if lost else what_failed(group.error)
        if self._over():
            print(f"{self.unit.name}: {what}; the last checkpoint is kept", flush=True)
            return
        self._count(group, what, bool(lost))
        print(f"{self.unit.name}: {what}; it goes on from the last checkpoint", flush=True)

    def _count(self, group: "_Group", what: str, lost: bool) -> None:
        """One failure more; raises what has failed too often. Nodes may be lost as often as there are new ones."""
        assert group.error
        self.deaths = [] if lost or group.evaluations else self.deaths
        if not lost:
            self.deaths.append(is_death(group.error))
        if len(self.deaths) < _FAILURES:
            return
        if not all(self.deaths):
            raise group.error
        raise UserError(
            f"{self.unit.name}: workers died {_FAILURES} times in a row without an evaluation between, last: {what}. "
            "The machine may lack memory (`dmesg` says whom the kernel killed): lower the stage's batch_size or raise "
            "its accumulate, or put fewer workers on a machine with --compute.cpus-per-worker. The same command "
            "continues from the last checkpoint"
        )


class _Group:
    """One fit of Ray Train, in a thread. A context manager: at its end nothing of it is left."""

    def __init__(self, unit: Unit, size: int, bundle: Bundle):
        self.unit, self.size, self.bundle = unit, size, bundle
        self.error: BaseException | None = None
        self.ended = ""
        self.evaluations = 0
        self._nodes: list[str] = []

    def __enter__(self) -> "_Group":
        self._began = time.monotonic()
        self._before = placement_groups()
        self._desk = open_desk(self.size)
        self._thread = threading.Thread(target=self._fit, name="ray-train", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        import ray

        if self._thread.is_alive():
            self._kill()
        self.evaluations = self._ask("evaluations", 0)
        ray.kill(self._desk)
        remove_placement_groups(placement_groups() - self._before)

    def wait(self, seconds: float) -> bool:
        """Whether it has ended, after so long at most."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def stop(self) -> None:
        """Ask the workers to stop after a checkpoint."""
        self._desk.ask.remote()

    def seconds(self) -> float:
        """How long it has been there."""
        return time.monotonic() - self._began

    def node_ids(self) -> list[str]:
        """Where its workers are, one for each; those that have not arrived yet are nowhere."""
        if len(self._nodes) < self.size:
            self._nodes = [node for node, _ in self._ask("workers", [])]
        return self._nodes

    def has_arrived(self) -> bool:
        """Whether all of its workers are at work."""
        return len(self.node_ids()) == self.size

    def _ask(self, what: str, default: Any) -> Any:
        import ray
        from ray.exceptions import RayError

        try:
            return ray.get(getattr(self._desk, what).remote(), timeout=10)
        except RayError:
            return default

    def _kill(self) -> None:
        """End the workers; Ray Train then ends by itself."""
        import ray

        self.stop()
        for _, actor in self._ask("workers", []):
            ray.kill(actor)
        self._thread.join(30)

    def _fit(self) -> None:
        from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchConfig, TorchTrainer

        gpu = "GPU" in self.bundle
        timeout = int(collective_timeout().total_seconds())
        try:
            with tempfile.TemporaryDirectory(prefix="raymed-") as folder:  # nothing that Ray keeps is used
                trainer = TorchTrainer(
                    _worker,
                    train_loop_config={"unit": self.unit, "desk": self._desk},
                    torch_config=TorchConfig(backend="nccl" if gpu else "gloo", timeout_s=timeout),
                    scaling_config=ScalingConfig(
                        num_workers=self.size, use_gpu=gpu, resources_per_worker={"CPU": self.bundle["CPU"]}
                    ),
                    run_config=RunConfig(
                        storage_path=folder,
                        failure_config=FailureConfig(0, controller_failure_limit=0, max_preemption_failures=0),
                        logging_config=LoggingConfig("CRITICAL"),  # what failed, our own lines say
                    ),
                )
                self.ended = trainer.fit().return_value or ""
        except BaseException as error:
            self.error = _unwrapped(error)


def _unwrapped(error: BaseException) -> BaseException:
    """The UserError that a worker raised, where one did."""
    for failure in getattr(error, "worker_failures", {}).values():
        if isinstance(failure, UserError):
            return UserError(str(failure))
    return error


def is_death(error: BaseException) -> bool:
    """Whether what ended a group is that workers died."""
    failures = getattr(error, "worker_failures", {}).values()
    return bool(failures) and all(_has_died(failure) or is_loss(failure) for failure in failures)


def _found_no_place(error: BaseException) -> bool:
    """Whether a group has not begun, since the room that was free has gone."""
    return "StartupTimeout" in type(getattr(error, "controller_failure", None)).__name__  # a class of Ray Train's own


def what_failed(error: BaseException) -> str:
    """In a line. Where a worker died, the others fail too, in a collective: that is not worth telling."""
    error = getattr(error, "controller_failure", error)
    failures = getattr(error, "worker_failures", {})
    if dead := [_death(number, failure) for number, failure in failures.items() if _has_died(failure)]:
        return ", ".join(dead)
    if is_death(error):
        return f"a worker died (worker {min(failures)} has lost its connection to another)"
    number, failure = next(((n, f) for n, f in failures.items() if not is_loss(f)), (None, error))
    who = "Ray Train" if number is None else f"worker {number}"
    line = _SOURCE.sub("", (str(failure).strip() or "no message").splitlines()[0])
    return f"{who} failed ({type(failure).__name__}: {line})"


def _has_died(failure: BaseException) -> bool:
    return "HealthCheck" in type(failure).__name__  # a class of Ray Train's own


def _death(number: int, failure: BaseException) -> str:
    """Which process that was, where Ray says so."""
    told = dict(re.findall(r"^\t(pid|ip): (\S+)$", str(failure), re.MULTILINE))
    return f"worker {number} died" + (f" (PID {told['pid']} on {told.get('ip')})" if "pid" in told else "")


def _grow_after() -> float:
    """Seconds that a group runs before it is stopped to grow: starting anew costs time too."""
    return float(os.environ.get("RAYMED_GROW_AFTER", 60))


def _worker(config: dict) -> str:
    """What every worker does. Returns where it stopped when it was asked to, else nothing."""
    import ray

    unit, desk, context = config["unit"], config["desk"], ray.get_runtime_context()
    ray.get(desk.arrive.remote(context.get_node_id(), context.current_actor))
    asked = desk.asked.remote()  # has a value when the driver asks, and an error when it is gone
    show = show_progress(unit.name, unit.recipe.shown)
    with _alone(unit.folder) if rank() == 0 else ExitStack():
        load_in_turn(unit)
        ray.get(desk.ready.remote())  # for hours if need be, which no collective would wait
        run = UnitRun(unit, lambda: bool(ray.wait([asked], timeout=0)[0]))
        try:
            for evaluation in run.evaluations():
                if rank() == 0:
                    show(evaluation)
                    desk.note.remote(evaluation.number)
        except Interrupted:
            return _where(run)
        run.finish()
    return ""


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Within: no other first worker is at the unit. One whose driver or node has just died may live for seconds."""
    until = time.monotonic() + _FENCE
    with ExitStack() as stack:
        while True:
            try:
                stack.enter_context(lock(folder / "lock", _LEASE))
                break
            except UserError:
                if time.monotonic() > until:
                    raise
                time.sleep(0.5)
        yield


def _where(run: UnitRun) -> str:
    """Where the last checkpoint is, in words."""
    for phase in reversed(run.fit.phases):
        if last := run.fit.checkpoints(phase.name).find("last"):
            return f"step {json.loads((last / 'state.json').read_text())['step']} of phase {phase.name}"
    return "its start"
