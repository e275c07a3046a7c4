"""evaluate_classifier and compare_models as commands, on phantoms that the models have seen and on others."""

import json
from pathlib import Path

import pytest
from home import TINY, Home

TRAIN = (*TINY, "--method=asl", "--seeds", "1", "2", "--name=trained")


def summary(output: str) -> dict:
    return json.loads(Path(output.strip().splitlines()[-1].removeprefix("summary: ")).read_text())


@pytest.fixture(scope="module")
def models(home):
    """Two bundles' folders."""
    run = Path(summary(home.run("train_classifier", *TRAIN))["paths"]["run"])
    return [str(run / f"seed-{seed}" / "bundle") for seed in (1, 2)]


def test_other_phantoms_are_evaluated_at_the_model_s_threshold(home, models):
    found = summary(home.run("evaluate_classifier", f"--model={models[0]}", "--prevalences", "0.1", "--name=other"))
    bundle = json.loads((Path(models[0]) / "bundle.json").read_text())
    assert found["operating_point"]["threshold before calibration"] == round(bundle["operating_point"]["threshold"], 6)
    assert found["figures"]["case"]["test"]["auroc"]["num_patients"] == 120
    assert "ppv_at_0.1" in found["figures"]["case"]["test"]
    assert (Path(found["paths"]["report"])).stat().st_size > 50_000


def test_two_models_are_compared(home, models):
    output = home.run("compare_models", "--models", *models, "--name=pair")
    found = summary(output)
    assert list(found["models"]) == ["seed-1", "seed-2"] and found["sentence"] in output
    assert found["differences"]["case"]["auroc"]["num_patients"] == 120


def test_the_training_set_is_refused(home, models):
    manifest = f"--data.manifest={home.storage}/phantoms/hsg-64/manifest.csv"
    for job, flags in (("evaluate_classifier", ["--model", models[0]]), ("compare_models", ["--models", *models])):
        output = home.run(job, *flags, manifest, expect=2)
        assert "figures there would be too good" in output and "Traceback" not in output


@pytest.mark.parametrize(
    ("job", "arguments", "message"),
    [
        ("evaluate_classifier", [], "--model is needed"),
        ("evaluate_classifier", ["--prevalences", "2"], "prevalences must be > 0 and < 1, got 2"),
        ("compare_models", ["--models", "one"], "two different models"),
    ],
)
def test_bad_commands_end_in_one_message(home: Home, job, arguments, message):
    output = home.run(job, *arguments, expect=2)
    assert message in output and "Traceback" not in output
