"""Compiled networks: equal answers, one compilation for all sizes of a batch and none in a request; bfloat16."""

import asyncio
import base64
import shutil
import threading
import time
import weakref
from functools import partial

import numpy as np
import pytest
import torch
from clip_bundles import TEXTS, clip_bundle, some_images
from torch import nn
from torch._dynamo.backends.debugging import aot_eager
from torch._inductor.compile_fx import compile_fx

from raymed.config import UserError, replace
from raymed.serve import compiled
from raymed.serve.config import Hardware
from raymed.serve.engine import Engine
from raymed.serve.handlers import Prepared, Upload
from raymed.serve.live import Origin, load_live
from raymed.tasks.golden import with_golden

pytestmark = pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler here")


INDUCTOR = pytest.param(compile_fx, id="inductor", marks=pytest.mark.slow)


class Compiler:
    """One of PyTorch's, with every compilation and every use of what it made counted."""

    def __init__(self, backend):
        self.backend, self.num_compiled, self.sizes = backend, 0, []

    def __call__(self, graph, inputs):
        self.num_compiled += 1
        made = self.backend(graph, inputs)

        def run(*values):
            tensors = [value for value in values if torch.is_tensor(value) and not isinstance(value, nn.Parameter)]
            self.sizes += [len(tensor) for tensor in tensors if tensor.ndim == 4]
            return made(*values)

        return run


@pytest.fixture(params=[pytest.param(aot_eager, id="traced"), INDUCTOR])
def compiler(request, monkeypatch, tmp_path_factory):
    """It has compiled nothing yet. One that only traces is as quick as tests should be; the other is the real one."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "inductor"))
    torch.compiler.reset()
    made = Compiler(request.param)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=made))
    yield made
    torch.compiler.reset()


def loaded(bundle, **hardware):
    """(live, engine)"""
    engine = Engine(Hardware(device="cpu", threads=1, **{"max_batch": 8} | hardware), 64)
    return load_live("m", bundle, Origin("", "", ""), {}, engine), engine


def answered(live, images, **fields):
    uploads = [Upload(pixels, file=place) for place, pixels in enumerate(images)]
    prepared = [Prepared(upload, live.handler.prepare(upload)) for upload in uploads]
    return asyncio.run(live.handler.answer(prepared, live.handler.Fields(**fields), live))


@pytest.fixture
def live(bundle, compiler):
    """A classifier, compiled for batches of up to 8."""
    made, engine = loaded(with_golden(bundle), compile=True)
    yield made
    engine.close()


@pytest.fixture
def plain(bundle):
    """The same, as it is written."""
    made, engine = loaded(bundle)
    yield made
    engine.close()


def test_a_classifier(live, plain, images, compiler):
    assert compiler.num_compiled == 2  # for a lone image, and for any number of them
    compiler.sizes.clear()
    for size in range(1, 9):
        found, wanted = answered(live, images[:size]), answered(plain, images[:size])
        assert found.probability == pytest.approx(wanted.probability, abs=1e-4)
        for a, b in zip(found.images, wanted.images, strict=True):
            assert a.probability == pytest.approx(b.probability, abs=1e-4)
            assert a.distances == pytest.approx(b.distances, rel=1e-3, abs=1e-4)
    assert compiler.num_compiled == 2 and sum(compiler.sizes) == sum(range(1, 9)) and len(set(compiler.sizes)) > 4


@pytest.mark.parametrize("method", ["gradcam", "ig", "occlusion"])
def test_explanations_are_those_of_the_network_as_it_is_written(method, live, plain, images, compiler):
    fields = {"explain": method, "explain_as": "array"}
    found, wanted = (answered(each, images[:1], **fields).images[0].explanation for each in (live, plain))
    maps = [np.frombuffer(base64.b64decode(each.map), np.uint8).astype(int) for each in (found, wanted)]
    assert np.abs(maps[0] - maps[1]).max() <= 1 and maps[0].max() == 255
    assert found.maximum == pytest.approx(wanted.maximum, rel=1e-3) and compiler.num_compiled == 2


def test_another_version_of_the_network_needs_no_compilation(live, bundle, images, compiler):
    """After a promotion the old version's memory is free."""
    weights = {name: 0.9 * tensor if tensor.is_floating_point() else tensor for name, tensor in bundle.weights.items()}
    other = replace(bundle, {"weights": weights})
    (new, engine), (plain, another) = loaded(other, compile=True), loaded(other)
    assert compiler.num_compiled == 2
    found, wanted, before = (answered(each, images[:5]).images[2].probability for each in (new, plain, live))
    assert found == pytest.approx(wanted, abs=1e-4) and abs(found - before) > 1e-3
    encoder = weakref.ref(new.handler.modules[0])
    engine.close(), another.close()
    del new
    assert encoder() is None


