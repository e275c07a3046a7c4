"""A CLIP's answers: those of its embedder, whoever else asks; zero-shot, retrieval; errors that name their field."""

import asyncio
import json

import numpy as np
import pytest
from clip_bundles import TEXTS, clip_bundle, png, some_images
from fastapi.testclient import TestClient
from tiny_biomedclip import write_tiny_biomedclip

from raymed.bundle import Bundle
from raymed.config import UserError, replace
from raymed.data.preprocess import Preprocess
from raymed.models.clip import ClipConfig
from raymed.serve.app import create_app
from raymed.serve.config import Hardware
from raymed.serve.engine import Engine
from raymed.serve.handlers import Prepared, Upload
from raymed.serve.handlers.clip import Handler
from raymed.serve.live import Origin, load_live
from raymed.tasks.embedder import Embedder
from raymed.tasks.golden import with_golden
from raymed.tasks.index import Index, write_index

IMAGES = some_images(6)
PROMPTS = {"nodule": ["a small nodule", "a nodule in the lung"], "clear": "no finding", "mass": ["a large mass"]}
CALIBRATION = {"scale": 10.0, "bias": -3.0, "temperature": 1.5, "shift": 0.2}


@pytest.fixture(scope="module")
def clip() -> Bundle:
    return with_golden(replace(clip_bundle(), {"calibration": CALIBRATION}))


@pytest.fixture(scope="module")
def embedder(clip):
    return Embedder.from_bundle(clip)


@pytest.fixture(scope="module")
def index(embedder, tmp_path_factory):
    """Of the six images, whose captions say which they are."""
    place = tmp_path_factory.mktemp("index") / "index.parquet"
    names = [f"image {i}" for i in range(6)]
    embeddings = embedder.embed_images(IMAGES)
    write_index(place, Index(embeddings, np.arange(1, 7), names, [f"{i:016x}" for i in range(6)], embedder.identity))
    return place


@pytest.fixture(scope="module")
def folder(clip, tmp_path_factory):
    return clip.save(tmp_path_factory.mktemp("clip") / "bundle")


@pytest.fixture
def server(folder, index, app_config):
    """With an index, and limits that a request of many texts exceeds in one go."""
    config = app_config(models=(f"cxr={folder},index={index}", f"plain={folder}"), **{"limits.queue": 32})
    with TestClient(create_app(config)) as client:
        yield client


def asked(client, *places, name="cxr", **fields):
    """Files by the images' places; without any, JSON."""
    if not places:
        return client.post(f"/v1/models/{name}:predict", json=fields)
    files = [("file", ("x.png", png(IMAGES[place]))) for place in places]
    data = {field: json.dumps(value) if isinstance(value, dict) else value for field, value in fields.items()}
    return client.post(f"/v1/models/{name}:predict", files=files, data=data)


def result(response):
    assert response.status_code == 200, response.text
    return response.json()["result"]


def test_embeddings_of_images_and_texts(server, embedder):
    found = result(asked(server, 0, 1, 2, task="embed", texts=TEXTS))
    images, texts = embedder.embed_images(IMAGES[:3]), embedder.embed_texts(TEXTS)
    assert found["kind"] == "clip" and [image["file"] for image in found["images"]] == [0, 1, 2]
    assert np.array([image["embedding"] for image in found["images"]]) == pytest.approx(images, abs=1e-6)
    assert np.array([text["embedding"] for text in found["texts"]]) == pytest.approx(texts, abs=1e-6)
    cosines = np.array([image["similarity"] for image in found["images"]])
    assert cosines == pytest.approx(images @ texts.T, abs=1e-6)
    probabilities = np.array([image["pair_probability"] for image in found["images"]])
    assert probabilities == pytest.approx(embedder.pair_probability(images @ texts.T), abs=1e-6)
    assert [text["truncated"] for text in found["texts"]] == embedder.truncated(TEXTS).tolist() == [False] * 5 + [True]


def test_texts_need_no_file_and_one_may_stand_alone(server, embedder):
    found = result(asked(server, texts="x-ray"))
    assert found["images"] == [] and found["task"] == "embed"
    assert found["texts"][0]["embedding"] == pytest.approx(embedder.embed_texts(["x-ray"])[0].tolist(), abs=1e-6)
    assert result(asked(server, 0, texts="x-ray"))["images"][0]["similarity"] is not None


