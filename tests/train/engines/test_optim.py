"""Schedules against torch's own, parameter groups, and one step of each optimiser by its formula."""

import math

import pytest
import torch
from torch import nn

from raymed.config import UserError
from raymed.tasks.task import Network, Optim
from raymed.train.engines.optim import build_optimizer, clip_gradients, schedule, set_schedule, total_norm


@pytest.mark.parametrize(("steps", "warmup", "momentum"), [(100, 0.25, 0.9), (40, 0.3, 0.95), (7, 0.5, 0.9)])
def test_one_cycle_is_that_of_torch(steps, warmup, momentum):
    optim = Optim(lr=3e-3, momentum=momentum, schedule="one_cycle", warmup=warmup)
    theirs = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], betas=(momentum, 0.999))
    cycle = torch.optim.lr_scheduler.OneCycleLR(
        theirs, optim.lr, total_steps=steps, pct_start=warmup, base_momentum=0.85, max_momentum=momentum
    )
    for step in range(steps):
        lr, beta = schedule(optim, step, steps)
        assert lr == pytest.approx(theirs.param_groups[0]["lr"], rel=1e-9, abs=1e-15), step
        assert beta == pytest.approx(theirs.param_groups[0]["betas"][0], rel=1e-9), step
        theirs.step()
        if step < steps - 1:
            cycle.step()


@pytest.mark.parametrize("steps", [1, 2, 3, 10])
@pytest.mark.parametrize("warmup", [0.0, 0.5, 0.99])
@pytest.mark.parametrize("name", ["one_cycle", "cosine", "constant"])
def test_every_schedule_stays_in_its_range(name, warmup, steps):
    values = [schedule(Optim(lr=2.0, schedule=name, warmup=warmup), step, steps) for step in range(steps)]
    assert all(0 <= lr <= 2.0 + 1e-12 and 0.85 <= momentum <= 0.9 for lr, momentum in values)


def test_cosine_warms_up_linearly_and_falls_to_zero():
    optim = Optim(lr=1.0, schedule="cosine", warmup=0.2)
    rates = [schedule(optim, step, 50)[0] for step in range(50)]
    assert rates[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert rates[10:] == pytest.approx([(1 + math.cos(math.pi * k / 40)) / 2 for k in range(40)])
    assert {schedule(optim, step, 50)[1] for step in range(50)} == {0.9}


def test_constant_stays_up():
    rates = [schedule(Optim(lr=1.0, schedule="constant", warmup=0.1), step, 40)[0] for step in range(40)]
    assert rates == pytest.approx([0.25, 0.5, 0.75] + [1.0] * 37)


def test_biases_and_norms_are_not_decayed():
    module = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Linear(2, 3))
    module[2].weight.requires_grad_(False)
    decayed, plain = build_optimizer(Network(module, Optim(weight_decay=0.3))).param_groups
    assert [id(p) for p in decayed["params"]] == [id(module[0].weight)] and decayed["weight_decay"] == 0.3
    assert len(plain["params"]) == 4 and plain["weight_decay"] == 0.0


def test_adamw_step_by_its_formula():
    module = nn.Linear(3, 2)
    before = module.weight.detach().clone()
    optimizer = build_optimizer(Network(module, Optim(lr=0.1, weight_decay=0.5, momentum=0.8)))
    grad = torch.tensor([[1.0, -2.0, 3.0], [0.5, 0.1, -4.0]])
    module.weight.grad, module.bias.grad = grad.clone(), torch.zeros(2)
    set_schedule(optimizer, 0.02, 0.7)
    optimizer.step()
    # The first step of Adam moves by lr * sign(gradient), whatever beta is; the decay is decoupled.
    torch.testing.assert_close(module.weight.detach(), before * (1 - 0.02 * 0.5) - 0.02 * grad.sign())
    state = optimizer.state[module.weight]
    torch.testing.assert_close(state["exp_avg"], 0.3 * grad)
    torch.testing.assert_close(state["exp_avg_sq"], 0.001 * grad**2)


def test_sgd_is_nesterov_momentum_with_the_momentum_of_the_step():
    module = nn.Linear(4, 1, bias=False)
    optimizer = build_optimizer(Network(module, Optim("sgd", lr=0.1, weight_decay=0.25, momentum=0.9)))
    weight, velocity = module.weight.detach().double().clone(), None
    for k, (lr, momentum) in enumerate([(0.1, 0.9), (0.2, 0.5), (0.05, 0.8)]):
        grad = torch.arange(4.0).view(1, 4) - k
        module.weight.grad = grad.clone()
        set_schedule(optimizer, lr, momentum)
        optimizer.step()
        decayed = grad.double() + 0.25 * weight
        velocity = decayed if velocity is None else momentum * velocity + decayed
        weight = weight - lr * (decayed + momentum * velocity)
        torch.testing.assert_close(module.weight.detach().double(), weight, rtol=1e-6, atol=1e-6)


def test_momentum_zero_is_plain_sgd():
    module = nn.Linear(2, 1, bias=False)
    optimizer = build_optimizer(Network(module, Optim("sgd", momentum=0.0, weight_decay=0.0)))
    before = module.weight.detach().clone()
    module.weight.grad = torch.ones(1, 2)
    set_schedule(optimizer, 0.5, 0.0)
    optimizer.step()
    assert torch.equal(module.weight.detach(), before - 0.5)


def test_total_norm():
    assert total_norm([torch.tensor([3.0, 0.0]), torch.tensor([[4.0]]), torch.tensor(12.0)]).item() == 13.0


def test_clipping_scales_all_gradients_together_and_leaves_small_ones():
    moved, scalar, still = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.tensor(0.0)), nn.Parameter(torch.zeros(3))
    for largest, scale in ((1.0, 1 / 5), (10.0, 1.0), (None, 1.0)):
        moved.grad, scalar.grad = torch.tensor([3.0, 0.0]), torch.tensor(-4.0)
        assert clip_gradients([moved, scalar, still], largest).item() == 5.0
        torch.testing.assert_close(moved.grad, torch.tensor([3.0 * scale, 0.0]))
        torch.testing.assert_close(scalar.grad, torch.tensor(-4.0 * scale))
    assert still.grad is None


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("lr", -1.0, "optim.lr must be >= 0, got -1"),
        ("momentum", 1.0, "optim.momentum must be >= 0 and < 1, got 1"),
        ("warmup", 1.0, "optim.warmup must be >= 0 and < 1, got 1"),
        ("clip", 0.0, "optim.clip must be > 0, got 0"),
        ("schedule", "onecycle", "did you mean 'one_cycle'"),
        ("name", "adam", "did you mean 'adamw'"),
    ],
)
def test_bad_values_are_named(field, value, message):
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        Optim(**{field: value})


def test_learning_rates_of_their_own():
    """A layer at a tenth of the rate moves a tenth as far; state and names do not depend on the groups."""
    module = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    before = [p.detach().clone() for p in module.parameters()]
    optimizer = build_optimizer(Network(module, Optim(weight_decay=0.0), lr_scales={"0.weight": 0.1, "0.bias": 0.1}))
    assert [len(group["params"]) for group in optimizer.param_groups] == [1, 1, 1, 1]
    for p in module.parameters():
        p.grad = torch.ones_like(p)
    set_schedule(optimizer, 0.5, 0.9)
    optimizer.step()
    moved = [(old - p.detach()).abs().max().item() for old, p in zip(before, module.parameters(), strict=True)]
    assert moved == pytest.approx([0.05, 0.05, 0.5, 0.5], rel=1e-5)
