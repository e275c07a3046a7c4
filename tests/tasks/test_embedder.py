"""An embedding does not depend on its company, survives the bundle, and is of what was asked."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from clip_bundles import PREPROCESS, TEXTS, clip_bundle, some_images
from scipy.special import softmax

from raymed.bundle import Bundle
from raymed.config import UserError
from raymed.data.captioned import write_captioned
from raymed.data.captions import CaptionConfig, load_captions
from raymed.data.preprocess import Preprocess
from raymed.data.readers import read
from raymed.tasks import embedder as module
from raymed.tasks.clip import ClipRecipe, ClipStage
from raymed.tasks.embedder import Embedder, index_data
from raymed.train.unit import Unit, predictions, train_unit


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Captioned phantoms, and where they lie."""
    folder = tmp_path_factory.mktemp("captioned")
    manifest = write_captioned(folder / "set", num_patients=12, size=32)
    config = CaptionConfig(str(manifest), caption=("caption", "caption_2"), patient="patient", preprocess=PREPROCESS)
    return load_captions(config, folder / "cache"), manifest.parent


def test_images_alone_and_together(embedder, monkeypatch):
    """Of all sizes and depths, in batches of any size, and as the network itself says."""
    images = some_images()
    together = embedder.embed_images(images)
    assert together.shape == (6, embedder.dimension) and together.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, atol=1e-6)
    alone = np.concatenate([embedder.embed_images([image]) for image in images])
    np.testing.assert_allclose(together, alone, atol=1e-6)
    monkeypatch.setattr(module, "_BATCH", 4)
    np.testing.assert_allclose(embedder.embed_images(images), together, atol=1e-6)
    pixels = torch.from_numpy(images[0] / 255)[None, None].float()
    with torch.no_grad():
        (features,) = embedder.clip.encode_image((pixels - 0.4) / 0.2)
    np.testing.assert_allclose(together[0], features / features.norm(), atol=1e-6)
    apart = np.linalg.norm(together[:, None] - together[None], axis=2)[~np.eye(6, dtype=bool)]
    assert apart.min() > 1e-3, "otherwise the comparisons above say nothing"


def test_texts_alone_and_together(embedder, monkeypatch):
    together = embedder.embed_texts(TEXTS)
    assert together.shape == (6, embedder.dimension) and together.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, atol=1e-6)
    alone = np.concatenate([embedder.embed_texts([text]) for text in TEXTS])
    np.testing.assert_allclose(together, alone, atol=1e-6)
    monkeypatch.setattr(module, "_BATCH", 2)
    np.testing.assert_allclose(embedder.embed_texts(TEXTS[::-1]), together[::-1], atol=1e-6)
    apart = np.linalg.norm(together[:, None] - together[None], axis=2)[~np.eye(6, dtype=bool)]
    assert apart.min() > 1e-3


def test_what_is_cut_is_told_and_does_not_count(embedder):
    long = "word " * 200
    assert embedder.truncated(["short", long, "word " * 10]).tolist() == [False, True, False]
    same, other = embedder.embed_texts([long, long + "nodule"]), embedder.embed_texts(["nodule " + long])
    np.testing.assert_allclose(same[0], same[1], atol=1e-6)
    assert np.abs(other - same[0]).max() > 1e-3


def test_nothing_in_nothing_out(embedder):
    d = embedder.dimension
    assert embedder.embed_images([]).shape == embedder.embed_texts([]).shape == (0, d)
    assert embedder.truncated([]).shape == (0,)


def test_a_finished_training_is_used_as_it_was_scored(data, tmp_path):
    """Its bundle, given files and captions, has the embeddings by which its retrieval was measured."""
    captioned, folder = data
    columns = {"caption": ("caption",), "patient": "patient", "split": "split"}
    config = CaptionConfig(str(folder / "manifest.csv"), preprocess=Preprocess(size=32), **columns)
    recipe = ClipRecipe(data=config, stage=ClipStage(steps=3, batch_size=8, evaluations=1))
    unit = Unit(recipe=recipe, seed=3, folder=tmp_path / "unit", key="k", name="n", parent=None, cache=tmp_path)
    train_unit(unit)
    test, embedder = predictions(unit, "test"), Embedder.from_bundle(Bundle.load(unit.folder / "bundle"))
    table = pd.read_csv(folder / "manifest.csv").iloc[test["rows"] - 1]
    images = embedder.embed_images([read(folder / name) for name in table["image"]])
    np.testing.assert_allclose(images, test["image"], atol=1e-6)
    np.testing.assert_allclose(embedder.embed_texts(table["caption"].tolist()), test["text"], atol=1e-6)
    assert np.linalg.norm(images[0] - images[1]) > 1e-3
    assert embedder.temperature == pytest.approx(recipe.loss.temperature)


def test_a_data_set_and_its_files_give_the_same(embedder, data):
    captioned, folder = data
    indices = captioned.splits["train"][:7]
    found = embedder.embed_data(captioned, indices)
    files = sorted(path for path in folder.rglob("*.png"))
    every = embedder.embed_images([read(path) for path in files])
    nearest = np.abs(found[:, None] - every[None]).max(axis=2).min(axis=1)
    np.testing.assert_allclose(nearest, 0, atol=1e-6)
    assert len(np.unique(found.round(5), axis=0)) == 7


