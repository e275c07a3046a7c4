"""Which method is marked best, and that tables are complete and fit a terminal."""

import io
import math

import pandas as pd
import pytest
from rich.console import Console

from raymed.report import comparison_csv, comparison_markdown, comparison_table, difference_table


def figure(mean, std=0.01, low=None, high=None):
    low, high = (mean - 0.02 if low is None else low), (mean + 0.02 if high is None else high)
    return {"mean": mean, "std": std, "n": 3, "ci_low": low, "ci_high": high, "num_patients": 80, "unit": "patient"} | {
        "num_undefined": 0
    }


FIGURES = {
    "ce": {"auroc": figure(0.90), "ece": figure(0.05)},
    "supcon_focal": {"auroc": figure(0.95), "ece": figure(0.03)},
    "supcon_asl": {"auroc": figure(0.93), "ece": figure(0.04)},
}


def printed(renderable, width=80, ansi=False):
    text = io.StringIO()
    Console(file=text, width=width, force_terminal=ansi, color_system="standard" if ansi else None).print(renderable)
    return text.getvalue()


def test_markdown_marks_best_and_second():
    header, _, *rows = comparison_markdown(FIGURES, ["auroc", "ece"]).splitlines()
    assert header == "| method | AUROC ↑ | ECE ↓ |"
    assert rows == [
        "| `ce` | 0.900 ± 0.010<br><sub>0.880 – 0.920</sub> | 0.050 ± 0.010<br><sub>0.030 – 0.070</sub> |",
        "| `supcon_focal` | **0.950 ± 0.010**<br><sub>0.930 – 0.970</sub> |"
        " **0.030 ± 0.010**<br><sub>0.010 – 0.050</sub> |",
        "| `supcon_asl` | <u>0.930 ± 0.010</u><br><sub>0.910 – 0.950</sub> |"
        " <u>0.040 ± 0.010</u><br><sub>0.020 – 0.060</sub> |",
    ]


def test_methods_that_read_the_same_are_marked_the_same():
    tied = {"a": {"auroc": figure(0.9501)}, "b": {"auroc": figure(0.9504)}, "c": {"auroc": figure(0.90)}}
    text = comparison_markdown(tied, ["auroc"])
    assert text.count("**0.950") == 2 and text.count("<u>0.900") == 1


@pytest.mark.parametrize("undefined", [math.nan, None])
def test_undefined_is_never_best(undefined):
    figures = {"a": {"precision": figure(0.5)}, "b": {"precision": figure(0.4)}}
    figures["c"] = {"precision": figure(0.0, std=undefined) | dict.fromkeys(("mean", "ci_low", "ci_high"), undefined)}
    rows = comparison_markdown(figures, ["precision"]).splitlines()[2:]
    assert "**0.500" in rows[0] and "<u>0.400" in rows[1]
    assert rows[2] == "| `c` | n/a<br><sub>n/a – n/a</sub> |"


def test_one_method_is_not_best_of_anything():
    assert "**" not in comparison_markdown({"ce": FIGURES["ce"]}, ["auroc"])


def test_table_fits_80_columns_and_loses_nothing():
    metrics = ["auroc", "auprc", "accuracy", "accuracy_at_0.5", "precision", "recall", "f1", "ece"]
    values = {metric: 0.9 + 0.001 * i for i, metric in enumerate(metrics)}
    figures = {m: {k: figure(v) for k, v in values.items()} for m in ("ce", "asl", "supcon_focal")}
    lines = printed(comparison_table(figures, metrics, title="Test split")).splitlines()
    assert max(map(len, lines)) <= 80 and lines[0].startswith("Test split")
    text = "\n".join(lines)
    assert "…" not in text
    for value in values.values():
        assert text.count(f"{value:.3f} ± 0.010") == 3
        assert text.count(f"{value - 0.02:.3f} – {value + 0.02:.3f}") == 3


def test_table_marks_best_and_second():
    text = printed(comparison_table(FIGURES, ["auroc"]), ansi=True)
    assert "\x1b[1m0.950 ± 0.010" in text and "\x1b[4m0.930 ± 0.010" in text


def test_difference_is_bold_where_the_interval_excludes_zero():
    differences = {
        "focal": {"auroc": figure(0.012, low=-0.003, high=0.02)},
        "supcon_focal": {"auroc": figure(0.02, low=0.001, high=0.03)},
        "asl": {"auroc": figure(-0.02, low=-0.03, high=-0.001)},
    }
    text = printed(difference_table(differences, ["auroc"] * 4), ansi=True)
    assert "\x1b[1m+0.020" in text and "\x1b[1m-0.020" in text
    assert "+0.012" in text and "\x1b[1m+0.012" not in text
    plain = printed(difference_table(differences, ["auroc"] * 4))
    assert plain.count("-0.003, +0.020") == 4 and max(map(len, plain.splitlines())) <= 80


def test_csv_is_complete():
    figures = FIGURES | {"one_seed": {"auroc": figure(0.8, std=math.nan) | {"num_patients": None, "unit": "image"}}}
    figures["one_seed"]["ece"] = figure(0.1)
    text = comparison_csv(figures, ["auroc", "ece"])
    table = pd.read_csv(io.StringIO(text)).set_index(["method", "metric"])
    assert len(table) == 8
    assert table.loc[("supcon_asl", "ece"), "mean"] == 0.04
    assert table.loc[("supcon_asl", "ece"), "ci_high"] == 0.04 + 0.02
    assert math.isnan(table.loc[("one_seed", "auroc"), "std"]) and table.loc[("one_seed", "auroc"), "unit"] == "image"
    assert "ce,auroc,0.9,0.01,3,0.88,0.92,80,patient,0\n" in text
