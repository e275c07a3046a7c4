"""An exported network gives the bundle's own answers, says what they mean, and does not leave when it is wrong."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from raymed.config import UserError
from raymed.registry import export as module
from raymed.registry.export import Graph, export, export_monai, parity
from raymed.tasks.predictor import Predictor


def preprocessed(predictor, images) -> np.ndarray:
    return np.stack([predictor.preprocess.to_array(image).transpose(2, 0, 1) for image in images])


@pytest.fixture(scope="module")
def calibrated(bundle):
    """A calibration that changes something."""
    return replace(bundle, calibration=bundle.calibration | {"applied": True, "temperature": 1.7, "bias": -0.4})


@pytest.fixture(scope="module")
def onnx_file(calibrated, images, tmp_path_factory):
    pytest.importorskip("onnxruntime", reason="raymed[export] is not installed")
    done = export(calibrated, tmp_path_factory.mktemp("onnx") / "model", "onnx", images[:20])
    assert (done.path.name, done.num_images) == ("model.onnx", 20) and done.difference < 1e-5
    return done.path


def test_onnx_answers_like_the_bundle(onnx_file, calibrated, images):
    import onnxruntime

    session = onnxruntime.InferenceSession(onnx_file, providers=["CPUExecutionProvider"])
    predictor = Predictor.from_bundle(calibrated)
    (pixels,) = session.get_inputs()
    assert (pixels.name, pixels.type, pixels.shape) == ("pixels", "tensor(uint8)", ["batch", 1, 16, 16])
    for number in (1, 7, 30):
        names = [output.name for output in session.get_outputs()]
        values = session.run(None, {"pixels": preprocessed(predictor, images[20 : 20 + number])})
        answer = dict(zip(names, values, strict=True))
        for i, prediction in enumerate(predictor(images[20 : 20 + number])):
            assert answer["probability"][i] == pytest.approx(prediction.probability, abs=1e-5)
            assert answer["raw_probability"][i] == pytest.approx(prediction.raw_probability, abs=1e-5)
            row = prediction.row()
            assert answer["mahalanobis"][i] == pytest.approx(row["mahalanobis"], rel=1e-3)
            assert answer["knn"][i] == pytest.approx(row["knn"], abs=1e-3)
            assert (answer["probability"][i] >= predictor.threshold) == (prediction.decision == "occluded")


def test_what_the_numbers_mean_stands_in_the_file_and_beside_it(onnx_file, calibrated):
    import onnx

    props = {entry.key: entry.value for entry in onnx.load(onnx_file).metadata_props}
    beside = json.loads(onnx_file.with_name("model.onnx.json").read_text())
    predictor = Predictor.from_bundle(calibrated)
    assert float(props["threshold"]) == beside["threshold"] == predictor.threshold != 0.5
    assert json.loads(props["classes"]) == beside["classes"] == calibrated.classes
    assert json.loads(props["preprocess"])["size"] == 16
    assert beside["uncertain_band"] == list(predictor.band or ())
    assert beside["ood_thresholds"] == calibrated.ood["thresholds"]
    assert beside["parity"]["real_images"] and beside["parity"]["max_difference"] < 1e-5
    assert props["intended_use"] == "not stated"


def test_torch_export_answers_like_the_bundle(calibrated, images, tmp_path):
    done = export(calibrated, tmp_path / "model.pt2", "torch")
    assert done.difference < 1e-5 and done.num_images == 64
    extra = {"raymed.json": ""}
    loaded = torch.export.load(done.path, extra_files=extra).module()
    predictor = Predictor.from_bundle(calibrated)
    answer = loaded(torch.from_numpy(preprocessed(predictor, images[:5])))
    wanted = [prediction.probability for prediction in predictor(images[:5])]
    assert np.allclose(answer["probability"].detach().numpy(), wanted, atol=1e-5)
    assert json.loads(extra["raymed.json"])["threshold"] == predictor.threshold


def test_sixteen_bits_and_no_statistics(bundle, tmp_path):
    plain = replace(bundle, contract=bundle.contract | {"bits": 16}, ood={}, extras={}, uncertain_band={})
    done = export(plain, tmp_path / "m", "torch", [np.arange(0, 51200, 200, dtype=np.uint16).reshape(16, 16)])
    answer = torch.export.load(done.path).module()(torch.zeros(3, 1, 16, 16, dtype=torch.uint16))
    assert list(answer) == ["probability", "raw_probability"] and answer["probability"].shape == (3,)
    with pytest.raises(UserError, match="uint16 images, got uint8"):
        export(plain, tmp_path / "n", "torch", [np.zeros((16, 16), np.uint8)])


def test_a_network_that_answers_otherwise_is_refused(bundle, tmp_path, monkeypatch):
    """The check compares what is in the file: a graph with another temperature does not pass."""

    class Wrong(Graph):
        def __init__(self, predictor):
            super().__init__(predictor)
            self.calibration.temperature *= 1.001

    monkeypatch.setattr(module, "Graph", Wrong)
    with pytest.raises(UserError, match="differ from the bundle's by up to"):
        export(bundle, tmp_path / "model", "torch")
    assert list(tmp_path.iterdir()) == []


def test_parity_is_the_largest_difference(bundle, images):
    predictor = Predictor.from_bundle(bundle)
    pixels = preprocessed(predictor, images[:9])
    true = np.array([[p.probability, p.raw_probability] for p in predictor(images[:9])])
    place = {pixels[i].tobytes(): i for i in range(9)}

    def run(part, shift=0.0, spoil=8):
        rows = [place[image.tobytes()] for image in part]
        off = np.array([shift * (row == spoil) for row in rows])
        return {"probability": true[rows, 0], "raw_probability": true[rows, 1] + off}

    assert parity(predictor, run, pixels) == 0
    assert parity(predictor, lambda part: run(part, 2e-5), pixels) == pytest.approx(2e-5)
    assert np.isnan(parity(predictor, lambda part: run(part, np.nan), pixels))


def test_wrong_ending(bundle, tmp_path):
    with pytest.raises(UserError, match="ends in .onnx"):
        export(bundle, tmp_path / "model.pt2", "onnx")


def test_monai_layout(folder, tmp_path):
    pytest.importorskip("onnxruntime", reason="raymed[export] is not installed")
    made = export_monai(folder, tmp_path / "monai")
    files = {str(path.relative_to(made)) for path in made.rglob("*") if path.is_file()}
    models = {"bundle.json", "extras.safetensors", "model.onnx", "model.onnx.json", "model.safetensors"}
    assert files == {
        "LICENSE",
        "configs/metadata.json",
        "docs/README.md",
        "docs/data_license.txt",
        *(f"models/{name}" for name in models),
    }
    assert (made / "docs" / "data_license.txt").read_text() == "CC BY 4.0\nSource: the hospital | ward 3\n"
    with pytest.raises(UserError, match="not empty"):
        export_monai(folder, made)


def test_a_monai_bundle_goes_where_it_is_told_to(folder, tmp_path, monkeypatch):
    """A link to an empty folder, and the current one: nothing is put in their place."""
    pytest.importorskip("onnxruntime", reason="raymed[export] is not installed")
    for name in ("disk", "here"):
        (tmp_path / name).mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    monkeypatch.chdir(tmp_path / "here")
    for into, place in ((tmp_path / "link", "disk"), (Path("."), "here")):
        export_monai(folder, into)
        assert {path.name for path in (tmp_path / place).iterdir()} == {"configs", "docs", "models", "LICENSE"}
    assert (tmp_path / "link").is_symlink()


def test_a_monai_bundle_is_made_where_an_export_was_killed(folder, tmp_path):
    """What it has left bears the number of a process that has ended."""
    pytest.importorskip("onnxruntime", reason="raymed[export] is not installed")
    code = "import sys; from pathlib import Path; from raymed.storage.leftovers import temporary; "
    code += "temporary(Path(sys.argv[1]) / 'bundle').mkdir(parents=True)"
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "monai")], check=True)
    assert len(list((tmp_path / "monai").iterdir())) == 1
    export_monai(folder, tmp_path / "monai")
    assert {path.name for path in (tmp_path / "monai").iterdir()} == {"configs", "docs", "models", "LICENSE"}


def test_a_monai_bundle_needs_a_folder(folder, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("file", "link"):
        with pytest.raises(UserError, match=f"{name} is no folder: give a new one"):
            export_monai(folder, tmp_path / name)


def test_a_monai_bundle_that_cannot_be_made_leaves_nothing(folder, tmp_path, monkeypatch):
    into = tmp_path / "new" / "monai"
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "onnxruntime", None)
        for _ in range(2):
            with pytest.raises(UserError, match="ONNX needs the package onnxruntime"):
                export_monai(folder, into)
    assert list(into.parent.iterdir()) == []

    def broken(models):
        assert (models / "model.onnx").is_file()
        raise OSError(28, "No space left on device")

    pytest.importorskip("onnxruntime", reason="raymed[export] is not installed")
    into.mkdir()
    monkeypatch.setattr(module, "write_card", broken)
    with pytest.raises(OSError, match="No space left"):
        export_monai(folder, into)
    assert list(into.parent.iterdir()) == [into] and list(into.iterdir()) == []
