"""Cases to read again: which are found, and that the reader's file gives nothing away."""

import csv
import io

import numpy as np

from raymed.report.read_again import Doubt, find_doubts, read_again_blocks, read_again_csv

NAMES = ["C-d", "C-a", "C-c", "C-b", "C-e"]
TARGETS = np.array([1, 0, 1, 0, 1])
SCORES = np.array([[0.9, 0.8, 0.1, 0.2, 0.4], [0.4, 0.7, 0.2, 0.1, 0.6], [0.8, 0.4, 0.3, 0.3, 0.4]])


def find(**options):
    return find_doubts(NAMES, SCORES, SCORES >= 0.5, TARGETS, np.full(5, 2), **options)


def test_cases_most_repeats_decide_otherwise_farthest_first():
    found = find(classes=("patent", "occluded"))
    assert [(d.name, d.wrong, d.repeats, d.label) for d in found] == [
        ("C-c", 3, 3, "occluded"), ("C-a", 2, 3, "patent"), ("C-e", 2, 3, "occluded"),
    ]  # fmt: skip
    assert np.allclose([d.score for d in found], [0.2, 1.9 / 3, 1.4 / 3])
    assert [d.name for d in find(most=1)] == ["C-c"]


def test_half_of_the_repeats_is_not_enough():
    scores = np.array([[0.9], [0.1]])
    assert find_doubts(["C"], scores, scores >= 0.5, np.array([1]), np.array([1])) == []


def test_decisions_count_and_not_scores():
    """At thresholds of 0.05 and 0.95, say, of which the scores know nothing."""
    scores, decided = np.array([[0.1, 0.9], [0.1, 0.9]]), np.array([[True, False], [True, False]])
    assert find_doubts(["C-a", "C-b"], scores, decided, np.array([1, 0]), np.full(2, 1)) == []
    found = find_doubts(["C-a", "C-b"], scores, decided, np.array([0, 1]), np.full(2, 1))
    assert [(d.name, d.wrong) for d in found] == [("C-a", 2), ("C-b", 2)]


def test_the_readers_file_tells_neither_score_nor_label_nor_order():
    text = read_again_csv(find())
    assert list(csv.DictReader(io.StringIO(text))) == [
        {"case": name, "num_images": "2", "reading": "", "comment": ""} for name in ("C-a", "C-c", "C-e")
    ]
    assert "." not in text and "positive" not in text and "negative" not in text


def test_the_page_lists_them_as_found():
    assert read_again_blocks([]) == []
    table = read_again_blocks([Doubt("C-1", "patent", 0.931, 2, 3, 4)])[1]
    assert table.rows == [["C-1", "patent", "0.931", "2 of 3", "4"]]
