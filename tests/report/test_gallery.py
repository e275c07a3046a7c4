"""The gallery: which cases are chosen, what a card says, what is drawn, and that filters work in a browser."""

import io
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image
from scipy.stats import spearmanr

from raymed.report import gallery
from raymed.report.gallery import Case, View, case_gallery, choose_cases, map_correlation, randomisation_sentence
from raymed.report.page import Card, Gallery, Lead, Section, Tile, write_page

GREY = np.tile(np.arange(40.0), (30, 1))  # (30, 40)


def opened(tile):
    with Image.open(io.BytesIO(tile.image)) as image:
        assert not image.getexif() and image.format == "JPEG"
        return np.asarray(image.convert("RGB")).astype(float)


def test_the_gravest_errors_and_the_surest_answers_are_chosen():
    scores = np.array([0.1, 0.45, 0.9, 0.99, 0.6, 0.95, 0.2, 0.01, 0.5])
    targets = np.array([1, 1, 1, 1, 0, 0, 0, 0, 1])
    assert choose_cases(scores, targets, 0.5) == {
        "false negative": [0, 1],
        "false positive": [5, 4],
        "true positive": [3, 2, 8],  # a score at the threshold is decided positive
        "true negative": [7, 6],
    }
    assert choose_cases(scores, targets, 0.5, most=1) == {
        "false negative": [0], "false positive": [5], "true positive": [3], "true negative": [7],
    }  # fmt: skip


def test_cards_say_what_is_known_errors_first():
    cases = [
        Case("C-1", True, 0.9, facts={"site": "A"}),
        Case("C-2", False, 0.6, facts={"site": ""}),
        Case("C-3", True, 0.1, facts={"site": "A"}),
    ]
    shown = case_gallery(cases, 0.5, ("patent", "occluded"))
    assert [(card.title, card.mark, card.tone) for card in shown.cards] == [
        ("C-3", "false negative", "open"), ("C-2", "false positive", "open"), ("C-1", "true positive", "good"),
    ]  # fmt: skip
    assert shown.cards[0].lines == [
        "score 0.100 (threshold 0.500): decided patent", "reference standard: occluded", "site A",
    ]  # fmt: skip
    assert shown.cards[1].lines[-1] == "site not stated"
    assert shown.filters == {
        "Result": {"false negative": 1, "false positive": 1, "true positive": 1},
        "site": {"A": 2, "": 1},
    }


def test_each_case_by_its_own_threshold():
    scores, targets, thresholds = np.array([0.4, 0.4, 0.7]), np.array([1, 1, 0]), np.array([0.3, 0.5, 0.8])
    assert choose_cases(scores, targets, thresholds) == {
        "false negative": [1], "false positive": [], "true positive": [0], "true negative": [2],
    }  # fmt: skip
    each = enumerate(zip(targets.tolist(), scores.tolist(), thresholds.tolist(), strict=True))
    cases = [Case(f"C-{i}", y == 1, score, threshold=threshold) for i, (y, score, threshold) in each]
    cards = case_gallery(cases, np.nan).cards
    assert [(card.title, card.mark) for card in cards] == [
        ("C-1", "false negative"), ("C-0", "true positive"), ("C-2", "true negative"),
    ]  # fmt: skip
    assert cards[0].lines[0] == "score 0.400 (threshold 0.500): decided negative"


def test_a_filter_that_tells_nothing_apart_is_left_out():
    cards = [Card("C-1", "m", tags={"year": "2020", "site": "A"}), Card("C-2", "m", tags={"year": "2021", "site": "A"})]
    assert Gallery(cards).filters == {"year": {"2020": 1, "2021": 1}}


def test_a_heat_map_is_drawn_where_it_is_high_and_only_there():
    hot = np.zeros((30, 40))
    hot[:15] = 1
    (card,) = case_gallery([Case("C-1", True, 0.9, [View("early", GREY, hot)])], 0.5).cards
    ((plain, heated),) = card.rows
    assert (plain.caption, heated.caption) == ("early", "heat map")
    picture, overlay = opened(plain), opened(heated)
    assert picture.shape == (30, 40, 3) and np.ptp(picture.mean(axis=(0, 2))) > 245  # lowest to highest value
    assert np.abs(overlay - picture)[20:].max() < 12  # what JPEG changes
    expected = 0.35 * picture[:10] + 0.65 * np.array([252, 255, 164])  # inferno's last colour
    assert np.abs(overlay[:10] - expected).max() < 20


def test_large_views_are_shrunk_and_colour_is_kept():
    image = np.zeros((1000, 500, 3), np.uint8)
    image[..., 0] = 200
    (card,) = case_gallery([Case("C-1", True, 0.9, [View("late", image)])], 0.5).cards
    pixels = opened(card.rows[0][0])
    assert pixels.shape == (384, 192, 3)
    assert np.abs(pixels - [200, 0, 0]).max() < 6


