"""The training loop: it goes on exactly where it was stopped or killed, and keeps and says what it should."""

import multiprocessing
import os
import random
import signal
from contextlib import suppress
from dataclasses import dataclass, fields, replace

import pytest
import torch
from small import curve, make_fit, recipe
from torch import nn

from raymed.config import UserError
from raymed.data.augment import Augment
from raymed.tasks.task import Loss, Network, Optim, Phase, Task
from raymed.tracking.outbox import Outbox
from raymed.train.checkpoints import checkpoint
from raymed.train.checkpoints.checkpoint import load_weights
from raymed.train.compute import Compute
from raymed.train.loop import Fit, Interrupted

UNTIMED = ("phase", "step", "number", "metrics", "loss")


def untimed(evaluations) -> list[tuple]:
    """Evaluations without their clock."""
    return [tuple(getattr(e, name) for name in UNTIMED) for e in evaluations]


def final_files(fit: Fit) -> dict[str, bytes]:
    """Weights, averages and optimiser states of every checkpoint kept, as bytes on disk."""
    kept = sorted((fit.folder / "checkpoints").rglob("*.safetensors"))
    return {str(path.relative_to(fit.folder)): path.read_bytes() for path in kept}


@pytest.fixture(scope="module")
def whole(manifest, data, tmp_path_factory):
    """The uninterrupted run: its fit and its evaluations."""
    fit = make_fit(recipe(manifest), tmp_path_factory.mktemp("whole"), data=data)
    return fit, list(fit.run())


def check_equals(whole, fit: Fit, evaluations=None) -> None:
    """Same bits in every file, same records, same evaluations."""
    expected, seen = whole
    assert curve(fit.folder) == curve(expected.folder)
    assert final_files(fit) == final_files(expected)
    if evaluations is not None:
        assert untimed(evaluations) == untimed(seen)


def test_a_run_has_both_phases_averages_and_a_cached_head(whole):
    fit, evaluations = whole
    assert [(e.phase, e.step, e.number) for e in evaluations] == [
        ("supcon", 4, 1), ("supcon", 8, 2), ("supcon", 12, 3),
        ("head", 3, 4), ("head", 6, 5), ("head", 9, 6), ("head", 12, 7),
    ]  # fmt: skip
    assert [s for s, v in curve(fit.folder) if any(name.endswith("/loss") for name in v)] == list(range(1, 25))
    supcon, head = (fit.checkpoints(phase).find("last") for phase in ("supcon", "head"))
    own, averages = load_weights(supcon, averaged=False), load_weights(supcon)
    layer = "contrastive.projection.layers.0.weight"
    assert not torch.equal(own[layer], averages[layer])
    trained = load_weights(head)
    for name, weight in averages.items():
        if name.startswith("contrastive.encoder."):
            assert torch.equal(trained[name.removeprefix("contrastive.")], weight)  # frozen at the average


@pytest.mark.parametrize("stop", [random.Random(5).randrange(1, 12), 12, random.Random(6).randrange(13, 24), 23])
def test_interrupted_at_any_step_it_continues_exactly(whole, manifest, data, tmp_path, stop):
    asked = iter(range(1, 1000))
    seen = []
    fit = make_fit(recipe(manifest), tmp_path, data=data, interrupted=lambda: next(asked) == stop)
    with pytest.raises(Interrupted):
        seen.extend(fit.run())
    assert fit.checkpoints("head" if stop > 12 else "supcon").find("last").name == f"step-{(stop - 1) % 12 + 1:06d}"
    with suppress(Interrupted):
        for evaluation in fit.run():
            seen.append(evaluation)
    check_equals(whole, fit)


def test_left_after_any_evaluation_it_continues_exactly(whole, manifest, data, tmp_path):
    fit, seen = make_fit(recipe(manifest), tmp_path, data=data), []
    for _ in range(len(whole[1])):
        run = fit.run()
        seen.append(next(run))
        run.close()
    assert list(fit.run()) == []
    check_equals(whole, fit, seen)


