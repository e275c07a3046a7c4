"""SupConLoss against vectors of the published code. Several processes: tests/test_distributed.py."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from raymed.config import UserError
from raymed.losses import SupConLoss

CONFIGS = range(5)


@pytest.fixture
def views():
    """Unit features (6, 2, 5) float64 and labels (6,), seeded; the sample of class 2 is alone in its class."""
    generator = torch.Generator().manual_seed(5)
    features = torch.randn(6, 2, 5, generator=generator, dtype=torch.float64)
    return F.normalize(features, dim=2), torch.tensor([0, 1, 0, 2, 1, 0])


def official(arrays, i):
    temperature, base_temperature, contrast_all = arrays[f"cfg_{i}"].tolist()
    return SupConLoss(temperature, base_temperature, "all" if contrast_all else "one")


@pytest.mark.parametrize("i", CONFIGS)
def test_golden(i, golden, value_and_grad):
    arrays = golden("supcon")
    loss = official(arrays, i)
    value, grad = value_and_grad(loss, arrays["features"], arrays["labels"])
    np.testing.assert_allclose(value, arrays[f"loss_{i}"], rtol=1e-5)
    np.testing.assert_allclose(grad, arrays[f"grad_{i}"], rtol=1e-5, atol=1e-6)
    value, _ = value_and_grad(loss, arrays["features"], arrays["labels"], torch.float64)
    np.testing.assert_allclose(value, arrays[f"loss64_{i}"], rtol=1e-9)
    value, _ = value_and_grad(loss, arrays["features"])
    np.testing.assert_allclose(value, arrays[f"simclr_{i}"], rtol=1e-5)


def test_golden_anchors_without_positives(golden, value_and_grad):
    arrays = golden("supcon")
    value, grad = value_and_grad(SupConLoss(), arrays["nopos_features"], arrays["nopos_labels"])
    np.testing.assert_allclose(value, arrays["nopos_loss"], rtol=1e-5)
    assert grad.isfinite().all()


@pytest.mark.parametrize("contrast", ["all", "one"])
def test_equals_the_formula_anchor_by_anchor(contrast, views):
    features, labels = views
    loss = SupConLoss(temperature=0.2, contrast=contrast, reduction="none")(features, labels)
    assert loss.shape == (6, 2 if contrast == "all" else 1)
    keys = [(n, v) for n in range(6) for v in range(2)]
    for n in range(6):
        for v in range(loss.shape[1]):
            similarity = {key: (features[n, v] @ features[key]).item() / 0.2 for key in keys if key != (n, v)}
            log_sum = math.log(sum(math.exp(s) for s in similarity.values()))
            positive = [s - log_sum for key, s in similarity.items() if labels[key[0]] == labels[n]]
            assert loss[n, v].item() == pytest.approx(-sum(positive) / len(positive), rel=1e-12)
    assert torch.equal(SupConLoss(0.2, contrast=contrast)(features, labels), loss.mean())


def test_base_temperature_scales(views):
    tied = SupConLoss(temperature=0.5)(*views)
    torch.testing.assert_close(SupConLoss(0.5, base_temperature=0.07)(*views), tied * 0.5 / 0.07, rtol=1e-12, atol=0)
    assert torch.equal(SupConLoss(0.5, base_temperature=0.5)(*views), tied)


def test_gradcheck(views):
    features, labels = views
    for contrast in ("all", "one"):
        loss = SupConLoss(temperature=0.2, contrast=contrast)
        assert torch.autograd.gradcheck(lambda x, loss=loss: loss(x, labels), features.clone().requires_grad_())


def test_order_of_samples_and_views_does_not_matter(views):
    features, labels = views
    value = SupConLoss()(features, labels)
    order = torch.tensor([4, 0, 5, 1, 3, 2])
    torch.testing.assert_close(SupConLoss()(features[order], labels[order]), value, rtol=1e-13, atol=0)
    torch.testing.assert_close(SupConLoss()(features.flip(1), labels), value, rtol=1e-13, atol=0)


def test_a_single_view_of_a_single_sample_costs_nothing(value_and_grad):
    value, grad = value_and_grad(SupConLoss(), torch.ones(1, 1, 4) / 2, [0])
    assert value == 0 and (grad == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_inputs_and_autocast_compute_in_float32(dtype, views, value_and_grad, under_autocast):
    features, labels = views[0].to(dtype), views[1]
    loss = SupConLoss(temperature=0.03)
    exact, exact_grad = value_and_grad(loss, features.double(), labels)
    value, grad = value_and_grad(under_autocast(loss), features, labels)
    value32, grad32 = value_and_grad(under_autocast(loss), features.float(), labels)
    assert value.dtype == torch.float32 and grad.dtype == dtype
    torch.testing.assert_close(value.double(), exact, rtol=1e-5, atol=0)
    torch.testing.assert_close(value32, value, rtol=0, atol=0)
    torch.testing.assert_close(grad32.double(), exact_grad, rtol=1e-4, atol=1e-5)
    assert grad.isfinite().all()


def test_extreme_similarity_is_finite(value_and_grad):
    """Opposite unit vectors of one class at T = 0.01: similarities of +-100."""
    features = torch.tensor([[[1.0, 0.0]], [[-1.0, 0.0]], [[1.0, 0.0]], [[-1.0, 0.0]]]).half()
    value, grad = value_and_grad(SupConLoss(temperature=0.01), features, [0, 0, 1, 1])
    assert value.item() == pytest.approx(200, rel=1e-3) and grad.isfinite().all()


def test_space_and_ranges(views):
    temperature = SupConLoss.space["temperature"]
    assert (temperature.low, temperature.high, temperature.log) == (0.03, 0.5, True)
    assert temperature.contains(SupConLoss().temperature)
    assert all(SupConLoss(temperature=t)(*views).isfinite() for t in (temperature.low, temperature.high))
    with pytest.raises(UserError, match="^temperature must be > 0, got 0$"):
        SupConLoss(temperature=0)
    with pytest.raises(UserError, match="base_temperature must be > 0, got -1"):
        SupConLoss(base_temperature=-1)
    with pytest.raises(UserError, match="contrast must be one of 'all', 'one', got 'al' .did you mean 'all'"):
        SupConLoss(contrast="al")
