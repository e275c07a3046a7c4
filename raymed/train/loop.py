"""The training loop: phases in, evaluations out.

`Fit.run` is a generator that yields after every evaluation, so that whoever drives it (a process, a Ray Train worker, a
Ray Tune trial) reports and decides whether to go on. It can be left or killed at any point: the next run of the same
fit continues at the last checkpoint and repeats the uninterrupted run exactly.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from raymed.config import UserError
from raymed.data.dataset import DataSet
from raymed.data.sampling import BalancedSampler, RandomSampler
from raymed.distributed import agreed, all_gather_object, rank, world_size
from raymed.ledger import BACKWARD, DATA, EVALUATION, FORWARD, OPTIMIZER, Ledger, span
from raymed.random import derive
from raymed.tasks.task import Loss, Phase, Step
from raymed.tracking.outbox import Outbox
from raymed.train.checkpoints.checkpoint import (
    Checkpoints,
    Progress,
    load_memory,
    load_weights,
    origin_of,
    resume,
    resume_optimizers,
)
from raymed.train.communication import measured_communication
from raymed.train.compute import Compute
from raymed.train.evaluate import Feed, evaluate, shard, values
from raymed.train.nets import Networks
from raymed.train.out_of_memory import OutOfMemory, give_up, halved, noticed, release
from raymed.train.pulse import FLUSH, Pulse
from raymed.train.timing import timing


class Interrupted(KeyboardInterrupt):
    """The user stopped the run; its state is saved."""


@dataclass(frozen=True)
class Evaluation:
    """What a fit yields."""

    phase: str
    step: int
    """Of the phase."""
    number: int
    """Counted over all phases, from 1."""
    metrics: dict[str, float]
    """Of the validation split."""
    loss: float
    """Of the last training step."""
    samples_per_second: float
    seconds_left: float
    """Of the phase, at this speed."""
    seconds: dict[str, float]
    """Where the time since the evaluation before went: data, forward, backward, ... (`raymed.ledger.NAMES`)."""


@dataclass
class Fit:
    """Phases trained one after the other on one data set, in one folder."""

    phases: Sequence[Phase]
    data: DataSet
    folder: Path
    seed: int
    compute: Compute
    outbox: Outbox | None = None
    """Where rank 0 writes losses and metrics."""
    interrupted: Callable[[], bool] = field(default=lambda: False)
    """Asked after every step, or with several workers on all of them from time to time (`Pulse`): one that says yes
    stops all, and what they have is saved."""
    frozen: dict[str, Tensor] | None = None
    """What the untrained networks say of all images, where it is known already; None = computed where a phase asks."""

    def __post_init__(self) -> None:
        for phase in self.phases:
            self.compute.check_phase(phase)

    def run(self) -> Iterator[Evaluation]:
        """Train every phase that is not finished. Collective."""
        first_step = first_evaluation = 0
        for phase in self.phases:
            for done in self._train(phase, first_step):
                yield done(first_evaluation)
            first_step += phase.steps
            first_evaluation += phase.evaluations

    def _train(self, phase: Phase, first_step: int) -> Iterator[Callable[[int], Evaluation]]:
        """One phase; out of memory once, it goes on in smaller micro-batches."""
        try:
            yield from _PhaseRun(self, phase, first_step).run()
            return
        except OutOfMemory as error:
            what = str(error)
            smaller = halved(phase, what)
        release()  # here, since until now the error held the networks
        self._tell_halved(smaller, what)
        try:
            yield from _PhaseRun(self, smaller, first_step).run()
        except OutOfMemory as error:
            raise give_up(smaller, str(error)) from None

    def _tell_halved(self, phase: Phase, what: str) -> None:
        done = f"{phase.accumulate} micro-batches of {phase.batch_size // phase.accumulate} a step"
        print(f"{what}: it goes on from its last checkpoint with {done}", flush=True)
        if self.outbox:
            self.outbox.tags({f"raymed.out_of_memory.{phase.name}": f"{what}: {done}"})

    def checkpoints(self, phase: str) -> Checkpoints:
        """The checkpoints of a phase."""
        log = self.outbox.path if self.outbox else None
        return Checkpoints(self.folder / "checkpoints" / phase, self.compute.keep_checkpoints, log)

    def best(self) -> tuple[Networks, Feed]:
        """The last phase's networks at its best checkpoint (averages in place), and batches for them. Collective."""
        phase = self.phases[-1]
        source = self.checkpoints(phase.name).find("best")
        if source is None:
            raise UserError(f"phase {phase.name} has no checkpoint yet")
        networks = Networks(phase, self.seed, self.compute)
        networks.load_weights(load_weights(source))
        networks.load_memory(load_memory(source))
        return networks, self.feed(phase, networks)

    def feed(self, phase: Phase, networks: Networks) -> Feed:
        """Batches for a phase; with `phase.cache`, of what its untrained networks say. Collective."""
        feed = Feed(self.data, self.compute.resolved_device())
        if phase.cache and self.frozen is not None:
            feed.cached = self.frozen
        elif phase.cache:
            feed.keep_frozen(phase, networks)
        return feed


