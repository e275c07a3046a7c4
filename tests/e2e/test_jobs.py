"""train_classifier and compare_losses from the command line: results, interruption, bad input."""

import json
import os
import re
import runpy
import signal
import socket
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from home import REPO, TINY, wait_for
from safetensors.numpy import load_file

from raymed.data.phantoms import write_hsg
from raymed.tracking.outbox import Outbox

METRICS = ("auroc", "auprc", "accuracy", "accuracy_at_0.5", "precision", "recall", "f1", "ece")
TRAIN = (*TINY, "--method=asl", "--single.steps=60", "--name=one")


def summary_of(output: str) -> dict:
    last = output.strip().splitlines()[-1]
    assert last.startswith("summary: ")
    return json.loads(Path(last.removeprefix("summary: ")).read_text())


# compare_losses


@pytest.fixture(scope="module")
def comparison(home):
    """(summary, command) of two methods over two seeds."""
    command = (*TINY, "--compared", "ce", "asl", "--seeds", "2023", "2024", "--name=compared")
    return summary_of(home.run("compare_losses", *command)), command


@pytest.mark.ray
def test_compare_losses_writes_the_summary(comparison):
    summary, _ = comparison

    assert summary["job"] == "compare_losses"
    assert list(summary["figures"]) == ["ce", "asl", "supcon_ce", "supcon_asl"]
    for method in summary["figures"].values():
        for split, patients in (("val", 36), ("test", 48)):
            for metric in METRICS:
                figure = method[split][metric]
                assert set(figure) >= {"mean", "std", "n", "ci_low", "ci_high", "num_patients"}
                assert (figure["n"], figure["num_patients"]) == (2, patients)
            auroc = method[split]["auroc"]
            assert auroc["ci_low"] <= auroc["mean"] <= auroc["ci_high"]
    on_validation = {name: method["val"]["auprc"]["mean"] for name, method in summary["figures"].items()}
    assert summary["best"] == max(on_validation, key=on_validation.__getitem__)
    assert summary["differences"]["baseline"] == "ce"
    assert summary["mlflow"]["run"]
    assert all(Path(path).exists() for path in summary["paths"].values())


@pytest.mark.ray
def test_the_heads_of_a_seed_share_its_encoder(home, comparison):
    run = home.storage / "runs" / "compared"
    weights = {
        (method, seed): load_file(run / method / f"seed-{seed}" / "bundle" / "model.safetensors")
        for method in ("supcon_ce", "supcon_asl")
        for seed in (2023, 2024)
    }
    name = "encoder.net.stem.0.weight"

    for seed in (2023, 2024):
        np.testing.assert_array_equal(weights["supcon_ce", seed][name], weights["supcon_asl", seed][name])
    assert not np.array_equal(weights["supcon_ce", 2023][name], weights["supcon_ce", 2024][name])
    assert not np.array_equal(
        weights["supcon_ce", 2023]["head.linear.weight"], weights["supcon_asl", 2023]["head.linear.weight"]
    )


@pytest.mark.ray
def test_compare_losses_again_trains_nothing_and_says_the_same(home, comparison):
    summary, command = comparison
    run = home.storage / "runs" / "compared"
    before = {path: path.stat().st_mtime_ns for path in run.glob("*/seed-*/result.json")}

    again = summary_of(home.run("compare_losses", *command))

    assert len(before) == 10
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert again == summary


# train_classifier


@pytest.fixture(scope="module")
def uninterrupted(home):
    """(folder of the run, seconds to the first step) of a training that nothing disturbed."""
    began = time.time()
    output = home.run("train_classifier", *TRAIN)
    run = Path(summary_of(output)["paths"]["run"])
    return run, _first_step(run) - began


def _first_step(run: Path) -> float:
    records = Outbox(run / "seed-2023" / "tracking.jsonl").records()
    return next(r["time"] / 1000 for r in records if r["op"] == "metrics" and "single/loss" in r["values"])


def _curve(run: Path) -> list:
    records = Outbox(run / "seed-2023" / "tracking.jsonl").records()
    told = [(r["step"], r["values"]) for r in records if r["op"] == "metrics"]
    return [(step, values) for step, values in told if not any(name.startswith("time/") for name in values)]


def test_ctrl_c_saves_the_state_and_the_same_command_continues(home, uninterrupted, tmp_path):
    whole, _ = uninterrupted
    storage = f"--storage={tmp_path}"
    run = tmp_path / "runs" / "one"

    process = home.start("train_classifier", *TRAIN, storage)
    losses = run / "seed-2023" / "tracking.jsonl"
    wait_for(lambda: losses.exists() and "single/loss" in losses.read_text(), 120, "first loss")
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    output, _ = process.communicate(timeout=60)

    assert process.returncode == 130, output
    assert "stopped; the same command continues" in output and "Traceback" not in output
    assert not (run / "seed-2023" / "result.json").exists()
    steps = len(_curve(run))
    state = json.loads(next((run / "seed-2023" / "checkpoints" / "single").glob("step-*/state.json")).read_text())
    assert 0 < state["step"] < 60

    home.run("train_classifier", *TRAIN, storage)

    assert steps < len(_curve(run))
    assert _curve(run) == _curve(whole)
    for file in ("seed-2023/result.json", "seed-2023/bundle/model.safetensors"):
        assert (run / file).read_bytes() == (whole / file).read_bytes()


