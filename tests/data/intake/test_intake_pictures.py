"""Copies of the images: pixels only, blanked, made once."""

import errno
import json
import os
from collections import Counter

import numpy as np
import pytest
from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo

from raymed.config import UserError
from raymed.data.intake import pictures
from raymed.data.intake.pictures import make_pictures, remove_others, show_boxes
from raymed.data.intake.pseudonyms import Pseudonyms
from raymed.data.readers import read

NAMES = Pseudonyms(bytes(32))


@pytest.fixture
def share(tmp_path):
    """A folder with a grey, a 16-bit, a coloured, a broken image, and one with text in it and around it."""
    root = tmp_path / "share"
    root.mkdir()
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (20, 30), np.uint8)).save(root / "grey.png")
    Image.fromarray(rng.integers(0, 65536, (20, 30), np.uint16)).save(root / "deep.png")
    Image.fromarray(rng.integers(0, 256, (20, 30, 3), np.uint8)).save(root / "colour.png")
    (root / "broken.png").write_bytes((root / "grey.png").read_bytes()[:300])
    named = Image.fromarray(np.full((160, 160), 60, np.uint8))
    ImageDraw.Draw(named).text((4, 4), "KIM MINJI", 255, font_size=12)
    about = PngInfo()
    about.add_text("Comment", "KIM MINJI 00123")
    named.save(root / "named.png", pnginfo=about)
    return root


def make(share, to, names, **options):
    return make_pictures(share, [(name, None) for name in names], to, NAMES, patience=(), **options)


def test_pixels_are_kept_exactly(share, tmp_path):
    names = ["grey.png", "deep.png", "colour.png"]
    pictures = make(share, tmp_path / "to", names, blanked="none")
    for name, picture in zip(names, pictures, strict=True):
        copy = read(tmp_path / "to" / "images" / f"{picture.name}.png")
        original = read(share / name)
        assert copy.dtype == original.dtype and np.array_equal(copy, original)
        assert (picture.size, picture.boxes, picture.problem) == ((20, 30), (), "")


def test_text_is_blanked_and_nothing_else(share, tmp_path):
    (picture,) = make(share, tmp_path / "to", ["named.png"])
    copy, original = read(tmp_path / "to" / "images" / f"{picture.name}.png"), read(share / "named.png")
    inside = np.zeros(original.shape, bool)
    for x0, y0, x1, y1 in picture.boxes:
        inside[y0:y1, x0:x1] = True
    assert (copy[inside] == 0).all() and np.array_equal(copy[~inside], original[~inside])
    assert (original[~inside] == 60).all() and inside.mean() < 0.1


def test_a_copy_holds_pixels_only(share, tmp_path):
    (picture,) = make(share, tmp_path / "to", ["named.png"])
    content = (tmp_path / "to" / "images" / f"{picture.name}.png").read_bytes()
    assert b"KIM" in (share / "named.png").read_bytes() and b"KIM" not in content
    kinds, at = [], 8
    while at < len(content):
        length = int.from_bytes(content[at : at + 4], "big")
        kinds.append(content[at + 4 : at + 8])
        at += length + 12
    assert set(kinds) == {b"IHDR", b"IDAT", b"IEND"}


def test_stated_boxes_are_cut_to_the_image(share, tmp_path):
    (picture,) = make(share, tmp_path / "to", ["grey.png"], blanked="0 0 10 5; 25 15 99 99; 200 0 300 9")
    assert picture.boxes == ((0, 0, 10, 5), (25, 15, 30, 20))
    copy = read(tmp_path / "to" / "images" / f"{picture.name}.png")
    assert (
        (copy[:5, :10] == 0).all() and (copy[15:, 25:] == 0).all() and copy[10, 10] == read(share / "grey.png")[10, 10]
    )


def test_what_is_done_is_not_done_again(share, tmp_path):
    names = ["grey.png", "broken.png"]
    first = make(share, tmp_path / "to", names)
    file = tmp_path / "to" / "images" / f"{first[0].name}.png"
    before = file.stat().st_mtime_ns
    with (tmp_path / "to" / "pictures.jsonl").open("a") as record:
        record.write('{"name": "I-cut')
    assert make(share, tmp_path / "to", names) == first and file.stat().st_mtime_ns == before
    file.unlink()
    assert make(share, tmp_path / "to", names) == first and file.is_file()
    other = make(share, tmp_path / "to", names, blanked="none")
    assert other[0].name != first[0].name
    remove_others(tmp_path / "to", {other[0].name})
    assert [path.stem for path in file.parent.iterdir()] == [other[0].name]


