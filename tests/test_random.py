"""Counter-based random numbers: nothing but (seed, step, index, purpose, element) may change a draw."""

import pytest
import torch

from raymed.random import derive, normal, uniform

INDEX = torch.arange(2000)


def test_first_values_are_pinned():
    """A change of the hash would change every run that is repeated from its record."""
    assert derive(2023, "init", 3) == 1504028091897324407
    rows = torch.tensor([0, 41])
    expected = [[0.29430824518203735, 0.14998215436935425], [0.8615100383758545, 0.13148081302642822]]
    assert uniform(2023, 7, rows, "flip", (2,)).tolist() == expected
    assert normal(2023, 7, rows, "noise").tolist() == [-1.4908909797668457, 0.4128020703792572]


def test_int64_tensors_compute_the_unsigned_hash():
    """SplitMix64 in Python's integers, modulo 2**64."""

    def mix(z: int) -> int:
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % 2**64
        return z ^ (z >> 31)

    golden, rows = 0x9E3779B97F4A7C15, [0, 1, 2**40 + 3]
    samples = [mix((derive(5, 2, "x") + golden * row) % 2**64) for row in rows]
    expected = [[(mix((s + golden * e) % 2**64) >> 40) * 2.0**-24 for e in (1, 2, 3)] for s in samples]
    assert uniform(5, 2, torch.tensor(rows), "x", (3,)).tolist() == expected


@pytest.mark.parametrize("draw", [uniform, normal])
def test_batch_composition_does_not_matter(draw):
    whole = draw(1, 5, INDEX, "noise", (3, 7))
    order = torch.randperm(len(INDEX), generator=torch.Generator().manual_seed(0))
    assert torch.equal(draw(1, 5, INDEX[order], "noise", (3, 7)), whole[order])
    for size in (1, 2, 3, 5, 17):
        assert torch.equal(draw(1, 5, INDEX[40 : 40 + size], "noise", (3, 7)), whole[40 : 40 + size])


def test_uniform_is_uniform():
    u = uniform(1, 0, INDEX, "a", (50,))
    assert u.dtype == torch.float32 and 0 <= u.min() < 1e-4 and 1 - 1e-4 < u.max() < 1
    assert abs(u.mean() - 0.5) < 0.003 and abs(u.var() - 1 / 12) < 0.001
    counts = torch.histc(u, bins=20, min=0, max=1)
    chi_squared = ((counts - 5000) ** 2 / 5000).sum()
    assert chi_squared < 43.8  # 99.9th percentile, 19 degrees of freedom


def test_normal_is_standard_normal():
    z = normal(1, 0, INDEX, "a", (50,))
    assert z.dtype == torch.float32 and z.isfinite().all()
    assert abs(z.mean()) < 0.01 and abs(z.std() - 1) < 0.01
    assert abs((z**4).mean() - 3) < 0.1
    assert abs((z.abs() < 1).float().mean() - 0.6827) < 0.005


def test_neighbours_are_uncorrelated():
    """Consecutive samples, elements, steps and seeds."""
    base = uniform(1, 0, INDEX, "a", (40,))
    neighbours = {
        "sample": (base[1:], base[:-1]),
        "element": (base[:, 1:], base[:, :-1]),
        "step": (base, uniform(1, 1, INDEX, "a", (40,))),
        "seed": (base, uniform(2, 0, INDEX, "a", (40,))),
        "purpose": (base, uniform(1, 0, INDEX, "b", (40,))),
    }
    for name, pair in neighbours.items():
        correlation = torch.corrcoef(torch.stack([part.flatten() for part in pair]))[0, 1]
        assert abs(correlation) < 0.015, name  # 4 standard errors are 0.0143


def test_no_sample_repeats_another():
    assert uniform(1, 0, torch.arange(20000), "a").unique().numel() > 19950


def test_derived_seeds_differ_and_fit_torch():
    seeds = {derive(seed, name, k) for seed in (0, 1) for name in ("init", "order") for k in range(50)}
    assert len(seeds) == 200 and all(0 <= seed < 2**63 for seed in seeds)
    torch.manual_seed(max(seeds))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("draw", [uniform, normal])
def test_same_bits_on_the_gpu(draw):
    assert torch.equal(draw(3, 9, INDEX.cuda(), "noise", (28, 28)).cpu(), draw(3, 9, INDEX, "noise", (28, 28)))