def doomed(fit: Fit, ticks: int) -> None:
    """Run the fit; at the ticks-th step, record or operation on checkpoint files, SIGKILL comes."""
    left = [ticks]

    def dying(function):
        def call(*args, **kwargs):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    checkpoint.write_atomic = dying(checkpoint.write_atomic)
    os.replace = dying(os.replace)
    checkpoint.shutil.rmtree = dying(checkpoint.shutil.rmtree)
    Outbox._append = dying(Outbox._append)
    fit.interrupted = dying(lambda: False)
    list(fit.run())


def test_killed_anywhere_it_continues_exactly(whole, manifest, data, tmp_path):
    draw, kills = random.Random(11), 0
    fit = make_fit(recipe(manifest), tmp_path, data=data)
    process = multiprocessing.get_context("fork")
    while True:
        child = process.Process(target=doomed, args=(fit, draw.randrange(5, 60)))
        child.start()
        child.join()
        if child.exitcode == 0:
            break
        assert child.exitcode == -signal.SIGKILL
        kills += 1
        assert kills < 40
    assert kills >= 3
    check_equals(whole, fit)


def test_supcon_in_two_micro_batches_is_supcon_in_one(manifest, data, tmp_path):
    """Loss and weights: the second pass carries the gradient of the whole batch (no statistics over the batch here)."""
    runs = {}
    for accumulate in (1, 2):
        config = recipe(
            manifest,
            model__norm="group",
            supcon__accumulate=accumulate,
            supcon__optim=Optim("sgd", lr=0.02, clip=None),
            supcon__ema_decay=None,
        )
        fit = make_fit(config, tmp_path / str(accumulate), data=data)
        fit.phases = fit.phases[:1]
        list(fit.run())
        losses = [v["supcon/loss"] for _, v in curve(fit.folder) if "supcon/loss" in v]
        runs[accumulate] = losses, load_weights(fit.checkpoints("supcon").find("last"))
    (losses, weights), (losses2, weights2) = runs.values()
    assert losses2 == pytest.approx(losses, rel=1e-5) and losses[-1] < losses[0]
    for name, weight in weights.items():
        assert (weights2[name] - weight).norm() <= 1e-5 * weight.norm().clamp(min=1e-6), name


def test_a_cached_phase_is_the_phase_without_augmentation(whole, manifest, data, tmp_path):
    still = Augment(**{field.name: 0.0 for field in fields(Augment)})
    encoder = str(whole[0].checkpoints("supcon").find("best"))
    config = recipe(manifest, augment=still, supcon__encoder_from=encoder)
    runs = []
    for cache in (True, False):
        fit = make_fit(config, tmp_path / str(cache), data=data)
        fit.phases = (replace(fit.phases[0], cache=cache),)
        evaluations = list(fit.run())
        losses = [v["head/loss"] for _, v in curve(fit.folder) if "head/loss" in v]
        runs.append((evaluations, losses, load_weights(fit.checkpoints("head").find("last"))))
    (cached, losses, weights), (raw, raw_losses, raw_weights) = runs
    assert losses == pytest.approx(raw_losses, rel=1e-5)
    for name, weight in weights.items():
        torch.testing.assert_close(raw_weights[name], weight, rtol=1e-5, atol=1e-6)
    assert cached[-1].metrics["auroc"] == raw[-1].metrics["auroc"]


@dataclass
class Scripted(Task):
    """A linear model whose validation scores are written down beforehand, and whose loss breaks at a step."""

    scores: list[float]
    breaks_at: int = 10**6

    def networks(self):
        return {"net": Network(nn.Linear(256, 1), Optim("sgd", lr=1e-3, schedule="constant"))}

    def losses(self, step, nets):
        with nets.training("net"):
            for k, batch in step.batches():
                value = nets["net"](batch.unit_image().flatten(1)).square().mean() / len(step.micro)
                value = value * (float("nan") if step.number == self.breaks_at else 1)
                yield Loss("net", value, {"loss": value.detach()}, step=k == len(step.micro) - 1)

    def predict(self, batch, nets):
        return {"value": nets["net"](batch.unit_image().flatten(1))}

    def meters(self):
        return {"scripted": ScriptedMeter(self.scores)}


