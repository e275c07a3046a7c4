"""What a training needs of its workers, told before anything starts: memory at every ZeRO stage, traffic, arithmetic
and time; which stage is advised and why; and a refusal where it cannot fit.

Weights, gradients and states are counted (`sizes.py`), before any of them is allocated where a network can be built on
torch's meta device. Activations, FLOPs and times are measured by a dry run of one worker's share of a batch
(`estimate.py`), where that fits on this machine at all.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from raymed.config import UserError
from raymed.data.dataset import DataSet
from raymed.tasks.task import Phase
from raymed.train.compute import Compute
from raymed.train.plans.estimate import StepCost, gpu_bytes, in_bytes, measure
from raymed.train.plans.flops import mfu
from raymed.train.plans.place import Place, places
from raymed.train.plans.scaling import Scaled, projections
from raymed.train.plans.sizes import Bytes, Sizes, copied_bytes, memory_of, sent_of, sizes_of

HEADROOM = 0.1  # of a device's memory that is kept free: torch's allocator holds more than is in use
CONTEXT = 600 * 2**20  # bytes that CUDA with its libraries takes of a GPU, or Python with torch of a CPU's memory
_LARGE = 1_000_000_000  # trained parameters from which on sharding is worth what it costs
_MOST_WORKERS = 1024  # that are thought of


@dataclass(frozen=True)
class PhasePlan:
    """One phase."""

    phase: Phase
    sizes: dict[str, Sizes]
    """By network."""
    compute: Compute
    cost: StepCost | None
    """Measured; None where the dry run does not fit on this machine."""

    @property
    def workers(self) -> int:
        """Those that the run asks for."""
        return self.compute.workers

    @property
    def gpu(self) -> bool:
        """Whether a worker's device is one."""
        return self.compute.resolved_device().type == "cuda"

    @property
    def micro_batch(self) -> int:
        """Images at a time on one worker."""
        return math.ceil(self.phase.batch_size / self.phase.accumulate / self.workers)

    @property
    def trained(self) -> int:
        """Trained parameters."""
        return sum(sizes.trained for sizes in self.sizes.values())

    @property
    def activations(self) -> int:
        """Bytes of one worker, 0 where they are not known."""
        return self.cost.activation_bytes if self.cost else 0

    @property
    def seconds(self) -> float:
        """Of the whole phase."""
        if self.cost is None:
            return math.nan
        training, scoring = self.phase.steps * self.cost.step_seconds, self.cost.evaluation_seconds
        return self.cost.setup_seconds + training + self.phase.evaluations * scoring

    @property
    def mfu(self) -> float:
        """Of the dry run's steps, communication left out."""
        if self.cost is None:
            return math.nan
        images = self.micro_batch * self.phase.accumulate
        return mfu(self.cost.flops_per_sample, images / self.cost.step_seconds, self.cost.peak_flops)

    def stage_of(self, network: str, place: Place) -> int:
        """Of one network: what `compute.network_stages` gives it, else the place's; 3 cannot differentiate twice."""
        stage = place.stage
        if self.compute.network_stages and self.compute.resolved_engine(self.workers) == "deepspeed":
            stage = dataclasses.replace(self.compute, zero_stage=stage, offload=False).stage_of(network)
        return min(stage, 2) if network in self.phase.task.double_backward else stage

    def memory(self, network: str, place: Place, workers: int = 0, accumulate: int = 0) -> Bytes:
        """Of one worker for one network; with other numbers of workers or micro-batches than the run's if given."""
        stage, accumulate = self.stage_of(network, place), accumulate or self.phase.accumulate
        return memory_of(self.sizes[network], stage, workers or self.workers, accumulate, place.offload)

    def needed(self, place: Place, workers: int = 0, accumulate: int = 0) -> int:
        """Bytes of one worker's device: states, buffers, activations, a checkpoint's copy, and what a process takes
        beside its tensors."""
        states = sum(self.memory(network, place, workers, accumulate).total for network in self.sizes)
        images = self.phase.batch_size / (accumulate or self.phase.accumulate) / (workers or self.workers)
        training = states + round(self.activations * min(1.0, math.ceil(images) / self.micro_batch))
        return max(training, self.whole) + self.copy_share(workers) + CONTEXT

    def states(self, place: Place) -> int:
        """Bytes of one worker's device that nothing can do without."""
        return max(sum(self.memory(network, place).states for network in self.sizes), self.whole)

    @property
    def whole(self) -> int:
        """Bytes of all networks as they are built on every device, before stage 3 cuts them, and as they are scored."""
        return sum(sizes.whole_bytes for sizes in self.sizes.values())

    @functools.cached_property
    def copied(self) -> int:
        """Bytes of the copy from which rank 0 writes a checkpoint, in the memory of its CPU."""
        return copied_bytes(self.phase, self.sizes)

    def copy_share(self, workers: int = 0) -> int:
        """Bytes of it for each worker's device: none on a GPU; workers on a CPU share the memory that it is in."""
        return 0 if self.gpu else math.ceil(self.copied / (workers or self.workers))

    def sent(self, place: Place, workers: int) -> float:
        """Bytes that each of so many workers sends a step."""
        accumulate = self.phase.accumulate
        return sum(
            sent_of(sizes, self.stage_of(name, place), workers, accumulate) for name, sizes in self.sizes.items()
        )

    def projected(self, place: Place) -> list[Scaled]:
        """Weak scaling from the measured step."""
        return projections(self.cost.step_seconds, lambda workers: self.sent(place, workers)) if self.cost else []


