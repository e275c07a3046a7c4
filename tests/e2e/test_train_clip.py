"""A CLIP as a user makes one: trained beside its control, registered, evaluated again from the registry, and refused
where something is wrong."""

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from home import Home

TINY = (
    "--stage.steps=6 --stage.batch-size=16 --stage.evaluations=2 --data.deidentified --register.name=phantoms".split()
)


def summary(output: str) -> dict:
    return json.loads(Path(output.strip().splitlines()[-1].removeprefix("summary: ")).read_text())


@pytest.fixture(scope="module")
def trained(home):
    output = home.run("train_clip", *TINY, "--control", "--name=one")
    return output, summary(output)


def test_the_report_says_what_was_found(trained):
    output, found = trained
    run = Path(found["paths"]["run"])
    assert set(found["figures"]) == {"dhn_nce", "shuffled captions"}
    kinds = found["figures"]["dhn_nce"]["test"]
    for figure in (
        kinds["retrieval"]["i2t_recall_10"],
        kinds["zero-shot"]["macro_auroc"],
        kinds["foil/side"]["foil/side"],
    ):
        assert figure["ci_low"] <= figure["mean"] <= figure["ci_high"]
    assert abs(kinds["shuffled labels"]["macro_auroc"]["mean"] - 0.5) < 0.15
    for name in ("report.html", "table.csv", "index.parquet", "figures/nearest_images.png", "model/card.md"):
        assert (run / name).stat().st_size > 200
    assert found["sentence"] in output and found["sentence"] in (run / "report.html").read_text()
    assert found["registered"]["version"] == 1 and found["protocol"]["dhn_nce"]["batch"] == 50


def test_the_control_is_another_model_and_the_same_command_trains_nothing_again(home, trained):
    _, found = trained
    retrieval = [found["figures"][method]["test"]["retrieval"] for method in ("dhn_nce", "shuffled captions")]
    assert retrieval[0] != retrieval[1]
    again = summary(home.run("train_clip", *TINY, "--control", "--name=one"))
    assert again["figures"] == found["figures"] and again["registered"] == found["registered"]


def test_a_registered_model_evaluates_as_it_did_where_it_was_trained(home, trained):
    _, found = trained
    evaluated = summary(home.run("evaluate_clip", "--model=models:/phantoms@candidate", "--name=two"))
    mine, theirs = (of["figures"]["dhn_nce"]["test"] for of in (evaluated, found))
    for metric, figure in theirs["retrieval"].items():
        assert mine["retrieval"][metric]["mean"] == pytest.approx(figure["mean"], abs=1e-9)
    assert evaluated["identity"] == found["identity"]
    tables = [pq.read_table(of["paths"]["index"]) for of in (evaluated, found)]
    assert tables[0].equals(tables[1])


@pytest.mark.parametrize(
    ("job", "arguments", "message"),
    [
        ("train_clip", ["--model.name=local-dir:/nowhere"], "/nowhere"),
        ("train_clip", ["--losses.dhn-nce.temperature=0"], "temperature must be >= 0.0001"),
        ("train_clip", ["--losses.dhn-nce.temperature=inf"], "got inf"),
        ("train_clip", ["--stage.batch-size=1"], "batch_size must be >= 2"),
        ("train_clip", ["--prompts.positive", "an X-ray"], "every sentence must hold {finding}"),
        ("evaluate_clip", [], "--model is needed"),
        ("evaluate_clip", ["--model=/nowhere"], "/nowhere"),
    ],
)
def test_what_cannot_be_is_said_in_one_message(home: Home, job, arguments, message):
    output = home.run(job, *arguments, expect=2)
    assert message in output and "Traceback" not in output
