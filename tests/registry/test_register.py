"""Registering, in a real sqlite store, and loading what was registered in a process that knows nothing else."""

import io
import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import raymed
from raymed.bundle import Bundle
from raymed.config import UserError
from raymed.registry import RegisterConfig, default_name, register
from raymed.registry.audit import Audit
from raymed.registry.card import write_card
from raymed.registry.promote import promotions
from raymed.registry.register import add, identity
from raymed.registry.schema import input_example, requirements
from raymed.tasks.predictor import Predictor

LOAD = """
import sys, json
import mlflow, pandas as pd
uri, model, files = sys.argv[1], sys.argv[2], sys.argv[3:]
mlflow.set_tracking_uri(uri)
model = mlflow.pyfunc.load_model(model)
table = model.predict(pd.DataFrame({"image": [open(file, "rb").read() for file in files]}))
example = model.predict(model.input_example)
print("ANSWER", json.dumps({"rows": table.to_dict("records"), "example": len(example), "run": model.metadata.run_id}))
"""


def load_elsewhere(uri, model, files):
    """What a fresh process gets from the registered model."""
    done = subprocess.run([sys.executable, "-c", LOAD, uri, model, *map(str, files)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.split("ANSWER ")[1])


def png(image) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()


def test_a_fresh_process_gives_the_probabilities_of_training(bundle, folder, images, place, client, tmp_path):
    registered = register(folder, RegisterConfig(), "hsg-asl", **place)
    files = [tmp_path / f"{i}.png" for i in range(6)]
    for file, image in zip(files, images, strict=False):
        file.write_bytes(png(image))
    answer = load_elsewhere(client.tracking_uri, "models:/hsg-asl@candidate", files)
    expected = Predictor.from_bundle(bundle)(images[:6])
    assert len({round(p.raw_probability, 2) for p in expected}) > 3
    for row, prediction in zip(answer["rows"], expected, strict=True):
        assert row["raw_probability"] == pytest.approx(prediction.raw_probability, abs=1e-6)
        assert row["probability"] == pytest.approx(prediction.probability, abs=1e-6)
        assert row["knn"] == pytest.approx(prediction.row()["knn"], abs=1e-5)
        told = (row["decision"], row["uncertain"], row["foreign"], row["model"], row["version"], row["run"])
        known = (prediction.decision, prediction.uncertain, prediction.row()["foreign"])
        assert told == (*known, "hsg-asl", "1", "tune-1/final")
    assert answer["example"] == 1
    assert answer["run"] == registered.run_id


def test_a_version_says_where_it_comes_from(folder, place, client):
    registered = register(folder, RegisterConfig(name="HSG 1.0"), "unused", **place)
    assert registered is not None and registered.uri == "models:/HSG 1.0/1"
    version = client.get_model_version_by_alias("HSG 1.0", "candidate")
    tags = version.tags
    assert (tags["raymed.git"], tags["raymed.data"], tags["raymed.run_key"]) == ("c" * 40, "d" * 64, "tune-1/final")
    assert tags["raymed.config_sha"] == "e" * 64
    assert 0.5 < json.loads(tags["raymed.figures"])["test"]["auroc"] <= 1
    assert version.description.startswith("# HSG 1.0") and len(version.description) < 5000
    assert version.run_id == registered.run_id
    outputs = client.get_run(registered.run_id).outputs.model_outputs
    assert [model.model_id for model in outputs] == [tags["raymed.model_id"]]
    files = {file.path for file in client.list_logged_model_artifacts(tags["raymed.model_id"], "artifacts/bundle")}
    names = {"bundle.json", "model.safetensors", "extras.safetensors", "card.md", "metadata.json"}
    assert files == {f"artifacts/bundle/{name}" for name in names}


def test_registering_again_is_the_same_version(bundle, folder, place, client, tmp_path):
    first = register(folder, RegisterConfig(), "hsg-asl", **place)
    again = register(bundle.save(tmp_path / "copy"), RegisterConfig(), "hsg-asl", **place)
    other = register(
        replace(bundle, operating_point={"threshold": 0.4}).save(folder), RegisterConfig(), "hsg-asl", **place
    )
    assert first == again and other is not None and other.version == 2
    register(tmp_path / "copy", RegisterConfig(), "hsg-asl", **place)
    assert int(client.get_model_version_by_alias("hsg-asl", "candidate").version) == 2, (
        "an older one takes nothing back"
    )
    assert len(client.search_model_versions("name = 'hsg-asl'")) == 2


@pytest.mark.parametrize(
    "step", ["log_model_artifacts", "log_outputs", "finalize_logged_model", "create_model_version"]
)
def test_a_kill_at_any_point_leaves_no_second_model(step, folder, place, client, monkeypatch):
    def killed(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(type(client), step, killed)
        with pytest.raises(KeyboardInterrupt):
            register(folder, RegisterConfig(), "hsg-asl", **place)
    registered = register(folder, RegisterConfig(), "hsg-asl", **place)
    assert registered is not None and registered.version == 1
    run = client.get_run(registered.run_id)
    models = client.search_logged_models([run.info.experiment_id])
    assert [str(model.status) for model in models] == ["READY"]
    assert {output.model_id for output in run.outputs.model_outputs} == {models[0].model_id}


def test_champion_waits_for_the_intended_use(bundle, folder, place, client):
    register(folder, RegisterConfig(), "hsg-asl", **place)
    assert client.get_registered_model("hsg-asl").aliases == {"candidate": 1}
    assert promotions(client, "hsg-asl") == []
    config = RegisterConfig(intended_use="triage of HSG by a radiologist")
    register(replace(bundle, operating_point={"threshold": 0.4}).save(folder), config, "hsg-asl", **place)
    assert client.get_registered_model("hsg-asl").aliases == {"candidate": 2, "champion": 2}
    assert Bundle.load(folder).intended_use == "triage of HSG by a radiologist"
    assert "triage of HSG by a radiologist" in (folder / "card.md").read_text()
    register(folder, config, "hsg-asl", **place)
    assert len(promotions(client, "hsg-asl")) == 1


def test_a_champion_that_came_in_between_is_no_failure(bundle, folder, client, tmp_path):
    class Meanwhile:
        """A client of somebody before whom another one makes version 1 the champion."""

        def __getattr__(self, name):
            if name == "get_model_version_download_uri":
                client.set_registered_model_alias("m", "champion", "1")
            return getattr(client, name)

    audit = Audit(tmp_path / "storage")
    write_card(folder, "m")
    first = add(client, folder, "m", audit=audit)
    assert (first.is_champion, first.other_champion) == (False, None)
    write_card(replace(bundle, intended_use="triage", operating_point={"threshold": 0.4}).save(folder), "m")
    second = add(Meanwhile(), folder, "m", audit=audit)
    assert (second.version, second.is_champion, second.other_champion) == (2, False, 1)
    assert client.get_registered_model("m").aliases == {"candidate": 2, "champion": 1}
    assert [entry["action"] for entry in audit.entries()] == ["nominate", "nominate"]


def test_the_hash_is_of_what_is_learned(bundle, folder, tmp_path):
    changed = {name: tensor + 1 if name == "head.linear.bias" else tensor for name, tensor in bundle.weights.items()}
    assert identity(folder) == identity(replace(bundle, intended_use="x").save(tmp_path / "use"))
    assert identity(folder) != identity(replace(bundle, weights=changed).save(tmp_path / "weights"))


def test_requirements_are_few_and_of_this_environment(bundle):
    own = requirements(bundle)
    assert f"torch=={torch.__version__.split('+')[0]}" in own and f"raymed=={raymed.__version__}" in own
    assert len(own) < 10 and not any("timm" in line or "+" in line for line in own)
    other = replace(bundle, model={"encoder": bundle.model["encoder"] | {"backbone": "resnet10t"}})
    assert len(set(requirements(other)) - set(own)) == 1


def test_no_image_of_the_data_goes_with_the_model(bundle, images):
    """The example is noise of the network's size."""
    (content,) = input_example(bundle)["image"]
    example = np.asarray(Image.open(io.BytesIO(content)))
    assert example.shape == (16, 16) and example.dtype == np.uint8
    assert not any(np.array_equal(example, image) for image in images)
    assert 100 < example.mean() < 155 and example.std() > 60


def test_without_mlflow_the_job_goes_on(folder, tmp_path, capsys):
    assert register(folder, RegisterConfig(), "m", tracking="http://127.0.0.1:9", storage=tmp_path) is None
    printed = capsys.readouterr().out
    assert "not registered" in printed and f"--model 'm' --bundle '{folder}' --to candidate" in printed
    assert (folder / "card.md").is_file()


def test_a_model_may_stay_unregistered(folder, place, client):
    assert register(folder, RegisterConfig(register=False), "m", **place) is None
    assert (folder / "card.md").is_file()
    assert list(client.search_registered_models()) == []


def test_a_run_that_mlflow_does_not_know(bundle, place, client, tmp_path):
    lost = replace(bundle, provenance={"run_key": "elsewhere"}).save(tmp_path / "lost")
    with pytest.raises(UserError, match="MLflow has no run elsewhere"):
        add(client, lost, "m")


def test_what_is_sent_over_http_is_the_file_and_a_bad_one_is_named(bundle, folder, images, place, client):
    import mlflow
    import pandas as pd
    from fastapi.testclient import TestClient
    from mlflow.models import convert_input_example_to_serving_input
    from mlflow.pyfunc.scoring_server import init

    registered = register(folder, RegisterConfig(), "m", **place)
    assert registered is not None
    version = client.get_model_version("m", str(registered.version))
    model = mlflow.pyfunc.load_model(version.source)
    table = pd.DataFrame({"image": [png(image) for image in images[:3]]})
    sent = {"content": convert_input_example_to_serving_input(table), "headers": {"Content-Type": "application/json"}}
    answer = pd.DataFrame(TestClient(init(model)).post("/invocations", **sent).json()["predictions"])
    expected = [p.probability for p in Predictor.from_bundle(bundle)(images[:3])]
    assert answer["probability"].tolist() == pytest.approx(expected, abs=1e-6)
    assert answer["model"].tolist() == [None] * 3, "not loaded from the registry"
    with pytest.raises(UserError, match="image 1: not an image of a known format"):
        model.predict(pd.DataFrame({"image": [png(images[0]), b"nonsense"]}))


@pytest.mark.parametrize("name", ["", "a/b", "a:b", "a'b", " a", ".", "x" * 101])
def test_names_that_the_registry_cannot_take(name):
    with pytest.raises(UserError, match="must begin with a letter"):
        RegisterConfig(name=name)


@pytest.mark.parametrize(
    ("manifest", "name"),
    [
        ("phantoms", "phantoms-supcon-asl"),
        ("/data/HSG 2024.csv", "hsg-2024-supcon-asl"),
        ("C:\\scans\\pneumoniamnist.npz", "pneumoniamnist-supcon-asl"),
        ("数据.csv", "supcon-asl"),
    ],
)
def test_a_name_is_made_of_data_and_method(manifest, name):
    assert default_name(manifest, "supcon_asl") == name
    RegisterConfig(name=name)
