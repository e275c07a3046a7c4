"""Repeating a run: what is exported, how data are found again, what differs, and the verdict."""

import copy
import json
import random
import re
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from small import RECIPE, load_data, recipe, write_images

from raymed.config import UserError, to_dict
from raymed.config import replace as change
from raymed.data.dataset import load
from raymed.data.manifest import DataConfig
from raymed.tasks.classifier import ClassifierRecipe
from raymed.tracking.outbox import Outbox
from raymed.train.compute import Compute
from raymed.train.runs.job import RunConfig
from raymed.train.runs.record import data_record, export, fetch, images
from raymed.train.runs.repeat import begin, data_differences, differing, match
from raymed.train.runs.repeat import with_defaults as defaults

FIGURES = {"asl": {"test": {"auroc": {"mean": 0.8, "std": 0.02, "n": 3, "ci_low": 0.7, "ci_high": 0.9}}}}


@dataclass(frozen=True)
class Config:
    """A job's config."""

    recipe: ClassifierRecipe = RECIPE
    seeds: tuple[int, ...] = (1, 2, 3)
    compute: Compute = Compute()
    run: RunConfig = RunConfig()


@dataclass(frozen=True)
class OtherConfig:
    """The config of a job that has no seeds."""

    recipe: ClassifierRecipe = RECIPE
    compute: Compute = Compute()
    run: RunConfig = RunConfig()


def write_run(storage: Path, name: str, config: Config, data, figures: dict | None) -> None:
    """What a job leaves in the storage, less its trainings."""
    outbox = Outbox(storage / "runs" / name / "tracking.jsonl")
    tags = {"raymed.job": "train_classifier", "raymed.git.commit": "abc", "raymed.git.dirty": "False"}
    outbox.open(f"{name}-key", name, None, to_dict(config), tags)
    outbox.json({"python": "3.11", "num_cpus": 2}, "environment.json")
    outbox.text("numpy==2.0\ntorch==2.4\n", "requirements.txt")
    (outbox.path.parent / "data.json").write_text(json.dumps(data_record(data)))
    if figures:
        (outbox.path.parent / "summary.json").write_text(json.dumps({"figures": figures}))


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """(storage, config, data set) of a finished run called first, its patients under telling names."""
    folder, storage = tmp_path_factory.mktemp("images"), tmp_path_factory.mktemp("storage")
    manifest = write_images(folder)
    table = pd.read_csv(manifest)
    table["patient"] = [f"MILLER-{patient}" for patient in table["patient"]]
    table.to_csv(manifest, index=False)
    config = Config(recipe(manifest), run=RunConfig(storage=str(storage)))
    data = load_data(config.recipe)
    write_run(storage, "first", config, data, FIGURES)
    return storage, config, data


@pytest.fixture(scope="module")
def exported(original, tmp_path_factory) -> Path:
    return export("first", str(original[0]), folder=tmp_path_factory.mktemp("export"))


@pytest.fixture
def moved(original, tmp_path) -> Path:
    """The same images in another folder, under other names, in another order; patients renamed."""
    source = Path(original[1].recipe.data.manifest)
    table = pd.read_csv(source).sample(frac=1, random_state=3).reset_index(drop=True)
    folder = tmp_path / "moved"
    folder.mkdir()
    for i, name in enumerate(table["image"]):
        shutil.copy(source.parent / name, folder / f"scan {i}.png")
    table["image"] = [f"scan {i}.png" for i in range(len(table))]
    table["patient"] = [f"other {name[::-1]}" for name in table["patient"]]
    table.to_csv(folder / "manifest.csv", index=False)
    return folder


def begun(exported: Path, folder: Path, storage: Path, **changes):
    """(config, repeat) of the exported run on the images in a folder; changes by dotted name."""
    config = defaults(Config(), ["--from-run", str(exported)])
    run = RunConfig(from_run=str(exported), data_root=str(folder), storage=str(storage))
    config = change(config, {"run": run} | {name.replace("__", "."): value for name, value in changes.items()})
    return begin("train_classifier", config, storage)