def test_random_weights_stand_beside_the_heat_map_with_their_correlation():
    random = np.random.default_rng(0)
    a = random.random((30, 40))
    b = np.clip(a**3 + 0.2 * random.random((30, 40)), 0, 1)
    view = View("early", GREY, a, b)
    assert map_correlation(view) == pytest.approx(spearmanr(a.ravel(), b.ravel()).statistic, abs=1e-12)
    assert map_correlation(View("early", GREY, a, a**2)) == pytest.approx(1)  # only the order counts
    (card,) = case_gallery([Case("C-1", True, 0.9, [view])], 0.5).cards
    assert [tile.caption.replace("\N{NO-BREAK SPACE}", " ") for tile in card.rows[0]] == [
        "early", "heat map", f"random weights, ρ = {map_correlation(view):.2f}",
    ]  # fmt: skip
    said = randomisation_sentence([Case("C-1", True, 0.9, [view, View("late", GREY, a)])])
    assert "over 1 images has median " + f"{map_correlation(view):.2f}" in said


def test_an_empty_map_is_said_to_be_empty_and_has_no_correlation():
    view = View("early", GREY, np.zeros((30, 40)), np.random.default_rng(0).random((30, 40)))
    (card,) = case_gallery([Case("C-1", True, 0.9, [view])], 0.5).cards
    assert [tile.caption for tile in card.rows[0]] == ["early", "heat map: empty", "random weights"]
    assert randomisation_sentence([Case("C-1", True, 0.9, [view])]) == ""
    with pytest.raises(ValueError, match=r"\(30, 39\).*\(30, 40\)"):
        case_gallery([Case("C-1", True, 0.9, [View("early", GREY, np.zeros((30, 39)))])], 0.5)


def test_a_constant_image_is_black():
    assert not gallery._to_rgb(np.full((4, 4), 7)).any()


def write(path, cards):
    return write_page(path, "T", "", Lead("S."), [Section("Cases", [Gallery(cards)])])


def test_the_page_holds_the_gallery_and_obeys_no_markup(tmp_path):
    evil = "<b>'\"&</b>"
    tile = Tile(case_gallery([Case("C", True, 1, [View("v", GREY)])], 0.5).cards[0].rows[0][0].image, evil)
    cards = [Card(evil, evil, "open", [evil], [[tile]], {evil: evil}), Card("2", "", tags={evil: ""})]
    html = write(tmp_path / "page.html", cards).read_text()
    assert "<b>" not in html and html.count("<script") == 1
    tags = [json.loads(found) for found in re.findall(r"data-tags='(.*?)'", html)]
    assert tags == [{evil: evil}, {evil: ""}]
    assert html.count('src="data:image/jpeg;base64,') == 1
    assert '<div class="filters" hidden>' in html  # shown by the script that makes them work


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium to press buttons in")
def test_filters_and_enlarging_work_in_a_browser(tmp_path):
    sites, years = ["서울", "", "서울", 'Busan\'s "x"'], ["2020", "2020", "2021", "2021"]
    cards = [
        Card(f"C-{i}", "m", rows=[[]], tags={"site": site, "year": year})
        for i, (site, year) in enumerate(zip(sites, years, strict=True))
    ]
    path = write(tmp_path / "page.html", cards)
    script = """<script>
    var log = [], press = function (name, text) {
      var filter = Array.from(document.querySelectorAll(".filter")).find(f => f.dataset.name === name);
      var button = Array.from(filter.querySelectorAll("button")).find(b => b.textContent.startsWith(text));
      button.click();
      var visible = Array.from(document.querySelectorAll(".card")).filter(c => c.getClientRects().length);
      var pressed = Array.from(filter.querySelectorAll("[aria-pressed=true]")).map(b => b.textContent);
      var names = visible.map(c => c.querySelector("h3").textContent);
      log.push([names, pressed, document.querySelector(".shown").textContent]);
    };
    press("site", "서울"); press("year", "2021"); press("site", "Busan"); press("site", "not stated");
    press("year", "all"); press("site", "all");
    document.querySelector(".card header button").click();
    log.push(Array.from(document.querySelectorAll(".card")).map(c => c.classList.contains("large")));
    document.title = JSON.stringify(log);
    </script></body>"""
    path.write_text(path.read_text().replace("</body>", script))
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom"]
    done = subprocess.run(["chromium", *options, path.as_uri()], capture_output=True, text=True, timeout=120)
    log = json.loads(re.search(r"<title>(.*?)</title>", done.stdout)[1].replace("&amp;", "&"))
    assert log == [
        [["C-0", "C-2"], ["서울 (2)"], "2 of 4 shown"],
        [["C-2"], ["2021 (2)"], "1 of 4 shown"],
        [["C-3"], ['Busan\'s "x" (1)'], "1 of 4 shown"],
        [[], ["not stated (1)"], "0 of 4 shown"],
        [["C-1"], ["all"], "1 of 4 shown"],
        [["C-0", "C-1", "C-2", "C-3"], ["all"], "4 of 4 shown"],
        [True, False, False, False],
    ]
