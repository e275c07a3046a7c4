"""The look of figures: Hangul is drawn with a font that has it, and nothing else changes."""

import subprocess
import sys
import warnings

import numpy as np
import pytest
from PIL import Image

from raymed.report import style

needs_hangul = pytest.mark.skipif(len(style.font_families()) < 2, reason="koreanize_matplotlib is not installed")


def drawn(path, text, **options):
    with style.figure(path, 2, 1) as figure:
        figure.text(0.1, 0.4, text, fontsize=20, **options)
    with Image.open(path) as image:
        return np.asarray(image.convert("L"))


@needs_hangul
@pytest.mark.parametrize("weight", ["normal", "bold"])
def test_hangul_is_drawn_and_no_box(tmp_path, weight, caplog):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # matplotlib warns of a glyph it lacks
        one, other = (drawn(tmp_path / f"{text}.png", text, fontweight=weight) for text in ("가나", "힣뷁"))
    assert one.shape != other.shape or (one != other).any()  # boxes would all look alike
    assert caplog.text == ""


@needs_hangul
def test_bold_hangul_is_bolder(tmp_path):
    dark = [(drawn(tmp_path / "t.png", "난관 폐쇄", fontweight=weight) < 128).sum() for weight in ("normal", "bold")]
    assert dark[1] > 1.2 * dark[0]


def test_latin_looks_as_without_hangul(tmp_path, monkeypatch):
    ours = drawn(tmp_path / "a.png", "Sensitivity ≥ 0.95 ✓")
    monkeypatch.setattr(style, "font_families", lambda: ("DejaVu Sans",))
    assert (ours == drawn(tmp_path / "b.png", "Sensitivity ≥ 0.95 ✓")).all()


def test_without_the_package_the_own_font_is_used(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert style.font_families.__wrapped__() == ("DejaVu Sans",)


def test_settings_of_the_process_stay():
    code = (
        "import matplotlib, pathlib, sys, tempfile; before = dict(matplotlib.rcParams)\n"
        "from raymed.report.style import figure\n"
        "with figure(pathlib.Path(tempfile.mkdtemp()) / 'x.png', 1, 1) as f: f.text(0, 0, 'x')\n"
        "assert dict(matplotlib.rcParams) == before and 'koreanize_matplotlib' not in sys.modules"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stderr == ""
