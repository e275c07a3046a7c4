"""The report of a sweep: its numbers, its files, and what it says where there is nothing to draw."""

import csv
import dataclasses
import io
import math
import re

import numpy as np
import pandas as pd
import pytest
import sweep_example
from PIL import Image
from test_page import Page

from raymed.report.sweep import SweepRecord, trials_csv, write_sweep_report
from raymed.space import Choice, Float

PICTURES = ["calibration", "confusion", "differences", "history", "importance", "parallel", "pr_roc", "sensitivity"]


@pytest.fixture(scope="module")
def record():
    made = sweep_example.record(num_trials=48, num_seeds=2, num_images=240, n_boot=60)
    figure = {"mean": 0.41, "std": 0.02, "n": 2, "ci_low": 0.37, "ci_high": 0.45}
    inside = {
        method: {"box_alignment": figure | {"mean": 0.41 + 0.02 * i}, "concept_count": figure | {"mean": 140.0 - i}}
        for i, method in enumerate(made.figures)
    }
    return dataclasses.replace(made, inside=inside)


@pytest.fixture(scope="module")
def written(record, tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    return write_sweep_report(folder, record)


@pytest.fixture(scope="module")
def page(written):
    return Page(written.read_text())


@pytest.fixture(autouse=True)
def coarse_figures(written, monkeypatch):
    """Figures of one test are drawn in few pixels; those of `written`, drawn before, are as they should be."""
    monkeypatch.setattr("raymed.report.style.DPI", 40)


def small(**changes) -> SweepRecord:
    """Few trials and no finalist: quick to report."""
    fields = {"num_trials": 1, "num_finalists": 0, "num_seeds": 1, "num_images": 120, "n_boot": 20}
    return sweep_example.record(**(fields | changes))


def said(path):
    """All text of the page."""
    return " ".join(" ".join(Page(path.read_text()).texts).split())


def test_files(written):
    found = sorted(str(path.relative_to(written.parent)) for path in written.parent.rglob("*.*"))
    assert found == [*(f"figures/{name}.png" for name in PICTURES), "report.html", "table.csv", "trials.csv"]
    assert written.read_text().count("data:image/png;base64,") == len(PICTURES)
    for name in PICTURES:
        with Image.open(written.parent / "figures" / f"{name}.png") as image:
            pixels = np.asarray(image.convert("L"), float)
        assert pixels.var() > 100 and (pixels == 255).mean() < 0.98


def test_nothing_is_loaded(written):
    assert not re.search(r"https?://", written.read_text())


def test_lead_says_the_sentence_and_what_qualifies_it(record, page, written):
    text = " ".join(" ".join(page.texts).split())
    first, rest = record.sentence.split(". ", 1)
    assert "".join(page.texts).index(first) < "".join(page.texts).index("AUPRC minus default")
    assert (
        f"{first}. {rest}" in text and "48 configurations were tried; this test split has been opened 2 times." in rest
    )
    assert "The more often a test split is opened" in text
    numbers = re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", written.read_text())
    assert ("configurations tried", "48") in numbers and ("times this test split has been opened", "2") in numbers
    assert "48 configurations were tried in 2 generations of 32. Suggestions were made by generation" in text
    stopped = sum(trial["status"] == "stopped" for trial in record.trials)
    assert f"ASHA cut {stopped} at a rung before the last evaluation, 1 failed" in text
    assert record.command in "".join(page.texts)


def test_results_are_the_figures_given(record, page):
    headers = [row for row in page.rows if row[1:2] == ["AUPRC ↑"]]
    assert len(headers) == 2 and len(headers[0]) == 10  # test and validation
    start = page.rows.index(headers[0])
    for row, (method, figures) in zip(page.rows[start + 1 :], record.figures.items(), strict=False):
        figure = figures["test"]["auprc"]
        assert row[0] == method + (" chosen" if method == record.chosen else "")
        assert row[1] == (
            f"{figure['mean']:.3f} ± {figure['std']:.3f} {figure['ci_low']:.3f} – {figure['ci_high']:.3f}"
        )


def test_marks_of_best_and_second(record, written):
    html = written.read_text()
    results = html[html.index(">Results<") : html.index("validation split: mean")]
    for metric, sign in (("auprc", 1), ("brier", -1)):
        means = [round(figures["test"][metric]["mean"], 3) for figures in record.figures.values()]
        ranked = sorted(set(means), key=lambda mean: -sign * mean)
        marked = dict(re.findall(rf'<span class="(best|second)">({ranked[0]:.3f}|{ranked[1]:.3f}) ', results))
        assert marked["best"] == f"{ranked[0]:.3f}" and marked["second"] == f"{ranked[1]:.3f}"


def test_verdicts_once_on_each_split(record, page):
    conclusions = ("above seed noise", "not above seed noise", "cannot tell")
    rows = [row for row in page.rows if row[-1] in conclusions]
    expected = []
    for split in ("val", "test"):
        for name, verdict in record.verdicts[split].items():
            figure = verdict["difference"]
            shown = f"{figure['mean']:+.4f} {figure['ci_low']:+.4f}, {figure['ci_high']:+.4f}"
            chosen = " chosen" if name == record.chosen else ""
            p = ["< 0.001" if verdict[key] < 0.001 else f"{verdict[key]:.3f}" for key in ("p", "p_holm")]
            expected.append([name + chosen, shown, *p, verdict["verdict"]])
    assert rows == expected
    assert all(verdict["sentence"] in page.texts for verdict in record.verdicts["test"].values())


def test_look_inside_stands_beside_auroc(record, page):
    rows = [row for row in page.rows if row[1:] == ["AUROC ↑", "box alignment ↑", "concept count"]]
    first = page.rows[page.rows.index(rows[0]) + 1]
    auroc = record.figures["default"]["test"]["auroc"]
    assert first[1].startswith(f"{auroc['mean']:.3f} ± ")
    assert first[2:] == ["0.410 ± 0.020 0.370 – 0.450", "140.0 ± 0.0 0.370 – 0.450"]


def test_configurations_of_the_final(record, page):
    row = next(row for row in page.rows if row[0] == "head.optim.lr")
    chosen = record.trials[record.trial_of[record.chosen]]["params"]["head.optim.lr"]
    assert row[1:4] == ["0.0001 – 0.1, log", "0.001", f"{chosen:.4g}"]
    assert next(row for row in page.rows if row[0] == "head.ema_decay")[1:3] == ["one of none, 0.99, 0.999", "none"]


def test_trials_csv_round_trips(record):
    rows = list(csv.DictReader(io.StringIO(trials_csv(record))))
    assert len(rows) == 48
    for row, trial in zip(rows, record.trials, strict=True):
        assert int(row["number"]) == trial["number"] and row["status"] == trial["status"]
        assert row["value"] == ("" if trial["value"] is None else repr(trial["value"]))
        seeds = [row[f"seed_{seed}"] for seed in record.search_seeds]
        assert seeds == ([repr(value) for value in trial["per_seed"]] or ["", "", ""])
        assert row["last_rung"] == (str(max(trial["rungs"])) if trial["rungs"] else "")
        assert float(row["head.optim.lr"]) == trial["params"]["head.optim.lr"]
        decay = trial["params"]["head.ema_decay"]
        assert row["head.ema_decay"] == ("none" if decay is None else repr(decay))


def test_table_csv_holds_both_splits(record, written):
    table = pd.read_csv(written.parent / "table.csv").set_index(["split", "method", "metric"])
    for split in ("val", "test"):
        for method, figures in record.figures.items():
            assert table.loc[(split, method, "auprc"), "mean"] == figures[split]["auprc"]["mean"]
    assert len(table) == 2 * len(record.figures) * 9


def test_one_trial_and_no_finalist(tmp_path):
    path = write_sweep_report(tmp_path, small())
    text = said(path)
    assert "Cannot tell: no configuration but the default has finished." in text and "tone-open" in path.read_text()
    assert "No configuration besides default reached the final: nothing to compare." in text
    assert "One trial finished: there is no history to draw." in text
    assert "With fewer than two finished trials nothing can be said of any hyper-parameter." in text
    assert "1 configuration was tried in 1 generation of 32" in text
    assert "one seed, so without bands" in text and "nan" not in text.lower().split()
    assert sorted(p.stem for p in (tmp_path / "figures").iterdir()) == ["calibration", "confusion", "pr_roc"]


def test_no_finals(tmp_path):
    nothing = dict.fromkeys(("figures", "predictions", "thresholds", "verdicts", "trial_of"), {})
    record = dataclasses.replace(small(), **nothing, num_test_openings=0, sentence="cannot tell: no time")
    text = said(write_sweep_report(tmp_path, record))
    assert "Cannot tell: no time." in text and "There were no finals: nothing was trained on fresh seeds." in text
    assert "There are no predictions of the test split to draw." in text and "chosen" not in text.lower()


def test_no_trial_finished(tmp_path):
    failed = [t | {"status": "failed", "value": math.nan, "rungs": {}, "per_seed": []} for t in sweep_example.trials(3)]
    record = dataclasses.replace(small(), trials=failed)
    assert "No trial finished: there is no history to draw." in said(write_sweep_report(tmp_path, record))
    assert "nan" not in (tmp_path / "trials.csv").read_text()


def test_one_seed_has_no_band_and_few_trials_no_importance(tmp_path):
    few = [dict(trial, per_seed=trial["per_seed"][:1]) for trial in sweep_example.trials(8)]
    record = dataclasses.replace(small(), trials=few, search_seeds=[2023])
    text = said(write_sweep_report(tmp_path, record))
    num_finished = sum(trial["status"] == "finished" for trial in few)
    assert "of one seed, so no band" in text
    assert f"Importance is not shown: {num_finished} finished trials are too few." in text


def test_one_hyper_parameter(tmp_path):
    space = {"losses.asl.gamma_neg": Float(0.0, 5.0)}
    record = dataclasses.replace(small(), trials=sweep_example.trials(12, space=space), space=space)
    assert "With one hyper-parameter there is no importance" in said(write_sweep_report(tmp_path, record))
    assert (tmp_path / "figures" / "sensitivity.png").exists() and not (tmp_path / "figures" / "parallel.png").exists()


def test_values_that_are_undefined_or_outside_the_space(tmp_path):
    trials = sweep_example.trials(12)
    trials[0]["params"] |= {"losses.asl.gamma_pos": 3.0, "head.optim.lr": 0.0}  # not an option; no logarithm
    trials[0]["value"] = math.nan
    trials[3] |= {"status": "finished", "per_seed": [math.nan] * 3}
    figures = small().figures
    undefined = dict(figures["default"]["val"], auprc=dict(figures["default"]["val"]["auprc"], mean=None, ci_low=None))
    record = dataclasses.replace(small(), trials=trials, figures={"default": {**figures["default"], "val": undefined}})
    text = said(write_sweep_report(tmp_path, record))
    assert "losses.asl.gamma_pos = 3 of trial 0; head.optim.lr = 0 of trial 0" in text
    assert "n/a – " in text


def test_a_test_split_of_one_class_has_no_curves(tmp_path):
    record = small()
    scores, targets = record.predictions["default"]["test"][0]
    one_class = {"default": {"test": [(scores, np.ones_like(targets))]}}
    text = said(write_sweep_report(tmp_path, dataclasses.replace(record, predictions=one_class)))
    assert "The test split holds one class only" in text


def test_names_are_text(tmp_path):
    name = "<script>alert(1)</script>"
    space = {name: Choice(("<b>", None))}
    trials = [t | {"params": {name: None if t["number"] % 2 else "<b>"}} for t in sweep_example.trials(6)]
    record = dataclasses.replace(small(), positive=name, negative=name, title=name, space=space, trials=trials)
    page = Page(write_sweep_report(tmp_path, record).read_text())
    assert page.tags.count("script") == 1 and "b" not in page.tags
    assert any(row[:3] == [name, "one of <b>, none", "<b>"] for row in page.rows)
