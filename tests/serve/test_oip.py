"""The Open Inference Protocol: by the real client of Triton over a real process, with the numbers of `:predict`."""

import io
import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tritonclient.http as triton
from clip_bundles import clip_bundle
from fastapi.testclient import TestClient
from PIL import Image
from tritonclient.utils import InferenceServerException
from waiting import until

from raymed.serve.app import create_app
from raymed.serve.config import Access, Hardware, Limits, ServeConfig
from raymed.serve.routes.oip import HEADER_LENGTH, _parsed
from raymed.tasks.predictor import Predictor

REPO = Path(__file__).resolve().parents[2]
SERVE = """
from raymed.config import from_dict
from raymed.serve.config import ServeConfig
from raymed.serve.run import serve
import json, sys
print(serve(from_dict(ServeConfig, json.loads(sys.argv[1]))))
"""


@pytest.fixture(scope="module")
def folders(bundle, tmp_path_factory):
    """A classifier and a CLIP, as a server is told of them."""
    folder = tmp_path_factory.mktemp("oip")
    return f"hsg={bundle.save(folder / 'hsg')}", f"pairs={clip_bundle().save(folder / 'pairs')}"


@pytest.fixture(scope="module")
def server(folders, tmp_path_factory):
    """host:port of a process of uvicorn."""
    config = {
        "models": folders,
        "port": 0,
        "access": {"open": True},
        "hardware": {"device": "cpu", "threads": 1, "max_batch": 1},
    }
    home = tmp_path_factory.mktemp("oip-home")
    with (home / "log").open("w+") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", SERVE, json.dumps(config)],
            cwd=REPO, env={"PATH": "/usr/bin:/bin", "RAYMED_HOME": str(home), "PYTHONPATH": str(REPO)},
            stdout=log, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            told = until(lambda: (home / "log").read_text().partition("serving on http://")[2].partition("\n")[0], 60)
            yield told
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(20)


@pytest.fixture
def client(server):
    with triton.InferenceServerClient(server) as made:
        yield made


@pytest.fixture(scope="module")
def square(images):
    """(3, 16, 16) uint8."""
    return np.stack([image[:16, :16] for image in images[:3]])


@pytest.fixture(scope="module")
def app(folders):
    """A client of the same server in this process."""
    hardware = Hardware(device="cpu", threads=1, max_batch=1)
    config = ServeConfig(models=folders, access=Access(open=True, hosts=("testserver",)), hardware=hardware)
    with TestClient(create_app(config)) as started:
        yield started


def tensor(name, array, datatype=None, binary=True):
    array = np.asarray(array)
    made = triton.InferInput(name, list(array.shape), datatype or triton.np_to_triton_dtype(array.dtype))
    return made.set_data_from_numpy(array, binary_data=binary)


def files_tensor(*contents):
    return tensor("image", np.array(contents, dtype=object), "BYTES")


def predicted(app, contents, **fields):
    files = [("file", ("x", content)) for content in contents]
    return app.post("/v1/models/hsg:predict", files=files, data=fields).json()


def as_png(image) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()


def test_what_the_server_and_its_models_say_of_themselves(client):
    assert client.is_server_live() and client.is_server_ready()
    assert client.is_model_ready("hsg") and client.is_model_ready("pairs") and not client.is_model_ready("other")
    told = client.get_server_metadata()
    assert told["name"] == "raymed" and "binary_tensor_data" in told["extensions"]
    model = client.get_model_metadata("hsg")
    assert model["platform"] == "raymed_classifier" and model["versions"] == []
    inputs = {each["name"]: each for each in model["inputs"]}
    assert inputs["image"]["datatype"] == "BYTES" and inputs["image"]["parameters"]["optional"] is False
    assert inputs["frames"]["datatype"] == "INT64" and inputs["frames"]["shape"] == [-1]
    outputs = {each["name"]: (each["datatype"], each["shape"]) for each in model["outputs"]}
    assert outputs["probability"] == ("FP64", [1]) and outputs["decision"] == ("BYTES", [1])
    assert outputs["uncertain_band"] == ("FP64", [2]) and outputs["images.probability"] == ("FP64", [-1])
    assert outputs["images.foreign"] == ("INT8", [-1])
    pairs = {each["name"]: (each["datatype"], each["shape"]) for each in client.get_model_metadata("pairs")["outputs"]}
    assert pairs["images.embedding"] == ("FP64", [-1, -1])


