"""Thousands of requests that nobody means well with: every answer is 200, 4xx or 503, in time, and memory stays flat.

Every input follows from its number, so that a failure can be run again: `request_of(number)`.
"""

import base64
import json
import time
from collections import Counter
from dataclasses import replace

import numpy as np
import psutil
import pytest
from fastapi.testclient import TestClient
from hostile import HOSTILE, NAME, SOUND, hostile, sound

from raymed.serve.app import create_app

SECONDS = 10.0
"""That one answer may take, on a busy machine; the longest here is one of a second."""
GROWTH = 150 * 2**20
"""Bytes that the process may have grown by, after the first quarter."""
NUMBERS = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF)
NAMES = (
    "../../etc/passwd",
    "/etc/shadow",
    "C:\\x.png",
    "a\0.png",
    f"{NAME}.dcm",
    "x" * 3000,
    "ü.png",
    "%2e%2e%2f",
    "'; --",
)
KINDS = (
    "",
    "image/png",
    "application/dicom",
    "application/json",
    "text/html",
    "multipart/form-data",
    "multipart/mixed",
)
KINDS += (
    "multipart/form-data; boundary=b",
    "application/x-www-form-urlencoded",
    "application/json; charset=utf-7",
    "\xff",
)
TEXTS = (
    "",
    "0",
    "-1",
    "2",
    "1e400",
    "[1]",
    "[1,2,99999999999999999999]",
    '{"a":' * 50,
    "null",
    "NaN",
    "gradcam",
    "\0",
    "𝕏" * 99,
)
FIELDS = (
    "frames",
    "explain",
    "explain_as",
    "deletion",
    "files",
    "name",
    "self",
    "__class__",
    "frames[]",
    "\u202e",
    "a" * 200,
)


DATATYPES = ("BYTES", "UINT8", "UINT16", "FP32", "BOOL", "INT64", "x", None, 1)
SHAPES = ([1], [2], [], [0], [-1], [1, 8, 8], [1, 8, 8, 3], [2**40, 2**40], [0, 2**64 - 1], [1.5], [True], ["1"], None)
PREDICT, INFER = "/v1/models/hsg:predict", "/v2/models/hsg/infer"
"""Of the second the tensors may stand in the JSON or, binary, behind it."""


def mutated(content: bytes, rng: np.random.Generator) -> bytes:
    """Bits flipped, numbers made extreme, parts cut, doubled, zeroed, moved, or taken from another file."""
    data = bytearray(content)
    for _ in range(int(rng.integers(1, 8))):
        # most headers lie at the start
        place = int(rng.integers(0, max(1, min(len(data), 600) if rng.random() < 0.6 else len(data))))
        end = place + int(rng.integers(1, 64))
        match int(rng.integers(0, 9)):
            case 0:
                data[place : place + 1] = bytes([int(rng.integers(256))])
            case 1:
                data[place : place + 1] = bytes(byte ^ 1 << int(rng.integers(8)) for byte in data[place : place + 1])
            case 2:
                size = int(rng.choice([1, 2, 4]))
                number = int(rng.choice(NUMBERS)) & (1 << 8 * size) - 1
                data[place : place + size] = number.to_bytes(size, rng.choice(["little", "big"]))
            case 3:
                del data[place:end]
            case 4:
                data[place:place] = data[place:end] * int(rng.integers(1, 50))
            case 5:
                data[place:end] = bytes(len(data[place:end]))
            case 6:
                data[place:end] = rng.bytes(end - place)
            case 7:
                other = sound(str(rng.choice(list(SOUND))))
                start = int(rng.integers(0, len(other)))
                data[place:end] = other[start : start + int(rng.integers(1, 2000))]
            case _:
                data = data[: place + 1] if rng.random() < 0.3 else data
    return bytes(data)


def file_of(rng: np.random.Generator) -> bytes:
    """A sound file, a mutated one, half of one, or noise."""
    content = sound(str(rng.choice(list(SOUND))))
    match int(rng.integers(0, 12)):
        case 0:
            return content
        case 1:
            return content[: int(rng.integers(0, len(content)))]
        case 2:
            return rng.bytes(int(rng.integers(0, 3000)))
        case 3:
            return content[: int(rng.integers(1, 600))] + rng.bytes(int(rng.integers(0, 3000)))
        case _:
            return mutated(content, rng)


def some(values, rng: np.random.Generator):
    """One of them."""
    return values[int(rng.integers(0, len(values)))]


def form(rng: np.random.Generator) -> bytes:
    """A multipart body with the boundary b, as it should be or not."""
    parts = []
    for _ in range(int(rng.integers(0, 5))):
        name = f'; filename="{some(NAMES, rng)}"' if rng.random() < 0.7 else ""
        content = file_of(rng) if name else some(TEXTS, rng).encode()
        kind = "" if rng.random() < 0.5 else f"\r\nContent-Type: {some(KINDS, rng)}"
        head = f'Content-Disposition: form-data; name="{some(FIELDS, rng)}"{name}{kind}\r\n\r\n'
        parts.append(b"--b\r\n" + head.encode() + content + b"\r\n")
    return b"".join(parts) + b"--b--\r\n"


def document(rng: np.random.Generator) -> bytes:
    """JSON with files and fields."""
    files = [base64.b64encode(file_of(rng)).decode() for _ in range(int(rng.integers(0, 3)))]
    values = [*TEXTS, 1, -1.5, None, True, [], {}, [[["x"]]], {"a": {"b": 1}}, "\ud800", 10**30]
    asked = {some(FIELDS, rng): some(values, rng) for _ in range(int(rng.integers(0, 3)))}
    return json.dumps({"files": some([files, files, files, "x", None, [1], {"a": 1}], rng)} | asked).encode()