@dataclass
class ScriptedMeter:
    scores: list[float]

    def update(self, prediction, batch, index):
        assert prediction["value"].shape == (len(index), 1)

    def merge(self, other):
        self.scores = other.scores

    def compute(self):
        return {"score": self.scores.pop(0)}


def scripted_fit(folder, data, scores, **phase) -> Fit:
    defaults = {"steps": 20, "batch_size": 8, "evaluations": 10, "monitor": "score"}
    task = Scripted(list(scores), phase.pop("breaks_at", 10**6))
    return Fit([Phase("tiny", task, **(defaults | phase))], data, folder, 0, Compute(channels_last=False))


@pytest.mark.parametrize(("mode", "sign"), [("max", 1), ("min", -1)])
def test_best_and_last_are_kept_and_nothing_else(data, tmp_path, mode, sign):
    scores = [sign * s for s in (0.1, 0.5, 0.4, 0.5, 0.3, float("nan"), 0.2, 0.1, 0.1, 0.1)]
    fit = scripted_fit(tmp_path, data, scores, mode=mode)
    assert len(list(fit.run())) == 10
    checkpoints = fit.checkpoints("tiny")
    assert checkpoints.find("best").name == "step-000004"  # the first 0.5; an equal one later is not better
    assert checkpoints.find("last").name == "step-000020"
    assert sorted(p.name for p in checkpoints.folder.iterdir()) == ["index.json", "step-000004", "step-000020"]


def test_without_a_monitor_the_last_is_the_best(data, tmp_path):
    fit = scripted_fit(tmp_path, data, [5, 4, 3, 2, 1, 0, 0, 0, 0, 0], monitor=None)
    list(fit.run())
    assert fit.checkpoints("tiny").find("best").name == "step-000020"


def test_patience_ends_the_phase_and_is_counted_over_restarts(data, tmp_path):
    fit = scripted_fit(tmp_path, data, [0.1, 0.5, 0.4, 0.5, 0.3, 0.9], patience=3)
    run = fit.run()
    for _ in range(4):
        next(run)
    run.close()
    assert [e.step for e in fit.run()] == [10]
    assert list(fit.run()) == []
    assert fit.checkpoints("tiny").find("best").name == "step-000004"


@pytest.mark.parametrize("steps", [20, 80])
def test_a_loss_that_is_not_finite_ends_the_run(data, tmp_path, steps):
    """Seen before the next evaluation (every 5 of 20 steps) or after ten steps (evaluations every 20 of 80)."""
    fit = scripted_fit(tmp_path, data, [0.5] * 10, breaks_at=steps // 4 + 2, steps=steps, evaluations=4)
    fit.outbox = Outbox(tmp_path / "outbox.jsonl")
    with pytest.raises(UserError, match=f"finite at step {steps // 4 + 3} of phase tiny .loss nan, .*lower the"):
        list(fit.run())
    assert fit.checkpoints("tiny").find("last").name == f"step-{steps // 4:06d}"
    assert all(torch.isfinite(w).all() for w in load_weights(fit.checkpoints("tiny").find("last")).values())
    assert [s for s, v in curve(tmp_path) if "tiny/loss" in v] == list(range(1, steps // 4 + 3))


def test_micro_batches_must_divide_the_batch():
    with pytest.raises(UserError, match=r"tiny.batch_size \(9\) must be a multiple of accumulate \(2\)"):
        Phase("tiny", Task(), steps=1, batch_size=9, accumulate=2)


def test_evaluations_are_evenly_spaced_and_end_the_phase():
    phase = Phase("tiny", Task(), steps=10, batch_size=2, evaluations=4)
    assert [step for step in range(10) if phase.evaluates_after(step)] == [2, 4, 7, 9]


def test_a_phase_that_starts_from_nothing_says_so(manifest, data, tmp_path):
    fit = make_fit(recipe(manifest), tmp_path, data=data)
    fit.phases = (fit.phases[1],)
    with pytest.raises(UserError, match="supcon.best is not a checkpoint"):
        list(fit.run())