@pytest.mark.parametrize("binary", [True, False])
def test_files_are_answered_as_predict_answers_them(client, app, images, binary):
    contents = [as_png(image) for image in images[:3]]
    expected = predicted(app, contents)
    asked = [triton.InferRequestedOutput(name, binary_data=binary) for name in ("probability", "decision", "reasons",
             "uncertain_band", "images.probability", "images.foreign", "images.distances", "images.frame")]  # fmt: skip
    found = client.infer("hsg", [files_tensor(*contents)], outputs=asked, request_id="7")
    result = expected["result"]
    assert found.as_numpy("probability").tolist() == [result["probability"]]
    assert found.as_numpy("uncertain_band").tolist() == result["uncertain_band"]
    each = result["images"]
    assert found.as_numpy("images.probability").tolist() == [image["probability"] for image in each]
    assert found.as_numpy("images.foreign").tolist() == [int(image["foreign"]) for image in each]
    assert found.as_numpy("images.frame").tolist() == [-1, -1, -1]
    texts = {name: [t if isinstance(t, str) else t.decode() for t in found.as_numpy(name)]
             for name in ("decision", "reasons", "images.distances")}  # fmt: skip
    assert texts["decision"] == [expected["decision"]] and texts["reasons"] == expected["reasons"]
    assert [json.loads(text) for text in texts["images.distances"]] == [image["distances"] for image in each]
    told = found.get_response()
    assert told["id"] == "7" and told["model_name"] == "hsg" and told["model_version"] == ""
    assert told["parameters"]["bundle"] == expected["bundle"] and told["parameters"]["research_only"] is True


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
@pytest.mark.parametrize("axes", ["NHW", "NHW1", "NHW3"])
def test_pixels_are_answered_as_files_of_them_are(client, app, bundle, square, binary, dtype, axes):
    pixels = square[:2]
    if axes == "NHW3":
        pixels = np.stack([pixels, pixels[:, ::-1], pixels // 2], axis=-1)
    if dtype != np.uint8:
        pixels = pixels.astype(np.uint16) * 257
    files = [as_png(image) for image in pixels] if axes != "NHW3" or dtype == np.uint8 else None
    sent = (pixels.astype(np.float64) / 65535).astype(np.float32) if dtype == np.float32 else pixels
    if axes == "NHW1":
        sent = sent[..., None]
    found = client.infer("hsg", [tensor("image", sent, binary=binary)]).as_numpy("probability").tolist()
    if files is None:  # there is no PNG of 16 bits a colour here
        predictor = Predictor.from_bundle(bundle)
        assert found == pytest.approx([predictor.case(predictor([*pixels])).probability], rel=1e-6)
    else:
        assert found == [predicted(app, files)["result"]["probability"]]


def test_fields_come_as_tensors_or_parameters(client, app, images):
    contents = [as_png(images[0])]
    expected = predicted(app, contents, explain="occlusion", explain_as="array")["result"]["images"][0]["explanation"]
    name = "images.explanation.map"
    by_parameter = client.infer("hsg", [files_tensor(*contents)], parameters={"explain": "occlusion",
                                "explain_as": "array"})  # fmt: skip
    inputs = [tensor(key, np.array([text], dtype=object), "BYTES")
              for key, text in (("explain", "occlusion"), ("explain_as", "array"))]  # fmt: skip
    by_tensor = client.infer("hsg", [files_tensor(*contents), *inputs])
    for found in (by_parameter, by_tensor):
        assert found.as_numpy(name)[0].decode() == expected["map"]
        assert found.as_numpy("images.explanation.shape").tolist() == [expected["shape"]]
        assert found.as_numpy("images.explanation.overlay") is None, "what holds nothing is left out"
    asked = [triton.InferRequestedOutput("images.explanation.overlay")]
    assert client.infer("hsg", [files_tensor(*contents)], outputs=asked).as_numpy(asked[0].name()).tolist() == [b""]


def test_a_clip_embeds_images_and_texts(client, app, square):
    texts = ["a small nodule", "Übersicht, kein Befund"]
    sent = tensor("texts", np.array([text.encode() for text in texts], dtype=object), "BYTES")
    found = client.infer("pairs", [tensor("image", square), sent])
    form = {"files": [("file", ("x", as_png(image))) for image in square], "data": {"texts": texts}}
    expected = app.post("/v1/models/pairs:predict", **form).json()["result"]
    assert found.as_numpy("images.embedding").tolist() == [image["embedding"] for image in expected["images"]]
    assert found.as_numpy("texts.embedding").tolist() == [text["embedding"] for text in expected["texts"]]
    assert found.as_numpy("images.similarity").shape == (3, 2) and found.as_numpy("decision") is None
    prompts = json.dumps({"mass": "a mass", "none": ["no finding", "normal"]})
    zero_shot = client.infer("pairs", [tensor("image", square[:1])],
                             parameters={"task": "zero_shot", "prompts": prompts})  # fmt: skip
    probabilities = json.loads(zero_shot.as_numpy("probabilities")[0])
    assert probabilities.keys() == {"mass", "none"} and sum(probabilities.values()) == pytest.approx(1)
    only_texts = client.infer("pairs", [sent])
    assert only_texts.as_numpy("texts.embedding").shape[0] == 2 and only_texts.as_numpy("images.embedding") is None


def test_what_goes_wrong_is_said_as_the_client_expects_it(client, square):
    good = tensor("image", square[:1])
    for inputs, named, expected in (
        ([good], {"model_name": "other"}, "404"),
        ([good], {"model_name": "hsg", "model_version": "3"}, "404"),
        ([tensor("pixels", square[:1])], {"model_name": "hsg"}, "422"),
        ([tensor("image", square[:1].astype(np.int32))], {"model_name": "hsg"}, "422"),
        ([tensor("image", np.full((1, 32, 32), 1.5, np.float32))], {"model_name": "hsg"}, "422"),
        ([tensor("image", np.full((1, 32, 32), np.nan, np.float32))], {"model_name": "hsg"}, "422"),
        ([tensor("image", square[0])], {"model_name": "hsg"}, "422"),
        ([tensor("image", np.zeros((33, 8, 8), np.uint8))], {"model_name": "hsg"}, "413"),
        ([files_tensor(b"no image")], {"model_name": "hsg"}, "415"),
        ([good], {"model_name": "hsg", "outputs": [triton.InferRequestedOutput("other")]}, "422"),
        ([good], {"model_name": "hsg", "outputs": [triton.InferRequestedOutput("decision", class_count=2)]}, "422"),
        ([good], {"model_name": "hsg", "sequence_id": 5}, "422"),
        ([], {"model_name": "hsg"}, "422"),
        ([good], {"model_name": "hsg", "parameters": {"explain": "magic"}}, "422"),
    ):
        with pytest.raises(InferenceServerException) as raised:
            client.infer(inputs=inputs, **named)
        assert raised.value.status() == expected and "decoding the response" not in raised.value.message(), named


def post(app, body, **headers):
    return app.post("/v2/models/hsg/infer", content=body, headers=headers)


def pixels_json(**changes):
    tensor = {"name": "image", "datatype": "UINT8", "shape": [1, 2, 3], "data": [[[1, 2, 3], [4, 5, 6]]]} | changes
    return json.dumps({"inputs": [{name: value for name, value in tensor.items() if value is not None}]}).encode()


def test_json_is_checked_against_its_shape_and_datatype(app):
    assert post(app, pixels_json()).status_code == 200
    assert post(app, pixels_json(data=[1, 2, 3, 4, 5, 6])).json() == post(app, pixels_json()).json()
    for changes in (
        {"data": [1, 2, 3]}, {"data": [1, 2, 3, 4, 5, 256]}, {"data": [1, 2, 3, 4, 5, -1]}, {"data": None},
        {"data": [1, 2, 3, 4, 5, 6.5]}, {"data": ["1", 2, 3, 4, 5, 6]}, {"data": [True, 2, 3, 4, 5, 6]},
        {"shape": [1, 2, -3]}, {"shape": [10**30, 10**30]}, {"shape": [1] * 9}, {"datatype": "UINT9"},
        {"datatype": "BYTES"}, {"datatype": "BYTES", "shape": [1], "data": ["not base64!"]},
        {"datatype": "FP32", "data": [0, 0.5, 1, 0, 0, 1e999]}, {"parameters": {"shared_memory_region": "x"}},
        {"datatype": "BYTES", "name": "explain", "shape": [1], "data": ["\ud800"]},
    ):  # fmt: skip
        answer = post(app, pixels_json(**changes))
        assert answer.status_code == 422 and answer.json().keys() == {"error"}, changes


@pytest.mark.parametrize("body", [b"", b"[]", b"{}", b'{"inputs": NaN}', b"\xff", b"[" * 100_000,
                                  b'{"inputs": [{"name": "image", "datatype": "UINT8", "shape": [1], "data": '
                                  + b"[" * 900 + b"1" + b"]" * 900 + b"}]}"])  # fmt: skip
def test_what_is_no_request_is_refused(app, body):
    answer = post(app, body)
    assert answer.status_code == 422 and "error" in answer.json()


PIXELS_OF = b'{"inputs": [{"name": "image", "datatype": "UINT8", "shape": [1], "data": [%s]}]}'


@pytest.mark.parametrize(
    "body",
    [b'{"inputs": [' + b"{}," * 150_000 + b"{}]}", PIXELS_OF % (b"0," * 4_400_000 + b"0"), b"{" * 150_000],
    ids=["objects", "values", "nested"],
)
def test_json_of_too_many_values_is_refused_before_it_is_parsed(app, body, monkeypatch):
    def parsed(*_, **__):
        raise AssertionError("it was parsed")

    with monkeypatch.context() as patch:
        patch.setattr("raymed.serve.routes.oip.json.loads", parsed)
        answer = post(app, body)
    assert answer.status_code == 413 and answer.json().keys() == {"error"} and "binary data" in answer.json()["error"]


def test_a_large_image_may_come_as_numbers_and_bytes_count_as_none():
    asked, rest = _parsed(PIXELS_OF % (b"0," * (2048 * 2048 - 1) + b"0"), None)
    assert len(asked.inputs[0].data) == 2048 * 2048 and not len(rest)
    head = b'{"inputs": []}'
    asked, rest = _parsed(head + b",{" * 5_000_000, str(len(head)))
    assert asked.inputs == [] and len(rest) == 10_000_000


@pytest.mark.parametrize(
    "inputs", [[], [{"name": "image", "datatype": "BYTES", "shape": [0], "data": []}],
               [{"name": "frames", "datatype": "INT64", "shape": [1], "data": [1]}]], ids=["none", "empty", "others"]
)  # fmt: skip
def test_a_case_without_an_image_says_what_an_image_is(app, inputs):
    answer = post(app, json.dumps({"inputs": inputs}).encode())
    error = answer.json()["error"]
    assert answer.status_code == 422 and error.startswith("inputs: image is expected")
    assert "BYTES (N)" in error and "(N, H, W, 3)" in error and "file of the request" not in error


def test_outputs_are_binary_only_where_that_is_said(app):
    def asked(by_default, *own):
        outputs = [{"name": "probability", "parameters": {"binary_data": each}} for each in own]
        request = json.loads(pixels_json()) | {"outputs": outputs} if own else json.loads(pixels_json())
        if by_default is not None:
            request["parameters"] = {"binary_data_output": by_default}
        return post(app, json.dumps(request).encode())

    for by_default, own, is_binary in (
        (None, (), False), (True, (), True), (False, (True,), True), (True, (False,), False), (True, (None,), True),
    ):  # fmt: skip
        answer = asked(by_default, *own)
        assert answer.status_code == 200 and (HEADER_LENGTH in answer.headers) == is_binary, (by_default, own)
    for by_default, own in (("yes", ()), (None, ("no",)), (1, ()), (None, (0,))):
        assert asked(by_default, *own).status_code == 422, (by_default, own)


def test_binary_sizes_must_add_up(app, square):
    def sized(size, content, length=None, **changes):
        told = {"name": "image", "datatype": "UINT8", "shape": [1, 16, 16], "parameters": {"binary_data_size": size}}
        head = json.dumps({"inputs": [told | changes]}).encode()
        return post(
            app,
            head + content,
            **{HEADER_LENGTH: length if isinstance(length, bytes) else str(len(head) if length is None else length)},
        )

    content = square[0].tobytes()
    assert sized(256, content).status_code == 200
    for refused in (
        sized(256, content[:-1]), sized(255, content), sized(256, content + b"x"), sized(-1, content),
        sized("256", content), sized(256, content, length="x"), sized(256, content, length=10**7),
        sized(256, content, length=b"\xb2"), sized(True, content), sized(256, content, data=[1]),
        sized(6, b"\x03\0\0\0ab", datatype="BYTES", shape=[1]), sized(3, b"\x03\0\0", datatype="BYTES", shape=[1]),
        sized(4, b"\0\0\0\0", datatype="BYTES", shape=[2]),
    ):  # fmt: skip
        assert refused.status_code == 422 and refused.json().keys() == {"error"}


def test_pixels_are_limited_and_given_back(folders):
    config = ServeConfig(
        models=folders[:1],
        access=Access(open=True, hosts=("testserver",)),
        hardware=Hardware(device="cpu", threads=1),
        limits=Limits(pixels=2000, held_pixels=3000),
    )
    app = create_app(config)
    with TestClient(app) as started:
        square = pixels_json(shape=[1, 40, 40], data=[i % 7 for i in range(1600)])
        for _ in range(3):  # each takes more than half of the room, and gives it back
            assert post(started, square).status_code == 200
        two = pixels_json(shape=[2, 40, 40], data=[i % 7 for i in range(3200)])
        assert post(started, two).status_code == 413, "the server never has room for it"
        with app.state.service.room.taken(1500):
            assert post(started, square).status_code == 503 and post(started, square).headers["Retry-After"]
        assert post(started, pixels_json(shape=[1, 1, 2001], data=[1] * 2001)).status_code == 413
        assert app.state.service.room.free == 3000
