"""A CLIP in the registry: a fresh process gets the same embeddings, classes and neighbours out of it."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from clip_bundles import TEXTS, clip_bundle, png, some_images
from tiny_biomedclip import write_tiny_biomedclip

from raymed.bundle import Bundle
from raymed.config import UserError
from raymed.data.preprocess import Preprocess
from raymed.models.clip import ClipConfig
from raymed.registry import RegisterConfig, register
from raymed.registry.card import card, metadata, provenance, write_card
from raymed.registry.export import export
from raymed.registry.promote import promote
from raymed.registry.schema import input_example, requirements, signature
from raymed.registry.store import fetch_bundle
from raymed.tasks.embedder import Embedder
from raymed.tasks.index import Index, write_index

PROMPTS = {"nodule": ["a nodule", "a round spot"], "clear": ["nothing at all"]}
LOAD = """
import socket, sys, json
def refused(*_, **__): raise OSError("no network")
socket.socket.connect = socket.getaddrinfo = socket.create_connection = refused
import mlflow, pandas as pd
uri, name, index, given = sys.argv[1:]
given = json.loads(given)
mlflow.set_tracking_uri(uri)
model = mlflow.pyfunc.load_model(name, model_config={"index": index})
images = [open(file, "rb").read() for file in given["files"]]
def ask(table, **params):
    return model.predict(pd.DataFrame(table), params=params).to_dict("records")
