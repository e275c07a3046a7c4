"""Figures of images and texts: that what is right and wrong, and every method, reaches the picture."""

import numpy as np
import pytest
from PIL import Image
from test_figures import area

from raymed.report import clip_figures as draw
from raymed.report.style import BLUE, GREEN, ORANGE, VERMILION


def picture(path):
    """Pixels (H, W, 3)."""
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


FIGURE = {"mean": 0.6, "std": None, "n": 1, "ci_low": 0.5, "ci_high": 0.7}


def test_similarity_matrix_marks_what_is_nearest_but_wrong(tmp_path):
    similarity = np.eye(12) + 0.3 * np.random.default_rng(0).random((12, 12))
    related = np.eye(12, dtype=bool)

    def crosses(similarity, related):
        draw.similarity_matrix(tmp_path / "s.png", similarity, related)
        return area(picture(tmp_path / "s.png"), VERMILION)

    right = crosses(similarity, related)
    similarity[3, [3, 8]] = 0, 2
    wrong = crosses(similarity, related)
    assert wrong > right
    related[3, 8] = True
    assert crosses(similarity, related) == right


def test_retrieval_curves(tmp_path):
    of_method = {f"{way}_recall_{k}": FIGURE | {"mean": 0.5 + 0.002 * k} for way in ("i2t", "t2i") for k in (1, 5, 100)}
    undefined = {name: dict.fromkeys(FIGURE) for name in of_method}
    draw.retrieval_curves(tmp_path / "r.png", {"ours": of_method, "start": of_method, "broken": undefined}, 300)
    pixels = picture(tmp_path / "r.png")
    assert area(pixels, BLUE) > 150 and area(pixels, ORANGE) > 600


def test_neighbours_are_framed_by_hit_and_miss(tmp_path):
    random = np.random.default_rng(0)
    images = [random.random((32, 32)), random.random((24, 40, 3)), random.random((32, 32))]

    def panel(hits):
        query = draw.TextQuery("A chest film that costs $5 and $6, " + 30 * "long ", images, hits, [0.9, 0.5, -0.1])
        draw.nearest_images(tmp_path / "i.png", [query, query])
        draw.nearest_captions(
            tmp_path / "c.png", [draw.ImageQuery(images[0], ["One.", "Two.", 80 * "three "], hits, [0.9, 0.5, -0.1])]
        )
        return [[area(picture(tmp_path / f"{n}.png"), c) for c in (GREEN, VERMILION)] for n in "ic"]

    frames, words = panel([True, True, True])
    assert frames[0] > 1000 and words[0] > 20 and frames[1] == words[1] == 0
    frames, words = panel([False, True, False])
    assert frames[1] > frames[0] > 1000 and words[1] > words[0] > 10


def test_queries_may_have_fewer_neighbours(tmp_path):
    image = np.zeros((8, 8))
    few = draw.TextQuery("few", [image], [True], [1.0])
    many = draw.TextQuery("many", [image] * 3, [False] * 3, [1.0] * 3)
    draw.nearest_images(tmp_path / "i.png", [few, many])
    assert area(picture(tmp_path / "i.png"), GREEN) > 500


def test_finding_dots(tmp_path):
    rows = {
        "Effusion": {"zero-shot": FIGURE, "control": FIGURE | {"mean": 0.5}},
        "Hernia": {"zero-shot": dict.fromkeys(FIGURE)},
    }
    draw.finding_dots(tmp_path / "f.png", rows)
    pixels = picture(tmp_path / "f.png")
    assert area(pixels, BLUE) > 50 and area(pixels, ORANGE) > 50


@pytest.mark.parametrize("curve", [None, (np.linspace(-1, 1, 9), np.linspace(0, 1, 9))])
def test_similarity_histogram(tmp_path, curve):
    random = np.random.default_rng(0)
    targets = np.arange(400) % 2
    draw.similarity_histogram(tmp_path / "h.png", 0.5 * targets + 0.2 * random.normal(size=400), targets, curve)
    assert (area(picture(tmp_path / "h.png"), ORANGE) > 100) == (curve is not None)
