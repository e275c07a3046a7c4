"""A run of train_classifier repeated: by its MLflow id, from a file on moved images, and on other labels."""

import json
import re
import runpy
import shutil
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from home import REPO
from safetensors.numpy import load_file

from raymed.data.phantoms import write_hsg

SMALL = "--method=asl --single.batch-size=32 --single.steps=12 --single.evaluations=3 --seeds 1 2".split()


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """The folder of this module: images, two storages, one MLflow."""
    return tmp_path_factory.mktemp("place")


@pytest.fixture
def run(monkeypatch, capsys, place):
    """run(job, storage, *arguments, expect=0) -> what the user reads."""

    def run(job: str, storage: str, *arguments: str, expect: int = 0) -> str:
        always = [f"--storage={place / storage}", f"--tracking=sqlite:///{place}/mlflow.db"]
        monkeypatch.setattr(sys, "argv", [str(REPO / "jobs" / f"{job}.py"), *always, *arguments])
        monkeypatch.chdir(place)
        code = 0
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
        except SystemExit as ended:
            code = ended.code
        printed = capsys.readouterr()
        assert code == expect, printed.out + printed.err
        return printed.out + printed.err

    return run


@pytest.fixture
def original(place, run) -> dict:
    """The summary of a run called one, which is trained once."""
    path = place / "here" / "runs" / "one" / "summary.json"
    if not path.exists():
        manifest = write_hsg(place / "images", num_patients=60, size=32)
        run("train_classifier", "here", f"--data.manifest={manifest}", "--data.positive=occluded", "--name=one", *SMALL)
    return json.loads(path.read_text())


@pytest.fixture
def exported(place, run, original) -> Path:
    path = place / "one.raymed.json"
    if not path.exists():
        run("train_classifier", "here", "--export-run=one")
    return path


@pytest.fixture
def moved(place, original) -> Path:
    """The images in another folder, under other names, in another order; patients renamed. The images here are gone."""
    source, folder = place / "images", place / "moved"
    if not folder.exists():
        folder.mkdir()
        table = pd.read_csv(source / "manifest.csv", dtype=str, keep_default_na=False).sample(frac=1, random_state=1)
        table["patient"] = [f"other {name[::-1]}" for name in table["patient"]]
        names = [f"scan {i}.png" for i in range(len(table))]
        for old, new in zip(table["image"], names, strict=True):
            shutil.copy(source / old, folder / new)
        table.assign(image=names).to_csv(folder / "manifest.csv", index=False)
    return folder


def summary_of(output: str) -> dict:
    return json.loads(Path(re.findall(r"summary: (.*)\n", output)[-1]).read_text())


def weights(place: Path, run: str) -> dict[str, np.ndarray]:
    return load_file(place / run / "seed-1" / "bundle" / "model.safetensors")


def test_by_its_mlflow_id_it_is_equal_to_the_bit(place, run, original):
    said = run("train_classifier", "here", "--from-run", original["mlflow"]["run"])
    summary = summary_of(said)

    assert "repeat of one: equal (to the bit)" in said
    assert Path(summary["paths"]["run"]).name == "one-repeat"
    assert summary["repeat"]["verdict"] == "equal" and summary["repeat"]["differences"] == {}
    assert summary["figures"] == original["figures"] and summary["command"] == original["command"]
    assert summary["mlflow"]["run"] != original["mlflow"]["run"]


def test_elsewhere_on_moved_renamed_and_reordered_images_it_is_equal_too(place, run, original, exported, moved):
    said = run("train_classifier", "there", f"--from-run={exported}", f"--data-root={moved}")
    summary = summary_of(said)

    assert summary["repeat"]["verdict"] == "equal", said
    assert "data" not in summary["repeat"]["differences"] and "config" not in summary["repeat"]["differences"]
    assert summary["figures"] == original["figures"]
    before, after = weights(place, "here/runs/one"), weights(place, "there/runs/one-repeat")
    assert all(np.array_equal(before[name], after[name]) for name in before)

    again = run("train_classifier", "there", f"--from-run={exported}", f"--data-root={moved}")
    assert summary_of(again) == summary and "step" not in again  # the same command finds it finished


def test_other_labels_and_a_lost_image_make_it_different(place, run, exported, moved):
    folder = place / "changed"
    shutil.copytree(moved, folder)
    table = pd.read_csv(folder / "manifest.csv", dtype=str, keep_default_na=False)
    *_, last = patent = table.loc[table["label"] == "patent", "case"].unique()
    table.loc[table["case"].isin(patent[:2]), "label"] = "occluded"
    table.drop(index=table.index[table["case"] == last][0]).to_csv(folder / "manifest.csv", index=False)

    said = run("train_classifier", "there", f"--from-run={exported}", f"--data-root={folder}", "--name=changed")
    repeat = summary_of(said)["repeat"]

    assert "repeat of one: different (the data (missing, labels) differ)" in said
    assert len(repeat["differences"]["data"]["labels"]) == 4 and len(repeat["differences"]["data"]["missing"]) == 1
    assert re.search(r"data: missing here: 1 row \(\d+\) of the original", said)


def test_what_cannot_be_repeated_leaves_nothing(place, run, original, exported):
    data = (f"--data.manifest={place}/images/manifest.csv", "--data.positive=occluded")
    for job, flags, expected in (
        ("compare_losses", ["--from-run=one"], "made by jobs/train_classifier.py"),
        ("train_classifier", [f"--from-run={exported}", "--data-root=nowhere"], "--data-root DIR"),
        ("train_classifier", [*data, "--method=ce", "--single.batch-size=33"], "batch_size must be a multiple"),
    ):
        said = run(job, "here", *flags, expect=2)
        assert "error: " in said and expected in said and "Traceback" not in said

    assert {path.name for path in (place / "here" / "runs").iterdir()} <= {"one", "one-repeat"}
