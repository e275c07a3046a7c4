"""AsymmetricSoftmaxLoss against vectors of the published code, and cross-entropy as its special case."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from raymed.config import UserError
from raymed.losses import AsymmetricSoftmaxLoss

CONFIGS = range(7)


@pytest.fixture
def classes():
    """Logits (12, 3) float64 and labels (12,), seeded."""
    generator = torch.Generator().manual_seed(3)
    return 3 * torch.randn(12, 3, generator=generator, dtype=torch.float64), torch.arange(12) % 3


def official(arrays, i, reduction="mean"):
    return AsymmetricSoftmaxLoss(*arrays["cfg_gpos_gneg_eps"][i].tolist(), reduction=reduction)


@pytest.mark.parametrize("i", CONFIGS)
def test_golden(i, golden, value_and_grad):
    arrays = golden("asl_singlelabel")
    data = arrays["logits"], arrays["targets"]
    value, grad = value_and_grad(official(arrays, i), *data, torch.float64)
    np.testing.assert_allclose(value, arrays[f"loss64_{i}"], rtol=1e-9)
    np.testing.assert_allclose(grad, arrays[f"grad64_{i}"], rtol=1e-9)
    value, grad = value_and_grad(official(arrays, i), *data)
    np.testing.assert_allclose(value, arrays[f"loss_{i}"], rtol=1e-5)
    np.testing.assert_allclose(grad, arrays[f"grad_{i}"], rtol=1e-5, atol=1e-6)
    samples, _ = value_and_grad(official(arrays, i, "none"), *data)
    np.testing.assert_allclose(samples, arrays[f"loss_none_{i}"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("i", CONFIGS)
def test_golden_two_classes(i, golden, value_and_grad):
    arrays = golden("asl_singlelabel")
    value, grad = value_and_grad(official(arrays, i), arrays["bin2_logits"], arrays["bin2_targets"])
    np.testing.assert_allclose(value, arrays[f"bin2_loss_{i}"], rtol=1e-5)
    np.testing.assert_allclose(grad, arrays[f"bin2_grad_{i}"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("gamma_neg", [0.0, 4.0])
def test_without_gamma_pos_and_smoothing_it_is_cross_entropy(gamma_neg, classes, golden):
    loss = AsymmetricSoftmaxLoss(gamma_pos=0.0, gamma_neg=gamma_neg, eps=0.0)
    torch.testing.assert_close(loss(*classes), F.cross_entropy(*classes), rtol=1e-13, atol=0)
    arrays = golden("asl_singlelabel")
    value = loss(torch.as_tensor(arrays["logits"]), torch.as_tensor(arrays["targets"]))
    np.testing.assert_allclose(value, arrays["ce_reference"], rtol=1e-6)


def test_without_gammas_it_is_smoothed_cross_entropy(classes):
    loss = AsymmetricSoftmaxLoss(gamma_pos=0.0, gamma_neg=0.0, eps=0.2)
    torch.testing.assert_close(loss(*classes), F.cross_entropy(*classes, label_smoothing=0.2), rtol=1e-13, atol=0)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_gradcheck_and_permutation(gamma, classes):
    logits, labels = classes
    loss = AsymmetricSoftmaxLoss(gamma_pos=gamma, gamma_neg=gamma, reduction="none")
    assert torch.autograd.gradcheck(lambda x: loss(x, labels), logits.requires_grad_())
    order = torch.arange(11, -1, -1)
    assert torch.equal(loss(logits[order], labels[order]), loss(logits, labels)[order])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 4.0])
def test_extreme_logits_are_finite(gamma, dtype, value_and_grad, under_autocast):
    logits = torch.tensor([[100.0, -100.0, 0.0], [-100.0, 100.0, -100.0], [-100.0, -100.0, 100.0]])
    loss = AsymmetricSoftmaxLoss(gamma_pos=gamma, gamma_neg=gamma, reduction="none")
    values, grads = value_and_grad(under_autocast(loss), logits, [0, 1, 0], dtype)
    assert values.dtype == torch.float32 and grads.dtype == dtype
    assert values.isfinite().all() and grads.isfinite().all() and values[2] > 180


def test_configuration_axis_equals_separate_losses(classes, value_and_grad):
    logits = torch.stack([classes[0], -classes[0]], dim=2)
    axis = {"gamma_pos": (0.0, 1.5), "gamma_neg": (0.5, 4.0), "eps": (0.0, 0.2)}
    tensors = {name: torch.tensor(values, dtype=torch.float64) for name, values in axis.items()}
    values, grads = value_and_grad(AsymmetricSoftmaxLoss(**tensors, reduction="none"), logits, classes[1])
    assert values.shape == (12, 2)
    for k in range(2):
        loss = AsymmetricSoftmaxLoss(**{name: numbers[k] for name, numbers in axis.items()}, reduction="none")
        value, grad = value_and_grad(loss, logits[..., k], classes[1])
        torch.testing.assert_close(values[:, k], value, rtol=1e-12, atol=0)
        torch.testing.assert_close(grads[..., k], grad, rtol=1e-12, atol=1e-300)


def test_space_holds_the_defaults(classes):
    default = AsymmetricSoftmaxLoss()
    for field, dimension in default.space.items():
        assert dimension.contains(getattr(default, field))
        assert dataclasses.replace(default, **{field: 0.0})(*classes).isfinite()


def test_out_of_range_is_refused(classes):
    with pytest.raises(UserError, match="eps must be >= 0 and <= 1, got 1.5"):
        AsymmetricSoftmaxLoss(eps=1.5)
    with pytest.raises(UserError, match="gamma_pos must be >= 0, got -1"):
        AsymmetricSoftmaxLoss(gamma_pos=-1)
    with pytest.raises(RuntimeError, match="out of bounds"):
        AsymmetricSoftmaxLoss()(classes[0], classes[1] + 1)
