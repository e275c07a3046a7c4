"""A classifier's answers: those of its predictor, whoever else asks; when it abstains; cases larger than the queue."""

import asyncio
import io
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from fastapi.testclient import TestClient
from hostile import picture
from PIL import Image

from raymed.config import UserError
from raymed.serve.access.tokens import add_token
from raymed.serve.app import create_app
from raymed.serve.config import Access, Hardware
from raymed.serve.engine import Engine, Lane
from raymed.serve.handlers import Prepared, Upload, ask_all
from raymed.serve.handlers.classifier import Handler
from raymed.serve.live import Live, Origin, load_live
from raymed.serve.problems import Problem
from raymed.tasks.predictor import Predictor


@pytest.fixture(scope="module")
def predictor(bundle):
    return Predictor.from_bundle(bundle)


@pytest.fixture
def live(bundle):
    engine = Engine(Hardware(device="cpu", threads=1, max_batch=4), 40)
    yield load_live("hsg", bundle, Origin("", "", ""), {}, engine)
    engine.close()


def prepared(handler, images):
    uploads = [Upload(pixels, file=place) for place, pixels in enumerate(images)]
    return [Prepared(upload, handler.prepare(upload)) for upload in uploads]


def answered(live, images):
    return asyncio.run(live.handler.answer(prepared(live.handler, images), live.handler.Fields(), live))


def test_answers_are_the_predictors(live, predictor, images):
    found = answered(live, images[:10])
    wanted = predictor(images[:10])
    case = predictor.case(wanted)
    assert found.probability == pytest.approx(case.probability, abs=1e-6)
    assert (found.label, found.threshold, found.uncertain_band) == (case.decision, predictor.threshold, predictor.band)
    assert [image.file for image in found.images] == list(range(10))
    for image, prediction in zip(found.images, wanted, strict=True):
        assert image.probability == pytest.approx(prediction.probability, abs=1e-6)
        assert (image.label, image.uncertain) == (prediction.decision, prediction.uncertain)
        assert image.foreign == prediction.ood["foreign"]
        assert image.distances["knn"] == pytest.approx(prediction.ood["knn"], rel=1e-4, abs=1e-5)
        assert set(image.distances) == {"mahalanobis", "knn"} and image.explanation is None


def test_what_is_served_has_no_normalisation_left_to_compute(live, predictor):
    def norms(network):
        return sum(isinstance(module, torch.nn.BatchNorm2d) for module in network.modules())

    assert norms(predictor.network.encoder) > 0 == norms(live.handler.predictor.network.encoder)


def test_company_makes_no_difference(live, images):
    handler = live.handler
    cases = [prepared(handler, [pixels]) for pixels in images[:16]]

    async def together():
        return await asyncio.gather(*(handler.answer(case, handler.Fields(), live) for case in cases))

    for pixels, found in zip(images, asyncio.run(together()), strict=False):
        assert found.probability == pytest.approx(answered(live, [pixels]).probability, abs=1e-6)


def test_a_case_may_be_larger_than_the_queue(live, images):
    """Forty may wait here; the case has 96 images."""
    assert len(answered(live, images[:96]).images) == 96


@pytest.mark.parametrize("queue", [1, 3, 16])
def test_the_shortest_queue_answers_a_case_and_that_of_a_token(queue, app_config, images, tmp_path):
    tokens = tmp_path / "tokens.json"
    headers = {"Authorization": f"Bearer {add_token(tokens, 'pacs', 1)}"}
    access = Access(tokens=str(tokens), hosts=("testserver",))
    with TestClient(create_app(app_config(**{"limits.queue": queue, "access": access}))) as client:
        files = [("file", ("x", picture(pixels, "PNG"))) for pixels in images[:20]]
        answer = client.post("/v1/models/hsg:predict", files=files, headers=headers)
    assert answer.status_code == 200 and len(answer.json()["result"]["images"]) == 20


