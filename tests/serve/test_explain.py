"""Explanations over HTTP: of a network that looks for what is bright they show what is bright, they judge themselves
rightly, and nobody waits for them longer than for a batch."""

import asyncio
import base64
import io
import itertools
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from bright_bundle import SIZE, bright_bundle
from fastapi.testclient import TestClient
from PIL import Image
from waiting import until

from raymed.config import to_dict
from raymed.data.preprocess import Preprocess
from raymed.explain.attribution import integrated_gradients, mean_image, occlusion, result, smooth
from raymed.models.encoder import EncoderConfig, build_encoder
from raymed.models.head import LinearHead
from raymed.report.gallery import HEAT_MAP_SENTENCE
from raymed.serve.app import create_app
from raymed.serve.config import Hardware
from raymed.serve.engine import Engine
from raymed.serve.explain import Explainer, ExplainFields, blend, has_feature_maps
from raymed.serve.footer import marked
from raymed.serve.handlers import Upload
from raymed.serve.live import Origin, load_live
from raymed.serve.problems import Problem
from raymed.tasks.classifier import Classifier
from raymed.tasks.predictor import Predictor

SQUARE = np.s_[8:24, 40:56]
METHODS = ("gradcam", "ig", "occlusion")


def drawn(square=SQUARE):
    pixels = np.random.default_rng(0).integers(0, 60, (SIZE, SIZE), dtype=np.uint8)
    pixels[square] = 255
    return pixels


def file_of(pixels):
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "PNG")
    return content.getvalue()


@pytest.fixture(scope="module")
def bright():
    return bright_bundle()


@pytest.fixture(scope="module")
def predictor(bright):
    return Predictor.from_bundle(bright)


@pytest.fixture
def ask_for(bright, app_config, tmp_path):
    """ask_for(*files, **fields) -> response of a server of the network."""
    config = app_config(models=(f"bright={bright.save(tmp_path / 'bright')}",))
    with TestClient(create_app(config)) as client:

        def ask(*contents, **fields):
            files = [("file", ("x", content)) for content in contents or [file_of(drawn())]]
            return client.post("/v1/models/bright:predict", data=fields, files=files)

        yield ask


def told(response, place=0):
    assert response.status_code == 200, response.text
    return response.json()["result"]["images"][place]["explanation"]


def picture(text):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text))))


def heat_map(explanation):
    values = np.frombuffer(base64.b64decode(explanation["map"]), np.uint8).reshape(explanation["shape"])
    return values / 255 * explanation["maximum"]


def around(square, margin):
    rows, columns = square
    near = np.zeros((SIZE, SIZE), bool)
    top, left = max(0, rows.start - margin), max(0, columns.start - margin)
    near[top : rows.stop + margin, left : columns.stop + margin] = True
    return near


@pytest.mark.parametrize("method", METHODS)
def test_the_map_lies_on_what_the_network_looks_for(method, ask_for):
    """Grad-CAM's own grid is of 8 pixels, an occluding square of 10."""
    explanation = told(ask_for(explain=method, explain_as="array"))
    values = heat_map(explanation)
    near = around(SQUARE, {"gradcam": 8, "ig": 1, "occlusion": 9}[method])
    assert values.shape == (SIZE, SIZE) and values[near].sum() > 0.99 * values.sum() > 0
    assert np.unravel_index(values.argmax(), values.shape) in [*zip(*np.nonzero(around(SQUARE, 0)), strict=True)]
    assert explanation["method"] == method and explanation["target"] == "bright"
    assert explanation["note"] == HEAT_MAP_SENTENCE and explanation["overlay"] is explanation["deletion"] is None
    assert np.array_equal(picture(explanation["image"]), drawn())


def test_the_overlay_shows_the_image_and_colours_the_square(ask_for):
    explanation = told(ask_for(explain="gradcam"))
    overlay, image = picture(explanation["overlay"]).astype(int), picture(explanation["image"]).astype(int)
    several = overlay.shape[1] // SIZE
    overlay = overlay[: several * SIZE][::several, ::several]
    assert overlay.shape == (SIZE, SIZE, 3) and explanation["map"] is None and explanation["maximum"] == 1
    changed = np.abs(overlay - image[..., None]).sum(axis=2)
    assert changed[around(SQUARE, 8)].sum() > 0.99 * changed.sum()
    assert changed[12:20, 44:52].min() > 50
    assert explanation["shape"] == [SIZE, SIZE]


