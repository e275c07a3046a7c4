"""What a job will take, from a few measured steps of each of its phases: time, memory and disk, told before it starts.

`measure` trains a phase for a few steps in a scratch copy of its networks (`DryRun`), scores one batch, and throws all
of it away: nothing is written, and no later result changes.
"""

import contextlib
import functools
import math
import shutil
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from raymed.config import UserError
from raymed.data.dataset import DataSet
from raymed.tasks.task import Phase
from raymed.train.compute import Compute
from raymed.train.nets import Networks
from raymed.train.plans.dry_run import DryRun
from raymed.train.plans.flops import peak_flops as best_flops

_TIMED_STEPS = 3
_PATIENCE = 5.0  # seconds of timed steps after which no other is taken; a single one is often off by half
_CONTEXT = 600 * 2**20  # bytes that a process with CUDA, cuDNN and cuBLAS takes of its GPU beside torch's tensors


@dataclass(frozen=True)
class StepCost:
    """What a phase costs on this machine."""

    step_seconds: float
    """One optimiser step of one worker's share: the median of three, communication left out."""
    evaluation_seconds: float
    """One scoring of the validation split."""
    setup_seconds: float
    """Networks and engines, and the outputs of frozen networks for all images where the phase keeps them."""
    peak_bytes: int
    """On a GPU the most that torch had allocated; on the CPU the most this process had resident, Python and libraries
    included, as a worker has them too."""
    disk_bytes: int
    """The checkpoints: the best, the last ones and the one being written: weights, averages and the optimiser's
    state."""
    device: str
    """cpu or cuda."""
    workers: int = 1
    """Each of which takes `peak_bytes`."""
    activation_bytes: int = 0
    """What one micro-batch of a worker takes beside weights, gradients and optimiser state (`DryRun`)."""
    flops_per_sample: float = 0.0
    """Of forward and backward pass (`raymed.train.plans.flops`)."""
    peak_flops: float = math.nan
    """FLOP/s that the device of one worker can do at most."""
    peak_source: str = ""
    """Where that figure is from."""


def measure(phase: Phase, data: DataSet, seed: int, compute: Compute, threads: int | None = None) -> StepCost:
    """Cost of a phase in one process of this machine.

    Several workers share the batch: a step is then that of one worker's share, communication not counted. The engine is
    plain torch without compilation, so `peak_bytes` is what a worker takes at ZeRO stage 0 at most. What the phase
    starts from is not read: other weights take as long.

    Args:
        threads: CPU threads that a worker will have where compute.threads does not say it; None: torch's choice.
    """
    kept = torch.get_num_threads()
    wanted = compute.threads or threads
    devices = [compute.resolved_device()] if compute.resolved_device().type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        try:
            torch.set_num_threads(wanted or kept)
            return _Trial(phase, data, seed, compute).cost()
        finally:
            torch.set_num_threads(kept)


