"""Captioned phantoms: the set, its splits and facts; foils; prompts; the same bytes again."""

import re
import time
from collections import Counter
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from raymed.config import UserError
from raymed.data.captioned import ATTRIBUTES, FOILS, NO_FINDING, answers, foils, is_captioned, prompts, write_captioned
from raymed.data.captioned_facts import VALUES, Facts

OF_LESION = ("finding", "side", "count", "size", "severity")
ORGANS = {
    "lung": r"lungs?|chest",
    "breast": r"breasts?|mammogram",
    "brain": r"brain|head",
    "uterus": r"uterus|hysterosalpingogram|hsg",
}
WORDS = {
    "finding": {"nodule": "nodules?", "mass": "mass|masses", "cyst": "cysts?", "calcification": "calcifications?"},
    "side": {"left": "left", "right": "right"},
    "count": {"1": "one|a single", "2": "two|a pair of", "3": "three"},
    "size": {"small": "small|tiny|little", "large": "large|big|sizeable"},
    "severity": {"mild": "mild|faint|subtle", "severe": "severe|dense|conspicuous"},
}


def found(words: dict[str, str], text: str) -> list[str]:
    """The values that the text names."""
    return [value for value, pattern in words.items() if re.search(rf"\b({pattern})\b", text)]


def read(text: str):
    """A caption's facts, by rules of the test's own: (organ, groups of lesions as tuples of OF_LESION)."""
    (organ,) = found(ORGANS, text.lower())
    _, *sentences = re.split(r"(?<=\.) ", text.lower()) if text.count(". ") > 1 else ("", text.lower())
    clear = [s for s in sentences if s.endswith("is clear.")]
    impression = [s for s in sentences if s.startswith("impression")]
    told = [s for s in sentences if s not in clear + impression]
    if len(sentences) > 1:  # a report has two sentences a group
        parts = [" ".join(told[i : i + 2]) for i in range(0, len(told), 2)]
    else:
        parts = re.split(" and |; ", told[0])
    groups = [read_group(part) for part in parts if any(found(words, part) for words in WORDS.values())]
    for sentence in impression:
        assert found(WORDS["finding"], sentence) == [group[0] for group in groups]
        assert all(found(WORDS[n], sentence) == [g[OF_LESION.index(n)] for g in groups] for n in ("count", "size"))
    for sentence in clear:
        assert {*found(WORDS["side"], sentence), groups[0][1]} == {"left", "right"}
    return organ, frozenset(groups)


def read_group(text: str) -> tuple[str, ...]:
    values = {name: found(words, text) for name, words in WORDS.items()}
    assert all(len(named) == 1 for named in values.values()), (text, values)
    return tuple(values[name][0] for name in OF_LESION)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    """The default set."""
    return write_captioned(tmp_path_factory.mktemp("phantoms") / "captioned")


@pytest.fixture(scope="module")
def table(manifest):
    return pd.read_csv(manifest, dtype=str, keep_default_na=False)


@pytest.fixture(scope="module")
def facts(table):
    """What each row shows, from its columns."""
    return [Facts.from_columns(cells) for cells in table.to_dict("records")]


def truth(facts: Facts):
    """As `read` gives it: the organ and the groups of lesions, in no order."""
    return facts.organ, frozenset(tuple(getattr(lesion, name) for name in OF_LESION) for lesion in facts.lesions)


