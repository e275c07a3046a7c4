"""summary.json is strict JSON, complete, and never half written."""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from raymed.report import write_summary


@dataclass(frozen=True)
class Inner:
    gamma_neg: float = 4.0


@dataclass(frozen=True)
class Config:
    seeds: tuple[int, ...] = (2023, 2024)
    loss: Inner = Inner()


def strictly(text):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


def test_summary(tmp_path):
    figure = {"mean": np.float64(0.91), "std": math.nan, "n": np.int64(1), "ci_low": -math.inf, "num_patients": None}
    path = write_summary(
        tmp_path / "summary.json",
        "compare_losses",
        Config(),
        {"asl": {"test": {"auroc": figure}}},
        mlflow={"run_id": "abc"},
        paths={"table": Path("/data/table.csv")},
        best="asl",
        complete=np.bool_(True),
    )
    assert path == tmp_path / "summary.json"
    assert strictly(path.read_text()) == {
        "job": "compare_losses",
        "config": {"seeds": [2023, 2024], "loss": {"gamma_neg": 4.0}},
        "figures": {
            "asl": {"test": {"auroc": {"mean": 0.91, "std": None, "n": 1, "ci_low": None, "num_patients": None}}}
        },
        "mlflow": {"run_id": "abc"},
        "paths": {"table": "/data/table.csv"},
        "best": "asl",
        "complete": True,
    }
    assert [file.name for file in tmp_path.iterdir()] == ["summary.json"]


def test_what_cannot_be_written_leaves_the_old_file(tmp_path):
    path = write_summary(tmp_path / "summary.json", "job", Config(), {}, mlflow={}, paths={})
    before = path.read_text()
    with pytest.raises(TypeError, match="not JSON serializable"):
        write_summary(path, "job", Config(), {"auroc": object()}, mlflow={}, paths={})
    assert path.read_text() == before