def test_a_plain_form_says_what_json_does(server):
    """What httpx and curl -d send where there are no files."""
    for fields in ({"task": "embed", "texts": ["x-ray, 50% & more", "정상 자궁"]}, {"texts": "x-ray"}):
        answer = server.post("/v1/models/cxr:predict", data=fields)
        assert answer.request.headers["Content-Type"] == "application/x-www-form-urlencoded"
        assert result(answer) == result(asked(server, **fields))


def test_images_need_no_text(server):
    found = result(asked(server, 3))
    assert len(found["images"][0]["embedding"]) == 128 and found["images"][0]["similarity"] is None


def test_more_texts_than_may_wait(server, embedder):
    texts = [f"{i} {'nodules ' * (i % 60)}" for i in range(200)]
    found = np.array([text["embedding"] for text in result(asked(server, texts=texts))["texts"]])
    assert found == pytest.approx(embedder.embed_texts(texts), abs=1e-6)


def test_zero_shot(server, embedder):
    response = asked(server, 0, 1, task="zero_shot", prompts=PROMPTS)
    found, wanted = result(response), embedder.zero_shot(IMAGES[:2], PROMPTS)
    for image, row in zip(found["images"], wanted, strict=True):
        assert list(image["probabilities"]) == list(PROMPTS)
        assert list(image["probabilities"].values()) == pytest.approx(row.tolist(), abs=1e-6)
        assert image["label"] == list(PROMPTS)[row.argmax()] and image["embedding"] is None
    assert list(found["probabilities"].values()) == pytest.approx(wanted.mean(axis=0).tolist(), abs=1e-6)
    assert found["label"] == list(PROMPTS)[wanted.mean(axis=0).argmax()] and not found["truncated"]
    assert response.json()["decision"] is None and "no threshold" in response.json()["reasons"][0]


def test_a_long_prompt_is_told_of(server):
    long = {"a": ["word " * 200], "b": "no finding"}
    assert [result(asked(server, 0, task="zero_shot", prompts=long))["truncated"] for _ in range(2)] == [True, True]


def test_prompts_are_embedded_once(clip):
    engine = Engine(Hardware(device="cpu", threads=1, max_batch=4), 40)
    live = load_live("cxr", clip, Origin("", "", ""), {}, engine)
    asked_for = []

    class Counted:
        alone = live.alone
        at_once = live.at_once

        async def __call__(self, network, item):
            asked_for.append(network)
            return await live(network, item)

    def zero_shot(prompts):
        asked_for.clear()
        upload = Upload(IMAGES[0])
        images = [Prepared(upload, live.handler.prepare(upload))]
        fields = live.handler.Fields(task="zero_shot", prompts=prompts)
        found = asyncio.run(live.handler.answer(images, fields, Counted()))
        return list(found.probabilities.values()), asked_for.count("text")

    first, asked_first = zero_shot(PROMPTS)
    again, asked_again = zero_shot({name: PROMPTS[name] for name in reversed(PROMPTS)})
    _, with_another = zero_shot(PROMPTS | {"mass": ["a large mass", "a mass"]})
    engine.close()
    assert (asked_first, asked_again, with_another) == (4, 0, 1)
    assert first == pytest.approx(again[::-1], abs=1e-9)


def test_the_oldest_prompts_are_forgotten(clip, monkeypatch):
    monkeypatch.setattr("raymed.serve.handlers.clip._KEPT", 3)
    handler = Handler(clip, "cpu", {})

    async def ask(network, item):
        return handler.networks[network](item[None])[0]

    ask.at_once = 32
    for texts in (["a", "b"], ["c"], ["a"], ["d"]):
        found, _ = asyncio.run(handler._sentences(texts, ask))
        assert found.shape == (len(texts), 128)
    assert list(handler._kept) == ["c", "a", "d"]
    many, _ = asyncio.run(handler._sentences(list("vwxyz"), ask))
    assert many.shape == (5, 128) and len(handler._kept) == 3, "more than are kept are answered all the same"


