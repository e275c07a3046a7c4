"""The report of images and texts: its tables, its pictures, and that it says only what it was given."""

import clip_example
import pytest
from test_page import Page

from raymed.report.clip_page import ClipRecord, protocol_table, retrieval_table, write_clip_report

PICTURES = [
    "cosines",
    "findings",
    "foils",
    "nearest_captions",
    "nearest_images",
    "reliability",
    "retrieval",
    "similarity",
]


@pytest.fixture(scope="module")
def record():
    return clip_example.record(n=160, n_boot=40)


@pytest.fixture(scope="module")
def written(record, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("raymed.report.style.DPI", 60)
        return write_clip_report(tmp_path_factory.mktemp("report"), record)


def test_every_section_and_picture_is_there(written):
    page = Page(written.read_text())
    assert sorted(path.stem for path in (written.parent / "figures").iterdir()) == PICTURES
    assert page.tags.count("img") == len(PICTURES)
    sections = [value for tag, name, value in page.attributes if (tag, name) == ("h2", "id")]
    assert sections == [
        "retrieval", "zero-shot", "compositional-accuracy", "nearest-neighbours", "similarity-as-a-probability",
        "model", "repeat", "notes",
    ]  # fmt: skip


def test_tables_say_what_the_figures_say(record, written):
    rows = Page(written.read_text()).rows
    header = next(row for row in rows if row[-1] == "mean recall ↑")
    assert header[1:3] == ["image→text R@1 ↑", "image→text R@5 ↑"] and len(header) == 8
    found = record.retrieval["fine-tuned"]["mean_recall"]
    ours = next(row for row in rows if row[0] == "fine-tuned" and len(row) == 8)
    assert ours[-1] == f"{found['mean']:.3f} {found['ci_low']:.3f} – {found['ci_high']:.3f}"
    top = record.protocol["fine-tuned"]["i2t_top_1"]
    assert [f"{100 * top['mean']:.1f} ± {100 * top['std']:.1f}"] == [
        row[1] for row in rows if row[0] == "fine-tuned" and len(row) == 5
    ]
    effusion = next(row for row in rows if row[0].startswith("Effusion"))
    assert effusion[0] == f"Effusion {record.num_positive['auroc/Effusion']} positive" and len(effusion) == 4
    assert ["organ 4 classes", "0.250"] == [next(row for row in rows if row[0].startswith("organ"))[i] for i in (0, -1)]


def test_findings_outside_the_average_are_named(record, written):
    text = " ".join(Page(written.read_text()).texts)
    assert "auroc/Hernia" not in record.averaged and "have or lack it: " in text and "Hernia" in text
    assert f"of {len(record.averaged)}" in text


def test_what_was_not_evaluated_has_no_section(record, tmp_path):
    plain = {name: record.retrieval[name] for name in ["start"]}
    few = ClipRecord("T", "", "40 pairs.", "Found.", 40, {"start": plain["start"]})
    page = Page(write_clip_report(tmp_path, few).read_text())
    assert [value for tag, name, value in page.attributes if (tag, name) == ("h2", "id")] == ["retrieval"]
    assert page.tags.count("img") == 0


def test_the_unit_that_was_resampled_is_named(record, written):
    assert "95 % interval by patient below" in written.read_text()
    by_image = {"start": {name: f | {"unit": "image"} for name, f in record.retrieval["start"].items()}}
    page = write_clip_report(written.parent / "other", ClipRecord("T", "", "40 pairs.", "Found.", 40, by_image))
    assert "95 % interval by image below" in page.read_text()


def test_tables_stand_alone(record):
    assert retrieval_table(record.retrieval).header[1:] == [f"{name} ↑" for name in (
        "image→text R@1", "image→text R@5", "image→text R@10", "text→image R@1", "text→image R@5", "text→image R@10",
        "mean recall",
    )]  # fmt: skip
    assert "batches of 50" in protocol_table(record.protocol).caption