def test_nobody_waits_for_a_compilation(live, plain, images, compiler):
    compiler.sizes.clear()
    wanted = answered(plain, images[:3])
    is_held, may_go = threading.Event(), threading.Event()

    def compile_something():
        with compiled._lock:
            is_held.set()
            may_go.wait(20)

    thread = threading.Thread(target=compile_something)
    thread.start()
    is_held.wait(20)
    found = answered(live, images[:3])
    may_go.set()
    thread.join()
    assert found.probability == pytest.approx(wanted.probability, abs=1e-6) and compiler.sizes == []
    answered(live, images[:3])
    assert sum(compiler.sizes) == 3


@pytest.mark.parametrize("compiler", [INDUCTOR], indirect=True)
def test_answers_go_on_while_another_model_is_compiled(live, images):
    waits = []
    loading = threading.Thread(target=load_live, args=("n", clip_bundle(), Origin("", "", ""), {}, live.engine))
    wanted = answered(live, images[:1]).probability
    started = time.perf_counter()
    loading.start()
    while loading.is_alive():
        asked = time.perf_counter()
        assert answered(live, images[:1]).probability == pytest.approx(wanted, abs=1e-4)
        waits.append(time.perf_counter() - asked)
    took = time.perf_counter() - started
    print(f"{len(waits)} answers in {took:.1f} s; the longest took {max(waits):.2f} s")
    assert took > 4 * max(waits) and len(waits) > 50


def test_a_clip(compiler):
    bundle = with_golden(clip_bundle())
    (live, engine), (plain, other) = loaded(bundle, compile=True), loaded(bundle)
    assert compiler.num_compiled == 2
    compiler.sizes.clear()
    for size in (1, 3, 6):
        found, wanted = (answered(each, some_images(size), texts=TEXTS) for each in (live, plain))
        for a, b in zip(found.images, wanted.images, strict=True):
            assert a.embedding == pytest.approx(b.embedding, abs=1e-4)
            assert a.similarity == pytest.approx(b.similarity, abs=1e-4)
    assert compiler.num_compiled == 2 and sum(compiler.sizes) == 10
    engine.close(), other.close()


@pytest.mark.parametrize("compile", [False, True])
def test_bfloat16(compile, bundle, plain, images, compiler):
    live, engine = loaded(with_golden(bundle), precision="bf16", compile=compile)
    found, wanted = (
        np.array([image.probability for image in answered(each, images[:40]).images]) for each in (live, plain)
    )
    assert 1e-5 < np.abs(found - wanted).max() < 0.03
    assert compiler.num_compiled == 2 * compile
    engine.close()


def test_bfloat16_of_a_clip():
    (live, engine), (plain, other) = loaded(with_golden(clip_bundle()), precision="bf16"), loaded(clip_bundle())
    found, wanted = (answered(each, some_images(6), texts=TEXTS).images for each in (live, plain))
    gaps = [np.abs(np.subtract(a.similarity, b.similarity)).max() for a, b in zip(found, wanted, strict=True)]
    assert 1e-5 < max(gaps) < 0.03
    engine.close(), other.close()


def test_golden_inputs_are_checked_in_the_precision_of_answers(bundle):
    golden = with_golden(bundle).golden
    off = [value + 0.05 for value in golden["values"]]
    with pytest.raises(UserError, match=r"off by 0\.0[3-7]\d*, and at most 0\.03 is allowed") as refused:
        loaded(replace(bundle, {"golden": golden | {"values": off}}), precision="bf16")
    assert "off by 0.05," not in str(refused.value)


@pytest.mark.parametrize("compiler", [pytest.param(compile_fx, id="inductor")], indirect=True)
def test_a_machine_without_a_compiler(bundle, compiler, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    without = torch._inductor.config.patch({"cpp.cxx": (None, "no-such-compiler")})
    with without, pytest.raises(UserError, match=r"hardware\.compile: .*a C\+\+ compiler"):
        loaded(bundle, compile=True)