def test_prompts_that_others_push_out_meanwhile_are_answered(clip, monkeypatch):
    """Of two requests that take turns each has its own sentences, whatever is kept by then."""
    monkeypatch.setattr("raymed.serve.handlers.clip._KEPT", 2)
    handler = Handler(clip, "cpu", {})
    wanted = handler.embedder.embed_texts(["a", "b", "c"])

    async def race():
        go, waits = asyncio.Event(), asyncio.Event()

        async def ask(network, item):
            return handler.networks[network](item[None])[0]

        async def held(network, item):
            waits.set()
            await go.wait()
            return await ask(network, item)

        ask.at_once = held.at_once = 32
        await handler._sentences(["a", "b"], ask)
        slow = asyncio.create_task(handler._sentences(["a", "b", "c"], held))
        await waits.wait()
        await handler._sentences(["x", "y"], ask)
        assert list(handler._kept) == ["x", "y"]
        go.set()
        return await slow

    found, _ = asyncio.run(race())
    assert found == pytest.approx(wanted, abs=1e-6) and len(handler._kept) == 2


def test_retrieval(server, embedder):
    found = result(asked(server, 4, task="retrieve", texts=["a nodule", "a mass"], k=3))
    (image,), texts = found["images"], found["texts"]
    assert [match["rank"] for match in image["matches"]] == [1, 2, 3] and image["matches"][0]["caption"] == "image 4"
    assert image["matches"][0]["row"] == 5 and image["matches"][0]["cosine"] == pytest.approx(1, abs=1e-5)
    cosines = embedder.embed_texts(["a nodule", "a mass"]) @ embedder.embed_images(IMAGES).T
    for text, row in zip(texts, cosines, strict=True):
        assert [match["row"] - 1 for match in text["matches"]] == np.argsort(-row)[:3].tolist()
        assert [match["cosine"] for match in text["matches"]] == pytest.approx(
            np.sort(row)[::-1][:3].tolist(), abs=1e-6
        )
        assert text["embedding"] is None
    assert len(result(asked(server, texts="a nodule", task="retrieve"))["texts"][0]["matches"]) == 6, "of ten"


@pytest.mark.parametrize(
    ("places", "fields", "field", "why"),
    [
        ((), {}, "texts", "embed needs a file or a text"),
        ((), {"task": "zero_shot", "prompts": PROMPTS}, "files", "zero_shot needs an image"),
        ((0,), {"task": "zero_shot"}, "prompts", "zero_shot needs"),
        ((0,), {"task": "zero_shot", "prompts": PROMPTS, "texts": "a"}, "texts", "from prompts"),
        ((0,), {"task": "zero_shot", "prompts": {"one": "a"}}, "prompts", "2 to 64 classes"),
        ((0,), {"task": "zero_shot", "prompts": "{nodule"}, "prompts", "2 to 64 classes"),
        ((0,), {"task": "zero_shot", "prompts": {"a": "b", "c": []}}, "prompts", "a list of sentences"),
        ((0,), {"task": "zero_shot", "prompts": {"a": "b", "c": [" "]}}, "prompts", "1 to 8192 characters"),
        ((0,), {"task": "zero_shot", "prompts": {"a": "b", "c": ["d"] * 256}}, "prompts", "at most 256 sentences"),
        ((0,), {"task": "zero_shot", "prompts": {"a": "b", "c" * 129: "d"}}, "prompts", "1 to 128 characters"),
        ((0,), {"prompts": PROMPTS}, "prompts", "only zero_shot"),
        ((0,), {"task": "emmbed"}, "task", "'embed', 'zero_shot' or 'retrieve'"),
        ((), {"texts": ["a", 3]}, "texts.1", "1 to 8192 characters"),
        ((), {"texts": ["a"] * 257}, "texts", "at most 256"),
        ((), {"texts": ["a" * 8193]}, "texts.0", "1 to 8192 characters"),
        ((), {"texts": "a", "task": "retrieve", "k": 0}, "k", "greater than or equal to 1"),
        ((), {"texts": "a", "explain": "gradcam"}, "explain", "there is no such field"),
    ],
)
def test_what_cannot_be_answered_names_its_field(places, fields, field, why, server):
    response = asked(server, *places, **fields)
    assert response.status_code == 422 and response.json()["field"] == field and why in response.json()["detail"]


