"""Shared by the tests of the losses."""

import numpy as np
import pytest
import torch


@pytest.fixture(scope="session")
def value_and_grad():
    """value_and_grad(loss, inputs, targets, dtype=None) -> the loss and d(sum of the loss)/d(inputs)."""

    def compute(loss, inputs, targets=None, dtype=None):
        inputs = torch.as_tensor(inputs, dtype=dtype).clone().requires_grad_()
        targets = None if targets is None else torch.as_tensor(np.asarray(targets))
        value = loss(inputs, targets)
        value.sum().backward()
        return value.detach(), inputs.grad

    return compute


@pytest.fixture(scope="session")
def under_autocast():
    """under_autocast(loss) -> the loss called in a bfloat16 autocast region, which its backward pass is not in."""

    def wrap(loss):
        def call(inputs, targets):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return loss(inputs, targets)

        return call

    return wrap


@pytest.fixture
def batch():
    """Logits and targets (16, 4), float64, seeded, a quarter positive."""
    generator = torch.Generator().manual_seed(7)
    logits = 3 * torch.randn(16, 4, generator=generator, dtype=torch.float64)
    return logits, (torch.rand(16, 4, generator=generator) < 0.25).double()
