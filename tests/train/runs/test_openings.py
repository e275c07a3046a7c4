"""How often a test split was opened."""

import numpy as np

from raymed.train.runs.openings import open_test


def test_runs_are_counted_once_each_and_by_test_split(data, tmp_path):
    assert open_test(tmp_path, data, "a") == 1
    assert open_test(tmp_path, data, "a") == 1
    assert open_test(tmp_path, data, "b") == 2
    other = data.with_splits(data.splits | {"test": data.splits["test"][:-2]})
    assert open_test(tmp_path, other, "c") == 1
    # The same test images count as the same split, whatever the training split is.
    fewer = data.with_splits(data.splits | {"train": data.splits["train"][np.arange(10)]})
    assert open_test(tmp_path, fewer, "d") == 3