def sampler_of(phase: Phase, data: DataSet, seed: int) -> RandomSampler | BalancedSampler:
    """What makes up the batches of a phase."""
    rows = data.splits["train"]
    order = derive(seed, "order", phase.name)
    if phase.balanced:
        return BalancedSampler(rows, data.labels[rows], phase.batch_size, order)
    return RandomSampler(rows, phase.batch_size, order)


def take_step(phase: Phase, networks: Networks, step: Step) -> dict[str, Tensor]:
    """One training step: every loss backward, every network it ends moved. Returns what is logged."""
    totals: dict[str, Tensor] = {}
    losses = phase.task.losses(step, networks)
    while (loss := _next(losses)) is not None:
        engine = networks.engines[loss.trains]
        if networks.active != loss.trains:
            raise UserError(f"a loss of network {loss.trains!r} must be yielded within nets.training({loss.trains!r})")
        with span(BACKWARD):
            engine.backward(loss.value, last=loss.step)
        for name, value in loss.metrics.items():
            totals[name] = totals.get(name, 0) + value.detach().float()
        if loss.step:
            norm = "grad_norm" if len(networks.engines) == 1 else f"grad_norm/{loss.trains}"
            totals[norm] = engine.step(step.number)
            if loss.trains in networks.averages:
                with span(OPTIMIZER):
                    networks.averages[loss.trains].update()
    return totals


def _next(losses: Iterator[Loss]) -> Loss | None:
    """The task computes its next loss."""
    with span(FORWARD):
        return next(losses, None)


@dataclass(frozen=True)
class _Scored:
    """What an evaluation found, and images a second until then."""

    metrics: dict[str, float]
    speed: float


class _PhaseRun:
    """One phase on its way."""

    def __init__(self, fit: Fit, phase: Phase, first_step: int):
        if phase.batch_size % (phase.accumulate * world_size()):
            raise UserError(
                f"{phase.name}.batch_size ({phase.batch_size}) must be a multiple of accumulate x workers "
                f"({phase.accumulate} x {world_size()})"
            )
        self.fit, self.phase, self.first_step = fit, phase, first_step
        self.checkpoints = fit.checkpoints(phase.name)
        self.seed = derive(fit.seed, "phase", phase.name)
        self.sampler = sampler_of(phase, fit.data, fit.seed)
        self.ledger = Ledger(fit.compute.resolved_device())

    def run(self) -> Iterator[Callable[[int], Evaluation]]:
        """Train to the end of the phase, yielding at every evaluation (as a function of those of earlier phases)."""
        try:
            yield from self._run()
        finally:
            self.checkpoints.close()

    def _run(self) -> Iterator[Callable[[int], Evaluation]]:
        self.checkpoints.pull()
        last = self.checkpoints.find("last")
        self.networks = Networks(self.phase, self.fit.seed, self.fit.compute)
        self.progress = agreed(lambda: resume(self.networks, last, self.phase.name) if last else self._begin())
        if self.progress.finished:
            return
        self.networks.build_engines(self.phase.steps)
        if last:
            resume_optimizers(self.networks, last, self.progress)
        self.feed = self.fit.feed(self.phase, self.networks)
        curve = _Curve(self.phase.name, self.first_step, self.fit.outbox, self.progress.step, self.feed.device)
        pulse = Pulse(self._is_to_stop, self.fit.compute.checkpoint_minutes, self.feed.device)
        while not self.progress.finished:
            with self.ledger.active(), measured_communication() if world_size() > 1 else nullcontext():
                stop = self._train_on(curve, pulse)
                scored = self._evaluate(curve) if self._is_due() else self._save_unscored(curve)
            pulse.saved()
            if scored:
                yield self._evaluation(scored, self.ledger.take(), curve)
            if stop:
                self.checkpoints.wait()
                raise Interrupted
        self.checkpoints.wait()

    def _train_on(self, curve: "_Curve", pulse: Pulse) -> bool:
        """Steps up to the next evaluation, or to a checkpoint before it; returns whether the fit is to stop."""
        while True:
            with noticed(self.phase, self.progress.step):
                curve.add(self._train_step(self.progress.step))
            self.progress.step += 1
            stop, save = pulse.after_step()
            if stop or save or self._is_due():
                return stop

    def _is_due(self) -> bool:
        return self.phase.evaluates_after(self.progress.step - 1)

    def _is_to_stop(self) -> bool:
        """Training on after a checkpoint that could not be written would be in vain."""
        return self.fit.interrupted() or self.checkpoints.failed()

    def _begin(self) -> Progress:
        for part, origin in self.phase.starts_from.items():
            source = self._source(origin)
            self.networks.load_part(part, load_weights(source), source)
        return Progress(self.phase.name)

    def _source(self, origin: str) -> Path:
        phase, _, which = origin.rpartition(".")
        if which in ("best", "last") and phase in {p.name for p in self.fit.phases}:
            found = self.fit.checkpoints(phase).find(which)
            if found is None:
                raise UserError(f"{self.phase.name} starts from {origin}, but that phase has no checkpoint")
            return found
        return origin_of(origin)

    def _train_step(self, number: int) -> dict[str, Tensor]:
        with span(DATA):
            rows = shard(self.sampler.indices(number), self.phase.accumulate)
            step = Step(number, self.seed, rank(), tuple(self.feed.batch(part) for part in rows))
        return take_step(self.phase, self.networks, step)

    def _save_unscored(self, curve: "_Curve") -> None:
        curve.flush()
        self.checkpoints.save(self.networks, self.progress, best=False)

    def _evaluate(self, curve: "_Curve") -> "_Scored":
        speed = curve.flush() * self.phase.batch_size
        with span(EVALUATION):
            metrics = values(evaluate(self.phase, self.networks, self.feed, "val"))
        progress, phase = self.progress, self.phase
        progress.evaluation += 1
        better = self._is_best(metrics)
        progress.stale = 0 if better else progress.stale + 1
        worn_out = phase.patience is not None and progress.stale >= phase.patience
        progress.finished = progress.step == phase.steps or worn_out
        if self.fit.outbox and rank() == 0:  # first, since what is saved is not evaluated again
            named = {f"val/{name}": value for name, value in metrics.items()}
            self.fit.outbox.metrics(named, self.first_step + progress.step)
        self.checkpoints.save(self.networks, progress, better)
        return _Scored(metrics, speed)

    def _evaluation(self, scored: "_Scored", seconds: dict[str, float], curve: "_Curve") -> Callable[[int], Evaluation]:
        curve.restart_clock()
        step, number, phase = self.progress.step, self.progress.evaluation, self.phase
        left = 0.0 if self.progress.finished else (phase.steps - step) * phase.batch_size / scored.speed
        if self.fit.outbox and rank() == 0:
            self.fit.outbox.metrics(timing(phase.name, seconds, scored.speed), self.first_step + step)
        return lambda before: Evaluation(
            phase.name, step, before + number, scored.metrics, curve.last_loss, scored.speed, left, seconds
        )

    def _is_best(self, metrics: dict[str, float]) -> bool:
        if self.phase.monitor is None:
            return True
        value = metrics[self.phase.monitor]
        if math.isnan(value):
            return self.progress.best is None
        sign = 1 if self.phase.mode == "max" else -1
        if self.progress.best is not None and sign * value <= sign * self.progress.best:
            return False
        self.progress.best = value
        return True