# The export


def test_an_export_holds_no_path_and_no_identifier(original, exported):
    text = exported.read_text()

    assert exported.name == "first.raymed.json"
    assert "MILLER" not in text and ".png" not in text
    for folder in (original[0], Path(original[1].recipe.data.manifest).parent):
        assert str(folder) not in text and folder.name not in text
    assert json.loads(text)["config"]["recipe"]["data"]["manifest"] == "manifest.csv"


def test_an_export_is_the_run_itself(original, exported):
    mine, theirs = fetch("first", str(original[0])), fetch(str(exported))

    assert theirs.exported and theirs.paths == ("recipe.data.manifest",)
    assert theirs.data == mine.data == data_record(original[2])
    assert (theirs.job, theirs.figures, theirs.packages) == ("train_classifier", FIGURES, mine.packages)
    assert theirs.packages == ["numpy==2.0", "torch==2.4"]
    assert "run" not in theirs.config and theirs.config["seeds"] == [1, 2, 3]


def test_data_record_has_each_image_with_its_split(original):
    data = original[2]
    table = images(data_record(data))

    assert len(table) == 96 and all(re.fullmatch("[0-9a-f]{16}", content) for content in table["content"])
    for name, indices in data.splits.items():
        assert table.loc[table["split"] == name, "row"].tolist() == data.rows[indices].tolist()
    assert len(set(table["patient"])) == 48


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("not JSON", "is not the file of an exported run"),
        ("[1, 2]", "is not the file of an exported run"),
        ('{"format": 1, "job": "train_classifier"}', "is not the file of an exported run"),
        ('{"format": 2}', "has format 2, written by a newer raymed: this one reads up to 1"),
    ],
)
def test_a_file_that_is_no_export(tmp_path, content, expected):
    (tmp_path / "x.raymed.json").write_text(content)
    with pytest.raises(UserError, match=expected):
        fetch(str(tmp_path / "x.raymed.json"))


def test_unknown_and_unusable_runs(original, tmp_path):
    storage, config, data = original
    with pytest.raises(UserError, match=r"no run 'frist' \(did you mean 'first'\?\)"):
        fetch("frist", str(storage))
    Outbox(tmp_path / "runs" / "bare" / "tracking.jsonl").open("bare-1", "bare")
    with pytest.raises(UserError, match=r"run 'bare' has no data.json, so it cannot be repeated"):
        fetch("bare", str(tmp_path))
    write_run(tmp_path, "going", config, data, None)
    with pytest.raises(UserError, match="run 'going' has not finished"):
        export("going", str(tmp_path))


# The command line's defaults


def test_a_run_gives_the_defaults_of_the_command_line(original):
    storage, config, _ = original
    other = change(config, {"seeds": (9,), "recipe.losses.asl.gamma_neg": 1.5})
    write_run(storage, "other", other, original[2], FIGURES)

    found = defaults(Config(), ["--from-run=other", "--storage", str(storage), "--seeds", "4"])

    assert found == replace(other, run=RunConfig())
    assert defaults(Config(), ["--seeds", "4"]) == Config()


def test_a_run_of_another_job_names_its_file(original):
    storage, config, _ = original
    with pytest.raises(UserError, match="'first' was made by jobs/train_classifier.py.*OtherConfig.*'seeds'"):
        defaults(OtherConfig(), ["--from-run", "first", "--storage", str(storage)])
    run = RunConfig(from_run="first", storage=str(storage))
    with pytest.raises(UserError, match="made by jobs/train_classifier.py: repeat it with that, not jobs/tune_asl.py"):
        begin("tune_asl", replace(config, run=run), storage)


def test_data_root_alone_is_refused(tmp_path):
    with pytest.raises(UserError, match="--data.root"):
        begin("train_classifier", Config(run=RunConfig(data_root="x")), tmp_path)


