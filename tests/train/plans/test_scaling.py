"""Weak scaling by hand."""

import pytest

from raymed.train.plans.scaling import ETHERNET, INFINIBAND, NVLINK, Link, projections, ring, weak_scaling

LINK = Link("by hand", bytes_per_second=1e9, latency=1e-3)


def test_formula():
    """4 workers all-reduce 1 GB: 2 x 3/4 GB in 1.5 s, and 6 messages of 1 ms."""
    apart = weak_scaling(3.0, ring(1e9), LINK, 4)
    assert apart.step_seconds == pytest.approx(3 + 1.5 + 0.006)
    assert apart.efficiency == pytest.approx(3 / 4.506)
    assert weak_scaling(3.0, ring(1e9), LINK, 4, overlapped=True).efficiency == 1
    hidden = weak_scaling(1.0, ring(1e9), LINK, 4, overlapped=True)
    assert hidden.step_seconds == pytest.approx(1.506) and hidden.efficiency == pytest.approx(1 / 1.506)
    assert weak_scaling(3.0, ring(1e9), LINK, 1).efficiency == 1


def test_projections_are_ordered_as_the_links_are():
    """25 million parameters in a step of 100 ms: 0.2 GB or so on the wire."""
    found = {(p.workers, p.link): p.efficiency for p in projections(0.1, ring(1e8))}
    assert set(found) == {(8, NVLINK), (16, INFINIBAND), (16, ETHERNET), (128, INFINIBAND), (128, ETHERNET)}
    assert (
        found[8, NVLINK] > found[16, INFINIBAND] > found[128, INFINIBAND] > found[16, ETHERNET] > found[128, ETHERNET]
    )
    seconds = 2 * 15 / 16 * 1e8 / 12.5e9 + 30 * 50e-6
    assert found[16, ETHERNET] == pytest.approx(0.1 / (0.1 + seconds))