def tensor_of(rng: np.random.Generator, is_binary: bool) -> tuple[dict, bytes]:
    """An input, and its bytes behind the JSON. Half of them hold a file as they should."""
    content = file_of(rng)
    if is_binary:
        content = len(content).to_bytes(4, "little") + content
        sound_data = {"parameters": {"binary_data_size": len(content)}}
        odd = [{"parameters": {"binary_data_size": size}} for size in (0, 3, -1, 2**40, "x", None)]
    else:
        sound_data = {"data": [base64.b64encode(content).decode()]}
        odd = [{"data": data} for data in ([0] * 64, [[1e400, -1]], [None], ["x"], "x", {"a": 1}, [True] * 192)]
        content = b""
    tensor = {"name": "image", "datatype": "BYTES", "shape": [1]} | sound_data
    if rng.random() < 0.5:
        name = "image" if rng.random() < 0.5 else some(FIELDS, rng)
        tensor |= {"name": name, "datatype": some(DATATYPES, rng), "shape": some(SHAPES, rng)}
        tensor |= some([sound_data, *odd], rng)
    return tensor, content


def infer(rng: np.random.Generator, is_binary: bool) -> tuple[bytes, dict[str, str]]:
    """A body of tensors, in JSON or behind it, and its headers."""
    inputs = [tensor_of(rng, is_binary) for _ in range(int(rng.choice([0, 1, 1, 1, 2])))]
    asked = {"inputs": [tensor for tensor, _ in inputs]}
    if rng.random() < 0.3:
        values = [*TEXTS, None, [], {}, {"explain": "x"}]
        asked[some(["parameters", "outputs", "id", "inputs"], rng)] = some(values, rng)
    head = json.dumps(asked).encode()
    kind = {"Content-Type": "application/octet-stream" if is_binary else "application/json"}
    body = head + b"".join(content for _, content in inputs)
    if rng.random() < 0.3:
        body = mutated(body, rng)
    if not is_binary:
        return body, kind
    length = str(len(head)) if rng.random() < 0.8 else some(["0", "-1", "1e3", "9" * 20, "x", str(len(body) + 1)], rng)
    return body, kind | {"Inference-Header-Content-Length": length}


def request_of(number: int) -> dict:
    """What the client's `post` is called with."""
    names = list(HOSTILE)
    if number < len(names):
        return {"url": PREDICT, "content": hostile(names[number])}
    rng = np.random.default_rng(number)
    params = {some(FIELDS, rng): some(TEXTS, rng)} if rng.random() < 0.15 else {}
    headers = {"X-Patient": NAME} if rng.random() < 0.2 else {}
    match int(rng.integers(0, 12)):
        case 10 | 11 as way:
            content, told = infer(rng, is_binary=way == 11)
            return {"url": INFER, "content": content, "params": params, "headers": headers | told}
        case 0:
            content, kind = form(rng), "multipart/form-data; boundary=b"
        case 1:
            content, kind = mutated(form(rng), rng), "multipart/form-data; boundary=b"
        case 2:
            content, kind = document(rng), "application/json"
        case 3:
            content, kind = mutated(document(rng), rng), "application/json"
        case 4:
            content, kind = file_of(rng), some(KINDS, rng)
        case _:
            content, kind = file_of(rng), "application/octet-stream"
    headers |= {"Content-Type": kind.encode("latin-1")}
    return {"url": PREDICT, "content": content, "params": params, "headers": headers}


def check(client, capfd, total: int) -> None:
    """Send them all."""
    me, statuses, of_infer, first, slowest = psutil.Process(), Counter(), Counter(), 0, (0.0, -1)
    for number in range(total):
        started = time.perf_counter()
        request = request_of(number)
        answer = client.post(**request)
        slowest = max(slowest, (time.perf_counter() - started, number))
        statuses[answer.status_code] += 1
        of_infer[answer.status_code] += request["url"] == INFER
        told = f"request {number}: {answer.status_code} {answer.text[:500]}"
        assert answer.status_code in (200, 503) or 400 <= answer.status_code < 500, told
        assert NAME not in answer.text and "Traceback" not in answer.text, told
        if number == total // 4:
            first = me.memory_info().rss
    assert NAME not in "".join(capfd.readouterr())
    growth = me.memory_info().rss - first
    with capfd.disabled():
        print(f" {dict(sorted(statuses.items()))}, slowest {slowest[0]:.2f} s ({slowest[1]}), {growth >> 20} MiB more")
    assert slowest[0] < SECONDS, f"request {slowest[1]} took {slowest[0]:.1f} s"
    assert growth < GROWTH, f"{growth >> 20} MiB more"
    assert statuses[200] > total // 12 and statuses[422] > total // 5 and statuses[415] > total // 50, statuses
    assert statuses[413] > 5
    assert of_infer[200] > total // 500 and of_infer[422] > total // 25 and of_infer[415] > 0, of_infer


@pytest.fixture
def asked(bundle, app_config, tmp_path):
    """A client of a server whose model takes every kind of file and modality, and that never says "too often"."""
    folder = replace(bundle, contract={}).save(tmp_path / "bundle")
    config = app_config(**{"limits.per_minute": 10**9, "models": (f"hsg={folder}",)})
    with TestClient(create_app(config)) as client:
        yield client


def test_a_thousand_hostile_requests(asked, capfd):
    check(asked, capfd, 1_000)


@pytest.mark.slow
def test_ten_thousand_hostile_requests(asked, capfd):
    check(asked, capfd, 10_000)
