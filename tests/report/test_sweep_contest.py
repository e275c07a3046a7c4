"""The report of a contest: its numbers, its files, and what it says where there were no finals."""

import dataclasses

import numpy as np
import pytest
import sweep_example
from test_page import Page

from raymed.report.sweep_contest import ContestRecord, contest_sentence, write_contest_report
from raymed.report.sweep_record import SearchRecord
from raymed.space import Float

SPACES = {
    "info_nce": {"losses.info_nce.temperature": Float(0.01, 0.6, log=True)},
    "dhn_nce": {"losses.dhn_nce.temperature": Float(0.01, 0.6, log=True), "losses.dhn_nce.beta1": Float(0.0, 1.0)},
}
PARAMS = {
    "info_nce": {"temperature": 0.07, "stage.optim.lr": 5e-4},
    "dhn_nce": {"temperature": 0.31, "beta1": 0.42, "stage.optim.lr": 1e-3},
    "dhn_nce as published": {"temperature": 0.6, "beta1": 0.15, "stage.optim.lr": 5e-4},
}


def figure(mean: float, half: float = 0.02, n: int = 5) -> dict:
    return {"mean": mean, "std": 0.01, "n": n, "ci_low": mean - half, "ci_high": mean + half}


def verdict(mean: float, p: float, said: str = "not above seed noise") -> dict:
    return {"difference": figure(mean), "p": p / 2, "p_holm": p, "verdict": said, "sentence": f"differs by {mean}."}


VERDICTS = {
    "dhn_nce": verdict(0.0413, 0.012, "above seed noise"),
    "dhn_nce as published": verdict(-0.0021, 0.61),
}


def searched(name: str) -> SearchRecord:
    space = SPACES[name] | {"stage.optim.lr": Float(1e-4, 1e-2, log=True)}
    made = sweep_example.trials(9, num_seeds=2)
    random = np.random.default_rng(0)
    for trial in made:
        trial["params"] = {name: float(random.uniform(d.low, d.high)) for name, d in space.items()}
    return SearchRecord(
        metric="mean_recall",
        mode="max",
        baseline="default",
        chosen="trial 3",
        trial_of={"default": 0, "trial 3": 3},
        trials=made,
        space=space,
        num_configurations=9,
        num_generations=0,
        generation_size=None,
        search_seeds=(2023, 2024),
    )


@pytest.fixture(scope="module")
def record():
    names = ["mean_recall", *(f"{way}_recall_{k}" for way in ("i2t", "t2i") for k in (1, 5, 10))]
    of_split = {m: {k: figure(0.5 + i / 10) for k in names} for i, m in enumerate(PARAMS)}
    return ContestRecord(
        title="Contest of info_nce, dhn_nce",
        command="python jobs/tune_dhn_nce.py --compared info_nce dhn_nce",
        metric="mean_recall",
        searches={name: searched(name) for name in SPACES},
        figures={m: {"val": of_split[m], "test": of_split[m]} for m in PARAMS},
        params=PARAMS,
        origin={"info_nce": "trial 3, 0.5012", "dhn_nce": "trial 3, 0.5312", "dhn_nce as published": "not searched"},
        chosen="dhn_nce",
        verdicts={"val": VERDICTS, "test": VERDICTS},
        sentence=sentence(VERDICTS),
        num_test_openings=1,
        search_seeds=(2023, 2024),
        final_seeds=(1, 2, 3, 4, 5),
        num_pairs={"val": 80, "test": 80},
        data="160 images of 80 patients.",
        notes=["Something to know."],
    )


def sentence(verdicts: dict, openings: int = 1) -> str:
    both = {"val": verdicts, "test": verdicts}
    return contest_sentence(both, "mean_recall", "info_nce", num_configurations=9, num_openings=openings)


@pytest.fixture(scope="module")
def written(record, tmp_path_factory):
    return write_contest_report(tmp_path_factory.mktemp("contest"), record)


@pytest.fixture(scope="module")
def page(written):
    return Page(written.read_text())


def test_files(written):
    found = {str(path.relative_to(written.parent)) for path in written.parent.rglob("*.*")}
    assert {"report.html", "table.csv", "figures/differences.png", "figures/retrieval.png"} <= found
    assert {f"{name}/trials.csv" for name in SPACES} <= found
    assert {f"{name}/figures/{figure}.png" for name in SPACES for figure in ("history", "sensitivity")} <= found


def test_the_lead_says_which_differences_exceed_noise(page):
    text = " ".join(" ".join(page.texts).split())
    assert (
        "On test, of 2 differences in mean recall from info_nce, 1 exceeds noise: dhn_nce is 0.0413 higher "
        "(p = 0.012); not so dhn_nce as published (-0.0021)." in text
    )


def test_every_method_stands_in_every_table(page):
    named = [row[0] for row in page.rows if row]
    for method in PARAMS:
        assert sum(name.split(" trial")[0].startswith(method) for name in named) >= 3


def test_configurations_share_their_columns(page):
    (header,) = [row for row in page.rows if row[1:] == ["temperature", "stage.optim.lr", "beta1"]]
    rows = page.rows[page.rows.index(header) + 1 :][:3]
    assert [row[1:] for row in rows] == [["0.07", "0.0005", ""], ["0.31", "0.001", "0.42"], ["0.6", "0.0005", "0.15"]]


def test_the_differences_stand_beside_their_chances(page):
    rows = [row for row in page.rows if row and row[0].startswith("dhn_nce") and "+0.0413" in " ".join(row)]
    assert len(rows) == 2 and all(row[3] == "0.012" and row[4] == "above seed noise" for row in rows)


def test_without_finals_it_says_so_and_shows_the_searches(record, tmp_path):
    empty = dataclasses.replace(
        record, figures={}, params={}, verdicts={}, chosen="", sentence="cannot tell: the budget was used up"
    )
    text = " ".join(" ".join(Page(write_contest_report(tmp_path, empty).read_text()).texts).split())
    assert "Cannot tell: the budget was used up." in text and "There were no finals" in text
    assert "The search of dhn_nce" in text


@pytest.mark.parametrize(
    ("verdicts", "said"),
    [
        (
            {"dcl": verdict(0.01, 0.4)},
            "of 1 difference in mean recall from info_nce, none exceeds noise: dcl (+0.0100)",
        ),
        (
            {"dcl": verdict(-0.2, 0.0001), "hn_nce": verdict(0.0, 1.0)},
            "of 2 differences in mean recall from info_nce, 1 exceeds noise: dcl is 0.2000 lower (p < 0.001); "
            "not so hn_nce (+0.0000)",
        ),
        (
            {"dcl": verdict(0.2, float("nan"), "cannot tell")},
            "of 1 difference in mean recall from info_nce, it cannot be told which exceed noise",
        ),
    ],
)
def test_sentences(verdicts, said):
    assert f"On test, {said}" in sentence(verdicts)
    assert sentence(verdicts, 3).endswith(
        "9 configurations of each were tried; this test split has been opened 3 times."
    )
