"""What every head loss must do: shapes, reductions, precision, extreme logits, permutations, a configuration axis."""

import dataclasses

import pytest
import torch

from raymed.config import UserError, config_hash, from_dict, to_dict
from raymed.losses import (
    LOSSES,
    AsymmetricLoss,
    ClassBalancedFocalLoss,
    CrossEntropyLoss,
    FocalLoss,
)
from raymed.space import Choice, Float

HEAD_LOSSES = [
    CrossEntropyLoss(),
    CrossEntropyLoss(pos_weight=3.0),
    FocalLoss(),
    FocalLoss(alpha=0.75, gamma=0.5),
    ClassBalancedFocalLoss(samples_per_class=(75, 25), gamma=1.0),
    AsymmetricLoss(),
    AsymmetricLoss(gamma_neg=0.5, gamma_pos=0.5, clip=0.0),
    AsymmetricLoss(gamma_neg=0.0, gamma_pos=0.0, clip=0.1),
    AsymmetricLoss(gamma_neg=0.3, gamma_pos=2.0, clip=0.2, clamp=1e-8, detach_weight=True),
]

# Every hyper-parameter over a trailing axis of three configurations.
AXES = [
    (CrossEntropyLoss(), {"pos_weight": (0.5, 1.0, 3.0)}),
    (FocalLoss(), {"alpha": (0.25, 0.5, 1.0), "gamma": (0.0, 0.5, 2.0)}),
    (ClassBalancedFocalLoss((75, 25)), {"beta": (0.0, 0.99, 0.9999), "gamma": (0.0, 0.5, 2.0)}),
    (AsymmetricLoss(), {"gamma_neg": (0.0, 0.5, 4.0), "gamma_pos": (0.0, 0.5, 1.0), "clip": (0.0, 0.05, 0.2)}),
]


def elementwise(loss):
    return dataclasses.replace(loss, reduction="none")


def test_losses_are_found_by_name():
    assert {"ce": CrossEntropyLoss, "focal": FocalLoss, "asl": AsymmetricLoss}.items() <= LOSSES.items()
    assert all(loss.name == name and isinstance(loss.space, dict) for name, loss in LOSSES.items())


@pytest.mark.parametrize("loss", HEAD_LOSSES, ids=repr)
def test_reductions_and_shapes(loss, batch):
    logits, targets = batch
    values = elementwise(loss)(logits, targets)
    assert values.shape == (16, 4) and (values >= 0).all() and values.dtype == torch.float64
    assert torch.equal(loss(logits, targets), values.mean())
    assert torch.equal(dataclasses.replace(loss, reduction="sum")(logits, targets), values.sum())
    column = elementwise(loss)(logits[:, 0], targets[:, 0].long())
    assert torch.equal(column, values[:, 0])
    assert torch.equal(elementwise(loss)(logits[:, :1], targets[:, :1]), values[:, :1])


@pytest.mark.parametrize("loss", HEAD_LOSSES, ids=repr)
def test_shapes_that_would_broadcast_silently_are_refused(loss, batch):
    logits, targets = batch
    with pytest.raises(ValueError, match=r"shape of the logits \(16, 1\), got \(16,\)"):
        loss(logits[:, :1], targets[:, 0])
    with pytest.raises(ValueError, match=r"shape of the logits \(16, 4\), got \(1, 4\)"):
        loss(logits, targets[:1])


@pytest.mark.parametrize("loss", [loss for loss in HEAD_LOSSES if not getattr(loss, "detach_weight", False)], ids=repr)
def test_gradcheck(loss, batch):
    logits, targets = batch
    assert torch.autograd.gradcheck(lambda x: elementwise(loss)(x, targets), logits.requires_grad_())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("loss", HEAD_LOSSES, ids=repr)
def test_extreme_logits_are_finite(loss, dtype, value_and_grad):
    """A wrong certainty of 100 costs about 100 without a clamp, a right one nothing; no gradient overflows."""
    magnitudes = torch.tensor([0.0, 1e-6, 5.0, 17.0, 20.0, 40.0, 80.0, 88.0, 95.0, 100.0])
    logits = torch.cat([-magnitudes, magnitudes]).repeat(2)
    targets = torch.arange(2.0).repeat_interleave(20)
    values, grads = value_and_grad(elementwise(loss), logits, targets, dtype)
    assert values.dtype == torch.promote_types(dtype, torch.float32) and grads.dtype == dtype
    assert values.isfinite().all() and grads.isfinite().all()
    right = (logits == 100) & (targets == 1) | (logits == -100) & (targets == 0)
    assert (values[right] < 1e-20).all() and (grads[right].double().abs() < 1e-20).all()
    missed = (logits == -100) & (targets == 1)
    assert values[missed] > (18 if getattr(loss, "clamp", None) else 40)