# The same images elsewhere


def test_moved_renamed_and_reordered_images_are_the_same_data(original, exported, moved, tmp_path):
    config, repeat = begun(exported, moved, tmp_path)
    here, there = load(config.recipe.data, tmp_path / "cache"), original[2]

    assert here.fingerprint == there.fingerprint and here.preprocess == there.preprocess
    assert np.array_equal(here.rows, there.rows) and np.array_equal(here.content, there.content)
    assert all(np.array_equal(here.splits[name], there.splits[name]) for name in there.splits)
    assert repeat and repeat.left_out == [] and repeat.check_data(here) == ["repeats first: 96 images"]
    assert data_differences(data_record(there), data_record(here)) == {}


def test_missing_further_and_relabelled_images_are_named(original, exported, moved, tmp_path):
    record = data_record(original[2])
    row_of, split_of = (dict(zip(record["content"], record[name], strict=True)) for name in ("row", "split"))
    here = images(data_record(load(DataConfig(str(moved / "manifest.csv"), positive="patch"), tmp_path / "cache")))
    row_there = [row_of[content] for content in here["content"]]
    splits = [split_of[content] for content in here["content"]]
    plain = [i for i, label in enumerate(here["label"]) if label == "plain" and splits[i] == "train"]
    relabelled, *lost = plain[:3]
    noise = np.random.default_rng(0).integers(0, 255, (16, 16), dtype=np.uint8)
    Image.fromarray(noise).save(moved / "new.png")
    table = pd.read_csv(moved / "manifest.csv")
    table.loc[relabelled, "label"] = "patch"
    table.loc[len(table)] = {"image": "new.png", "label": "plain", "patient": "new"}
    table.drop(index=lost).to_csv(moved / "manifest.csv", index=False)

    config, repeat = begun(exported, moved, tmp_path)
    data = load(config.recipe.data, tmp_path / "cache")
    found = data_differences(record, data_record(data))

    assert repeat and repeat.left_out == [95]  # the last of 97 rows less two
    assert found == {"missing": sorted(row_there[i] for i in lost), "labels": [row_there[relabelled]]}
    assert data.rows.tolist() == sorted(set(range(1, 97)) - set(found["missing"]))
    lines = "\n".join(repeat.check_data(data))
    assert "missing here: 2 rows" in lines and "another label: 1 row" in lines
    assert "not in the original, left out: 1 row (95) of the manifest here" in lines


def test_other_images_are_refused(exported, tmp_path):
    (tmp_path / "others").mkdir()
    table = pd.read_csv(write_images(tmp_path / "others"))
    for name in table["image"]:
        pixels = np.asarray(Image.open(tmp_path / "others" / name))
        Image.fromarray(255 - pixels).save(tmp_path / "others" / name)
    with pytest.raises(UserError, match="none of the 96 images of run 'first' is among the 96 here"):
        begun(exported, tmp_path / "others", tmp_path)
    with pytest.raises(UserError, match="no manifest .*nowhere/manifest.csv: state the folder.*--data-root DIR"):
        begun(exported, tmp_path / "nowhere", tmp_path)


def test_the_manifest_may_be_stated(exported, moved, tmp_path):
    (moved / "manifest.csv").rename(tmp_path / "list.csv")
    config, _ = begun(exported, moved, tmp_path, recipe__data__manifest=str(tmp_path / "list.csv"))
    assert len(load(config.recipe.data, tmp_path / "cache")) == 96


def test_other_paths_must_be_stated(original, tmp_path):
    storage, config, data = original
    weights = change(config, {"recipe.supcon.encoder_from": "/somewhere/checkpoints/supcon"})
    write_run(storage, "headed", weights, data, FIGURES)
    file = export("headed", str(storage), folder=tmp_path)

    assert "/somewhere" not in file.read_text()
    with pytest.raises(UserError, match=r"say where supcon is \(--supcon.encoder-from\)"):
        begun(file, tmp_path, tmp_path)


