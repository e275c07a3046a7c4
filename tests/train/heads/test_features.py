"""Features of a frozen encoder: computed once, equal to what the loop computes, refused for patients it has seen."""

import dataclasses

import numpy as np
import pytest
import torch
from small import make_unit, recipe

from raymed.config import UserError
from raymed.data.folds import CrossValidation, RepeatedFold
from raymed.train.heads.features import encoder_features, refuse_seen, trained_on
from raymed.train.unit import UnitRun, train_unit, unit_data


@pytest.fixture(scope="module")
def encoder(manifest, tmp_path_factory):
    """A finished encoder unit."""
    unit = make_unit(recipe(manifest), tmp_path_factory.mktemp("encoder") / "seed-3", part="encoder")
    train_unit(unit)
    return unit


def head_unit(manifest, encoder, folder, **more):
    source = str(encoder.folder / "checkpoints" / "supcon")
    unit = make_unit(recipe(manifest, supcon__encoder_from=source), folder, **more)
    return dataclasses.replace(unit, cache=folder / "cache")


def features(unit):
    data = unit_data(unit)
    return encoder_features(unit.recipe.phases(data)[0], data, unit.seed, unit.compute, unit.cache)


def test_an_encoder_knows_which_images_it_was_trained_on(encoder, data):
    seen = trained_on(encoder.encoder_checkpoint)
    assert np.array_equal(seen, np.sort(data.content[data.splits["train"]]))


def test_features_are_those_the_loop_computes(manifest, encoder, data, tmp_path):
    unit = head_unit(manifest, encoder, tmp_path)
    run = UnitRun(unit)
    run.fit.frozen = None
    list(run.evaluations())
    _, feed = run.fit.best()
    assert np.array_equal(features(unit), feed.cached["encoder"].numpy())
    assert features(unit).shape == (len(data), feed.cached["encoder"].shape[1])


def test_they_are_computed_once_and_shared_by_heads(manifest, encoder, tmp_path):
    unit = head_unit(manifest, encoder, tmp_path)
    first = train_unit(unit)
    (file,) = unit.cache.glob("features-*.npy")
    written = file.stat().st_mtime_ns
    second = train_unit(dataclasses.replace(unit, folder=tmp_path / "again"))
    assert file.stat().st_mtime_ns == written and len(list(unit.cache.glob("features-*.npy"))) == 1
    assert second["val"] == pytest.approx(first["val"], nan_ok=True)


def test_the_key_tells_encoders_and_training_sets_apart(manifest, encoder, tmp_path):
    unit = head_unit(manifest, encoder, tmp_path)
    features(unit)
    np.save(tmp_path / "other.npy", np.arange(3, dtype=np.uint64))
    other = tmp_path / "encoder"
    (other / "checkpoints").mkdir(parents=True)
    checkpoint = encoder.encoder_checkpoint
    (other / "checkpoints" / "supcon").symlink_to(checkpoint)
    (tmp_path / "other.npy").rename(other / "trained_on.npy")
    copied = dataclasses.replace(unit, recipe=recipe(manifest, supcon__encoder_from=str(other / "checkpoints/supcon")))
    assert np.array_equal(features(copied), features(unit))
    assert len(list(unit.cache.glob("features-*.npy"))) == 2


def test_a_head_is_refused_on_patients_that_its_encoder_was_trained_on(manifest, encoder, data, tmp_path):
    unit = head_unit(manifest, encoder, tmp_path, fold=RepeatedFold(CrossValidation(3), 0, 0))
    with pytest.raises(UserError, match=r"was trained on patients of the val split \(.*scores there would be too good"):
        train_unit(unit)
    assert not (unit.folder / "result.json").exists() and not list(unit.cache.glob("features-*.npy"))
    refuse_seen(data, str(encoder.encoder_checkpoint))  # its own split


def test_one_seen_image_makes_its_patient_seen(encoder, data):
    """The other image of a training patient is refused too, though the encoder never saw it."""
    train, val, test = (data.splits[name] for name in ("train", "val", "test"))
    twin = next(i for i in train if (data.patients[train] == data.patients[i]).sum() > 1)
    moved = data.with_splits(
        {"train": train[data.patients[train] != data.patients[twin]], "val": np.sort([*val, twin]), "test": test}
    )
    with pytest.raises(UserError, match=f"row {data.rows[twin]}|rows? .*{data.rows[twin]}"):
        refuse_seen(moved, str(encoder.encoder_checkpoint))


def test_the_map_cannot_change_the_file(manifest, encoder, tmp_path):
    unit = head_unit(manifest, encoder, tmp_path)
    before = np.array(features(unit))
    torch.from_numpy(features(unit)).zero_()
    assert np.array_equal(features(unit), before)
