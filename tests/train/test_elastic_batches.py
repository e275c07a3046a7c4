"""How a batch is shared among fewer workers than were asked for."""

from pathlib import Path

import pytest
from small import load_data, recipe

from raymed.config import UserError
from raymed.tasks.task import Phase
from raymed.train.elastic import for_world, group_sizes


def phase(manifest: Path, batch_size: int, accumulate: int) -> Phase:
    settled = recipe(manifest, method="asl", single__batch_size=batch_size, single__accumulate=accumulate)
    return settled.phases(load_data(settled))[0]


@pytest.mark.parametrize(
    ("batch_size", "accumulate", "workers", "world", "expected"),
    [
        (16, 2, 2, 2, 2),
        (16, 2, 2, 1, 4),
        (24, 1, 4, 3, 2),  # 4 / 3 is no whole number: the next that divides
        (24, 1, 4, 2, 2),
        (48, 2, 6, 4, 3),
        (48, 2, 6, 5, None),  # five cannot share 48
        (16, 2, 8, 1, 16),
    ],
)
def test_no_worker_gets_a_larger_micro_batch(manifest, batch_size, accumulate, workers, world, expected):
    asked = phase(manifest, batch_size, accumulate)
    if expected is None:
        with pytest.raises(UserError, match=rf"single.batch_size \({batch_size}\) cannot be shared out among {world}"):
            for_world(asked, workers, world)
        return
    settled = for_world(asked, workers, world)
    assert settled.accumulate == expected
    assert settled.batch_size == batch_size and batch_size % (expected * world) == 0
    assert batch_size / (expected * world) <= batch_size / (accumulate * workers)


def test_groups_have_the_sizes_that_divide_every_batch(manifest):
    phases = [phase(manifest, 48, 1), phase(manifest, 16, 2)]
    assert group_sizes(phases, 8, 1) == [8, 4, 2, 1]
    assert group_sizes(phases[:1], 6, 2) == [6, 4, 3, 2]
    with pytest.raises(UserError, match=r"compute.min_workers is 3, but single.batch_size \(16\)"):
        group_sizes(phases, 8, 3)