def test_an_archive_and_phantoms_are_taken_as_they_are(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {}
    for split, num in (("train", 20), ("val", 8), ("test", 8)):
        arrays[f"{split}_images"] = rng.integers(0, 255, (num, 16, 16), dtype=np.uint8)
        arrays[f"{split}_labels"] = np.arange(num)[:, None] % 2
    for name in "ab":
        (tmp_path / name).mkdir()
        np.savez(tmp_path / name / "set.npz", **arrays)
    config = Config(change(RECIPE, {"data": DataConfig(str(tmp_path / "a" / "set.npz"), positive="1")}))
    write_run(tmp_path, "npz", config, load(config.recipe.data, tmp_path / "cache"), FIGURES)
    file = export("npz", str(tmp_path), folder=tmp_path)

    found, repeat = begun(file, tmp_path / "b", tmp_path)
    assert found.recipe.data.manifest == str(tmp_path / "b" / "set.npz")
    assert repeat and repeat.check_data(load(found.recipe.data, tmp_path / "cache")) == ["repeats npz: 36 images"]
    drawn, _ = begun(file, tmp_path / "b", tmp_path, recipe__data__manifest="phantoms")
    assert drawn.recipe.data.manifest == "phantoms"


# What differs


def table_of(*rows: tuple) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=["row", "content", "label", "split", "patient"])


def test_copies_are_matched_by_label_first():
    theirs = table_of((1, "a", "x", "train", 0), (2, "a", "y", "train", 0), (3, "b", "x", "test", 1))
    ours = table_of(
        (1, "a", "y", "train", 0), (2, "a", "x", "train", 0), (3, "b", "y", "test", 1), (4, "c", "x", "", 2)
    )
    assert sorted(zip(*match(theirs, ours), strict=True)) == [(0, 1), (1, 0), (2, 2)]


def test_each_difference_of_data_is_named(original):
    was = data_record(original[2])
    now = copy.deepcopy(was)
    now["label"][4] = "patch" if now["label"][4] == "plain" else "plain"
    now["split"][7] = "val" if now["split"][7] != "val" else "train"
    now["content"][9] = "0" * 16
    now["positive"] = "plain"
    now["patient"][0] = now["patient"][20]

    assert data_differences(was, now) == {
        "missing": [10],
        "extra": [10],
        "labels": [5],
        "splits": [8],
        "positive": ["patch", "plain"],
        "patients": True,
    }


def test_renamed_patients_and_another_order_are_no_other_data(original):
    was = data_record(original[2])
    order = random.Random(0).sample(range(96), 96)
    now = was | {name: [was[name][i] for i in order] for name in ("content", "label", "split")}
    now["patient"] = [1000 - was["patient"][i] for i in order]
    assert set(data_differences(was, now)) == {"moved"}


def test_what_differs_is_sorted_by_kind(original):
    was = fetch("first", str(original[0]))
    config = copy.deepcopy(was.config)
    config["recipe"]["losses"]["asl"]["gamma_neg"] = 1.0
    config["recipe"]["data"]["manifest"] = config["run"]["name"] = "elsewhere"
    config["compute"]["threads"] = 7
    now = replace(
        was,
        config=config,
        packages=["numpy==2.1", "torch==2.4", "timm==1.0"],
        git={"commit": "def", "dirty": "False"},
        environment={"python": "3.11", "num_cpus": 64},
    )
    gamma = was.config["recipe"]["losses"]["asl"]["gamma_neg"]

    assert differing(was, now) == {
        "config": {"recipe.losses.asl.gamma_neg": [gamma, 1.0]},
        "compute": {"compute.threads": [None, 7]},
        "packages": {"numpy": ["2.0", "2.1"], "timm": [None, "1.0"]},
        "code": {"commit": ["abc", "def"]},
        "machine": {"num_cpus": [2, 64]},
    }