def test_an_unreachable_mlflow_delays_nothing_and_loses_nothing(home, uninterrupted, tmp_path):
    with socket.socket() as closed:  # bound, and never listening: connections are refused
        closed.bind(("127.0.0.1", 0))
        uri = f"http://127.0.0.1:{closed.getsockname()[1]}"
        began = time.time()
        output = home.run("train_classifier", *TRAIN, f"--storage={tmp_path}", MLFLOW_TRACKING_URI=uri)

    run = tmp_path / "runs" / "one"
    delay = (_first_step(run) - began) - uninterrupted[1]
    assert delay <= 15, f"first step {delay:.1f} s later"  # its client would try for minutes
    assert "Traceback" not in output
    assert "does not take records" in output and "the next start uploads" in output
    assert _curve(run) == _curve(uninterrupted[0])
    assert len(list((tmp_path / "outboxes").glob("*.json"))) == 2


# What the user gave and cannot be used: exit code 2, one message, nothing left behind.


@pytest.fixture
def refused(monkeypatch, capsys, tmp_path):
    """refused(job, *arguments) -> what the user reads; the storage is tmp_path / "storage"."""

    def run(job: str, *arguments: str, storage: Path = tmp_path / "storage") -> str:
        monkeypatch.setattr(sys, "argv", [f"{job}.py", f"--storage={storage}", *arguments])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(REPO / "jobs" / f"{job}.py"), run_name="__main__")
        printed = capsys.readouterr()
        said = re.sub(r"[\s│]+", " ", printed.out + printed.err)
        assert ended.value.code == 2, said
        assert "Traceback" not in said
        assert not (tmp_path / "storage" / "runs").exists()
        assert not (tmp_path / "storage" / "mlflow").exists()
        return said

    return run


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory):
    return write_hsg(tmp_path_factory.mktemp("phantoms") / "hsg", num_patients=60, size=48)


def test_a_missing_manifest(refused, tmp_path):
    said = refused("train_classifier", f"--data.manifest={tmp_path}/nothing.csv", "--data.positive=occluded")
    assert f"there is no file {tmp_path}/nothing.csv" in said


@pytest.mark.parametrize("job", ["train_classifier", "compare_losses", "tune_asl"])
def test_a_misspelt_field(refused, job):
    said = refused(job, "--losses.asl.gama-neg=2")
    assert "Unrecognized options: --losses.asl.gama-neg" in said and "--losses.asl.gamma-neg" in said


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("--losses.asl.gamma-neg=-1", "gamma_neg must be >= 0, got -1"),
        ("--losses.asl.clip=1.5", "clip must be"),
        ("--method=supcon_als", "did you mean 'supcon_asl'?"),
        ("--compute.workers=0", "compute.workers must be >= 1, got 0"),
    ],
)
def test_a_field_out_of_range(refused, argument, expected):
    assert expected in refused("train_classifier", argument)


def test_a_sweep_over_nothing(refused):
    said = refused("tune_asl", "--sweep.space", "head.optim.rl=1e-3..1e-1:log")
    assert "no field 'head.optim.rl' (did you mean 'head.optim.lr'?)" in said


def test_no_positive_class_on_an_imbalanced_set(refused, phantoms):
    said = refused("train_classifier", f"--data.manifest={phantoms}")
    assert "--data.positive occluded" in said


def test_one_class_only(refused, phantoms, tmp_path):
    table = pd.read_csv(phantoms)
    table["image"] = [str(phantoms.parent / image) for image in table["image"]]
    table[table["label"] == "patent"].to_csv(tmp_path / "one.csv", index=False)

    said = refused("train_classifier", f"--data.manifest={tmp_path}/one.csv", "--data.positive=patent")
    assert "every image has the label 'patent'" in said


def test_a_storage_that_cannot_be_written(refused, tmp_path):
    (tmp_path / "file").write_text("")
    said = refused("train_classifier", storage=tmp_path / "file" / "storage")
    assert f"cannot write to {tmp_path}/file/storage" in said and "--storage" in said


def test_the_same_name_with_another_config(home, uninterrupted):
    run, _ = uninterrupted
    config = (run / "config.json").read_bytes()

    said = home.run("train_classifier", *TRAIN, "--single.optim.lr=0.5", expect=2)

    assert "error: run 'one' exists with another config (single.optim.lr was 0.004 and is 0.5)" in said
    assert "Traceback" not in said
    assert (run / "config.json").read_bytes() == config
    assert (run / "summary.json").is_file()


def test_on_a_network_share_sqlite_and_caches_go_to_a_local_folder(monkeypatch, capsys, tmp_path):
    share, local = tmp_path / "share", tmp_path / "local"
    monkeypatch.setattr("raymed.storage.network.is_network_share", lambda path, mounts=None: str(path) == str(share))
    monkeypatch.setenv("RAYMED_LOCAL", str(local))
    monkeypatch.setattr(sys, "argv", ["train_classifier.py", f"--storage={share}", *TINY, "--method=ce"])

    runpy.run_path(str(REPO / "jobs" / "train_classifier.py"), run_name="__main__")

    out = capsys.readouterr().out
    assert f"{share} is on a network share: mlflow is kept in {local}" in out
    assert f"{share} is on a network share: cache is kept in {local}" in out
    assert {path.name for path in local.glob("*/*")} == {"mlflow", "cache"}
    assert list(local.glob("*/mlflow/mlflow.db"))
    assert not list(share.glob("**/mlflow.db")) and not list(share.glob("**/decoded-*.npy"))
    assert summary_of(out)["mlflow"]["run"]
