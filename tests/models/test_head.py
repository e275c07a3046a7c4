"""Heads: shapes, unit norm in half precision, and the bias that gives the prior."""

import pytest
import torch

from raymed.models.head import LinearHead, ProjectionHead


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_projection_has_unit_norm(dtype):
    torch.manual_seed(0)
    projected = ProjectionHead(32, out=16).to(dtype)(100 * torch.randn(8, 32).to(dtype))
    assert projected.shape == (8, 16) and projected.dtype == torch.float32
    torch.testing.assert_close(projected.norm(dim=1), torch.ones(8), atol=1e-6, rtol=0)


def test_projection_of_zero_is_finite():
    head = ProjectionHead(4, hidden=8, out=2)
    assert head.layers[0].out_features == 8
    for parameter in head.parameters():
        torch.nn.init.zeros_(parameter)
    features = torch.zeros(1, 4, requires_grad=True)
    head(features).sum().backward()
    assert features.grad.isfinite().all()


def test_linear_head_starts_at_the_prior():
    logits = LinearHead(64, prior=0.25)(torch.zeros(5, 64))
    torch.testing.assert_close(logits.sigmoid(), torch.full((5,), 0.25))
    assert LinearHead(64)(torch.randn(5, 64)).shape == (5,)
    assert LinearHead(64, out=14)(torch.randn(5, 64)).shape == (5, 14)
