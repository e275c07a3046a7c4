"""The average of weights against its closed form."""

import copy

import pytest
import torch
from torch import nn

from raymed.config import UserError
from raymed.tasks.task import Ema
from raymed.train.engines.ema import Average


def test_closed_form():
    """shadow_n = prod d_t w_0 + sum_t (1 - d_t) prod_{s > t} d_s w_t, with d_t = min(decay, (1 + t) / (10 + t))."""
    module = nn.Linear(3, 2)
    weights = [module.weight.detach().clone()]
    average = Average(module, Ema(0.3))
    for k in range(6):
        with torch.no_grad():
            module.weight.add_(torch.full_like(module.weight, 0.5 * (k + 1)))
        weights.append(module.weight.detach().clone())
        average.update()
    decays = [min(0.3, (1 + t) / (10 + t)) for t in range(6)]
    assert decays[:3] == [0.1, 2 / 11, 0.25] and decays[3:] == [0.3] * 3
    share = [1.0] + [1 - d for d in decays]
    for t, decay in enumerate(decays):
        share = [s * decay if i <= t else s for i, s in enumerate(share)]
    assert sum(share) == pytest.approx(1)
    expected = sum(s * w.double() for s, w in zip(share, weights, strict=True))
    torch.testing.assert_close(average.shadow["weight"].double(), expected, rtol=1e-6, atol=1e-6)
    assert average.updates == 6


def test_swapping_in_gives_the_weights_back_bit_for_bit():
    module = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)).to(memory_format=torch.channels_last)
    module[1].weight.requires_grad_(False)
    average = Average(module, Ema(0.9))
    assert set(average.shadow) == {"0.weight", "0.bias", "1.bias"}
    with torch.no_grad():
        module[0].weight.mul_(1.1)
    average.update()
    own = {name: value.clone() for name, value in module.state_dict().items()}
    kept = module[0].weight
    with pytest.raises(ZeroDivisionError), average.swapped_in():
        assert torch.equal(module[0].weight, average.shadow["0.weight"])
        assert not torch.equal(module[0].weight, own["0.weight"])
        raise ZeroDivisionError
    assert module[0].weight is kept
    for name, value in module.state_dict().items():
        assert torch.equal(value, own[name])


def test_a_loaded_average_goes_on_as_if_it_had_been_there():
    module = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    module[1].bias.requires_grad_(False)
    average = Average(module, Ema(0.9))

    def move() -> None:
        with torch.no_grad():
            module[0].weight.mul_(1.5)
        average.update()

    move()
    with average.swapped_in():
        saved = {name: value.clone() for name, value in module.state_dict().items()}  # buffers and frozen ones too
    twin = Average(copy.deepcopy(module), Ema(0.9))
    twin.load(saved, average.updates)
    twin.parameters = average.parameters
    move()
    twin.update()
    assert twin.updates == 2 and twin.shadow.keys() == average.shadow.keys()
    assert all(torch.equal(twin.shadow[name], shadow) for name, shadow in average.shadow.items())
    assert not torch.equal(twin.shadow["0.weight"], saved["0.weight"])


def test_range():
    assert Ema(0.0).decay == 0
    with pytest.raises(UserError, match="ema.decay must be >= 0 and < 1, got 1"):
        Ema(1.0)
