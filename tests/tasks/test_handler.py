"""One function answers for every kind of bundle, in plain values, and names the row that it cannot answer."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from clip_bundles import PREPROCESS, TEXTS, png, some_images

from raymed.bundle import Bundle
from raymed.config import UserError, to_dict
from raymed.models.encoder import EncoderConfig, build_encoder
from raymed.models.head import LinearHead
from raymed.tasks.classifier import Classifier
from raymed.tasks.handler import load_handler
from raymed.tasks.index import Index, write_index
from raymed.tasks.predictor import Predictor

PROMPTS = {"nodule": ["a nodule", "a round spot"], "clear": ["nothing at all"]}


@pytest.fixture(scope="module")
def index(embedder, tmp_path_factory):
    """Of four images, as a file."""
    path = tmp_path_factory.mktemp("index") / "index.parquet"
    made = Index(embedder.embed_images(some_images(4)), np.arange(10, 14), list("abcd"), [""] * 4, embedder.identity)
    write_index(path, made)
    return path


@pytest.fixture(scope="module")
def handler(bundle, index):
    return load_handler(bundle, index=index)


def files(num: int = 3) -> list[bytes]:
    return [png(image) for image in some_images(num)]


def test_images_texts_and_both(handler, embedder):
    image, text = files(1)[0], TEXTS[-1]
    rows = [{"image": image}, {"text": "a nodule"}, {"image": image, "text": text}, {"image": image, "text": ""}]
    found = handler.handle({"rows": rows})
    assert json.loads(json.dumps(found)) == found, "plain values"
    images, texts = embedder.embed_images(some_images(1)), embedder.embed_texts(["a nodule", text])
    for row, (wanted_image, wanted_text) in zip(found, [(1, None), (None, 0), (1, 1), (1, None)], strict=True):
        for name, wanted in (("image", wanted_image and images[0]), ("text", wanted_text)):
            wanted = texts[wanted] if name == "text" and wanted is not None else wanted
            given = row[f"{name}_embedding"]
            assert (given is None) == (wanted is None)
            np.testing.assert_allclose(given or 0, 0 if wanted is None else wanted, atol=1e-6)
    assert [row["truncated"] for row in found] == [False, False, True, False]
    cosine = float(images[0] @ texts[1])
    assert [row["similarity"] for row in found] == [None, None, pytest.approx(cosine, abs=1e-6), None]
    assert [row["probability"] for row in found] == [None] * 4, "there is no calibration"


def test_how_likely_a_pair_belongs_together(bundle, embedder):
    report = {"scale": 10.0, "bias": -1.0, "temperature": 2.0, "shift": 0.5}
    handler = load_handler(replace(bundle, calibration=report))
    (row,) = handler.handle({"rows": [{"image": files(1)[0], "text": "a nodule"}]})
    assert row["probability"] == pytest.approx(1 / (1 + np.exp(-((10 * row["similarity"] - 1) / 2 + 0.5))))


@pytest.mark.parametrize("prompts", [PROMPTS, json.dumps(PROMPTS)])
def test_classes_by_sentences(prompts, handler, embedder):
    found = handler.handle({"rows": [{"image": file} for file in files()], "task": "zero_shot", "prompts": prompts})
    wanted = embedder.zero_shot(some_images(3), PROMPTS)
    for row, probabilities in zip(found, wanted, strict=True):
        assert row["probabilities"] == pytest.approx(dict(zip(PROMPTS, probabilities, strict=True)), abs=1e-6)
        assert row["decision"] == list(PROMPTS)[int(probabilities.argmax())] and not row["truncated"]
    assert json.loads(json.dumps(found)) == found
    long = {"nodule": "a nodule", "clear": "word " * 200}
    assert handler.handle({"rows": [{"image": files(1)[0]}], "task": "zero_shot", "prompts": long})[0]["truncated"]


def test_what_is_nearest_in_the_index(handler, embedder):
    rows = [{"image": files(2)[1]}, {"text": "a nodule"}]
    found = handler.handle({"rows": rows, "task": "retrieve", "k": 3})
    assert [match["rank"] for match in found[0]["matches"]] == [1, 2, 3]
    first = found[0]["matches"][0]
    assert (first["row"], first["caption"], first["cosine"]) == (11, "b", pytest.approx(1, abs=1e-5))
    text = embedder.embed_images(some_images(4)) @ embedder.embed_texts(["a nodule"])[0]
    assert [match["row"] for match in found[1]["matches"]] == (10 + np.argsort(-text)[:3]).tolist()
    assert len(handler.handle({"rows": rows, "task": "retrieve"})[0]["matches"]) == 4, "of ten asked for"


def test_no_rows_no_answers(handler):
    for task in ("embed", "zero_shot", "retrieve"):
        assert handler.handle({"rows": [], "task": task, "prompts": PROMPTS}) == []


@pytest.mark.parametrize(
    ("request_", "why"),
    [
        ({"rows": [{"text": "a"}, {"text": " ", "image": None}]}, "row 1 has neither an image nor a text"),
        ({"rows": [{"image": "iVBOR"}]}, "row 0: image must be the content of a file, as bytes, got str"),
        ({"rows": [{"text": b"a nodule"}]}, "row 0: text must be text, got bytes"),
        ({"rows": [{"text": "a"}, {"image": b"nonsense"}]}, "image 1: not an image of a known format"),
        ({"rows": [], "task": "emmbed"}, "task must be one of .* .did you mean 'embed'"),
        ({"rows": [], "prompt": {}}, "field of the request must be one of .* .did you mean 'prompts'"),
        ({"rows": [{"text": "a"}], "task": "zero_shot", "prompts": PROMPTS}, "row 0 has no image"),
        ({"rows": [], "task": "zero_shot"}, "prompts must name two classes or more"),
        ({"rows": [], "task": "zero_shot", "prompts": "{nodule"}, "prompts must be JSON"),
        ({"rows": [{"text": "a"}, {}], "task": "retrieve"}, "row 1 must have either an image or a text"),
        ({"rows": [{"text": "a"}], "task": "retrieve", "k": 0}, "k must be >= 1"),
    ],
)
def test_what_cannot_be_answered_is_named(request_, why, handler):
    with pytest.raises(UserError, match=why):
        handler.handle(request_)


def test_a_row_with_image_and_text_is_no_single_query(handler):
    with pytest.raises(UserError, match="row 0 must have either an image or a text"):
        handler.handle({"rows": [{"text": "a", "image": files(1)[0]}], "task": "retrieve"})


def test_retrieval_needs_an_index_of_this_model(bundle, index):
    with pytest.raises(UserError, match="there is no index to search"):
        load_handler(bundle).handle({"rows": [{"text": "a"}], "task": "retrieve"})
    other = replace(bundle, preprocess=bundle.preprocess | {"mean": [0.5]})
    with pytest.raises(UserError, match="made with another model"):
        load_handler(other, index=index)


def test_a_classifier_answers_as_its_predictor():
    torch.manual_seed(0)
    encoder = build_encoder(EncoderConfig(), 1)
    bundle = Bundle(
        kind="classifier",
        weights=dict(Classifier(encoder, LinearHead(encoder.num_features)).state_dict()),
        model={"encoder": to_dict(EncoderConfig())},
        preprocess=to_dict(PREPROCESS),
        classes={"names": ["clear", "nodule"], "positive": "nodule"},
        operating_point={"threshold": 0.5},
    )
    handler = load_handler(bundle)
    found = handler.handle({"rows": [{"image": file} for file in files()]})
    assert found == [prediction.row() for prediction in Predictor.from_bundle(bundle)(some_images(3))]
    with pytest.raises(UserError, match="row 1 has no image"):
        handler.handle({"rows": [{"image": files(1)[0]}, {"image": None}]})
    with pytest.raises(UserError, match="field of the request must be one of 'rows', got 'task'"):
        handler.handle({"rows": [], "task": "embed"})


def test_a_kind_that_nothing_answers_for(bundle):
    with pytest.raises(UserError, match="holds a segmenter: nothing here answers for it"):
        load_handler(replace(bundle, kind="segmenter"))
