"""The benchmarks' peers train the same thing, and are nobody's relatives."""

import ast
import json
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
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(JOBS))
    import bench_train

    yield bench_train
    for name in set(sys.modules) - before:
        if name.startswith("bench_"):
            sys.modules.pop(name)


@pytest.mark.parametrize(
    ("peer", "used"),
    [
        ("plain_training", "json math collections pathlib numpy torch"),
        ("plain_ddp", "pathlib torch bench_peers.plain_training"),
        ("plain_deepspeed", "logging os pathlib typing torch deepspeed bench_peers.plain_training"),
        ("plain_s3", "collections concurrent pathlib typing boto3 botocore"),
    ],
)
def test_it_imports_nothing_of_ours(peer, used):
    tree = ast.parse((JOBS / "bench_peers" / f"{peer}.py").read_text())
    imported = [n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)]
    imported += [alias.name for n in ast.walk(tree) if isinstance(n, ast.Import) for alias in n.names]
    assert {name if name.startswith("bench") else name.split(".")[0] for name in imported} == set(used.split())


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


@pytest.mark.slow
def test_two_workers_agree_with_ddp_and_say_as_much_as_it_does(bench, tmp_path, monkeypatch):
    """The benchmark refuses to time unequal trainings; a ring of two sends the gradient once: 4 bytes a number, and
    4 for each parameter that say how many workers have not reached it."""
    import bench_workers
    from bench_peers.plain_training import ResNet, group_norm

    monkeypatch.setenv("PYTHONPATH", str(JOBS))
    out = tmp_path / "figures.json"
    config = bench_workers.BenchWorkers(("torch",), 3, 2, equal_steps=8, batch_size=16, size=16, threads=1, out=out)
    bench_workers.main(config)

    figures = json.loads(out.read_text())["plain torch"]
    assert len(figures["ratio to DDP"]["values"]) == 3 and figures["ratio to DDP"]["median"] > 0
    sizes = [p.numel() for p in ResNet(1, group_norm).parameters()]
    assert figures["bytes sent a step"] == 4 * (sum(sizes) + len(sizes))
    assert 0 < figures["projected efficiency"]["128 GPUs, Ethernet"] < 1
