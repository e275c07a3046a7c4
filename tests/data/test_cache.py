"""Images are decoded once, and what is kept is right."""

import itertools
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from raymed.config import UserError
from raymed.data import cache, readers
from raymed.data.cache import decode
from raymed.data.preprocess import Preprocess
from raymed.data.readers import ImageFile, content_hash


@pytest.fixture
def files(tmp_path):
    """Twelve random 16 x 16 PNGs."""
    rng = np.random.default_rng(0)
    for i in range(12):
        Image.fromarray(rng.integers(0, 256, (16, 16), np.uint8)).save(tmp_path / f"{i}.png")
    return [ImageFile(tmp_path / f"{i}.png") for i in range(12)]


@pytest.fixture
def reads(monkeypatch):
    """The paths that are decoded."""
    paths = []
    original = readers.read
    monkeypatch.setattr(readers, "read", lambda path, *rest: paths.append(path) or original(path, *rest))
    return paths


def test_pixels_hashes_and_no_second_decoding(files, tmp_path, reads):
    decoded = decode(files, Preprocess(), tmp_path / "cache")
    array = np.load(decoded.path, mmap_mode="r")
    assert array.shape == (12, 16, 16, 1) and array.dtype == np.uint8 and decoded.size == 16
    for i, file in enumerate(files):
        pixels = np.asarray(Image.open(file.path))
        np.testing.assert_array_equal(array[i, ..., 0], pixels)
        assert decoded.hashes[i] == content_hash(pixels) and decoded.shapes[i] == (16, 16)
    reads.clear()
    assert decode(files, Preprocess(), tmp_path / "cache") == decoded and reads == []
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_what_the_key_depends_on(files, tmp_path):
    def path(files=files, **fields):
        return decode(files, Preprocess(**fields), tmp_path / "cache").path

    first = path()
    assert path(normalisation="none") == first  # happens later, on the batch
    others = {
        path(files[::-1]),
        path(files[1:]),
        path(size=8),
        path(fit="crop"),
    }
    os.utime(files[3].path, ns=(1, 1))
    others.add(path())
    assert len(others) == 5 and first not in others


def test_unreadable_images_are_all_collected(files, tmp_path):
    files[2].path.write_text("no image")
    files[7].path.write_bytes(b"")
    decoded = decode([*files, ImageFile(tmp_path / "none.png")], Preprocess(), tmp_path / "cache")
    assert set(decoded.problems) == {2, 7, 12}
    assert decoded.problems[12] == "there is no such file"
    assert [i for i, h in enumerate(decoded.hashes) if h is None] == [2, 7, 12]
    assert [i for i, shape in enumerate(decoded.shapes) if not shape] == [2, 7, 12]
    assert (np.load(decoded.path)[[2, 7, 12]] == 0).all() and np.load(decoded.path)[11].any()


def test_no_readable_image(tmp_path):
    with pytest.raises(UserError, match="not one of 1 images can be read; the first: there is no such file"):
        decode([ImageFile(tmp_path / "none.png")], Preprocess(), tmp_path / "cache")


def test_images_of_several_sizes_need_a_stated_one(files, tmp_path):
    Image.fromarray(np.arange(200, dtype=np.uint8).reshape(10, 20)).save(files[4].path)
    with pytest.raises(UserError, match=r"preprocess.size is not stated.*10 x 20, 16 x 16"):
        decode(files, Preprocess(), tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []
    decoded = decode(files, Preprocess(size=24), tmp_path / "cache")
    assert np.load(decoded.path).shape == (12, 24, 24, 1) and decoded.shapes[3:5] == ((16, 16), (10, 20))
    with pytest.raises(UserError, match="10 x 20"):
        decode([files[4]], Preprocess(), tmp_path / "cache")


@pytest.mark.parametrize("deep", [0, 9])
def test_one_deep_image_makes_all_16_bits(files, tmp_path, deep):
    pixels = np.random.default_rng(1).integers(0, 65536, (16, 16), np.uint16)
    Image.fromarray(pixels).save(files[deep].path)
    array = np.load(decode(files, Preprocess(), tmp_path / "cache").path)
    assert array.dtype == np.uint16
    np.testing.assert_array_equal(array[deep, ..., 0], pixels)
    np.testing.assert_array_equal(array[5, ..., 0], np.asarray(Image.open(files[5].path)).astype(np.uint16) * 257)


def test_full_disk_is_an_error_beforehand(files, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, 100))
    with pytest.raises(UserError, match="GB free"):
        decode(files, Preprocess(), tmp_path / "cache")


def test_a_share_that_goes_away_leaves_no_cache(files, tmp_path, monkeypatch):
    """Half of the images would be unreadable in it, for ever."""
    share, away = tmp_path / "share", tmp_path / "away"
    share.mkdir()
    sources = [ImageFile(file.path.rename(share / file.path.name)) for file in files]
    describe, described = cache._describe, itertools.count(1)

    def describe_and_leave(pixels):
        if next(described) == 5:
            share.rename(away)
        return describe(pixels)

    with monkeypatch.context() as patch:
        patch.setattr(cache, "_describe", describe_and_leave)
        patch.setattr("os.cpu_count", lambda: 2)  # with more threads all may have been read by then
        with pytest.raises(UserError, match="went away while they were read: check the share.* start the same command"):
            decode(sources, Preprocess(), tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*.json"))
    away.rename(share)
    assert decode(sources, Preprocess(), tmp_path / "cache").problems == {}


def test_a_file_without_permission_stands_in_no_cache(files, tmp_path, monkeypatch):
    opened = Path.open

    def forbid(path, *rest):
        if path == files[7].path:
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", forbid)
        with pytest.raises(UserError, match="7.png may not be read by this user"):
            decode(files, Preprocess(), tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())
    assert decode(files, Preprocess(), tmp_path / "cache").problems == {}


def test_several_at_once(files, tmp_path):
    with ThreadPoolExecutor(4) as pool:
        runs = [pool.submit(decode, files, Preprocess(size=32), tmp_path / "cache") for _ in range(4)]
    assert len({run.result().path for run in runs}) == len({run.result().hashes for run in runs}) == 1
    assert np.load(runs[0].result().path)[-1].any()
    assert len(list((tmp_path / "cache").iterdir())) == 2