class _Curve:
    """Per-step values, averaged over the workers and written down a few steps at a time."""

    def __init__(self, phase: str, first_step: int, outbox: Outbox | None, done: int, device: torch.device):
        self.phase, self.first_step, self.done, self.device = phase, first_step, done, device
        self.outbox = outbox if rank() == 0 else None
        self.pending: list[dict[str, Tensor]] = []
        self.last_loss = math.nan
        self.restart_clock()
        if self.outbox:
            self.outbox.rewind(first_step + done)

    def restart_clock(self) -> None:
        """The time of evaluations is not training time."""
        self.started, self.counted = time.perf_counter(), 0

    def add(self, values: dict[str, Tensor]) -> None:
        """One step's values."""
        if self.pending and self.pending[0].keys() != values.keys():
            self.flush()
        self.pending.append(values)
        self.counted += 1
        if len(self.pending) == FLUSH:
            self.flush()

    def flush(self) -> float:
        """Write what is pending; a loss that is not finite ends the run. Returns steps a second. Collective."""
        if self.pending:
            names = list(self.pending[0])
            rows = [torch.stack([v[name].to(self.device, torch.float32) for name in names]) for v in self.pending]
            table = own = torch.stack(rows)
            if world_size() > 1:
                own = table.clone()
                torch.distributed.all_reduce(table)
                table /= world_size()
            self._check_finite(names, table, own)
            self._write(names, table.tolist())
        return self.counted / (time.perf_counter() - self.started)

    def _check_finite(self, names: list[str], table: Tensor, own: Tensor) -> None:
        """Raise UserError for the first step whose values are not finite, with the workers where they were not. table:
        means over the workers; own: this worker's."""
        wrong = ~table.isfinite().all(dim=1)
        if not wrong.any():
            return
        first = int(wrong.nonzero()[0])
        of_workers = all_gather_object(own[first].tolist())
        there = [k for k, row in enumerate(of_workers) if not all(map(math.isfinite, row))] or [0]
        self._write(names, table[:first].tolist())
        shown = ", ".join(f"{name} {value:g}" for name, value in zip(names, of_workers[there[0]], strict=True))
        where = f" on worker {', '.join(map(str, there))}" if world_size() > 1 else ""
        raise UserError(
            f"training became not finite at step {self.done + 1} of phase {self.phase}{where} ({shown}). The last "
            "checkpoint is kept; lower the learning rate or clip the gradient"
        )

    def _write(self, names: list[str], table: list[list[float]]) -> None:
        self.pending = []
        for row in table:
            self.done += 1
            if self.outbox:
                named = {f"{self.phase}/{name}": value for name, value in zip(names, row, strict=True)}
                self.outbox.metrics(named, self.first_step + self.done)
            self.last_loss = row[names.index("loss")] if "loss" in names else math.nan