class _Trial:
    """A dry run by the clock."""

    def __init__(self, phase: Phase, data: DataSet, seed: int, compute: Compute):
        self.num_val, self.num_images = len(data.splits["val"]), len(data)
        self.run = DryRun(phase, data, seed, compute)  # with it what a process loads and compiles only once

    def cost(self) -> StepCost:
        run = self.run
        setup = self._seconds(run.build)
        if run.phase.cache:
            setup += self._cache_seconds()
        flops = run.flops_per_sample()
        peak_flops, peak_source = best_flops(run.device, run.compute.precision)
        run.step(0)  # the choice of kernels, the optimiser's state
        activations = run.activation_bytes()
        with _peak(run.device) as peak:
            run.step(1)
            run.score()
        return StepCost(
            step_seconds=self._step_seconds(),
            evaluation_seconds=self._seconds(run.score) * self.num_val / len(run.few) / run.compute.workers,
            setup_seconds=setup,
            peak_bytes=peak.bytes,
            disk_bytes=(2 + run.compute.keep_checkpoints) * _checkpoint_bytes(run.networks),
            device=run.device.type,
            workers=run.compute.workers,
            activation_bytes=activations,
            flops_per_sample=flops,
            peak_flops=peak_flops,
            peak_source=peak_source,
        )

    def _cache_seconds(self) -> float:
        """Of the frozen networks' outputs for all images, by those of a few."""
        self.run.keep_frozen()
        return self._seconds(self.run.keep_frozen) * self.num_images / len(self.run.few) / self.run.compute.workers

    def _step_seconds(self) -> float:
        seconds: list[float] = []
        while len(seconds) < _TIMED_STEPS and sum(seconds) < _PATIENCE:
            seconds.append(self._seconds(functools.partial(self.run.step, 2 + len(seconds))))
        return statistics.median(seconds)

    def _seconds(self, run: Callable[[], None]) -> float:
        self._wait()
        began = time.perf_counter()
        run()
        self._wait()
        return time.perf_counter() - began

    def _wait(self) -> None:
        if self.run.device.type == "cuda":
            torch.cuda.synchronize()


@dataclass
class _Peak:
    bytes: int = 0


@contextlib.contextmanager
def _peak(device: torch.device) -> Iterator[_Peak]:
    """The most memory in use within the block."""
    peak = _Peak()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield peak
        peak.bytes = torch.cuda.max_memory_allocated(device)
        return
    done = threading.Event()
    watcher = threading.Thread(target=_watch, args=(peak, done), daemon=True)
    watcher.start()
    try:
        yield peak
    finally:
        done.set()
        watcher.join()


def _watch(peak: _Peak, done: threading.Event) -> None:
    """Resident size every millisecond: torch gives up the interpreter while it computes."""
    import psutil

    process = psutil.Process()
    while True:
        peak.bytes = max(peak.bytes, process.memory_info().rss)
        if done.wait(0.001):
            return


def _checkpoint_bytes(networks: Networks) -> int:
    """Of one checkpoint on disk, but for a few kilobytes of names."""
    weights = sum(tensor.nbytes for tensor in networks.weights(averaged=False).values())
    states = [state for engine in networks.engines.values() for state in engine.optimizer_state().values()]
    optimizers = sum(tensor.nbytes for state in states for tensor in state.values())
    return (2 if networks.averages else 1) * weights + optimizers


@dataclass(frozen=True)
class Trainings:
    """Equal trainings, some at a time."""

    what: str
    """In the plural, such as "encoders"."""
    count: int
    """Those that are not finished yet."""
    phases: Sequence[tuple[Phase, StepCost]]
    """What each of them does, in this order."""
    at_once: int = 1

    @property
    def seconds(self) -> float:
        """Until the last one has ended, if all run to their end."""
        each = sum(
            cost.setup_seconds + phase.steps * cost.step_seconds + phase.evaluations * cost.evaluation_seconds
            for phase, cost in self.phases
        )
        return math.ceil(self.count / self.at_once) * each

    @property
    def memory_bytes(self) -> int:
        """Of those that run at a time, with all their workers."""
        return min(self.at_once, self.count) * max(cost.peak_bytes * cost.workers for _, cost in self.phases)

    @property
    def disk_bytes(self) -> int:
        """Of all of them."""
        return self.count * sum(cost.disk_bytes for _, cost in self.phases)

    def __str__(self) -> str:
        steps = " + ".join(
            f"{phase.steps} steps at {in_milliseconds(cost.step_seconds)}" for phase, cost in self.phases
        )
        side_by_side = f", {self.at_once} at a time" if self.at_once > 1 else ""
        return f"{self.count} {self.what} of {steps}{side_by_side}"