def files(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_default_set_is_drawn_in_seconds(tmp_path):
    start = time.process_time()
    write_captioned(tmp_path / "set")
    assert time.process_time() - start < 8


def test_table(manifest, table):
    assert len(table) == 800 and table["patient"].nunique() == 400 and table["case"].nunique() == 800
    images = np.stack([np.asarray(Image.open(manifest.parent / name)) for name in table["image"]])
    assert images.shape == (800, 48, 48) and images.dtype == np.uint8
    assert len(set(map(bytes, images))) == 800
    assert all(len(text) >= 20 for column in ("caption", "caption_2", "caption_long") for text in table[column])


def test_a_patient_is_in_one_split_and_has_one_organ(table):
    patients = table.groupby("patient")
    assert (patients[["split", "organ"]].nunique() == 1).all(axis=None)
    assert patients["split"].first().value_counts().to_dict() == {"train": 260, "val": 60, "test": 80}
    assert set(table.groupby(["split", "organ"])["patient"].nunique()) == {65, 15, 20}


def test_facts_are_balanced_and_do_not_hang_together(table):
    one = table[(table["finding"] != "") & (table["finding_2"] == "")]
    assert (table["findings"] == NO_FINDING).sum() == 80 and (table["finding_2"] != "").sum() == 240
    for attribute in OF_LESION:
        shares = one[attribute].value_counts(normalize=True)
        assert np.allclose(shares, 1 / len(VALUES[attribute]), atol=0.05), attribute
    for a, b in pairwise(OF_LESION):
        counts = pd.crosstab(one[a], one[b]).to_numpy()
        expected = counts.sum(1, keepdims=True) * counts.sum(0, keepdims=True) / counts.sum()
        assert np.abs(counts / expected - 1).max() < 0.25, (a, b)


def test_two_groups_differ_in_finding_and_side(table):
    two = table[table["finding_2"] != ""]
    assert (two["finding"] != two["finding_2"]).all() and (two["side"] != two["side_2"]).all()
    assert (two["findings"] == two["finding"] + "|" + two["finding_2"]).all()
    assert 0.35 < (two["side"] == "left").mean() < 0.65  # which group is told first says nothing


def test_images_with_a_finding_are_all_different_within_a_split(table, facts):
    for split in ("train", "val", "test"):
        shown = [truth(f) for f, where in zip(facts, table["split"], strict=True) if where == split and f.lesions]
        assert len(set(shown)) == len(shown)


@pytest.mark.parametrize("column", ["caption", "caption_2", "caption_long"])
def test_every_caption_states_exactly_the_facts(table, facts, column):
    assert [read(text) for text in table[column]] == [truth(f) for f in facts]


def test_reading_back_finds_what_is_wrong():
    text = "Chest X-ray with two small severe nodules in the left lung."
    told = read(text)
    assert told == ("lung", frozenset({("nodule", "left", "2", "small", "severe")}))
    for true, false in [("two", "three"), ("left", "right"), ("nodules", "cysts"), ("small", "large")]:
        assert read(text.replace(true, false)) != told
    with pytest.raises(AssertionError):
        read("Chest X-ray with two small nodules in the left lung.")


def test_captions_vary_in_words(table):
    for column in ("caption", "caption_2"):
        openings = Counter(" ".join(text.split()[:2]) for text in table[column])
        assert len(openings) >= 8 and max(openings.values()) < 0.4 * len(table)
    sentences = table["caption_long"].str.count(r"\.(?: |$)")
    assert sentences.between(3, 5).all() and sentences.nunique() == 2


def test_equal_captions_within_a_split_are_equal_facts(table, facts):
    for split in ("train", "test"):
        pairs = {(c, f) for c, f, s in zip(table["caption"], facts, table["split"], strict=True) if s == split}
        assert len({c for c, _ in pairs}) == len(pairs) == len({f for _, f in pairs})


def changes(before, after) -> int:
    """How many facts differ. Groups are told apart by what they share most."""
    (organ, groups), (other, others) = before, after
    pairings = [(sorted(groups), sorted(others)), (sorted(groups), sorted(others)[::-1])]
    return (organ != other) + min(
        sum(x != y for g, h in zip(a, b, strict=True) for x, y in zip(g, h, strict=True)) for a, b in pairings
    )


@pytest.mark.parametrize("kind", FOILS)
def test_a_foil_differs_in_exactly_one_fact(manifest, table, facts, kind):
    told = foils(manifest, kind)
    assert len(told) == len(table)
    for text, foil, shown in zip(table["caption"], told, facts, strict=True):
        if foil is None:
            continue
        organ, groups = read(foil)
        assert foil != text and changes(truth(shown), (organ, groups)) == (2 if kind == "swap" else 1)
        if kind == "swap":  # the findings of both, and nothing else
            assert sorted(g[0] for g in groups) == sorted(lesion.finding for lesion in shown.lesions)
        elif kind == "organ":
            assert organ != shown.organ
        else:
            place = OF_LESION.index(kind)
            assert {g[:place] + g[place + 1 :] for g in groups} == {g[:place] + g[place + 1 :] for g in truth(shown)[1]}


def test_foils_are_there_where_they_can_be(manifest, facts):
    num = {kind: sum(foil is not None for foil in foils(manifest, kind)) for kind in FOILS}
    assert num == dict.fromkeys(FOILS, 720) | {"organ": 800, "side": 480, "swap": 240}


def test_no_foil_says_what_no_caption_could(manifest):
    for foil in (foil for kind in FOILS for foil in foils(manifest, kind) if foil):
        groups = read(foil)[1]
        assert len({g[0] for g in groups}) == len({g[1] for g in groups}) == len(groups)


@pytest.mark.parametrize("kind", FOILS)
def test_text_alone_does_not_tell_a_foil(manifest, table, kind):
    """AUROC of a linear model on words, pairs and triples of words; both texts of a row stay in one fold."""
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score
    from sklearn.model_selection import GroupKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline

    pairs = [(text, foil) for text, foil in zip(table["caption"], foils(manifest, kind), strict=True) if foil]
    texts, is_foil = [text for pair in pairs for text in pair], np.tile([0, 1], len(pairs))
    model = make_pipeline(CountVectorizer(ngram_range=(1, 3), min_df=3), LogisticRegression(C=0.1, max_iter=200))
    scores = cross_val_predict(
        model, texts, is_foil, groups=np.repeat(np.arange(len(pairs)), 2), cv=GroupKFold(4), method="decision_function"
    )
    assert roc_auc_score(is_foil, scores) < 0.6


def test_a_swap_keeps_the_words(manifest, table):
    one = [
        (text, foil)
        for text, foil, a, b in zip(
            table["caption"], foils(manifest, "swap"), table["count"], table["count_2"], strict=True
        )
        if foil and (a == "1") == (b == "1")  # else plurals move with the nouns
    ]
    assert len(one) > 50 and all(sorted(text.split()) == sorted(foil.split()) for text, foil in one)


@pytest.mark.parametrize("attribute", ATTRIBUTES)
def test_prompts_state_their_value_in_the_same_contexts(attribute):
    found = prompts(attribute)
    assert set(found) == set(VALUES[attribute]) | ({NO_FINDING} if attribute == "finding" else set())
    for value in VALUES[attribute]:
        assert len(set(found[value])) == 16
        for text, other in zip(found[value], found[VALUES[attribute][0]], strict=True):
            assert changes(read(text), read(other)) == (value != VALUES[attribute][0])
        organs, groups = zip(*map(read, found[value]), strict=True)
        told = organs if attribute == "organ" else [next(iter(g))[OF_LESION.index(attribute)] for g in groups]
        assert set(told) == {value}
    assert all(read(text)[1] == frozenset() for text in found.get(NO_FINDING, ()))


def test_answers(manifest, table):
    assert answers(manifest, "organ") == table["organ"].tolist()
    two, none = table["finding_2"] != "", table["finding"] == ""
    for attribute in OF_LESION:
        expected = table[attribute].mask(two, None).mask(none, NO_FINDING if attribute == "finding" else None)
        assert answers(manifest, attribute) == [None if pd.isna(value) else value for value in expected]


def test_same_arguments_give_the_same_bytes(tmp_path):
    for name, seed in (("a", 2), ("b", 2), ("c", 3)):
        write_captioned(tmp_path / name, num_patients=6, size=32, seed=seed)
    assert files(tmp_path / "a") == files(tmp_path / "b")
    assert files(tmp_path / "a") != files(tmp_path / "c")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c"]


def test_complete_folder_is_kept_and_a_damaged_one_written_again(tmp_path):
    folder = tmp_path / "set"
    manifest = write_captioned(folder, num_patients=4, images_per_patient=1, size=32)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert write_captioned(folder, num_patients=4, images_per_patient=1, size=32) == manifest
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    whole = files(folder)
    (folder / "images" / "P0002_0.png").write_bytes(b"")
    write_captioned(folder, num_patients=4, images_per_patient=1, size=32)
    assert files(folder) == whole


def test_what_is_not_ours_is_never_replaced(tmp_path):
    write_captioned(tmp_path / "set", num_patients=4, size=32)
    with pytest.raises(UserError, match="phantoms of other parameters"):
        write_captioned(tmp_path / "set", num_patients=5, size=32)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    with pytest.raises(UserError, match="holds other files"):
        write_captioned(tmp_path / "mine", num_patients=4, size=32)
    assert (tmp_path / "mine" / "notes.txt").read_text() == "keep"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_patients": 3}, "num_patients must be >= 4, got 3"),
        ({"images_per_patient": 0}, "images_per_patient must be >= 1, got 0"),
        ({"size": 16}, "size must be >= 32, got 16"),
        ({"seed": -1}, "seed must be >= 0, got -1"),
    ],
)
def test_arguments_are_checked(tmp_path, arguments, message):
    with pytest.raises(UserError, match=message):
        write_captioned(tmp_path / "set", **arguments)
    assert list(tmp_path.iterdir()) == []


def test_questions_are_checked(tmp_path, manifest):
    with pytest.raises(UserError, match="attribute must be one of .* got 'sides' .did you mean 'side'"):
        prompts("sides")
    with pytest.raises(UserError, match="kind must be one of .*'swap', got 'colour'"):
        foils(manifest, "colour")
    other = tmp_path / "other.csv"
    other.write_text("image,caption\na.png,Nothing known\n")
    assert is_captioned(manifest) and not is_captioned(other) and not is_captioned(tmp_path / "other.npz")
    with pytest.raises(UserError, match="no manifest of captioned phantoms: it has no column 'count'"):
        foils(other, "side")
