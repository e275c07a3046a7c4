"""A patient stays in the split they once got, whatever is added, left out or put in another order."""

import json

import numpy as np
import pandas as pd
import pytest

from raymed.config import UserError
from raymed.data.problems import settle
from raymed.data.split_file import SplitFile, SplitRule, divide, normal_date, read_split_file, unplaced
from raymed.data.splits import assign, linked

FRACTIONS = [0.65, 0.15, 0.2]
BY_TIME, BY_SITE = SplitRule("by_time"), SplitRule("by_site", test_sites=("B",))


def cohort(num=300, seed=0):
    """1 to 4 images of each patient, every fourth of whom is ill; years 2019 to 2023, sites A, B, C."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 5, num)
    patient = np.repeat([f"홍길동-{i:04d}" for i in range(num)], sizes)
    table = pd.DataFrame({"row": range(1, len(patient) + 1), "patient": patient})
    ill = np.repeat(rng.random(num) < 0.25, sizes)
    year = np.repeat(rng.integers(2019, 2024, num), sizes).astype(str)
    site = np.repeat(rng.choice(list("AABC"), num), sizes)
    return table.assign(
        label=np.where(ill, "ill", "well"), pixels=[f"{i:05x}" for i in table["row"]], year=year, site=site
    )


def grown(table, num):
    """Only the first patients."""
    return table.loc[table["patient"].isin(table["patient"].unique()[:num]), :]


def by_patient(table, split):
    sides = pd.Series(split).groupby(table["patient"].tolist()).unique()
    assert sides.map(len).max() == 1
    return sides.str[0]


def shares(table, split):
    return pd.crosstab(table["label"].to_numpy(), np.array(split), normalize="index")[
        ["train", "val", "test"]
    ].to_numpy()


def one_each(labels, **columns):
    """One image a patient."""
    num = len(labels)
    names = {
        "row": range(1, num + 1),
        "patient": [f"p{i}" for i in range(num)],
        "pixels": [f"x{i}" for i in range(num)],
    }
    return pd.DataFrame(names | {"label": labels} | columns)


def test_new_patients_make_up_for_what_is_missing():
    """Six of ten are in train, so the four who are new must be two in val and two in test."""
    groups = [f"g{i}" for i in range(10)]
    kept = dict.fromkeys(groups[:6], "train")
    split = assign(groups, ["ill"] * 10, "ill", (0.6, 0.2, 0.2), 0, kept)
    assert split[:6] == ["train"] * 6 and sorted(split[6:]) == ["test", "test", "val", "val"]


def test_without_a_past_it_is_the_random_split(tmp_path):
    table, notes = cohort(), []
    groups = linked(table["patient"].tolist(), table["pixels"].tolist())
    expected = assign(groups, table["label"].tolist(), "ill", (0.65, 0.15, 0.2), 3)
    assert divide(table, "ill", SplitRule(seed=3), notes) == expected
    assert divide(table, "ill", SplitRule(seed=3), notes, tmp_path / "split.json") == expected
    assert notes == []


@pytest.mark.parametrize("steps", [[200, 300], [100, *range(110, 301, 10)]])
def test_a_growing_manifest_keeps_every_patient_and_the_proportions(tmp_path, steps):
    table, rule, path = cohort(), SplitRule(), tmp_path / "split.json"
    before = pd.Series(dtype=object)
    for num in steps:
        part = grown(table, num)
        notes: list[str] = []
        split = divide(part, "ill", rule, notes, path)
        now = by_patient(part, split)
        assert (now[before.index] == before).all()
        np.testing.assert_allclose(shares(part, split), [FRACTIONS, FRACTIONS], atol=0.04)
        before = now
    assert notes[0].startswith(f"split file: {steps[-2]} patients stay where they were, {300 - steps[-2]} are new (")
    written = path.read_bytes()
    assert divide(table, "ill", rule, notes, path) == split and path.read_bytes() == written
    assert notes[-1] == "split file: 300 patients stay where they were"


def test_who_returns_or_leaves_or_is_relabelled_stays(tmp_path):
    table, rule, path = cohort(), SplitRule(), tmp_path / "split.json"
    first = by_patient(table, divide(table, "ill", rule, [], path))
    fewer, notes = table.loc[table["row"] % 3 > 0, :].assign(label=lambda t: np.roll(t["label"], 5)), []
    found = by_patient(fewer, divide(fewer, "ill", rule, notes, path))
    assert (found == first[found.index]).all() and len(found) < 300
    assert notes == [
        f"split file: {len(found)} patients stay where they were, {300 - len(found)} are not in this manifest"
    ]
    again = table.assign(pixels="y" + table["pixels"])  # all images taken anew
    assert (by_patient(again, divide(again, "ill", rule, [], path)) == first).all()


def test_who_left_before_others_came_is_not_forgotten(tmp_path):
    table, path = cohort(), tmp_path / "split.json"
    first = by_patient(grown(table, 200), divide(grown(table, 200), "ill", SplitRule(), [], path))
    without = table.loc[~table["patient"].isin(first.index[::2]), :]
    divide(without, "ill", SplitRule(), [], path)
    again = by_patient(table, divide(table, "ill", SplitRule(), [], path))
    assert (again[first.index] == first).all() and len(again) == 300


def test_the_file_names_nobody_and_does_not_depend_on_the_order_of_rows(tmp_path):
    table, rule = cohort(), SplitRule()
    divide(table, "ill", rule, [], tmp_path / "a.json")
    divide(table.sample(frac=1, random_state=0), "ill", rule, [], tmp_path / "b.json")
    text = (tmp_path / "a.json").read_text()
    assert text == (tmp_path / "b.json").read_text()
    assert "홍길동" not in text and "-0007" not in text and not set(table["pixels"]) & set(text.split('"'))
    file = read_split_file(tmp_path / "a.json")
    assert isinstance(file, SplitFile) and file.rule == rule and len(file.assigned) == 300


def test_a_new_patient_with_an_old_image_goes_where_it_is(tmp_path):
    """p0 to p19 are in the file. n1 shares an image with one of them in train; n2 with another in train and one in
    test: there the training side loses."""
    old, path = one_each(["ill", "well"] * 10), tmp_path / "split.json"
    split = divide(old, "ill", SplitRule(), [], path)
    train, test = (np.flatnonzero(np.array(split) == name) for name in ("train", "test"))
    shared = [f"x{train[0]}", f"x{train[1]}", f"x{test[0]}"]
    new = pd.DataFrame({"row": [21, 22, 23], "patient": ["n1", "n2", "n2"], "label": "well", "pixels": shared})
    found = divide(pd.concat([old, new], ignore_index=True), "ill", SplitRule(), [], path)
    assert found == [*split, "train", "test", "test"]


def test_images_without_a_patient_are_told_by_their_pixels(tmp_path):
    table, path = cohort(60).assign(patient=""), tmp_path / "split.json"
    split = divide(table, "ill", SplitRule(), [], path)
    order = np.random.default_rng(0).permutation(len(table))
    notes: list[str] = []
    assert divide(table.iloc[order].drop(columns="patient"), "ill", SplitRule(), notes, path) == [
        split[i] for i in order
    ]
    assert notes == [f"split file: {len(table)} images stay where they were"]


def test_the_latest_years_are_the_test_set():
    """Images by year of the patient's latest study: 2020 4, 2021 8, 2022 5, 2023 3. From 2022 on it is 8 of 20, 2023
    alone 3 of 20. The first patient has a study of 2020 too."""
    years = ["2020", "2023", *["2020"] * 4, *["2021-03-01"] * 8, *["20220630"] * 5, "2023"]
    table = one_each(["ill", "well"] * 10, year=years)
    table.loc[1, "patient"] = "p0"
    notes: list[str] = []
    split = divide(table, "ill", SplitRule("by_time", test_fraction=0.2, val_fraction=0.3), notes)
    assert [i for i, side in enumerate(split) if side == "test"] == [0, 1, 19]
    assert notes == [
        "the test set is from 2023 on: 15% of the images",
        "not from 2023 on, but of those in the test set: 1 row (1)",
    ]
    assert split.count("val") == pytest.approx(0.3 * 17, abs=1)
    wider = divide(table, "ill", SplitRule("by_time", test_fraction=0.35), [])
    assert [i for i, side in enumerate(wider) if side == "test"] == [0, 1, *range(14, 20)]
    finer = divide(table, "ill", SplitRule("by_time", test_from="2021-02"), [])
    assert [i for i, side in enumerate(finer) if side == "test"] == [0, 1, *range(6, 20)]


def test_the_chosen_year_lasts(tmp_path):
    """A year later 2023 is no longer the last one, but it is where the test set begins."""
    path, table = tmp_path / "split.json", cohort()
    early = table.loc[table["year"] < "2022", :]
    first = by_patient(early, divide(early, "ill", BY_TIME, [], path))
    assert json.loads(path.read_text())["rule"]["test_from"] == "2021"
    assert (first == "test").sum() == early.loc[early["year"] == "2021", "patient"].nunique()
    returning = first.index[first == "train"][0]
    later = table.copy()
    later.loc[later.index[later["patient"] == returning][0], "year"] = "2023"
    notes: list[str] = []
    now = by_patient(later, divide(later, "ill", BY_TIME, notes, path))
    assert (now[first.index] == first).all()
    new = now.drop(first.index)
    assert len(new) > 50 and set(new) == {"test"}
    row = later.loc[(later["patient"] == returning) & (later["year"] == "2023"), "row"].item()
    assert f"from 2021 on, but in train or val, as in the split file: 1 row ({row})" in notes


def test_named_sites_are_the_test_set(tmp_path):
    """Someone of A was once seen at B, and is in the test set wholly."""
    table, notes = cohort(), []
    guest = table["patient"] == table.loc[table["site"] == "A", "patient"].value_counts().index[0]
    table.loc[table.index[guest][0], "site"] = "B"
    split = np.array(divide(table, "ill", BY_SITE, notes, tmp_path / "split.json"))
    test = (table["site"] == "B") | guest
    assert set(split[test]) == {"test"} and set(split[~test]) == {"train", "val"}
    val = pd.crosstab(table["label"][~test], split[~test], normalize="index")["val"]
    np.testing.assert_allclose(val, 0.15, atol=0.02)
    rows = table.loc[guest, "row"].tolist()[1:]
    shown = f"{len(rows)} rows ({', '.join(map(str, rows))})"
    assert notes == [
        f"the test set is at B: {test.mean():.0%} of the images",
        f"not at B, but of those in the test set: {shown}",
    ]


@pytest.mark.parametrize(
    ("changes", "rule", "message"),
    [
        ({"year": ["2020"] * 20}, BY_TIME, "every patient's latest study is of 2020, so that no year"),
        ({"site": ["A", "B"] * 10}, SplitRule("by_site"), "State --data.test-sites; there are A, B"),
        ({"site": ["A", "Busan"] * 10}, SplitRule("by_site", test_sites=("busan",)), "did you mean 'Busan'"),
        (
            {"site": ["B"] * 20},
            BY_SITE,
            "the test set is at B; of what is left, the positive class 'ill' has 0 patients",
        ),
        ({"site": ["A", "B"] * 10}, BY_SITE, "of what is left, the other classes have 0 patients"),
        (
            {"site": ["B", *"AAAA" * 4, "A", "A", "A"]},
            BY_SITE,
            "test has no image but those of the positive class 'ill'",
        ),
    ],
)
def test_a_rule_that_leaves_nothing_is_refused_and_nothing_is_written(tmp_path, changes, rule, message):
    with pytest.raises(UserError, match=message):
        divide(one_each(["ill", "well"] * 10, **changes), "ill", rule, [], tmp_path / "split.json")
    assert not (tmp_path / "split.json").exists()


def test_too_few_patients_of_the_positive_class():
    with pytest.raises(
        UserError, match="the positive class 'ill' has 2 patients, too few to divide into train, val, test"
    ):
        divide(one_each(["ill"] * 2 + ["well"] * 18), "ill", SplitRule(), [])


def test_rows_that_cannot_be_placed_are_named():
    """Another image of p0 has a date; nothing has one of p2's; "2022" may be before or after 2022-07, "2021" not."""
    years = ["2021", "", "", "not known", "2023-02-30", "2022", "2022-08-01", "2021"]
    table = one_each(["ill", "well"] * 4, year=years)
    table.loc[1, "patient"] = "p0"
    problems = unplaced(table, SplitRule("by_time", test_from="2022-07"))
    assert [p.row for p in problems] == [3, 4, 5, 6]
    assert "no year is stated" in problems[0].text and "may be before or after 2022-07" in problems[3].text
    assert {p.row for p in unplaced(table, BY_TIME)} == {3, 4, 5}
    left = settle(table, problems, "skip", [])
    assert unplaced(left, SplitRule("by_time", test_from="2022-07")) == []
    assert [p.row for p in unplaced(table.assign(site=["A"] * 7 + [""]), BY_SITE)] == [8]
    assert unplaced(table, SplitRule()) == []
    with pytest.raises(UserError, match="'by_site' needs a column with the site of each study: --data.site COLUMN"):
        unplaced(table, BY_SITE)