def test_so_many_matches_and_no_more(server):
    """20,000 in all: k of every image and text together."""
    texts = [f"nodule {number}" for number in range(20)]
    answered = asked(server, texts=texts, task="retrieve", k=1000)
    assert len(result(answered)["texts"]) == 20
    for refused in (
        asked(server, texts=[*texts, "another"], task="retrieve", k=1000),
        asked(server, 0, 1, texts=texts[:19], task="retrieve", k=1000),
        asked(server, texts=texts * 10, task="retrieve", k=101),
    ):
        assert refused.status_code == 422 and refused.json()["field"] == "k"
        assert "at most 20000 matches" in refused.json()["detail"]
    assert asked(server, texts=texts * 10, task="retrieve", k=100).status_code == 200
    assert asked(server, texts=texts * 10, k=1000).status_code == 200, "embeddings have no matches"


def test_nothing_that_was_sent_comes_back(server):
    secret = {"Kim 19500101": [], "b": "c"}
    for response in (
        asked(server, 0, task="zero_shot", prompts=secret),
        asked(server, texts=["Kim 19500101", ""]),
        asked(server, texts="a", task="Kim 19500101"),
    ):
        assert response.status_code == 422 and "Kim" not in response.text


def test_without_an_index_nothing_is_retrieved(server):
    response = asked(server, name="plain", task="retrieve", texts="a")
    assert response.status_code == 422 and response.json()["field"] == "task" and "index" in response.json()["detail"]
    assert server.get("/v1/models/plain").json()["tasks"] == ["embed", "zero_shot"]


def test_what_it_says_of_itself(server):
    about = server.get("/v1/models/cxr").json()
    assert about["kind"] == "clip" and about["tasks"] == ["embed", "zero_shot", "retrieve"] and about["calibrated"]
    assert about["index"] == {"of": "image", "entries": 6} and about["dimension"] == 128
    assert about["temperature"] == 0.1 and about["context_length"] == 77


def test_options_are_checked(clip, index, bundle):
    other = replace(clip, {"preprocess": clip.preprocess | {"mean": [0.5]}})
    with pytest.raises(UserError, match="made with another model"):
        Handler(other, "cpu", {"index": str(index)})
    with pytest.raises(UserError, match="option of a CLIP"):
        Handler(clip, "cpu", {"indx": "x"})
    with pytest.raises(UserError, match="not a CLIP"):
        Handler(bundle, "cpu", {})


@pytest.mark.parametrize("tower", ["causal", "bert"])
def test_company_and_padding_make_no_difference(tower, clip, tmp_path):
    """Texts of all lengths, and images, from many requests at once, for both kinds of text towers."""
    if tower == "bert":
        config = ClipConfig(f"local-dir:{write_tiny_biomedclip(tmp_path / 'tiny')}")
        clip = clip_bundle(config, Preprocess(size=160, channels=3, mean=(0.5,) * 3, std=(0.25,) * 3))
    engine = Engine(Hardware(device="cpu", threads=1, max_batch=8), 1000)
    live = load_live("cxr", clip, Origin("", "", ""), {}, engine)
    embedder = live.handler.embedder
    texts = [" ".join(["nodule", "left", "lung"][: 1 + i % 3] * (1 + i)) for i in range(40)]
    uploads = [Upload(image) for image in IMAGES]
    images = [Prepared(upload, live.handler.prepare(upload)) for upload in uploads]

    async def ask():
        fields = [live.handler.Fields(texts=[text]) for text in texts]
        of_texts = [live.handler.answer([], each, live) for each in fields]
        of_images = [live.handler.answer([image], live.handler.Fields(), live) for image in images]
        return await asyncio.gather(*of_texts, *of_images)

    found = asyncio.run(ask())
    engine.close()
    by_text = np.array([answer.texts[0].embedding for answer in found[:40]])
    by_image = np.array([answer.images[0].embedding for answer in found[40:]])
    assert by_text == pytest.approx(np.concatenate([embedder.embed_texts([text]) for text in texts]), abs=1e-6)
    assert by_image == pytest.approx(np.concatenate([embedder.embed_images([image]) for image in IMAGES]), abs=1e-6)


def test_a_damaged_copy_is_not_served(clip, app_config, tmp_path):
    """The golden cosines are of other weights."""
    name = next(name for name in clip.weights if name.startswith("visual"))
    damaged = replace(clip, {"weights": clip.weights | {name: clip.weights[name] + 0.5}})
    folder = damaged.save(tmp_path / "damaged")
    with TestClient(create_app(app_config(models=(f"cxr={folder}",)))) as client:
        assert client.post("/v1/models/cxr:predict", json={"texts": "a"}).status_code == 503
