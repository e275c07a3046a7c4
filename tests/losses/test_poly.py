"""PolyLoss against its formula and its series, hand numbers, the losses it contains, and extreme logits."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from raymed.config import UserError
from raymed.losses import FocalLoss, PolyLoss

LOSSES = [
    PolyLoss(),
    PolyLoss(eps1=-1.0),
    PolyLoss(eps1=4.0, alpha=0.75, gamma=0.5),
    PolyLoss(eps1=-0.5, alpha=0.25, gamma=0.0),
]


def elementwise(loss):
    return dataclasses.replace(loss, reduction="none")


@pytest.mark.parametrize("loss", LOSSES, ids=repr)
def test_equals_the_formula(loss, batch):
    logits, targets = (x.numpy() for x in batch)
    p = 1 / (1 + np.exp(-logits))
    p_t = np.where(targets == 1, p, 1 - p)
    alpha_t = 1.0 if loss.alpha is None else np.where(targets == 1, loss.alpha, 1 - loss.alpha)
    expected = alpha_t * (-((1 - p_t) ** loss.gamma) * np.log(p_t) + loss.eps1 * (1 - p_t) ** (loss.gamma + 1))
    np.testing.assert_allclose(elementwise(loss)(*batch), expected, rtol=1e-10)
    np.testing.assert_allclose(loss(*batch), expected.mean(), rtol=1e-12)


def test_by_hand():
    """At p_t = 1/4 with gamma = 1, eps1 = 2: (3/4) log 4 + 2 (3/4)^2 = 1.0397208 + 1.125; both classes alike."""
    logits = torch.tensor([1 / 4, 3 / 4], dtype=torch.float64).logit()
    values = PolyLoss(eps1=2.0, gamma=1.0, reduction="none")(logits, torch.tensor([1, 0]))
    np.testing.assert_allclose(values, 2.1647208, rtol=1e-7)


@pytest.mark.parametrize("eps1", [-1.0, 0.0, 2.0])
def test_only_the_first_coefficient_is_moved(eps1):
    logits = torch.linspace(0.0, 3.0, 7, dtype=torch.float64)
    missed = torch.sigmoid(-logits)
    series = sum(((1 + eps1) if j == 1 else 1 / j) * missed ** (j + 2) for j in range(1, 80))
    values = PolyLoss(eps1=eps1, gamma=2.0, reduction="none")(logits, torch.ones(7))
    torch.testing.assert_close(values, series, rtol=1e-9, atol=0)


@pytest.mark.parametrize("alpha", [None, 0.25, 0.75])
def test_eps1_zero_is_focal_loss(alpha, batch, value_and_grad):
    value, grad = value_and_grad(PolyLoss(eps1=0.0, alpha=alpha, gamma=2.0), *batch)
    focal, focal_grad = value_and_grad(FocalLoss(alpha=alpha, gamma=2.0), *batch)
    torch.testing.assert_close(value, focal, rtol=1e-13, atol=0)
    torch.testing.assert_close(grad, focal_grad, rtol=1e-12, atol=0)


def test_gamma_zero_is_poly1_cross_entropy(batch):
    logits, targets = batch
    p_t = torch.where(targets == 1, logits.sigmoid(), 1 - logits.sigmoid())
    expected = F.binary_cross_entropy_with_logits(logits, targets) + 3.0 * (1 - p_t).mean()
    torch.testing.assert_close(PolyLoss(eps1=3.0, gamma=0.0)(*batch), expected, rtol=1e-12, atol=0)


def test_soft_targets_mix_both_classes(batch):
    logits, _ = batch
    loss = elementwise(PolyLoss(eps1=2.0, alpha=0.75))
    mixed = 0.3 * loss(logits, torch.ones_like(logits)) + 0.7 * loss(logits, torch.zeros_like(logits))
    torch.testing.assert_close(loss(logits, torch.full_like(logits, 0.3)), mixed, rtol=1e-12, atol=0)


@pytest.mark.parametrize("loss", LOSSES, ids=repr)
def test_gradcheck(loss, batch):
    logits, targets = batch
    assert torch.autograd.gradcheck(lambda x: elementwise(loss)(x, targets), logits.requires_grad_())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("loss", LOSSES, ids=repr)
def test_extreme_logits_are_finite(loss, dtype, value_and_grad):
    """A wrong certainty of 200 costs 200 and eps1 more, times the weight of its class; a right one nothing."""
    logits, targets = torch.tensor([-200.0, 200.0, -200.0, 200.0]), torch.tensor([1, 0, 0, 1])
    values, grads = value_and_grad(elementwise(loss), logits, targets, dtype)
    alpha = (0.5, 0.5) if loss.alpha is None else (loss.alpha, 1 - loss.alpha)
    weights = torch.tensor(alpha, dtype=values.dtype) * (2 if loss.alpha is None else 1)
    torch.testing.assert_close(values[:2], weights * (200 + loss.eps1), rtol=1e-6, atol=0)
    assert (values[2:].abs() < 1e-20).all() and (grads[2:].double().abs() < 1e-20).all() and grads.isfinite().all()


def test_half_inputs_under_autocast_compute_in_float32(batch, value_and_grad, under_autocast):
    half = batch[0].bfloat16()
    value, grad = value_and_grad(under_autocast(PolyLoss()), half, batch[1])
    exact, _ = value_and_grad(PolyLoss(), half.double(), batch[1])
    assert value.dtype == torch.float32 and grad.dtype == torch.bfloat16
    torch.testing.assert_close(value.double(), exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize("targets_per_configuration", [1, 3])
def test_configuration_axis_equals_separate_losses(targets_per_configuration, batch, value_and_grad):
    logits, targets = batch[0][:, :3], batch[1][:, :1].expand(-1, targets_per_configuration)
    axis = {"eps1": (-1.0, 0.0, 2.0), "alpha": (0.25, 0.5, 1.0), "gamma": (0.0, 0.5, 2.0)}
    tensors = {name: torch.tensor(values, dtype=torch.float64) for name, values in axis.items()}
    values, grads = value_and_grad(PolyLoss(**tensors, reduction="none"), logits, targets)
    assert values.shape == (16, 3)
    for k in range(3):
        one = PolyLoss(**{name: numbers[k] for name, numbers in axis.items()}, reduction="none")
        value, grad = value_and_grad(one, logits[:, k], targets[:, 0])
        torch.testing.assert_close(values[:, k], value, rtol=1e-12, atol=0)
        torch.testing.assert_close(grads[:, k], grad, rtol=1e-12, atol=1e-300)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"eps1": -1.5}, "eps1 must be >= -1, got -1.5"),
        ({"alpha": 1.5}, "alpha must be >= 0 and <= 1, got 1.5"),
        ({"gamma": -1}, "gamma must be >= 0, got -1"),
    ],
)
def test_out_of_range_is_refused(fields, message):
    with pytest.raises(UserError) as error:
        PolyLoss(**fields)
    assert str(error.value) == message


def test_shapes_that_would_broadcast_silently_are_refused(batch):
    with pytest.raises(ValueError, match=r"shape of the logits \(16, 1\), got \(16,\)"):
        PolyLoss()(batch[0][:, :1], batch[1][:, 0])