def test_a_case_that_is_refused_waits_no_more_and_is_not_computed():
    """The queue of eight has room for two of its four images."""
    engine, computed, go, begun = Engine(Hardware(device="cpu", threads=1), 8), [], threading.Event(), threading.Event()

    def network(batch):
        begun.set()
        go.wait(10)
        computed.extend(int(value) for value in batch)
        return list(batch)

    async def ask():
        live = Live("m", Origin("", "", ""), None, {"image": Lane("m", network)}, engine)  # type: ignore[arg-type]
        others = [asyncio.create_task(live("image", torch.tensor([place]))) for place in range(6)]
        await asyncio.to_thread(begun.wait, 10)
        with pytest.raises(Problem, match="8 images wait for m already") as refused:
            await ask_all(live, "image", [torch.tensor([place]) for place in range(10, 20)])
        await asyncio.sleep(0)  # the loop's next turn, in which the others hear of it
        waiting = dict(engine.waiting)
        go.set()
        await asyncio.gather(*others)
        return refused.value.status, waiting

    assert asyncio.run(ask()) == (503, {"m": 6})
    assert computed == list(range(6))
    engine.close()


def test_results_keep_the_order_of_the_items():
    waiting, most = set(), []

    class Asked:
        at_once = 32

        async def __call__(self, network, item):
            waiting.add(item)
            most.append(len(waiting))
            await asyncio.sleep(0.001 * (7 - item % 7))
            waiting.discard(item)
            return network, item

    items = list(range(100))
    assert asyncio.run(ask_all(Asked(), "image", items)) == [("image", item) for item in items]
    assert max(most) == 32


@pytest.mark.parametrize(
    ("raw", "foreign", "decision", "reason"),
    [
        (0.9, False, "positive", "at or above the threshold"),
        (0.1, False, "negative", "below the threshold"),
        (0.45, False, "abstain", "not to be trusted"),
        (0.9, True, "abstain", "the image is not like those"),
    ],
)
def test_it_abstains_near_the_threshold_and_on_foreign_images(raw, foreign, decision, reason, bundle, images):
    """Its parts being what they are, the rule is put to a prediction of each kind."""
    handler = Handler(replace(bundle, uncertain_band={"low": 0.4, "high": 0.6}), "cpu", {})
    handler.bundle.operating_point["threshold"] = 0.5
    prediction = handler.predictor(images[:1])[0]
    ood = prediction.ood | {"foreign": foreign}
    case = handler.predictor.case([replace(prediction, raw_probability=raw, ood=ood)])
    found, reasons = handler.predictor.answer(case)
    assert found == decision and len(reasons) == 1 and reason in reasons[0]


def test_what_is_foreign_over_http(client, app_config):
    """Stripes at full contrast, which no training image had."""
    pixels = np.zeros((16, 16), np.uint8)
    pixels[::2] = 255
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "PNG")
    answer = client.post("/v1/models/hsg:predict", content=content.getvalue()).json()
    assert answer["decision"] == "abstain" and answer["result"]["images"][0]["foreign"] is True
    assert answer["result"]["label"] in ("occluded", "patent")


def test_what_it_says_of_itself(client, predictor):
    about = client.get("/v1/models/hsg").json()
    assert about["kind"] == "classifier" and about["classes"] == ["occluded", "patent"]
    assert about["positive"] == "occluded" and about["threshold"] == predictor.threshold
    assert about["explain"] == ["gradcam", "ig", "occlusion"]
    assert set(about["fields"]["properties"]) == {"frames", "explain", "explain_as", "deletion"}


def test_options_are_refused(bundle):
    with pytest.raises(UserError, match="option of a classifier"):
        Handler(bundle, "cpu", {"index": "somewhere"})


def test_examples_fit_the_network(bundle):
    handler = Handler(bundle, "cpu", {})
    (item,) = handler.examples().values()
    assert item.shape == (1, 16, 16) and item.dtype == torch.float32 and 0 <= item.min() < item.max() <= 1
    assert len(handler.networks["image"](item[None])) == 1 and len(handler.golden()) == 4


def test_an_image_of_one_value_is_named(app_config):
    content = io.BytesIO()
    Image.fromarray(np.full((16, 16), 9, np.uint8)).save(content, "PNG")
    with TestClient(create_app(app_config())) as client:
        response = client.post("/v1/models/hsg:predict", content=content.getvalue())
    assert response.status_code == 422 and "one value" in response.json()["detail"]