@dataclass(frozen=True)
class PlanReport:
    """The plan of a run."""

    phases: tuple[PhasePlan, ...]
    compute: Compute
    device: str
    """Name of a worker's device."""
    memory: int
    """Bytes of it that one worker has."""
    whole: int
    """Bytes of it; the workers on a CPU share them."""

    @property
    def gpu(self) -> bool:
        """Whether it is one."""
        return self.compute.resolved_device().type == "cuda"

    @property
    def places(self) -> tuple[Place, ...]:
        """All that are looked at, with the one that is asked for."""
        found = places(self.compute.workers, self.gpu)
        return found if self.asked in found else (*found, self.asked)

    @property
    def asked(self) -> Place:
        """The place that the run asks for."""
        return asked_place(self.compute)

    @property
    def advised(self) -> Place | None:
        """The first place at which every phase fits with a tenth of the memory free; None: there is none."""
        return next((place for place in self.places if self.fits(place)), None)

    @property
    def room(self) -> float:
        """Bytes of it that may be used."""
        return (1 - HEADROOM) * self.memory

    def fits(self, place: Place) -> bool:
        """Whether it leaves a tenth of the memory free."""
        return self.needed(place) <= self.room

    def needed(self, place: Place) -> int:
        """Of the phase that needs most."""
        return max(phase.needed(place) for phase in self.phases)

    @property
    def advice(self) -> str:
        """The advised place and why; or what would have to change."""
        if self.advised is None:
            return "nothing fits here as it is. " + self._remedies()
        needs = f"needs {in_bytes(self.needed(self.advised))} of {in_bytes(self.memory)} a worker"
        if self.advised == self.places[0]:
            return f"{self.advised}: {needs}. {self._why_not_sharded()}"
        before = self.places[self.places.index(self.advised) - 1]
        flags = self.advised.flags + ("" if self.compute.workers > 1 else " --compute.engine deepspeed")
        return (
            f"{self.advised} ({flags}): {needs}, with {100 * HEADROOM:.0f} % to spare; "
            f"{before} needs {in_bytes(self.needed(before))}"
        )

    def _why_not_sharded(self) -> str:
        if self.compute.workers == 1:
            return "With one worker there is nothing to shard"
        if max(phase.trained for phase in self.phases) < _LARGE:
            return "Below a billion parameters sharding only costs speed"
        return "It fits, and sharding would cost speed"

    def _remedies(self) -> str:
        found = [*self._smaller_micro_batches(), *self._more_workers()]
        if self.compute.activation_checkpointing is False and any(phase.activations for phase in self.phases):
            share = max(phase.activations / phase.needed(self.places[-1]) for phase in self.phases)
            found.append(f"--compute.activation-checkpointing (activations are {100 * share:.0f} % of the need)")
        return f"What would help: {'; '.join(found)}" if found else "A smaller model is needed, or more memory"

    def _more_workers(self) -> list[str]:
        for workers in (2**k for k in range(1, 11) if self.compute.workers < 2**k <= _MOST_WORKERS):
            for place in places(workers, self.gpu):
                if all(p.needed(place, workers) <= self.room for p in self.phases):
                    return [f"--compute.workers {workers} {place.flags}, each with as much memory"]
        return []

    def _smaller_micro_batches(self) -> list[str]:
        for place in self.places:
            wanted = [self._accumulate(phase, place) for phase in self.phases]
            if all(wanted):
                changed = [(p.phase, k) for p, k in zip(self.phases, wanted, strict=True) if k != p.phase.accumulate]
                return [" ".join(f"--{phase.name}.accumulate {k}" for phase, k in changed) + f" {place.flags}"]
        return []

    def _accumulate(self, phase: PhasePlan, place: Place) -> int:
        """Micro-batches with which the phase would fit; 0: none do."""
        each = phase.phase.batch_size // phase.workers
        counts = [k for k in range(phase.phase.accumulate, each + 1) if each % k == 0]
        return next((k for k in counts if phase.needed(place, accumulate=k) <= self.room), 0)

    @property
    def refusal(self) -> str | None:
        """Why the run cannot be started as it is asked for; None: it can."""
        for phase in self.phases:
            message = refusal(phase, self.asked, self.whole, self.device)
            if message:
                return f"{message}. {self._or_else()}"
        return None

    def _or_else(self) -> str:
        return f"Advised: {self.advice}" if self.advised else self._remedies()

    def lines(self) -> list[str]:
        """The plan as text, a refusal left to who raises it."""
        from raymed.train.plans.table import lines

        return lines(self)

    def render(self) -> None:
        """Print the plan."""
        print("\n".join(self.lines()), flush=True)

    def as_dict(self) -> dict[str, Any]:
        """The plan as JSON takes it: bytes, seconds, FLOPs."""
        from raymed.train.plans.table import as_dict

        return as_dict(self)


