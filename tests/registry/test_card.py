"""What the card says, and that it never says what it does not know."""

import json
from dataclasses import replace

import numpy as np
import pytest

from raymed.bundle import NOT_STATED, Bundle
from raymed.config import UserError
from raymed.registry import write_card
from raymed.registry.card import card, metadata, provenance


def cells(text: str, first: str) -> list[str]:
    """The cells of the table row that begins with a word."""
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {first} |")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_metrics_stand_with_their_intervals(bundle):
    figure = {split: bundle.metrics[split]["auroc"] for split in ("val", "test")}
    expected = [f"{f['mean']:.3f} ({f['ci_low']:.3f} to {f['ci_high']:.3f})" for f in figure.values()]
    assert cells(card(bundle), "AUROC") == ["AUROC", *expected]
    assert "95 % intervals, resampling patients" in card(bundle)


def test_plain_metrics_have_no_interval(bundle):
    plain = replace(bundle, metrics={"val": {"auroc": 0.9}, "test": {"auroc": 0.8512, "ece": None}})
    assert cells(card(plain), "AUROC") == ["AUROC", "0.900", "0.851"]
    assert cells(card(plain), "Expected calibration error")[1:] == [NOT_STATED, NOT_STATED]
    assert "Confidence intervals were not recorded" in card(plain)


def test_figures_over_seeds_have_a_column(bundle):
    seeds = {"test": {"auroc": {"mean": 0.7, "ci_low": 0.6, "ci_high": 0.8, "n": 5}}}
    text = card(replace(bundle, metrics=bundle.metrics | {"seeds": seeds}))
    assert cells(text, "AUROC")[3] == "0.700 (0.600 to 0.800)"
    assert "mean over 5 trainings" in text


def test_operating_point_band_and_foreign_images(bundle):
    text = card(bundle)
    assert "*occluded* where the raw probability is at least 0.500 (criterion: youden" in text
    assert f"from {bundle.uncertain_band['low']:.3f} to {bundle.uncertain_band['high']:.3f}" in text
    assert cells(text, "knn") == ["knn", f"{bundle.ood['thresholds']['knn']:.3f}"]
    found = bundle.ood["separation"]["foreign"]["noise"]
    areas = [f"{found['mahalanobis']:.3f}", f"{found['knn']:.3f}", f"{found['flagged']:.1%}".replace("%", " %")]
    assert cells(text, "noise") == ["noise", str(found["images"]), *areas]


def test_calibration_is_told_either_way(bundle):
    fitted = {"applied": True, "temperature": 1.5, "bias": -0.25}
    fitted |= {"before": {"nll": 0.5, "brier": 0.2, "ece": 0.1}, "after": {"nll": 0.4, "brier": 0.15, "ece": 0.05}}
    text = card(replace(bundle, calibration=fitted))
    assert "sigmoid(logit / 1.5 -0.25)" in text and "ECE 0.100 -> 0.050" in text
    kept = {"applied": False, "reason": "too few patients"}
    assert "**Calibration.** None: too few patients." in card(replace(bundle, calibration=kept))


def test_data_and_licences(bundle):
    text = card(bundle)
    assert cells(text, "train") == ["train", "30", "30", "60", "20"]
    assert cells(text, "test") == ["test", "12", "28", "40", "11"]
    assert "Licence: CC BY 4.0" in text and "the hospital | ward 3" in text
    assert f"`{'d' * 64}`" in text
    assert "The test split has 12 images of occluded" in text


def test_a_bundle_that_knows_little_says_so(bundle):
    """As a bundle of format 1 is read."""
    bare = Bundle("classifier", bundle.weights, bundle.model, bundle.preprocess, bundle.classes, bundle.operating_point)
    text = card(bare)
    assert "answers any image, also one that is not of its kind" in text
    assert "**Uncertain band.** None" in text and "Licence: not stated" in text
    assert "modality and body part not stated" in text
    assert metadata(bare)["data_source"] == NOT_STATED and metadata(bare)["eval_metrics"] == {}


def test_intended_use_is_never_made_up(bundle):
    assert "Not stated. Nobody has said yet" in card(bundle)
    assert metadata(bundle)["intended_use"] == NOT_STATED
    stated = replace(bundle, intended_use="Triage.\nBy | radiologists")
    assert "Nobody has said" not in card(stated)
    assert "| Intended use | Triage. By \\| radiologists |" in card(stated)
    assert "not a medical device" in card(stated)


def test_no_table_is_broken(bundle):
    """Every row of a table has as many cells as its header."""
    for variant in (bundle, replace(bundle, ood={}, provenance={}, metrics={})):
        rows = [line.replace("\\|", "") for line in card(variant).splitlines()]
        for above, line in zip(rows, rows[1:], strict=False):
            if above.startswith("|") and line.startswith("|"):
                assert above.count("|") == line.count("|"), (above, line)


def test_metadata_has_the_keys_of_a_monai_bundle(bundle):
    found = metadata(bundle)
    keys = "version changelog monai_version pytorch_version numpy_version task description data_source data_type"
    keys += " image_classes label_classes pred_classes eval_metrics intended_use references network_data_format"
    assert set(keys.split()) <= found.keys()
    pixels = found["network_data_format"]["inputs"]["pixels"]
    assert (pixels["spatial_shape"], pixels["dtype"], pixels["value_range"]) == ([16, 16], "uint8", [0, 255])
    assert pixels["channel_def"] == {"0": "grey"} and pixels["modality"] == "XA"
    assert found["network_data_format"]["outputs"]["probability"]["channel_def"] == {"0": "occluded"}
    assert found["eval_metrics"]["test_auroc"] == bundle.metrics["test"]["auroc"]["mean"]


def test_files_lie_in_the_bundle(folder, bundle):
    write_card(folder, "hsg-asl")
    assert (folder / "card.md").read_text().startswith("# hsg-asl\n")
    assert json.loads((folder / "metadata.json").read_text())["eval_metrics"]["val_auroc_ci"][0] < 1
    assert Bundle.load(folder).metrics["val"]["auroc"] == bundle.metrics["val"]["auroc"] | {"std": None}


def test_a_folder_without_a_bundle(tmp_path):
    with pytest.raises(UserError, match="not a bundle"):
        write_card(tmp_path)


def test_provenance_counts_images_and_patients(tmp_path):
    from raymed.config import config_hash
    from raymed.data.dataset import load
    from raymed.data.manifest import DataConfig
    from raymed.data.phantoms import write_hsg

    config = DataConfig(str(write_hsg(tmp_path / "hsg", size=32)), positive="occluded")
    data = load(config, tmp_path / "cache")
    found = provenance(data, config)
    assert {split: sum(by_class.values()) for split, by_class in found["counts"].items()} == {
        split: len(rows) for split, rows in data.splits.items()
    }
    assert found["counts"]["test"]["occluded"] == int(data.labels[data.splits["test"]].sum())
    assert found["patients"]["val"] == len(np.unique(data.patients[data.splits["val"]]))
    assert found["config_sha"] == config_hash(config)