@pytest.mark.parametrize("loss", [FocalLoss(gamma=2.0), AsymmetricLoss(gamma_neg=2.0, gamma_pos=2.0, clip=0.0)])
def test_small_losses_keep_their_digits(loss):
    """Easy samples cost (1 - p_t)^2 times about (1 - p_t), where p_t is already 1 in float32."""
    logits = torch.tensor([-20.0, -25.0, 20.0, 25.0])
    values = elementwise(loss)(logits, torch.tensor([0, 0, 1, 1]))
    torch.testing.assert_close(values, (-3 * logits.abs()).exp(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("loss", HEAD_LOSSES, ids=repr)
def test_half_inputs_and_autocast_compute_in_float32(loss, batch, value_and_grad, under_autocast):
    logits, targets = batch
    half = logits.bfloat16()
    exact, exact_grad = value_and_grad(loss, half.double(), targets)
    for inputs in (half, half.float()):
        value, grad = value_and_grad(under_autocast(loss), inputs, targets)
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.double(), exact, rtol=1e-6, atol=0)
        rtol = 1e-5 if inputs.dtype == torch.float32 else 8e-3
        torch.testing.assert_close(grad.double(), exact_grad, rtol=rtol, atol=1e-8)


@pytest.mark.parametrize("loss", HEAD_LOSSES, ids=repr)
def test_order_of_the_samples_does_not_matter(loss, batch, value_and_grad):
    logits, targets = batch
    order = torch.randperm(16, generator=torch.Generator().manual_seed(1))
    value, grad = value_and_grad(loss, logits, targets)
    shuffled_value, shuffled_grad = value_and_grad(loss, logits[order], targets[order])
    torch.testing.assert_close(shuffled_value, value, rtol=1e-14, atol=0)
    torch.testing.assert_close(shuffled_grad, grad[order], rtol=1e-14, atol=0)


@pytest.mark.parametrize("targets_per_configuration", [1, 3])
@pytest.mark.parametrize(("loss", "axis"), AXES, ids=lambda x: type(x).__name__)
def test_configuration_axis_equals_separate_losses(loss, axis, targets_per_configuration, batch, value_and_grad):
    logits, targets = batch[0][:, :3], batch[1][:, :1].expand(-1, targets_per_configuration)
    tensors = {name: torch.tensor(values, dtype=torch.float64) for name, values in axis.items()}
    values, grads = value_and_grad(elementwise(dataclasses.replace(loss, **tensors)), logits, targets)
    assert values.shape == (16, 3)
    for k in range(3):
        one = elementwise(dataclasses.replace(loss, **{name: numbers[k] for name, numbers in axis.items()}))
        value, grad = value_and_grad(one, logits[:, k], targets[:, 0])
        torch.testing.assert_close(values[:, k], value, rtol=1e-12, atol=0)
        torch.testing.assert_close(grads[:, k], grad, rtol=1e-12, atol=1e-300)


def test_configuration_axis_keeps_extreme_logits_finite(value_and_grad):
    loss = AsymmetricLoss(
        gamma_neg=torch.tensor([0.0, 0.5, 4.0]), clip=torch.tensor([0.0, 0.0, 0.05]), reduction="none"
    )
    logits = torch.tensor([-100.0, 0.0, 100.0])[:, None].repeat(1, 3)
    for targets in (torch.zeros(3, 1), torch.ones(3, 1)):
        values, grads = value_and_grad(loss, logits, targets)
        assert values.isfinite().all() and grads.isfinite().all()


@pytest.mark.parametrize("cls", LOSSES.values())
def test_space_holds_the_defaults_and_makes_losses(cls, batch):
    default = cls()
    for field, dimension in cls.space.items():
        assert dimension.contains(getattr(default, field))
        edges = dimension.options if isinstance(dimension, Choice) else (dimension.low, dimension.high)
        for value in edges:
            loss = cls(**{field: value})
            assert loss(*batch).isfinite()
            assert from_dict(cls, to_dict(loss)) == loss
            assert (config_hash(loss) == config_hash(default)) == (loss == default)


def test_ranges_swept():
    assert AsymmetricLoss.space["gamma_neg"] == Float(0, 5) and AsymmetricLoss.space["clip"] == Float(0, 0.2)
    assert FocalLoss.space == {"alpha": Choice((None, 0.25, 0.5, 0.75)), "gamma": Float(0.5, 5)}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AsymmetricLoss(gamma_neg=-1), "gamma_neg must be >= 0, got -1"),
        (lambda: AsymmetricLoss(gamma_pos=-0.5), "gamma_pos must be >= 0, got -0.5"),
        (lambda: AsymmetricLoss(clip=1.5), "clip must be >= 0 and < 1, got 1.5"),
        (lambda: AsymmetricLoss(gamma_neg=torch.tensor([0.0, -2.0])), "gamma_neg must be >= 0, got -2"),
        (lambda: AsymmetricLoss(clamp=0.0), "clamp must be > 0 and < 1, got 0"),
        (lambda: AsymmetricLoss(reduction="avg"), "reduction must be one of 'mean', 'sum', 'none', got 'avg'"),
        (lambda: FocalLoss(alpha=-1), "alpha must be >= 0 and <= 1, got -1"),
        (lambda: FocalLoss(gamma=float("nan")), "gamma must be >= 0, got nan"),
        (lambda: CrossEntropyLoss(pos_weight=0), "pos_weight must be > 0, got 0"),
        (lambda: ClassBalancedFocalLoss((10, 0)), "samples_per_class must be >= 1, got 0"),
        (lambda: ClassBalancedFocalLoss((10, 5), beta=1.0), "beta must be >= 0 and < 1, got 1"),
        (lambda: ClassBalancedFocalLoss((9, 5, 3)), "samples_per_class must be (negatives, positives), got (9, 5, 3)"),
    ],
)
def test_hyper_parameters_out_of_range_are_refused(make, message):
    with pytest.raises(UserError) as error:
        make()
    assert str(error.value) == message
