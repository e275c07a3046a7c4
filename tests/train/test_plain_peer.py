"""The benchmark's peer trains the same thing, and is nobody's relative."""

import ast
import sys
from pathlib import Path

import pytest
from small import load_data, recipe

from raymed.config import UserError, replace
from raymed.data.augment import Augment
from raymed.train.compute import Compute

JOBS = Path(__file__).resolve().parents[2] / "jobs"


@pytest.fixture
def bench(monkeypatch):
    """jobs/bench_train.py as a module."""
    monkeypatch.syspath_prepend(str(JOBS))
    import bench_train

    yield bench_train
    for name in ("bench_train", "bench_peers.plain_training", "bench_peers"):
        sys.modules.pop(name, None)


def test_it_imports_nothing_of_ours():
    tree = ast.parse((JOBS / "bench_peers" / "plain_training.py").read_text())
    imported = [n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)]
    imported += [alias.name for n in ast.walk(tree) if isinstance(n, ast.Import) for alias in n.names]
    assert {name.split(".")[0] for name in imported} == {"json", "pathlib", "numpy", "torch"}


def test_losses_weights_and_averages_are_equal(bench, manifest, tmp_path):
    ours = recipe(manifest, method="ce", augment=Augment.none(), single__accumulate=1, single__ema_decay=0.9)
    data = load_data(ours)
    phase = bench.phase_of(ours, data, 8)
    bench.export(tmp_path, data, phase)
    bench.check_equal(tmp_path, phase, data, Compute())
    with pytest.raises(UserError, match="the losses of both loops differ by"):
        other = replace(ours, {"single.optim.lr": 2.1e-3})
        bench.check_equal(tmp_path, bench.phase_of(other, data, 8), data, Compute())


def test_the_verdict_follows_the_interval(bench):
    import numpy as np

    even = np.array([0.99, 1.0, 1.0, 1.0, 1.0, 1.0, 1.01] * 3)
    assert bench.summary(even, 0.97, "at least")["verdict"] == "met"
    assert bench.summary(even - 0.1, 0.97, "at least")["verdict"] == "not met"
    assert bench.summary(even, 0.97, "at most")["verdict"] == "not met"
    wide = bench.summary(np.array([0.8, 0.9, 0.95, 0.98, 1.0, 1.1]), 0.97, "at least")
    assert wide["verdict"] == "not resolved" and wide["median"] == pytest.approx(0.965) and wide["half_width_95"] > 0.05