found = {
    "images": ask({"image": images}),
    "texts": ask({"text": given["texts"]}),
    "pairs": ask({"image": [images[0], None], "text": [given["texts"][0], given["texts"][1]]}, task="embed"),
    "classes": ask({"image": images}, task="zero_shot", prompts=json.dumps(given["prompts"])),
    "matches": ask({"text": given["texts"][:2]}, task="retrieve", k=2),
    "example": len(model.predict(model.input_example)),
}
print("ANSWER", json.dumps(found))
"""


@pytest.fixture(scope="module")
def clip() -> Bundle:
    return replace(clip_bundle(), provenance={"run_key": "tune-1/final", "data": "d" * 64})


@pytest.fixture(scope="module")
def embedder(clip) -> Embedder:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield Embedder.from_bundle(clip)
    torch.set_num_threads(before)


def write_images_index(embedder: Embedder, folder: Path) -> Path:
    """Of four images."""
    made = Index(embedder.embed_images(some_images(4)), np.arange(1, 5), list("abcd"), [""] * 4, embedder.identity)
    write_index(folder / "index.parquet", made)
    return folder / "index.parquet"


@pytest.fixture
def index(embedder, tmp_path) -> Path:
    return write_images_index(embedder, tmp_path)


def test_a_checkpoint_of_biomedclip_s_shape_in_a_fresh_process(place, client, tmp_path):
    """Read from its folder, bundled, registered; the folder is gone when it is loaded, and so is the network."""
    checkpoint = write_tiny_biomedclip(tmp_path / "checkpoint")
    preprocess = Preprocess(size=48, channels=3, mean=(0.48, 0.46, 0.41), std=(0.27, 0.26, 0.28))
    clip = clip_bundle(ClipConfig(f"local-dir:{checkpoint}"), preprocess)
    clip.provenance = {"run_key": "tune-1/final", "data": "d" * 64}
    shutil.rmtree(checkpoint)
    embedder = Embedder.from_bundle(clip)
    index = write_images_index(embedder, tmp_path)
    registered = register(clip.save(tmp_path / "bundle"), RegisterConfig(), "captioned-dhn-nce", **place)
    assert registered is not None and registered.version == 1
    assert "mit" in (tmp_path / "bundle" / "card.md").read_text()
    files = [tmp_path / f"{i}.png" for i in range(3)]
    for file, image in zip(files, some_images(3), strict=True):
        file.write_bytes(png(image))
    given = json.dumps({"files": list(map(str, files)), "texts": TEXTS, "prompts": PROMPTS})
    arguments = [client.tracking_uri, "models:/captioned-dhn-nce@candidate", str(index), given]
    done = subprocess.run([sys.executable, "-c", LOAD, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.split("ANSWER ")[1])

    images, texts = embedder.embed_images(some_images(3)), embedder.embed_texts(TEXTS)
    np.testing.assert_allclose([row["image_embedding"] for row in found["images"]], images, atol=1e-6)
    np.testing.assert_allclose([row["text_embedding"] for row in found["texts"]], texts, atol=1e-6)
    assert [row["truncated"] for row in found["texts"]] == embedder.truncated(TEXTS).tolist()
    assert found["texts"][-1]["truncated"] and not found["texts"][0]["truncated"]
    assert found["pairs"][0]["similarity"] == pytest.approx(float(images[0] @ texts[0]), abs=1e-6)
    assert found["pairs"][1]["image_embedding"] is None
    wanted = embedder.zero_shot(some_images(3), PROMPTS)
    given = [[row["probabilities"][name] for name in PROMPTS] for row in found["classes"]]
    np.testing.assert_allclose(given, wanted, atol=1e-6)
    nearest = np.argsort(-(texts[:2] @ embedder.embed_images(some_images(4)).T), axis=1)[:, :2] + 1
    assert [[match["row"] for match in row["matches"]] for row in found["matches"]] == nearest.tolist()
    assert {(row["model"], row["version"], row["run"]) for rows in list(found.values())[:5] for row in rows} == {
        ("captioned-dhn-nce", "1", "tune-1/final")
    }
    assert found["example"] == 1


def test_over_http(clip, embedder, index, place, client, tmp_path, monkeypatch):
    import mlflow
    from fastapi.testclient import TestClient
    from mlflow.models import convert_input_example_to_serving_input
    from mlflow.pyfunc.scoring_server import init

    registered = register(clip.save(tmp_path / "bundle"), RegisterConfig(), "m", **place)
    assert registered is not None
    monkeypatch.setenv("MLFLOW_PYFUNC_INFERENCE_CONFIG", json.dumps({"index": str(index)}))
    model = mlflow.pyfunc.load_model(client.get_model_version("m", "1").source)
    server = TestClient(init(model))

    def ask(table, params=None):
        body = json.loads(convert_input_example_to_serving_input(pd.DataFrame(table)))
        headers = {"Content-Type": "application/json"}
        answer = server.post("/invocations", content=json.dumps(body | {"params": params or {}}), headers=headers)
        assert answer.status_code == 200, answer.text
        return answer.json()["predictions"]

    images, texts = [png(image) for image in some_images(3)], ["a nodule", "", "a mass"]
    wanted = embedder.embed_images(some_images(3))
    rows = ask({"image": images, "text": texts})
    np.testing.assert_allclose([row["image_embedding"] for row in rows], wanted, atol=1e-6)
    assert [row["text_embedding"] is None for row in rows] == [False, True, False], "an empty text is none"
    rows = ask({"image": images}, {"task": "zero_shot", "prompts": json.dumps(PROMPTS)})
    assert rows[0]["probabilities"]["nodule"] == pytest.approx(embedder.zero_shot(some_images(1), PROMPTS)[0, 0])
    (row,) = ask({"image": images[1:2]}, {"task": "retrieve", "k": 1})
    assert [match["caption"] for match in row["matches"]] == ["b"] and row["model"] is None
    assert set(row) == {"matches", "truncated", "model", "version", "run"}, "what the task answers, and its origin"


def test_promoted_it_keeps_its_card(clip, place, client, tmp_path):
    folder = clip.save(tmp_path / "bundle")
    register(folder, RegisterConfig(), "m", **place)
    version = client.get_model_version("m", "1")
    assert "## Use" in version.description and len(version.description) < 5000
    promote(client, version, "search of teaching files by radiologists")
    assert client.get_model_version_by_alias("m", "champion").version == version.version
    fetched = fetch_bundle(client, "models:/m@champion", tmp_path / "fetched")
    assert "search of teaching files by radiologists" in (fetched / "card.md").read_text()
    assert Embedder.from_bundle(Bundle.load(fetched)).identity == Embedder.from_bundle(clip).identity


def test_what_is_asked_and_answered_stands_in_the_signature(clip):
    found = signature(clip)
    assert [(c.name, c.type.name, c.required) for c in found.inputs] == [
        ("image", "binary", False),
        ("text", "string", False),
    ]
    assert [(p.name, p.default) for p in found.params] == [("task", "embed"), ("prompts", ""), ("k", 10)]
    example = input_example(clip)
    assert list(example) == ["image", "text"] and len(example) == 1


def test_requirements_are_those_of_its_towers(clip):
    own = {line.split("==")[0] for line in requirements(clip)}
    assert {"raymed", "torch", "open_clip_torch", "tokenizers", "timm"} <= own and "transformers" not in own
    architecture = json.loads(json.dumps(clip.model["architecture"]))
    del architecture["clip"]["vision_cfg"]["timm_model_name"]
    plain = replace(clip, model=clip.model | {"architecture": architecture})
    assert own - {line.split("==")[0] for line in requirements(plain)} == {"timm"}
    architecture["text"] = {"model_type": "bert"}
    other = replace(clip, model=clip.model | {"architecture": architecture})
    assert own ^ {line.split("==")[0] for line in requirements(other)} == {"timm", "transformers"}


def figure(mean: float) -> dict:
    return {"mean": mean, "ci_low": mean - 0.1, "ci_high": mean + 0.1, "unit": "patient", "n": 1}


@pytest.fixture
def measured(clip) -> Bundle:
    """With everything that a card may say."""
    recalls = {f"{way}_recall_{k}": figure(0.4) for way in ("i2t", "t2i") for k in (1, 5, 10)}
    recalls |= {"mean_recall": figure(0.5)}
    zero_shot = {"auroc/Pleural_Effusion": figure(0.8), "macro_auroc": figure(0.7)}
    return replace(
        clip,
        metrics={
            "val": recalls,
            "test": recalls,
            "seeds": {"test": recalls},
            "zero_shot": zero_shot,
            "zero_shot_shuffled": {"macro_auroc": figure(0.5)},
        },
        calibration={"before": {"ece": 0.3}, "after": {"ece": 0.02}},
        provenance=clip.provenance
        | {
            "counts": {split: {"images": 10, "captions": 20} for split in ("train", "val", "test")},
            "patients": {"train": 5, "val": 5, "test": None},
            "findings": {split: {"mass": 3, "nodule": 4} for split in ("train", "val", "test")},
        },
    )


def cells(text: str, first: str) -> list[str]:
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {first} |")]
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


def test_the_card_says_what_it_is_and_how_well_it_does(measured):
    text = card(measured, "captioned-dhn-nce")
    assert text.startswith("# captioned-dhn-nce\n") and "not a medical device" in text
    assert cells(text, "Image to text, R@5") == ["0.400 (0.300 to 0.500)"] * 3
    assert cells(text, "Mean of these")[1] == "0.500 (0.400 to 0.600)"
    assert cells(text, "Pleural Effusion") == ["0.800 (0.700 to 0.900)", "not stated"]
    assert cells(text, "Mean over findings") == ["0.700 (0.600 to 0.800)", "0.500 (0.400 to 0.600)"]
    assert "DHN-NCE" in cells(text, "Trained with")[0] and "128 numbers" in cells(text, "Answers")[0]
    assert "ECE on the test split 0.300 -> 0.020" in text and "more than 77 tokens" in text
    assert "| train | 10 | 20 | 5 |" in text and "| train | 3 | 4 |" in text
    assert "| test | 10 | 20 | unknown |" in text and "| test | 3 | 4 |" in text
    assert "Licence: CC BY 4.0" in text and "trained from random weights" in text
    assert "resampling patients" in text and "is not stated: ask" not in text


def test_a_card_that_knows_little_says_so_and_no_table_is_broken(clip, measured):
    bare = replace(clip, metrics={}, provenance={}, classes={"names": [], "positive": "not stated"})
    assert "Zero-shot classification was not measured" in card(bare)
    assert "Confidence intervals were not recorded" in card(bare) and "which is no probability" in card(bare)
    for variant in (bare, clip, measured, replace(measured, metrics=measured.metrics | {"seeds": {}})):
        rows = [line.replace("\\|", "") for line in card(variant).splitlines()]
        for above, line in zip(rows, rows[1:], strict=False):
            if above.startswith("|") and line.startswith("|"):
                assert above.count("|") == line.count("|"), (above, line)


def test_metadata_describes_both_inputs(measured):
    found = metadata(measured)
    assert set(found["network_data_format"]["inputs"]) == {"pixels", "tokens"}
    assert found["network_data_format"]["outputs"]["text_embedding"]["num_channels"] == 128
    assert found["eval_metrics"]["test_mean_recall"] == 0.5 and found["eval_metrics"]["test_mean_recall_ci"][0] == 0.4


def test_provenance_counts_captions_and_findings(tmp_path):
    from raymed.data.captioned import write_captioned
    from raymed.data.captions import CaptionConfig, load_captions

    manifest = write_captioned(tmp_path / "set", num_patients=12, size=32)
    config = CaptionConfig(
        str(manifest), caption=("caption", "caption_2"), patient="patient", split="split", findings="findings"
    )
    data = load_captions(config, tmp_path / "cache")
    found = provenance(data, config)
    for split, rows in data.splits.items():
        assert found["counts"][split] == {"images": len(rows), "captions": 2 * len(rows)}
        assert list(found["findings"][split].values()) == data.has_finding[rows].sum(axis=0).tolist()
    assert sum(found["findings"]["train"].values()) > 0 and found["patients"]["test"] > 0
    json.dumps(found)


def test_kinds_that_have_no_card_and_no_graph(clip, tmp_path):
    folder = replace(clip, kind="segmenter").save(tmp_path / "other")
    with pytest.raises(UserError, match="holds a segmenter: there are cards of classifier, clip alone"):
        write_card(folder)
    with pytest.raises(UserError, match="the bundle holds a clip"):
        export(clip, tmp_path / "model", "onnx")
    assert not (tmp_path / "model.onnx").exists()