def test_classes_by_their_sentences(embedder):
    images = some_images(4)
    prompts = {"nodule": ["a nodule", "a round spot in the lung"], "clear": "nothing at all", "mass": ["a mass"]}
    found = embedder.zero_shot(images, prompts)
    nodule = embedder.embed_texts(prompts["nodule"]).mean(axis=0)
    classes = [nodule / np.linalg.norm(nodule), *embedder.embed_texts(["nothing at all", "a mass"])]
    wanted = softmax(embedder.embed_images(images) @ np.stack(classes).T / 0.1, axis=1)
    np.testing.assert_allclose(found, wanted, atol=1e-6)
    assert found.shape == (4, 3) and np.ptp(found) > 1e-3
    turned = embedder.zero_shot(images, dict(reversed(prompts.items())))
    np.testing.assert_allclose(turned, found[:, ::-1], atol=1e-6)


@pytest.mark.parametrize(
    ("prompts", "why"),
    [
        ({}, "two classes or more"),
        ({"nodule": ["a nodule"]}, "two classes or more"),
        (["nodule", "mass"], "two classes or more"),
        ({"nodule": ["a nodule"], "mass": []}, "class 'mass' needs one sentence"),
        ({"nodule": ["a nodule"], "mass": None}, "class 'mass' needs one sentence"),
        ({"nodule": ["a nodule"], "mass": ["a mass", " "]}, "class 'mass' needs one sentence"),
        ({"nodule": ["a nodule"], "mass": 3}, "class 'mass' needs one sentence"),
    ],
)
def test_prompts_that_name_no_classes(prompts, why, embedder):
    with pytest.raises(UserError, match=why):
        embedder.zero_shot(some_images(1), prompts)


def test_what_is_no_text_or_no_image_is_refused_by_its_place(embedder):
    with pytest.raises(UserError, match="text 1: is empty"):
        embedder.embed_texts(["a nodule", " \n"])
    with pytest.raises(UserError, match="text 0: must be text, got 7"):
        embedder.embed_texts([7])
    with pytest.raises(UserError, match="image 129: all pixels have one value"):
        embedder.embed_images([*some_images(1) * 129, np.zeros((32, 32), np.uint8)])


def test_saved_and_loaded_it_embeds_the_same(bundle, embedder, tmp_path):
    loaded = Embedder.from_bundle(Bundle.load(bundle.save(tmp_path / "bundle")))
    np.testing.assert_array_equal(loaded.embed_images(some_images()), embedder.embed_images(some_images()))
    np.testing.assert_array_equal(loaded.embed_texts(TEXTS), embedder.embed_texts(TEXTS))
    assert loaded.identity == embedder.identity


def test_the_identity_is_of_what_decides_an_embedding(bundle, embedder):
    def identity(**changes):
        return Embedder.from_bundle(replace(bundle, **changes)).identity

    same = identity(intended_use="x", metrics={"test": {"mean_recall": 0.3}}, provenance={})
    assert same == embedder.identity == identity(model=bundle.model | {"temperature": 0.2})
    name = next(name for name, tensor in bundle.weights.items() if tensor.ndim == 2)
    changed = bundle.weights | {name: bundle.weights[name] * (1 + 1e-6)}
    others = [identity(weights=changed), identity(preprocess=bundle.preprocess | {"mean": [0.5]})]
    assert len({same, *others}) == 3


def test_another_kind_of_bundle_is_refused(bundle):
    with pytest.raises(UserError, match="holds a classifier, not a CLIP"):
        Embedder.from_bundle(replace(bundle, kind="classifier"))


def test_how_likely_a_pair_belongs_together(bundle, embedder):
    assert embedder.pair_probability(np.array([0.3])) is None
    report = {"scale": 10.0, "bias": -1.0, "temperature": 2.0, "shift": 0.5}
    found = Embedder.from_bundle(replace(bundle, calibration=report)).pair_probability(np.array([0.3, 0.9]))
    np.testing.assert_allclose(found, 1 / (1 + np.exp(-((10 * np.array([0.3, 0.9]) - 1) / 2 + 0.5))))


def test_an_index_of_images_finds_them_and_says_their_captions(embedder, data):
    captioned, _ = data
    indices = captioned.splits["val"]
    index = index_data(embedder, captioned, indices)
    assert (index.of, index.model, index.run) == ("image", embedder.identity, "train-1/final")
    places, cosines = index.search(embedder.embed_data(captioned, indices), 1)
    np.testing.assert_allclose(cosines, 1, atol=1e-5)
    assert [index.images[p] for p in places[:, 0]] == [f"{captioned.content[i]:016x}" for i in indices]
    assert [index.captions[p] for p in range(len(index))] == [captioned.captions[i][0] for i in indices]
    assert index.rows.tolist() == captioned.rows[indices].tolist()


def test_an_index_of_texts_holds_every_caption(embedder, data):
    captioned, _ = data
    indices = captioned.splits["val"]
    index = index_data(embedder, captioned, indices, of="text")
    assert len(index) == sum(len(captioned.captions[i]) for i in indices) == 2 * len(indices)
    last = captioned.captions[indices[-1]][1]
    ((place,),), _ = index.search(embedder.embed_texts([last]), 1)
    assert index.captions[place] == last and index.of == "text"
    assert index.rows.tolist() == captioned.rows[indices].repeat(2).tolist()


def test_images_of_three_channels():
    preprocess = Preprocess(size=32, channels=3, normalisation="image")
    embedder = Embedder.from_bundle(clip_bundle(preprocess=preprocess))
    assert embedder.embed_images(some_images(3)).shape == (3, embedder.dimension)