def test_what_failed_is_tried_again(share, tmp_path):
    """Its file is the same, but a decoder is there now, or the permission."""
    file = share / "broken.png"
    whole = (share / "grey.png").read_bytes()
    file.write_bytes(bytes(len(whole)))
    time = file.stat().st_mtime_ns
    (first,) = make(share, tmp_path / "to", ["broken.png"])
    file.write_bytes(whole)
    os.utime(file, ns=(time, time))
    (second,) = make(share, tmp_path / "to", ["broken.png"])
    assert first.problem and not second.problem and (tmp_path / "to" / "images" / f"{second.name}.png").is_file()


def test_what_an_older_record_knows_of_failures_does_not_count(share, tmp_path):
    (picture,) = make(share, tmp_path / "to", ["grey.png"])
    record = tmp_path / "to" / "pictures.jsonl"
    failed = json.loads(record.read_text()) | {"problem": "cannot be opened"}
    record.write_text(json.dumps(failed) + "\n")
    assert make(share, tmp_path / "to", ["grey.png"]) == [picture]


def test_reading_is_tried_again_and_one_bad_file_does_not_end_it(share, tmp_path, monkeypatch):
    tries = Counter()

    def failing(path, frame=None, window=None):
        tries[path.name] += 1
        if path.name == "deep.png" or tries[path.name] == 1:
            raise OSError(errno.EIO, "Input/output error", str(path))
        return read(path, frame, window)

    monkeypatch.setattr(pictures, "read", failing)
    wanted = [(name, None) for name in ("grey.png", "deep.png", "vanished.png", "colour.png")]
    made = make_pictures(share, wanted, tmp_path / "to", NAMES, patience=(0.01, 0.01))
    assert [picture.problem for picture in made] == ["", "cannot be opened", "cannot be opened", ""]
    assert tries == {"grey.png": 2, "deep.png": 3, "colour.png": 2}


def test_an_unreadable_image_says_why_in_our_words(share, tmp_path):
    (picture,) = make(share, tmp_path / "to", ["broken.png"])
    assert picture.problem == "truncated or damaged"
    assert not list((tmp_path / "to" / "images").iterdir())


def test_a_silent_share_ends_it_and_the_same_call_goes_on(share, tmp_path):
    make(share, tmp_path / "to", ["grey.png"])
    share.rename(tmp_path / "gone")
    with pytest.raises(UserError, match="stopped answering after 0 of 2 images.* the same command goes on"):
        make(share, tmp_path / "to", ["grey.png", "deep.png"])
    (tmp_path / "gone").rename(share)
    assert not any(picture.problem for picture in make(share, tmp_path / "to", ["grey.png", "deep.png"]))


def test_looking_without_copying(share, tmp_path):
    (picture,) = make(share, tmp_path / "to", ["named.png"], copy=False)
    assert picture.boxes and not (tmp_path / "to" / "images").exists()


def test_what_is_blanked_is_shown_in_red(share, tmp_path):
    wanted = [("grey.png", None), ("named.png", None)]
    found = make_pictures(share, wanted, tmp_path / "to", NAMES)
    file = tmp_path / "text_regions.png"
    shown = sum(bool(picture.boxes) for picture in found)
    assert show_boxes(share, wanted, found, file) == shown >= 1
    assert (np.asarray(Image.open(file)).reshape(-1, 3) == (255, 0, 0)).all(axis=1).any()
    assert file.stat().st_mode & 0o077 == 0
    (share / "grey.png").unlink()
    assert show_boxes(share, wanted, found, file, patience=()) == 1  # one that is gone is not shown
    share.rename(tmp_path / "gone")
    with pytest.raises(UserError, match="stopped answering while what is blanked was drawn") as info:
        show_boxes(share, wanted, found, file, patience=())
    assert "named" not in str(info.value) and "grey" not in str(info.value)
    (tmp_path / "gone").rename(share)
    Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)).save(share / "grey.png")
    assert show_boxes(share, wanted[:1], make(share, tmp_path / "to", ["grey.png"], blanked="none"), file) == 0
    assert not file.exists()