def footer_of(overlay):
    return overlay[SIZE * (overlay.shape[1] // SIZE) :]


def test_an_overlay_for_research_only_says_so(ask_for):
    """As it leaves the server, and until people release the version."""
    response = ask_for(explain="gradcam")
    answer, overlay = response.json(), picture(told(response)["overlay"])
    plain = np.zeros((SIZE, SIZE, 3), np.uint8)

    def footer(research_only):
        return footer_of(marked(plain, answer["model"], answer["bundle"][:12], "gradcam", research_only))

    assert answer["research_only"] and np.array_equal(footer_of(overlay), footer(True))
    assert len(footer(True)) > len(footer(False)), "a line less"


def test_an_overlay_of_a_released_version_is_not_marked(bright):
    engine = Engine(Hardware(device="cpu", threads=1, max_batch=4), 8)
    try:
        live = load_live("bright", bright, Origin("", "3", "", research_only=False), {}, engine)
        item = live.handler.prepare(Upload(drawn()))
        fields = ExplainFields(explain="gradcam")
        overlay = picture(asyncio.run(live.handler.explainer(item, fields, live)).overlay)
    finally:
        engine.close()
    plain = np.zeros((SIZE, SIZE, 3), np.uint8)
    assert np.array_equal(footer_of(overlay), footer_of(marked(plain, "bright", "3", "gradcam", False)))


@pytest.mark.parametrize("width", [64, 383, 2000])
def test_a_footer_can_be_read_at_every_width(width):
    """Its first line, RESEARCH USE ONLY, is 9 pixels high at least, and a fiftieth of the width, beside a name of any
    length, which is not cut off."""
    for name in ("hsg", "m" * 64):
        found = marked(np.zeros((32, width, 3), np.uint8), name, "0123456789ab", "occlusion", True)
        several = found.shape[1] // width
        rows = (found[32 * several :] > 128).any(axis=(1, 2))
        ends = np.flatnonzero(np.diff(np.r_[False, rows, False].astype(int)))
        assert several * width >= 384 and not (found[32 * several :, -3:] > 128).any()
        assert ends[1] - ends[0] >= max(9, found.shape[1] // 50)


def test_maps_are_those_of_the_library(predictor, ask_for):
    image = predictor.preprocess.normalise(predictor.input_image([drawn()]))[0]

    def logit(images):
        return predictor.network(images)[0]

    for method, wanted in {
        "ig": smooth(result(integrated_gradients(logit, image))),
        "occlusion": result(occlusion(logit, image)),
    }.items():
        explanation = told(ask_for(explain=method, explain_as="array"))
        assert explanation["maximum"] == pytest.approx(wanted.max().item(), rel=1e-4)
        assert heat_map(explanation) == pytest.approx(wanted.relu().numpy(), abs=explanation["maximum"] / 250)


def test_integrated_gradients_add_up_to_the_logit(predictor):
    image = predictor.preprocess.normalise(predictor.input_image([drawn()]))[0]
    with torch.no_grad():
        logit, baseline = predictor.network(torch.stack([image, mean_image(image)]))[0].tolist()
    found = result(integrated_gradients(lambda images: predictor.network(images)[0], image))
    assert logit > 1 and baseline < -4
    assert found.sum().item() == pytest.approx(logit - baseline, rel=0.01)


@pytest.mark.parametrize("method", METHODS)
def test_the_deletion_score_of_a_map_that_knows(method, ask_for):
    response = ask_for(explain=method, deletion="true")
    score = told(response)["deletion"]
    probability = response.json()["result"]["images"][0]["probability"]
    assert score["difference"] == pytest.approx(score["random"] - score["informed"]) and score["difference"] > 0.2
    assert score["taken"] == pytest.approx(np.linspace(0, 1, 15))
    assert score["informed_curve"][0] == score["random_curve"][0] == pytest.approx(probability, abs=1e-6)
    assert score["informed_curve"][3] < 0.05 < score["random_curve"][3]
    assert told(ask_for(explain=method, deletion="true"))["deletion"] == score, "random orders are seeded"


def test_every_image_of_a_case_has_its_own(ask_for):
    other = np.s_[40:56, 8:24]
    response = ask_for(file_of(drawn()), file_of(drawn(other)), explain="occlusion", explain_as="array")
    for place, square in enumerate((SQUARE, other)):
        values = heat_map(told(response, place))
        assert values[around(square, 9)].sum() > 0.99 * values.sum()


def test_nothing_is_explained_unasked(ask_for):
    assert told(ask_for()) is None


def test_an_empty_map_is_empty(ask_for):
    """Of a network that only finds what is bright, where nothing is."""
    dark = np.random.default_rng(0).integers(0, 60, (SIZE, SIZE), dtype=np.uint8)
    explanation = told(ask_for(file_of(dark), explain="occlusion", explain_as="array"))
    assert explanation["maximum"] < 1e-3 and np.isfinite(heat_map(explanation)).all()


@pytest.mark.parametrize(
    ("num", "fields", "field", "why"),
    [
        (1, {"deletion": "true"}, "deletion", "explain is expected"),
        (1, {"explain": "lime"}, "explain", "'gradcam', 'ig' or 'occlusion'"),
        (1, {"explain": "ig", "explain_as": "jpeg"}, "explain_as", "'overlay' or 'array'"),
        (20, {"explain": "occlusion", "deletion": "true"}, "explain", "at most 13 images"),
    ],
)
def test_what_cannot_be_explained_names_its_field(num, fields, field, why, ask_for):
    response = ask_for(*[file_of(drawn())] * num, **fields)
    assert response.status_code == 422 and response.json()["field"] == field and why in response.json()["detail"]


def bundle_of(bright, backbone, size):
    torch.manual_seed(0)
    encoder = build_encoder(EncoderConfig(backbone=backbone), 1)
    weights = dict(Classifier(encoder, LinearHead(encoder.num_features)).state_dict())
    preprocess = to_dict(Preprocess(size=size, normalisation="none"))
    return replace(bright, weights=weights, model={"encoder": {"backbone": backbone}}, preprocess=preprocess)


def test_a_transformer_has_no_gradcam_and_says_what_else(bright, app_config, tmp_path):
    folder = bundle_of(bright, "test_vit", 160).save(tmp_path / "vit")
    with TestClient(create_app(app_config(models=(f"vit={folder}",)))) as client:
        refused = client.post("/v1/models/vit:predict?explain=gradcam", content=file_of(drawn()))
        assert refused.status_code == 422 and refused.json()["field"] == "explain"
        assert "ig or occlusion is expected" in refused.json()["detail"]
        assert client.get("/v1/models/vit").json()["explain"] == ["ig", "occlusion"]
        explained = client.post("/v1/models/vit:predict?explain=ig&explain_as=array", content=file_of(drawn()))
        assert told(explained)["shape"] == [160, 160] and told(explained)["maximum"] > 0


def test_maps_with_their_channels_last_are_none(bright):
    """(B, h, w, K): Grad-CAM would take rows for channels."""
    assert not has_feature_maps(Predictor.from_bundle(bundle_of(bright, "mambaout_femto", 64)))
    assert has_feature_maps(Predictor.from_bundle(bright))


@pytest.fixture
def live(bright):
    engine = Engine(Hardware(device="cpu", threads=1, max_batch=4), 8)
    yield load_live("bright", bright, Origin("", "", ""), {}, engine)
    engine.close()


def test_others_are_answered_in_between(live):
    """An explanation of many batches; whoever asks meanwhile waits for one of them."""
    item = live.handler.prepare(Upload(drawn()))
    order = []

    async def ask():
        explaining = asyncio.create_task(
            live.handler.explainer(item, ExplainFields(explain="occlusion", deletion=True), live)
        )
        explaining.add_done_callback(lambda _: order.append("explained"))
        for _ in range(5):
            await live("image", item)
            order.append("answered")
        await explaining

    asyncio.run(ask())
    assert order == ["answered"] * 5 + ["explained"]


def test_an_explanation_that_nobody_waits_for_ends(live, monkeypatch):
    item = live.handler.prepare(Upload(drawn()))
    seen = itertools.count()
    forward = live.handler.predictor.network.encoder.forward
    monkeypatch.setattr(
        live.handler.predictor.network.encoder, "forward", lambda images: [next(seen), forward(images)][1]
    )

    async def ask():
        explaining = asyncio.create_task(live.handler.explainer(item, ExplainFields(explain="occlusion"), live))
        while next(seen) < 2:
            await asyncio.sleep(0)
        explaining.cancel()
        await asyncio.gather(explaining, return_exceptions=True)
        await live("image", item)
        before = next(seen)
        await live("image", item)
        return next(seen) - before

    assert asyncio.run(ask()) <= 2 and live.engine.waiting["bright"] == 0


def test_a_device_without_memory_is_busy(live, monkeypatch):
    def full(images):
        raise torch.OutOfMemoryError

    item = live.handler.prepare(Upload(drawn()))
    monkeypatch.setattr(live.handler.predictor.network.encoder, "forward", full)
    with pytest.raises(Problem, match="no memory") as refused:
        asyncio.run(live.handler.explainer(item, ExplainFields(explain="ig"), live))
    assert (refused.value.status, refused.value.field) == (503, "explain")


def test_a_case_is_bounded_by_what_its_explanation_costs(predictor):
    explainer = Explainer(predictor)
    explainer.check(ExplainFields(explain="gradcam"), 2000)
    explainer.check(ExplainFields(explain="occlusion"), 24)
    with pytest.raises(Problem, match="at most 24 images"):
        explainer.check(ExplainFields(explain="occlusion"), 25)


def endless(self, method, image):
    """A map that costs the device more than anybody waits for."""
    while True:
        time.sleep(0.01)
        yield


@pytest.fixture
def hasty(bright, app_config, tmp_path):
    """Of a server that gives a request a second."""
    models = (f"bright={bright.save(tmp_path / 'bright')}",)
    with TestClient(create_app(app_config(models=models, **{"limits.timeout_s": 1.0}))) as client:
        yield client


def test_an_explanation_that_takes_too_long_is_not_told_to_come_again(hasty, monkeypatch):
    """Nor is it of the Open Inference Protocol."""
    monkeypatch.setattr(Explainer, "_heat_map", endless)
    refused = hasty.post("/v1/models/bright:predict?explain=ig", content=file_of(drawn()))
    assert refused.status_code == 422 and refused.json()["field"] == "explain"
    assert "Retry-After" not in refused.headers
    assert all(way in refused.json()["detail"] for way in ("fewer images", "another method", "--limits.timeout-s"))
    image = {"name": "image", "datatype": "BYTES", "shape": [1], "data": [base64.b64encode(file_of(drawn())).decode()]}
    asked = {"inputs": [image], "parameters": {"explain": "ig"}}
    by_tensors = hasty.post("/v2/models/bright/infer", json=asked)
    assert by_tensors.status_code == 422 and by_tensors.json()["error"] == refused.json()["detail"]
    assert hasty.post("/v1/models/bright:predict", content=file_of(drawn())).status_code == 200


def test_an_explanation_that_others_keep_from_the_device_is_told_to_come_again(hasty, monkeypatch):
    """Its own work had no time yet."""
    free = threading.Event()
    engine = hasty.app.state.service.engine

    def behind_others(self, method, image):
        holding = engine._thread.submit(free.wait)
        yield
        yield
        holding.result()

    monkeypatch.setattr(Explainer, "_heat_map", behind_others)
    try:
        busy = hasty.post("/v1/models/bright:predict?explain=ig", content=file_of(drawn()))
    finally:
        free.set()
    assert busy.status_code == 503 and busy.headers["Retry-After"] == "2"


def test_an_explanation_whose_case_waited_for_the_device_is_told_to_come_again(hasty, monkeypatch):
    """Others had the device before its networks answered."""
    engine = hasty.app.state.service.engine

    def others():
        until(lambda: engine.waiting.get("bright"))
        time.sleep(0.6)

    monkeypatch.setattr(Explainer, "_heat_map", endless)
    engine._thread.submit(others)
    busy = hasty.post("/v1/models/bright:predict?explain=ig", content=file_of(drawn()))
    assert busy.status_code == 503 and busy.headers["Retry-After"] == "2"


def test_an_explanation_of_a_case_that_itself_takes_long_is_not_told_to_come_again(hasty, monkeypatch):
    """Its files are decoded and its networks answer for most of the time, with nobody else there."""
    handler = hasty.app.state.service.models.get("bright").handler
    encoder, prepare = handler.predictor.network.encoder, handler.prepare
    forward = encoder.forward
    monkeypatch.setattr(handler, "prepare", lambda upload: [time.sleep(0.3), prepare(upload)][1])
    monkeypatch.setattr(encoder, "forward", lambda images: [time.sleep(0.15 * len(images)), forward(images)][1])
    monkeypatch.setattr(Explainer, "_heat_map", endless)
    files = [("file", ("x", file_of(drawn())))] * 2
    refused = hasty.post("/v1/models/bright:predict?explain=ig", files=files)
    assert refused.status_code == 422 and refused.json()["field"] == "explain"


def test_blend_of_colour_and_of_sixteen_bits():
    values = np.zeros((4, 5), np.float32)
    colour = np.random.default_rng(0).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    assert np.array_equal(blend(colour, values), colour)
    deep = np.full((4, 5), 65535, np.uint16)
    assert np.array_equal(blend(deep, values), np.full((4, 5, 3), 255))
    assert blend(deep, values + 1)[0, 0].tolist() == [253, 255, 196], "0.35 of white, 0.65 of the highest colour"
