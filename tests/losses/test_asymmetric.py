"""AsymmetricLoss against vectors of the published code, and the ladder of losses it contains."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from raymed.losses import AsymmetricLoss, FocalLoss

CONFIGS = range(7)


def official(arrays, i, detach_weight):
    """The published loss with the hyper-parameters of configuration i."""
    gamma_neg, gamma_pos, clip = arrays["cfg_gneg_gpos_clip"][i].tolist()
    return AsymmetricLoss(gamma_neg, gamma_pos, clip, detach_weight=detach_weight, clamp=1e-8, reduction="sum")


@pytest.mark.parametrize("detach_weight", [False, True])
@pytest.mark.parametrize("i", CONFIGS)
def test_golden(i, detach_weight, golden, value_and_grad):
    arrays = golden("asl_multilabel")
    loss, mode = official(arrays, i, detach_weight), f"{i}_det{int(detach_weight)}"
    value, grad = value_and_grad(loss, arrays["logits"], arrays["targets"], torch.float64)
    np.testing.assert_allclose(value, arrays[f"loss64_{mode}"], rtol=1e-9)
    np.testing.assert_allclose(grad, arrays[f"grad64_{mode}"], rtol=1e-9)
    value, grad = value_and_grad(loss, arrays["logits"], arrays["targets"])
    np.testing.assert_allclose(value, arrays[f"loss_{mode}"], rtol=1e-5)
    np.testing.assert_allclose(grad, arrays[f"grad_{mode}"], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(value, arrays[f"loss_opt_{i}"], rtol=1e-5)


@pytest.mark.parametrize("i", CONFIGS)
def test_golden_single_column(i, golden, value_and_grad):
    arrays = golden("asl_multilabel")
    value, grad = value_and_grad(official(arrays, i, detach_weight=False), arrays["bin_logits"], arrays["bin_targets"])
    np.testing.assert_allclose(value, arrays[f"bin_loss_{i}"], rtol=1e-5)
    np.testing.assert_allclose(grad, arrays[f"bin_grad_{i}"], rtol=1e-5, atol=1e-6)


def test_golden_clamp_at_extreme_logits(golden, value_and_grad):
    arrays = golden("asl_multilabel")
    loss = AsymmetricLoss(gamma_neg=4, gamma_pos=1, clip=0.05, clamp=1e-8, reduction="sum")
    value, grad = value_and_grad(loss, arrays["ext_logits"], arrays["ext_targets"])
    np.testing.assert_allclose(value, arrays["ext_loss"], rtol=1e-5)
    np.testing.assert_allclose(grad, arrays["ext_grad"], rtol=1e-5, atol=1e-6)


def test_defaults_are_the_paper(batch):
    logits, targets = batch
    p, shifted = logits.sigmoid(), (logits.sigmoid() - 0.05).clamp(min=0)
    expected = -(targets * p.log() + (1 - targets) * shifted**4 * (1 - shifted).log()).mean()
    torch.testing.assert_close(AsymmetricLoss()(logits, targets), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
def test_without_asymmetry_it_is_focal_loss(gamma, batch, value_and_grad):
    value, grad = value_and_grad(AsymmetricLoss(gamma, gamma, clip=0.0), *batch)
    focal, focal_grad = value_and_grad(FocalLoss(gamma=gamma), *batch)
    torch.testing.assert_close(value, focal, rtol=1e-13, atol=0)
    torch.testing.assert_close(grad, focal_grad, rtol=1e-12, atol=0)
    if gamma == 0:
        torch.testing.assert_close(value, F.binary_cross_entropy_with_logits(*batch), rtol=1e-13, atol=0)


@pytest.mark.parametrize("gamma_neg", [0.0, 0.5, 4.0])
def test_negatives_below_the_margin_are_ignored(gamma_neg, value_and_grad):
    logits = torch.tensor([0.049, 0.0499, 0.0501, 0.051], dtype=torch.float64).logit()
    loss = AsymmetricLoss(gamma_neg=gamma_neg, clip=0.05, reduction="none")
    values, grads = value_and_grad(loss, logits, torch.zeros(4))
    assert (values[:2] == 0).all() and (grads[:2] == 0).all()
    assert (values[2:] > 0).all() and (grads[2:] > 0).all()