def test_a_file_of_another_rule_or_other_patients_is_refused(tmp_path):
    path = tmp_path / "split.json"
    divide(cohort(), "ill", SplitRule(), [], path)
    written = path.read_bytes()
    with pytest.raises(UserError, match="was made with seed 0, not 1: state the same, or name another file"):
        divide(cohort(), "ill", SplitRule(seed=1), [], path)
    with pytest.raises(UserError, match="was made with how 'random', not 'by_site'"):
        divide(cohort(), "ill", BY_SITE, [], path)
    with pytest.raises(UserError, match="knows no patient of this manifest"):
        divide(cohort().assign(patient=lambda t: "x" + t["patient"]), "ill", SplitRule(), [], path)
    assert path.read_bytes() == written
    divide(cohort(), "ill", SplitRule("by_time", test_from="2022-07"), [], tmp_path / "time.json")
    with pytest.raises(UserError, match="was made with test_from '2022-07', not ''"):
        divide(cohort(), "ill", BY_TIME, [], tmp_path / "time.json")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("patient,split\n", "is no split file, or damaged"),
        ('{"assigned": {}}', "is no split file, or damaged"),
        ('{"format": 2, "rule": {}, "assigned": {}}', "has format 2, this program reads 1"),
        ('{"format": 1, "rule": {}, "assigned": {"a": "tset"}}', "did you mean 'test'"),
        ('{"format": 1, "rule": {"seeds": 1}, "assigned": {}}', "did you mean 'seed'"),
    ],
)
def test_a_file_that_is_none(tmp_path, content, message):
    (tmp_path / "split.json").write_text(content)
    with pytest.raises(UserError, match=message):
        read_split_file(tmp_path / "split.json")


def test_dates():
    assert normal_date("2023") == "2023" and normal_date(" 2023-5 ") == "2023-05"
    assert normal_date("20230517") == normal_date("2023/5/17") == normal_date("2023-05-17 09:30:00") == "2023-05-17"
    assert [
        normal_date(text) for text in ("", "23", "2023-02-30", "2023-13", "202305", "2023 spring", "17/05/2023")
    ] == [None] * 7


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"how": "by_year"}, "data.split_how must be one of 'random', 'by_time', 'by_site', got 'by_year'"),
        ({"test_from": "2023"}, "data.test_from has no effect with data.split_how 'random': it belongs to 'by_time'"),
        ({"how": "by_time", "test_sites": ("A",)}, "it belongs to 'by_site'"),
        ({"how": "by_time", "test_from": "May 2023"}, "must be a year or a date such as 2023-09-01"),
        ({"val_fraction": 1.0}, "data.val_fraction must be > 0 and < 1"),
    ],
)
def test_rules_are_checked(values, message):
    with pytest.raises(UserError, match=message):
        SplitRule(**values)