def plan(
    phases: Sequence[Phase],
    data: DataSet,
    seed: int,
    compute: Compute,
    workers: int | None = None,
    threads: int | None = None,
) -> PlanReport:
    """Plan a run on this machine's kind of device.

    Args:
        workers: in place of compute.workers.
        threads: CPU threads that a worker will have where compute.threads does not say it; None: torch's choice.
    """
    compute = dataclasses.replace(compute, workers=workers or compute.workers)
    device = compute.resolved_device()
    whole, name = _memory(compute)
    memory = whole if device.type == "cuda" else whole // compute.workers
    planned = []
    for phase in phases:
        sizes = sizes_of(phase)
        cost = _measured(phase, sizes, data, seed, compute, threads)
        planned.append(PhasePlan(phase, sizes, compute, cost))
    return PlanReport(tuple(planned), compute, name, memory, whole)


def _measured(
    phase: Phase, sizes: dict[str, Sizes], data: DataSet, seed: int, compute: Compute, threads: int | None
) -> StepCost | None:
    if not _one_worker_fits(sizes, compute):
        return None
    try:
        return measure(phase, data, seed, compute, threads)
    except torch.OutOfMemoryError:
        return None


def measurable(phases: Sequence[Phase], compute: Compute) -> bool:
    """Whether a dry run, which shards nothing, has room on this machine."""
    return all(_one_worker_fits(sizes_of(phase), compute) for phase in phases)


def _one_worker_fits(sizes: dict[str, Sizes], compute: Compute) -> bool:
    states = sum(memory_of(size, 0, 1).states for size in sizes.values())
    return states <= (1 - HEADROOM) * _memory(compute)[0]


def check_fits(phases: Sequence[Phase], compute: Compute) -> list[str]:
    """Before a start: raises UserError where the states alone are larger than a device's memory. Returns warnings where
    little is left for activations.

    To be called where the workers will run, or on a machine like those.
    """
    memory, name = _memory(compute)
    place, warnings = asked_place(compute), []
    for phase in phases:
        planned = PhasePlan(phase, sizes_of(phase), compute, None)
        message = refusal(planned, place, memory, name)
        if message:
            better = PlanReport((planned,), compute, name, memory, memory)
            raise UserError(f"{message}. {better._or_else()}")
        needed = planned.needed(place)
        if needed > (1 - HEADROOM) * memory:
            warnings.append(
                f"warning: phase {phase.name} needs {in_bytes(needed)} of the {in_bytes(memory)} of {name} before its "
                "activations; --plan shows what would take less"
            )
    return warnings


def check_group_fits(phases: Sequence[Phase], compute: Compute, workers: int) -> None:
    """Raises UserError where a group that has shrunk to so many workers has no room for what more of them share: each
    keeps a larger piece then, and plain torch, which has charge of a single one, cuts nothing.

    To be called where the workers will run.
    """
    memory, name = _memory(compute)
    plain = {"zero_stage": 0, "network_stages": (), "offload": False}
    smaller = dataclasses.replace(
        compute, workers=workers, min_workers=None, **(plain if compute.resolved_engine(workers) == "torch" else {})
    )
    place = asked_place(smaller)
    for phase in phases:
        needed = PhasePlan(phase, sizes_of(phase), smaller, None).needed(place)
        if needed > memory:
            raise UserError(
                f"compute.min_workers is {workers}, but with so many phase {phase.name} needs {in_bytes(needed)} of "
                f"every worker's device at {place}, without activations, and {name} has {in_bytes(memory)}: set it "
                "higher, or leave it out"
            )


def asked_place(compute: Compute) -> Place:
    """Where a run's states lie: plain torch replicates them, and a CPU has nowhere else to put them."""
    if compute.resolved_engine(compute.workers) == "torch":
        return Place(0)
    return Place(compute.zero_stage, compute.offload and compute.resolved_device().type == "cuda")


def refusal(phase: PhasePlan, place: Place, memory: int, device: str) -> str | None:
    """Why a phase certainly does not fit; None where it may."""
    states = phase.states(place)
    if states <= memory:
        return None
    what = "without activations" if states > phase.whole else "as they are built, before they are cut"
    return (
        f"phase {phase.phase.name} cannot fit: its {phase.trained / 1e9:.3g} billion trained parameters take "
        f"{in_bytes(states)} on every worker at {place}, {what}, and {device} has {in_bytes(memory)}"
    )


def _memory(compute: Compute) -> tuple[int, str]:
    """(bytes, name) of the smallest GPU, or of this machine."""
    device = compute.resolved_device()
    if device.type == "cuda":
        return gpu_bytes(), torch.cuda.get_device_name(device)
    import psutil

    return psutil.virtual_memory().total, "this machine"
