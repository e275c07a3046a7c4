"""FocalLoss against vectors of fvcore's sigmoid_focal_loss; ClassBalancedFocalLoss against hand-computed weights."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from raymed.losses import ClassBalancedFocalLoss, FocalLoss


@pytest.mark.parametrize("gamma", [0, 1, 2, 5])
@pytest.mark.parametrize("alpha", [None, 0.25, 0.75])
def test_golden(alpha, gamma, golden, value_and_grad):
    arrays = golden("focal_sigmoid")
    key = f"a{-1 if alpha is None else alpha}_g{gamma}"
    loss = FocalLoss(alpha=alpha, gamma=gamma)
    value, grad = value_and_grad(loss, arrays["logits"], arrays["targets"])
    np.testing.assert_allclose(value, arrays[f"mean_{key}"], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(grad, arrays[f"gradmean_{key}"], rtol=1e-5, atol=1e-6)
    elements, _ = value_and_grad(FocalLoss(alpha, gamma, reduction="none"), arrays["logits"], arrays["targets"])
    np.testing.assert_allclose(elements, arrays[f"none_{key}"], rtol=1e-5, atol=1e-6)


def test_gamma_zero_is_cross_entropy(batch):
    expected = F.binary_cross_entropy_with_logits(*batch)
    torch.testing.assert_close(FocalLoss(gamma=0.0)(*batch), expected, rtol=1e-13, atol=0)


@pytest.mark.parametrize(
    ("beta", "weight_neg", "weight_pos"),
    [
        (0.0, 1.0, 1.0),
        # 0.1 / (1 - 0.9**4) = 0.290782, 0.1 / (1 - 0.9**2) = 0.526316, scaled to sum to 2
        (0.9, 0.711743, 1.288257),
        (1 - 1e-9, 2 / 3, 4 / 3),  # inverse frequency: 2 to 1
    ],
)
def test_class_balanced_weights(beta, weight_neg, weight_pos, batch):
    logits, targets = batch
    loss = ClassBalancedFocalLoss((4, 2), beta=beta, gamma=2.0, reduction="none")(logits, targets)
    weights = loss / FocalLoss(gamma=2.0, reduction="none")(logits, targets)
    expected = torch.where(targets == 1, weight_pos, weight_neg).double()
    torch.testing.assert_close(weights, expected, rtol=2e-6, atol=0)


def test_class_balanced_space_makes_losses(batch):
    default = ClassBalancedFocalLoss((75, 25))
    assert all(dimension.contains(getattr(default, field)) for field, dimension in default.space.items())
    for beta in default.space["beta"].options:
        assert ClassBalancedFocalLoss((75, 25), beta=beta)(*batch).isfinite()