@dataclass(frozen=True)
class Plan:
    """Trainings, one kind after the other."""

    trainings: Sequence[Trainings]
    notes: Sequence[str] = field(default=())
    """What else is to be known of these figures, one line each."""

    @property
    def seconds(self) -> float:
        """In all."""
        return sum(t.seconds for t in self.trainings)

    @property
    def memory_bytes(self) -> int:
        """The most at a time."""
        return max((t.memory_bytes for t in self.trainings), default=0)

    @property
    def disk_bytes(self) -> int:
        """In all."""
        return sum(t.disk_bytes for t in self.trainings)

    @property
    def on_gpu(self) -> bool:
        """Whether the memory is that of GPUs."""
        return any(cost.device == "cuda" for t in self.trainings for _, cost in t.phases)

    def lines(self, free_disk: int | None = None) -> list[str]:
        """The estimate as text."""
        free = "" if free_disk is None else f" (free {in_bytes(free_disk)})"
        gpu = "GPU " if self.on_gpu else ""
        total = (
            f"estimate: about {in_time(self.seconds)}, {in_bytes(self.memory_bytes)} {gpu}memory at a time, "
            f"{in_bytes(self.disk_bytes)} disk{free}"
        )
        return [total, *(f"  {in_time(t.seconds):>9s}  {t}" for t in self.trainings), *self.notes]

    def announce(self, folder: Path) -> None:
        """Print the estimate; warn where memory will not suffice.

        Raises UserError when the disk of `folder` has no room for it.
        """
        if not any(t.count for t in self.trainings):
            return
        free = shutil.disk_usage(folder).free
        print("\n".join(self.lines(free)), flush=True)
        if self.disk_bytes > free:
            raise UserError(
                f"{folder} has {in_bytes(free)} free, and this needs about {in_bytes(self.disk_bytes)}: give a folder "
                "on a larger disk with --storage PATH"
            )
        memory = memory_bytes(self.on_gpu)
        if self.memory_bytes > memory:
            print(
                f"warning: this machine has {in_bytes(memory)} memory for it: lower the batch size, raise accumulate, "
                "or train fewer at a time",
                flush=True,
            )


def memory_bytes(gpu: bool) -> int:
    """Memory of this machine: of all its GPUs together, or what the CPU has available."""
    if gpu:
        return sum(_gpu_sizes())
    import psutil

    return psutil.virtual_memory().available


def gpu_bytes() -> int:
    """Memory of the smallest GPU that this process sees."""
    return min(_gpu_sizes())


def _gpu_sizes() -> list[int]:
    return [torch.cuda.get_device_properties(k).total_memory for k in range(torch.cuda.device_count())]


def trials_per_gpu(peak_bytes: int, total_bytes: int, at_most: int, headroom: float = 0.1) -> int:
    """How many trials fit on one GPU side by side: each then asks Ray for 1 / that many GPUs.

    A trial needs its peak, a CUDA context beside it, and a tenth more, as torch's allocator holds more than is in use.
    Raises UserError where not one fits.
    """
    each = peak_bytes * (1 + headroom) + _CONTEXT
    fits = int(total_bytes // each)
    if fits < 1:
        raise UserError(
            f"a trial needs about {in_bytes(each)} GPU memory, and the GPU has {in_bytes(total_bytes)}: "
            "lower the batch size, or raise accumulate"
        )
    return min(fits, at_most)


def in_time(seconds: float) -> str:
    """45 s, 12 min, 3.5 h."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"


def in_bytes(size: float) -> str:
    """6 kB, 85 MB, 1.2 GB (powers of ten)."""
    if size < 1e5:
        return f"{size / 1e3:.0f} kB"
    if size < 1e9:
        return f"{size / 1e6:.0f} MB" if size >= 9.5e6 else f"{size / 1e6:.1f} MB"
    return f"{size / 1e9:.1f} GB" if size < 1e11 else f"{size / 1e9:.0f} GB"


def in_milliseconds(seconds: float) -> str:
    """350 ms, 1.2 s."""
    return f"{seconds:.1f} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"
