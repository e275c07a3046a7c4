"""The page: nothing is loaded, nothing in the text is obeyed, what is given is there."""

import base64
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from raymed.report.page import Bullets, Cell, Code, Facts, Lead, Picture, Section, Table, Text, write_page

EVIL = '<script>alert("x")</script> & <b>'


class Page(HTMLParser):
    """Tags, attributes and text of a page, and the rows of its tables."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.attributes, self.texts, self.rows, self.cell = [], [], [], [], None
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [(tag, *attribute) for attribute in attributes]
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self.cell = True

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self.cell = None

    def handle_data(self, data):
        self.texts.append(data)
        if self.cell:
            self.rows[-1][-1] = " ".join((self.rows[-1][-1] + " " + data).split())


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "dots.png"
    Image.fromarray(np.zeros((180, 360, 3), np.uint8)).save(path, dpi=(180, 180))
    return path


def write(tmp_path, *blocks, title="A title", lead=None):
    lead = lead or Lead("A sentence.")
    return write_page(tmp_path / "page.html", title, "about", lead, [Section("Part one", blocks)])


def test_text_is_escaped_everywhere(tmp_path, picture):
    blocks = [
        Text(EVIL),
        Bullets([EVIL]),
        Table([EVIL], [[EVIL, Cell(EVIL, EVIL)]], EVIL),
        Picture(picture, EVIL, EVIL),
        Code(EVIL, EVIL),
        Facts({EVIL: EVIL}, EVIL),
    ]
    lead = Lead(EVIL, [EVIL], numbers={EVIL: EVIL})
    path = write_page(tmp_path / "page.html", EVIL, EVIL, lead, [Section(EVIL, blocks)])
    page = Page(path.read_text())
    assert page.tags.count("script") == 1 and "b" not in page.tags
    assert "".join(page.texts).count(EVIL) == 22  # title and section twice each
    assert ("img", "alt", EVIL) in page.attributes


def test_nothing_is_loaded(tmp_path, picture):
    html = write(tmp_path, Picture(picture, "Dots."), Code("pip install x")).read_text()
    assert not re.search(r"https?://|//[a-z]|@import|url\(", html.replace("<!doctype", ""))
    page = Page(html)
    assert not {"link", "iframe", "object", "embed"} & set(page.tags)
    loaded = [value for _, name, value in page.attributes if name in ("src", "srcset", "href")]
    assert [value for value in loaded if not value.startswith(("data:image/png;base64,", "#"))] == []
    assert any("default-src 'none'" in (value or "") for _, _, value in page.attributes)


def test_picture_is_embedded_in_the_size_it_was_drawn_for(tmp_path, picture):
    page = Page(write(tmp_path, Picture(picture, "Dots.")).read_text())
    attributes = {name: value for tag, name, value in page.attributes if tag == "img"}
    assert base64.b64decode(attributes["src"].split(",")[1]) == picture.read_bytes()
    assert (attributes["width"], attributes["height"], attributes["alt"]) == ("192", "96", "Dots.")  # 2 x 1 inches


def test_table_facts_and_links(tmp_path):
    table = Table(["", "AUROC"], [["asl", Cell("0.9", "0.8 – 1.0", "best")], ["ce", "0.8"]], "Means.")
    facts = Facts({"clip": None, "seeds": [1, 2], "gpus": [], "fast": True})
    html = write(tmp_path, table, facts).read_text()
    page = Page(html)
    assert page.rows == [["", "AUROC"], ["asl", "0.9 0.8 – 1.0"], ["ce", "0.8"]]
    assert '<span class="best">0.9</span>' in html
    pairs = re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", html)
    assert pairs == [("clip", "none"), ("seeds", "1, 2"), ("gpus", "none"), ("fast", "true")]
    assert ("a", "href", "#part-one") in page.attributes and ("h2", "id", "part-one") in page.attributes


def test_sections_without_blocks_are_left_out(tmp_path):
    path = write_page(tmp_path / "page.html", "T", "", Lead("S."), [Section("Empty", []), Section("Full", [Text("x")])])
    assert "Empty" not in path.read_text() and "Full" in path.read_text()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["page.html"]
